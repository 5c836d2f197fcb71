"""Checks that a packed weight holds the numbers that it was packed from.

A fault in packing can leave a model that answers fluently, and wrongly. So the first and the last
rows of each weight are dequantized in float32 before they are packed, and again from the packed
bytes. All kernels hold their formats exactly, so the results must be equal. Tests cover the rows
between (``kernels.pack``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hotloop.kernels.linear import LinearKernel
from hotloop.quant.qtensor import QTensor

_ROWS = 8
"""The fewest rows that are compared at each end of a weight; for a paired weight, of each half."""


class PackingCheck:
    """Compares rows of one weight before and after packing; ``record`` gets the rows.

    Args:
        kernel: The kernel that packs it.
        n: Output features in all.
        paired: See ``kernels.pack.pack_in_chunks``.
    """

    def __init__(self, kernel: LinearKernel, n: int, *, paired: bool = False) -> None:
        self._kernel, self._n = kernel, n
        self._halves = 2 if paired else 1
        # The following attributes count the rows of one half.
        self._aligned = kernel.row_alignment // self._halves
        self._end, self._taken = 0, 0
        self._samples: list[tuple[range, list[Tensor]]] = []

    def record(self, chunk: Tensor | QTensor) -> Tensor | QTensor:
        """Records the rows that are packed next, and returns them."""
        rows, last = chunk.shape[0] // self._halves, self._n // self._halves
        most = -(-_ROWS // self._aligned) * self._aligned
        if self._end == 0:
            self._take(chunk, range(min(most, rows)))
        if self._end + rows == last:
            first = max(rows - most, 0) // self._aligned * self._aligned
            self._take(chunk, range(max(first, self._taken - self._end), rows))
        self._end += rows
        return chunk

    def _take(self, chunk: Tensor | QTensor, rows: range) -> None:
        """Dequantizes rows of each half of a chunk."""
        if not rows:
            return
        half = chunk.shape[0] // self._halves
        starts = [i * half + rows.start for i in range(self._halves)]
        taken = [_float32(chunk, start, start + len(rows)) for start in starts]
        self._taken = self._end + rows.stop
        self._samples.append((range(self._end + rows.start, self._taken), taken))

    def compare(self, packed: Sequence[Tensor]) -> Tensor:
        """Returns whether the packed rows equal the recorded ones: bool [], on their device."""
        assert self._end * self._halves == self._n, "every row must be recorded"
        expected = torch.cat([taken[i] for i in range(self._halves) for _, taken in self._samples])
        axes = self._kernel.row_axes(packed)
        parts = [
            part if axis is None or part.numel() == 0 else self._rows_of(part, axis)
            for part, axis in zip(packed, axes, strict=True)
        ]
        return (self._kernel.dequantize(parts, len(expected)) == expected).all()

    def _rows_of(self, part: Tensor, axis: int) -> Tensor:
        """Slices the recorded rows from a packed tensor.

        Along ``axis`` it has an element for each output feature, in their original order, or an
        element for every ``row_alignment`` of them, which has rows of both halves.
        """
        half = self._n // self._halves
        if part.shape[axis] == self._n:
            starts = [half * i for i in range(self._halves)]
            spans = [(s + rows.start, len(rows)) for s in starts for rows, _ in self._samples]
        else:
            elements = [
                range(rows.start // self._aligned, -(-rows.stop // self._aligned))
                for rows, _ in self._samples
            ]
            spans = [(each.start, len(each)) for each in elements]
        return torch.cat([part.narrow(axis, *span) for span in spans], dim=axis)


def _float32(weight: Tensor | QTensor, start: int, stop: int) -> Tensor:
    if isinstance(weight, QTensor):
        return weight.rows(start, stop).dequantize()
    return weight[start:stop].float()
