import pytest
import torch
from waiting import wait_until

from hotloop import memory_meter as memory
from hotloop.memory_meter import MemoryMeter

MIB = 2**20


def _resident(n_bytes: int) -> bytearray:
    return bytearray(b"x") * n_bytes  # written, so that it is resident


@pytest.mark.parametrize("permitted", [True, False])
def test_peak_of_a_block_is_seen_after_it_was_freed(monkeypatch, permitted):
    if not permitted:
        monkeypatch.setattr(memory, "_restart_high_water_mark", lambda: False)
    with MemoryMeter("cpu") as before:
        pass
    with MemoryMeter("cpu") as meter:
        block = _resident(200 * MIB)
        if not permitted:
            wanted = before.peak_bytes + 190 * MIB
            wait_until(lambda: meter.peak_bytes > wanted, "the peak is sampled")
        del block
    assert meter.peak_bytes - before.peak_bytes == pytest.approx(200 * MIB, rel=0.1)
    if not permitted:
        assert meter.method == "sampled"


def test_an_earlier_peak_does_not_count():
    block = _resident(200 * MIB)
    del block
    with MemoryMeter("cpu") as meter:
        pass
    assert meter.peak_bytes < memory._resident_bytes() + 50 * MIB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_peak_is_what_the_allocator_took():
    torch.cuda.empty_cache()
    with MemoryMeter("cuda:0") as before:
        pass
    with MemoryMeter("cuda:0") as meter:
        block = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda:0")
        del block
    assert meter.method == "reserved"
    assert meter.peak_bytes - before.peak_bytes == pytest.approx(256 * MIB, rel=0.01)
    assert meter.allocated_bytes - before.allocated_bytes == pytest.approx(256 * MIB, rel=0.01)
