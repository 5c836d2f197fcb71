"""Packs weights in groups into the layout that ``kernels.cpp`` reads.

A packed weight is two tensors of bytes: a description, which includes lookup table and permutation,
and the blocks. More tensors would be slower: passing a tensor to an operator takes longer than
reading a description.

A block is 16 output features; the last block is padded with zeros. A block has sections, each at a
multiple of 64 bytes, in the order in which they are read: scales, offsets, factors of scales,
factors of offsets, and values. So prefetching values also prefetches the next block's scales. The
data of the 16 features are interleaved: by 32-bit words of eight four-bit values, by pairs of
eight-bit integers, or by single eight-bit floats.

A block of a nested weight is a block of its high plane (with scales), followed by the values of the
low plane. The description of a nested weight is followed by the description of its high plane. So
the packed high plane is a part of the packed nested weight.

Shape letters: N output features, K input features, G groups along K, S super-blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hotloop.kernels.reference import split_planes

if TYPE_CHECKING:
    from hotloop.kernels.linear import KernelFormat, Quantized

BLOCK_FEATURES = 16
"""Output features of a block."""

_ALIGNMENT = 64
"""Bytes of a description's fixed part, and the multiple at which sections begin."""

_TABLE_BYTES = 4 * 16

_NIBBLES = (0, 16, 4, 20, 8, 24, 12, 28)
"""The bit of a word at which each of its eight values begins."""

_FOUR_BITS = ("int4", "uint4", "lut4")

_ENCODINGS = {
    "nibbles": 0,
    "bytes": 1,
    "integer table": 2,
    "table": 3,
    "float8": 4,
    "planes": 5,
}
_NUMBERS = {None: 0, torch.int8: 1, torch.bfloat16: 2, torch.float16: 3, torch.float32: 4}

_FLOAT8_FACTOR = 2.0**8
"""Ratio of an e4m3 number to the half-precision number with the same exponent and mantissa bits."""

_EIGHT_BIT_FLOATS = (torch.float8_e4m3fn, torch.float8_e8m0fnu)


def packed_bytes(form: KernelFormat, n: int, k: int) -> int:
    """Returns the bytes of a packed weight [n, k]."""
    return _description_bytes(form, k) + -(-n // BLOCK_FEATURES) * sum(_section_bytes(form, k))


def pack_groups(form: KernelFormat, weight: Quantized, *, n: int) -> list[Tensor]:
    """Packs a quantized weight.

    Args:
        form: Its format.
        weight: [N, K], or whole blocks of its output features.
        n: N.

    Returns:
        The description, [bytes], and blocks, [N / 16, bytes].
    """
    rows, k = weight.values.shape
    lengths = _section_bytes(form, k)
    blocks = torch.zeros(-(-rows // BLOCK_FEATURES), sum(lengths), dtype=torch.uint8)
    *sections, values = blocks.split(lengths, dim=1)
    scale = weight.scale
    if form.kind == "nested":
        half = values.shape[1] // 2
        for plane, section in zip(split_planes(weight.values), values.split(half, 1), strict=True):
            _interleave(_words(plane, 8), section)
        scale = scale * 16
    elif form.kind in _FOUR_BITS:
        _interleave(_words(weight.values, 8 if form.kind == "int4" else 0), values)
    elif form.kind == "fp8":
        _interleave(weight.values.view(torch.int8), values)
    else:
        _interleave(weight.values.contiguous().view(torch.int16), values)
    parts = (scale, weight.offset, weight.super_scale, weight.super_offset)
    for numbers, section in zip(parts, sections, strict=True):
        if numbers is not None:
            _interleave(numbers.to(_stored(numbers.dtype)), section)
    return [_describe(form, n, k, weight.table, weight.permutation), blocks]


def with_rows(description: Tensor, n: int) -> Tensor:
    """Returns the description of ``n`` output features of a packed weight."""
    described = description.clone()
    described[:4].view(torch.int32).fill_(n)
    return described


def high_plane(form: KernelFormat, packed: Sequence[Tensor], k: int) -> list[Tensor]:
    """Returns the high plane of a packed nested weight, which is a part of it."""
    descriptions, blocks = packed
    return [descriptions[_ALIGNMENT:], blocks[:, : sum(_section_bytes(form.high, k))]]


def _describe(
    form: KernelFormat,
    n: int,
    k: int,
    table: Tensor | None = None,
    permutation: Tensor | None = None,
) -> Tensor:
    """Returns the description of a weight: ``Header`` of ``kernels.cpp``, table and permutation."""
    assert form.group_size is not None, "the weight must be quantized"
    encoding = {"int8": "bytes", "fp8": "float8", "nested": "planes"}.get(form.kind, "nibbles")
    factor = {"fp8": _FLOAT8_FACTOR, "nested": 1 / 16}.get(form.kind, 1.0)
    integers = None if table is None else _as_integers(table)
    if table is not None:
        encoding = "table" if integers is None else "integer table"
    if integers is not None:
        factor = integers[1]
    has_super_offset = form.super_size is not None and form.zero == "offset"
    numbers = (
        form.scale_dtype,
        {"none": None, "integer": torch.int8, "offset": form.scale_dtype}[form.zero],
        form.super_dtype,
        form.super_dtype if has_super_offset else None,
    )
    header = (
        *(n, k, k // form.group_size),
        k // (form.super_size or form.group_size),
        _ENCODINGS[encoding],
        *(_NUMBERS[None if dtype is None else _stored(dtype)] for dtype in numbers),
        {"int4": 8, "nested": 16 * 8 + 8}.get(form.kind, 0),
        int(form.permuted),
    )
    description = torch.zeros(_description_bytes(form, k), dtype=torch.uint8)
    description[: 4 * len(header)].view(torch.int32).copy_(torch.tensor(header, dtype=torch.int32))
    description[4 * len(header) :][:4].view(torch.float32).fill_(factor)
    at = description[_ALIGNMENT : _ALIGNMENT + _TABLE_BYTES]
    if integers is not None:
        at[:16].view(torch.int8).copy_(integers[0])
    elif table is not None:
        at.view(torch.float32).copy_(table)
    if permutation is not None:
        description[-4 * k :].view(torch.int32).copy_(permutation)
    if form.kind == "nested":
        description[_ALIGNMENT:] = _describe(form.high, n, k)
    return description


def _description_bytes(form: KernelFormat, k: int) -> int:
    planes = 1 + (form.kind == "nested")
    return _ALIGNMENT * planes + _TABLE_BYTES * (form.kind == "lut4") + 4 * k * form.permuted


def _section_bytes(form: KernelFormat, k: int) -> list[int]:
    """Returns the bytes of each section of a block."""
    assert form.group_size is not None, "the weight must be quantized"
    assert form.scale_dtype is not None, "the weight must be quantized"
    of_groups = BLOCK_FEATURES * (k // form.group_size)
    of_supers = BLOCK_FEATURES * (k // form.super_size) if form.super_size else 0
    itemsize = 0 if form.super_dtype is None else form.super_dtype.itemsize
    scale = _stored(form.scale_dtype).itemsize
    lengths = (
        of_groups * scale,
        of_groups * {"none": 0, "integer": 1, "offset": scale}[form.zero],
        of_supers * itemsize,
        of_supers * itemsize * (form.zero == "offset"),
        BLOCK_FEATURES * k // (2 if form.kind in _FOUR_BITS else 1),
    )
    return [_aligned(length) for length in lengths]


def _aligned(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT


def _stored(dtype: torch.dtype) -> torch.dtype:
    """Returns the type of packed scales: bfloat16 for eight-bit floats, which it holds exactly."""
    return torch.bfloat16 if dtype in _EIGHT_BIT_FLOATS else dtype


def _as_integers(table: Tensor) -> tuple[Tensor, float] | None:
    """Writes a table as int8 numbers times a power of two, exactly; None if that is impossible."""
    for exponent in range(8):
        integers = table.float() * 2**exponent
        if integers.abs().max() > 127:
            return None
        if torch.equal(integers, integers.round()):
            return integers.to(torch.int8), math.ldexp(1.0, -exponent)
    return None


def _words(values_NK: Tensor, bias: int) -> Tensor:
    """Packs values of -bias to 15 - bias as int32 [N, K/8].

    A word holds eight consecutive values: even ones in its low half, odd ones in its high half,
    from the lowest nibble up.
    """
    n, k = values_NK.shape
    words = values_NK.new_zeros(n, k // 8, dtype=torch.int32)
    for i, bit in enumerate(_NIBBLES):
        words |= (values_NK[:, i::8] + bias).to(torch.int32) << bit
    return words


def _interleave(rows_NX: Tensor, section: Tensor) -> None:
    """Interleaves the data of the output features of a block: [N, X] to [N/16, X, 16]."""
    n, x = rows_NX.shape
    blocks = section.view(rows_NX.dtype)[:, : x * BLOCK_FEATURES].unflatten(1, (x, BLOCK_FEATURES))
    whole = n // BLOCK_FEATURES
    rest = n - whole * BLOCK_FEATURES
    blocks[:whole] = rows_NX[: n - rest].unflatten(0, (whole, BLOCK_FEATURES)).transpose(1, 2)
    if rest:
        blocks[-1, :, :rest] = rows_NX[n - rest :].T
