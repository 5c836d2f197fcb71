"""Runs a cell in a child process: a crash, a hang or a lack of memory becomes a record.

The child leads a session of its own, so a Ctrl-C at the terminal reaches only the parent. The
child's children may lead further sessions (ranks do) and outlive it, so all of these processes have
an id of the cell in their environment, and the next cell begins when all have ended. The child
reports its progress through a separate pipe; its output goes to a log. If the parent dies, the
child's stdin closes, and the child ends itself.
"""

from __future__ import annotations

import os
import re
import selectors
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import psutil

import hotloop
from hotloop.bench.record import Record, Status
from hotloop.child_process import ChildProcess, signal_name
from hotloop.errors import HotloopError
from hotloop.sweep.cell import as_reason, base_record, gib, with_instability
from hotloop.sweep.descendants import CELL_ID, end_descendants
from hotloop.sweep.events import (
    CellFinished,
    CellPhase,
    CellSoFar,
    Notice,
    OnEvent,
    from_line,
)
from hotloop.sweep.job import Job
from hotloop.sweep.store import MAX_LINE_BYTES
from hotloop.writing import opened_to_append, tail

GRACE_S = 5.0
"""Seconds that a process may take to end after it was asked to end, or has sent its record."""

TICK_S = 0.1
"""Seconds between two looks at the process."""

LOG_TAIL_LINES = 6
"""The last lines of a log that become part of a reason."""

MAX_LOG_LINES = 1_000
"""How many of the last lines are searched for a crash: faulthandler lists every thread."""

OOM_SHARE = 0.8
"""If a killed process held more than this share of the available memory, an out-of-memory killer is
assumed to have ended it, even if the kernel's own killer did not."""


_START = """
import sys
from importlib.util import module_from_spec, spec_from_file_location

folder = sys.argv.pop(1)
spec = spec_from_file_location(
    "hotloop", folder + "/__init__.py", submodule_search_locations=[folder]
)
sys.modules["hotloop"] = module = module_from_spec(spec)
spec.loader.exec_module(module)

from hotloop.sweep.worker import main

main()
"""
"""The program of a worker. It imports hotloop from this installation's folder, so that another
interpreter need not have hotloop installed, and does not see this interpreter's other packages."""


_MISSING_MODULE = re.compile(r"^ModuleNotFoundError: No module named '([\w.]+)'$", re.MULTILINE)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C was pressed, and the running process has ended; ``record`` has its progress."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record


def run_isolated(
    job: Job, *, log: Path, timeout_s: float, on_event: OnEvent, grace_s: float = GRACE_S
) -> Record:
    """Runs a job in a new process.

    Args:
        job: The job.
        log: The file to which the process's output is appended.
        timeout_s: Seconds from the start of the process until it is ended.
        on_event: Receives the events of the process, except its record.
        grace_s: Seconds between the request to end and the kill.

    Returns:
        The record of the process; or, if it sent none, a record of its end: ``timeout``, ``oom`` or
        ``failed``.

    Raises:
        Interrupted: After a KeyboardInterrupt, once the process has ended.
    """
    events, deadline = _ChildEvents(job, on_event), time.monotonic() + timeout_s
    stopped: Status | None = None
    with opened_to_append(log) as output:
        output.write(f"--- {job.cell}, attempt {job.attempt}\n".encode(errors="backslashreplace"))
        log_start = output.tell()
        with _started(job, output, grace_s, on_event) as (child, pipe):
            try:
                while True:
                    # Before reading, so that all output of a child that has ended is read.
                    ended = child.poll() is not None
                    for line in pipe.lines(0 if ended else TICK_S):
                        events.handle(line)
                    if ended or events.protocol_error:
                        break
                    if events.record:
                        deadline = min(deadline, time.monotonic() + grace_s)
                    if time.monotonic() > deadline:
                        stopped = "timeout"
                        break
                    events.sample_memory(child.pid)
            except KeyboardInterrupt:
                stopped = "interrupted"
    record = events.record
    if record is None:
        if stopped == "interrupted":
            status, reason = stopped, f"stopped by the user in {events.phase}"
        elif events.protocol_error:
            status, reason = "failed", f"ended in {events.phase}: {events.protocol_error}"
        elif stopped == "timeout":
            status = stopped
            reason = (
                f"took longer than timeout_s, {timeout_s:g} s, and was in {events.phase}: raise it "
                "in the recipe or, without a recipe, with --timeout-s"
            )
        else:
            status, reason = events.explain_end(child)
        log_tail = _tail(log, log_start) if status != "interrupted" else ""
        missing = _MISSING_MODULE.search(log_tail)
        if job.python is not None and events.phase == "start" and missing:
            status = "unsupported"
            reason = (
                f"{job.python} lacks the package {missing[1]}, which hotloop also needs in the "
                "interpreter of an engine: install hotloop there."
            )
        reason = as_reason(with_instability(reason + log_tail, events.so_far.reason))
        record = events.so_far.model_copy(update={"status": status, "reason": reason})
    if stopped == "interrupted":
        raise Interrupted(record)
    return record


class _ChildEvents:
    """Collects the events of a running process, and explains its end."""

    def __init__(self, job: Job, on_event: OnEvent) -> None:
        self._on_event = on_event
        self.phase = "start"
        self.so_far = Record(**base_record(job), status="failed")
        self.record: Record | None = None
        self.protocol_error = ""
        self._peak_rss = 0
        self._available = psutil.virtual_memory().available

    def handle(self, line: bytes) -> None:
        try:
            event = from_line(line)
        except HotloopError as error:
            self.protocol_error = str(error)
            return
        match event:
            case CellFinished():
                self.record = event.record
                return
            case CellSoFar():
                self.so_far = event.record
            case CellPhase():
                self.phase = event.phase
        self._on_event(event)

    def sample_memory(self, pid: int) -> None:
        with suppress(psutil.Error):
            self._peak_rss = max(self._peak_rss, psutil.Process(pid).memory_info().rss)

    def explain_end(self, child: ChildProcess) -> tuple[Status, str]:
        """Explains the end of a process that sent no record.

        The kernel does not count other out-of-memory killers, such as a desktop's. One is suspected
        if the process held most of the available memory.
        """
        code = child.poll()
        assert code is not None, "the process still runs"
        if code >= 0:
            return (
                "failed",
                f"the process ended in {self.phase} with exit code {code}, without a record",
            )
        held = f"it held {gib(self._peak_rss)} of the {gib(self._available)} available"
        if child.oom_killed():
            return "oom", f"killed by the kernel in {self.phase} for lack of memory; {held}"
        name = signal_name(code)
        if -code == signal.SIGKILL:
            if self._peak_rss > OOM_SHARE * self._available:
                return "oom", f"killed in {self.phase}, probably for lack of memory; {held}"
            return "failed", f"killed from outside by {name} in {self.phase}; {held}"
        return "failed", f"crashed in {self.phase} with {name} ({signal.strsignal(-code)})"


class _Pipe:
    """Reads lines from a file descriptor as they arrive."""

    def __init__(self, file: int) -> None:
        self._file, self._rest = file, b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(file, selectors.EVENT_READ)

    def lines(self, timeout_s: float) -> Iterator[bytes]:
        """Yields the whole lines that arrive within ``timeout_s``."""
        while self._selector.select(timeout_s):
            if not (chunk := os.read(self._file, 2**16)):
                self._selector.unregister(self._file)  # the other end is closed
                break
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            yield from lines
            if len(self._rest) > MAX_LINE_BYTES:
                yield self._rest  # longer than any event, so it is refused
                self._rest = b""
            timeout_s = 0

    def close(self) -> None:
        self._selector.close()
        os.close(self._file)


@contextmanager
def _started(
    job: Job, output: BinaryIO, grace_s: float, on_event: OnEvent
) -> Iterator[tuple[ChildProcess, _Pipe]]:
    """Starts the process of a job, and the pipe of its events; ends its processes afterwards."""
    reader, writer = os.pipe()
    pipe, cell_id = _Pipe(reader), uuid.uuid4().hex
    try:
        try:
            child = ChildProcess(
                ["-c", _START, str(Path(hotloop.__file__).parent), str(writer)],
                output=output,
                fds=(writer,),
                reads=True,
                python=job.python,
                environment={CELL_ID: cell_id},
            )
        finally:
            os.close(writer)
        try:
            assert child.stdin is not None, "stdin is a pipe"
            with suppress(BrokenPipeError):  # it died at once; its exit code says so
                child.stdin.write(job.model_dump_json().encode() + b"\n")
                child.stdin.flush()
            yield child, pipe
        finally:
            child.end(grace_s)
            if left := end_descendants(cell_id):
                on_event(
                    Notice(
                        f"processes that {job.cell} started do not end (ids {left}). They can "
                        "disturb the next measurements: end them."
                    )
                )
    finally:
        pipe.close()


def _tail(log: Path, start: int) -> str:
    """Returns the last lines of this attempt's log; for a crash, with the innermost frames."""
    with log.open("rb") as file:
        lines = tail(file, MAX_LOG_LINES, start)
    for number, line in enumerate(lines):
        if line.startswith("Fatal Python error"):  # faulthandler prints the innermost frame first
            lines = lines[: number + 4]
            break
    return "".join(f"\n{line}" for line in lines[-LOG_TAIL_LINES:])
