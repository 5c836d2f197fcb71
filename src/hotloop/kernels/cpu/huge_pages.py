"""Keeps weights in huge pages of 2 MiB, from which they are read faster.

A decode step reads every weight once, so in pages of 4 KiB it needs the address of a new page every
64 cache lines. In a virtual machine, looking up the address takes longer than reading the page.

Linux allocates huge pages for memory of at least 2 MiB if they are requested before it is written
(``MADV_HUGEPAGE``). Small matrices share 2 MiB with others; they are moved into huge
pages after all weights are loaded (``MADV_COLLAPSE``, Linux 6.1). If that fails, only speed is
lost.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

HUGE_PAGE = 2 << 20
"""Bytes of a huge page. Processors whose huge pages are larger refuse the call."""

_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # <linux/mman.h>


def in_huge_pages(tensor: Tensor) -> Tensor:
    """Requests huge pages for a new CPU tensor that is not written yet, and returns the tensor."""
    if sys.platform == "linux" and tensor.device.type == "cpu":
        begin = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        end = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE
        if begin < end:
            _madvise()(begin, end - begin, _MADV_HUGEPAGE)
    return tensor


def move_to_huge_pages(tensors: Iterable[Tensor]) -> str | None:
    """Moves the memory of tensors into huge pages; their addresses and values stay.

    Tensors that lie side by side share pages. A page that they fill at least half is moved.

    Returns:
        The reason if no page was moved although tensors fill whole pages; otherwise None.
    """
    if sys.platform != "linux":
        return None
    reason, moved = None, False
    for begin, end in _runs(tensors):
        inner = range(-(-begin // HUGE_PAGE), end // HUGE_PAGE)
        # One call for all pages is faster; the calls for single pages then find them moved.
        if inner:
            _collapse(inner.start, len(inner))
        for page in range(round(begin / HUGE_PAGE), round(end / HUGE_PAGE)):
            if _collapse(page, 1):
                moved = True
            elif page in inner:  # others may end beside the mapping
                reason = os.strerror(ctypes.get_errno())
    return None if moved else reason


def _collapse(page: int, n_pages: int) -> bool:
    """Moves ``n_pages`` pages from the number ``page`` on; returns whether all are huge now."""
    return _madvise()(page * HUGE_PAGE, n_pages * HUGE_PAGE, _MADV_COLLAPSE) == 0


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise


def _runs(tensors: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    """Yields the begin and end addresses of runs of tensors with only small gaps between them."""
    begin = end = 0
    for at, nbytes in sorted((t.data_ptr(), t.nbytes) for t in tensors):
        if at - end > HUGE_PAGE // 8:
            if begin < end:
                yield begin, end
            begin = end = at
        end = max(end, at + nbytes)
    if begin < end:
        yield begin, end
