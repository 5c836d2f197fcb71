"""What other processes took of the processors meanwhile: whether a timing is to be believed.

Where two threads wait for each other many times a token, a third process on two cores makes
decoding not a little slower but many times. Such a round says nothing of the engines, whichever
they are, and is measured again. From /proc/stat, so on Linux alone.
"""

from __future__ import annotations

import os
import time
from pathlib import Path


class Bystanders:
    """Watches from here on."""

    MOST = 0.1
    """Processors' worth of time that others may take, on average, in a timing that counts."""

    def __init__(self) -> None:
        self._began, self._busy_s = time.perf_counter(), _busy_s()

    def disturb(self, own_s: float) -> bool:
        """Whether they took more than a timing bears, ``own_s`` of processor time being ours."""
        others_s = _busy_s() - self._busy_s - own_s
        return others_s > self.MOST * (time.perf_counter() - self._began)


def _busy_s() -> float:
    """Seconds for which all processors together were not idle, or were another guest's."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
