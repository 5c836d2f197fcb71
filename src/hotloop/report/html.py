"""Renders records as one self-contained HTML page: it needs no network and no other file.

The page is for a reader who did not run the experiment. It has the recommendation, the workload and
the machine, the plots and the tables; folded sections have every setting and every sample.
Templates and styles are files in ``templates``. Text from records is escaped there, for HTML and
for control characters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hotloop.bench.record import Figure, Record
from hotloop.printable import printable
from hotloop.report import svg
from hotloop.report.commands import chat_command, measure_command
from hotloop.report.differences import (
    Difference,
    format_loss_change,
    format_speed_change,
    loss_difference,
    speed_difference,
)
from hotloop.report.fields import value_of
from hotloop.report.glossary import explain_names
from hotloop.report.layout import Column, Row, Table
from hotloop.report.numbers import half_width, percent, uncertain
from hotloop.report.plots import Chart, charts, near_pareto_front, pareto_front
from hotloop.report.published import comparable_groups, make_published_tables
from hotloop.report.read import latest
from hotloop.report.recommend import (
    Recommendation,
    is_doubtful,
    recommend,
    unstable_suffix,
    why_uncertain,
)
from hotloop.report.speculation import ACCEPTANCES, Drafting, drafting
from hotloop.report.table import make_table
from hotloop.types import MAX_DELTA_LN_PPL

TEMPLATES = Path(__file__).parent / "templates"

NOT_DIFFERENT = "not significantly different"

_TIED = re.compile(r"([±<]|\d(?= [KMGT]iB)) ")
"""Finds the space after a sign or a number at which no line may break."""


def to_html(*experiments: Iterable[Record], max_delta_ln_ppl: float = MAX_DELTA_LN_PPL) -> str:
    """Renders the records of results folders as one page.

    Args:
        *experiments: The records of each folder, with all attempts; see ``make_published_tables``.
        max_delta_ln_ppl: The quality loss that the recommendation tolerates.
    """
    groups = [
        _group(f"g{i}-", group, max_delta_ln_ppl)
        for i, group in enumerate(_latest_groups(*experiments), start=1)
    ]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_displayable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "cited": _cited,
        "breakable": _breakable,
        "tied": _tied,
        "unbroken": _unbroken,
    }
    return environment.get_template("report.html.j2").render(
        groups=groups,
        acceptances=[percent(p) for p in ACCEPTANCES],
        records=[record.model_dump(mode="json") for group in groups for record in group.records],
    )


def charts_of(
    *experiments: Iterable[Record], max_delta_ln_ppl: float = MAX_DELTA_LN_PPL
) -> list[Chart]:
    """Returns the plots of the page that ``to_html`` renders, in its order."""
    return [
        chart
        for group in _latest_groups(*experiments)
        for chart in charts(
            group,
            recommended=recommend(group, max_delta_ln_ppl=max_delta_ln_ppl).record,
            max_delta_ln_ppl=max_delta_ln_ppl,
        )
    ]


def _latest_groups(*experiments: Iterable[Record]) -> list[list[Record]]:
    records = [record for experiment in experiments for record in latest(experiment)]
    return [latest(group) for group in comparable_groups(records)]


def _displayable(value: Any) -> Any:
    """Escapes characters that a browser refuses or interprets, such as direction overrides."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _cited(text: str) -> Markup:
    """Converts references to notes at the end of a cell's text to superscripts."""
    found = re.fullmatch(r"(.*?)((?: ?\[\d+\])*)", text, re.DOTALL)
    assert found is not None, "every text matches"
    numbers = re.findall(r"\d+", found[2])
    sup = Markup("<sup>{}</sup>").format(" ".join(f"[{n}]" for n in numbers)) if numbers else ""
    return _breakable(_tied(found[1])) + sup


def _tied(text: str) -> str:
    """Puts no-break spaces where a line must not break."""
    return _TIED.sub("\\1\N{NO-BREAK SPACE}", text)


def _unbroken(text: str) -> Markup:
    """Keeps words with hyphens, such as options of a command, in one line where they fit."""
    return Markup(" ").join(
        Markup('<span class="word">{}</span>').format(word) if "-" in word else word
        for word in printable(text).split(" ")
    )


def _breakable(text: str) -> Markup:
    """Allows a line to break after each slash of a cell's name."""
    return Markup("/<wbr>").join(printable(text).split("/"))


@dataclass(frozen=True, kw_only=True)
class _RenderedChart:
    """A chart with its drawings and its legend."""

    chart: Chart
    drawings: tuple[Markup, ...]
    legend: tuple[tuple[Markup, str], ...]


@dataclass(frozen=True, kw_only=True)
class _ComparisonRow:
    """A row of the comparison with the baseline: the recommended cell, or else the fastest one.

    ``place`` says whether the cell is on the Pareto front.
    """

    record: Record
    speed: str
    speed_verdict: str
    loss: str
    loss_verdict: str
    place: str


@dataclass(frozen=True, kw_only=True)
class _TableCell:
    """A cell of a table, with the recorded number that it shows."""

    text: str
    is_label: bool
    field: str = ""
    value: str = ""


@dataclass(frozen=True, kw_only=True)
class _TableRow:
    """A row of a table; ``faint`` if the cell has no speed."""

    id: str
    number: int
    cells: tuple[_TableCell, ...]
    recommended: bool
    faint: bool
    command: str


@dataclass(frozen=True, kw_only=True)
class _RecordDetails:
    """All values of a record, in a folded section of the page."""

    id: str
    number: int
    record: Record
    command: str
    figures: tuple[tuple[str, Figure], ...]
    settings: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Records that can be compared: a section of the page."""

    id: str
    title: str
    facts: tuple[tuple[str, str], ...]
    glossary: tuple[tuple[str, str], ...]
    verdict: tuple[str, ...]
    more_advice: tuple[str, ...]
    other_engines: tuple[str, ...]
    note: str
    chat_command: str | None
    charts: tuple[_RenderedChart, ...]
    base: str
    comparison: tuple[_ComparisonRow, ...]
    quality_known: bool
    table: Table
    table_rows: tuple[_TableRow, ...]
    published: Table
    published_rows: tuple[_TableRow, ...]
    drafting: tuple[Drafting, ...]
    cells: tuple[_RecordDetails, ...]
    records: tuple[Record, ...]


def _group(group_id: str, records: Sequence[Record], tolerance: float) -> _Group:
    recommendation = recommend(records, max_delta_ln_ppl=tolerance)
    table = make_table(records, max_delta_ln_ppl=tolerance)
    (published,) = make_published_tables(records)
    numbers = {id(record): n for n, record in enumerate(records, start=1)}
    base = recommendation.record or _fastest(records)
    return _Group(
        id=group_id,
        title=published.title,
        facts=(
            ("cells", _statuses(records)),
            *_recipes(records),
            *table.context,
        ),
        glossary=tuple(explain_names(records)),
        verdict=_verdict(recommendation),
        more_advice=recommendation.not_chosen[1:],
        other_engines=recommendation.other_engines,
        note=recommendation.note,
        chat_command=chat_command(recommendation.record) if recommendation.record else None,
        charts=tuple(
            _RenderedChart(
                chart=chart,
                drawings=tuple(
                    svg.draw(chart, size, prefix=group_id) for size in (svg.WIDE, svg.NARROW)
                ),
                legend=tuple(svg.legend(chart)),
            )
            for chart in charts(
                records, recommended=recommendation.record, max_delta_ln_ppl=tolerance
            )
        ),
        base=base.cell if base else "",
        comparison=_comparison_rows(records, base) if base else (),
        quality_known=recommendation.quality_known,
        table=table,
        table_rows=_table_rows(table, numbers, group_id),
        published=published,
        published_rows=_table_rows(published, numbers, group_id),
        drafting=drafting(records),
        cells=tuple(_record_details(record, numbers, group_id) for record in records),
        records=tuple(records),
    )


def _verdict(recommendation: Recommendation) -> tuple[str, str]:
    if recommendation.cell is None:
        others = recommendation.not_chosen
        return f"No recommendation: {recommendation.why}", others[0] if others else ""
    others = recommendation.not_chosen or ("No measured configuration is as fast.",)
    return f"Recommended: {recommendation.cell}, because {recommendation.why}", others[0]


def _fastest(records: Sequence[Record]) -> Record | None:
    """Returns the fastest record whose speed is known; None if there is none."""
    timed = [r for r in records if r.decode_tok_s and not is_doubtful(r)]
    return max(timed, key=lambda r: r.decode_tok_s.mean if r.decode_tok_s else 0, default=None)


def _statuses(records: Sequence[Record]) -> str:
    counts = Counter(record.status for record in records)
    if len(counts) == 1:
        return f"{len(records)}, all {next(iter(counts))}"
    return f"{len(records)}: " + ", ".join(f"{n} {status}" for status, n in counts.items())


def _recipes(records: Sequence[Record]) -> list[tuple[str, str]]:
    found = dict.fromkeys(
        recipe["name"]
        for record in records
        if isinstance(recipe := record.provenance.get("recipe"), dict)
        and isinstance(recipe.get("name"), str)
    )
    return [("recipe", ", ".join(found))] if found else []


# --------------------------------------------------------------------------- differences


def _comparison_rows(records: Sequence[Record], base: Record) -> tuple[_ComparisonRow, ...]:
    timed = [record for record in records if record.decode_tok_s]
    timed.sort(key=lambda record: record is not base)
    on_front = pareto_front(timed)
    near = near_pareto_front(timed, on_front)
    rows = []
    for record in timed:
        place = "on" if record in on_front else "within noise of it" if record in near else "off"
        if not on_front or record.delta_ln_ppl is None or why_uncertain(record):
            place = "–"
        if record is base:
            assert record.decode_tok_s is not None, "only timed records are compared"
            shown = uncertain(record.decode_tok_s.mean, half_width(record.decode_tok_s))
            rows.append(
                _ComparisonRow(
                    record=record,
                    speed=f"{shown} tok/s",
                    speed_verdict=unstable_suffix(record).strip(),
                    loss="",
                    loss_verdict="",
                    place=place,
                )
            )
            continue
        speed, loss = speed_difference(base, record), loss_difference(base, record)
        rows.append(
            _ComparisonRow(
                record=record,
                speed=format_speed_change(speed),
                speed_verdict=_in_words(speed, "slower", "faster") + unstable_suffix(record),
                loss=format_loss_change(loss),
                loss_verdict=_in_words(loss, "loses less", "loses more"),
                place=place,
            )
        )
    return tuple(rows)


def _in_words(difference: Difference | None, below: str, above: str) -> str:
    if difference is None:
        return "not known"
    if not difference.is_significant:
        return "no difference" if difference.se == 0 and difference.mean == 0 else NOT_DIFFERENT
    return above if difference.mean > 0 else below


# --------------------------------------------------------------------------- tables and folds


def _table_rows(table: Table, numbers: Mapping[int, int], group_id: str) -> tuple[_TableRow, ...]:
    return tuple(
        _table_row(row, table.columns, numbers[id(row.record)], group_id) for row in table.rows
    )


def _table_row(row: Row, columns: Sequence[Column], number: int, group_id: str) -> _TableRow:
    cells = []
    for column, text in zip(columns, row.cells, strict=True):
        value = value_of(row.record, column.field) if column.field else None
        if isinstance(value, Figure):
            value = value.mean
        known = isinstance(value, int | float)
        cells.append(
            _TableCell(
                text=text,
                is_label=column.is_label,
                field=column.field if known else "",
                value=repr(value) if known else "",
            )
        )
    return _TableRow(
        id=f"{group_id}cell-{number}",
        number=number,
        cells=tuple(cells),
        recommended=row.recommended,
        faint=row.record.decode_tok_s is None,
        command=measure_command(row.record),
    )


def _record_details(record: Record, numbers: Mapping[int, int], group_id: str) -> _RecordDetails:
    number = numbers[id(record)]
    fields = type(record).model_fields
    figures = [(name, getattr(record, name)) for name in fields]
    figures = [(name, figure) for name, figure in figures if isinstance(figure, Figure)]
    if record.speculation is not None:
        figures.append(("speculation.tokens_per_step", record.speculation.tokens_per_step))
    dumped = record.model_dump(mode="json", exclude={name for name, _ in figures})
    if dumped["speculation"] is not None:
        del dumped["speculation"]["tokens_per_step"]
    sections: dict[str, list[tuple[str, str]]] = {"record": []}
    for name, value in dumped.items():
        if isinstance(value, dict) or _is_list_of_objects(value):
            sections[name] = _flatten(value if isinstance(value, dict) else _numbered(value))
        elif value is not None:
            sections["record"].append((name, _text(value)))
    return _RecordDetails(
        id=f"{group_id}cell-{number}",
        number=number,
        record=record,
        command=measure_command(record),
        figures=tuple(figures),
        settings=tuple((name, tuple(pairs)) for name, pairs in sections.items() if pairs),
    )


def _flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Lists the values of nested objects by their paths."""
    pairs = []
    for name, child in value.items():
        if isinstance(child, dict) or _is_list_of_objects(child):
            inner = child if isinstance(child, dict) else _numbered(child)
            pairs += _flatten(inner, f"{prefix}{name}.")
        else:
            pairs.append((prefix + name, _text(child)))
    return pairs


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(each, dict) for each in value)


def _numbered(values: Sequence[Any]) -> dict[str, Any]:
    return {str(number): value for number, value in enumerate(values, start=1)}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else str(value)
