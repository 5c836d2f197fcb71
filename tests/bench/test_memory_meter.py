import subprocess
import sys

import pytest
import torch

from hotloop.memory_meter import MemoryMeter

MIB = 2**20


PEAK = """
import sys, time
from hotloop import memory_meter as memory

if sys.argv[1] == "sampled":
    memory._reset_high_water_mark = lambda: False
with memory.MemoryMeter("cpu") as before:
    pass
with memory.MemoryMeter("cpu") as meter:
    block = bytearray(b"x") * (200 << 20)  # written, so that it is resident
    resident = memory._resident_bytes()
    while meter.method == "sampled" and meter.peak_bytes < resident:
        time.sleep(0.01)
    del block
with memory.MemoryMeter("cpu") as after:
    pass
print(meter.method, meter.peak_bytes - before.peak_bytes, after.peak_bytes - before.peak_bytes)
"""


@pytest.mark.parametrize("sampled", [True, False])
def test_peak_of_a_block_is_seen_after_it_was_freed_and_not_in_the_next_one(sampled):
    # A process of its own: what others free meanwhile would be a part of the figures.
    command = [sys.executable, "-c", PEAK, "sampled" if sampled else "recorded"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    method, peak, next_peak = said.split()
    assert method == "sampled" or not sampled
    assert int(peak) == pytest.approx(200 * MIB, rel=0.1)
    assert int(next_peak) < 50 * MIB


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
