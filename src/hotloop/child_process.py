"""Runs Python child processes.

Each child leads a session of its own, so a Ctrl-C at the terminal reaches only this process. Its
process group is killed with it, and so are the processes that it started, except those in sessions
of their own (see ``sweep.descendants``).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


class ChildProcess:
    """Runs ``python ARGUMENTS`` as the leader of a new session.

    If it crashes, it prints the stacks of its threads (faulthandler).

    Args:
        arguments: The interpreter's arguments.
        output: Receives its standard output and error.
        fds: File descriptors that it inherits.
        reads: Make its standard input a pipe, ``stdin``; otherwise it is ``/dev/null``.
        python: Its interpreter; None for the interpreter of this process.
        environment: Environment variables in addition to those of this process.

    Attributes:
        pid: Its id, and that of its process group.
        stdin: The pipe to its standard input; None if it reads nothing.
    """

    def __init__(
        self,
        arguments: Collection[str],
        *,
        output: BinaryIO,
        fds: Collection[int] = (),
        reads: bool = False,
        python: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._killed, self._oom_kills = False, _kernel_oom_kills()
        self._process = subprocess.Popen(
            [str(python or sys.executable), "-X", "faulthandler", *arguments],
            stdin=subprocess.PIPE if reads else subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=fds,
            start_new_session=True,
            env=os.environ | (environment or {}),
        )
        self.pid, self.stdin = self._process.pid, self._process.stdin

    def poll(self) -> int | None:
        """Returns its exit code, negative for the signal that ended it; None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Waits until it has ended, and returns its exit code; None if it still runs."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout_s)
        return None

    def kill(self) -> None:
        """Kills its process group, once: afterwards its id may belong to another process."""
        if not self._killed:
            self._killed = True
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def end(self, grace_s: float) -> None:
        """Asks its process group to end, and kills it after ``grace_s`` seconds."""
        try:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGTERM)
                self.wait(grace_s)
        finally:
            self.kill()
            self.wait()
            if self.stdin is not None:
                with suppress(BrokenPipeError):
                    self.stdin.close()

    def oom_killed(self) -> bool:
        """Tells whether the kernel killed it for lack of memory, if that can be known.

        SIGKILL does not tell who sent it. But the kernel counts the processes that it kills for
        lack of memory. If that count has risen since the start, this process is taken to be one of
        them.
        """
        now, before = _kernel_oom_kills(), self._oom_kills
        risen = before is not None and now is not None and now > before
        return self.poll() == -signal.SIGKILL and risen


def signal_name(code: int) -> str:
    """Names the signal of a negative exit code, such as ``SIGSEGV``."""
    try:
        return signal.Signals(-code).name
    except ValueError:  # a real-time signal
        return f"signal {-code}"


def _kernel_oom_kills() -> int | None:
    """Counts the processes that the kernel has killed for lack of memory; None if unknown."""
    with suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return None
