"""Tables of rotary position embedding, with every way of stretching it that we support."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hotloop.models.config import RopeConfig


def inverse_frequencies(head_dim: int, rope: RopeConfig) -> Tensor:
    """Radians per token of each pair of dimensions, float32 [head_dim / 2]."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponent
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "factors":
        return frequencies / torch.tensor(rope.factors)
    if rope.scaling == "llama3":
        # Long wavelengths are stretched, short ones left alone, those between interpolated.
        wavelengths = 2 * math.pi / frequencies
        cycles = rope.original_max_position / wavelengths
        keep = (cycles - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = keep.clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / rope.factor
    assert rope.scaling is None, f"read_rope let {rope.scaling!r} through"
    return frequencies


def rope_tables(head_dim: int, n_positions: int, rope: RopeConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [n_positions, head_dim], both halves alike."""
    angles = torch.outer(
        torch.arange(n_positions, dtype=torch.float32), inverse_frequencies(head_dim, rope)
    )
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()
