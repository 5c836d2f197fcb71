"""A quantized weight before any kernel has touched it: values, scales, offsets.

This is the form in which weights are sliced for tensor parallelism and stored on disk. Everything
in it is laid out like the weight it came from, so slicing needs no knowledge of the scheme:
quantize → shard → pack, in that order, and scales never depend on the number of ranks. How a
kernel wants its bytes arranged is the kernel's business (``kernels.linear``).

Shape letters: N output features, K input features, G groups along K (K / group_size; 1 for one
group per output channel).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hotloop.errors import ConfigError
from hotloop.kernels import reference
from hotloop.kernels.linear import KernelFormat, Zero

Combine = Callable[[Tensor], Tensor]
"""Returns the element-wise maximum of a tensor over the slices of all ranks (all-reduce)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class QTensor:
    """A quantized matrix, with a scale for each group of input features.

    ``weight = values * scale + offset`` with floating-point offsets,
    ``weight = (values - offset) * scale`` with integer ones, which are called zero points.

    Attributes:
        values: [N, K]: int8, which holds integers of up to 8 bits of ``int8`` and -8…7 of
            ``int4``; float8_e4m3fn of ``fp8``.
        scale: Floating point of any type, [N, G].
        offset: [N, G]: floating point of the scales' type, or int8; None where zero is 0.
        kind: The type of the values.
    """

    values: Tensor
    scale: Tensor
    offset: Tensor | None
    kind: Literal["int8", "fp8", "int4"]

    def __post_init__(self) -> None:
        dtype = torch.float8_e4m3fn if self.kind == "fp8" else torch.int8
        assert self.values.dtype == dtype, f"values of {self.kind} are {self.values.dtype}"
        assert self.values.shape[0] == self.scale.shape[0], "one row of scales per output feature"
        assert self.values.shape[1] % self.scale.shape[1] == 0, "groups of equal size"
        if self.offset is not None:
            assert self.offset.shape == self.scale.shape, "an offset per scale"
            types = (torch.int8, self.scale.dtype)
            assert self.offset.dtype in types, f"offsets are {self.offset.dtype}"

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), the shape of the dequantized weight."""
        n, k = self.values.shape
        return n, k

    @property
    def group_size(self) -> int:
        """Input features that share a scale: K where the scale is per output channel."""
        return self.values.shape[1] // self.scale.shape[1]

    @property
    def format(self) -> KernelFormat:
        """The number format that a kernel must be able to hold."""
        zero: Zero = "none"
        if self.offset is not None:
            zero = "offset" if self.offset.is_floating_point() else "integer"
        return KernelFormat(
            kind=self.kind,
            group_size=self.group_size,
            scale_dtype=self.scale.dtype,
            zero=zero,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantizes the weight, [N, K], in float32, and rounds once to ``dtype``."""
        return reference.dequantize(self.values, self.scale, self.offset).to(dtype)

    def rows(self, start: int, stop: int) -> QTensor:
        """Slices output features ``start`` to ``stop``: a column-parallel shard."""
        return self.map(lambda t: t[start:stop])

    def columns(self, start: int, stop: int) -> QTensor:
        """Slices input features ``start`` to ``stop``: a row-parallel shard, along whole groups.

        Raises:
            ConfigError: The range cuts a group apart.
        """
        size = self.group_size
        if size == self.shape[1]:  # one scale per channel serves every slice of it
            return QTensor(
                values=self.values[:, start:stop],
                scale=self.scale,
                offset=self.offset,
                kind=self.kind,
            )
        if start % size or stop % size:
            raise ConfigError(
                f"input features {start} to {stop} cut a quantization group of {size} apart; "
                f"use a group size that divides both, or a smaller tensor-parallel degree."
            )
        groups = slice(start // size, stop // size)
        return QTensor(
            values=self.values[:, start:stop],
            scale=self.scale[:, groups],
            offset=None if self.offset is None else self.offset[:, groups],
            kind=self.kind,
        )

    def to(self, device: torch.device | str) -> QTensor:
        """Copies it to another device."""
        return self.map(lambda t: t.to(device))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Its values, scales and, where there are some, offsets."""
        return tuple(t for t in (self.values, self.scale, self.offset) if t is not None)

    def map(self, f: Callable[[Tensor], Tensor]) -> QTensor:
        """Applies ``f`` to each of its tensors."""
        return QTensor(
            values=f(self.values),
            scale=f(self.scale),
            offset=None if self.offset is None else f(self.offset),
            kind=self.kind,
        )


def join_rows(parts: Iterable[Tensor | QTensor], n: int) -> Tensor | QTensor:
    """Joins weights along the output features: exact, since no group spans two of them.

    Args:
        parts: All dense or all of one scheme. Each is copied and let go before the next is asked
            for, so that an iterator can make them one at a time.
        n: Output features in all.
    """
    whole: Tensor | QTensor | None = None
    row = 0
    for part in parts:
        if part.shape[0] == n:
            return part
        if whole is None:
            whole = _like_with_rows(part, n)
        _copy_rows(part, whole, row)
        row += part.shape[0]
        del part  # before the next is made: matrices are large
    assert whole is not None, "nothing to join"
    assert row == n, f"{row} rows came, not {n}"
    return whole


def cut(weight: Tensor | QTensor, rows: slice, columns: range | None) -> Tensor | QTensor:
    """Returns a copy of a slice of a weight; the weight itself if the slice is whole."""
    n, k = weight.shape
    start, stop, _ = rows.indices(n)
    first, last = (0, k) if columns is None else (columns.start, columns.stop)
    if (start, stop, first, last) == (0, n, 0, k):
        return weight
    if isinstance(weight, QTensor):
        return weight.rows(start, stop).columns(first, last).map(Tensor.clone)
    return weight[start:stop, first:last].clone()


def _tensors(weight: Tensor | QTensor) -> tuple[Tensor, ...]:
    return weight.tensors if isinstance(weight, QTensor) else (weight,)


def _copy_rows(part: Tensor | QTensor, whole: Tensor | QTensor, row: int) -> None:
    for new, joined in zip(_tensors(part), _tensors(whole), strict=True):
        assert new.dtype == joined.dtype, f"{new.dtype} cannot join {joined.dtype}"
        joined[row : row + len(new)] = new


def _like_with_rows(weight: Tensor | QTensor, n: int) -> Tensor | QTensor:
    def resized(tensor: Tensor) -> Tensor:
        return tensor.new_empty(n, *tensor.shape[1:])

    return weight.map(resized) if isinstance(weight, QTensor) else resized(weight)
