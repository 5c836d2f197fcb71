"""Tables of rotary position embedding, with every supported kind of rope scaling.

Pairs of dimensions are half a head apart, even if only the first elements of a head are rotated.
So :func:`head_order` reorders the rows of a checkpoint's heads. Elements that are not rotated have
the frequency 0, so kernels need not distinguish them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hotloop.models.config import RopeConfig


def head_order(head_dim: int, rope: RopeConfig) -> Tensor | None:
    """Returns for each element of our head its index in a checkpoint's head, int64 [head_dim].

    A checkpoint pairs element i of its first R with i + R/2; we pair i with i + head_dim/2.
    """
    rotated = rope.rotary_dim(head_dim)
    if rotated == head_dim:
        return None
    halves = torch.arange(rotated).view(2, -1), torch.arange(rotated, head_dim).view(2, -1)
    return torch.cat(halves, dim=1).flatten()


def inverse_frequencies(head_dim: int, rope: RopeConfig, n_positions: int = 0) -> Tensor:
    """Computes the radians per token of each pair of dimensions, float32 [head_dim / 2].

    Args:
        head_dim: Width of a head.
        rope: The settings.
        n_positions: The longest sequence; frequencies may depend on it.
    """
    rotated = rope.rotary_dim(head_dim)
    exponent = torch.arange(0, rotated, 2, dtype=torch.float32) / rotated
    frequencies = _scaled_frequencies(exponent, rope, n_positions)
    return torch.nn.functional.pad(frequencies, (0, (head_dim - rotated) // 2))


def _scaled_frequencies(exponent: Tensor, rope: RopeConfig, n_positions: int) -> Tensor:
    is_long = n_positions > rope.original_max_position
    powers = rope.theta**exponent
    match rope.scaling:
        case None:
            return 1.0 / powers
        case "linear":
            return 1.0 / powers / rope.factor
        case "dynamic":
            rotated = 2 * len(exponent)
            length = max(n_positions, rope.original_max_position)
            growth = rope.factor * length / rope.original_max_position - (rope.factor - 1)
            return 1.0 / (rope.theta * growth ** (rotated / (rotated - 2))) ** exponent
        case "longrope":
            factors = rope.long_factors if is_long else rope.short_factors
            return 1.0 / (torch.tensor(factors) * powers)
        case "llama3":
            # Long wavelengths are scaled, short ones are kept, and those between are interpolated.
            frequencies = 1.0 / powers
            cycles = rope.original_max_position / (2 * math.pi / frequencies)
            keep = (cycles - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            keep = keep.clamp(0, 1)
            return keep * frequencies + (1 - keep) * frequencies / rope.factor
        case "yarn":
            # As llama3, with the ramp along the index of a frequency instead of its wavelength.
            low, high = _yarn_ramp(2 * len(exponent), rope)
            index = torch.arange(len(exponent), dtype=torch.float32)
            scaled = ((index - low) / (high - low)).clamp(0, 1)
            return scaled / (rope.factor * powers) + (1 - scaled) / powers
    raise AssertionError(f"no settings of rope have the scaling {rope.scaling!r}")


def _yarn_ramp(rotated: int, rope: RopeConfig) -> tuple[float, float]:
    """Returns the indices of frequencies between which YaRN ramps from kept to scaled."""

    def index(n_rotations: float) -> float:
        inverse_frequency = rope.original_max_position / (n_rotations * 2 * math.pi)
        return rotated * math.log(inverse_frequency) / (2 * math.log(rope.theta))

    low, high = index(rope.beta_fast), index(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    return low, high + 0.001 if high == low else high


def rope_tables(head_dim: int, n_positions: int, rope: RopeConfig) -> tuple[Tensor, Tensor]:
    """Computes cosines and sines, float32 [n_positions, head_dim], both halves alike."""
    frequencies = inverse_frequencies(head_dim, rope, n_positions)
    angles = torch.outer(torch.arange(n_positions, dtype=torch.float32), frequencies)
    scale = torch.ones_like(frequencies)
    scale[: rope.rotary_dim(head_dim) // 2] = rope.attention_factor
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
