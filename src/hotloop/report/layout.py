"""Renders tables, for a terminal and as Markdown.

Both renderings are made from the same value. Rows without figures, or with doubtful figures, have
numbered notes. Advice, remarks and context follow below the table. Other modules define the
columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from hotloop.bench.record import Record

STAR = "★"

UNBOUNDED = 1000
"""Width in characters of a console on which every table fits."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column.

    Attributes:
        title: Its heading; line breaks are for the terminal.
        text: Formats a record's value in this column; empty if the record has none.
        field: The field of records that it shows; None if it shows none.
        is_label: Whether it has words, not numbers.
        is_key: Whether it is one of the columns that identify a row.
        of_quality: Whether it is a figure of quality.
    """

    title: str
    text: Callable[[Record], str]
    field: str = ""
    is_label: bool = False
    is_key: bool = False
    of_quality: bool = False

    @property
    def heading(self) -> str:
        """The title in one line."""
        return self.title.replace("\n", " ")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A record as a row.

    Attributes:
        record: The record.
        cells: The text of each of the table's columns, with references to notes.
        recommended: Whether it is the recommended one.
    """

    record: Record
    cells: tuple[str, ...]
    recommended: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table, independent of its rendering.

    Attributes:
        title: Its heading, if there are several tables.
        columns: From left to right, labels first.
        rows: From top to bottom.
        notes: The notes, numbered from 1.
        advice: Sentences of the recommendation, the most important first.
        remarks: Sentences about the table as a whole.
        context: Labels and texts of the context.
    """

    title: str = ""
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    advice: tuple[str, ...] = ()
    remarks: tuple[str, ...]
    context: tuple[tuple[str, str], ...]


class Notes:
    """Collects numbered notes; equal texts get the same number."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def cite(self, text: str, note: str | None) -> str:
        """Appends a reference to the note to ``text``, if there is a note."""
        if not note:
            return text
        if note not in self.texts:
            self.texts.append(note)
        return f"{text} [{self.texts.index(note) + 1}]".lstrip()


def to_markdown(table: Table) -> str:
    """Renders the table and all that follows it as GitHub-flavored Markdown."""
    headings = [column.heading for column in table.columns]
    lines = []
    for row in table.rows:
        first, *others = row.cells
        name = f"**{first}** {STAR}" if row.recommended else first
        lines.append([cell.replace("|", "\\|") for cell in (name, *others)])
    widths = [max(map(len, column)) for column in zip(headings, *lines, strict=True)]
    labels = [column.is_label for column in table.columns]

    def joined(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if is_label else cell.rjust(width)
            for cell, width, is_label in zip(cells, widths, labels, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * width if is_label else "-" * (width - 1) + ":"
        for width, is_label in zip(widths, labels, strict=True)
    ]
    paragraphs = [
        table.title and f"## {table.title}",
        "\n".join(map(joined, [headings, rule, *lines])),
        "  \n".join(f"[{number}] {note}" for number, note in enumerate(table.notes, start=1)),
        "\n".join(table.advice[:1]),
        "\n".join(f"- {sentence}" for sentence in table.advice[1:]),
        "\n".join(table.remarks),
        "\n".join(f"- {label}: {text}" for label, text in table.context),
    ]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def to_rich(table: Table) -> RichReport:
    """Makes the table and all that follows it printable by ``rich.console.Console.print``."""
    return RichReport(table)


@dataclass(frozen=True)
class RichReport:
    """Renders a table as a whole, or on a narrow console in several pieces below each other.

    Speed and quality are separated first. A piece that is still too wide is divided further. Every
    piece has the key columns, and the first piece has the decode speed.
    """

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Renders the report; rich calls this."""
        if self.table.title:
            yield Padding(Text(self.table.title, style="bold"), (0, 0, 1, 0))
        unbounded = options.update(width=UNBOUNDED)

        def fits(columns: Sequence[int]) -> bool:
            width = Measurement.get(console, unbounded, self._grid(columns)).maximum
            return width <= options.max_width

        for number, columns in enumerate(self._pieces(fits)):
            yield Padding(self._grid(columns, fold=not fits(columns)), (number > 0, 0, 0, 0))
        if self.table.notes:
            notes = ((f"[{number}]", note) for number, note in enumerate(self.table.notes, 1))
            yield Padding(_pairs(notes), (1, 0, 0, 0))
        if self.table.advice:
            first, *others = self.table.advice
            yield Padding(Text(first, style="bold"), (1, 0, 0, 0))
            yield from (Padding(Text(other), (0, 0, 0, 2)) for other in others)
        yield Text("")
        yield from (Text(remark, style="dim") for remark in self.table.remarks)
        yield _pairs(self.table.context, style="dim")

    def _pieces(self, fits: Callable[[Sequence[int]], bool]) -> list[list[int]]:
        """Returns the columns of each piece."""
        columns = list(enumerate(self.table.columns))
        if fits(whole := [i for i, _ in columns]):
            return [whole]
        keys = [i for i, column in columns if column.is_key]
        speed = [i for i, column in columns if not column.is_key and not column.of_quality]
        quality = [i for i, column in columns if column.of_quality]
        pieces: list[list[int]] = []
        for group in filter(None, (speed, quality)):
            if fits([*keys, *group]):
                pieces.append([*keys, *group])
                continue
            pieces.append(list(keys))
            for i in sorted(group, key=lambda i: self.table.columns[i].field != "decode_tok_s"):
                if len(pieces[-1]) > len(keys) and not fits([*pieces[-1], i]):
                    pieces.append(list(keys))
                pieces[-1].append(i)
        return pieces

    def _grid(self, columns: Sequence[int], *, fold: bool = False) -> RichTable:
        """Makes the grid of some columns; columns of keys are folded if ``fold``."""
        grid = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        for i in columns:
            column = self.table.columns[i]
            grid.add_column(
                column.title,
                justify="left" if column.is_label else "right",
                no_wrap=not (fold and column.is_key),
                overflow="fold" if fold else "ellipsis",
                vertical="bottom" if i == 0 else "top",
            )
        starred = any(row.recommended for row in self.table.rows)
        for row in self.table.rows:
            star = f"{STAR if row.recommended else ' '} " if starred else ""
            style = "bold green" if row.recommended else "" if row.record.decode_tok_s else "dim"
            cells = (Text(star * (i == 0) + row.cells[i]) for i in columns)
            grid.add_row(*cells, style=style)
        return grid


def _pairs(pairs: Iterable[tuple[str, str]], style: str = "") -> RichTable:
    grid = RichTable.grid(padding=(0, 1))
    for label, text in pairs:
        grid.add_row(Text(label), Text(text), style=style)
    return grid
