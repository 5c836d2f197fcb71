"""The plots of a report, as values that are independent of the drawing.

``svg`` draws them for a page, and ``png`` for files. Plots are made from records alone. Every mark
has its record's cell and the recorded value, so that drawings can be checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hotloop.bench.record import Figure, Record
from hotloop.report.differences import loss_difference, speed_difference
from hotloop.report.layout import STAR
from hotloop.report.numbers import half_width, percent, significant, uncertain
from hotloop.report.recommend import is_doubtful, why_uncertain
from hotloop.report.speculation import drafting
from hotloop.types import EngineConfig

Scale = Literal["linear", "log", "symlog"]

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis.

    Attributes:
        label: Its quantity, with the unit.
        low: Its smallest value.
        high: Its largest value.
        scale: ``symlog`` is linear up to ``linear_to`` on either side of 0, and logarithmic beyond.
        linear_to: See ``scale``.
        fixed_ticks: The ticks; empty for round values.
    """

    label: str
    low: float
    high: float
    scale: Scale = "linear"
    linear_to: float = 1.0
    fixed_ticks: tuple[float, ...] = ()

    def position(self, value: float) -> float:
        """Returns the position of a value, from 0 at ``low`` to 1 at ``high``."""
        low, high = self._warped(self.low), self._warped(self.high)
        return (self._warped(min(max(value, self.low), self.high)) - low) / (high - low)

    def ticks(self, n: int = 5) -> list[float]:
        """Returns ``fixed_ticks``, or about ``n`` round values."""
        if self.fixed_ticks:
            return list(self.fixed_ticks)
        if self.scale == "linear":
            return _round_values(self.low, self.high, n)
        largest = max(abs(self.low), abs(self.high))
        smallest = self.linear_to if self.scale == "symlog" else self.low
        powers = range(math.floor(math.log10(smallest)), math.ceil(math.log10(largest)) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            each = [factor * 10.0**power for power in powers for factor in factors]
            if sum(self.low <= value <= self.high for value in each) <= 2 * n:
                break
        if self.scale == "symlog":
            each = sorted({*(-value for value in each), 0.0, *each})
        return [value for value in each if self.low <= value <= self.high]

    def _warped(self, value: float) -> float:
        match self.scale:
            case "linear":
                return value
            case "log":
                return math.log10(value)
        beyond = abs(value) / self.linear_to
        return math.copysign(beyond if beyond <= 1 else 1 + math.log10(beyond), value)


@dataclass(frozen=True, kw_only=True)
class Labeled:
    """The base class of marks and bars.

    Attributes:
        label: A short text beside it.
        is_doubtful: Whether the figure is unstable or too uncertain.
        is_emphasized: Whether it is that of the recommended cell.
    """

    label: str = ""
    is_doubtful: bool = False
    is_emphasized: bool = False

    @property
    def label_text(self) -> str:
        """The label, with a star for the recommended one."""
        return f"{STAR} {self.label}" if self.is_emphasized and self.label else self.label


@dataclass(frozen=True, kw_only=True)
class Point(Labeled):
    """A mark of a plot.

    Attributes:
        x: Its value on the horizontal axis.
        y: Its value on the vertical axis.
        cell: The cell of the record that it shows; empty if it shows none.
        title: A sentence with its values.
        x_interval: The 95 % interval of ``x``.
        y_interval: The 95 % interval of ``y``.
    """

    x: float
    y: float
    cell: str = ""
    title: str = ""
    x_interval: Interval | None = None
    y_interval: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one kind: marks, or the corners of a line.

    Attributes:
        name: Its entry in the legend; empty for none.
        points: The points.
        kind: Separate marks, marks joined by a line, a line without marks, or a dashed line without
            marks.
        style: Index of its color and of the shape of its marks.
    """

    name: str
    points: tuple[Point, ...]
    kind: Literal["marks", "joined", "line", "dashed"] = "marks"
    style: int = 0


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot of two quantities.

    Attributes:
        name: A name for files and anchors.
        title: Its heading.
        caption: Sentences on how to read it.
        summary: A description, for readers who cannot see it.
        x: The horizontal axis.
        y: The vertical axis.
        series: From back to front.
        limit: A value of ``y`` with a line across the plot, and the line's label.
    """

    name: str
    title: str
    caption: str
    summary: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    limit: tuple[float, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Bar(Labeled):
    """A bar of a chart, labeled with its record's cell: consecutive segments that start at 0.

    Attributes:
        values: The length of each segment, in the order of ``Bars.parts``.
        text: Its value in words.
        interval: The 95 % interval of the whole.
    """

    values: tuple[float, ...]
    text: str
    interval: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A chart of horizontal bars; see ``Plot``.

    Attributes:
        parts: The names of the segments; a single segment has no legend.
    """

    name: str
    title: str
    caption: str
    summary: str
    x: Axis
    parts: tuple[str, ...]
    bars: tuple[Bar, ...]


Chart = Plot | Bars

FRONT = "Pareto front"


def charts(
    records: Sequence[Record], *, recommended: Record | None, max_delta_ln_ppl: float
) -> list[Chart]:
    """Makes all plots for which comparable records have figures."""
    measured = [record for record in records if record.decode_tok_s is not None]
    made: list[Chart | None] = [
        speed_quality_plot(measured, recommended=recommended, max_delta_ln_ppl=max_delta_ln_ppl)
        or speed_chart(measured, recommended=recommended),
        scaling_plot(measured),
        step_time_chart(measured),
        speculation_plot(measured),
    ]
    return [chart for chart in made if chart is not None]


# --------------------------------------------------------------------------- speed and quality


def pareto_front(records: Sequence[Record]) -> list[Record]:
    """Returns the Pareto front by means, the fastest first: none is faster and loses less."""
    known = [r for r in records if r.decode_tok_s and r.delta_ln_ppl and not why_uncertain(r)]
    ordered = sorted(known, key=lambda r: (-_mean(r.decode_tok_s), _mean(r.delta_ln_ppl)))
    best: list[Record] = []
    for record in ordered:
        if not best or _mean(record.delta_ln_ppl) < _mean(best[-1].delta_ln_ppl):
            best.append(record)
    return best


def near_pareto_front(records: Sequence[Record], on_front: Sequence[Record]) -> list[Record]:
    """Returns the records off the front that no record of the front beats significantly."""
    known = [r for r in records if r.decode_tok_s and r.delta_ln_ppl and not why_uncertain(r)]

    def beaten(record: Record) -> bool:
        for other in on_front:
            if not (
                _mean(other.decode_tok_s) >= _mean(record.decode_tok_s)
                and _mean(other.delta_ln_ppl) <= _mean(record.delta_ln_ppl)
            ):
                continue
            speed, loss = speed_difference(record, other), loss_difference(record, other)
            if (speed and speed.is_significant) or (loss and loss.is_significant):
                return True
        return False

    return [r for r in known if r not in on_front and not beaten(r)]


def speed_quality_plot(
    records: Sequence[Record], *, recommended: Record | None, max_delta_ln_ppl: float
) -> Plot | None:
    """Makes the plot of quality over speed; None if fewer than two cells have both."""
    both = [r for r in records if r.delta_ln_ppl is not None]
    if len(both) < 2:
        return None
    on_front = pareto_front(both)
    points = {r.cell: _speed_quality_point(r, r is recommended) for r in both}
    losses = [value for p in points.values() for value in (p.y_interval or (p.y, p.y))]
    unit = max(max_delta_ln_ppl, 1e-3)
    low, high = min(*losses, -0.1 * unit), max(*losses, unit)
    scale: Scale = "symlog" if max(-low, high) > 5 * unit else "linear"
    stretch = 1.6 if scale == "symlog" else 1.08
    series = [
        Series(name=name, points=tuple(points[r.cell] for r in of_scheme), style=i)
        for i, (name, of_scheme) in enumerate(_by_scheme(both).items())
    ]
    if len(on_front) > 1:
        corners = [points[r.cell] for r in on_front]
        line = tuple(Point(x=p.x, y=p.y) for p in corners)
        series.insert(0, Series(name=FRONT, points=line, kind="dashed"))
    return Plot(
        name="speed-quality",
        title="Speed and quality",
        caption="Right is faster, down is closer to the reference; whiskers are 95% intervals. "
        "The Pareto front joins the cells that no other cell beats in both speed and quality. "
        "Hollow marks: the speed is unstable, or has fewer than three repeats."
        + (" The quality axis is linear near 0 and logarithmic beyond." * (scale == "symlog")),
        summary="; ".join(point.title for point in points.values()) + ".",
        x=_from_zero(
            "decode tokens/s", [p.x_interval[1] if p.x_interval else p.x for p in points.values()]
        ),
        y=Axis(
            label="quality loss, Δ ln perplexity",
            low=low * stretch,
            high=high * stretch,
            scale=scale,
            linear_to=unit,
        ),
        series=tuple(series),
        limit=(max_delta_ln_ppl, f"tolerance {max_delta_ln_ppl:g}"),
    )


def speed_chart(records: Sequence[Record], *, recommended: Record | None) -> Bars | None:
    """Makes the chart of speeds, for records without quality; None without any speed."""
    if not records:
        return None
    bars = tuple(
        Bar(
            label=record.cell,
            values=(_mean(record.decode_tok_s),),
            text=_uncertain(record.decode_tok_s),
            interval=record.decode_tok_s.ci95 if record.decode_tok_s else None,
            is_doubtful=is_doubtful(record),
            is_emphasized=record is recommended,
        )
        for record in sorted(records, key=lambda record: -_mean(record.decode_tok_s))
    )
    return Bars(
        name="speed",
        title="Speed",
        caption="Decode tokens per second of one request, with 95% intervals. Quality was not "
        "measured. Dashed outlines: the speed is unstable, or has fewer than three repeats.",
        summary="; ".join(f"{bar.label}: {bar.text} tok/s" for bar in bars) + ".",
        x=_from_zero("decode tokens/s", [max(b.interval or (0, b.values[0])) for b in bars]),
        parts=("decode tokens/s",),
        bars=bars,
    )


def _speed_quality_point(record: Record, is_emphasized: bool) -> Point:
    speed, loss = record.decode_tok_s, record.delta_ln_ppl
    assert speed is not None
    assert loss is not None
    doubtful = " (unstable or too few repeats)" * is_doubtful(record)
    return Point(
        x=speed.mean,
        y=loss.mean,
        label=record.cell,
        cell=record.cell,
        title=f"{record.cell}: {_uncertain(speed)} tok/s{doubtful}, "
        f"Δ ln ppl {uncertain(loss.mean, half_width(loss), signed=True)}",
        x_interval=_positive(speed.ci95),
        y_interval=loss.ci95,
        is_doubtful=is_doubtful(record),
        is_emphasized=is_emphasized,
    )


def _by_scheme(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        quant = record.config.get("quant", "–")
        name = f"{record.baseline}, {quant}" if record.baseline else quant
        groups.setdefault(name, []).append(record)
    return groups


# --------------------------------------------------------------------------- several GPUs


def scaling_plot(records: Sequence[Record]) -> Plot | None:
    """Makes the plot of speed over ranks, with ideal scaling; None with one number of ranks."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        config = record.config
        same = (config.get(name, getattr(EngineConfig, name)) for name in _SAME_BUT_RANKS)
        key = [record.baseline, *same]
        groups.setdefault(repr(key), []).append(record)
    several = [
        sorted(group, key=_ranks) for group in groups.values() if len(set(map(_ranks, group))) > 1
    ]
    if not several:
        return None
    series, sentences, values = [], [], []
    for style, group in enumerate(several):
        first = group[0]
        points = []
        for record in group:
            speed = record.decode_tok_s
            assert speed is not None
            times = speed.mean / _mean(first.decode_tok_s)
            title = f"{record.cell}: {_uncertain(speed)} tok/s"
            if record is not first:
                title += f", {times:.2f} × that on {_ranks(first)}"
            points.append(
                Point(
                    x=_ranks(record),
                    y=speed.mean,
                    label=f"{times:.2f} ×" if record is not first else "",
                    cell=record.cell,
                    title=title,
                    y_interval=_positive(speed.ci95),
                    is_doubtful=is_doubtful(record),
                )
            )
            sentences.append(title)
        ideal = tuple(Point(x=_ranks(r), y=points[0].y * _ranks(r) / _ranks(first)) for r in group)
        values += [p.y for p in ideal] + [max(p.y_interval or (0, p.y)) for p in points]
        series.append(Series(name="", points=ideal, kind="dashed", style=style))
        name = first.cell.replace(f"/tp{_ranks(first)}", "")
        series.append(Series(name=name, points=tuple(points), kind="joined", style=style))
    ranks = [_ranks(record) for group in several for record in group]
    pad = 0.08 * (max(ranks) - min(ranks))
    unit = "GPUs" if records[0].provenance.get("device", {}).get("kind") == "cuda" else "ranks"
    return Plot(
        name="scaling",
        title=f"Scaling over {unit}",
        caption=f"Dashed: ideal scaling, in proportion to the {unit}. Labels: speed relative to "
        "the "
        f"fewest {unit} of the same configuration. Hollow marks: the speed is unstable, or has "
        "fewer than three repeats.",
        summary="; ".join(sentences) + ".",
        x=Axis(
            label=unit,
            low=min(ranks) - pad,
            high=max(ranks) + 2 * pad,
            fixed_ticks=tuple(map(float, sorted(set(ranks)))),
        ),
        y=_from_zero("decode tokens/s", values),
        series=tuple(series),
    )


_SAME_BUT_RANKS = (
    *("quant", "head", "draft", "draft_quant", "draft_tokens", "draft_policy"),
    "assume_acceptance",
    *("execution", "all_reduce", "dtype", "max_batch_size"),
)


def _ranks(record: Record) -> int:
    return record.config.get("tensor_parallel", 1)


# --------------------------------------------------------------------------- time of a step


@dataclass(frozen=True, kw_only=True)
class StepParts:
    """Where the time of a decode step goes, in seconds.

    Attributes:
        record: The record.
        weights_s: Time to read the weights at the measured bandwidth.
        cache_s: Time to read the KV cache at that bandwidth.
        execution_s: Time that the fastest execution mode saves with the same weights and ranks.
        rest_s: The remaining time above the memory-bandwidth limit, also in the fastest mode.
        step_s: The measured time of the step.
        fastest: The cell of the fastest execution mode, where that is not this cell.
    """

    record: Record
    weights_s: float
    cache_s: float
    execution_s: float
    rest_s: float
    step_s: float
    fastest: str = ""

    @property
    def limit_s(self) -> float:
        """The memory-bandwidth limit: the time to read weights and cache once."""
        return self.weights_s + self.cache_s


def step_parts(records: Sequence[Record]) -> list[StepParts]:
    """Divides the step times of records that have the needed figures, the fastest first.

    The memory-bandwidth limit is MBU times the step time, by MBU's definition. It is divided in
    proportion to the bytes of weights and cache. A part that would be negative, because a step was
    faster than the measured bandwidth allows, is 0.
    """
    known = []
    for record in records:
        engine, step, mbu, work = record.engine or {}, record.tpot_s, record.mbu, record.workload
        weights = engine.get("weight_bytes_per_step") or 0
        if step is None or mbu is None or work is None or weights == 0:
            continue
        if min(step.mean, mbu.mean) <= 0:
            continue
        tokens = work.batch * (work.prompt_tokens + work.new_tokens / 2)
        share = weights / (weights + tokens * (engine.get("kv_bytes_per_token") or 0))
        known.append((record, step.mean, step.mean * mbu.mean, share))
    parts = []
    for record, step_s, limit_s, share in known:
        rivals = [
            (r, s) for r, s, *_ in known if _same_but_execution(r) == _same_but_execution(record)
        ]
        fastest, fastest_s = min(rivals, key=lambda rival: rival[1])
        limit_s = min(limit_s, step_s)
        execution_s = min(step_s - fastest_s, step_s - limit_s)
        parts.append(
            StepParts(
                record=record,
                weights_s=limit_s * share,
                cache_s=limit_s * (1 - share),
                execution_s=execution_s,
                rest_s=step_s - limit_s - execution_s,
                step_s=step_s,
                fastest=fastest.cell if fastest is not record else "",
            )
        )
    return sorted(parts, key=lambda part: part.step_s)


EAGER_ON_A_GPU = (
    " In eager mode Python launches every operation, and dequantized weights are written to "
    "memory. If the time does not fall with the bytes read, for example with more ranks, the GPU "
    "waits for the host, whose speed varies."
)

STEP_PARTS = (
    "reading weights",
    "reading the KV cache",
    "saved by the fastest execution mode",
    "beyond the memory-bandwidth limit",
)


def step_time_chart(records: Sequence[Record]) -> Bars | None:
    """Makes the chart of step times and the memory-bandwidth limit; None if no record has both."""
    parts = step_parts(records)
    if not parts:
        return None
    bars = []
    for part in parts:
        values = (part.weights_s, part.cache_s, part.execution_s, part.rest_s)
        achieved, predicted = (significant(s * 1e3, 3) for s in (part.step_s, part.limit_s))
        bars.append(
            Bar(
                label=part.record.cell,
                values=tuple(1e3 * value for value in values),
                text=f"{achieved} ms; limit {predicted} ms, {percent(part.limit_s / part.step_s)}",
                is_doubtful=is_doubtful(part.record),
            )
        )
    return Bars(
        name="step-time",
        title="Where a step's time goes",
        caption="One decode step must read the weights and the KV cache once. The time for this at "
        "the measured bandwidth is the memory-bandwidth limit. The time beyond it has two parts: "
        "the time that the fastest execution mode saves with the same weights, and the time that "
        "remains in that mode."
        + EAGER_ON_A_GPU
        * any(map(_is_eager_on_a_gpu, (part.record for part in parts))),
        summary="; ".join(f"{bar.label}: {bar.text}" for bar in bars) + ".",
        x=_from_zero("ms per step", [sum(bar.values) for bar in bars]),
        parts=STEP_PARTS,
        bars=tuple(bars),
    )


def _is_eager_on_a_gpu(record: Record) -> bool:
    on = record.provenance.get("device", {}).get("kind")
    return on == "cuda" and (record.engine or {}).get("execution") == "eager"


def _same_but_execution(record: Record) -> str:
    config = record.config
    names = ("quant", "head", "tensor_parallel", "dtype", "max_batch_size")
    return repr([record.baseline, *(config.get(name) for name in names)])


# --------------------------------------------------------------------------- speculation


def speculation_plot(records: Sequence[Record]) -> Plot | None:
    """Makes the curve of speed over acceptance; None if no cell's steps were timed."""
    cells = [cell for cell in drafting(records) if cell.costs]
    if not cells:
        return None
    series, values = [], [1.0]
    for style, cell in enumerate(cells):
        record = cell.record
        curve = [Point(x=p / 50, y=cell.gain_at(p / 50)) for p in range(51)]
        series.append(Series(name=record.cell, points=tuple(curve), kind="line", style=style))
        values += [point.y for point in curve]
        seen = cell.figures.assumed_acceptance
        seen = next(iter(cell.figures.acceptance), None) if seen is None else seen
        if cell.gain is None or seen is None:
            continue
        times = math.exp(min(cell.gain.mean, 50.0))
        low, high = (math.exp(min(end, 50.0)) for end in cell.gain.interval())
        values.append(times)
        point = Point(
            x=seen,
            y=times,
            cell=record.cell,
            label="measured",
            title=f"{record.cell}, measured: {times:.2f} × plain decoding",
            y_interval=(low, min(high, 2 * max(values))),
            is_doubtful=is_doubtful(record),
        )
        series.append(Series(name="", points=(point,), style=style))
    return Plot(
        name="speculation",
        title="When speculation pays",
        caption="Curves: speed relative to plain decoding with the best number of drafts, computed "
        "from measured step times, if each draft is accepted with the same probability. Drafting "
        "pays above 1. Marks: the measured speed, at the acceptance of first drafts. A mark can "
        "lie above its curve, since drafting is switched off where it does not pay.",
        summary="; ".join(f"{cell.record.cell}: {cell.explanation}" for cell in cells) + ".",
        x=Axis(
            label="acceptance of a draft",
            low=0.0,
            high=1.02,
            fixed_ticks=(0, 0.2, 0.4, 0.6, 0.8, 1),
        ),
        y=_from_zero("speed × plain decoding", values),
        series=tuple(series),
        limit=(1.0, "plain decoding"),
    )


# --------------------------------------------------------------------------- small tools


def _mean(figure: Figure | None) -> float:
    assert figure is not None, "only measured records are drawn"
    return figure.mean


def _uncertain(figure: Figure | None) -> str:
    assert figure is not None, "only measured records are drawn"
    return uncertain(figure.mean, half_width(figure))


def _positive(interval: Interval | None) -> Interval | None:
    """Returns an interval of a speed, limited to positive values."""
    return None if interval is None else (max(0.0, interval[0]), max(0.0, interval[1]))


def _from_zero(label: str, values: Sequence[float]) -> Axis:
    return Axis(label=label, low=0.0, high=1.05 * max(values))


def _round_values(low: float, high: float, n: int) -> list[float]:
    rough = (high - low) / n
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]
