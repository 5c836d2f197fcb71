"""The table of an experiment: all figures of every cell, and the recommendation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hotloop.bench.record import MEASURED, Record
from hotloop.report.context import (
    RANDOM_ACCEPTANCE,
    assumed_note,
    bandwidth_note,
    context,
    has_random_acceptance,
    model_name,
)
from hotloop.report.context import notes as engine_notes
from hotloop.report.fields import csv_names, csv_text, csv_values, value_of
from hotloop.report.layout import STAR, Column, Notes, Row, Table
from hotloop.report.numbers import divergence, half_width, memory, percent, significant, uncertain
from hotloop.report.quality import format_accuracy_loss, format_needed, selection_notes
from hotloop.report.quality import remarks as quality_remarks
from hotloop.report.read import latest
from hotloop.report.recommend import Recommendation, recommend, why_uncertain
from hotloop.types import MAX_DELTA_LN_PPL


def _column(field: str, title: str, show: Callable[[Any], str], of_quality: bool = False) -> Column:
    """Makes the column of a field of records, formatted by ``show``."""

    def text(record: Record) -> str:
        value = value_of(record, field)
        return "" if value is None else show(value)

    return Column(title=title, text=text, field=field, of_quality=of_quality)


LABELS = (
    Column(title="configuration", text=lambda record: record.cell, is_label=True, is_key=True),
    Column(title="status", text=lambda record: record.status, is_label=True),
)

MODEL = Column(title="model", text=model_name, is_label=True, is_key=True)
"""The label after ``LABELS`` in tables with records of several models."""

FIGURES = (
    _column("decode_tok_s", "decode\ntok/s", lambda f: uncertain(f.mean, half_width(f))),
    _column("ttft_s", "TTFT\nms", lambda f: significant(f.mean * 1e3, 3)),
    _column("e2e_tok_s", "e2e\ntok/s", lambda f: significant(f.mean, 3)),
    _column("aggregate_tok_s", "total\ntok/s", lambda f: significant(f.mean, 3)),
    _column("speculation.tokens_per_step", "tokens\nper step", lambda f: f"{f.mean:.2f}"),
    _column("speculation.acceptance", "acceptance", lambda a: percent(a[0]) if a else "–"),
    _column("peak_bytes", "peak\nmemory", memory),
    _column("mbu", "MBU", lambda f: percent(f.mean)),
    _column("mbu_datasheet", "MBU\ndatasheet", lambda f: percent(f.mean)),
    _column("perplexity", "ppl", lambda f: significant(f.mean, 4), of_quality=True),
    _column("delta_ln_ppl", "Δ ln ppl\n± SE", lambda f: uncertain(f.mean, f.se, signed=True), True),
    _column("kl_mean", "mean\nKL", lambda f: divergence(f.mean), of_quality=True),
    _column("kl_at_least", "mean KL\nat least", lambda f: divergence(f.mean), of_quality=True),
    _column("same_top1", "same\ntop-1", lambda f: percent(f.mean, 1), of_quality=True),
    Column(
        title="accuracy\nlost",
        text=lambda record: format_accuracy_loss(record.verdict) if record.verdict else "",
        field="verdict.loss",
        of_quality=True,
    ),
    _column("verdict.outcome", "verdict", str, of_quality=True),
)

ONLY_IN_CSV = (
    "speculation.proposed",
    "speculation.accepted",
    "speculation.draft_share",
    "speculation.off_share",
    "kl_median",
    "kl_p90",
    "kl_p95",
    "kl_p99",
    "kl_p99_9",
    "kl_max",
    "delta_p",
    "delta_p_rms",
    "kl_floor",
    "verdict.n",
    "verdict.worse",
    "verdict.better",
    "verdict.margin",
    "verdict.p",
    "verdict.mcnemar_p",
    "verdict.needed",
    "greedy.agreement",
    "greedy.gap_max",
    "load_s",
    "load_gb_s",
    "warmup_s",
)
"""Fields of a record that only the CSV file has."""


def make_table(records: Iterable[Record], *, max_delta_ln_ppl: float = MAX_DELTA_LN_PPL) -> Table:
    """Makes the table of an experiment, from the latest record of each cell.

    Args:
        records: All attempts, as read.
        max_delta_ln_ppl: The quality loss that the recommendation tolerates.
    """
    records = latest(records)
    recommendation = recommend(records, max_delta_ln_ppl=max_delta_ln_ppl)
    notes = Notes()
    shown = [column for column in FIGURES if any(map(column.text, records))]
    if not any(map(_is_batched, records)):
        shown = [column for column in shown if column.field != "aggregate_tok_s"]
    labels = [*LABELS, MODEL] if len(set(map(model_name, records))) > 1 else [*LABELS]
    columns = [*labels, *shown]
    verdict_column = next((i for i, c in enumerate(columns) if c.field == "verdict.outcome"), None)
    adjusted_notes = selection_notes(records)
    first_of_quality = next((i for i, c in enumerate(columns) if c.of_quality), None)
    rows = []
    for record in records:
        cells = [column.text(record) for column in columns]
        reason = (record.reason or "").partition("\n")[0]
        cells[1] = notes.cite(cells[1], reason and f"{record.status}: {reason}")
        # From left to right, so that the numbers of notes are ascending.
        figures = range(len(labels), len(columns))
        if (first := next((i for i in figures if cells[i]), None)) is not None:
            for note in (assumed_note(record), why_uncertain(record), *engine_notes(record)):
                cells[first] = notes.cite(cells[first], note)
            for i, column in enumerate(columns):
                if column.field in ("mbu", "mbu_datasheet"):
                    cells[i] = notes.cite(cells[i], bandwidth_note(record, column.field, records))
            if first_of_quality is not None and record.quality_reason:
                note = f"quality: {record.quality_reason}"
                cells[first_of_quality] = notes.cite(cells[first_of_quality], note)
        if verdict_column is not None and record.verdict is not None:
            verdict, note = record.verdict, adjusted_notes.get(record.cell)
            if verdict.outcome == "underpowered":
                note = f"underpowered: {format_needed(verdict)}"
            cells[verdict_column] = notes.cite(cells[verdict_column], note)
        recommended = record is recommendation.record
        rows.append(Row(record=record, cells=tuple(cells), recommended=recommended))
    return Table(
        columns=tuple(columns),
        rows=tuple(rows),
        notes=tuple(notes.texts),
        advice=tuple(_advice(recommendation)),
        remarks=tuple(_remarks(records, columns)),
        context=context(records),
    )


def to_csv(table: Table) -> str:
    """Formats the table as CSV: a line per cell, with every number as it was recorded."""
    fields = [*(column.field for column in FIGURES), *ONLY_IN_CSV]
    first = ["cell", "model", "status", "recommended"]
    header = [*first, *csv_names(fields), "reason", "quality_reason"]
    rows = []
    for row in table.rows:
        record = row.record
        beginning = [record.cell, model_name(record), record.status, str(row.recommended).lower()]
        values = csv_values(fields, record)
        rows.append([*beginning, *values, record.reason, record.quality_reason])
    return csv_text(header, rows)


def _advice(recommendation: Recommendation) -> list[str]:
    if recommendation.cell is None:
        return [f"No recommendation: {recommendation.why}", *recommendation.not_chosen]
    first = f"{STAR} Recommended: {recommendation.cell}, because {recommendation.why}"
    # Not the note, which is cited in the row of the recommended cell.
    return [first, *recommendation.not_chosen, *recommendation.other_engines]


def _remarks(records: Sequence[Record], columns: Sequence[Column]) -> list[str]:
    remarks = []
    measured = [r for r in records if r.status in MEASURED or r.decode_tok_s]
    timed = [record for record in measured if record.decode_tok_s]
    if measured and not any(column.of_quality for column in columns):
        reasons = sorted({record.quality_reason or "not measured" for record in measured})
        remarks.append(f"No quality: {'; '.join(reasons)}.")
    if timed:
        remarks.append(
            "Speed: mean ± half of the 95% interval. TTFT is the time to the first token, decode "
            "the speed after it, and e2e the speed over the whole request. MBU is the share of the "
            "read bandwidth that decoding used."
        )
    if any(map(_is_batched, measured)):
        remarks.append(
            "These figures are for one sequence of the batch. total is the number of tokens of all "
            "sequences, divided by the time to the last token."
        )
    if drafted := [record for record in measured if record.speculation]:
        remarks.append(
            "Speculation: acceptance is the share of first drafts that were accepted. Acceptance "
            "and tokens per step depend on the text, here on answers to random tokens."
        )
        remarks += [RANDOM_ACCEPTANCE] * any(map(has_random_acceptance, drafted))
    if any(record.delta_ln_ppl for record in measured):
        remarks.append(
            "Quality: perplexity (ppl), and compared with the reference on the same windows, "
            "Δ ln ppl ± standard error, KL divergence, and the share of positions with the same "
            "most likely token."
        )
    remarks += quality_remarks(measured)
    if any(r.delta_ln_ppl and _is_its_own_quantized_reference(r) for r in measured):
        remarks.append(
            "The reference's weights are quantized, as they are stored, so these figures do not "
            "include the loss due to that quantization. To include it, name an unquantized model "
            "with --reference."
        )
    return remarks


def _is_batched(record: Record) -> bool:
    return record.workload is not None and record.workload.batch > 1


def _is_its_own_quantized_reference(record: Record) -> bool:
    stored = record.provenance.get("stored", {})
    return stored.get("is_quantized", False) and "reference_model" not in record.provenance
