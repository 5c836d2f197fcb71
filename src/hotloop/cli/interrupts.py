"""Delays Ctrl-C and other signals while modules are imported, until the end of the import.

Importing torch takes a second or more. Some of its modules swallow a KeyboardInterrupt, so that the
command would continue; and its C++ code aborts the process.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

_RESEND_S = 0.02
"""Seconds after which a signal that arrived during an import is sent again."""


@contextmanager
def ctrl_c_after_imports() -> Generator[None]:
    """Makes Ctrl-C raise KeyboardInterrupt once no module is being imported, within the block.

    If Ctrl-C is ignored or has another handler, or outside the main thread, nothing changes.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def interrupt() -> None:
        raise KeyboardInterrupt

    with handled_after_imports(signal.SIGINT, interrupt):
        yield


@contextmanager
def handled_after_imports(number: signal.Signals, act: Callable[[], None]) -> Generator[None]:
    """Calls ``act`` on a signal once no module is being imported, within the block.

    Call it in the main thread. At the end of the block the previous handler is restored.
    """
    timers: list[threading.Timer] = []

    def on_signal(_signum: int, frame: FrameType | None) -> None:
        if not _is_importing(frame):
            act()
        elif not any(timer.is_alive() for timer in timers):
            timers[:] = [threading.Timer(_RESEND_S, os.kill, (os.getpid(), number))]
            timers[0].daemon = True
            timers[0].start()

    before = signal.signal(number, on_signal)
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        signal.signal(number, before)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib._bootstrap"):
            return True
        frame = frame.f_back
    return False
