"""Delays Ctrl-C while modules are imported, until the end of the import.

Importing torch takes a second or more. Some of its modules swallow a KeyboardInterrupt, so that the
command would continue; and its C++ code aborts the process.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

_POLL_S = 0.02
"""Seconds between two checks whether an import has ended."""


@contextmanager
def ctrl_c_after_imports() -> Generator[None]:
    """Makes Ctrl-C raise KeyboardInterrupt once no module is being imported, within the block.

    If Ctrl-C is ignored or has another handler, or outside the main thread, nothing changes.
    """
    timers: list[threading.Timer] = []

    def on_sigint(_signum: int, frame: FrameType | None) -> None:
        if not _imports(frame):
            raise KeyboardInterrupt
        if not any(timer.is_alive() for timer in timers):
            timers[:] = [threading.Timer(_POLL_S, os.kill, (os.getpid(), signal.SIGINT))]
            timers[0].daemon = True
            timers[0].start()

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, on_sigint)
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib._bootstrap"):
            return True
        frame = frame.f_back
    return False
