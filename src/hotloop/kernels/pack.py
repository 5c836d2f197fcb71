"""Packs a weight some rows at a time, so that only these rows are in memory besides the result.

Packing a whole weight at once would need several copies of it, each larger than the result.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable

import torch
from torch import Tensor

from hotloop.kernels.cpu.huge_pages import in_huge_pages
from hotloop.kernels.linear import LinearKernel, Quantized, n_rows

_VALUES_AT_ONCE = {"cpu": 2**20, "cuda": 2**24}
"""Values that are packed at once, by device: few enough for a CPU's caches, enough to fill a GPU.
"""


def rows_at_once(k: int, alignment: int, device: torch.device) -> int:
    """Returns the number of rows to pack at once, a multiple of ``alignment``."""
    return max(_VALUES_AT_ONCE[device.type] // k // alignment, 1) * alignment


def pack_in_chunks(
    kernel: LinearKernel, chunks: Iterable[Tensor | Quantized], n: int, *, paired: bool = False
) -> Generator[int, None, list[Tensor]]:
    """Packs a weight of ``n`` rows, exactly as ``kernel.pack`` packs the whole.

    It is a generator, so that weights made from the same rows can be packed alternately.

    Args:
        kernel: The kernel.
        chunks: The rows in order. All chunks but the last have the same number of rows, a multiple
            of ``kernel.row_alignment``. A chunk of a paired weight has as many rows of the first
            half as of the second.
        n: Output features in all.
        paired: Pack the halves of the weight together, as the fused step reads a paired weight.

    Yields:
        The rows of each chunk, once it is packed.

    Returns:
        The packed weight.
    """
    whole: list[Tensor] = []
    ends: list[int] = []
    row = 0
    for chunk in chunks:
        packed, rows = kernel.pack(chunk), n_rows(chunk)
        if rows == n:
            return packed
        axes = kernel.row_axes(packed)
        if not whole:
            n_here, n_all = rows // kernel.row_alignment, -(-n // kernel.row_alignment)
            whole = [_resized(*each, n_here, n_all) for each in zip(packed, axes, strict=True)]
            ends = [0] * len(packed)
        for i, (part, axis) in enumerate(zip(packed, axes, strict=True)):
            if axis is None or part.numel() == 0:
                continue
            size = part.shape[axis]
            if paired and part.dim() == 1:  # one number for each output feature, in their order
                half = rows // 2
                whole[i][row // 2 : row // 2 + half] = part[:half]
                whole[i][(n + row) // 2 : (n + row) // 2 + half] = part[half:]
            else:
                whole[i].narrow(axis, ends[i], size).copy_(part)
            ends[i] += size
        row += rows
        yield rows
    assert row == n, f"the chunks have {row} rows, not {n}"
    # Where the last rows are fewer than row_alignment, tensors without padding are shorter.
    return [
        part
        if axis is None or part.numel() == 0 or end == part.shape[axis]
        else part.narrow(axis, 0, end).clone()
        for part, axis, end in zip(whole, kernel.row_axes(whole), ends, strict=True)
    ]


def _resized(part: Tensor, axis: int | None, n: int, n_all: int) -> Tensor:
    """Allocates a packed tensor for ``n_all`` times ``row_alignment`` rows; ``part`` has ``n``."""
    if axis is None or part.numel() == 0:
        return part
    shape = list(part.shape)
    assert shape[axis] % n == 0, f"{shape[axis]} along {axis} for {n} times row_alignment"
    shape[axis] = shape[axis] // n * n_all
    return in_huge_pages(part.new_empty(shape))
