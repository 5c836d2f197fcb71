"""Measures the processor time of other processes, to reject timings that they disturbed.

The threads of an engine wait for each other many times per token. If another process takes one of
two cores, decoding becomes several times slower, which says nothing about the engine. So a round
that was disturbed is repeated. The source is /proc/stat, so this works only on Linux.
"""

from __future__ import annotations

import os
import time
from pathlib import Path


class Bystanders:
    """The processor time of other processes since this object was made."""

    MAX_PROCESSORS = 0.1
    """The most processors that others may use on average during a valid timing."""

    def __init__(self) -> None:
        self._began, self._busy_s = time.perf_counter(), _busy_s()

    def disturbed(self, own_s: float) -> bool:
        """Returns whether others used too much; ``own_s`` is our own processor time in seconds."""
        others_s = _busy_s() - self._busy_s - own_s
        return others_s > self.MAX_PROCESSORS * (time.perf_counter() - self._began)


def _busy_s() -> float:
    """Returns the busy seconds of all processors since boot, time stolen by other guests too."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
