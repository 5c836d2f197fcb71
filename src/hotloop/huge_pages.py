"""Puts tensors in host memory on huge pages.

A step reads every weight once. On pages of 4 KiB a processor looks up a translation for each, more
than it can keep, and reads slower: by a quarter where this was measured (docs/performance.md).
Linux gives huge pages unasked only where it is told to ("always"); by default a program asks. It is
asked after loading, tensor by tensor, so it does not matter which allocator they came from.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable

from torch import Tensor

HUGE_BYTES = 2 << 20
"""Of a huge page, on x86-64 and on 64-bit Arm with pages of 4 KiB."""

_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25  # of Linux 6.1; at once, where MADV_HUGEPAGE alone leaves it to a kernel thread


def use_huge_pages(tensors: Iterable[Tensor]) -> str | None:
    """Asks Linux to move tensors in host memory to huge pages, where they fill any.

    Returns:
        Why some of it was refused; None if nothing was.
    """
    if sys.platform != "linux":
        return None
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    refused_bytes, reason = 0, ""
    for run in _runs(tensors):
        # Without the first, older kernels do nothing at all; it says nothing of success.
        madvise(run.start, len(run), _MADV_HUGEPAGE)
        if madvise(run.start, len(run), _MADV_COLLAPSE):
            refused_bytes, reason = refused_bytes + len(run), os.strerror(ctypes.get_errno())
    if not refused_bytes:
        return None
    return f"huge pages not used for {refused_bytes >> 20} MiB of host memory: {reason}"


def _runs(tensors: Iterable[Tensor]) -> list[range]:
    """Addresses of whole huge pages that tensors fill, but for gaps smaller than one."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    merged: list[tuple[int, int]] = []
    for start, nbytes in sorted((s.data_ptr(), s.nbytes()) for s in storages):
        first, last = start, start + nbytes
        if merged and start - merged[-1][1] < HUGE_BYTES:
            first, before = merged.pop()
            last = max(last, before)
        merged.append((first, last))
    runs = [
        range(-(-first // HUGE_BYTES) * HUGE_BYTES, last // HUGE_BYTES * HUGE_BYTES)
        for first, last in merged
    ]
    return [run for run in runs if run]
