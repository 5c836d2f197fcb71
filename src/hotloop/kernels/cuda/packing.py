"""Packs weights into the memory layout that ``linear.cu`` reads.

A weight is divided into tiles of 16 output features, and a tile into units of 1024 bytes: 32, 64 or
128 input features of 16, 8 or 4 bits. (With eight bits in groups of 128, a unit is one group.) A
unit holds, for each slice of 32 input features, the operands of ``mma.m16n8k16``, lane after lane;
the scales of its groups, and their zero points or offsets, follow. So a tile is contiguous, and a
lane reads its operands with one instruction. Two-level scales are signed bytes, stored after their
factors; every unit has factors of its own, which may be equal to those of other units.

A device that copies boxes of a tensor (``tensor_map``) does not need bfloat16 weights packed: a
copy gathers the units of a tile from the weight's *plain rows*, which a GEMM can read as well.

A nested weight has two planes of four bits. A tile has the units of the high plane, packed like an
int4 weight, followed by the units of the low plane in the same order, without scales. So the high
plane is an int4 weight whose tiles are further apart.

A ``paired`` weight is gate features followed by up features. A tile takes eight of each, so that
one lane has both inputs of SwiGLU.

Values are stored unsigned: int8 plus 128, int4 plus 8; so are their zero points. Incomplete tiles
and units are padded, which does not affect results.

Shape letters: N output features, K input features, G groups along K.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hotloop.kernels import reference

TILE_ROWS = 16
SLICE = 32
"""Input features of a slice: the K of two mma instructions."""

FRAGMENT_BYTES = 1024
"""Bytes of a unit's values, unless a group has more."""

HALF_SLICE = 16
"""Input features of one mma instruction: the smallest group."""

GROUP_SIZES = (HALF_SLICE, 32, 64, 128)

Kind = Literal["bf16", "fp8", "int8", "int4", "uint4", "lut4", "nested"]
BITS: dict[Kind, int] = {"bf16": 16, "fp8": 8, "int8": 8, "int4": 4, "uint4": 4, "lut4": 4}
BITS |= {"nested": 8}

_BIAS: dict[Kind, int] = {"bf16": 0, "fp8": 0, "int8": 128, "int4": 8, "uint4": 0, "lut4": 0}
_BIAS |= {"nested": 16 * 8 + 8}
"""Offset of values, and of zero points, so that they have no sign."""

Scale = Literal["bf16", "f16", "f32", "two"]
_SCALES: dict[Scale, torch.dtype] = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f32": torch.float32,
    "two": torch.int8,
}
FACTOR = torch.float16
"""The element type of the factors of two-level scales."""

MAX_TERMS = 3
"""The most bfloat16 numbers whose sum is a number of a lookup table."""

_E2M1 = tuple(sign * x for sign in (1.0, -1.0) for x in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
"""The table of e2m1, whose indices are the bits of the numbers: one of the sign, two of the
exponent, one of the mantissa."""

_E2M1_PLACES = ((15, 6), (12, 3), (14, 9), (13, 0))
"""For each register, the bits of a half word at which the sign and the other bits of its number
begin; see ``Fp4`` of ``weights.cuh``."""

Zero = Literal["none", "integer", "offset"]

_VALUES: dict[Kind, str] = {
    "bf16": "Bf16",
    "fp8": "Fp8",
    "int8": "Int8",
    "int4": "Int4",
    "uint4": "Uint4",
    "nested": "Nested",
}
_STRUCTS: dict[Scale | Zero, str] = {"bf16": "Bf16", "f16": "Half", "f32": "Float"}
_STRUCTS |= {"two": "TwoLevels"}
_STRUCTS |= {"none": "kNoZero", "integer": "kZeroPoints", "offset": "kOffsets"}
_LABELS: dict[Scale | Zero, str] = {"bf16": "", "f16": "h", "f32": "f", "two": "t"}
_LABELS |= {"none": "", "integer": "z", "offset": "a"}


@dataclass(frozen=True, kw_only=True)
class Format:
    """Packed format of a weight.

    Attributes:
        kind: Element type: ``bf16``; ``fp8`` (e4m3); ``int8``; ``int4`` (-8…7); ``uint4`` (0…15);
            ``lut4``, indices of ``table``; ``nested`` (-128…119).
        group_size: Input features that share a scale: 16, 32, 64 or 128. None for ``bf16``, and for
            ``fp8`` and ``int8`` with a float32 scale per output feature.
        scale: Element type of the scales of groups, and of their zero points or offsets; ``two``
            for two levels, integers with half-precision factors.
        zero: The groups have no zeros, integer zero points, or offsets.
        row_scale: The weight has scales of groups and a float32 scale per output feature.
        table: The sixteen numbers of ``lut4``, which ``terms`` splits.
        permuted: The order of columns differs from that of input features; the kernels take the
            order as well. Only for weights with groups.
        n: Output features.
        k: Input features, a multiple of 8.
        paired: The weight is gate features followed by up features, for SwiGLU.
        plain_rows: The weight is bfloat16 [N, K] as it is, in whole tiles and units.
    """

    kind: Kind
    group_size: int | None = None
    scale: Scale = "bf16"
    zero: Zero = "none"
    row_scale: bool = False
    table: tuple[float, ...] | None = None
    permuted: bool = False
    n: int
    k: int
    paired: bool = False
    plain_rows: bool = False

    def __post_init__(self) -> None:
        assert (self.table is not None) == (self.kind == "lut4"), "only lut4 has a table"
        assert self.table is None or terms(self.table) is not None, f"{self.table}"
        assert not self.permuted or self.group_size is not None, (
            "only groups need an order of columns"
        )
        assert not self.permuted or self.k < 1 << 16, "column indices have 16 bits"
        assert self.scale != "two" or self.zero != "integer", (
            "two-level formats have offsets, not zero points"
        )
        assert self.scale != "two" or self.k % self.unit_k == 0, "two-level scales need whole units"
        assert not self.row_scale or self.group_size is not None, (
            "a format without groups has row scales"
        )
        assert self.k % 8 == 0, f"{self.k} input features are not a multiple of 8"
        assert self.group_size in (None, *GROUP_SIZES), f"groups of {self.group_size}"
        assert self.bits > 4 or self.group_size is not None, "four-bit formats need groups"
        assert self.kind != "bf16" or self.group_size is None, "bf16 has no groups"
        assert self.group_size is None or self.k % self.group_size == 0, (
            "groups must divide the input features"
        )
        assert self.zero == "none" or self.group_size is not None, (
            "only formats with groups have zeros"
        )
        assert self.zero == "none" or self.kind not in ("fp8", "lut4"), "only integers have zeros"
        plain = (self.scale, self.zero, self.row_scale, self.permuted)
        assert self.kind != "nested" or plain == ("bf16", "none", False, False), (
            "nested weights have bf16 scales only"
        )
        assert self.kind != "nested" or self.group_size is not None, "nested weights need groups"
        assert not self.paired or self.n % 2 == 0, "gate and up must have equally many features"
        assert not self.plain_rows or self.fits_plain_rows, f"{self.n}, {self.k} have padding"

    @property
    def bits(self) -> int:
        """Bits of a value."""
        return BITS[self.kind]

    @property
    def high(self) -> Format:
        """The format of a nested weight's high plane."""
        assert self.kind == "nested", f"{self.kind} has no planes"
        return dataclasses.replace(self, kind="int4")

    @property
    def fits_plain_rows(self) -> bool:
        """Whether the weight's plain rows can be read: it is bfloat16 and needs no padding."""
        return self.kind == "bf16" and self.n % TILE_ROWS == 0 and self.k % SLICE == 0

    def with_plain_rows(self) -> Format:
        """Returns the format of the weight as plain rows, if these can be read; else itself."""
        return dataclasses.replace(self, plain_rows=True) if self.fits_plain_rows else self

    @property
    def is_e2m1(self) -> bool:
        """Whether the bits of each number of the table, as e2m1, are its index."""
        return self.table == _E2M1

    @property
    def has_channel_scales(self) -> bool:
        """Whether the kernels take a float32 scale per output feature beside the weight."""
        return self.row_scale or (self.kind in ("fp8", "int8") and self.group_size is None)

    @property
    def needs_sums(self) -> bool:
        """Whether sums of activations are needed: ``kNeedsSums`` of ``weights.cuh``."""
        return _BIAS[self.kind] > 0 or self.zero != "none"

    @property
    def tiles(self) -> int:
        """Tiles of 16 output features."""
        return -(-self.n // (2 if self.paired else 1) // (TILE_ROWS // (2 if self.paired else 1)))

    @property
    def unit_k(self) -> int:
        """Input features of a unit."""
        bits = 4 if self.kind == "nested" else self.bits  # of a plane
        return max(FRAGMENT_BYTES * 8 // bits // TILE_ROWS, self.group_size or 0)

    @property
    def units(self) -> int:
        """Units of a tile."""
        return -(-self.k // self.unit_k)

    @property
    def strands(self) -> int:
        """Sums that the kernels keep separate until the end: ``kStrands`` of ``weights.cuh``."""
        return 1 if self.group_size is None else self.unit_k // max(self.group_size, SLICE)

    @property
    def fragment_bytes(self) -> int:
        """Bytes of a unit's values."""
        return self.unit_k * TILE_ROWS * self.bits // 8

    @property
    def unit_bytes(self) -> int:
        """Bytes of a unit, of both planes, including the scales and zeros of its groups."""
        if self.group_size is None:
            return self.fragment_bytes
        parts = 1 if self.zero == "none" else 2
        groups = self.unit_k // self.group_size * _SCALES[self.scale].itemsize
        factors = FACTOR.itemsize if self.scale == "two" else 0
        return self.fragment_bytes + TILE_ROWS * parts * (groups + factors)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight, without scales per output feature."""
        return self.tiles * self.units * self.unit_bytes

    @property
    def struct(self) -> str:
        """The type of ``weights.cuh`` that reads it."""
        if self.plain_rows:
            return "PlainRows"
        if self.is_e2m1:
            struct = "Fp4"
        elif self.table is not None:
            struct = f"Table<{_words(self.table)}>"
        else:
            struct = _VALUES[self.kind]
        if self.group_size is not None:
            groups = f"{self.group_size}, {_STRUCTS[self.scale]}, {_STRUCTS[self.zero]}"
            struct = f"Grouped<{struct}, {groups}{', true' if self.row_scale else ''}>"
        return f"Permuted<{struct}>" if self.permuted else struct

    @property
    def pair_table_bytes(self) -> int:
        """Bytes of a table of pairs of numbers; 0 without a lookup table."""
        if self.table is None or self.is_e2m1:
            return 0
        split = terms(self.table)
        assert split is not None, f"{self.table} in bfloat16"
        return len(split) * 4 * 32 * 256

    @property
    def label(self) -> str:
        """A short name that is valid within an identifier, such as ``int4g128a``."""
        if self.plain_rows:
            return "rows"
        order = "p" if self.permuted else ""
        if self.group_size is None:
            return f"{self.kind}{order}"
        groups = f"g{self.group_size}{_LABELS[self.scale]}{_LABELS[self.zero]}"
        rows = "r" if self.row_scale else ""
        table = "" if self.table is None else f"_{zlib.crc32(repr(self.table).encode()):08x}"
        return f"{self.kind}{groups}{rows}{order}{table}"


def terms(table: Sequence[float]) -> Tensor | None:
    """Splits each number of a table into a sum of few bfloat16 numbers: bfloat16 [terms, 16].

    Returns None if sums of ``MAX_TERMS`` numbers cannot equal the table.
    """
    rest, found = torch.tensor(table, dtype=torch.float32), []
    while len(found) < MAX_TERMS and (rest.any() or not found):
        found.append(rest.bfloat16())
        rest = rest - found[-1].float()
    return None if rest.any() or not rest.isfinite().all() else torch.stack(found)


def _words(table: Sequence[float]) -> str:
    """Returns the template arguments of ``Table``: of each term, low bytes, then high bytes."""
    split = terms(table)
    assert split is not None, f"{table} in bfloat16"
    bytes_ = split.view(torch.uint8).unflatten(1, (-1, 2)).transpose(1, 2)
    words = bytes_.contiguous().view(torch.int32).flatten().tolist()
    return ", ".join(f"{word & 0xFFFFFFFF:#010x}u" for word in words)


class Parts(NamedTuple):
    """A weight before packing: values [N, K], and scales and offsets of groups [N, G].

    Attributes:
        values: bfloat16, float8_e4m3fn or int8.
        scale: Scales, if the format has groups. Scales per output feature are a separate argument
            of the kernel.
        offset: Offsets or int8 zero points, if the format has them.
        factor: [N, S], half precision: factors of two-level scales, for S super-blocks of whole
            units.
        offset_factor: [N, S], half precision: factors of two-level offsets.
    """

    values: Tensor
    scale: Tensor | None = None
    offset: Tensor | None = None
    factor: Tensor | None = None
    offset_factor: Tensor | None = None


def pack(
    form: Format,
    values: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    factor: Tensor | None = None,
    offset_factor: Tensor | None = None,
) -> Tensor:
    """Packs a weight.

    Args:
        form: The packed format.
        values: [N, K]: bfloat16; float8_e4m3fn; int8.
        scale: [N, G], with groups. Ignored otherwise: scales per output feature are a separate
            argument of the kernel.
        offset: [N, G], where the format has offsets or (int8) zero points.
        factor: [N, S], half precision: factors of two-level scales. Super-blocks are whole units.
        offset_factor: [N, S], half precision: factors of two-level offsets.

    Returns:
        uint8 [tiles, units, unit_bytes]; [tiles, bytes of a tile] for a nested weight. Contiguous
        plain rows are returned as they are.
    """
    assert tuple(values.shape) == (form.n, form.k), f"{tuple(values.shape)} for {form}"
    if form.plain_rows:
        return values.contiguous()
    if form.kind == "nested":
        assert scale is not None, "formats with groups need scales"
        high, low = reference.split_planes(values)
        packed = pack(form.high, high, scale * 16, None)
        return torch.cat((packed.flatten(1), _fragments(form.high, low).flatten(1)), dim=1)
    fragments = _fragments(form, values)
    if form.group_size is None:
        return fragments
    assert scale is not None, "formats with groups need scales"
    assert (offset is None) == (form.zero == "none"), f"offsets do not fit {form}"
    if offset is not None and form.zero == "integer":
        offset = offset.float() + _BIAS[form.kind]
    # Padding has a scale and an offset of zero, so it is zero whatever its integers are.
    groups = [_groups(form, t) for t in (scale, offset) if t is not None]
    if form.scale != "two":
        return torch.cat((fragments, torch.stack(groups, 3).flatten(2).view(torch.uint8)), dim=2)
    factors = [_factors(form, t) for t in (factor, offset_factor) if t is not None]
    assert len(factors) == len(groups), "every scale and offset needs a factor"
    # [tiles, units, groups, g, scale or offset, half]
    pairs = torch.stack([group.unflatten(3, (8, 2)) for group in groups], 4)
    of_groups = pairs.flatten(2).view(torch.uint8)
    # [tiles, units, g, scale or offset, half]
    pairs = torch.stack([factor.unflatten(2, (8, 2)) for factor in factors], 3)
    of_unit = pairs.flatten(2).view(torch.uint8)
    return torch.cat((fragments, of_unit, of_groups), dim=2)


def high_plane(form: Format, packed: Tensor) -> Tensor:
    """Returns the high plane of a packed nested weight, which is a part of it."""
    high = form.high
    whole = packed[:, : high.units * high.unit_bytes]
    return whole.unflatten(1, (high.units, high.unit_bytes))


def tile_stride(form: Format, packed: Tensor) -> int:
    """Returns the bytes from one tile to the next; 0 for plain rows."""
    if form.plain_rows:
        return 0
    assert packed.shape[0] == form.tiles, f"{tuple(packed.shape)} for {form}"
    return packed.stride(0) * packed.element_size()


def _fragments(form: Format, values: Tensor) -> Tensor:
    """Arranges values as the operands of tensor cores, uint8 [tiles, units, fragment_bytes]."""
    rows = _tile_rows(form, values.view(torch.int16 if form.kind == "bf16" else torch.int8))
    rows = F.pad(rows, (0, form.units * form.unit_k - form.k))
    ordered = rows.view(_axes(form)).permute(_order(form))
    flat = (form.tiles, form.units, form.fragment_bytes)
    if form.kind == "int8":
        ordered = ordered ^ -128  # the bits of value + 128 as an unsigned byte
    if form.is_e2m1:
        ordered = _pack_e2m1(ordered)
    elif form.bits == 4:
        nibbles = (ordered + _BIAS[form.kind]).view(torch.uint8)
        ordered = nibbles[..., 0] | nibbles[..., 1] << 4
    return ordered.contiguous().view(torch.uint8).reshape(flat)


def unpack(form: Format, packed: Tensor) -> Parts:
    """Inverts ``pack``, except that two-level scales have a factor for each unit."""
    if form.plain_rows:
        return Parts(packed)
    if form.kind == "nested":
        high = unpack(form.high, high_plane(form, packed))
        low = packed[:, form.high.nbytes // form.tiles :].unflatten(1, (form.units, -1))
        assert high.scale is not None, "formats with groups need scales"
        values = reference.join_planes(high.values, _values(form.high, low))
        return Parts(values, high.scale * 2.0**-4)
    values = _values(form, packed[..., : form.fragment_bytes])
    if form.group_size is None:
        return Parts(values)
    n_groups, n_parts = form.k // form.group_size, 1 if form.zero == "none" else 2
    of_groups, factors = packed[..., form.fragment_bytes :], [None]
    if form.scale == "two":
        n_bytes = FACTOR.itemsize * TILE_ROWS * n_parts
        halves = of_groups[..., :n_bytes].contiguous().view(FACTOR)
        # [scale and offset, tile, half, g, unit]
        halves = halves.view(form.tiles, form.units, 8, n_parts, 2).permute(3, 0, 4, 2, 1)
        factors = [_plain_rows(form, part) for part in halves.flatten(2, 3)]
        pairs = of_groups[..., n_bytes:].contiguous().view(torch.int8)
        pairs = pairs.view(form.tiles, form.units, -1, 8, n_parts, 2).transpose(3, 4)
    else:
        pairs = of_groups.contiguous().view(_SCALES[form.scale])
        pairs = pairs.view(form.tiles, form.units, -1, n_parts, 8, 2)
    # [scale and zero, tile, half, g, unit, group]
    parts = pairs.permute(3, 0, 5, 4, 1, 2).flatten(4).flatten(2, 3)
    scale, *zeros = (_plain_rows(form, part)[:, :n_groups].contiguous() for part in parts)
    if zeros and form.zero == "integer":
        zeros = [(zeros[0].float() - _BIAS[form.kind]).to(torch.int8)]
    return Parts(values, scale, *(zeros or [None]), *factors)


def _values(form: Format, fragments: Tensor) -> Tensor:
    """Inverts ``_fragments``."""
    if form.is_e2m1:
        ordered = _unpack_e2m1(fragments)
    elif form.bits == 4:
        nibbles = torch.stack((fragments & 15, fragments >> 4), dim=-1)
        ordered = nibbles.view(torch.int8) - _BIAS[form.kind]
    else:
        ordered = fragments.contiguous().view(torch.int16 if form.kind == "bf16" else torch.int8)
    if form.kind == "int8":
        ordered = ordered ^ -128
    order, axes = _order(form), _axes(form)
    inverse = [order.index(axis) for axis in range(len(order))]
    rows = ordered.view([axes[axis] for axis in order]).permute(inverse)
    values = _plain_rows(form, rows.reshape(form.tiles, TILE_ROWS, -1))[:, : form.k].contiguous()
    dtypes = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
    return values.view(dtypes.get(form.kind, torch.int8))


# The order of axes in memory. A lane (g, t) holds rows g and g + 8 ("half") and, of a slice, the
# features 8t to 8t + 7: four for each of two mma instructions (i), in the order of the registers
# ("pair", "half") and of the halves of a register (e). Where a slice is two groups, each mma has
# the features of one: axes 5 and 6 change places.
#   0: tile  1: half  2: g  3: unit  4: slice  5: t  6: i  7: pair  8: e
_ORDERS: dict[Kind, tuple[int, ...]] = {
    "bf16": (0, 3, 4, 6, 2, 5, 7, 1, 8),
    "fp8": (0, 3, 4, 2, 5, 6, 7, 8, 1),
    "int8": (0, 3, 4, 2, 5, 6, 7, 8, 1),
    "int4": (0, 3, 4, 2, 5, 6, 8, 1, 7),
    "uint4": (0, 3, 4, 2, 5, 6, 8, 1, 7),
    "lut4": (0, 3, 4, 2, 5, 6, 7, 1, 8),
}  # a plane of a nested weight is int4
_E2M1_ORDER = (0, 3, 4, 2, 5, 6, 8, 7, 1)


def _pack_e2m1(numbers: Tensor) -> Tensor:
    """Packs the numbers of four registers, [..., pair, half], into a half word: int16 [...]."""
    words = numbers.new_zeros(numbers.shape[:-2], dtype=torch.int32)
    for (sign, rest), register in zip(_E2M1_PLACES, numbers.flatten(-2).unbind(-1), strict=True):
        bits = register.int()
        words |= bits >> 3 << sign | (bits & 7) << rest
    return words.to(torch.int16)


def _unpack_e2m1(fragments: Tensor) -> Tensor:
    """Inverts ``_pack_e2m1``: from bytes to int8 [..., 4]."""
    words = fragments.contiguous().view(torch.int16).int()
    registers = [(words >> s & 1) << 3 | words >> rest & 7 for s, rest in _E2M1_PLACES]
    return torch.stack(registers, dim=-1).to(torch.int8)


def _order(form: Format) -> tuple[int, ...]:
    order = _E2M1_ORDER if form.is_e2m1 else _ORDERS[form.kind]
    if form.group_size != HALF_SLICE:
        return order
    return tuple({5: 6, 6: 5}.get(axis, axis) for axis in order)


def _axes(form: Format) -> tuple[int, ...]:
    features = (2, 4) if form.group_size == HALF_SLICE else (4, 2)
    return (form.tiles, 2, 8, form.units, form.unit_k // SLICE, *features, 2, 2)


def _groups(form: Format, per_group_NG: Tensor) -> Tensor:
    """Arranges scales or zeros as [tiles, units, groups of a unit, 16] of the scales' type.

    Rows g and g + 8 are adjacent.
    """
    assert form.group_size is not None, "the format must have groups"
    in_unit = form.unit_k // form.group_size
    rows = _tile_rows(form, per_group_NG.to(_SCALES[form.scale]))
    rows = F.pad(rows, (0, form.units * in_unit - rows.shape[-1]))
    view = rows.view(form.tiles, 2, 8, form.units, in_unit)
    return view.permute(0, 3, 4, 2, 1).reshape(form.tiles, form.units, in_unit, TILE_ROWS)


def _factors(form: Format, factor_NS: Tensor) -> Tensor:
    """Arranges factors as [tiles, units, 16], rows g and g + 8 adjacent."""
    each, rest = divmod(form.units, factor_NS.shape[1])
    assert rest == 0, "super-blocks must be whole units"
    rows = _tile_rows(form, factor_NS.repeat_interleave(each, dim=1))
    return rows.view(form.tiles, 2, 8, form.units).permute(0, 3, 2, 1).flatten(2)


def _tile_rows(form: Format, matrix: Tensor) -> Tensor:
    """Arranges [N, X] as [tiles, 16, X], with padding."""
    per_tile = TILE_ROWS // 2 if form.paired else TILE_ROWS
    parts = [
        F.pad(part, (0, 0, 0, form.tiles * per_tile - part.shape[0])).view(form.tiles, per_tile, -1)
        for part in matrix.chunk(2 if form.paired else 1)
    ]
    return torch.cat(parts, dim=1)


def _plain_rows(form: Format, tiles: Tensor) -> Tensor:
    """Inverts ``_tile_rows``: [tiles, 16, X] as [N, X]."""
    n_parts = 2 if form.paired else 1
    parts = tiles.chunk(n_parts, dim=1)
    return torch.cat([part.flatten(0, 1)[: form.n // n_parts] for part in parts])
