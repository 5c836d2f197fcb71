"""Holds the activations of a chunk of a prompt, and chooses a chunk size that memory allows.

Shape letters: T tokens of one sequence, D model width, H query heads, J key/value heads, E head
width, F feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from hotloop.hardware import device_info
from hotloop.models.config import LayerConfig, ModelConfig
from hotloop.types import MAX_PREFILL_CHUNK, MIN_PREFILL_CHUNK

WORKSPACE_SHARE = 0.02
"""Share of the device's memory that activations of a chunk may take."""


@dataclass(frozen=True)
class Views:
    """The first T rows of a workspace's tensors.

    Attributes:
        x: The residual stream [T, D].
        normalized: The normalized residual stream [T, D].
        qkv: GEMM output of queries, keys and values [T, (H + 2J) * E].
        q: Query heads [T, H * E].
        k: Key heads [T, J * E].
        v: Value heads [T, J * E].
        part: GEMM output of attention or feed-forward, for the residual stream [T, D].
        gate_up: GEMM output of the gate and up projections [T, 2F].
        gated: Their SwiGLU [T, F].
    """

    x: Tensor
    normalized: Tensor
    qkv: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    part: Tensor
    gate_up: Tensor
    gated: Tensor


class Workspace:
    """Activations of one chunk of a prompt, at fixed addresses for any number of tokens.

    Two regions are shared by tensors that are not in use at the same time: qkv and gate_up, heads
    and gated.

    Args:
        layer: Any layer of the model: all have the same heads and widths.
        rows: The most tokens of a chunk.
        device: The device of the model.
    """

    def __init__(self, layer: LayerConfig, rows: int, device: torch.device) -> None:
        attention = layer.attention
        heads = attention.n_heads, attention.n_kv_heads, attention.n_kv_heads
        self._heads = tuple(n * attention.head_dim for n in heads)
        self._hidden, self._gated = attention.hidden_size, layer.feed_forward.intermediate_size
        self.rows = rows
        self._regions = [
            torch.empty(rows * width, dtype=torch.bfloat16, device=device)
            for width in _widths(layer)
        ]

    def views(self, T: int) -> Views:
        """Returns the tensors with T rows."""
        x, normalized, part, gemm_out, heads = self._regions
        D, F = self._hidden, self._gated
        starts = [self.rows * width for width in accumulate((0, *self._heads))]
        q, k, v = (
            heads[start : start + T * width].view(T, width)
            for start, width in zip(starts, self._heads, strict=False)
        )
        return Views(
            x=x[: T * D].view(T, D),
            normalized=normalized[: T * D].view(T, D),
            qkv=gemm_out[: T * sum(self._heads)].view(T, -1),
            q=q,
            k=k,
            v=v,
            part=part[: T * D].view(T, D),
            gate_up=gemm_out[: 2 * T * F].view(T, 2 * F),
            gated=heads[: T * F].view(T, F),
        )


def _widths(layer: LayerConfig) -> tuple[int, ...]:
    """Returns the elements of a row in each region of a workspace."""
    attention, hidden_size = layer.attention, layer.attention.hidden_size
    intermediate_size = layer.feed_forward.intermediate_size
    heads = (attention.n_heads + 2 * attention.n_kv_heads) * attention.head_dim
    gemm_out = max(heads, 2 * intermediate_size)
    return (hidden_size, hidden_size, hidden_size, gemm_out, max(heads, intermediate_size))


def bytes_per_row(model: ModelConfig) -> int:
    """Counts the bytes that a token of a chunk takes in a workspace and in attention's output."""
    layer = model.layers[0]
    return 2 * (sum(_widths(layer)) + layer.attention.n_heads * layer.attention.head_dim)


def prefill_chunk(model: ModelConfig, device: torch.device) -> int:
    """Chooses the most tokens of a chunk.

    Weights are dequantized once per chunk, so larger chunks are faster; activations take at most
    ``WORKSPACE_SHARE`` of the device's memory. With the largest chunk, dequantizing is a twentieth
    of the time.
    """
    rows = int(WORKSPACE_SHARE * device_info(device).total_bytes) // bytes_per_row(model)
    rows = 1 << max(0, rows.bit_length() - 1)
    return min(MAX_PREFILL_CHUNK, max(MIN_PREFILL_CHUNK, rows))
