"""Finding and ending everything that a cell's process started.

Ranks and compilers' helpers lead sessions of their own and outlive whoever started them, so neither
process groups nor parents lead to all of them. What they share is their environment: each inherits
a variable whose value no other cell has.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil

MARK = "HOTLOOP_CELL"
"""The environment variable."""

GONE_S = 60.0
"""Seconds that killed processes may take to end: a driver may have much memory to free."""


def end_marked(mark: str, timeout_s: float = GONE_S) -> list[int]:
    """Kills every process that has a mark, but for this one, and waits until they have ended.

    Args:
        mark: The value of ``MARK`` in their environments.
        timeout_s: How long to wait.

    Returns:
        The ids of those that have not ended by then.
    """
    deadline = time.monotonic() + timeout_s
    while marked := list(_marked(mark)):  # again, for what one of them started meanwhile
        if time.monotonic() > deadline:
            return [process.pid for process in marked]
        for process in marked:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(marked, timeout=1.0)
    return []


def _marked(mark: str) -> Iterator[psutil.Process]:
    """Processes with a mark that have not ended."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended, or is another user's
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                yield process
