"""Paired comparison of right and wrong answers: did accuracy drop by more than a margin?

Both models answer the same items, so only the items on which they differ carry information:
``worse`` counts items that the reference has right and the model under test has wrong, and
``better`` the reverse. The accuracy lost is ``(worse - better) / n``.

Two questions are asked. McNemar's exact test asks whether the two differ at all; a large p-value
does not prove that they are equal. The non-inferiority test asks whether a loss of the margin can
be ruled out; besides yes and no it can answer that there are too few items. Its limits are Tango's
(1998) score limits, which are valid even if few items or none differ.

With several tasks, each is a stratum with its own rate of differing items, and all have the same
loss. The statistic sums the differences of the strata and their variances under the null
hypothesis; with one task it is Tango's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hotloop.bench.record import NonInferiority, Verdict
from hotloop.bench.statistics import wilson_interval
from hotloop.types import MAX_ACCURACY_LOSS

CONFIDENCE = 0.95
"""Confidence of each one-sided limit."""

POWER = 0.80
"""The probability of a pass with the needed items, if the true loss is the observed one."""

_NORMAL = statistics.NormalDist()
_Z = _NORMAL.inv_cdf(CONFIDENCE)


@dataclass(frozen=True, kw_only=True)
class Flips:
    """The items of one task that two models answer differently.

    Attributes:
        worse: Items right by the reference and wrong by the model under test.
        better: Items wrong by the reference and right by the model under test.
        n: All items.
    """

    worse: int
    better: int
    n: int

    def __post_init__(self) -> None:
        assert min(self.worse, self.better) >= 0, f"negative counts: {self}"
        assert self.worse + self.better <= self.n > 0, f"more differing items than items: {self}"

    @classmethod
    def of(cls, reference: Sequence[bool], tested: Sequence[bool]) -> Flips:
        """Counts the flips between two lists of answers to the same items."""
        pairs = list(zip(reference, tested, strict=True))
        return cls(
            worse=sum(was and not is_now for was, is_now in pairs),
            better=sum(is_now and not was for was, is_now in pairs),
            n=len(pairs),
        )

    def __add__(self, other: Flips) -> Flips:
        """Returns the flips of both tasks together."""
        return Flips(
            worse=self.worse + other.worse, better=self.better + other.better, n=self.n + other.n
        )


@dataclass(frozen=True, kw_only=True)
class PairedTask:
    """The answers of two models to the same items of one task.

    Attributes:
        name: The task's name.
        chance: The accuracy of guessing; None if it is not known.
        reference: For each item, whether the reference's answer is right.
        tested: The same for the model under test, in the same order.
    """

    name: str
    chance: float | None
    reference: Sequence[bool]
    tested: Sequence[bool]

    @property
    def accuracy(self) -> float:
        """The reference's accuracy."""
        return sum(self.reference) / len(self.reference)

    @property
    def at_chance(self) -> bool:
        """Whether the reference is not shown to be better than guessing: no loss could show."""
        return wilson_interval(self.accuracy, len(self.reference))[0] <= (self.chance or 0.0)

    @property
    def flips(self) -> Flips:
        """The items that the two answer differently."""
        return Flips.of(self.reference, self.tested)


def mcnemar_p(worse: int, better: int) -> float:
    """Computes the two-sided p-value of McNemar's exact test: a fair coin for each differing item.

    With several strata it tests their sums, since every differing item is a fair coin if no task
    has changed.
    """
    n = worse + better
    tail = sum(math.comb(n, i) for i in range(min(worse, better) + 1))
    return min(1.0, 2 * tail / 2**n)


def score_statistic(strata: Sequence[Flips], loss: float) -> float:
    """Computes the score statistic of the hypothesis that accuracy drops by ``loss`` in all strata.

    It is standard normal if the hypothesis is true, and falls as ``loss`` rises.
    """
    difference = sum(s.worse - s.better - s.n * loss for s in strata)
    variance = sum(s.n * (2 * _restricted_better(s, loss) + loss * (1 - loss)) for s in strata)
    if variance <= 0:  # no item differs, and none should
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / math.sqrt(variance)


def score_limits(strata: Sequence[Flips], *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Computes the lower and the upper limit of the accuracy lost, each one-sided."""
    z = _NORMAL.inv_cdf(confidence)
    lower = _find_root(lambda loss: score_statistic(strata, loss) - z)
    return lower, _find_root(lambda loss: score_statistic(strata, loss) + z)


def compare_over_tasks(
    tasks: Sequence[PairedTask], margin_share: float = MAX_ACCURACY_LOSS
) -> Verdict | None:
    """Compares answers over all tasks together, stratified by task.

    Args:
        tasks: The tasks. Those that are ``at_chance`` are left out.
        margin_share: The loss that would matter, as a share of the reference's accuracy.

    Returns:
        The verdict; None if no task is left.
    """
    pooled = [task for task in tasks if not task.at_chance]
    if not pooled:
        return None
    n_right = sum(sum(task.reference) for task in pooled)
    margin = margin_share * n_right / sum(len(task.reference) for task in pooled)
    compared = compare_answers([task.flips for task in pooled], margin)
    return Verdict(**dict(compared), tasks=tuple(task.name for task in pooled))


def compare_answers(strata: Sequence[Flips], margin: float) -> NonInferiority:
    """Tests whether a loss of accuracy of ``margin`` or more can be ruled out.

    Args:
        strata: The flips of each task.
        margin: The loss of accuracy that would matter, above 0.

    Returns:
        ``pass`` if the upper limit is below the margin, ``fail`` if the lower limit is above it,
        else ``underpowered`` with the number of items that it would take.
    """
    assert margin > 0, f"a margin of {margin} can never be ruled out"
    total = strata[0]
    for more in strata[1:]:
        total += more
    lower, upper = score_limits(strata)
    outcome = "pass" if upper < margin else "fail" if lower > margin else "underpowered"
    return NonInferiority(
        outcome=outcome,
        n=total.n,
        worse=total.worse,
        better=total.better,
        loss=(total.worse - total.better) / total.n,
        limits=(lower, upper),
        margin=margin,
        p=_NORMAL.cdf(score_statistic(strata, margin)),
        mcnemar_p=mcnemar_p(total.worse, total.better),
        needed=needed_items(total, margin) if outcome == "underpowered" else None,
    )


def needed_items(flips: Flips, margin: float) -> int | None:
    """Estimates the items that a pass would take with 80 % power.

    The rate of differing items is assumed to be the observed one. The loss is assumed to be the
    observed one or zero, whichever needs more items; an observed loss beyond the margin is replaced
    by zero.

    Returns:
        The number of items; None if there are as many already and the observed loss is beyond the
        margin, so that more items can hardly help.
    """
    observed = (flips.worse - flips.better) / flips.n
    rate = (flips.worse + flips.better) / flips.n
    needed = max(
        items_for_power(rate, margin, loss=loss) for loss in {0.0, observed} if 0 <= loss < margin
    )
    needed = max(needed, math.floor(_Z**2 * (1 - margin) / margin) + 1)  # if no item differs
    if needed > flips.n:
        return needed
    return flips.n + 1 if observed < margin else None


def items_for_power(rate: float, margin: float, *, loss: float = 0.0) -> int:
    """Computes the items that rule out a loss of ``margin`` with 80 % power.

    Args:
        rate: The share of items that differ, in either direction.
        margin: The loss to rule out.
        loss: The true loss.
    """
    z = _Z + _NORMAL.inv_cdf(POWER)
    return math.ceil(z**2 * max(rate - loss**2, 0.0) / (margin - loss) ** 2)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts the p-values of several tests for multiple testing (Holm 1979).

    With a threshold of 0.05 on adjusted values, the chance of any false positive is below 5 %.

    Args:
        p_values: The p-values, in any order; the result has the same order.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def _restricted_better(flips: Flips, loss: float) -> float:
    """Returns Tango's estimate of the rate of better items.

    It maximizes the likelihood, under the constraint that the rate of worse items is ``loss``
    higher.
    """
    a = 2 * flips.n
    b = -flips.worse - flips.better + (2 * flips.n - flips.worse + flips.better) * loss
    c = -flips.better * loss * (1 - loss)
    return max(0.0, (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a))


def _find_root(decreasing: Callable[[float], float]) -> float:
    """Finds the root of a decreasing function of a loss between -1 and 1, by bisection."""
    low, high = -1.0, 1.0
    while (middle := (low + high) / 2) not in (low, high):
        if decreasing(middle) > 0:
            low = middle
        else:
            high = middle
    return middle
