"""Compares two sets of records, and decides whether the second is worse.

The interval of a difference is compared with a margin, so there are three verdicts: *no worse*, if
the loss is shown to stay within the margin; *worse*, if it is shown to exceed it; and *undecided*.
Either is shown by a one-sided test at 5 %. The verdict over several comparisons is *no worse* only
if every one is (an intersection-union test, which needs no correction for multiple testing). It is
*worse* if a single one is, so the level of these tests is divided by their number (Bonferroni): the
probability that equal sets are called worse stays below 5 %, however many cells they have.

Answers to tasks are paired item by item, with A as the reference (``bench.paired``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hotloop.bench.paired import (
    CONFIDENCE,
    PairedTask,
    compare_over_tasks,
    score_limits,
)
from hotloop.bench.record import MEASURED, Record
from hotloop.bench.record import Verdict as AccuracyVerdict
from hotloop.bench.statistics import t_critical
from hotloop.errors import ConfigError, shorten, shorten_value
from hotloop.report.differences import (
    Difference,
    format_loss_change,
    format_speed_change,
    loss_difference,
    same_windows,
    speed_difference,
)
from hotloop.report.numbers import significant
from hotloop.report.quality import AT_CHANCE, format_needed
from hotloop.report.read import latest, read_records
from hotloop.report.recommend import why_uncertain
from hotloop.types import MAX_ACCURACY_LOSS

Verdict = Literal["no worse", "worse", "undecided"]

EXIT_CODES: dict[Verdict, int] = {"no worse": 0, "worse": 1, "undecided": 2}

LEVEL = 1 - CONFIDENCE
"""Significance level of the one-sided tests."""

_TWO_SIDED = 1 - LEVEL / 2
"""One-sided confidence of each limit of a two-sided interval that has ``CONFIDENCE`` in all."""

_MAX_NAMES = 10


@dataclass(frozen=True, kw_only=True)
class ComparedQuantity:
    """The comparison of one quantity of a cell.

    Attributes:
        quantity: ``speed``, ``quality`` (of predictions of text) or ``accuracy`` (of answers).
        text: The difference and its 95 % interval, formatted.
        verdict: The verdict.
        why: The reason for a verdict, if the interval does not show it; or the number of samples
            that a decision would need.
        change: B minus A: of ln speed, of ln perplexity, or of accuracy; None if unknown.
        ci95: Its 95 % interval.
        paired: Whether samples were paired.
        margin: The loss that counts as worse, in the same unit.
        answers: The comparison of answers.
    """

    quantity: Literal["speed", "quality", "accuracy"]
    text: str = "–"
    verdict: Verdict
    why: str = ""
    change: float | None = None
    ci95: tuple[float, float] | None = None
    paired: bool | None = None
    margin: float = 0.0
    answers: AccuracyVerdict | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields, as JSON can hold them."""
        found: dict[str, Any] = {
            "quantity": self.quantity,
            "verdict": self.verdict,
            "why": self.why or None,
            "change": self.change,
            "ci95": self.ci95 and list(self.ci95),
            "paired": self.paired,
            "margin": self.margin,
        }
        if self.answers is not None:
            of = {"tasks", "n", "worse", "better", "mcnemar_p", "needed"}
            found["answers"] = self.answers.model_dump(mode="json", include=of)
        return found


@dataclass(frozen=True, kw_only=True)
class ComparedCell:
    """A cell that both sets have.

    Attributes:
        name: Its name; both names if they differ.
        quantities: Its quantities.
        notes: Remarks on the comparison.
    """

    name: str
    quantities: tuple[ComparedQuantity, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two sets of records, compared.

    Attributes:
        cells: The cells that both have.
        verdict: The verdict over all of them.
        missing: Cells that only one set has, as sentences. A cell that only A has measured makes
            the verdict undecided.
    """

    cells: tuple[ComparedCell, ...]
    verdict: Verdict
    missing: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields, as JSON can hold them."""
        return {
            "verdict": self.verdict,
            "cells": [
                {
                    "cell": cell.name,
                    "quantities": [each.to_dict() for each in cell.quantities],
                    "notes": list(cell.notes),
                }
                for cell in self.cells
            ],
            "missing": list(self.missing),
        }


def read_set(name: str, *, on_problem: Any) -> list[Record]:
    """Reads a set of records: a results folder, a file of records, or a cell of one of these.

    Args:
        name: A path; or a path, a colon and the name of a cell.
        on_problem: See ``read_records``.

    Raises:
        ConfigError: There is no such file or cell.
    """
    path, cell = name, ""
    while not Path(path).exists() and ":" in path:
        path = path.rpartition(":")[0]
        cell = name[len(path) + 1 :]
    if not Path(path).exists():
        path, cell = name, ""
    records = latest(read_records(Path(path), on_problem=on_problem))
    if not cell:
        return records
    if found := [record for record in records if record.cell == cell]:
        return found
    names = ", ".join(shorten(record.cell) for record in records[:_MAX_NAMES])
    more = ", …" * (len(records) > _MAX_NAMES)
    raise ConfigError(
        f"{shorten(path)} has no cell {shorten_value(cell)}. Its cells are {names}{more}."
    )


def compare(
    before: Sequence[Record],
    after: Sequence[Record],
    *,
    max_slowdown: float,
    max_delta_ln_ppl: float,
    max_accuracy_loss: float = MAX_ACCURACY_LOSS,
) -> Comparison:
    """Compares two sets of records, cell by cell.

    Cells are matched by engine and configuration, or by name. Two sets of one cell each are
    compared whatever their configurations.

    Args:
        before: Set A, which is compared with.
        after: Set B, which is judged.
        max_slowdown: The tolerated loss of decode speed, as a share.
        max_delta_ln_ppl: The increase of ln perplexity that is tolerated.
        max_accuracy_loss: The loss of accuracy that is tolerated, as a share of A's; above 0.

    Raises:
        ConfigError: The sets have no cell in common.
    """
    pairs = _pairs(before, after)
    if not pairs:
        raise ConfigError(
            "A and B have no cell in common: name one cell of each, as FOLDER:CELL, or measure the "
            "same configurations."
        )
    n_tests = sum(_has_speed(a, b) + _has_quality(a, b) + _has_answers(a, b) for a, b in pairs)

    def compared(a: Record, b: Record) -> Iterator[ComparedQuantity]:
        if _has_speed(a, b):
            yield _speed(a, b, max_slowdown, n_tests)
        if _has_quality(a, b):
            yield _quality(a, b, max_delta_ln_ppl, n_tests)
        if _has_answers(a, b):
            yield _accuracy(a, b, max_accuracy_loss, n_tests)

    cells = tuple(
        ComparedCell(
            name=a.cell if a.cell == b.cell else f"{a.cell} → {b.cell}",
            quantities=(found := tuple(compared(a, b))),
            notes=(*_notes(a, b), *_notes_on_answers(a, b, found)),
        )
        for a, b in pairs
    )
    paired = {id(record) for pair in pairs for record in pair}
    unpaired = [
        (which, record)
        for which, records in (("A", before), ("B", after))
        for record in records
        if id(record) not in paired
    ]
    verdicts = {each.verdict for cell in cells for each in cell.quantities}
    unknown = any(
        which == "A" and (record.status in MEASURED or record.decode_tok_s is not None)
        for which, record in unpaired
    )
    verdict: Verdict = "no worse"
    if "worse" in verdicts:
        verdict = "worse"
    elif "undecided" in verdicts or unknown:
        verdict = "undecided"
    missing = [f"{record.cell}: only in {which}" for which, record in unpaired]
    return Comparison(cells=cells, verdict=verdict, missing=tuple(missing))


def _pairs(before: Sequence[Record], after: Sequence[Record]) -> list[tuple[Record, Record]]:
    if len(before) == len(after) == 1:
        return [(before[0], after[0])]
    by_config = {_identity(record): record for record in after}
    by_name = {record.cell: record for record in after}
    pairs = []
    for record in before:
        match = by_config.get(_identity(record)) or by_name.get(record.cell)
        if match is not None:
            pairs.append((record, match))
    return pairs


def _identity(record: Record) -> str:
    """Returns the engine and the configuration, by which cells of the two sets are matched."""
    config = {name: v for name, v in record.config.items() if name != "max_seq_len"}
    return json.dumps([record.baseline, config], sort_keys=True)


def _has_speed(a: Record, b: Record) -> bool:
    """Returns whether a pair is compared by speed: not if both records were only scored."""
    scored = all(r.status in MEASURED and r.workload is None for r in (a, b))
    return not (scored and (_has_quality(a, b) or _has_answers(a, b)))


def _has_quality(a: Record, b: Record) -> bool:
    """Returns whether a pair is compared by perplexity: if either record has it."""
    return a.perplexity is not None or b.perplexity is not None


def _has_answers(a: Record, b: Record) -> bool:
    """Returns whether a pair is compared by accuracy: if either record answered tasks."""
    return bool(a.tasks or b.tasks)


def _speed(a: Record, b: Record, max_slowdown: float, n_tests: int) -> ComparedQuantity:
    margin = -math.log1p(-max_slowdown)
    if a.status in MEASURED and b.status not in MEASURED and b.decode_tok_s is None:
        reason = (b.reason or "").partition("\n")[0]
        why = f"B ended as {b.status}: {reason}".rstrip(": ")
        return ComparedQuantity(quantity="speed", verdict="worse", why=why, margin=margin)
    why = ""
    if a.decode_tok_s is None or b.decode_tok_s is None:
        why = f"no speed: A ended as {a.status}, B as {b.status}"
    elif a.workload != b.workload:
        why = "the workloads differ, so their speeds cannot be compared"
    difference = None if why else speed_difference(a, b)
    if difference is None:
        why = why or "a single repeat has no interval: raise --repeats"
        return ComparedQuantity(quantity="speed", verdict="undecided", why=why, margin=margin)
    assert b.decode_tok_s is not None
    slowdown = Difference(
        mean=-difference.mean, se=difference.se, df=difference.df, paired=difference.paired
    )
    verdict, why = _verdict(slowdown, margin, n_tests, b.decode_tok_s.n, "repeats")
    return ComparedQuantity(
        quantity="speed",
        text=format_speed_change(difference),
        verdict=verdict,
        why=why,
        change=difference.mean,
        ci95=difference.interval(),
        paired=difference.paired,
        margin=margin,
    )


def _quality(a: Record, b: Record, margin: float, n_tests: int) -> ComparedQuantity:
    difference = loss_difference(a, b)
    if difference is None:
        missing = " and ".join(
            which for which, record in (("A", a), ("B", b)) if record.perplexity is None
        )
        if missing:
            why = f"{missing} was not scored"
        elif not same_windows(a, b):
            why = "they were scored on different windows of text"
        else:
            why = "too few windows"
        return ComparedQuantity(quantity="quality", verdict="undecided", why=why, margin=margin)
    assert b.perplexity is not None
    verdict, why = _verdict(difference, margin, n_tests, b.perplexity.n, "windows")
    return ComparedQuantity(
        quantity="quality",
        text=format_loss_change(difference),
        verdict=verdict,
        why=why,
        change=difference.mean,
        ci95=difference.interval(),
        paired=difference.paired,
        margin=margin,
    )


def _accuracy(a: Record, b: Record, margin_share: float, n_tests: int) -> ComparedQuantity:
    tasks = _paired_tasks(a, b)
    found = compare_over_tasks(tasks, margin_share)
    if found is None:
        missing = " and ".join(which for which, r in (("A", a), ("B", b)) if not r.tasks)
        if missing:
            why = f"{missing} answered no tasks"
        elif not tasks:
            why = "they answered different items"
        else:
            why = f"A is {AT_CHANCE}"
        return ComparedQuantity(quantity="accuracy", verdict="undecided", why=why)
    strata = [task.flips for task in tasks if task.name in found.tasks]
    unknown = sorted({task.task for task in a.tasks} - {task.name for task in tasks})
    verdict: Verdict = "undecided"
    why = format_needed(found)
    if found.outcome == "pass" and unknown:
        why = f"B did not answer the same items of {', '.join(unknown)}"
    elif found.outcome == "pass":
        verdict = "no worse"
    elif score_limits(strata, confidence=1 - LEVEL / n_tests)[0] > found.margin:
        verdict = "worse"
    gain = 0 - found.loss  # not -0.0
    low, high = (0 - loss for loss in reversed(score_limits(strata, confidence=_TWO_SIDED)))
    return ComparedQuantity(
        quantity="accuracy",
        text=f"{100 * gain:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]",
        verdict=verdict,
        why=why if verdict == "undecided" else "",
        change=gain,
        ci95=(low, high),
        paired=True,
        margin=found.margin,
        answers=found,
    )


def _paired_tasks(a: Record, b: Record) -> list[PairedTask]:
    """Pairs the answers to the tasks that have the same items in both records."""
    others = {task.sha256: task for task in b.tasks}
    return [
        PairedTask(
            name=task.task,
            chance=task.chance,
            reference=[sample >= 0.5 for sample in task.accuracy.samples],
            tested=[sample >= 0.5 for sample in other.accuracy.samples],
        )
        for task in a.tasks
        if (other := others.get(task.sha256)) and other.accuracy.n == task.accuracy.n
    ]


def _verdict(
    loss: Difference, margin: float, n_tests: int, n: int, unit: str
) -> tuple[Verdict, str]:
    """Returns the verdict on a loss (higher is worse), and for an undecided one the reason."""
    half_width = t_critical(loss.df, confidence=1 - 2 * LEVEL) * loss.se
    if loss.mean + half_width <= margin:
        return "no worse", ""
    if loss.mean - t_critical(loss.df, confidence=1 - 2 * LEVEL / n_tests) * loss.se > margin:
        return "worse", ""
    distance = abs(margin - loss.mean)
    if distance == 0 or loss.se == 0:
        return "undecided", "the difference is at the margin"
    needed = math.ceil(n * (half_width / distance) ** 2)
    return "undecided", f"about {max(needed, n + 1):,} {unit} are needed"


def _notes(a: Record, b: Record) -> list[str]:
    notes = []
    for which, record in (("A", a), ("B", b)):
        reason = (record.reason or "").partition("\n")[0]
        if record.status == "unstable":
            notes.append(f"{which} is unstable: {reason}")
        elif record.status not in MEASURED and record.decode_tok_s is not None:
            notes.append(f"{which} ended as {record.status}: {reason}")
        elif why := why_uncertain(record):
            notes.append(f"{which}: {why}")
    for what, of in (
        ("model", lambda r: r.config.get("model")),
        ("device", lambda r: r.provenance.get("device", {}).get("name")),
        ("torch", lambda r: r.provenance.get("versions", {}).get("torch")),
        ("weights", lambda r: r.provenance.get("weights_sha256")),
    ):
        was, now = of(a), of(b)
        if was != now and None not in (was, now):
            notes.append(f"different {what}: {shorten(str(was), 60)} and {shorten(str(now), 60)}")
    return notes


def _notes_on_answers(
    a: Record, b: Record, quantities: Sequence[ComparedQuantity]
) -> Iterator[str]:
    for found in (each.answers for each in quantities):
        if found is not None:
            yield (
                f"answers: {found.worse} worse and {found.better} better of {found.n:,} items of "
                f"{', '.join(found.tasks)}; McNemar p = {significant(found.mcnemar_p, 2)}"
            )
    if not (a.tasks and b.tasks):
        return
    tasks = _paired_tasks(a, b)
    if alike := [task.name for task in tasks if task.at_chance]:
        yield f"{', '.join(alike)}: A is {AT_CHANCE}, so no loss can be shown"
    paired = {task.name for task in tasks}
    if unpaired := {task.task for task in (*a.tasks, *b.tasks)} - paired:
        yield f"the items of {', '.join(sorted(unpaired))} differ, so they are left out"
