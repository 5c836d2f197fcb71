"""Texts and tables for figures of quality that have no column of their own."""

from __future__ import annotations

from collections.abc import Sequence

from hotloop.bench.paired import holm
from hotloop.bench.record import NonInferiority, Record, TaskFigures
from hotloop.report.numbers import divergence, percent, significant, uncertain

ENOUGH_WINDOWS = 20
"""The fewest windows for a reliable interval: with fewer, the interval itself is imprecise."""

ALPHA = 0.05

AT_CHANCE = "not shown to be better than guessing"
"""What is said of a reference in a task ``at_chance``: its accuracy may still be above chance."""


def format_accuracy_loss(compared: NonInferiority) -> str:
    """Formats the accuracy lost, and its one-sided 95 % upper limit: ``0.5% (at most 1.2%)``."""
    return f"{100 * compared.loss:.1f}% (at most {100 * compared.limits[1]:.1f}%)"


def format_outcome(compared: NonInferiority) -> str:
    """Names the outcome; for ``underpowered``, with the number of items that a pass would take."""
    if compared.outcome != "underpowered":
        return compared.outcome
    return f"underpowered: {format_needed(compared)}"


def format_needed(compared: NonInferiority) -> str:
    """Returns a text with the number of items that a pass would take."""
    if compared.needed is None:
        return "more items can hardly help"
    return f"needs {compared.needed:,} items"


def selection_notes(records: Sequence[Record]) -> dict[str, str]:
    """Finds passes that are not significant after Holm's correction for multiple testing.

    The candidates are hotloop's own quantized configurations. Configurations without quantization
    are references, and cannot pass by chance.

    Returns:
        A note for each of their cells: the p-value adjusted by Holm's method is above 5 %.
    """
    judged = [
        (record, v)
        for record in records
        if (v := record.verdict) is not None
        and record.baseline is None
        and record.config.get("quant") != "none"
    ]
    adjusted = holm([verdict.p for _, verdict in judged])
    return {
        record.cell: f"passes on its own, but not if it is selected from {len(judged)} "
        f"configurations: p = {significant(p, 2)} with Holm's correction"
        for (record, verdict), p in zip(judged, adjusted, strict=True)
        if verdict.outcome == "pass" and p >= ALPHA
    }


def remarks(records: Sequence[Record]) -> list[str]:
    """Explains the figures of quality in a table of records."""
    sentences = []
    if few := [r.perplexity.n for r in records if r.perplexity and r.perplexity.n < ENOUGH_WINDOWS]:
        sentences.append(
            f"Only {min(few)} windows: with fewer than {ENOUGH_WINDOWS}, intervals of quality are "
            "themselves imprecise."
        )
    floors = [figure.mean for record in records if (figure := record.kl_floor) is not None]
    if floors:
        sentences.append(
            "The floor of KL, of the reference against itself in windows of another length, is "
            f"{divergence(max(floors))}: a smaller KL cannot be distinguished from rounding."
        )
    if verdicts := [verdict for record in records if (verdict := record.verdict) is not None]:
        tasks = ", ".join(dict.fromkeys(task for v in verdicts for task in v.tasks))
        margin = max(verdict.margin for verdict in verdicts)
        sentences.append(
            f"Verdict: accuracy lost is the share of {verdicts[0].n} items of {tasks} that only "
            "the reference has right, minus the share that only this configuration has right. A "
            "negative value is a gain. In parentheses is its one-sided 95% upper limit. pass: a "
            "loss of "
            f"{100 * margin:.2f}% (1% of the reference's accuracy) is ruled out; fail: "
            "the loss is shown to be larger; underpowered: too few items to show either."
        )
    at_chance = {task.task for record in records for task in record.tasks if task.at_chance}
    if at_chance:
        sentences.append(
            f"{', '.join(sorted(at_chance))}: the reference is {AT_CHANCE}, so no loss can be "
            "shown. The verdict leaves it out."
        )
    sentences += [note for record in records if (note := _greedy(record))]
    return sentences


def details(record: Record) -> list[tuple[str, str]]:
    """Returns names and values of a record's further figures of quality."""
    pairs = [
        (f"ppl ({name})", uncertain(figure.mean, figure.se))
        for name, figure in record.other_perplexities.items()
    ]
    quantiles = {
        "median": record.kl_median,
        "90%": record.kl_p90,
        "95%": record.kl_p95,
        "99%": record.kl_p99,
        "99.9%": record.kl_p99_9,
        "max": record.kl_max,
    }
    known = [f"{name} {divergence(v)}" for name, v in quantiles.items() if v is not None]
    if (kl := record.kl_mean) is not None and kl.se:
        pairs.append(("mean KL ± SE", f"{divergence(kl.mean)} ± {significant(kl.se, 2)}"))
    if known:
        pairs.append(("KL quantiles", ", ".join(known)))
    if record.delta_p is not None and record.delta_p_rms is not None:
        mean = uncertain(100 * record.delta_p.mean, 100 * (record.delta_p.se or 0), signed=True)
        pairs.append(("Δp", f"{mean}% mean, {100 * record.delta_p_rms:.2f}% root mean square"))
    for depth in record.by_depth:
        parts = [f"ppl {significant(depth.perplexity.mean, 4)}"]
        if depth.delta_ln_ppl is not None:
            change = uncertain(depth.delta_ln_ppl.mean, depth.delta_ln_ppl.se, signed=True)
            parts.append(f"Δ ln ppl {change}")
        if depth.kl_mean is not None:
            parts.append(f"KL {divergence(depth.kl_mean.mean)}")
        if depth.same_top1 is not None:
            parts.append(f"same top-1 {percent(depth.same_top1.mean, 1)}")
        pairs.append((f"positions {depth.start:,} to {depth.end - 1:,}", ", ".join(parts)))
    return pairs + [(task.task, _task(task)) for task in record.tasks]


def _task(task: TaskFigures) -> str:
    shown = f"{percent(task.accuracy.mean, 1)} right of {task.accuracy.n}"
    if task.compared is None:
        return shown
    c = task.compared
    shown += f", reference {percent(task.reference_accuracy or 0, 1)}; {c.worse} worse, {c.better} "
    shown += f"better (McNemar p = {significant(c.mcnemar_p, 2)}); lost {format_accuracy_loss(c)}"
    return f"{shown}; {f'reference {AT_CHANCE}' if task.at_chance else format_outcome(c)}"


def _greedy(record: Record) -> str | None:
    greedy = record.greedy
    if greedy is None or greedy.agreement.mean == 1:
        return None
    return (
        f"{record.cell}: when its greedy answers are scored, {percent(greedy.agreement.mean, 1)} "
        "of their tokens are the most likely ones. The log-probability of the others is at most "
        f"{significant(greedy.gap_max, 2)} nats lower than that of the most likely token. Rounding "
        "alone can cause such near-ties."
    )
