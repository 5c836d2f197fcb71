"""``python -m hotloop.parallel.program CALLER MODULE ARGUMENTS``: runs the module of a rank.

From its start on, the rank ends when its caller ends. The connection alone cannot ensure that: a
module that imports torch takes seconds before it reads the connection, and the connection stays
open as long as a fork of the caller lives. So a thread polls whether the parent process, CALLER, is
gone.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
import time

from hotloop.parallel.link import end_group

TICK_S = 0.5
"""Interval of the polls."""


def end_with(caller: int) -> None:
    """Ends this process and its children, once ``caller`` is no longer its parent."""
    while os.getppid() == caller:
        time.sleep(TICK_S)
    end_group()


def main() -> None:
    """Runs the module as ``python -m MODULE ARGUMENTS`` would."""
    caller, module = int(sys.argv[1]), sys.argv[2]
    threading.Thread(target=end_with, args=(caller,), daemon=True).start()
    del sys.argv[1:3]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
