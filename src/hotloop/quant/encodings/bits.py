"""Unpacks integers of 4 or 8 bits from 32-bit words, and evens out groups.

Golden words of 4 bits, for the integers 0 to 7 in order: GPTQ and compressed-tensors pack the first
into the lowest bits, ``0x76543210``; AWQ interleaves them, ``0x75316420``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def unpack(words: Tensor, bits: int) -> Tensor:
    """Unpacks int32 [..., W] to uint8 [..., W * 32 / bits], lowest bits first."""
    bytes_ = words.contiguous().view(torch.uint8)
    if bits == 8:
        return bytes_
    return torch.stack((bytes_ & 15, bytes_ >> 4), dim=-1).flatten(-2)


def centred(unsigned: Tensor, bits: int) -> Tensor:
    """Subtracts half the range: uint8 of 0…2^bits - 1 to int8."""
    # Beyond 127 the difference wraps around to the same int8.
    return (unsigned - (1 << bits - 1)).view(torch.int8)


def even_group(group_size: int, k: int) -> int:
    """Returns the largest size that divides groups of ``group_size`` and ``k`` evenly."""
    return math.gcd(group_size, k)


def even_groups(per_group: Tensor, group_size: int, even: int, k: int) -> Tensor:
    """Repeats what each group of a row has for each of the even groups that it consists of.

    Args:
        per_group: [N, ⌈K / group_size⌉].
        group_size: Input features of a group, of which the last may have fewer.
        even: The size of the even groups, which divides ``group_size`` and K.
        k: Input features, K.
    """
    if even == group_size or per_group.shape[1] == 1:
        return per_group
    first = torch.arange(0, k, even, device=per_group.device)
    return per_group[:, first // group_size]
