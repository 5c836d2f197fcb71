from __future__ import annotations

import io
import re
import time
from types import SimpleNamespace

from rich.console import Console
from waiting import wait_until

from hotloop.bench.record import Figure, Record
from hotloop.sweep.events import (
    CellFinished,
    CellPhase,
    CellSkipped,
    CellStarted,
    Event,
    Notice,
    ReferenceFinished,
    ReferenceStarted,
    from_line,
    to_line,
)
from hotloop.sweep.progress import SweepProgress


def record(status: str, **fields) -> Record:
    return Record(cell="int8/eager", config={}, status=status, started_at="2025", **fields)


MEASURED = record("ok", decode_tok_s=Figure(mean=1234.56, n=1, samples=(1234.56,)))
EVENTS = [
    Notice("line 3 is half-written [and] ignored"),
    ReferenceStarted("none/eager"),
    CellPhase("none/eager", "reference", 0, 0),
    CellPhase("none/eager", "reference", 1, 2),
    ReferenceFinished("none/eager", "no room"),
    ReferenceFinished("none/eager/tp2", None, 800_000_000, "references", reused=True),
    CellSkipped(MEASURED),
    CellStarted("int8/auto", 2, 6, attempt=3),
    CellPhase("int8/auto", "load"),
    CellPhase("int8/auto", "speed"),
    CellPhase("int8/auto", "speed", 1, 5, 99.5),
    CellFinished(record("oom", reason="out of memory in load\n  File x")),
]


def shown(events: list[Event], **console) -> str:
    out = io.StringIO()
    with SweepProgress(Console(file=out, width=100, **console)) as progress:
        for event in events:
            progress(event)
    return out.getvalue()


def test_without_a_terminal_progress_is_plain_lines(monkeypatch):
    monkeypatch.setattr("hotloop.sweep.progress.time", SimpleNamespace(monotonic=lambda: 0.0))
    lines = shown(EVENTS).splitlines()
    assert lines == [
        "note line 3 is half-written [and] ignored",
        "reference none/eager is scored first",
        "  scoring",
        "reference none/eager  is missing: no room  (0 s)",
        "reference none/eager/tp2  was scored earlier: 0.80 GB stored in references",
        "int8/eager  skipped, finished earlier: ok  decode 1,234.6 tok/s",
        "[2/6] int8/auto attempt 3",
        "  loading, compiling, warming up",
        "  timing",
        "[2/6] int8/eager  oom out of memory in load  (0 s)",
    ]


def test_without_a_terminal_a_long_phase_says_that_it_goes_on():
    out = io.StringIO()
    with SweepProgress(Console(file=out, width=100), heartbeat_s=0.01) as progress:
        progress(CellStarted("int8/auto", 1, 1))
        progress(CellPhase("int8/auto", "speed", 1, 5, 99.5))
        so_far = re.compile(r"timing 1/5, \d+ s so far")
        wait_until(lambda: bool(so_far.search(out.getvalue())), "a phase that lasts says so")
        progress(CellFinished(MEASURED))
        ended = out.getvalue()
        time.sleep(0.05)
        assert out.getvalue() == ended, "what has ended does not go on"


def test_a_cell_that_was_stopped_while_it_was_scored_is_shown_with_its_speed():
    speed = Figure(mean=12.0, n=1, samples=(12.0,))
    stopped = record("timeout", reason="was in tasks\nlog", decode_tok_s=speed)
    (line,) = shown([CellFinished(stopped)]).splitlines()
    assert "int8/eager  timeout was in tasks  decode 12.0 tok/s" in line


def test_a_cell_that_was_only_scored_is_no_failure():
    text = shown([CellFinished(record("ok"))], force_terminal=True, color_system="standard")
    green = "\x1b[32m"
    assert f"{green}ok" in text


def test_on_a_terminal_finished_cells_stay_above_the_bar():
    text = shown(EVENTS, force_terminal=True, color_system=None)
    assert "[2/6] int8/eager  oom out of memory in load" in text


def test_events_come_through_the_pipe_as_they_were():
    for event in (CellPhase("a", "speed", 1, 5, 99.5), CellFinished(MEASURED)):
        line = to_line(event)
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        assert from_line(line) == event
