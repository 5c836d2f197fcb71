"""Draws plots as PNG files, with matplotlib, which the extra ``png`` installs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from hotloop.errors import UnsupportedError
from hotloop.printable import printable
from hotloop.report.labels import Box, place_labels
from hotloop.report.plots import Bars, Chart, Plot, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#14437a", "#c2570c", "#2c8f5f", "#7c3794", "#a98200", "#5f6873")
MARKERS = ("o", "s", "^", "D", "v", "_")
PARTS = (("#14437a", ""), ("#8fb8e6", ""), ("#c9721b", "///"), ("#dfe3e8", ""))
"""Colors and hatches of the segments of bars."""

DPI = 160

LABEL_SIZE = 8.5

_ALIGNMENTS = {"start": "left", "middle": "center", "end": "right"}


def check_library() -> None:
    """Checks that matplotlib is installed.

    Raises:
        UnsupportedError: It is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"--png: matplotlib cannot be imported ({error}): pip install 'hotloop[png]'."
        ) from error


def write_png(chart: Chart, file: BinaryIO) -> None:
    """Draws a chart into a file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = 1.6 + 0.34 * len(chart.bars) if isinstance(chart, Bars) else 5.0
    figure = Figure(figsize=(9.5, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if isinstance(chart, Bars):
        _draw_bars(chart, axes)
    else:
        _draw_plot(chart, axes)
    _draw_texts(chart, figure, axes)
    if isinstance(chart, Plot):
        _draw_labels(chart, figure, axes)
    figure.savefig(file, format="png", dpi=DPI)


def _draw_texts(chart: Chart, figure: Figure, axes: Axes) -> None:
    axes.set_title(_text(chart.title), loc="left", fontweight="bold", **_LITERAL)
    axes.set_xlabel(_text(chart.x.label), **_LITERAL)
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        legend = figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize="small")
        for text in legend.get_texts():
            text.set_parse_math(False)


_LITERAL: dict[str, Any] = {"parse_math": False}
"""Options with which dollar signs in text are not interpreted."""


def _text(text: str) -> str:
    return printable(text)


def _draw_plot(plot: Plot, axes: Axes) -> None:
    for side, axis in (("x", plot.x), ("y", plot.y)):
        scale: dict[str, Any] = {"linthresh": axis.linear_to} if axis.scale == "symlog" else {}
        getattr(axes, f"set_{side}scale")(axis.scale, **scale)
        getattr(axes, f"set_{side}lim")(axis.low, axis.high)
        ticks = axis.ticks(7)
        getattr(axes, f"set_{side}ticks")(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(color="#d5dae0", linewidth=0.7)
    axes.set_ylabel(_text(plot.y.label), **_LITERAL)
    if plot.limit is not None:
        value, label = plot.limit
        axes.axhline(value, color="#8a4b00", linestyle=":", linewidth=1.2)
        axes.annotate(
            _text(label),
            (plot.x.high, value),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize="small",
            color="#59626d",
            **_LITERAL,
        )
    for series in plot.series:
        _draw_series(series, axes)


def _draw_series(series: Series, axes: Axes) -> None:
    color = COLORS[series.style % len(COLORS)]
    label = _text(series.name) if series.name else "_nolegend_"
    xs, ys = [p.x for p in series.points], [p.y for p in series.points]
    if series.kind in ("line", "dashed", "joined"):
        dashed = series.kind == "dashed"
        axes.plot(
            xs,
            ys,
            color="#59626d" if dashed and series.name else color,
            linestyle="--" if dashed else "-",
            linewidth=1.3,
            label=label if series.kind != "joined" else "_nolegend_",
        )
    if series.kind in ("line", "dashed"):
        return
    for i, point in enumerate(series.points):
        axes.errorbar(
            point.x,
            point.y,
            xerr=_reach(point.x, point.x_interval),
            yerr=_reach(point.y, point.y_interval),
            fmt=MARKERS[series.style % len(MARKERS)],
            color=color,
            markerfacecolor="white" if point.is_doubtful else color,
            markersize=9 if point.is_emphasized else 6.5,
            markeredgecolor="black" if point.is_emphasized else color,
            capsize=2.5,
            elinewidth=1,
            label=label if i == 0 else "_nolegend_",
        )


def _draw_labels(plot: Plot, figure: Figure, axes: Axes) -> None:
    """Labels the marks after the layout is final. Positions are in points, from the top left."""
    figure.draw_without_rendering()
    height = 72 * figure.get_figheight()

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = axes.transData.transform((x, y)) / figure.dpi * 72
        return float(across), height - float(up)

    points = [
        point
        for series in plot.series
        if series.kind in ("marks", "joined")
        for point in series.points
    ]
    marks = [(*place(p.x, p.y), _text(p.label_text), p.is_emphasized) for p in points]
    taken = []
    for point in points:
        if point.x_interval is not None:
            (low, y), (high, _) = (place(end, point.y) for end in point.x_interval)
            taken.append(Box(low, y - 2, high, y + 2))
    left, bottom = place(plot.x.low, plot.y.low)
    right, top = place(plot.x.high, plot.y.high)
    bounds = Box(left, top - 10, right + 10, bottom)
    for label in place_labels(marks, bounds, size=LABEL_SIZE, taken=taken):
        axes.annotate(
            label.text,
            (label.x, height - label.y),
            xycoords="figure points",
            ha=_ALIGNMENTS[label.anchor],
            fontsize=LABEL_SIZE,
            fontweight="bold" if label.is_emphasized else "normal",
            annotation_clip=False,
            **_LITERAL,
        )


def _reach(value: float, interval: tuple[float, float] | None) -> list[list[float]] | None:
    """Returns how far an interval reaches below and above a value."""
    if interval is None:
        return None
    return [[max(0.0, value - interval[0])], [max(0.0, interval[1] - value)]]


def _draw_bars(chart: Bars, axes: Axes) -> None:
    places = range(len(chart.bars))
    starts = [0.0] * len(chart.bars)
    for i, name in enumerate(chart.parts):
        widths = [bar.values[i] for bar in chart.bars]
        color, hatch = PARTS[i]
        axes.barh(
            places,
            widths,
            left=starts,
            height=0.55,
            color=color,
            hatch=hatch,
            edgecolor="black",
            linewidth=0.4,
            label=_text(name) if len(chart.parts) > 1 else "_nolegend_",
        )
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for place, (bar, end) in enumerate(zip(chart.bars, starts, strict=True)):
        reach = _reach(end, bar.interval)
        if reach is not None:
            axes.errorbar(end, place, xerr=reach, fmt="none", ecolor="black", capsize=3)
        doubt = " (unstable or too few repeats)" if bar.is_doubtful else ""
        axes.annotate(
            _text(bar.text + doubt),
            (max([end, *(bar.interval or ())]), place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
            **_LITERAL,
        )
    names = [_text(bar.label_text) for bar in chart.bars]
    axes.set_yticks(list(places), names, **_LITERAL)
    axes.set_ylim(len(chart.bars) - 0.4, -0.6)
    axes.set_xlim(chart.x.low, chart.x.high * 1.5)
    axes.grid(axis="x", color="#d5dae0", linewidth=0.7)


def file_names(charts: Sequence[Chart]) -> list[str]:
    """Names the file of each chart; several of one kind are numbered."""
    counts: dict[str, int] = {}
    found = []
    for chart in charts:
        n = counts[chart.name] = counts.get(chart.name, 0) + 1
        found.append(f"{chart.name}-{n}.png" if n > 1 else f"{chart.name}.png")
    return found
