"""Confidence intervals of means and shares: Student's t and Wilson's score, without scipy.

One sample is one independent observation: a whole timed run, or a whole window of text. Predictions
within a window are correlated, so their spread says little about the next window. With windows of
equal length, the mean of window means is the mean over all predictions, and its clustered standard
error (Liang & Zeger 1986, one cluster per window) equals that of a plain mean over windows; so the
same functions serve speed and quality. ``clustered_mean_figure`` is for windows of unequal length.
Windows of one article are correlated too: where the articles of a text are known, they are a
figure's ``clusters``, and windows are still its samples.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

from hotloop.bench.record import Figure

_Z_95 = statistics.NormalDist().inv_cdf(0.975)
_MAX_LOG_FACTOR = 50.0


def mean_figure(
    samples: Sequence[float],
    *,
    within: tuple[float, float] = (-math.inf, math.inf),
    clusters: Sequence[int] | None = None,
) -> Figure:
    """Computes the mean, standard error and 95 % t-interval of samples.

    Args:
        samples: One sample or more. A single sample has no interval and no standard error.
        within: The possible range of the mean, such as (0, 1) for a rate. The interval is limited
            to it, which does not reduce its coverage.
        clusters: The number of consecutive samples in each cluster, if only clusters are
            independent. None for independent samples.
    """
    sizes = clusters or [1] * len(samples)
    figure = clustered_mean_figure(_sums(samples, sizes), sizes, within=within)
    return figure.model_copy(update={"n": len(samples), "samples": tuple(samples)})


def clustered_mean_figure(
    sums: Sequence[float],
    sizes: Sequence[int],
    *,
    within: tuple[float, float] = (-math.inf, math.inf),
) -> Figure:
    """Computes the mean over all observations, which are correlated within clusters.

    The standard error is that of a ratio of sums, SE² = G/(G - 1) Σ (sum_g - size_g mean)² / N²,
    and the interval Student's t with G - 1 degrees of freedom. Samples are the clusters' means.

    Args:
        sums: The sum of the observations in each of G clusters.
        sizes: The number of observations in each cluster, 1 or more.
        within: As for ``mean_figure``.
    """
    n = len(sums)
    samples = tuple(total / size for total, size in zip(sums, sizes, strict=True))
    mean = math.fsum(sums) / sum(sizes)
    if n == 1:
        return Figure(mean=mean, n=1, samples=samples)
    residuals = (total - size * mean for total, size in zip(sums, sizes, strict=True))
    se = math.sqrt(n / (n - 1) * math.fsum(r * r for r in residuals)) / sum(sizes)
    half = t_critical(n - 1) * se
    low, high = (min(max(end, within[0]), within[1]) for end in (mean - half, mean + half))
    return Figure(mean=mean, ci95=(low, high), se=se, n=n, samples=samples)


def positive_mean_figure(
    samples: Sequence[float], *, clusters: Sequence[int] | None = None
) -> Figure:
    """Computes the mean of a skewed quantity above 0, with the interval of its logarithm.

    The standard error of the logarithm is that of the mean, divided by the mean (delta method). A
    mean of 0 or below, by rounding, has the interval of ``mean_figure``.

    Args:
        samples: One sample or more.
        clusters: As for ``mean_figure``.
    """
    figure = mean_figure(samples, within=(0, math.inf), clusters=clusters)
    if figure.se is None or figure.mean <= 0:
        return figure
    critical = t_critical(len(clusters or samples) - 1)
    factor = math.exp(min(critical * figure.se / figure.mean, _MAX_LOG_FACTOR))
    interval = (figure.mean / factor, figure.mean * factor)
    return figure.model_copy(update={"ci95": interval})


def share_figure(
    successes: Sequence[float], trials: Sequence[int], *, clusters: Sequence[int] | None = None
) -> Figure:
    """Computes the share of successes in samples of trials, with Wilson's score interval.

    Trials of a sample are correlated. So the interval is computed for fewer trials, by the design
    effect: the variance between clusters over that of independent trials (Kish 1965). Unlike a
    t-interval it stays between 0 and 1, and its width is not zero if every trial succeeds. Samples
    are shares.

    Args:
        successes: Successes in each sample.
        trials: Trials in each sample.
        clusters: As for ``mean_figure``.
    """
    sizes = clusters or [1] * len(trials)
    totals = [round(total) for total in _sums(trials, sizes)]
    figure = clustered_mean_figure(_sums(successes, sizes), totals)
    shares = tuple(won / n for won, n in zip(successes, trials, strict=True))
    figure = figure.model_copy(update={"n": len(trials), "samples": shares})
    if figure.se is None:
        return figure
    share, n = figure.mean, sum(trials)
    independent = share * (1 - share) / n
    effect = max(1.0, figure.se**2 / independent) if independent > 0 else 1.0
    interval = wilson_interval(share, n / effect, critical=t_critical(len(sizes) - 1))
    return figure.model_copy(update={"ci95": interval})


def _sums(values: Sequence[float], sizes: Sequence[int]) -> list[float]:
    """Sums the values of each cluster; ``sizes`` are the numbers of consecutive values."""
    assert sum(sizes) == len(values), f"{len(values)} values in clusters of {sizes}"
    rest = iter(values)
    return [math.fsum(itertools.islice(rest, size)) for size in sizes]


def answers_figure(right: Sequence[bool]) -> Figure:
    """Computes the share of right answers to independent items, with Wilson's score interval."""
    n, share = len(right), sum(right) / len(right)
    return Figure(
        mean=share,
        ci95=wilson_interval(share, n),
        se=math.sqrt(share * (1 - share) / n),
        n=n,
        samples=tuple(map(float, right)),
    )


def wilson_interval(share: float, n: float, *, critical: float = _Z_95) -> tuple[float, float]:
    """Computes the score interval of a share (Wilson 1927).

    Args:
        share: The share of successes.
        n: Independent trials.
        critical: Two-sided critical value of the test that the interval inverts.
    """
    squared = critical**2 / n
    middle = (share + squared / 2) / (1 + squared)
    half = critical / (1 + squared) * math.sqrt(share * (1 - share) / n + squared / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def t_critical(df: int, *, confidence: float = 0.95) -> float:
    """Computes the two-sided critical value of Student's t distribution.

    It inverts the closed form for integer ``df`` by bisection over the angle atan(t / sqrt(df))
    (Abramowitz & Stegun, 26.7.3 and 26.7.4).
    """
    assert df >= 1, f"a t-interval needs at least two samples, not {df + 1}"
    assert 0 < confidence < 1, f"confidence must lie between 0 and 1, not {confidence}"
    low, high = 0.0, math.pi / 2
    while (angle := (low + high) / 2) not in (low, high):
        if _probability_within(angle, df) < confidence:
            low = angle
        else:
            high = angle
    return math.sqrt(df) * math.tan(angle)


def _probability_within(angle: float, df: int) -> float:
    sin, cos = math.sin(angle), math.cos(angle)
    odd = df % 2
    series = term = 1.0
    for k in range(1 + odd, df - 1, 2):
        term *= k / (k + 1) * cos**2
        series += term
    if not odd:
        return sin * series
    return 2 / math.pi * (angle + sin * cos * series * (df > 1))
