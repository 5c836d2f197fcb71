"""Chooses the drafter and the number of drafts per step, 0 where speculation does not pay."""

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


@dataclass(frozen=True)
class Choice:
    """How the next step drafts.

    Attributes:
        drafter: The number of the drafter.
        k: Drafts for each row; 0 in a plain step.
        trial_s: The time of a token by the best drafter, of a step that tries another in its place;
            None of any other step.
    """

    drafter: int = 0
    k: int = 0
    trial_s: float | None = None


_Arm = tuple[int, int]
"""A drafter and its number of drafts."""

_PLAIN: _Arm = (0, 0)


class DraftController:
    """Chooses which drafter drafts how many tokens in the next step.

    Let a_i be the conditional acceptance rate of draft position i of a drafter: the probability
    that its draft is accepted if those before it are. A step with k drafts yields 1 + a_1 + a_1 a_2
    + … tokens in expectation; its time is a moving average of recent steps of that drafter and
    size. The controller chooses the drafter and the k, 0 included, with the most expected tokens
    per second. Draft positions without recent samples are assumed to have the acceptance rate of
    the position before. A drafter that finds no draft, as n-grams do in text that repeats nothing,
    makes a plain step of it: its share of steps with drafts weights both tokens and time, so that
    it does not keep others from drafting there. What is not best can be measured only at a loss: an
    exploration budget allows trials of the next best k where 0 is best, and of the other drafters,
    by turns, where one drafter is, so that the time lost by either kind of trial is at most
    ``EXPLORATION_SHARE`` of all time.

    Args:
        sizes: Numbers of drafts to choose from, ascending, 0 among them.
        n_drafters: Drafters to choose from.
        always: Draft in every step, as many tokens as the limit allows.
    """

    EXPLORATION_SHARE = 0.01
    """The most time that trials of a kind may lose, as a share of all time."""

    INITIAL_BUDGET = 2.0
    """Initial and largest exploration budget, in plain steps."""

    PRIOR_ACCEPTANCE = 0.6
    """Acceptance rate of the first draft position before any sample."""

    DECAY = 0.9
    """Weight of each step in a moving average, relative to the step after it."""

    REFRESH = 64
    """The most steps with drafts between two plain ones, which keep a plain step's time current."""

    def __init__(self, sizes: Sequence[int], *, n_drafters: int = 1, always: bool = False) -> None:
        self._sizes, self._always = tuple(sizes), always
        self._acceptance = [[_Average() for _ in range(max(sizes))] for _ in range(n_drafters)]
        self._with_drafts = [_Average() for _ in range(n_drafters)]
        self._found_none = [False] * n_drafters  # in the newest step of each
        self._costs: dict[tuple[int, _Arm], _Average] = {}
        self._budget_s: float | None = None  # of trials where plain steps are best
        self._trials_s: float | None = None  # of trials where a drafter is
        self._since_plain = 0
        self._since_chosen = [0] * n_drafters

    def choose(self, n: int, limit: int) -> Choice:
        """Chooses how ``n`` rows draft in the next step, up to ``limit`` tokens each."""
        choice = self._choose(n, limit)
        self._since_chosen = [since + 1 for since in self._since_chosen]
        if choice.k:
            self._since_chosen[choice.drafter] = 0
        return choice

    def _choose(self, n: int, limit: int) -> Choice:
        sizes = [k for k in self._sizes if 0 < k <= limit]
        if self._always:
            sizes = sizes[-1:]
        arms = [(drafter, k) for k in sizes for drafter in range(len(self._acceptance))]
        if not (self._always and arms):
            arms.insert(0, _PLAIN)
        if self._always and len(arms) == 1:
            return Choice(*arms[0])
        if unknown := [arm for arm in arms if self._cost_s(n, arm) is None]:
            return Choice(*unknown[0])
        if len(arms) == 1 or (not self._always and self._since_plain >= self.REFRESH):
            return Choice()
        best, *others = sorted(arms, key=lambda arm: self._tokens_per_s(n, arm), reverse=True)
        token_s, best_drafter = 1 / self._tokens_per_s(n, best), best[0] if best[1] else None
        most_s = self.INITIAL_BUDGET * (self._cost_s(n, _PLAIN) or token_s)
        trials = [
            arm
            for arm in others
            if arm[1] and arm[0] != best_drafter and self._loss_s(n, arm, token_s) < most_s
        ]
        if not trials:
            return Choice(*best)
        # The best arm of the drafter that was chosen the longest ago. It waits for its budget, lest
        # cheaper ones always come first.
        trial = max(trials, key=lambda arm: self._since_chosen[arm[0]])
        budget_s = self._budget_s if best == _PLAIN else self._trials_s
        if budget_s is not None and self._loss_s(n, trial, token_s) < budget_s:
            return Choice(*trial, None if best == _PLAIN else token_s)
        return Choice(*best)

    def observe(
        self,
        n: int,
        k: int,
        *,
        times: StepTimes | None,
        kept: Sequence[int],
        steps: int = 1,
        choice: Choice | None = None,
    ) -> None:
        """Updates the estimates with a step, or with a multi-step program.

        Args:
            n: Rows.
            k: Drafts per row that the step verified; 0 if no row had any.
            times: Times of the step, or of all steps; None for the first of its size.
            kept: Tokens that each request got.
            steps: Number of steps.
            choice: How it was to draft; None for the first drafter.
        """
        choice = choice or Choice(k=k)
        self._since_plain = 0 if k == 0 else self._since_plain + 1
        averages = self._acceptance[choice.drafter]
        if choice.k:
            self._with_drafts[choice.drafter].decay(self.DECAY)
            self._with_drafts[choice.drafter].add(float(k > 0))
            self._found_none[choice.drafter] = k == 0
        if k:
            for acceptance in averages:
                acceptance.decay(self.DECAY)
        for tokens in kept:
            for position in range(min(tokens, k)):
                averages[position].add(float(tokens > position + 1))
        if times is None:
            return
        arm = (choice.drafter, k) if k else _PLAIN
        seconds = (times.draft_s + times.model_s) / steps
        cost = self._costs.setdefault((n, arm), _Average())
        known_s = cost.mean(0.0, 0.0) if cost.weight else None
        cost.decay(self.DECAY)
        # Limits outliers, such as a step that another process delayed.
        cost.add(seconds if known_s is None else min(seconds, 2 * known_s))
        plain_s = self._cost_s(n, _PLAIN)
        if plain_s is None and not self._always:
            return
        max_budget_s = self.INITIAL_BUDGET * (plain_s or seconds)
        share_s = self.EXPLORATION_SHARE * seconds * steps
        lost_s = seconds + times.catch_up_s

        def updated(budget_s: float | None, token_s: float | None) -> float:
            """Adds the share, and what the step gained or lost against tokens of ``token_s``."""
            budget_s = max_budget_s if budget_s is None else budget_s
            # The first step of its kind is a measurement, which every drafter gets.
            if token_s is not None and kept and known_s is not None:
                budget_s += token_s * sum(kept) / len(kept) - lost_s
            return min(max_budget_s, budget_s + share_s)

        self._budget_s = updated(self._budget_s, plain_s if k else None)
        self._trials_s = updated(self._trials_s, choice.trial_s)

    def _cost_s(self, n: int, arm: _Arm) -> float | None:
        """Returns the mean time of such a step; None before the first.

        Steps of a drafter that finds no drafts are plain ones. Those with drafts, until there is
        one, are assumed to take no longer.
        """
        cost, plain = self._costs.get((n, arm)), self._costs.get((n, _PLAIN))
        if plain is None or arm == _PLAIN:
            return None if cost is None else cost.mean(0.0, 0.0)
        plain_s = plain.mean(0.0, 0.0)
        if cost is None:
            return plain_s if self._found_none[arm[0]] else None
        return plain_s + self._share_with_drafts(arm[0]) * (cost.mean(0.0, 0.0) - plain_s)

    def _share_with_drafts(self, drafter: int) -> float:
        """Returns the share of steps for which a drafter finds drafts, 1 before the first."""
        return self._with_drafts[drafter].mean(1.0, 0.1)

    def _tokens(self, arm: _Arm) -> float:
        """Returns the expected tokens of a step."""
        drafter, k = arm
        total, all_accepted, rate = 1.0, 1.0, self.PRIOR_ACCEPTANCE
        for acceptance in self._acceptance[drafter][:k]:
            rate = acceptance.mean(rate)
            all_accepted *= rate
            total += all_accepted
        return 1.0 + self._share_with_drafts(drafter) * (total - 1.0)

    def _loss_s(self, n: int, arm: _Arm, token_s: float) -> float:
        """Returns what a step loses if it yields one token, which would else take ``token_s``."""
        cost_s = self._cost_s(n, arm)
        assert cost_s is not None, "every size was measured"
        return cost_s - token_s

    def _tokens_per_s(self, n: int, arm: _Arm) -> float:
        cost_s = self._cost_s(n, arm)
        assert cost_s is not None, "every size was measured"
        return self._tokens(arm) / cost_s


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
