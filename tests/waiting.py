"""Waiting for other processes. A time limit ends a hang and decides nothing else."""

import time
from collections.abc import Callable

import psutil

HANG_S = 900.0
"""Nothing under test takes this long, however busy the machine is."""


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Returns once ``condition`` holds; fails, naming ``what`` did not happen, after a hang."""
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, f"did not happen: {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
