"""Weights move into huge pages where they are, with their values."""

import sys
from pathlib import Path

import pytest
import torch

from hotloop.kernels.cpu.huge_pages import HUGE_PAGE, in_huge_pages, move_to_huge_pages

SMAPS = Path("/proc/self/smaps")
linux = pytest.mark.skipif(sys.platform != "linux", reason="huge pages of Linux")


def bytes_in_huge_pages(tensor: torch.Tensor) -> int:
    """Returns the bytes in huge pages of the mappings that a tensor lies in."""
    total, inside = 0, False
    for line in SMAPS.read_text().splitlines():
        name, *fields = line.split()
        if not name.endswith(":"):
            begin, end = (int(address, 16) for address in name.split("-"))
            inside = begin < tensor.data_ptr() + tensor.nbytes and tensor.data_ptr() < end
        elif inside and name == "AnonHugePages:":
            total += 1024 * int(fields[0])
    return total


@linux
def test_small_matrices_side_by_side_share_huge_pages_and_keep_values_and_addresses():
    whole = torch.arange(6 * HUGE_PAGE // 8)
    matrices = whole.chunk(64)  # none fills a huge page
    before = [(m.data_ptr(), m.clone()) for m in matrices]
    reason = move_to_huge_pages(matrices)
    if reason is not None:
        pytest.skip(f"this machine moves no pages: {reason}")
    assert bytes_in_huge_pages(whole) >= 4 * HUGE_PAGE
    assert all(m.data_ptr() == at for m, (at, _) in zip(matrices, before, strict=True))
    assert all(torch.equal(m, values) for m, (_, values) in zip(matrices, before, strict=True))


@linux
def test_new_memory_is_in_huge_pages_from_the_first_write():
    asked = torch.empty(32 * HUGE_PAGE, dtype=torch.uint8)  # a mapping of its own, and so new
    assert in_huge_pages(asked) is asked
    found = bytes_in_huge_pages(asked.fill_(7))
    if not found and move_to_huge_pages([asked]) is not None:
        pytest.skip("this machine has no huge pages")
    assert found >= 31 * HUGE_PAGE
    assert bool((asked == 7).all())
    assert in_huge_pages(torch.empty(0)).numel() == 0


@linux
def test_memory_of_a_file_is_as_before(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * (4 * HUGE_PAGE // 256))
    mapped = torch.from_file(str(path), shared=True, size=4 * HUGE_PAGE, dtype=torch.uint8)
    move_to_huge_pages([mapped])
    assert torch.equal(mapped, torch.arange(256, dtype=torch.uint8).repeat(4 * HUGE_PAGE // 256))


@linux
def test_few_or_scattered_bytes_are_left_alone():
    whole = torch.zeros(8 * HUGE_PAGE, dtype=torch.uint8)
    before = bytes_in_huge_pages(whole)  # its mapping may hold other tensors
    assert move_to_huge_pages([]) is None
    assert move_to_huge_pages([whole[:4096], whole[HUGE_PAGE : HUGE_PAGE + 4096]]) is None
    assert bytes_in_huge_pages(whole) == before
