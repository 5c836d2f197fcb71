"""Chooses the number of draft tokens per step, 0 where speculation does not pay."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hotloop.engine.core import StepTimes
from hotloop.types import StepCost


def sizes_up_to(most: int) -> tuple[int, ...]:
    """Returns the numbers of drafts that steps are captured for: 0, powers of two, ``most``."""
    sizes = {0, most} | {1 << i for i in range(most.bit_length()) if 1 << i <= most}
    return tuple(sorted(sizes))


@dataclass
class _Average:
    """An exponentially weighted mean."""

    total: float = 0.0
    weight: float = 0.0

    def decay(self, factor: float) -> None:
        """Multiplies the weight of every value so far by ``factor``."""
        self.total, self.weight = self.total * factor, self.weight * factor

    def add(self, value: float) -> None:
        """Adds a value with weight 1."""
        self.total, self.weight = self.total + value, self.weight + 1

    def mean(self, prior: float, weight: float = 1.0) -> float:
        """Returns the mean, in which ``prior`` has the weight of ``weight`` further values."""
        return (self.total + prior * weight) / (self.weight + weight)


class DraftController:
    """Chooses how many tokens to draft in the next step.

    Let a_i be the conditional acceptance rate of draft position i: the probability that its draft
    is accepted if those before it are. A step with k drafts yields 1 + a_1 + a_1 a_2 + … tokens in
    expectation; its time is a moving average of recent steps of that size. The controller chooses
    the k, 0 included, with the most expected tokens per second. Draft positions without recent
    samples are assumed to have the acceptance rate of the position before. Where 0 is best,
    acceptance can be measured only at a loss: an exploration budget allows trials of the next best
    k, so that the time lost by them is at most ``EXPLORATION_SHARE`` of all time.

    Args:
        sizes: Numbers of drafts to choose from, ascending, 0 among them.
        always: Always draft as many tokens as the limit allows.
    """

    EXPLORATION_SHARE = 0.01
    """The most time that trials may lose, as a share of all time."""

    INITIAL_BUDGET = 2.0
    """Initial and largest exploration budget, in plain steps."""

    PRIOR_ACCEPTANCE = 0.6
    """Acceptance rate of the first draft position before any sample."""

    DECAY = 0.9
    """Weight of each step in a moving average, relative to the step after it."""

    REFRESH = 64
    """The most steps with drafts between two plain ones, which keep a plain step's time current."""

    def __init__(self, sizes: Sequence[int], *, always: bool = False) -> None:
        self._sizes, self._always = tuple(sizes), always
        self._acceptance = [_Average() for _ in range(max(sizes))]
        self._costs: dict[tuple[int, int], _Average] = {}
        self._budget_s: float | None = None
        self._since_plain = 0

    def choose(self, n: int, limit: int) -> int:
        """Chooses the number of drafts for each of ``n`` rows in the next step, up to ``limit``."""
        sizes = [k for k in self._sizes if k <= max(0, limit)]
        if self._always:
            return sizes[-1]
        if unknown := [k for k in sizes if self._cost_s(n, k) is None]:
            return unknown[0]
        if len(sizes) == 1 or self._since_plain >= self.REFRESH:
            return 0
        best, *others = sorted(sizes, key=lambda k: self._tokens_per_s(n, k), reverse=True)
        if best == 0 and self._budget_s is not None and self._loss_s(n, others[0]) < self._budget_s:
            return others[0]
        return best

    def observe(
        self,
        n: int,
        k: int,
        *,
        times: StepTimes | None,
        kept: Sequence[int],
        steps: int = 1,
    ) -> None:
        """Updates the estimates with a step, or with a multi-step program.

        Args:
            n: Rows.
            k: Drafts per row that the step verified; 0 if no row had any.
            times: Times of the step, or of all steps; None for the first of its size.
            kept: Tokens that each request got.
            steps: Number of steps.
        """
        self._since_plain = 0 if k == 0 else self._since_plain + 1
        if k:
            for acceptance in self._acceptance:
                acceptance.decay(self.DECAY)
        for tokens in kept:
            for position in range(min(tokens, k)):
                self._acceptance[position].add(float(tokens > position + 1))
        if times is None:
            return
        seconds, known_s = (times.draft_s + times.model_s) / steps, self._cost_s(n, k)
        cost = self._costs.setdefault((n, k), _Average())
        cost.decay(self.DECAY)
        # Limits outliers, such as a step that another process delayed.
        cost.add(seconds if known_s is None else min(seconds, 2 * known_s))
        plain_s = self._cost_s(n, 0)
        if plain_s is None:
            return
        max_budget_s = self.INITIAL_BUDGET * plain_s
        budget_s = max_budget_s if self._budget_s is None else self._budget_s
        if k and kept:
            as_plain_steps_s = plain_s * sum(kept) / len(kept)
            budget_s += as_plain_steps_s - seconds - times.catch_up_s
        self._budget_s = min(max_budget_s, budget_s + self.EXPLORATION_SHARE * seconds * steps)

    def _cost_s(self, n: int, k: int) -> float | None:
        """Returns the mean time of a step with k drafts; None before the first."""
        cost = self._costs.get((n, k))
        return None if cost is None else cost.mean(0.0, 0.0)

    def _tokens(self, k: int) -> float:
        """Returns the expected tokens of a step with k drafts."""
        total, all_accepted, rate = 1.0, 1.0, self.PRIOR_ACCEPTANCE
        for acceptance in self._acceptance[:k]:
            rate = acceptance.mean(rate)
            all_accepted *= rate
            total += all_accepted
        return total

    def _tokens_per_s(self, n: int, k: int) -> float:
        cost_s = self._cost_s(n, k)
        assert cost_s is not None, "every size was measured"
        return self._tokens(k) / cost_s

    def _loss_s(self, n: int, k: int) -> float:
        """Returns the time of a step with k drafts beyond a plain one, lost if none is accepted."""
        cost_s, plain_s = self._cost_s(n, k), self._cost_s(n, 0)
        assert cost_s is not None
        assert plain_s is not None
        return cost_s - plain_s


class StepTimer(DraftController):
    """Always drafts the same number of tokens, and keeps the time of every step.

    Args:
        n: Rows of the steps to time.
        k: Drafts for each of them.
    """

    def __init__(self, n: int, k: int) -> None:
        super().__init__((0, k) if k else (0,), always=True)
        self._n, self._k = n, k
        self._draft_s: list[float] = []
        self._verify_s: list[float] = []

    def observe(
        self, n: int, k: int, *, times: StepTimes | None, steps: int = 1, **others: Any
    ) -> None:
        """See ``DraftController``."""
        if times is not None and (n, k) == (self._n, self._k):
            self._draft_s += [(times.catch_up_s + times.draft_s) / steps] * steps
            self._verify_s += [times.model_s / steps] * steps
        super().observe(n, k, times=times, steps=steps, **others)

    def cost(self) -> StepCost | None:
        """Returns the median times; None if no such step was timed."""
        if not self._verify_s:
            return None
        return StepCost(
            k=self._k,
            n_steps=len(self._verify_s),
            draft_s=statistics.median(self._draft_s) if self._k else 0.0,
            verify_s=statistics.median(self._verify_s),
        )
