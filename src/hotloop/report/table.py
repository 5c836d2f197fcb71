"""Records as one table: for a terminal, as Markdown, as CSV.

All three come from the same columns. What a table leaves out it says: every row that has no
figures, or should be read with care, has a numbered note, and below stand the model, the device,
the versions, the workload and the text, once if they are the same for all rows.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from hotloop.bench.record import Figure, Record
from hotloop.report.numbers import divergence, half_width, memory, percent, significant, uncertain
from hotloop.report.read import latest
from hotloop.report.recommend import MAX_DELTA_LN_PPL, Recommendation, recommend

STAR = "★"

UNBOUNDED = 1000
"""Columns of a console that has the room which every table would like."""


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        field: The field of ``Record`` that it shows.
        title: Its heading; line breaks are for the terminal.
        show: That field's value as text.
        of_quality: Whether it is about quality.
    """

    field: str
    title: str
    show: Callable[[Any], str]
    of_quality: bool = False

    def text(self, record: Record) -> str:
        """What stands in a record's row; empty where the record has nothing."""
        value = getattr(record, self.field)
        return "" if value is None else self.show(value)


COLUMNS = (
    Column("decode_tok_s", "decode\ntok/s", lambda f: uncertain(f.mean, half_width(f))),
    Column("ttft_s", "TTFT\nms", lambda f: significant(f.mean * 1e3, 3)),
    Column("e2e_tok_s", "e2e\ntok/s", lambda f: significant(f.mean, 3)),
    Column("peak_bytes", "peak\nmemory", memory),
    Column("mbu", "MBU", lambda f: percent(f.mean)),
    Column("mbu_datasheet", "MBU\ndatasheet", lambda f: percent(f.mean)),
    Column("perplexity", "ppl", lambda f: significant(f.mean, 4), of_quality=True),
    Column("delta_ln_ppl", "Δ ln ppl", lambda f: uncertain(f.mean, f.se, signed=True), True),
    Column("kl_mean", "mean\nKL", lambda f: divergence(f.mean), of_quality=True),
    Column("same_top1", "same\ntop-1", lambda f: percent(f.mean, 1), of_quality=True),
)

ONLY_IN_CSV = ("kl_p99", "kl_max", "load_s", "warmup_s")
"""Further numbers of a record."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A record as a row: ``cells`` belong to the table's columns."""

    record: Record
    status: str
    cells: tuple[str, ...]
    recommended: bool


@dataclass(frozen=True, kw_only=True)
class Table:
    """What all renderings show.

    Attributes:
        columns: Those in which any row has something.
        rows: In the order in which cells were first run.
        notes: The numbered notes; the first is number 1.
        remarks: What holds for the table as a whole.
        context: What was measured on what: label and text.
        recommendation: What to use, and why.
    """

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    remarks: tuple[str, ...]
    context: tuple[tuple[str, str], ...]
    recommendation: Recommendation


def make_table(records: Iterable[Record], *, max_delta_ln_ppl: float = MAX_DELTA_LN_PPL) -> Table:
    """The table of an experiment: the latest record of each cell.

    Args:
        records: As read, all attempts.
        max_delta_ln_ppl: The quality loss that the recommendation tolerates.
    """
    records = latest(records)
    columns = tuple(column for column in COLUMNS if any(map(column.text, records)))
    recommendation = recommend(records, max_delta_ln_ppl=max_delta_ln_ppl)
    notes: list[str] = []

    def noted(text: str, note: str | None) -> str:
        if not note:
            return text
        if note not in notes:
            notes.append(note)
        return f"{text} [{notes.index(note) + 1}]".lstrip()

    scored = any(column.of_quality for column in columns)
    rows = []
    for record in records:
        reason = (record.reason or "").partition("\n")[0]
        status = noted(record.status, reason and f"{record.status}: {reason}")
        cells = [column.text(record) for column in columns]
        if scored and record.decode_tok_s and record.quality_reason:
            first = next(i for i, column in enumerate(columns) if column.of_quality)
            cells[first] = noted(cells[first], f"quality: {record.quality_reason}")
        rows.append(
            Row(
                record=record,
                status=status,
                cells=tuple(cells),
                recommended=record is recommendation.record,
            )
        )
    return Table(
        columns=columns,
        rows=tuple(rows),
        notes=tuple(notes),
        remarks=tuple(_remarks(records, columns)),
        context=tuple(_context(records)),
        recommendation=recommendation,
    )


def to_csv(table: Table) -> str:
    """Every number as it was recorded, a line per cell, whether or not any row has it.

    A figure takes five columns: its mean, the ends of its 95 % interval, its error and its n.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    fields = [*(column.field for column in COLUMNS), *ONLY_IN_CSV]
    numbers = [name for field in fields for name in _number_names(field)]
    writer.writerow(["cell", "status", "recommended", *numbers, "reason", "quality_reason"])
    for row in table.rows:
        record = row.record
        beginning = [record.cell, record.status, str(row.recommended).lower()]
        values = [number for field in fields for number in _numbers(field, record)]
        writer.writerow([*beginning, *values, record.reason, record.quality_reason])
    return out.getvalue()


def _number_names(field: str) -> list[str]:
    if Figure not in get_args(Record.model_fields[field].annotation):
        return [field]
    return [f"{field}{part}" for part in ("", "_ci95_low", "_ci95_high", "_se", "_n")]


def _numbers(field: str, record: Record) -> list[float | None]:
    value = getattr(record, field)
    if isinstance(value, Figure):
        return [value.mean, *(value.ci95 or (None, None)), value.se, value.n]
    return [value] if value is not None else [None] * len(_number_names(field))


def to_markdown(table: Table) -> str:
    """The table and all that stands below it, as GitHub-flavoured Markdown."""
    headings = ["configuration", "status", *(c.title.replace("\n", " ") for c in table.columns)]
    lines = []
    for row in table.rows:
        name = f"**{row.record.cell}** {STAR}" if row.recommended else row.record.cell
        lines.append([cell.replace("|", "\\|") for cell in (name, row.status, *row.cells)])
    widths = [max(map(len, column)) for column in zip(headings, *lines, strict=True)]

    def joined(cells: Sequence[str]) -> str:
        left = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
        return f"| {' | '.join(left + right)} |"

    rule = ["-" * width for width in widths[:2]] + ["-" * (width - 1) + ":" for width in widths[2:]]
    paragraphs = [
        "\n".join(map(joined, [headings, rule, *lines])),
        "  \n".join(f"[{number}] {note}" for number, note in enumerate(table.notes, start=1)),
        "\n".join(_advice(table.recommendation)[:1]),
        "\n".join(f"- {sentence}" for sentence in _advice(table.recommendation)[1:]),
        "\n".join(table.remarks),
        "\n".join(f"- {label}: {text}" for label, text in table.context),
    ]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def to_rich(table: Table) -> RichReport:
    """The table and all that stands below it, for ``rich.console.Console.print``."""
    return RichReport(table)


@dataclass(frozen=True)
class RichReport:
    """Renders a table in one piece, or speed and quality apart where the console is narrow."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """What rich asks for."""
        columns = range(len(self.table.columns))
        whole = self._grid(columns)
        unbounded = options.update(width=UNBOUNDED)
        if Measurement.get(console, unbounded, whole).maximum <= options.max_width:
            yield whole
        else:
            speed = [i for i in columns if not self.table.columns[i].of_quality]
            quality = [i for i in columns if self.table.columns[i].of_quality]
            yield self._grid(speed)
            if quality:
                yield Padding(self._grid(quality, with_status=False), (1, 0, 0, 0))
        if self.table.notes:
            notes = ((f"[{number}]", note) for number, note in enumerate(self.table.notes, 1))
            yield Padding(_pairs(notes), (1, 0, 0, 0))
        first, *others = _advice(self.table.recommendation)
        yield Padding(Text(first, style="bold"), (1, 0, 0, 0))
        yield from (Padding(Text(other), (0, 0, 0, 2)) for other in others)
        yield Text("")
        yield from (Text(remark, style="dim") for remark in self.table.remarks)
        yield _pairs(self.table.context, style="dim")

    def _grid(self, columns: Sequence[int], *, with_status: bool = True) -> RichTable:
        grid = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        grid.add_column("configuration", no_wrap=True, vertical="bottom")
        if with_status:
            grid.add_column("status", no_wrap=True)
        for i in columns:
            grid.add_column(self.table.columns[i].title, justify="right", no_wrap=True)
        for row in self.table.rows:
            name = f"{STAR if row.recommended else ' '} {row.record.cell}"
            style = "bold green" if row.recommended else "" if row.record.decode_tok_s else "dim"
            status = [Text(row.status)] if with_status else []
            cells = [Text(row.cells[i]) for i in columns]
            grid.add_row(Text(name), *status, *cells, style=style)
        return grid


def _pairs(pairs: Iterable[tuple[str, str]], style: str = "") -> RichTable:
    grid = RichTable.grid(padding=(0, 1))
    for label, text in pairs:
        grid.add_row(Text(label), Text(text), style=style)
    return grid


def _advice(recommendation: Recommendation) -> list[str]:
    if recommendation.cell is None:
        return [f"No recommendation: {recommendation.why}", *recommendation.passed_over]
    first = f"{STAR} Recommended: {recommendation.cell}, because {recommendation.why}"
    return [first, *recommendation.passed_over]


def _remarks(records: Sequence[Record], columns: Sequence[Column]) -> list[str]:
    remarks = []
    measured = [record for record in records if record.decode_tok_s]
    if measured and not any(column.of_quality for column in columns):
        reasons = sorted({record.quality_reason or "not measured" for record in measured})
        remarks.append(f"No quality: {'; '.join(reasons)}.")
    if measured:
        remarks.append(
            "Speed: mean ± half of the 95% interval; TTFT, time to first token; decode, after it; "
            "e2e, end to end. MBU: share of the read bandwidth."
        )
    if any(record.delta_ln_ppl for record in measured):
        remarks.append(
            "Quality: perplexity (ppl); against the reference on the same windows, Δ ln ppl "
            "± standard error, KL divergence, and how often both hold the same token likeliest."
        )
    return remarks


def _context(records: Sequence[Record]) -> list[tuple[str, str]]:
    """What was measured on what; where it differs, with the cells that it is true of."""
    lines = []
    for label, of in CONTEXT.items():
        cells: dict[str, list[str]] = {}
        for record in records:
            if text := of(record):
                cells.setdefault(text, []).append(record.cell)
        if len(cells) == 1:
            lines.append((label, next(iter(cells))))
        else:
            lines += [(label, f"{text} ({', '.join(names)})") for text, names in cells.items()]
        if label == "device" and (bandwidth := _bandwidth(records)):
            lines.append(("measured to read", bandwidth))
    return lines


def _bandwidth(records: Sequence[Record]) -> str:
    """What the device was measured to read, over all cells."""
    devices = [record.provenance.get("device", {}) for record in records]
    measured = sorted(d["read_bytes_per_s"] / 1e9 for d in devices if d.get("read_bytes_per_s"))
    if not measured:
        return ""
    low, high = (significant(measured[end], 3) for end in (0, -1))
    return f"{low if low == high else f'{low} to {high}'} GB/s"


def _model(record: Record) -> str:
    random = ", random weights" if record.config.get("weights") == "random" else ""
    return f"{record.config.get('model')}{random}"


def _device(record: Record) -> str:
    device = record.provenance.get("device", {})
    threads = f", {n} threads" if (n := device.get("n_threads")) else ""
    return f"{device['name']}{threads}" if "name" in device else ""


def _versions(record: Record) -> str:
    hotloop = record.provenance.get("hotloop", {})
    changed = " with changes" if hotloop.get("git_dirty") else ""
    commit = f", commit {hotloop['git_commit'][:10]}{changed}" if hotloop.get("git_commit") else ""
    versions = {"hotloop": hotloop.get("version"), **record.provenance.get("versions", {})}
    named = [f"{name} {version}" for name, version in versions.items() if version]
    return ", ".join(named) + commit


def _workload(record: Record) -> str:
    if (workload := record.workload) is None:
        return ""
    batch = f"batch {workload.batch}, " if workload.batch != 1 else ""
    return (
        f"{batch}{workload.prompt_tokens} prompt tokens, {workload.new_tokens} new tokens, "
        f"{workload.repeats} repeats"
    )


def _text(record: Record) -> str:
    if (protocol := record.quality_protocol) is None:
        return ""
    against = f", against {protocol.reference}" if protocol.reference else ""
    return f"{protocol.text}, {protocol.n_windows} windows of {protocol.window} tokens{against}"


CONTEXT: Mapping[str, Callable[[Record], str]] = {
    "model": _model,
    "device": _device,
    "versions": _versions,
    "workload": _workload,
    "text": _text,
    "date": lambda record: record.started_at[:10],
}
"""What stands below a table. An empty text says nothing."""
