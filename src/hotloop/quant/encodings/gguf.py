"""The block types of GGUF.

A block is 32 weights with a scale, or a super-block of 256 weights. The groups of a super-block, of
16 or 32 weights, have integer scales, and the super-block has a factor of all its scales. Scales
and factors are half precision. The types whose names end in 1, and Q2_K, Q4_K and Q5_K, also have
minima, which are offsets here. The IQ4 types and MXFP4 hold indices of a table.

Integers of less than eight bits share bytes: a run of bytes holds the first integers in its lowest
bits, the next as many in the bits above, and so on. Bits beyond the fourth are stored separately.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hotloop.kernels.linear import KernelFormat, QuantizedKind
from hotloop.quant.encodings import Expected, Layout, StoredMatrix, StoredPart
from hotloop.quant.encodings.compressed_tensors import FP4, fp4_table
from hotloop.quant.qtensor import QTensor

BLOCKS = ".weight"

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The table of the IQ4 types."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A block type.

    Attributes:
        type: Its name in GGUF.
        bits: Bits of a weight's integer.
        size: Weights of a block.
        n_bytes: Bytes of a block.
        format: The number format.
        unpack: Makes the parts of a ``QTensor`` from uint8 [N, B, ``n_bytes``]: each is [N, B,
            ...], except a table.
    """

    type: str
    bits: int
    size: int
    n_bytes: int
    format: KernelFormat
    unpack: Callable[[Tensor], dict[str, Tensor]]

    def expected(self, _matrix: StoredMatrix) -> Mapping[str, Expected]:
        """Expects nothing: a matrix is a single tensor."""
        return {}

    def recognize(self, matrix: StoredMatrix) -> Layout | None:
        """Recognizes the type of the blocks."""
        blocks = matrix.tensors.get(BLOCKS)
        if blocks is None or blocks.dtype != self.type:
            return None
        return Layout(
            parts={BLOCKS: StoredPart(shape=matrix.shape, dtype=self.type, block=self.size)},
            decode=self.decode,
            format=self.format,
            k=matrix.shape[1],
            bits=self.bits,
        )

    def decode(self, parts: Mapping[str, Tensor], _shape: tuple[int, int]) -> QTensor:
        """Decodes the bytes of whole blocks, uint8 [N, bytes]."""
        blocks = parts[BLOCKS].unflatten(1, (-1, self.n_bytes))
        tensors = {
            name: tensor if name == "table" else tensor.flatten(1).contiguous()
            for name, tensor in self.unpack(blocks).items()
        }
        return QTensor(kind=_quantized(self.format), permutation_hash=None, **tensors)


def _quantized(form: KernelFormat) -> QuantizedKind:
    assert form.kind != "dense", "blocks are quantized"
    return form.kind


def _halves(blocks: Tensor, at: int) -> Tensor:
    """Returns half-precision numbers at byte ``at`` of each block, [N, B, 1]."""
    return blocks[:, :, at : at + 2].contiguous().view(torch.float16)


def _runs(bytes_: Tensor, n_runs: int, bits: int) -> Tensor:
    """Unpacks integers of ``bits`` bits, [N, B, C] to uint8 [N, B, C * 8 / bits], run by run."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=bytes_.device)
    runs = bytes_.unflatten(2, (n_runs, 1, -1))
    return (runs >> shifts[:, None] & (1 << bits) - 1).flatten(2)


def _signed(integers: Tensor, half: int) -> Tensor:
    """Subtracts half of the range: uint8 below 128 to int8."""
    return integers.to(torch.int8) - half


def _simple(blocks: Tensor, *, bits: int, has_minimum: bool) -> dict[str, Tensor]:
    """Unpacks a block of 32: scale, minimum, fifth bits, nibbles; or whole bytes."""
    parts = {"scale": _halves(blocks, 0)}
    if has_minimum:
        parts["offset"] = _halves(blocks, 2)
    integers = blocks[:, :, 2 + 2 * has_minimum :]
    if bits == 8:
        return parts | {"values": integers.contiguous().view(torch.int8)}
    values = _runs(integers[:, :, -16:], 1, 4)
    if bits == 5:
        places = torch.arange(8, dtype=torch.uint8, device=blocks.device)
        values = values | (integers[:, :, :4, None] >> places & 1).flatten(2) << 4
    return parts | {"values": _signed(values, 0 if has_minimum else 1 << bits - 1)}


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Unpacks the eight scales and eight minima of Q4_K and Q5_K from twelve bytes."""
    scale, minimum, both = packed.chunk(3, dim=2)
    first = (scale & 63, minimum & 63)
    second = (both & 15 | scale >> 2 & 0x30, both >> 4 | minimum >> 2 & 0x30)
    scales, minima = (
        torch.cat(pair, dim=2).view(torch.int8) for pair in zip(first, second, strict=True)
    )
    return scales, minima


def _with_minima(blocks: Tensor, scale: Tensor, minimum: Tensor, at: int) -> dict[str, Tensor]:
    """Returns the parts of integer scales and minima, whose factors are at byte ``at``."""
    return {
        "scale": scale,
        "offset": minimum,
        "super_scale": _halves(blocks, at),
        "super_offset": -_halves(blocks, at + 2),
    }


def _q2_k(blocks: Tensor) -> dict[str, Tensor]:
    scales = blocks[:, :, :16]
    parts = _with_minima(blocks, _signed(scales & 15, 0), _signed(scales >> 4, 0), 80)
    return parts | {"values": _signed(_runs(blocks[:, :, 16:80], 2, 2), 0)}


def _q3_k(blocks: Tensor) -> dict[str, Tensor]:
    third = _runs(blocks[:, :, :32], 1, 1)
    values = _runs(blocks[:, :, 32:96], 2, 2) | third << 2
    scale = _runs(blocks[:, :, 96:104], 1, 4) | _runs(blocks[:, :, 104:108], 1, 2) << 4
    return {
        "values": _signed(values, 4),
        "scale": _signed(scale, 32),
        "super_scale": _halves(blocks, 108),
    }


def _q4_k(blocks: Tensor) -> dict[str, Tensor]:
    parts = _with_minima(blocks, *_six_bits(blocks[:, :, 4:16]), 0)
    return parts | {"values": _signed(_runs(blocks[:, :, 16:], 4, 4), 0)}


def _q5_k(blocks: Tensor) -> dict[str, Tensor]:
    fifth = _runs(blocks[:, :, 16:48], 1, 1)
    parts = _with_minima(blocks, *_six_bits(blocks[:, :, 4:16]), 0)
    return parts | {"values": _signed(_runs(blocks[:, :, 48:], 4, 4) | fifth << 4, 0)}


def _q6_k(blocks: Tensor) -> dict[str, Tensor]:
    values = _runs(blocks[:, :, :128], 2, 4) | _runs(blocks[:, :, 128:192], 2, 2) << 4
    return {
        "values": _signed(values, 32),
        "scale": blocks[:, :, 192:208].contiguous().view(torch.int8),
        "super_scale": _halves(blocks, 208),
    }


def _iq4_nl(blocks: Tensor) -> dict[str, Tensor]:
    return {
        "values": _signed(_runs(blocks[:, :, 2:], 1, 4), 0),
        "scale": _halves(blocks, 0),
        "table": torch.tensor(IQ4, dtype=torch.float32, device=blocks.device),
    }


def _iq4_xs(blocks: Tensor) -> dict[str, Tensor]:
    # The bits of scales are in order, byte by byte.
    high = _runs(blocks[:, :, 2:4], 2, 2)
    low = _runs(blocks[:, :, 4:8], 4, 4)
    return {
        "values": _signed(_runs(blocks[:, :, 8:], 8, 4), 0),
        "scale": _signed(low | high << 4, 32),
        "super_scale": _halves(blocks, 0),
        "table": torch.tensor(IQ4, dtype=torch.float32, device=blocks.device),
    }


def _mxfp4(blocks: Tensor) -> dict[str, Tensor]:
    return {
        "values": _signed(_runs(blocks[:, :, 1:], 1, 4), 0),
        "scale": blocks[:, :, :1].contiguous().view(torch.float8_e8m0fnu),
        "table": fp4_table(blocks.device),
    }


def _simple_type(type_: str, bits: int, *, has_minimum: bool = False) -> Blocks:
    kind: QuantizedKind = "int8" if bits > 4 else "uint4" if has_minimum else "int4"
    return Blocks(
        type=type_,
        bits=bits,
        size=32,
        n_bytes=2 + 2 * has_minimum + bits * 4,
        format=KernelFormat(
            kind=kind,
            group_size=32,
            scale_dtype=torch.float16,
            zero="offset" if has_minimum else "none",
        ),
        unpack=partial(_simple, bits=bits, has_minimum=has_minimum),
    )


def _super_type(
    type_: str,
    kind: QuantizedKind,
    unpack: Callable[[Tensor], dict[str, Tensor]],
    *,
    bits: int,
    group: int,
    n_bytes: int,
    has_minimum: bool = False,
    table: tuple[float, ...] | None = None,
) -> Blocks:
    return Blocks(
        type=type_,
        bits=bits,
        size=256,
        n_bytes=n_bytes,
        format=KernelFormat(
            kind=kind,
            group_size=group,
            scale_dtype=torch.int8,
            zero="offset" if has_minimum else "none",
            super_size=256,
            super_dtype=torch.float16,
            table=table,
        ),
        unpack=unpack,
    )


def _table_type(
    type_: str,
    scale: torch.dtype,
    table: tuple[float, ...],
    unpack: Callable[[Tensor], dict[str, Tensor]],
) -> Blocks:
    return Blocks(
        type=type_,
        bits=4,
        size=32,
        n_bytes=16 + scale.itemsize,
        format=KernelFormat(kind="lut4", group_size=32, scale_dtype=scale, table=table),
        unpack=unpack,
    )


Q4_0 = _simple_type("Q4_0", 4)
Q4_1 = _simple_type("Q4_1", 4, has_minimum=True)
Q5_0 = _simple_type("Q5_0", 5)
Q5_1 = _simple_type("Q5_1", 5, has_minimum=True)
Q8_0 = _simple_type("Q8_0", 8)
Q2_K = _super_type("Q2_K", "uint4", _q2_k, bits=2, group=16, n_bytes=84, has_minimum=True)
Q3_K = _super_type("Q3_K", "int4", _q3_k, bits=3, group=16, n_bytes=110)
Q4_K = _super_type("Q4_K", "uint4", _q4_k, bits=4, group=32, n_bytes=144, has_minimum=True)
Q5_K = _super_type("Q5_K", "int8", _q5_k, bits=5, group=32, n_bytes=176, has_minimum=True)
Q6_K = _super_type("Q6_K", "int8", _q6_k, bits=6, group=16, n_bytes=210)
IQ4_NL = _table_type("IQ4_NL", torch.float16, IQ4, _iq4_nl)
IQ4_XS = _super_type("IQ4_XS", "lut4", _iq4_xs, bits=4, group=32, n_bytes=136, table=IQ4)
MXFP4 = _table_type("MXFP4", torch.float8_e8m0fnu, FP4, _mxfp4)
