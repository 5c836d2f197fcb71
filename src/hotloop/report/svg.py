"""Draws plots as inline SVG, in the colors of the page's style sheet.

Every chart is drawn for a given width, so that a page can have one drawing for telephones and one
for screens, with equal text size. Shapes and hatching carry the same information as colors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from hotloop.printable import printable
from hotloop.report import labels
from hotloop.report.labels import Box, place_labels
from hotloop.report.plots import Axis, Bar, Bars, Chart, Plot, Point, Series

N_STYLES = 6
"""The number of colors and shapes of marks, which further series reuse."""

TEXT = 13
"""Size of text, in units of the drawing, which are pixels at its nominal width."""

CHARACTER = labels.CHARACTER * TEXT
"""Mean width of a character."""

_RADIUS = 5.5


@dataclass(frozen=True, kw_only=True)
class Size:
    """The size to draw for.

    Attributes:
        name: A name for ids and classes.
        width: The width, in units of the drawing.
        height: The height of a plot; the height of a bar chart depends on the number of bars.
        is_narrow: Labels of bars are above them.
    """

    name: str
    width: int
    height: int
    is_narrow: bool = False


WIDE = Size(name="wide", width=920, height=460)
NARROW = Size(name="narrow", width=380, height=400, is_narrow=True)


def draw(chart: Chart, size: Size, *, prefix: str = "") -> Markup:
    """Draws a chart; ``prefix`` makes its ids unique in a page."""
    name = f"{prefix}{chart.name}-{size.name}"
    if isinstance(chart, Bars):
        height, body = _bars(chart, size)
    else:
        height, body = size.height, _plot(chart, size)
    return _tag(
        '<svg class="chart {0}" viewBox="0 0 {1} {2}" role="img" aria-labelledby="{3}-title '
        '{3}-summary"><title id="{3}-title">{4}</title><desc id="{3}-summary">{5}</desc>{6}</svg>',
        size.name,
        size.width,
        height,
        name,
        chart.title,
        chart.summary,
        body,
    )


def legend(chart: Chart) -> list[tuple[Markup, str]]:
    """Returns the legend of a chart: a drawing and a name for each entry."""
    if isinstance(chart, Bars):
        if len(chart.parts) == 1:
            return []
        swatches = [
            _tag('<rect class="part p{}" x="1" y="3" width="20" height="10"/>', i)
            for i in range(len(chart.parts))
        ]
        return [(_swatch(s), name) for s, name in zip(swatches, chart.parts, strict=True)]
    entries = []
    for series in filter(lambda s: s.name, chart.series):
        line = '<line class="line {} s{}" x1="1" y1="8" x2="21" y2="8"/>'
        drawn = (
            _tag(line, _line_kind(series), _style(series)) if series.kind != "marks" else Markup("")
        )
        if series.kind in ("marks", "joined"):
            drawn += _mark(11, 8, series, Point(x=0, y=0))
        entries.append((_swatch(drawn), series.name))
    return entries


def _swatch(drawn: Markup) -> Markup:
    return _tag('<svg class="swatch" viewBox="0 0 22 16" aria-hidden="true">{}</svg>', drawn)


def _tag(template: str, *values: object) -> Markup:
    """Fills values into markup; texts are escaped, floats rounded to a hundredth of a pixel."""
    return Markup(template).format(
        *(
            printable(v)
            if isinstance(v, str) and not isinstance(v, Markup)
            else f"{v:.2f}".rstrip("0").rstrip(".")
            if isinstance(v, float)
            else v
            for v in values
        )
    )


def _joined(parts: Iterable[Markup]) -> Markup:
    return Markup("").join(parts)


def _style(series: Series) -> int:
    return series.style % N_STYLES


# --------------------------------------------------------------------------- plots


@dataclass(frozen=True)
class _Frame:
    """The rectangle of a plot's data, and the positions of values in it."""

    left: float
    top: float
    right: float
    bottom: float
    x: Axis
    y: Axis

    def across(self, value: float) -> float:
        return self.left + self.x.position(value) * (self.right - self.left)

    def up(self, value: float) -> float:
        return self.bottom - self.y.position(value) * (self.bottom - self.top)


def _plot(plot: Plot, size: Size) -> Markup:
    y_ticks = [(tick, _shown(tick)) for tick in plot.y.ticks(6)]
    left = 14 + CHARACTER * max((len(text) for _, text in y_ticks), default=1)
    frame = _Frame(left, 30, size.width - 12, size.height - 44, plot.x, plot.y)
    parts = [_axes(plot, frame, y_ticks, narrow=size.is_narrow)]
    if plot.limit is not None:
        parts.append(_limit(*plot.limit, frame))
    for series in plot.series:
        parts.append(_line(series, frame))
        parts += [_whiskers(point, series, frame) for point in series.points]
    with_marks = [series for series in plot.series if series.kind in ("marks", "joined")]
    for series in with_marks:
        parts += [_placed_mark(point, series, frame) for point in series.points]
    parts.append(_labels(with_marks, frame, size, plot.limit))
    return _joined(parts)


def _axes(
    plot: Plot, frame: _Frame, y_ticks: Sequence[tuple[float, str]], *, narrow: bool
) -> Markup:
    parts = []
    last = math.inf
    for tick, text in sorted(y_ticks):
        y = frame.up(tick)
        if abs(y - last) < 0.9 * TEXT:
            continue
        last = y
        parts.append(
            _tag(
                '<line class="grid" x1="{0}" y1="{1}" x2="{2}" y2="{1}"/>'
                '<text class="tick" x="{3}" y="{4}" text-anchor="end">{5}</text>',
                frame.left,
                y,
                frame.right,
                frame.left - 7,
                y + 4.5,
                text,
            )
        )
    for tick in plot.x.ticks(4 if narrow else 8):
        x = frame.across(tick)
        parts.append(
            _tag(
                '<line class="grid" x1="{0}" y1="{1}" x2="{0}" y2="{2}"/>'
                '<text class="tick" x="{0}" y="{3}" text-anchor="middle">{4}</text>',
                x,
                frame.top,
                frame.bottom,
                frame.bottom + 18,
                _shown(tick),
            )
        )
    parts.append(
        _tag(
            '<line class="axis" x1="{0}" y1="{1}" x2="{2}" y2="{1}"/>'
            '<text class="axis-label" x="{2}" y="{3}" text-anchor="end">{4} →</text>'
            '<text class="axis-label" x="2" y="16">↑ {5}</text>',
            frame.left,
            frame.bottom,
            frame.right,
            frame.bottom + 38,
            plot.x.label,
            plot.y.label,
        )
    )
    return _joined(parts)


def _limit(value: float, label: str, frame: _Frame) -> Markup:
    return _tag(
        '<line class="limit" x1="{0}" y1="{1}" x2="{2}" y2="{1}"/>'
        '<text class="limit-label" x="{2}" y="{3}" text-anchor="end">{4}</text>',
        frame.left,
        frame.up(value),
        frame.right,
        frame.up(value) - 6,
        label,
    )


def _line(series: Series, frame: _Frame) -> Markup:
    if series.kind == "marks" or len(series.points) < 2:
        return Markup("")
    corners = " ".join(f"{frame.across(p.x):.2f},{frame.up(p.y):.2f}" for p in series.points)
    line = '<polyline class="line {} s{}" points="{}"/>'
    return _tag(line, _line_kind(series), _style(series), corners)


def _line_kind(series: Series) -> str:
    """Returns a line's class: a dashed line with a name is the Pareto front."""
    return "front" if series.kind == "dashed" and series.name else series.kind


def _whiskers(point: Point, series: Series, frame: _Frame) -> Markup:
    parts = []
    x, y = frame.across(point.x), frame.up(point.y)
    if point.x_interval is not None:
        low, high = map(frame.across, point.x_interval)
        parts.append(f"M{low:.2f} {y:.2f}H{high:.2f}")
        parts += [f"M{end:.2f} {y - 3:.2f}v6" for end in (low, high)]
    if point.y_interval is not None:
        low, high = map(frame.up, point.y_interval)
        parts.append(f"M{x:.2f} {low:.2f}V{high:.2f}")
        parts += [f"M{x - 3:.2f} {end:.2f}h6" for end in (low, high)]
    path = "".join(parts)
    return _tag('<path class="whisker s{}" d="{}"/>', _style(series), path) if path else Markup("")


def _placed_mark(point: Point, series: Series, frame: _Frame) -> Markup:
    x, y = frame.across(point.x), frame.up(point.y)
    ring = _tag('<circle class="ring" cx="{}" cy="{}" r="{}"/>', x, y, 2.0 * _RADIUS)
    return _tag(
        '<g data-cell="{}" data-x="{}" data-y="{}"><title>{}</title>{}{}</g>',
        point.cell,
        repr(point.x),
        repr(point.y),
        point.title,
        ring if point.is_emphasized else Markup(""),
        _mark(x, y, series, point),
    )


def _mark(x: float, y: float, series: Series, point: Point) -> Markup:
    r, d = _RADIUS, 1.35 * _RADIUS
    shapes = (
        f"M{x - r:.2f} {y:.2f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        f"M{x - r:.2f} {y - r:.2f}h{2 * r}v{2 * r}h{-2 * r}z",
        f"M{x:.2f} {y - 1.2 * r:.2f}l{1.15 * r:.2f} {2.1 * r:.2f}h{-2.3 * r:.2f}z",
        f"M{x:.2f} {y - d:.2f}l{d:.2f} {d:.2f}l{-d:.2f} {d:.2f}l{-d:.2f} {-d:.2f}z",
        f"M{x:.2f} {y + 1.2 * r:.2f}l{1.15 * r:.2f} {-2.1 * r:.2f}h{-2.3 * r:.2f}z",
        f"M{x - r:.2f} {y - 0.4 * r:.2f}h{2 * r}v{0.8 * r}h{-2 * r}z",
    )
    style = _style(series)
    hollow = " hollow" * point.is_doubtful
    return _tag('<path class="mark s{}{}" d="{}"/>', style, hollow, shapes[style])


def _labels(
    several: Sequence[Series], frame: _Frame, size: Size, limit: tuple[float, str] | None
) -> Markup:
    taken = []
    if limit is not None:
        y = frame.up(limit[0])
        width = CHARACTER * len(limit[1])
        taken.append(Box(frame.right - width, y - 6 - TEXT, frame.right, y))
    marks = [
        (frame.across(p.x), frame.up(p.y), p.label_text, p.is_emphasized)
        for series in several
        for p in series.points
    ]
    for point in (p for series in several for p in series.points):
        if point.x_interval is not None:
            (low, high), y = map(frame.across, point.x_interval), frame.up(point.y)
            taken.append(Box(low, y - 3, high, y + 3))
    bounds = Box(frame.left, 20, size.width, frame.bottom)
    return _joined(
        _tag(
            '<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>',
            "label strong" if label.is_emphasized else "label",
            label.x,
            label.y,
            label.anchor,
            label.text,
        )
        for label in place_labels(marks, bounds, size=TEXT, taken=taken)
    )


def _shown(value: float) -> str:
    return f"{value:,.10g}" if abs(value) < 1e7 else f"{value:.0e}"


# --------------------------------------------------------------------------- bars


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """The positions of bars and their texts: from ``left`` to ``right``, each in a ``row``."""

    x: Axis
    left: float
    right: float
    row: float
    is_narrow: bool

    top: float = 6.0
    thick: float = 14.0

    def across(self, value: float) -> float:
        return self.left + self.x.position(max(0.0, value)) * (self.right - self.left)


def _bars(chart: Bars, size: Size) -> tuple[float, Markup]:
    """Draws bars below each other; returns the height and the drawing."""
    longest = max(len(bar.label_text) for bar in chart.bars)
    texts = CHARACTER * max(len(bar.text) for bar in chart.bars) + 12
    layout = _Layout(
        x=chart.x,
        left=4.0 if size.is_narrow else min(0.42 * size.width, CHARACTER * longest + 16),
        right=size.width - (8.0 if size.is_narrow else texts),
        row=56.0 if size.is_narrow else 30.0,
        is_narrow=size.is_narrow,
    )
    bottom = layout.top + layout.row * len(chart.bars)
    parts = [
        _tag(
            '<line class="grid" x1="{0}" y1="{1}" x2="{0}" y2="{2}"/>'
            '<text class="tick" x="{0}" y="{3}" text-anchor="{4}">{5}</text>',
            layout.across(tick),
            layout.top,
            bottom,
            bottom + 17,
            "start" if tick == 0 and size.is_narrow else "middle",
            _shown(tick),
        )
        for tick in chart.x.ticks(4 if size.is_narrow else 6)
    ]
    parts.append(
        _tag(
            '<text class="axis-label" x="{}" y="{}" text-anchor="end">{} →</text>',
            layout.right,
            bottom + 36,
            chart.x.label,
        )
    )
    for i, bar in enumerate(chart.bars):
        parts.append(_bar(bar, chart.parts, layout, layout.top + i * layout.row))
    return bottom + 42, _joined(parts)


def _bar(bar: Bar, names: Sequence[str], layout: _Layout, y: float) -> Markup:
    at = y + (
        layout.row - layout.thick - 5 if layout.is_narrow else (layout.row - layout.thick) / 2
    )
    drawn, start = [], 0.0
    for i, value in enumerate(bar.values):
        begin, end = layout.across(start), layout.across(start + value)
        start += value
        if value > 0:
            drawn.append(
                _tag(
                    '<rect class="part p{}" x="{}" y="{}" width="{}" height="{}" data-value="{}">'
                    "<title>{}: {}</title></rect>",
                    i,
                    begin,
                    at,
                    max(0.5, end - begin),
                    layout.thick,
                    repr(value),
                    names[i],
                    f"{value:.4g}",
                )
            )
    if bar.is_doubtful:
        drawn.append(
            _tag(
                '<rect class="doubt" x="{}" y="{}" width="{}" height="{}"/>',
                layout.across(0),
                at,
                layout.across(start) - layout.across(0),
                layout.thick,
            )
        )
    if bar.interval is not None:
        low, high = map(layout.across, bar.interval)
        ends = "".join(f"M{end:.2f} {at + layout.thick / 2 - 4:.2f}v8" for end in (low, high))
        path = f"M{low:.2f} {at + layout.thick / 2:.2f}H{high:.2f}{ends}"
        drawn.append(_tag('<path class="whisker ink" d="{}"/>', path))
    drawn += _bar_texts(bar, layout, y, at)
    return _tag(
        '<g data-cell="{0}"><title>{0}: {1}</title>{2}</g>', bar.label, bar.text, _joined(drawn)
    )


def _bar_texts(bar: Bar, layout: _Layout, y: float, at: float) -> list[Markup]:
    """Draws a bar's name and value: above it in a narrow drawing, else beside it."""
    room = layout.right - layout.left if layout.is_narrow else layout.left - 16
    name = bar.label_text
    if len(name) > (most := int(room / CHARACTER)):
        name = name[: most - 1] + "…"
    kind = "label strong" if bar.is_emphasized else "label"
    line = '<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>'
    if layout.is_narrow:
        return [
            _tag(line, kind, layout.left, y + 14, "start", name),
            _tag(line, "label value", layout.left, y + 29, "start", bar.text),
        ]
    return [
        _tag(line, kind, layout.left - 10, at + 11.5, "end", name),
        _tag(line, "label value", layout.right + 8, at + 11.5, "start", bar.text),
    ]
