"""Where things go: data to stdout, everything else to stderr.

rich decides by itself about colours (NO_COLOR, no terminal); what it does not decide, such as the
figure that follows a streamed answer, is in ``stream``.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from hotloop.bench.record import Record

PIPE_WIDTH = 200
"""Columns for tables that no terminal folds, unless COLUMNS says otherwise."""


def print_json(value: Any) -> None:
    """Prints one object on one line; what JSON cannot hold (NaN, infinity) becomes null."""
    print(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False), flush=True)


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Prints names and values, one pair a line, in two columns."""
    pairs = list(pairs)
    width = max(len(name) for name, _ in pairs) + 2
    for name, value in pairs:
        print(f"{name:{width}}{value}")


def print_record(record: Record) -> None:
    """Prints one record for people: what a table has of it, from top to bottom."""
    from hotloop.report.table import LABELS, make_table

    table = make_table([record])
    pairs = [("configuration", record.cell), ("status", record.status)]
    if record.reason:
        pairs.append(("reason", record.reason))
    shown = zip(table.columns, table.rows[0].cells, strict=True)
    pairs += [(column.heading, cell) for column, cell in shown if column not in LABELS]
    print_pairs([*pairs, *table.context])


def print_memory(heading: str, rows: Iterable[tuple[str, Mapping[str, int], str]]) -> None:
    """Prints what configurations would take: name, bytes by purpose, and whether they fit."""
    from rich.table import Table
    from rich.text import Text

    from hotloop.report.numbers import memory

    parts = ("weights", "cache", "workspace", "total", "free")
    grid = Table(heading, *parts, "fits", box=None, pad_edge=False)
    for column in grid.columns[1:-1]:
        column.justify = "right"
    for name, n_bytes, fits in rows:
        sizes = (n_bytes.get(f"{part}_bytes") for part in parts)
        shown = ("" if size is None else memory(size) for size in sizes)
        grid.add_row(name, *shown, Text(fits))
    print_rich(grid)


def note(text: str) -> None:
    """Says something beside the data: on stderr, dim on a terminal."""
    console = stderr()
    # Lines are folded at words for a terminal, and left alone for a log.
    plain = not console.is_terminal
    console.print(text, style="dim", markup=False, highlight=False, soft_wrap=plain)


def print_rich(table: RenderableType) -> None:
    """Prints what rich renders: as wide as the terminal, or as a log or a file can hold it."""
    from rich.console import Console

    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if narrow else PIPE_WIDTH)
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        print(line.rstrip())


def stderr() -> Console:
    """A rich console for progress and notes."""
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def progress_bar(description: str) -> Generator[Callable[[int, int], None]]:
    """A bar on stderr, where that is a terminal; yields what to call with (done, total)."""
    from rich.progress import Progress

    with Progress(console=stderr(), transient=True) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
