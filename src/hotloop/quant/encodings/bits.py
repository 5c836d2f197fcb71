"""Packs integers of 4 or 8 bits into 32-bit words, and unpacks them.

For the 4-bit integers 0 to 7, in order, GPTQ and compressed-tensors make the word ``0x76543210``:
the first integer is in the lowest bits. AWQ interleaves them: ``0x75316420``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def as_bytes(words: Tensor) -> Tensor:
    """Returns the bytes of int32 [..., W] as uint8 [..., 4 * W], lowest first."""
    # Unlike contiguous, clone gives a dimension of one element a stride of 1, too.
    return words.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Unpacks int32 [..., W] to uint8 [..., W * 32 / bits], lowest bits first."""
    bytes_ = as_bytes(words)
    if bits == 8:
        return bytes_
    return torch.stack((bytes_ & 15, bytes_ >> 4), dim=-1).flatten(-2)


def pack(signed: Tensor, bits: int) -> Tensor:
    """Packs int8 [..., K] into int32 [..., ⌈K * bits / 32⌉]; inverts ``centered(unpack(...))``."""
    unsigned = signed.view(torch.uint8) + (1 << bits - 1)  # beyond 255 it wraps around
    unsigned = torch.nn.functional.pad(unsigned, (0, -signed.shape[-1] % (32 // bits)))
    if bits == 4:
        unsigned = unsigned[..., ::2] | (unsigned[..., 1::2] << 4)
    return unsigned.contiguous().view(torch.int32)


def centered(unsigned: Tensor, bits: int) -> Tensor:
    """Subtracts half the range: uint8 of 0…2^bits - 1 to int8."""
    # Beyond 127 the difference wraps around to the same int8.
    return (unsigned - (1 << bits - 1)).view(torch.int8)
