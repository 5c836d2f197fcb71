"""Attention over the KV cache: the implementations, and the choice among them.

Every implementation computes ``reference.attention`` of the sequences' seats in the caches. Its
argument ``length`` is above every position, so that it need not read the unused end of a seat.

Shape letters: B sequences, T tokens of each, H query heads, J key/value heads, E head dimension,
S seats, C cache positions.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hotloop.kernels import cpu, reference
from hotloop.types import EXACT_CPU_CHUNK


class Attention(Protocol):
    """Attention of new tokens over the caches, which already hold their keys and values."""

    def __call__(
        self,
        q_BTHE: Tensor,
        k_cache_SJCE: Tensor,
        v_cache_SJCE: Tensor,
        seats_B: Tensor,
        positions_BT: Tensor,
        *,
        first_seat: int | None,
        length: int,
        window: int | None,
        scale: float,
    ) -> Tensor:
        """Computes the attention of every token.

        Args:
            q_BTHE: Queries.
            k_cache_SJCE: Keys.
            v_cache_SJCE: Values.
            seats_B: int64, the seat of each sequence.
            positions_BT: int64; each token sees the positions up to its own.
            first_seat: The first sequence's seat, if the seats of the other sequences follow it in
                order: the caches are then sliced. None if every seat must be looked up.
            length: A number above every position.
            window: The number of positions that a token sees, its own included; None for all.
            scale: The factor of the scores.

        Returns:
            [B, T, H, E].
        """
        ...


def torch_attention(
    q_BTHE: Tensor,
    k_cache_SJCE: Tensor,
    v_cache_SJCE: Tensor,
    seats_B: Tensor,
    positions_BT: Tensor,
    *,
    first_seat: int | None,
    length: int,
    window: int | None,
    scale: float,
) -> Tensor:
    """Computes attention by PyTorch's own kernel; seats that are not in order are copied."""
    keys, values = k_cache_SJCE[:, :, :length], v_cache_SJCE[:, :, :length]
    if first_seat is None:
        keys, values = keys[seats_B], values[seats_B]
    else:
        here = slice(first_seat, first_seat + len(q_BTHE))
        keys, values = keys[here], values[here]
    return reference.attention(q_BTHE, keys, values, positions_BT, window=window, scale=scale)


def cpu_attention(
    q_BTHE: Tensor,
    k_cache_SJCE: Tensor,
    v_cache_SJCE: Tensor,
    seats_B: Tensor,
    positions_BT: Tensor,
    *,
    first_seat: int | None,
    length: int,
    window: int | None,
    scale: float,
) -> Tensor:
    """Computes decode attention by hotloop's kernel, which reads only the visible positions."""
    if q_BTHE.shape[1] > EXACT_CPU_CHUNK:
        return torch_attention(
            q_BTHE,
            k_cache_SJCE,
            v_cache_SJCE,
            seats_B,
            positions_BT,
            first_seat=first_seat,
            length=length,
            window=window,
            scale=scale,
        )
    where = (seats_B, positions_BT)
    return torch.ops.hotloop_cpu.decode_attention(
        q_BTHE.contiguous(), k_cache_SJCE, v_cache_SJCE, *where, window or 0, scale
    )


def choose_attention(device: torch.device, dtype: torch.dtype) -> tuple[str, Attention, list[str]]:
    """Chooses the fastest implementation for a device.

    Returns:
        Its name for records, the implementation, and the reasons against faster implementations.
    """
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return "torch", torch_attention, []
    if reason := cpu.unavailable_reason():
        return "torch", torch_attention, [f"attention/cpu not used: {reason}"]
    return "cpu", cpu_attention, []
