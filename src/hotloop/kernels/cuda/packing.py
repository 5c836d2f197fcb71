"""Packs weights into the memory layout that ``linear.cu`` reads.

A weight is divided into tiles of 16 output features, and a tile into units of 1024 bytes: 32, 64 or
128 input features of 16, 8 or 4 bits. A unit holds, for each slice of 32 input features, the
operands of ``mma.m16n8k16``, lane after lane; with int4 the scales (and offsets) of its groups
follow. So a tile is contiguous, and a lane reads its operands with one instruction.

A ``paired`` weight is gate features followed by up features. A tile takes eight of each, so that
one lane has both inputs of SwiGLU.

Integers are stored unsigned: int8 plus 128, int4 plus 8. Incomplete tiles and units are padded,
which does not affect results.

Shape letters: N output features, K input features, G groups along K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_ROWS = 16
SLICE = 32
"""Input features of a slice, which are the K of two mma instructions."""

FRAGMENT_BYTES = 1024
"""Bytes of weights in a unit."""

Kind = Literal["bf16", "fp8", "int8", "int4"]
BITS: dict[Kind, int] = {"bf16": 16, "fp8": 8, "int8": 8, "int4": 4}


@dataclass(frozen=True, kw_only=True)
class Format:
    """Packed format of a weight.

    Attributes:
        kind: Element type: ``bf16``; ``fp8`` (e4m3) or ``int8`` with a float32 scale per output
            feature; ``int4`` in groups with bfloat16 scales.
        group_size: Input features that share a scale: 32, 64 or 128 with ``int4``, else None.
        symmetric: The weight has no offsets.
        n: Output features.
        k: Input features, a multiple of 8.
        paired: The weight is gate features followed by up features, for SwiGLU.
    """

    kind: Kind
    group_size: int | None = None
    symmetric: bool = True
    n: int
    k: int
    paired: bool = False

    def __post_init__(self) -> None:
        assert self.k % 8 == 0, f"{self.k} input features are not a multiple of 8"
        assert (self.kind == "int4") == (self.group_size is not None), "int4 alone has groups"
        assert self.group_size in (None, 32, 64, 128), f"groups of {self.group_size}"
        assert self.group_size is None or self.k % self.group_size == 0, "whole groups"
        assert self.symmetric or self.kind == "int4", "int4 alone has offsets"
        assert not self.paired or self.n % 2 == 0, "as many gate as up features"

    @property
    def tiles(self) -> int:
        """Tiles of 16 output features."""
        return -(-self.n // (2 if self.paired else 1) // (TILE_ROWS // (2 if self.paired else 1)))

    @property
    def unit_k(self) -> int:
        """Input features of a unit."""
        return FRAGMENT_BYTES * 8 // BITS[self.kind] // TILE_ROWS

    @property
    def units(self) -> int:
        """Units of a tile."""
        return -(-self.k // self.unit_k)

    @property
    def unit_bytes(self) -> int:
        """Bytes of a unit, including scales and offsets of its groups."""
        if self.group_size is None:
            return FRAGMENT_BYTES
        groups = self.unit_k // self.group_size
        return FRAGMENT_BYTES + groups * 2 * TILE_ROWS * (1 if self.symmetric else 2)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight, without the N float32 scales of an eight-bit one."""
        return self.tiles * self.units * self.unit_bytes

    @property
    def struct(self) -> str:
        """The type of ``weights.cuh`` that reads it."""
        if self.group_size is None:
            return {"bf16": "Bf16", "fp8": "Fp8", "int8": "Int8"}[self.kind]
        return f"Int4<{self.group_size}, {str(not self.symmetric).lower()}>"

    @property
    def label(self) -> str:
        """A short name that is valid within an identifier, such as ``int4g128a``."""
        if self.group_size is None:
            return self.kind
        return f"{self.kind}g{self.group_size}{'' if self.symmetric else 'a'}"


def pack(form: Format, values: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    """Packs a weight.

    Args:
        form: The packed format.
        values: [N, K]: bfloat16; float8_e4m3fn; int8, with ``int4`` in -8…7.
        scale: [N, G] of ``int4``, which are rounded to bfloat16. Ignored otherwise: scales per
            output feature are a separate argument of the kernel.
        offset: Like ``scale``, where the weight has offsets.

    Returns:
        uint8 [tiles, units, unit_bytes].
    """
    assert tuple(values.shape) == (form.n, form.k), f"{tuple(values.shape)} for {form}"
    rows = _tile_rows(form, values.view(torch.int16 if form.kind == "bf16" else torch.int8))
    rows = F.pad(rows, (0, form.units * form.unit_k - form.k))
    ordered = rows.view(_axes(form)).permute(_ORDERS[form.kind])
    flat = (form.tiles, form.units, FRAGMENT_BYTES)
    if form.kind == "int8":
        ordered = ordered ^ -128  # the bits of value + 128 as an unsigned byte
    if form.kind != "int4":
        return ordered.contiguous().view(torch.uint8).view(flat)
    assert scale is not None, "int4 has scales"
    assert (offset is None) == form.symmetric, f"offsets do not fit {form}"
    # Padding has a scale and an offset of zero, so it is zero whatever its integers are.
    nibbles = (ordered + 8).view(torch.uint8)
    fragments = (nibbles[..., 0] | nibbles[..., 1] << 4).reshape(flat)
    groups = [_groups(form, t) for t in (scale, offset) if t is not None]
    return torch.cat((fragments, torch.stack(groups, 3).flatten(2).view(torch.uint8)), dim=2)


def unpack(form: Format, packed: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Inverts ``pack``: returns values [N, K], and with ``int4`` scales and offsets [N, G]."""
    fragments = packed[..., :FRAGMENT_BYTES]
    if form.kind == "int4":
        ordered = torch.stack((fragments & 15, fragments >> 4), dim=-1).view(torch.int8) - 8
    else:
        ordered = fragments.contiguous().view(torch.int16 if form.kind == "bf16" else torch.int8)
    if form.kind == "int8":
        ordered = ordered ^ -128
    order, axes = _ORDERS[form.kind], _axes(form)
    inverse = [order.index(axis) for axis in range(len(order))]
    rows = ordered.view([axes[axis] for axis in order]).permute(inverse)
    values = _plain_rows(form, rows.reshape(form.tiles, TILE_ROWS, -1))[:, : form.k].contiguous()
    if form.group_size is None:
        dtypes = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
        return values.view(dtypes[form.kind]), None, None
    groups = packed[..., FRAGMENT_BYTES:].contiguous().view(torch.bfloat16)
    groups = groups.view(form.tiles, form.units, -1, 1 if form.symmetric else 2, 8, 2)
    # [scale and offset, tile, half, g, unit, group]
    parts = groups.permute(3, 0, 5, 4, 1, 2).flatten(4).flatten(2, 3)
    n_groups = form.k // form.group_size
    scale, *offset = (_plain_rows(form, part)[:, :n_groups].contiguous() for part in parts)
    return values, scale, offset[0] if offset else None


# The order of axes in memory. A lane (g, t) holds rows g and g + 8 ("half") and, of a slice, the
# features 8t to 8t + 7: four for each of two mma instructions (i), in the order of the registers
# ("pair", "half") and of the halves of a register (e).
#   0: tile  1: half  2: g  3: unit  4: slice  5: t  6: i  7: pair  8: e
_ORDERS: dict[Kind, tuple[int, ...]] = {
    "bf16": (0, 3, 4, 6, 2, 5, 7, 1, 8),
    "fp8": (0, 3, 4, 2, 5, 6, 7, 8, 1),
    "int8": (0, 3, 4, 2, 5, 6, 7, 8, 1),
    "int4": (0, 3, 4, 2, 5, 6, 8, 1, 7),
}


def _axes(form: Format) -> tuple[int, ...]:
    return (form.tiles, 2, 8, form.units, form.unit_k // SLICE, 4, 2, 2, 2)


def _groups(form: Format, per_group_NG: Tensor) -> Tensor:
    """Arranges scales or offsets as bfloat16 [tiles, units, groups of a unit, 16].

    Rows g and g + 8 are adjacent.
    """
    assert form.group_size is not None, "only int4 has groups"
    in_unit = form.unit_k // form.group_size
    rows = _tile_rows(form, per_group_NG.to(torch.bfloat16))
    rows = F.pad(rows, (0, form.units * in_unit - rows.shape[-1]))
    view = rows.view(form.tiles, 2, 8, form.units, in_unit)
    return view.permute(0, 3, 4, 2, 1).reshape(form.tiles, form.units, in_unit, TILE_ROWS)


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
