"""Attention over the KV cache: the implementations, and the choice among them.

Every implementation has the signature of ``reference.attention`` and a ``length``, which is greater
than every position, so that the unused end of the cache is not read.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hotloop.kernels import cpu, reference


class Attention(Protocol):
    """Attention of new tokens over the caches, which already hold their keys and values."""

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
    """Computes attention over the first ``length`` positions by PyTorch's own kernel."""
    keys, values = k_cache_BJCE[:, :, :length], v_cache_BJCE[:, :, :length]
    return reference.attention(q_BTHE, keys, values, positions_BT, window=window, scale=scale)


MAX_TOKENS = 64
"""The most tokens per sequence for which our kernel is used; PyTorch's is faster for more."""


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
    """Computes decode attention by our own kernel, which reads only the visible positions."""
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
    """Chooses the fastest implementation for a device.

    Returns:
        Its name for records, the implementation, and why faster ones cannot be used.
    """
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return "torch", torch_attention, []
    if reason := cpu.unavailable_reason():
        return "torch", torch_attention, [f"attention/cpu not used: {reason}"]
    return "cpu", cpu_attention, []
