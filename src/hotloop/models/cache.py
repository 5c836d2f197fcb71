"""The key/value cache: slots, each with a length of its own.

A slot holds one sequence. Lengths live with the engine, as positions handed to every forward; the
cache itself is memory and the writing into it. A position that is not yet written is never read,
since attention stops at a token's own position.

Shape letters: S slots, J key/value heads, C positions, E head dimension, B sequences, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class KVCache(nn.Module):
    """Keys and values of every layer, [S, J, C, E] each: a head's history is contiguous."""

    def __init__(
        self,
        *,
        n_layers: int,
        n_slots: int,
        n_kv_heads: int,
        n_positions: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        shape = (n_slots, n_kv_heads, n_positions, head_dim)
        # Zeros, not garbage: masked positions are multiplied by zero, and 0 * NaN is NaN.
        for layer in range(n_layers):
            self.register_buffer(f"k{layer}", torch.zeros(shape, dtype=dtype, device=device))
            self.register_buffer(f"v{layer}", torch.zeros(shape, dtype=dtype, device=device))
        self.n_slots, self.n_positions = n_slots, n_positions

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer."""
        return getattr(self, f"k{index}"), getattr(self, f"v{index}")


def write(cache_SJCE: Tensor, slots_B: Tensor, positions_BT: Tensor, new_BTJE: Tensor) -> None:
    """Stores new keys or values in place."""
    cache_SJCE[slots_B[:, None], :, positions_BT] = new_BTJE
