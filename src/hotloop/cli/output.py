"""Output: data goes to stdout, everything else to stderr.

Every text of a command is printed here or in ``stream``, which make it printable, since it can
contain text from files, paths and recipes. rich decides about colors (NO_COLOR, no terminal).
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from hotloop.printable import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hotloop.bench.record import Record
    from hotloop.console import SafeConsole

PIPE_WIDTH = 200
"""Columns of tables in a pipe or a file, unless COLUMNS is set."""


def open_streams() -> bool:
    """Makes stdin, stdout and stderr usable; returns False if stdout is closed.

    Characters that an encoding lacks are escaped, and do not end the program. A closed stream
    becomes /dev/null, so that no later file gets its descriptor.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor: the closed stream's
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  (stays open until the process ends)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # In some locales the default decodes invalid bytes to lone surrogates.
        sys.stdin.reconfigure(errors="strict")
    return sys.stdout is not None


def discard_output() -> None:
    """Discards the buffer of stdout if it cannot be written.

    Python flushes stdout once more when it ends, and would print an error.
    """
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(value: Any) -> None:
    """Prints one object on one line; NaN and infinity become null.

    A line with characters that a terminal would interpret, or that stdout's encoding lacks, is
    written in ASCII, with JSON's escapes, which have the same value.
    """
    value = _finite(value)
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if printable(line) != line or not _encodable(line):
        line = json.dumps(value, allow_nan=False).replace("\x7f", "\\u007f")
    print(line, flush=True)


def print_text(text: str, end: str = "\n") -> None:
    """Prints text for people."""
    print(printable(text), end=end)


def print_error(text: str) -> None:
    """Prints an error on stderr; does nothing if stderr cannot be written."""
    with suppress(OSError):
        print(f"error: {printable(text)}", file=sys.stderr, flush=True)


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Prints names and values in two columns, one pair per line."""
    pairs = list(pairs)
    width = max(len(name) for name, _ in pairs) + 2
    for name, value in pairs:
        print_text(f"{name:{width}}{value}")


def show_record(record: Record, *, json: bool) -> int:
    """Prints the record of a measured configuration, and returns the exit code.

    The code is 0 for a record with figures, 2 for a configuration that is refused (as the error of
    such a configuration is a usage error in other commands), and 1 for any other failure.
    """
    from hotloop.bench.record import MEASURED

    if json:
        print_json(record.model_dump(mode="json"))
    else:
        print_record(record)
    return 0 if record.status in MEASURED else 2 if record.status == "unsupported" else 1


def print_record(record: Record) -> None:
    """Prints one record for people: each column of its table row as a line, then the table's notes.

    The reason for its status is a line too, unabridged, and not one of the notes.
    """
    from hotloop.report import quality, speculation
    from hotloop.report.table import LABELS, make_table

    table = make_table([record.model_copy(update={"reason": None})])
    pairs = [("configuration", record.cell), ("status", record.status)]
    if record.reason:
        pairs.append(("reason", record.reason))
    shown = zip(table.columns, table.rows[0].cells, strict=True)
    pairs += [(column.heading, cell) for column, cell in shown if column not in LABELS]
    if record.load_s is not None:
        pairs.append(("load", _load_time(record.load_s, record.load_gb_s)))
    pairs += [*speculation.details(record), *quality.details(record)]
    print_pairs([*pairs, *table.context])
    notes = [f"[{number}] {note}" for number, note in enumerate(table.notes, start=1)]
    for paragraph in filter(None, (notes, table.remarks)):
        print_text("\n" + "\n".join(paragraph))


def _load_time(load_s: float, gb_s: float | None) -> str:
    from hotloop.report.numbers import significant

    speed = "" if gb_s is None else f", weights at {significant(gb_s, 2)} GB/s"
    return f"{significant(load_s, 2)} s{speed}"


def print_memory(
    heading: str, rows: Iterable[tuple[str, Mapping[str, int], bool | None, str | None]]
) -> None:
    """Prints the memory of configurations: name, bytes by purpose, and whether they fit.

    Args:
        heading: The heading of the names.
        rows: Name, bytes by purpose, whether they fit (None if not known), and, for a configuration
            that cannot run at all, the reason. Each reason follows the table once, with its names.
    """
    from rich.table import Table
    from rich.text import Text

    from hotloop.report.numbers import memories

    rows = list(rows)
    drafts = ("draft",) if any(n_bytes.get("draft_bytes") for _, n_bytes, *_ in rows) else ()
    parts = ("weights", *drafts, "cache", "workspace", "total", "free")
    answers = {True: "yes", False: "no", None: "not known"}
    headings = ("incl. draft" if part == "draft" else part for part in parts)
    grid = Table(heading, *headings, "fits", box=None, pad_edge=False)
    for column in grid.columns[1:-1]:
        column.justify = "right"
    reasons: dict[str, list[str]] = {}
    columns = [
        memories([n_bytes.get(f"{part}_bytes") for _, n_bytes, *_ in rows]) for part in parts
    ]
    for i, (name, _, fits, reason) in enumerate(rows):
        shown = (column[i] for column in columns)
        grid.add_row(name, *shown, Text("unsupported" if reason else answers[fits]))
        if reason:
            reasons.setdefault(reason, []).append(name)
    print_rich(grid)
    for reason, names in reasons.items():
        print_text(f"\n{', '.join(names)}: {reason}")


def note(text: str, *, fold: bool = True) -> None:
    """Prints a note on stderr, dim on a terminal.

    Args:
        text: The note.
        fold: Fold it at words on a terminal. Without folding it is one line that can be copied.
    """
    console = stderr()
    # Lines are folded at words for a terminal, and left alone for a log.
    plain = not (console.is_terminal and fold)
    console.print(text, style="dim", soft_wrap=plain)


def print_rich(table: RenderableType) -> None:
    """Prints a table with rich: as wide as the terminal, or ``PIPE_WIDTH`` columns elsewhere."""
    from hotloop.console import SafeConsole

    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = SafeConsole(width=None if narrow else PIPE_WIDTH)
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        print(line.rstrip())


def stderr() -> SafeConsole:
    """Returns a rich console for progress and notes."""
    from hotloop.console import SafeConsole

    return SafeConsole(stderr=True)


@contextmanager
def spinner(label: str) -> Generator[Callable[[str], None]]:
    """Shows a spinner on stderr, if that is a terminal; yields a function that sets its label."""
    from rich.text import Text

    with stderr().status(Text(label)) as status:
        yield lambda text: status.update(Text(text))


@contextmanager
def steps(label: str) -> Generator[Callable[[str, int, int], None]]:
    """Shows the steps of a long task on stderr; yields the function ``show(step, done, total)``.

    A terminal has a spinner. A log has a line as each step begins, and further ones while it lasts.
    """
    if stderr().is_terminal:
        with spinner(label) as set_label:
            yield lambda step, done, total: set_label(f"{label}: {_counted(step, done, total)}")
        return

    from hotloop.console import Heartbeat

    current = ""
    with Heartbeat(lambda step: note(f"{label}: {step}")) as heartbeat:
        # Not announced: if the task is refused at once, its error is the only line.
        heartbeat.step("starting")

        def show(step: str, done: int, total: int) -> None:
            nonlocal current
            if step != current:
                current = step
                announce(f"{label}: {step}")
                heartbeat.spoke()
            heartbeat.step(_counted(step, done, total))

        yield show


def _counted(step: str, done: int, total: int) -> str:
    return f"{step} {done}/{total}" if total else step


@contextmanager
def long_step(label: str) -> Generator[None]:
    """Announces a long step on stderr: by a spinner, or by lines if that is not a terminal."""
    if stderr().is_terminal:
        with spinner(label):
            yield
        return

    from hotloop.console import Heartbeat

    announce(label)
    with Heartbeat(note) as heartbeat:
        heartbeat.step(label)
        yield


def announce(label: str) -> None:
    """Prints the label of a long step if stderr is not a terminal, which shows no spinner."""
    if not stderr().is_terminal:
        note(f"{label} …")


@contextmanager
def progress_bar(description: str) -> Generator[Callable[[int, int], None]]:
    """Shows a bar on stderr, if that is a terminal; yields the function ``show(done, total)``."""
    from rich.markup import escape
    from rich.progress import Progress

    console = stderr()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(escape(description), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _encodable(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
