"""Makes tables in the published layout: one per model, as in published tables of decoding speed.

Its columns are quantization, compiled, tensor parallel, speculative decoding and tokens per second.
Memory, quality and the recommendation are in the experiment's own table. A cell that did not fit,
could not be run or varied between repeats has a numbered note.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from hotloop.bench.record import Figure, Record
from hotloop.report.context import (
    RANDOM_ACCEPTANCE,
    assumed_note,
    context,
    device_name,
    has_random_acceptance,
    has_random_weights,
    model_name,
)
from hotloop.report.context import notes as engine_notes
from hotloop.report.fields import csv_names, csv_text, csv_values
from hotloop.report.layout import Column, Notes, Row, Table
from hotloop.report.numbers import half_width, uncertain
from hotloop.report.read import latest
from hotloop.report.recommend import why_uncertain
from hotloop.types import EngineConfig, draft_name, is_draft_model

NONE = "–"

DID_NOT_FIT = ("oom", "predicted-oom")

QUANTIZATIONS = ("none", "auto", "int8", "fp8", "int4")
"""The order of rows by quantization; other values follow, by name."""

EXECUTIONS = {"eager": "no", "compile": "yes"}
"""Texts of the column *compiled* by execution mode, in the order of rows; other modes, which have
their own names there, follow."""


def make_published_tables(*experiments: Iterable[Record]) -> list[Table]:
    """Makes a table for each model, device and workload, whose rows can be compared.

    Args:
        *experiments: The records of each results folder, with all attempts. The last record of a
            cell counts; of several folders, that of the last folder.
    """
    records = [record for experiment in experiments for record in latest(experiment)]
    return [_table(latest(group)) for group in comparable_groups(records)]


def to_csv(tables: Iterable[Table]) -> str:
    """Formats all tables as one CSV file: the levers, and every number as it was recorded."""
    figures = ["decode_tok_s", "e2e_tok_s", "speculation.tokens_per_step", "speculation.acceptance"]
    labels = [column.title.replace("\n", "_").lower() for column in LABELS]
    header = ["model", "weights", "device", *labels, "status", *csv_names(figures), "reason"]
    rows = []
    for record in (row.record for table in tables for row in table.rows):
        what = [record.config.get("model"), record.config.get("weights"), device_name(record)]
        levers = [column.text(record) for column in LABELS]
        values = csv_values(figures, record)
        rows.append([*what, *levers, record.status, *values, record.reason])
    return csv_text(header, rows)


def comparable_groups(records: Sequence[Record]) -> Iterable[list[Record]]:
    """Groups records by model, device and workload, in the order of first appearance.

    A record whose cell ended before the device was known belongs to the first device of its model.
    """
    devices: dict[Any, str] = {}

    def experiment(record: Record) -> Any:
        return record.config.get("model"), record.config.get("weights"), record.workload

    for record in records:
        if device := device_name(record):
            devices.setdefault(experiment(record), device)
    groups: dict[Any, list[Record]] = {}
    for record in records:
        key = experiment(record)
        device = device_name(record) or devices.get(key)
        groups.setdefault((key, device), []).append(record)
    return groups.values()


def _table(records: Sequence[Record]) -> Table:
    records = sorted(records, key=_order)
    columns = (*LABELS, *SPEEDS)
    levers = [tuple(column.text(record) for column in LABELS) for record in records]
    n_of_levers = Counter(levers)
    notes, rows = Notes(), []
    for record, labels in zip(records, levers, strict=True):
        quantization, compiled, ranks, drafts = labels
        quantization = notes.cite(quantization, record.cell if n_of_levers[labels] > 1 else None)
        drafts = notes.cite(drafts, assumed_note(record))
        if has_random_acceptance(record):
            drafts = notes.cite(drafts, RANDOM_ACCEPTANCE)
        decode, end_to_end = (column.text(record) for column in SPEEDS)
        decode = notes.cite(decode, _caveat(record))
        for note in engine_notes(record) if record.decode_tok_s else ():
            decode = notes.cite(decode, note)
        cells = (quantization, compiled, ranks, drafts, decode, end_to_end)
        rows.append(Row(record=record, cells=cells))
    on = next((f" on {name}" for name in map(device_name, records) if name), "")
    return Table(
        title=f"{model_name(records[0])}{on}",
        columns=columns,
        rows=tuple(rows),
        notes=tuple(notes.texts),
        remarks=tuple(_remarks(records)),
        context=context(records, leave_out=("model", "text")),
    )


def _quantization(record: Record) -> str:
    quant, head = record.config.get("quant", NONE), record.config.get("head", "auto")
    quant = quant if head == "auto" else f"{quant}, head {head}"
    if record.baseline:
        return record.baseline if quant == "auto" else f"{record.baseline}, {quant}"
    return quant


def _execution(record: Record) -> str:
    """Returns the execution mode that ran, or else the configured one."""
    return (record.engine or {}).get("execution") or record.config.get("execution", NONE)


def _compiled(record: Record) -> str:
    execution = _execution(record)
    if record.baseline and execution == "auto":  # it has no such choice, or did not start
        return NONE
    return EXECUTIONS.get(execution, execution)


def _drafts(record: Record) -> str:
    config = record.config
    name = draft_name(
        config.get("draft", EngineConfig.draft),
        config.get("draft_quant", EngineConfig.draft_quant),
        config.get("draft_tokens", EngineConfig.draft_tokens),
        config.get("draft_policy", EngineConfig.draft_policy),
        config.get("assume_acceptance"),
    )
    return NONE if name == "none" else name


def _decode(record: Record) -> str:
    other = "did not fit" if record.status in DID_NOT_FIT else record.status
    return _speed(record.decode_tok_s) or other


def _speed(figure: Figure | None) -> str:
    return uncertain(figure.mean, half_width(figure)) if figure else ""


LABELS = (
    Column(title="Quantization", text=_quantization, is_label=True, is_key=True),
    Column(title="Compiled", text=_compiled, is_label=True, is_key=True),
    Column(
        title="Tensor\nparallel",
        text=lambda record: str(record.config.get("tensor_parallel", 1)),
        is_label=True,
        is_key=True,
    ),
    Column(title="Speculative\ndecoding", text=_drafts, is_label=True, is_key=True),
)

SPEEDS = (
    Column(title="decode\ntokens/s", text=_decode, field="decode_tok_s"),
    Column(
        title="end-to-end\ntokens/s",
        text=lambda record: _speed(record.e2e_tok_s),
        field="e2e_tok_s",
    ),
)


def _order(record: Record) -> Any:
    """Returns the sort key of a row: baselines first, then by the columns from left to right."""
    config = record.config
    quant, execution = config.get("quant", ""), _execution(record)
    draft = config.get("draft", "none")
    return (
        record.baseline is None,
        _sort_key(quant.partition("-")[0], QUANTIZATIONS),
        _quantization(record),
        _sort_key(execution, tuple(EXECUTIONS)),
        config.get("tensor_parallel", 1),
        (draft != "none", is_draft_model(draft), _drafts(record)),
        record.cell,
    )


def _sort_key(value: str, order: Sequence[str]) -> tuple[int, str]:
    return (order.index(value) if value in order else len(order), value)


def _caveat(record: Record) -> str | None:
    """Returns the reason why a row has no figures, or a caveat about them."""
    reason, why = (record.reason or "").partition("\n")[0], why_uncertain(record)
    if record.status in DID_NOT_FIT and record.decode_tok_s is None:
        return f"did not fit {_where(record)}: {reason}"
    match record.status:
        case "ok":
            return why
        case "unstable":
            return f"lots of variance: {reason}"
    ended = f"{record.status}: {reason}" if reason else None
    return "; ".join(filter(None, (ended, why))) or None


def _where(record: Record) -> str:
    n_devices = record.config.get("tensor_parallel", 1)
    if record.provenance.get("device", {}).get("kind") != "cuda":
        return "in memory"
    return "on a single GPU" if n_devices == 1 else f"on {n_devices} GPUs"


def _remarks(records: Sequence[Record]) -> list[str]:
    remarks = []
    if any(record.decode_tok_s for record in records):
        remarks.append(
            "tokens/s are those of one request: mean over repeats ± half of the 95% interval. "
            "decode counts the tokens after the first one and their time; end-to-end counts all "
            "tokens and the whole time, prefill included, as gpt-fast does."
        )
    if has_random_weights(records[0]):
        remarks.append("Random weights show speed and fit, but not quality.")
    return remarks
