"""Recommends a configuration, and gives the reasons against the others.

The rule: consider the configurations whose quality loss is shown to be within the tolerance, and
the fastest of these. Among the configurations that are not significantly slower than it, recommend
the one with the smallest loss.

A speed counts as known if there are at least ``MIN_REPEATS`` repeats and the interval is not too
wide. A cell whose speed is not known is not recommended.

A cell whose loss of accuracy on tasks is shown to exceed the margin is never recommended.

"Shown" is a non-inferiority test: the one-sided 95 % upper bound of Δ ln ppl (paired, clustered as
in the record, Student's t) lies at or below the tolerance. A loss that may be small is not enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hotloop.bench.record import MEASURED, Figure, Record
from hotloop.bench.statistics import t_critical
from hotloop.report.context import assumed_note, device_name, notes
from hotloop.report.numbers import half_width, percent, significant, uncertain
from hotloop.report.read import latest
from hotloop.types import MAX_DELTA_LN_PPL

MIN_REPEATS = 3
"""The fewest repeats of a known speed: with two, t is 12.7, which makes the interval too wide."""

MAX_RELATIVE_HALF_WIDTH = 0.5
"""The largest half width of a speed's 95 % interval, relative to its mean, of a known speed."""


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """A recommended configuration.

    Attributes:
        cell: The configuration's name; None if none can be recommended.
        record: Its record.
        why: The reason, as a sentence.
        note: The notes of its engine, as a paragraph, as in its row. Empty without notes.
        not_chosen: A sentence for each configuration that was as fast or faster.
        other_engines: A sentence for each other engine whose speed is known.
        quality_known: Whether quality was considered.
        max_delta_ln_ppl: The tolerance.
    """

    cell: str | None
    record: Record | None = None
    why: str
    note: str = ""
    not_chosen: tuple[str, ...] = ()
    other_engines: tuple[str, ...] = ()
    quality_known: bool
    max_delta_ln_ppl: float


def recommend(
    records: Iterable[Record], *, max_delta_ln_ppl: float = MAX_DELTA_LN_PPL
) -> Recommendation:
    """Picks a configuration from the records of one experiment.

    Among the cells whose quality loss is within the tolerance and whose speed is not significantly
    below the fastest, it picks the one with the smallest loss. Without any quality in the records
    it picks the fastest, and says so.

    Args:
        records: Records of one model, workload and device. The last record of each cell counts;
            records of other engines, or with an assumed acceptance, do not, nor do those of cells
            that did not finish.
        max_delta_ln_ppl: The increase of ln perplexity to tolerate.
    """
    records = latest(records)
    ours = [r for r in records if r.baseline is None and assumed_note(r) is None and r.decode_tok_s]
    timed = [record for record in ours if record.status in MEASURED]
    unknown = [f"{record.cell}: {why}." for record in timed if (why := why_uncertain(record))]
    unknown += [_unfinished(record) for record in ours if record.status not in MEASURED]
    measured = [record for record in timed if not why_uncertain(record)]
    scored = [record for record in measured if record.delta_ln_ppl]

    def answer(chosen: Record | None, why: str, not_chosen: Iterable[str] = ()) -> Recommendation:
        return Recommendation(
            cell=chosen.cell if chosen else None,
            record=chosen,
            why=why,
            note=_engine_notes(chosen) if chosen else "",
            not_chosen=(*not_chosen, *unknown),
            other_engines=_other_engines(chosen, records) if chosen else (),
            quality_known=bool(scored),
            max_delta_ln_ppl=max_delta_ln_ppl,
        )

    if not timed:
        if any(assumed_note(r) and r.decode_tok_s for r in records):
            return answer(
                None,
                "every measured configuration has an assumed acceptance, and such speeds are never "
                "recommended. Measure without --assume-acceptance.",
            )
        return answer(None, "no configuration was measured to the end.")
    if not measured:
        return answer(None, "no configuration's speed is known. Raise --repeats.")
    if differing := _incomparable(measured):
        return answer(None, f"the records have different {differing} and cannot be compared.")
    if not scored:
        fastest = max(measured, key=_speed)
        why = measured[0].quality_reason or "it was not measured"
        return answer(
            fastest,
            f"it decodes fastest, {_format_speed(fastest.decode_tok_s)} tok/s. Only speed is "
            f"considered: the quality is unknown ({why}).{_caveat(fastest)}",
            (f"{_compare_speeds(r, fastest)}." for r in measured if _is_rival(r, fastest)),
        )
    within = [record for record in scored if not _why_not_tolerated(record, max_delta_ln_ppl)]
    if not within:
        return answer(
            None,
            "no configuration's quality loss was shown to be within the tolerance of "
            f"{max_delta_ln_ppl:g} in ln perplexity.",
            (f"{r.cell}: {_why_not_tolerated(r, max_delta_ln_ppl)}." for r in measured),
        )
    fastest = max(within, key=_speed)
    chosen = min(
        (record for record in within if _within_noise(record, fastest)),
        key=lambda record: (_counted_loss(record), -_speed(record)),
    )
    bound = f", with 95% confidence below {significant(_upper_bound(chosen), 2)}"
    place = "" if chosen is fastest else "within noise of "
    return answer(
        chosen,
        f"it decodes {_format_speed(chosen.decode_tok_s)} tok/s{_speedup(chosen, scored)}, {place}"
        f"the fastest whose quality loss is within {max_delta_ln_ppl:g}: {_format_loss(chosen)}"
        f"{bound if _one_sided_half_width(chosen) else ''}.{_caveat(chosen)}",
        (
            f"{_compare_speeds(r, chosen)}, but {_shortfall(r, chosen, max_delta_ln_ppl)}."
            for r in measured
            if _is_rival(r, chosen)
        ),
    )


def _speed(record: Record) -> float:
    assert record.decode_tok_s is not None, "only measured records are compared"
    return record.decode_tok_s.mean


def _unfinished(record: Record) -> str:
    return (
        f"{record.cell}: it decodes {_format_speed(record.decode_tok_s)} tok/s, but ended as "
        f"{record.status} before its quality was measured to the end."
    )


def why_uncertain(record: Record) -> str | None:
    """Returns why a measured speed is too uncertain; None if it is not, or there is none."""
    figure = record.decode_tok_s
    if figure is None:
        return None
    if figure.n < MIN_REPEATS:
        repeats = "1 repeat is" if figure.n == 1 else f"{figure.n} repeats are"
        return f"{repeats} too few to know its speed, {_format_speed(figure)} tok/s"
    if (half_width(figure) or 0.0) > MAX_RELATIVE_HALF_WIDTH * figure.mean:
        return (
            f"its repeats differ too much to know its speed, {_format_speed(figure)} tok/s of "
            f"{figure.n} repeats"
        )
    return None


def is_doubtful(record: Record) -> bool:
    """Returns whether a measured speed is unstable or too uncertain."""
    return record.status == "unstable" or why_uncertain(record) is not None


def unstable_suffix(*records: Record | None) -> str:
    """Returns a suffix for a comparison of speeds: `` (unstable)`` if one is, else empty."""
    return " (unstable)" if any(r and r.status == "unstable" for r in records) else ""


def _loss(record: Record) -> float:
    assert record.delta_ln_ppl is not None, "only scored records have a loss"
    return record.delta_ln_ppl.mean


def _counted_loss(record: Record) -> float:
    """Returns the loss that decides between equal speeds; a negative loss counts as 0."""
    return max(0.0, _loss(record))


def _upper_bound(record: Record) -> float:
    """Returns the one-sided 95 % upper bound of Δ ln ppl."""
    return _loss(record) + _one_sided_half_width(record)


def _one_sided_half_width(record: Record) -> float:
    """Returns the distance from Δ ln ppl to its one-sided 95 % bound; infinite for one window."""
    loss, protocol = record.delta_ln_ppl, record.quality_protocol
    if loss is None or loss.se is None:
        return math.inf
    clusters = protocol.articles if protocol and protocol.articles else loss.samples
    return t_critical(len(clusters) - 1, confidence=0.90) * loss.se


def _within_noise(a: Record, b: Record) -> bool:
    """Returns whether the approximate 95 % interval of the difference of two speeds contains 0."""
    noise = [half_width(r.decode_tok_s) or 0.0 for r in (a, b) if r.decode_tok_s]
    return abs(_speed(a) - _speed(b)) <= math.hypot(*noise)


def _is_rival(record: Record, chosen: Record) -> bool:
    """Returns whether a record's speed is higher than the chosen one's, or equal within noise."""
    return record is not chosen and (
        _speed(record) > _speed(chosen) or _within_noise(record, chosen)
    )


def _compare_speeds(record: Record, chosen: Record) -> str:
    name = record.cell + unstable_suffix(record)
    if _within_noise(record, chosen):
        return f"{name} is as fast within noise"
    return f"{name} is {percent(_speed(record) / _speed(chosen) - 1)} faster"


def _shortfall(record: Record, chosen: Record, tolerance: float) -> str:
    """Returns why a record that is as fast or faster was not chosen."""
    if why := _why_not_tolerated(record, tolerance):
        return why
    if _counted_loss(record) > _counted_loss(chosen):
        return f"it loses more quality, {_format_loss(record)}"
    return f"slower on average, {significant(_speed(record), 3)} tok/s"


def _why_not_tolerated(record: Record, tolerance: float) -> str | None:
    """Returns why a quality loss is not shown to be within the tolerance; None if it is."""
    loss = record.delta_ln_ppl
    if loss is None:
        return f"its quality is unknown ({record.quality_reason})"
    if record.quality_reason is not None:
        return f"not all of its quality is known ({record.quality_reason})"
    if (verdict := record.verdict) is not None and verdict.outcome == "fail":
        return (
            f"it loses {100 * verdict.loss:.1f}% of the tasks' {verdict.n} items, which is shown "
            f"to be more than the margin of {100 * verdict.margin:.2f}%"
        )
    if loss.mean > tolerance:
        return f"{_format_loss(record)} exceeds {tolerance:g}"
    if (upper := _upper_bound(record)) > tolerance:
        room = tolerance - loss.mean
        more = ""
        if room > 0 and math.isfinite(upper):
            needed = math.ceil(loss.n * (_one_sided_half_width(record) / room) ** 2)
            more = f"; about {needed} windows are needed"
        return f"{_format_loss(record)} is not shown to be within {tolerance:g}{more}"
    return None


def _format_speed(figure: Figure | None) -> str:
    assert figure is not None, "only measured records are shown"
    return uncertain(figure.mean, half_width(figure))


def _format_loss(record: Record) -> str:
    loss = record.delta_ln_ppl
    assert loss is not None, "only scored records have a loss"
    return f"Δ ln ppl {uncertain(loss.mean, loss.se, signed=True)}"


def _speedup(chosen: Record, scored: Sequence[Record]) -> str:
    """Returns the speed-up over plain PyTorch, if that was measured too."""
    plain = [record for record in scored if record.cell == "none/eager" and record is not chosen]
    if not plain:
        return ""
    doubt = ", whose speed was unstable" if plain[0].status == "unstable" else ""
    return f" ({_speed(chosen) / _speed(plain[0]):.1f} × none/eager{doubt})"


def _other_engines(chosen: Record, records: Iterable[Record]) -> tuple[str, ...]:
    """Compares the chosen record with those of other engines on the same device."""
    here = device_name(chosen)
    theirs = [r for r in records if r.baseline and r.decode_tok_s and device_name(r) == here]
    return tuple(
        f"{record.cell} decodes {_format_speed(record.decode_tok_s)} tok/s"
        f"{unstable_suffix(record)}: {chosen.cell} is "
        f"{significant(_speed(chosen) / _speed(record), 2)} × as fast{_ranks(chosen, record)}."
        for record in theirs
        if why_uncertain(record) is None
    )


def _ranks(chosen: Record, other: Record) -> str:
    ours, theirs = (record.config.get("tensor_parallel", 1) for record in (chosen, other))
    return "" if ours == theirs else f", over {ours} rank{'s' * (ours > 1)} to {theirs}"


def _caveat(record: Record) -> str:
    return " Its speed was unstable between repeats." if record.status == "unstable" else ""


def _engine_notes(record: Record) -> str:
    sentences = " ".join(f"{note.removesuffix('.')}." for note in notes(record))
    return f"Notes on {record.cell}: {sentences}" if sentences else ""


def _incomparable(records: Sequence[Record]) -> str | None:
    """Names a difference between records that should be of one experiment, if there is one."""
    aspects: dict[str, Callable[[Record], object]] = {
        "models": lambda r: (r.config.get("model"), r.config.get("weights")),
        "devices": lambda r: r.provenance.get("device", {}).get("name"),
        "workloads": lambda r: r.workload,
        "texts": lambda r: (
            r.quality_protocol and (r.quality_protocol.text_sha256, r.quality_protocol.window)
        ),
    }
    for aspect, of in aspects.items():
        if len({of(record) for record in records} - {None}) > 1:
            return aspect
    return None
