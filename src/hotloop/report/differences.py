"""Differences between two records, in speed and in quality, with their intervals.

Speeds are compared as a ratio: the difference of the means of their logarithms. If both records
drafted on the same prompts, repeats are paired, because the text of a repeat decides how many
drafts are accepted. Otherwise repeats are independent (Welch's t), since they differ only by noise.

Qualities are compared by the difference of ln perplexity, always paired by window of text: on
other text, or on other windows, perplexities cannot be compared. Windows are clustered as in the
records, by article or not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from hotloop.bench.record import Figure, Record
from hotloop.bench.statistics import mean_figure, t_critical


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of two means, with its standard error.

    Attributes:
        mean: The estimate.
        se: Its standard error.
        df: Degrees of freedom of Student's t.
        paired: Whether samples were paired.
    """

    mean: float
    se: float
    df: int
    paired: bool

    def interval(self, *, confidence: float = 0.95) -> tuple[float, float]:
        """Returns the two-sided confidence interval."""
        half = t_critical(self.df, confidence=confidence) * self.se
        return self.mean - half, self.mean + half

    @property
    def is_significant(self) -> bool:
        """Whether the 95 % interval excludes 0."""
        low, high = self.interval()
        return low > 0 or high < 0


def speed_difference(a: Record, b: Record) -> Difference | None:
    """Compares decode speeds: ln(b / a). None if a record has fewer than two repeats."""
    logs = _logs(a.decode_tok_s), _logs(b.decode_tok_s)
    if not all(logs):
        return None
    drafted = a.speculation is not None and b.speculation is not None
    return _difference(*logs, paired=drafted and a.workload == b.workload)


def loss_difference(a: Record, b: Record) -> Difference | None:
    """Compares losses: ln perplexity of b minus that of a, by window.

    None if a record has no quality, or they were not scored on the same windows.
    """
    logs = _logs(a.perplexity), _logs(b.perplexity)
    if not all(logs) or not same_windows(a, b) or len(logs[0]) != len(logs[1]):
        return None
    assert a.quality_protocol is not None, "the windows are the same"
    changes = [after - before for before, after in zip(*logs, strict=True)]
    articles = a.quality_protocol.articles
    loss = mean_figure(changes, clusters=articles)
    if loss.se is None:
        return None
    df = len(articles or changes) - 1
    return Difference(mean=loss.mean, se=loss.se, df=df, paired=True)


def same_windows(a: Record, b: Record) -> bool:
    """Returns whether two records were scored on the same windows of the same text."""
    windows = [
        (p.text_sha256, p.window, p.n_windows, p.articles)
        for p in (a.quality_protocol, b.quality_protocol)
        if p is not None
    ]
    return len(windows) == 2 and windows[0] == windows[1]


def format_speed_change(speed: Difference | None) -> str:
    """Formats a difference of log speeds as a change in percent, with its interval."""
    if speed is None:
        return "–"
    ends = (_change(end) for end in (speed.mean, *speed.interval()))
    return "{} [{}, {}]".format(*ends)


def format_loss_change(loss: Difference | None) -> str:
    """Formats a difference of ln perplexity, with its interval."""
    if loss is None:
        return "–"
    if loss.mean == loss.se == 0:
        return "0"
    low, high = loss.interval()
    return f"{loss.mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _change(log_ratio: float) -> str:
    percents = 100 * math.expm1(min(log_ratio, 50.0))
    return f"{percents:+.0f}%" if abs(percents) >= 10 else f"{percents:+.1f}%"


def _logs(figure: Figure | None) -> Sequence[float]:
    """Returns the logarithms of a figure's samples; empty unless two or more, all above 0."""
    if figure is None or figure.n < 2 or min(figure.samples) <= 0:
        return ()
    return [math.log(sample) for sample in figure.samples]


def _difference(a: Sequence[float], b: Sequence[float], *, paired: bool) -> Difference:
    mean = statistics.fmean(b) - statistics.fmean(a)
    if paired and len(a) == len(b):
        changes = [after - before for before, after in zip(a, b, strict=True)]
        se = statistics.stdev(changes) / math.sqrt(len(changes))
        return Difference(mean=mean, se=se, df=len(changes) - 1, paired=True)
    of_a, of_b = (statistics.variance(samples) / len(samples) for samples in (a, b))
    squared = of_a + of_b
    if squared == 0:
        return Difference(mean=mean, se=0.0, df=len(a) + len(b) - 2, paired=False)
    df = squared**2 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1))  # Welch-Satterthwaite
    return Difference(mean=mean, se=math.sqrt(squared), df=max(1, math.floor(df)), paired=False)
