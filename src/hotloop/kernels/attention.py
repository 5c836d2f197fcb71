"""Attention over the cache: which implementation to take.

Every implementation has the signature of ``reference.attention`` and a ``length`` that exceeds
every position, so that it need not read the unused end of the cache.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hotloop.kernels import cpu, reference


class Attention(Protocol):
    """Attention of new tokens to the caches, which already hold their keys and values."""

    def __call__(
        self,
        q_BTHE: Tensor,
        k_cache_BJCE: Tensor,
        v_cache_BJCE: Tensor,
        positions_BT: Tensor,
        *,
        length: int,
        window: int | None,
        scale: float,
    ) -> Tensor:
        """Returns [B, T, H, E]."""
        ...


def torch_attention(
    q_BTHE: Tensor,
    k_cache_BJCE: Tensor,
    v_cache_BJCE: Tensor,
    positions_BT: Tensor,
    *,
    length: int,
    window: int | None,
    scale: float,
) -> Tensor:
    """PyTorch's own, over the first ``length`` positions."""
    keys, values = k_cache_BJCE[:, :, :length], v_cache_BJCE[:, :, :length]
    return reference.attention(q_BTHE, keys, values, positions_BT, window=window, scale=scale)


MAX_TOKENS = 64
"""Tokens of each sequence up to which our kernel is used; PyTorch's is made for many."""


def cpu_attention(
    q_BTHE: Tensor,
    k_cache_BJCE: Tensor,
    v_cache_BJCE: Tensor,
    positions_BT: Tensor,
    *,
    length: int,
    window: int | None,
    scale: float,
) -> Tensor:
    """Our own kernel for a few tokens of each sequence; it reads no more than each needs."""
    if q_BTHE.shape[1] > MAX_TOKENS:
        return torch_attention(
            q_BTHE,
            k_cache_BJCE,
            v_cache_BJCE,
            positions_BT,
            length=length,
            window=window,
            scale=scale,
        )
    return torch.ops.hotloop_cpu.decode_attention(
        q_BTHE.contiguous(), k_cache_BJCE, v_cache_BJCE, positions_BT, window or 0, scale
    )


def choose_attention(device: torch.device, dtype: torch.dtype) -> tuple[str, Attention, list[str]]:
    """The fastest for a device: its name for records, itself, and why faster ones were passed."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return "torch", torch_attention, []
    if reason := cpu.unavailable_reason():
        return "torch", torch_attention, [f"attention/cpu not used: {reason}"]
    return "cpu", cpu_attention, []
