"""``python -m hotloop.parallel.program CALLER MODULE ARGUMENTS``: runs the module of a rank.

The rank ends when its caller does, from its first moment on: a module that imports torch takes
seconds to reach the point where it listens to its connection, which moreover stays open as long as
any fork of the caller lives. So a thread watches for the parent process, CALLER, to be gone.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
import time

from hotloop.parallel.link import end_group

TICK_S = 0.5
"""How often the parent is looked at."""


def end_with(caller: int) -> None:
    """Ends this process, and what it has started, once its parent is not ``caller`` any more."""
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
