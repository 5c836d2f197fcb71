"""Measures the peak memory of a block of code: the memory that must be free to run it.

On CUDA this is the memory that torch's allocator reserved on the device, on CPU the resident memory
of the process. Other processes are not included: each rank of a tensor-parallel group measures its
own memory.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal

_SAMPLING_INTERVAL_S = 0.005


class MemoryMeter:
    """Measures the peak memory of the ``with`` block it manages.

    On CUDA it is the allocator's peak reserved bytes. These include memory that it keeps for reuse
    and the pools of CUDA graphs, but not the CUDA context (some hundreds of MB);
    ``allocated_bytes`` is the peak of live tensors.

    On CPU it is the peak resident set, including file pages of memory-mapped weights. The kernel
    records it (VmHWM), and ``/proc/self/clear_refs`` resets it for this block. If that is not
    permitted, or the system is not Linux, the resident set is sampled every few milliseconds, which
    can miss a short peak; ``method`` is the method that was used.

    Attributes:
        peak_bytes: The peak, once the block has ended.
        allocated_bytes: Peak of live tensors; CUDA only.
        method: ``reserved``, ``VmHWM`` or ``sampled``.
    """

    peak_bytes: int
    allocated_bytes: int | None = None
    method: Literal["reserved", "VmHWM", "sampled"]

    def __init__(self, device: str) -> None:
        self._device = device

    def __enter__(self) -> MemoryMeter:
        if self._device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
            self.method = "reserved"
        elif _reset_high_water_mark():
            self.method = "VmHWM"
        else:
            self.method = "sampled"
            self.peak_bytes = _resident_bytes()
            self._stop = threading.Event()
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.method == "reserved":
            import torch

            self.peak_bytes = torch.cuda.max_memory_reserved(self._device)
            self.allocated_bytes = torch.cuda.max_memory_allocated(self._device)
        elif self.method == "VmHWM":
            self.peak_bytes = _high_water_mark_bytes()
        else:
            self._stop.set()
            self._sampler.join()

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLING_INTERVAL_S):
            self.peak_bytes = max(self.peak_bytes, _resident_bytes())


def _reset_high_water_mark() -> bool:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to VmRSS
        return True
    return False


def _high_water_mark_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss
