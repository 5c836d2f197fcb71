"""Finds and ends everything that a cell's process started.

Ranks and compilers' helpers lead sessions of their own and can outlive their parents, so neither
process groups nor parents lead to all of them. But all inherit an environment variable whose value
is unique to the cell.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil

CELL_ID = "HOTLOOP_CELL"
"""The environment variable that identifies a cell's processes."""

GONE_S = 60.0
"""Seconds that killed processes may take to end: a driver may have much memory to free."""


def end_descendants(cell_id: str, timeout_s: float = GONE_S) -> list[int]:
    """Kills every process of a cell, except this one, and waits until they have ended.

    Args:
        cell_id: The value of ``CELL_ID`` in their environments.
        timeout_s: The most seconds to wait.

    Returns:
        The ids of processes that have not ended by then.
    """
    deadline = time.monotonic() + timeout_s
    while found := list(_processes(cell_id)):  # again: one may have started another
        if time.monotonic() > deadline:
            return [process.pid for process in found]
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=1.0)
    return []


def _processes(cell_id: str) -> Iterator[psutil.Process]:
    """Yields the processes of a cell that have not ended, except this one."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended, or is another user's
            if process.pid != os.getpid() and process.environ().get(CELL_ID) == cell_id:
                yield process
