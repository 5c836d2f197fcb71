"""Chooses the drafter and the number of drafts of each step: none if speculation does not pay."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary, ref

from hotloop.engine.core import StepTimes
from hotloop.types import StepCost


def sizes_up_to(most: int) -> tuple[int, ...]:
    """Returns the numbers of drafts that steps are captured for: 0, 1, 2, 4, 7, 15, …, ``most``.

    From 7 drafts on, a step of one request verifies a power of two of tokens (the newest token and
    the drafts), because kernels compute rows in groups of eight.
    """
    sizes = {0, 1, 2, 4, most} | {(1 << i) - 1 for i in range(3, most.bit_length() + 1)}
    return tuple(sorted(size for size in sizes if size <= most))


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


class _Rate:
    """The acceptance rate of drafts, over the samples since the text last changed.

    It is a long moving average. If a short average differs from it by more than chance explains,
    the text has changed, and the short average replaces the long one.
    """

    LONG_DECAY, SHORT_DECAY = 0.985, 0.9
    """Weights of each step in the averages, relative to the step after it."""

    MAX_DEVIATION = 3.5
    """The number of standard errors by which the short average may differ."""

    def __init__(self) -> None:
        self._long, self._short = _Average(), _Average()
        self._has_changed = False

    def decay(self) -> None:
        """Reduces the weight of every sample so far, at a step with drafts."""
        self._long.decay(self.LONG_DECAY)
        self._short.decay(self.SHORT_DECAY)

    def add(self, accepted: bool) -> None:
        """Adds a sample."""
        self._long.add(float(accepted))
        self._short.add(float(accepted))
        rate = min(max(self._long.mean(0.5), 0.05), 0.95)
        # The variance of an exponentially weighted mean, whose weights add up to w.
        variance = rate * (1 - rate) * (1 - self.SHORT_DECAY) / (1 + self.SHORT_DECAY)
        if abs(self._short.mean(rate) - rate) > self.MAX_DEVIATION * math.sqrt(variance):
            self._long, self._has_changed = replace(self._short), True

    @property
    def weight(self) -> float:
        """The weight of all samples."""
        return self._long.weight

    def mean(self, prior: float, weight: float = 1.0) -> float:
        """See ``_Average.mean``; all samples before a change count as one sample."""
        return self._long.mean(prior, 1.0 if self._has_changed else weight)


class _StepTime:
    """The mean time of recent steps of a kind; unknown before the second step.

    The unit of time is the caller's: seconds for plain steps, and plain steps for steps with
    drafts.

    The first step can be slow, since its data are in no cache yet: the faster of the first two
    counts. Chains can end early, so steps of a kind differ in the number of drafts that they made.
    A line over that number is fitted to their times by least squares, with the plain step as one
    sample. Without the line, a delayed step could not be distinguished from a step that made more
    drafts.

    Args:
        plain: The time of a plain step, to which the line is fitted too; None fits no line.
    """

    DECAY = 0.9
    """Weight of each step, relative to the step after it."""

    PLAIN_WEIGHT = 0.25
    """Weight of the step without drafts. It is small, since verification has a fixed cost too."""

    def __init__(self, plain: float | None = None) -> None:
        self._plain = plain
        self._first: tuple[float, float] | None = None  # the first step's drafts and its time
        self.mean: float | None = None  # None while it is unknown
        self.weight = 0.0
        """The weight of all times in the mean."""
        # Weighted sums: of drafts and times, of the squares and products of both, and of the
        # squared relative differences from what was expected.
        self._drafts = self._times = self._squares = self._products = self._errors = 0.0

    @property
    def variance(self) -> float:
        """The variance of the times about the line, relative to the square of their mean."""
        return self._errors / self.weight

    @property
    def per_draft(self) -> float:
        """The time of another draft and of its verification: the slope of the line."""
        if self._plain is None:
            return 0.0
        weight = self.weight + self.PLAIN_WEIGHT
        drafts = self._drafts / weight
        time = (self._times + self._plain * self.PLAIN_WEIGHT) / weight
        variance = self._squares / weight - drafts**2
        covariance = self._products / weight - drafts * time
        return max(0.0, covariance / variance) if variance > 0 else 0.0

    def expected(self, n_drafts: float) -> float:
        """Returns the time of a step that makes this many drafts; the mean must be known."""
        assert self.mean is not None, "two times make a mean"
        return self.mean + self.per_draft * (n_drafts - self._drafts / self.weight)

    def add(self, time: float, n_drafts: float = 0.0, n_between: int = 0) -> float:
        """Adds a time, limited to 1.25 times the expected one: another process can delay a step.

        Without the limit, one delayed plain step would make drafts look cheap until the next plain
        step.

        Args:
            time: The time.
            n_drafts: Drafts that the step made.
            n_between: Steps of other kinds since the last step of this kind. The speed of the
                machine may have changed during them.

        Returns:
            The time that was added.
        """
        if self._first is None:
            self._first = n_drafts, time
            return time
        if self.mean is None:
            first_drafts, expected = self._first
            if self._plain is not None and first_drafts:  # scaled to this number of drafts
                expected = self._plain + (expected - self._plain) * n_drafts / first_drafts
            time = expected = min(time, expected)
        else:
            expected = self.expected(n_drafts)
            time = min(time, 1.25 * expected)
        decay = max(0.5, self.DECAY ** (1 + n_between / 16))
        self.weight = self.weight * decay + 1
        self._drafts = self._drafts * decay + n_drafts
        self._times = self._times * decay + time
        self._squares = self._squares * decay + n_drafts**2
        self._products = self._products * decay + n_drafts * time
        self._errors = self._errors * decay + (time / expected - 1) ** 2
        self.mean = self._times / self.weight
        return time


@dataclass(frozen=True)
class Choice:
    """How the next step drafts.

    Attributes:
        drafter: The number of the drafter.
        k: Drafts for each row; 0 in a plain step.
        trial_s: If the step is a trial of a choice that is not the best: the time per token of the
            best choice. None otherwise.
        min_probability: See ``Step.min_probability``.
        limits: For each request of the step, the most drafts that it was allowed.
    """

    drafter: int = 0
    k: int = 0
    trial_s: float | None = None
    min_probability: float = 0.0
    limits: Mapping[Any, int] = field(default_factory=dict)


_Arm = tuple[int, int]
"""A choice for a step: the number of a drafter, and a number of drafts. To choose between them is a
multi-armed bandit problem, hence the name."""

PLAIN: _Arm = (0, 0)
"""The arm without drafts."""


def draft_arms(sizes: Sequence[int], n_drafters: int) -> tuple[_Arm, ...]:
    """Returns the arms: each drafter with each of these numbers of drafts, and ``PLAIN`` for 0."""
    drafts = [k for k in sizes if k]
    return (PLAIN, *((drafter, k) for k in drafts for drafter in range(n_drafters)))


@dataclass(eq=False)
class _Acceptance:
    """Acceptance rates of a drafter: for one request, or for all of them.

    Attributes:
        positions: For each draft position, the acceptance rate of its draft if all earlier drafts
            were accepted.
    """

    positions: list[_Rate]

    @classmethod
    def of(cls, n: int) -> _Acceptance:
        """Returns rates at ``n`` draft positions, without a sample."""
        return cls([_Rate() for _ in range(n)])

    def decay(self) -> None:
        """Reduces the weight of every sample so far, at a step with drafts."""
        for position in self.positions:
            position.decay()

    def add(self, n_tokens: int, k: int) -> None:
        """Adds the samples of a step with k drafts that yielded ``n_tokens``."""
        for i in range(min(n_tokens, k)):
            self.positions[i].add(n_tokens > i + 1)


class DraftController:
    """Chooses which drafter drafts how many tokens in the next step.

    Let a_i be the conditional acceptance rate of draft position i of a drafter for a request: the
    probability that its draft is accepted if all earlier drafts are. A step with k drafts yields 1
    + a_1 + a_1 a_2 + … tokens of the request in expectation. Its time is a moving average over
    recent steps of that drafter and size. The controller chooses the drafter and the k (0 included)
    with the most expected tokens per second, summed over the requests of the step. Each request has
    rates of its own, since texts differ; the rates over all requests are the prior, which counts as
    ``PRIOR_WEIGHT`` samples. A draft position without recent samples is assumed to have the
    acceptance rate of the position before. Rates are averages over some sixty steps, or over ten
    once the text has changed; ten steps alone vary so much that a bad streak would end drafting
    that pays. The rate of the first draft position is taken to be half a standard error higher than
    measured, since only further drafts can show that the few drafts so far were unlucky. A step for
    which a drafter finds no draft (n-grams in text without repetitions) is a plain step. Therefore
    the drafter's share of steps with drafts weights both its tokens and its time, so that it does
    not keep other drafters from drafting there.

    A chain of drafts can end early. Let S be the probability that all drafts so far are accepted, a
    the acceptance rate of a draft after accepted drafts, e the time of a draft and its
    verification, and R the tokens per second of the best steps. One more draft is worth S a tokens
    and takes the time e, so it pays if S a > R e. Therefore the chain ends once S is below R e / a.
    The draft model's own probabilities estimate S. If that estimate is wrong, the rates above
    correct it: they count drafts that were not made as rejected, and so choose a suitable k. The
    time of a step depends on the number of drafts that its chain made: for each drafter and k it is
    a line over that number, with the slope e. The controller evaluates the line at the present
    length of chains, whatever their length was when that k was last chosen.

    Measuring a choice that is not the best costs time. An exploration budget allows such trials:
    of the next best k if plain steps are best, and of the other drafters, by turns, if one drafter
    is best. Trials lose at most ``EXPLORATION_SHARE`` of all time. In text that keeps changing, the
    expectations can be wrong too. So the controller sums the time that drafts have gained and lost
    against plain steps; once the loss exceeds the gain by more than that share, steps are plain
    until the loss is made up.

    Times of steps vary, and the speed of a machine changes. So the time of a step with drafts is
    kept as its ratio to the time of a plain step at that moment. Drafts have to gain more than the
    standard error of that ratio, since the best of several k seems better than it is. While drafts
    seem to pay, plain steps between them keep the plain step's time current. Their number is such
    that they lose ``PLAIN_SHARE`` of all time, so they are frequent if drafts gain little.

    Args:
        sizes: Numbers of drafts to choose from, ascending, 0 among them.
        n_drafters: Drafters to choose from.
        always: Draft in every step, as many tokens as the limit allows.
        ends_early: Whether chains of drafts can end early; they never do with ``always``.

    Attributes:
        arms: The drafter and the number of drafts of every step that can be chosen.
    """

    EXPLORATION_SHARE = 0.01
    """The most time that trials may lose, as a share of all time."""

    MAX_BUDGET = 2.0
    """The largest exploration budget, in plain steps; it begins with 0."""

    INITIAL_GAINED = 4.0
    """The time that drafts may lose in an engine's first text, in plain steps."""

    MAX_GAINED = 32.0
    """The most gained time that is kept to offset later losses, in plain steps."""

    PRIOR_ACCEPTANCE = 0.8
    """Acceptance rate of the first draft position before any sample."""

    OPTIMISM = 0.5
    """The number of standard errors that is added to the measured rate of the first draft position.
    """

    PRIOR_WEIGHT = 12.0
    """The number of a request's own samples that all requests' acceptance rate counts for."""

    PRIOR_CONTINUATION = 0.8
    """Probability that a chain that can end early continues after a draft, before any sample."""

    DECAY = 0.9
    """Weight of each step, relative to the next step, in moving averages of other quantities than
    acceptance rates."""

    PLAIN_SHARE = 0.00125
    """The share of time that plain steps may lose while drafts pay."""

    MAX_SCHEDULED = 8
    """The most plain steps that are scheduled at once."""

    MIN_REFRESH, MAX_REFRESH = 4, 64
    """The minimum and the maximum number of steps with drafts between two plain steps."""

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        n_drafters: int = 1,
        always: bool = False,
        ends_early: bool = False,
    ) -> None:
        self._sizes, self._always = tuple(sizes), always
        self._ends_early = ends_early and not always
        self._n_drafters = n_drafters
        self.arms = draft_arms(sizes, n_drafters)
        # By number of rows: the time of a plain step in seconds, and of a step with drafts in plain
        # steps.
        self._costs: dict[tuple[int, _Arm], _StepTime] = {}
        self.forget_texts()

    def forget_texts(self) -> None:
        """Forgets everything but the times of steps, after warm-up with arbitrary text."""
        n_drafters = self._n_drafters
        self._acceptance = self._new_acceptance()
        # Of each request; weak references forget requests that have ended.
        self._of_request: WeakKeyDictionary[Any, list[_Acceptance]] = WeakKeyDictionary()
        self._expected: WeakKeyDictionary[Any, list[list[float]]] = WeakKeyDictionary()
        # How often a chain of 1, 2, … drafts continues, if it is shorter than k.
        n_rates = max(self._sizes) - 1
        self._continuation = [[_Rate() for _ in range(n_rates)] for _ in range(n_drafters)]
        self._lengths: dict[int, list[float]] = {}  # by drafter and k: see _length
        # The acceptance rate of drafts after accepted drafts.
        self._newest_accepted = [_Rate() for _ in range(n_drafters)]
        # For each drafter, the share of its steps for which it found drafts.
        self._with_drafts = [_Average() for _ in range(n_drafters)]
        self._found_none = [False] * n_drafters  # in the newest step of each
        self._trials_s: float | None = None  # the exploration budget: time that trials may lose
        self._gained_s: float | None = None  # the time that drafts gained against plain steps
        self._since_plain = 0  # steps with drafts since the newest plain step
        # The newest choice of each drafter, by their number.
        self._chosen_at, self._n_choices = [0] * n_drafters, 0
        # The number of plain steps that are scheduled, and for which requests.
        self._n_plain = 0
        self._scheduled_for: list[ref[Any]] = []

    def _new_acceptance(self) -> list[_Acceptance]:
        return [_Acceptance.of(max(self._sizes)) for _ in range(self._n_drafters)]

    def choose(self, limits: Mapping[Any, int], room: int) -> Choice:
        """Chooses how the next step drafts.

        Args:
            limits: For each request of the step, the most drafts that it can use; 0 if it must have
                none. Requests are weakly referenced.
            room: The most drafts that the cache has room for.
        """
        scheduled = self._scheduled_for
        same = len(limits) == len(scheduled) and all(r() in limits for r in scheduled)
        if self._n_plain and same:
            self._n_plain -= 1
            return Choice(limits=limits)
        self._n_plain = 0
        choice = self._choose(limits, room)
        if choice.k == 0:
            if self._n_plain:
                self._scheduled_for = [ref(request) for request in limits]
            return Choice(limits=limits)
        self._n_choices += 1
        self._chosen_at[choice.drafter] = self._n_choices
        return replace(choice, limits=limits, min_probability=self._min_probability(limits, choice))

    def _choose(self, limits: Mapping[Any, int], room: int) -> Choice:
        n = len(limits)
        limit = min(max(limits.values()), room)
        sizes = [k for k in self._sizes if 0 < k <= limit]
        if self._always:
            sizes = sizes[-1:]
        arms = [(drafter, k) for k in sizes for drafter in range(self._n_drafters)]
        if not (self._always and arms):
            arms.insert(0, PLAIN)
        if self._always and len(arms) == 1:
            return Choice(*arms[0])
        costs_s: dict[_Arm, float] = {}
        for arm in arms:
            cost_s = self._cost_s(n, arm)
            if cost_s is None:
                return Choice(*arm)
            costs_s[arm] = cost_s
        if len(arms) == 1:
            return Choice()
        tokens_per_s = {
            arm: self._expected_tokens(limits, arm) / cost_s for arm, cost_s in costs_s.items()
        }
        best = max(arms, key=tokens_per_s.__getitem__)
        if not self._always and best != PLAIN:
            loss_s = costs_s[PLAIN] - 1 / tokens_per_s[best]
            spent_s = self._since_plain * costs_s[best]
            if tokens_per_s[best] * (1 - self._relative_error(n, best)) < tokens_per_s[PLAIN]:
                best = PLAIN
            elif self._since_plain >= self.MAX_REFRESH or (
                self._since_plain >= self.MIN_REFRESH and loss_s < self.PLAIN_SHARE * spent_s
            ):
                return Choice()
        if not self._always and self._gained_s is not None and self._gained_s < 0:
            self._schedule_plain(-self._gained_s, costs_s[PLAIN])
            return Choice()
        token_s, best_drafter = 1 / tokens_per_s[best], best[0] if best[1] else None
        most_s = self.MAX_BUDGET * costs_s.get(PLAIN, token_s)
        # The time that each trial loses if it yields one token.
        trials = {
            arm: loss_s
            for arm, cost_s in costs_s.items()
            if arm[1] and arm[0] != best_drafter and (loss_s := cost_s - token_s) < most_s
        }
        if not trials or self._trials_s is None:
            return Choice(*best)
        # The best arm of the drafter that was chosen the longest ago. It waits for its budget,
        # since cheaper trials would otherwise always come first.
        trial = max(trials, key=lambda arm: (-self._chosen_at[arm[0]], tokens_per_s[arm]))
        if trials[trial] < self._trials_s:
            return Choice(*trial, token_s)
        if best == PLAIN:
            self._schedule_plain(trials[trial] - self._trials_s, costs_s[PLAIN])
        return Choice(*best)

    def _schedule_plain(self, budget_s: float, plain_s: float) -> None:
        """Schedules plain steps at once: as many as it takes until ``budget_s`` has been saved.

        Every step adds ``EXPLORATION_SHARE`` of its time to the exploration budget.
        """
        share_s, most = self.EXPLORATION_SHARE * plain_s, self.MAX_SCHEDULED
        self._n_plain = most if budget_s >= most * share_s else int(budget_s / share_s)

    def _relative_error(self, n: int, arm: _Arm) -> float:
        """Returns the relative standard error of a step's time in units of a plain step's time.

        Few steps of a kind may have been timed, so the variance of the kind that varies more is
        used for both. The time of a drafter that finds no drafts may still be unknown; it is then
        taken to be a plain step's.
        """
        both = [self._costs.get((n, each)) for each in (PLAIN, arm)]
        known = [cost for cost in both if cost is not None and cost.mean is not None]
        variance = max(cost.variance for cost in known)
        return math.sqrt(variance * sum(1 / cost.weight for cost in known))

    def observe(
        self,
        n: int,
        k: int,
        *,
        choice: Choice,
        times: StepTimes | None,
        kept: Mapping[Any, int],
        steps: int = 1,
        n_made: int | None = None,
        mean_made: float | None = None,
    ) -> None:
        """Updates the estimates with a step, or with a multi-step program.

        Args:
            n: Rows.
            k: Drafts per row that the step verified; 0 if no row had any. It can be less than
                ``choice.k``, where chains ended early.
            choice: The choice that the step followed.
            times: Times of the step, or of all steps; None for the first of its size.
            kept: The number of tokens that the step yielded for each request that has not ended.
            steps: Number of steps that ``times`` covers.
            n_made: Drafts of the longest chain; None for ``k``.
            mean_made: The mean of ``n_made`` over the steps that ``times`` covers; None for
                ``n_made``.
        """
        n_made = k if n_made is None else n_made
        mean_made = float(n_made) if mean_made is None else mean_made
        since_plain, self._since_plain = self._since_plain, 0 if k == 0 else self._since_plain + 1
        if choice.k:
            self._with_drafts[choice.drafter].decay(self.DECAY)
            self._with_drafts[choice.drafter].add(float(k > 0))
            self._found_none[choice.drafter] = k == 0
        k_chosen = choice.k if k else 0  # a step without any draft was a plain step
        if k:
            self._n_plain = 0
            self._expected.clear()
            self._acceptance[choice.drafter].decay()
            self._newest_accepted[choice.drafter].decay()
            self._lengths.clear()
            for i, continuation in enumerate(self._continuation[choice.drafter], 1):
                continuation.decay()
                if i < choice.k and i <= n_made:
                    continuation.add(n_made > i)
        for request, n_tokens in kept.items():
            if k and choice.limits.get(request, k):
                own = self._of_request.setdefault(request, self._new_acceptance())[choice.drafter]
                own.decay()
                for acceptance in (own, self._acceptance[choice.drafter]):
                    acceptance.add(n_tokens, k_chosen)
                for i in range(min(n_tokens, n_made)):
                    self._newest_accepted[choice.drafter].add(n_tokens > i + 1)
        if times is None:
            return
        arm = (choice.drafter, k_chosen) if k_chosen else PLAIN
        seconds = (times.draft_s + times.model_s) / steps
        plain_s, unit_s = self._mean(n, PLAIN), 1.0
        if arm != PLAIN and not self._always:
            if plain_s is None:
                return
            unit_s = plain_s
        cost = self._costs.get((n, arm))
        if cost is None:
            with_line = arm != PLAIN and not self._always
            cost = self._costs[n, arm] = _StepTime(1.0 if with_line else None)
        is_known = cost.mean is not None
        limited_s = cost.add(seconds / unit_s, mean_made, 0 if k else since_plain) * unit_s
        plain_s = self._mean(n, PLAIN)
        if plain_s is None and not self._always:
            return
        step_s = plain_s or seconds
        share_s = self.EXPLORATION_SHARE * seconds * steps
        spent_s = limited_s + times.catch_up_s
        tokens_per_row = sum(kept.values()) / len(kept) if kept else None

        def updated(
            budget_s: float | None, token_s: float | None, initial: float, most: float
        ) -> float:
            """Adds to a budget its share of the steps' time, and what the steps gained or lost.

            The gain is the time that their tokens would have taken, at ``token_s`` each, less the
            time that they took.
            """
            budget_s = initial * step_s if budget_s is None else budget_s
            # The first steps of a kind are not counted: every kind must be measured.
            if token_s is not None and tokens_per_row is not None and is_known:
                budget_s += token_s * tokens_per_row - spent_s
            return min(most * step_s, budget_s + share_s)

        against_plain_s = plain_s if k else None
        self._gained_s = updated(
            self._gained_s, against_plain_s, self.INITIAL_GAINED, self.MAX_GAINED
        )
        self._trials_s = updated(self._trials_s, choice.trial_s, 0.0, self.MAX_BUDGET)

    def _cost_s(self, n: int, arm: _Arm) -> float | None:
        """Returns the mean time of a step of ``n`` rows with this arm; None while it is unknown.

        A step for which the drafter finds no drafts is a plain step. Until there is a step with
        drafts, its time is assumed to be a plain step's.
        """
        plain_s = self._mean(n, PLAIN)
        if plain_s is None or arm == PLAIN:
            return self._mean(n, arm)
        step = self._step_time(n, arm)
        if step is None or step.mean is None:
            return plain_s if self._found_none[arm[0]] else None
        step_s = step.mean if self._always else step.expected(self._length(*arm)) * plain_s
        return plain_s + self._share_with_drafts(arm[0]) * (step_s - plain_s)

    def _step_time(self, n: int, arm: _Arm) -> _StepTime | None:
        """Returns the time of a step in plain steps, with ``n`` rows or else the nearest number."""
        step = self._costs.get((n, arm))
        if self._always or (step is not None and step.mean is not None):
            return step
        known = (m for (m, each), other in self._costs.items() if each == arm and other.mean)
        nearest = min(known, key=lambda m: abs(math.log(m / n)), default=n)
        return self._costs.get((nearest, arm))

    def _mean(self, n: int, arm: _Arm) -> float | None:
        known = self._costs.get((n, arm))
        return None if known is None else known.mean

    def _length(self, drafter: int, k: int) -> float:
        """Returns the recent mean length of chains of at most k drafts."""
        lengths = self._lengths.get(drafter)
        if lengths is None:
            lengths, rate, all_made = [0.0, 1.0], 1.0, 1.0
            if self._ends_early:
                rate = self.PRIOR_CONTINUATION
            for continuation in self._continuation[drafter]:
                rate = continuation.mean(rate)
                all_made *= rate
                lengths.append(lengths[-1] + all_made)
            self._lengths[drafter] = lengths
        return lengths[k]

    def _share_with_drafts(self, drafter: int) -> float:
        """Returns the share of steps for which a drafter finds drafts; 1 before the first step."""
        return self._with_drafts[drafter].mean(1.0, 0.1)

    def _expected_tokens(self, limits: Mapping[Any, int], arm: _Arm) -> float:
        """Returns the expected tokens of a step, as their mean over its requests."""
        drafter, k = arm
        if k == 0:
            return 1.0
        total = sum(
            self._expected_accepted(request)[drafter][min(k, limit)]
            for request, limit in limits.items()
        )
        return 1.0 + self._share_with_drafts(drafter) * total / len(limits)

    def _expected_accepted(self, request: object) -> list[list[float]]:
        """Returns the expected number of accepted drafts of a request, by drafter and k.

        It is computed once between two steps with drafts.
        """
        found = self._expected.get(request)
        if found is None:
            found = [self._compute_accepted(request, d) for d in range(self._n_drafters)]
            self._expected[request] = found
        return found

    def _compute_accepted(self, request: object, drafter: int) -> list[float]:
        """Computes the expected number of accepted drafts of a request for each k from 0."""
        mine = self._of_request.get(request)
        totals, all_accepted, rate = [0.0], 1.0, self.PRIOR_ACCEPTANCE
        for i, of_all in enumerate(self._acceptance[drafter].positions):
            rate = of_all.mean(rate)
            samples = of_all if mine is None else mine[drafter].positions[i]
            own = rate if mine is None else samples.mean(rate, self.PRIOR_WEIGHT)
            if i == 0:
                weight = samples.weight + self.PRIOR_WEIGHT
                own = min(1.0, own + self.OPTIMISM * math.sqrt(own * (1 - own) / weight))
            all_accepted *= own
            totals.append(totals[-1] + all_accepted)
        return totals

    def _min_probability(self, limits: Mapping[Any, int], choice: Choice) -> float:
        """Returns the probability of accepted drafts below which a chain ends."""
        drafter, n = choice.drafter, len(limits)
        plain_s, step = self._mean(n, PLAIN), self._costs.get((n, (drafter, choice.k)))
        if not self._ends_early or choice.k < 2 or plain_s is None:
            return 0.0
        # The line needs the times of steps that made all drafts, so the first chains do not end.
        if step is None or step.mean is None:
            return 0.0
        best_per_s = max(
            self._expected_tokens(limits, arm) / self._known_cost_s(n, arm)
            for arm in (PLAIN, (drafter, choice.k))
            if self._cost_s(n, arm) is not None
        )
        rate = self._newest_accepted[drafter].mean(self.PRIOR_ACCEPTANCE)
        return best_per_s * step.per_draft * plain_s / rate

    def _known_cost_s(self, n: int, arm: _Arm) -> float:
        cost_s = self._cost_s(n, arm)
        assert cost_s is not None, "every size was measured"
        return cost_s


class StepTimer(DraftController):
    """A controller that always drafts the same number of tokens, and keeps every step's time.

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
