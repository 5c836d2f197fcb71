"""The key/value cache: seats, each with a length of its own.

A seat holds one sequence. The engine keeps the lengths, and passes positions to every forward; the
cache is only memory, and functions that write into it. A position that is not yet written is never
read, since attention stops at a token's own position.

Shape letters: S seats, J key/value heads, C positions, E head dimension, B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class KVCache(nn.Module):
    """Keys and values of every layer, [S, J, C, E] each: a head's history is contiguous.

    Args:
        kv_heads: For each layer, the number of key/value heads and their width: J and E.
        n_seats: S.
        n_positions: C.
        dtype: Element type.
        device: The device.
    """

    def __init__(
        self,
        *,
        kv_heads: Sequence[tuple[int, int]],
        n_seats: int,
        n_positions: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        # Zeros, not garbage: masked positions are multiplied by zero, and 0 * NaN is NaN.
        for i, (n_heads, head_dim) in enumerate(kv_heads):
            shape = (n_seats, n_heads, n_positions, head_dim)
            self.register_buffer(f"k{i}", torch.zeros(shape, dtype=dtype, device=device))
            self.register_buffer(f"v{i}", torch.zeros(shape, dtype=dtype, device=device))
        self.n_seats, self.n_positions = n_seats, n_positions

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of one layer."""
        return getattr(self, f"k{index}"), getattr(self, f"v{index}")

    def copy(self, source: int, target: int, n: int) -> None:
        """Copies the first ``n`` positions of a seat into another seat, in every layer."""
        for tensor_SJCE in self.buffers():
            tensor_SJCE[target, :, :n] = tensor_SJCE[source, :, :n]


def write(cache_SJCE: Tensor, seats_B: Tensor, positions_BT: Tensor, new_BTJE: Tensor) -> None:
    """Stores new keys or values in place."""
    cache_SJCE[seats_B[:, None], :, positions_BT] = new_BTJE
