"""Measures the processor time of other processes, to reject timings that they disturbed.

Where two threads wait for each other many times a token, a third process on two cores slows
decoding down many times. Such a round is no measurement of any engine, and is repeated. The source
is /proc/stat, so this works only on Linux.
"""

from __future__ import annotations

import os
import time
from pathlib import Path


class Bystanders:
    """The processor time of other processes since this object was made."""

    MOST = 0.1
    """The most processors that others may use, on average, in a valid timing."""

    def __init__(self) -> None:
        self._began, self._busy_s = time.perf_counter(), _busy_s()

    def disturb(self, own_s: float) -> bool:
        """Returns whether others used too much; ``own_s`` is our own processor time in seconds."""
        others_s = _busy_s() - self._busy_s - own_s
        return others_s > self.MOST * (time.perf_counter() - self._began)


def _busy_s() -> float:
    """Returns the busy seconds of all processors, with those of other guests."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
