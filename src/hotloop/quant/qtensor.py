"""A quantized weight that is not packed for a kernel: values, scales, offsets.

Weights have this form while they are sliced for tensor parallelism and when they are stored on
disk, and encodings of other tools decode into it. Its tensors are laid out like the weight itself,
so slicing does not depend on the scheme. The order is quantize → shard → pack, so scales do not
depend on the number of ranks. The layout that a kernel reads is not made here (``kernels.linear``).

Shape letters: N output features, K input features, G groups along K (K / group_size; 1 for one
group per output channel), S super-blocks along K (a divisor of G).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hotloop.errors import ConfigError
from hotloop.kernels import reference
from hotloop.kernels.linear import KernelFormat, QuantizedKind, Zero

ReduceMax = Callable[[Tensor], Tensor]
"""Returns the element-wise maximum of a tensor over the slices of all ranks (all-reduce)."""

_DEGREES = range(2, 9)
"""Tensor-parallel degrees that an error message suggests, where they fit."""

_TABLE_SIZE = 16

_LARGEST: Mapping[QuantizedKind, float] = {
    "int4": 8,
    "uint4": 15,
    "int8": 128,
    "nested": 128,
    "fp8": 448,
}
"""The largest magnitude of a value, by kind; for ``lut4`` the table has it instead."""

_RANGE: Mapping[QuantizedKind, float] = {"int4": 15, "uint4": 15, "int8": 255}
"""The largest difference between a value and its zero point, by kind."""

_ROW_TENSORS = ("values", "scale", "offset", "super_scale", "super_offset")
_OTHER_TENSORS = ("table", "permutation")


@dataclass(frozen=True, kw_only=True, eq=False)
class QTensor:
    """A quantized matrix, with a scale for each group of input features.

    The dequantized weight is computed in float32. Each group of columns has a scale ``s`` and an
    offset ``o``: ``s = scale * super_scale`` and ``o = offset * super_offset``, with the factors of
    the super-block that contains the group. A factor that is None is left out. The values become

    - ``values * s + o`` with floating-point offsets, or with ``super_offset``;
    - ``(values - offset) * s`` with integer offsets and no ``super_offset`` (zero points);
    - ``table[values] * s`` with a lookup table;
    - ``values * s`` otherwise.

    Column ``k`` of that result is column ``permutation[k]`` of the weight.

    Attributes:
        values: [N, K]. float8_e4m3fn for the kind ``fp8``. Otherwise int8, in the range of the
            kind: -128…127 for ``int8``, -128…119 for ``nested``, -8…7 for ``int4``, 0…15 for
            ``uint4`` and ``lut4``.
        scale: [N, G]. Any floating-point type; int8 with ``super_scale``.
        offset: [N, G]. The scales' type, or int8 zero points. None for symmetric quantization.
        kind: The type of the values.
        super_scale: [N, S]. Floating point. The second level of two-level scales, such as the scale
            of a super-block of GGUF, or the scale of a whole matrix, repeated in each row.
        super_offset: [N, S]. The type of ``super_scale``. The second level of two-level offsets.
        table: [16]. Floating point. The lookup table of ``lut4``.
        permutation: int32 [K]. The input feature of each column, where features were sorted before
            they were grouped (act-order).
        permutation_hash: ``hash_permutation`` of the permutation. Formats are compared by it,
            without reading the permutation from the device.
    """

    values: Tensor
    scale: Tensor
    offset: Tensor | None = None
    kind: QuantizedKind
    super_scale: Tensor | None = None
    super_offset: Tensor | None = None
    table: Tensor | None = None
    permutation: Tensor | None = None
    permutation_hash: str | None = None

    def __post_init__(self) -> None:
        (n, k), (rows, groups) = self.values.shape, self.scale.shape
        dtype = torch.float8_e4m3fn if self.kind == "fp8" else torch.int8
        assert self.values.dtype == dtype, f"values of {self.kind} are {self.values.dtype}"
        assert n == rows, "one row of scales per output feature"
        assert k % groups == 0, "groups of equal size"
        two_level = self.super_scale is not None
        assert two_level or self.scale.is_floating_point(), "integer scales have super-scales"
        if self.super_scale is not None:
            assert self.super_scale.is_floating_point(), "floating-point super-scales"
            assert self.super_scale.shape[0] == n, "one row of super-scales per output feature"
            assert groups % self.super_scale.shape[1] == 0, "super-blocks of whole groups"
        if self.offset is not None:
            assert self.offset.shape == self.scale.shape, "an offset per scale"
            types = (torch.int8, self.scale.dtype)
            assert self.offset.dtype in types, f"offsets are {self.offset.dtype}"
        if self.super_offset is not None:
            assert self.super_scale is not None, "super-offsets beside super-scales"
            assert self.offset is not None, "super-offsets of offsets"
            assert self.offset.dtype == self.scale.dtype, "offsets like scales"
            assert self.super_offset.shape == self.super_scale.shape, "one per super-scale"
            assert self.super_offset.dtype == self.super_scale.dtype, "of the same type"
        assert (self.table is not None) == (self.kind == "lut4"), "a table for lut4 alone"
        if self.kind == "nested":
            others = (self.offset, self.super_scale, self.permutation)
            assert others == (None, None, None), "nested weights have scales alone"
            assert self.scale.dtype == torch.bfloat16, f"scales are {self.scale.dtype}"
        if self.table is not None:
            assert self.table.shape == (_TABLE_SIZE,), f"a table of {tuple(self.table.shape)}"
            assert self.offset is None, "no offsets beside a table"
        if self.permutation is not None:
            assert self.permutation.shape == (k,), "a feature per column"
            assert self.permutation.dtype == torch.int32, f"{self.permutation.dtype} features"
        has_hash = self.permutation_hash is not None
        assert (self.permutation is not None) == has_hash, "a permutation has a hash"

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), the shape of the dequantized weight."""
        n, k = self.values.shape
        return n, k

    @property
    def group_size(self) -> int:
        """Number of input features that share a scale; K with one scale per output channel."""
        return self.values.shape[1] // self.scale.shape[1]

    @property
    def format(self) -> KernelFormat:
        """The kernel format: the number formats of values, scales and offsets."""
        zero: Zero = "none"
        if self.offset is not None:
            integer = not self.offset.is_floating_point() and self.super_offset is None
            zero = "integer" if integer else "offset"
        super_scale = self.super_scale
        return KernelFormat(
            kind=self.kind,
            group_size=self.group_size,
            scale_dtype=self.scale.dtype,
            zero=zero,
            super_size=None if super_scale is None else self.shape[1] // super_scale.shape[1],
            super_dtype=None if super_scale is None else super_scale.dtype,
            table=None if self.table is None else tuple(self.table.float().tolist()),
            permutation_hash=self.permutation_hash,
        )

    def bound(self) -> float:
        """Returns an upper bound on the magnitude of the weights, computed in float64."""
        scale = self.scale.float().double().abs()
        if self.super_scale is not None:
            s = self.super_scale.shape[1]
            scale = scale.unflatten(1, (s, -1)) * self.super_scale.double().abs()[:, :, None]
        largest = _LARGEST[self.kind] if self.table is None else float(self.table.abs().max())
        if self.offset is None:
            return float(scale.max()) * largest
        if self.format.zero == "integer":
            return float(scale.max()) * _RANGE[self.kind]
        offset = self.offset.double().abs()
        if self.super_offset is not None:
            s = self.super_offset.shape[1]
            offset = offset.unflatten(1, (s, -1)) * self.super_offset.double().abs()[:, :, None]
        return float(scale.max()) * largest + float(offset.max())

    @property
    def high(self) -> QTensor:
        """The int4 weight in the high nibbles of a ``nested`` weight."""
        assert self.kind == "nested", f"{self.kind} has no planes"
        high_NK, _ = reference.split_planes(self.values)
        return QTensor(values=high_NK, scale=self.scale * 16, kind="int4")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantizes the weight, [N, K], in float32, and rounds once to ``dtype``."""
        return reference.dequantize(
            self.values,
            self.scale,
            self.offset,
            super_scale_NS=self.super_scale,
            super_offset_NS=self.super_offset,
            table=self.table,
            permutation_K=self.permutation,
        ).to(dtype)

    def rows(self, start: int, stop: int) -> QTensor:
        """Slices output features ``start`` to ``stop``: a column-parallel shard."""
        return self.map_rows(lambda t: t[start:stop])

    def columns(self, start: int, stop: int) -> QTensor:
        """Slices input features ``start`` to ``stop``: a row-parallel shard, along whole groups.

        Super-blocks that the range divides are replaced by smaller ones (``with_super_blocks``).

        Raises:
            ConfigError: The range divides a group, or features are permuted.
        """
        k, size = self.shape[1], self.group_size
        if (start, stop) == (0, k):
            return self
        if self.permutation is not None:
            raise ConfigError(
                f"input features {start} to {stop} of {k} cannot be sliced: they are permuted "
                "(act-order), and any of them may be in any quantization group; run it on one rank."
            )
        if size != k and (start % size or stop % size):
            degrees = ", ".join(str(d) for d in _DEGREES if k % (d * size) == 0)
            raise ConfigError(
                f"input features {start} to {stop} cut a quantization group of {size} apart; "
                "use a group size that divides both, or "
                + (f"a tensor-parallel degree of {degrees}." if degrees else "one rank.")
            )
        super_size = self.format.super_size
        whole = self
        if super_size is not None and super_size != k:
            whole = self.with_super_blocks(math.gcd(super_size, start, stop))
        parts = {"values": self.values[:, start:stop]}
        for name in ("scale", "offset", "super_scale", "super_offset"):
            tensor = getattr(whole, name)
            if tensor is not None:
                each = k // tensor.shape[1]  # input features of a column
                parts[name] = tensor[:, start // each : -(-stop // each)]
        return dataclasses.replace(self, **parts)

    def with_super_blocks(self, size: int) -> QTensor:
        """Divides super-blocks into smaller ones, by repeating their factors.

        Args:
            size: Input features of a new super-block: a divisor of the present size, and a multiple
                of the group size.
        """
        present = self.format.super_size
        assert present is not None, "the weight must have two-level scales"
        repeats, rest = divmod(present, size)
        assert rest == 0, f"super-blocks of {present} into {size}"
        assert size % self.group_size == 0, "super-blocks of whole groups"
        factors = self._present(("super_scale", "super_offset"))
        return dataclasses.replace(
            self, **{name: t.repeat_interleave(repeats, dim=1) for name, t in factors.items()}
        )

    def try_columns(self, start: int, stop: int) -> QTensor | None:
        """Returns ``columns``, or None if the range cannot be sliced."""
        k, size = self.shape[1], self.group_size
        cuts = size != k and (start % size or stop % size)
        if (start, stop) != (0, k) and (cuts or self.permutation is not None):
            return None
        return self.columns(start, stop)

    def to(self, device: torch.device | str) -> QTensor:
        """Copies the weight to another device."""
        return self.map(lambda t: t.to(device))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that are present, rows' tensors first."""
        return tuple(self._present(_ROW_TENSORS + _OTHER_TENSORS).values())

    @property
    def row_tensors(self) -> tuple[Tensor, ...]:
        """The tensors that have a row for each output feature."""
        return tuple(self._present(_ROW_TENSORS).values())

    def map(self, f: Callable[[Tensor], Tensor]) -> QTensor:
        """Applies ``f`` to each tensor."""
        present = self._present(_ROW_TENSORS + _OTHER_TENSORS)
        return dataclasses.replace(self, **{name: f(t) for name, t in present.items()})

    def map_rows(self, f: Callable[[Tensor], Tensor]) -> QTensor:
        """Applies ``f`` to each tensor that has a row for each output feature."""
        present = self._present(_ROW_TENSORS)
        return dataclasses.replace(self, **{name: f(t) for name, t in present.items()})

    def _present(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        tensors = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def hash_permutation(permutation_K: Tensor) -> str:
    """Hashes the order of columns, so that formats can be compared on the host."""
    return hashlib.sha256(permutation_K.cpu().int().numpy().tobytes()).hexdigest()[:16]


def expand_blocks(
    scale: Tensor, *, rows: int, columns: int, group_size: int, shape: tuple[int, int]
) -> Tensor:
    """Expands scales of blocks to a scale for each output feature and group.

    Args:
        scale: [N / rows, K / columns], with sizes rounded up.
        rows: Output features of a block; the last block may have fewer.
        columns: Input features of a block; the last block may have fewer.
        group_size: Input features of a group, a divisor of ``columns`` and of K. It is smaller than
            ``columns`` where ``columns`` does not divide K.
        shape: (N, K) of a matrix, or of a slice along whole blocks.

    Returns:
        Scales [N, G].
    """
    n, k = shape
    by_row = scale if rows == 1 else scale.repeat_interleave(rows, dim=0)[:n]
    if columns == group_size:
        return by_row.contiguous()
    return by_row.repeat_interleave(columns // group_size, dim=1)[:, : k // group_size].contiguous()


def join_alike(parts: Iterable[Tensor | QTensor], n: int) -> list[Tensor | QTensor]:
    """Joins adjacent weights of one format along the output features.

    It only concatenates, because no group spans output features. Each change of format starts a new
    weight; the lookup table and the order of columns are part of the format.

    Args:
        parts: The weights. Each is copied and released before the next is taken, so that an
            iterator can make them one at a time.
        n: Output features of all parts together.

    Returns:
        One weight for each run of parts of one format.
    """
    joined: list[Tensor | QTensor] = []
    whole: Tensor | QTensor | None = None
    row = 0
    for part in parts:
        if whole is not None and not _alike(part, whole):
            joined.append(slice_weight(whole, slice(row), None))
            whole, n, row = None, n - row, 0
        if whole is None and part.shape[0] == n:
            joined.append(part)
            row = n
            continue
        if whole is None:
            whole = _like_with_rows(part, n)
        _copy_rows(part, whole, row)
        row += part.shape[0]
        del part  # before the next is made: matrices are large
    if whole is not None:
        joined.append(whole)
    assert joined, "nothing to join"
    assert row == n, f"{row} rows came, not {n}"
    return joined


def join_rows(parts: Iterable[Tensor | QTensor], n: int) -> Tensor | QTensor:
    """Joins weights of one format along the output features; see ``join_alike``."""
    joined = join_alike(parts, n)
    assert len(joined) == 1, "weights of several formats cannot be joined"
    return joined[0]


def slice_weight(weight: Tensor | QTensor, rows: slice, columns: range | None) -> Tensor | QTensor:
    """Copies a slice of a weight [N, K]; returns the weight itself if the slice is all of it.

    Args:
        weight: Floating point or quantized.
        rows: Output features.
        columns: Input features, in whole groups; None for all.

    Raises:
        ConfigError: See ``QTensor.columns``.
    """
    n, k = weight.shape
    start, stop, _ = rows.indices(n)
    first, last = (0, k) if columns is None else (columns.start, columns.stop)
    if (start, stop, first, last) == (0, n, 0, k):
        return weight
    if isinstance(weight, QTensor):
        return weight.rows(start, stop).columns(first, last).map(Tensor.clone)
    return weight[start:stop, first:last].clone()


def _alike(a: Tensor | QTensor, b: Tensor | QTensor) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype
    return a.format == b.format


def _copy_rows(part: Tensor | QTensor, whole: Tensor | QTensor, row: int) -> None:
    for new, joined in zip(_row_tensors(part), _row_tensors(whole), strict=True):
        joined[row : row + len(new)] = new


def _row_tensors(weight: Tensor | QTensor) -> tuple[Tensor, ...]:
    return weight.row_tensors if isinstance(weight, QTensor) else (weight,)


def _like_with_rows(weight: Tensor | QTensor, n: int) -> Tensor | QTensor:
    def resized(tensor: Tensor) -> Tensor:
        return tensor.new_empty(n, *tensor.shape[1:])

    return weight.map_rows(resized) if isinstance(weight, QTensor) else resized(weight)
