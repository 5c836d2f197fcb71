"""Tensors in host memory come to lie on huge pages, where Linux gives them."""

import ctypes
import errno
import mmap
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hotloop.huge_pages import HUGE_BYTES, use_huge_pages

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes(address: int) -> int:
    """Of the mapping that holds an address, how much lies on huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no such mapping")


@pytest.mark.skipif(
    not ENABLED.exists() or "[madvise]" not in ENABLED.read_text(),
    reason="this system gives huge pages unasked, or not at all",
)
def test_what_was_on_small_pages_lies_on_huge_ones_and_is_what_it_was():
    memory = mmap.mmap(-1, 8 * HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tensor = torch.frombuffer(memory, dtype=torch.int32)
    torch.arange(len(tensor), dtype=torch.int32, out=tensor)
    assert huge_bytes(tensor.data_ptr()) == 0
    halves = tensor[: len(tensor) // 2], tensor[len(tensor) // 2 :]
    if reason := use_huge_pages(halves):
        pytest.skip(reason)
    assert huge_bytes(tensor.data_ptr()) >= 7 * HUGE_BYTES
    assert torch.equal(tensor, torch.arange(len(tensor), dtype=torch.int32))


def test_what_fills_no_huge_page_is_left_alone():
    assert use_huge_pages([torch.ones(3), torch.empty(4, device="meta")]) is None


def test_a_refusal_is_reported_with_its_size_and_reason(monkeypatch):
    def refuse(*_: object) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(madvise=refuse))
    reason = use_huge_pages([torch.empty(3 * HUGE_BYTES, dtype=torch.uint8)])
    assert reason in {
        f"huge pages not used for {n} MiB of host memory: Invalid argument" for n in (4, 6)
    }
