"""Moves weights into huge pages of 2 MiB, where they are read faster.

A decode step reads every weight once, so in pages of 4 KiB it needs the address of a new page every
64 cache lines. In a virtual machine looking one up takes longer than reading the page. Linux
gives huge pages by itself only to memory that asked for them before it was written, and only where
2 MiB are allocated at once, which the matrices of a small model are not. So pages are moved when
all weights are in place (``MADV_COLLAPSE``, Linux 6.1). Where that fails, only speed is lost.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator

from torch import Tensor

HUGE_PAGE = 2 << 20
"""Bytes of a huge page. Processors whose huge pages are larger refuse the call."""

_MADV_COLLAPSE = 25  # <linux/mman.h>


def move_to_huge_pages(tensors: Iterable[Tensor]) -> str | None:
    """Moves the memory of tensors into huge pages; their addresses and values stay.

    Tensors that lie side by side share pages. A page that they fill at least half is moved.

    Returns:
        Why none was moved, though tensors fill whole pages; otherwise None.
    """
    if sys.platform != "linux":
        return None
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    reason, moved = None, False
    for begin, end in _runs(tensors):
        first, last = round(begin / HUGE_PAGE), round(end / HUGE_PAGE)
        for page in range(first * HUGE_PAGE, last * HUGE_PAGE, HUGE_PAGE):
            if advise(page, HUGE_PAGE, _MADV_COLLAPSE) == 0:
                moved = True
            elif begin <= page and page + HUGE_PAGE <= end:  # others may end beside the mapping
                reason = os.strerror(ctypes.get_errno())
    return None if moved else reason


def _runs(tensors: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    """Yields the first and last addresses of tensors that lie side by side, with small gaps."""
    begin = end = 0
    for at, nbytes in sorted((t.data_ptr(), t.nbytes) for t in tensors):
        if at - end > HUGE_PAGE // 8:
            if begin < end:
                yield begin, end
            begin = end = at
        end = max(end, at + nbytes)
    if begin < end:
        yield begin, end
