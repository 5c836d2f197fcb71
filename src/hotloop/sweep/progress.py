"""Shows the progress of a sweep on stderr: with a bar on a terminal, else with plain lines.

Without a terminal, it prints a line for each phase, and one every ``HEARTBEAT_S`` during a phase: a
log without lines for minutes looks like a program that hangs.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hotloop.bench.record import MEASURED, Record
from hotloop.console import HEARTBEAT_S, Heartbeat, SafeConsole
from hotloop.sweep.events import (
    CellFinished,
    CellPhase,
    CellSkipped,
    CellSoFar,
    CellStarted,
    Event,
    Notice,
    Phase,
    ReferenceFinished,
    ReferenceStarted,
)

DOING: dict[Phase, str] = {
    "start": "starting",
    "predict": "measuring the machine",
    "load": "loading, compiling, warming up",
    "speed": "timing",
    "quality": "scoring",
    "greedy answers": "checking greedy answers",
    "tasks": "answering tasks",
    "reference": "scoring",
}


class SweepProgress:
    """Shows events: pass the object itself as ``on_event``, within its ``with`` block.

    Args:
        console: The console; stderr by default.
        heartbeat_s: The most seconds between two lines, if there is no terminal.
    """

    def __init__(self, console: Console | None = None, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._console = console or SafeConsole(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", start=False, visible=False, note="")
        self._prefix, self._label = "", ""
        self._began = time.monotonic()
        self._heartbeat = Heartbeat(lambda step: self._print(f"  {step}"), heartbeat_s)
        self._heartbeat_running = ExitStack()

    def __enter__(self) -> SweepProgress:
        self._progress.start()
        if not self._console.is_terminal:
            self._heartbeat_running.enter_context(self._heartbeat)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._heartbeat_running.close()
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Shows one event."""
        match event:
            case Notice(message):
                self._say(f"[yellow]note[/] {escape(message)}")
            case ReferenceStarted(cell):
                self._begin("reference", cell, "is scored first")
            case ReferenceFinished(cell, reason, n_bytes, folder, reused):
                where = f"{n_bytes / 1e9:.2f} GB stored in {escape(folder)}"
                if reused:
                    self._say(f"reference {escape(cell)}  [dim]was scored earlier:[/] {where}")
                elif reason is None:
                    self._end(cell, f"[green]is scored[/], {where}")
                else:
                    self._end(cell, f"[yellow]is missing:[/] {escape(reason)}")
            case CellSkipped(record):
                self._say(
                    f"{escape(record.cell)}  [dim]skipped, finished earlier:[/] {_outcome(record)}"
                )
            case CellStarted(cell, index, total, attempt):
                again = f"attempt {attempt}" if attempt > 1 else ""
                self._begin(f"[{index}/{total}]", cell, again)
            case CellPhase():
                self._phase(event)
            case CellSoFar():
                pass
            case CellFinished(record):
                self._end(record.cell, _outcome(record))

    def _say(self, text: str) -> None:
        self._heartbeat.spoke()
        self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=True, highlight=False, soft_wrap=True)

    def _begin(self, prefix: str, cell: str, note: str) -> None:
        self._prefix, self._began = escape(prefix), time.monotonic()
        self._heartbeat.begin()
        self._label = f"{self._prefix} {escape(cell)}"
        self._progress.reset(
            self._task, description=self._label, total=None, visible=True, note=note
        )
        if not self._console.is_terminal:
            self._say(" ".join(filter(None, (self._label, note))))

    def _phase(self, event: CellPhase) -> None:
        doing = DOING[event.phase]
        speed = f"{event.decode_tok_s:.1f} tok/s" if event.decode_tok_s else ""
        self._progress.update(
            self._task,
            description=f"{self._label} [dim]{doing}[/]",
            completed=event.done,
            total=event.total or None,
            note=speed,
        )
        count = f" {event.done}/{event.total}" if event.total else ""
        self._heartbeat.step(f"{doing}{count}")
        if event.done == 0 and not self._console.is_terminal:
            self._say(f"  {doing}")

    def _end(self, cell: str, outcome: str) -> None:
        """Prints the end of a cell, by its final name, in which ``auto`` may be resolved."""
        self._progress.update(self._task, visible=False)
        self._heartbeat.step("")
        seconds = time.monotonic() - self._began
        self._say(f"{self._prefix} {escape(cell)}  {outcome}  [dim]({seconds:.0f} s)[/]")


def _outcome(record: Record) -> str:
    """Summarizes a record in one line: its status, its figures, and why it has no others."""
    figures = []
    if record.decode_tok_s is not None:
        figures.append(f"decode {record.decode_tok_s.mean:,.1f} tok/s")
    if record.delta_ln_ppl is not None:
        figures.append(f"Δ ln ppl {record.delta_ln_ppl.mean:+.4f}")
    if record.status in MEASURED:
        color = "green" if record.status == "ok" else "yellow"
        return "  ".join([f"[{color}]{record.status}[/]", *figures])
    reason = escape((record.reason or "").partition("\n")[0])
    return "  ".join([f"[red]{record.status}[/] {reason}", *figures])
