"""How many tokens to draft in the next step, so that drafting pays or stays away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hotloop.engine.core import StepTimes


def sizes_up_to(most: int) -> tuple[int, ...]:
    """Numbers of drafts that are captured: 0, the powers of two, and the most."""
    sizes = {0, most} | {1 << i for i in range(most.bit_length()) if 1 << i <= most}
    return tuple(sorted(sizes))


@dataclass
class _Average:
    """A mean in which later values count more."""

    total: float = 0.0
    weight: float = 0.0

    def fade(self, share: float) -> None:
        """Makes every value added so far count less."""
        self.total, self.weight = self.total * share, self.weight * share

    def add(self, value: float) -> None:
        self.total, self.weight = self.total + value, self.weight + 1

    def mean(self, prior: float, weight: float = 1.0) -> float:
        """The mean, with the ``prior`` counting as ``weight`` further values."""
        return (self.total + prior * weight) / (self.weight + weight)


class DraftController:
    """Chooses how many tokens to draft in the next step.

    With a_i the chance that the i-th draft is right if those before it are, a step with k drafts
    gives 1 + a_1 + a_1 a_2 + … tokens, and takes as long as such steps took lately. The k with the
    most tokens per second is taken; 0 is one of them. Of drafts further ahead than were made lately
    it is expected that they are as good as the one before. Where 0 is best, chances can be learnt
    only at a loss: the next best k is tried now and then, as often as makes the time so lost at
    most ``TRIAL_SHARE`` of all time.

    Args:
        sizes: Numbers of drafts to choose from, ascending, 0 among them.
        always: Do not choose: as many as there may be.
    """

    TRIAL_SHARE = 0.01
    INITIAL_TRIALS = 2.0
    """Steps' worth of time that may be lost before anything was learnt."""

    CHANCE = 0.6
    """The chance that a draft is right, before any was seen."""

    MEMORY = 0.9
    """How much less each step counts than the one after it."""

    REFRESH = 64
    """A plain step is taken at least this often, to know how long one takes by now."""

    def __init__(self, sizes: Sequence[int], *, always: bool = False) -> None:
        self._sizes, self._always = tuple(sizes), always
        self._chances = [_Average() for _ in range(max(sizes))]
        self._costs: dict[tuple[int, int], _Average] = {}
        self._credit_s: float | None = None
        self._since_plain = 0

    def choose(self, n: int, limit: int) -> int:
        """Drafts for each of ``n`` rows in the next step; at most ``limit``."""
        sizes = [k for k in self._sizes if k <= max(0, limit)]
        if self._always:
            return sizes[-1]
        if unknown := [k for k in sizes if self._cost_s(n, k) is None]:
            return unknown[0]
        if len(sizes) == 1 or self._since_plain >= self.REFRESH:
            return 0
        best, *others = sorted(sizes, key=lambda k: self._tokens_per_s(n, k), reverse=True)
        if best == 0 and self._credit_s is not None and self._loss_s(n, others[0]) < self._credit_s:
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
        """Learns from a step, or from several plain ones that ran as one program.

        Args:
            n: Rows.
            k: Drafts that it was made for; 0 if no row had any.
            times: How long it took, or all of them; None for the first of its size.
            kept: Tokens that it gave each request.
            steps: How many they were.
        """
        self._since_plain = 0 if k == 0 else self._since_plain + 1
        if k:
            for chance in self._chances:
                chance.fade(self.MEMORY)
        for tokens in kept:
            for position in range(min(tokens, k)):
                self._chances[position].add(float(tokens > position + 1))
        if times is None:
            return
        seconds, known_s = (times.draft_s + times.model_s) / steps, self._cost_s(n, k)
        cost = self._costs.setdefault((n, k), _Average())
        cost.fade(self.MEMORY)
        # A single slow step, which another process got in the way of, says little.
        cost.add(seconds if known_s is None else min(seconds, 2 * known_s))
        plain_s = self._cost_s(n, 0)
        if plain_s is None:
            return
        most_s = self.INITIAL_TRIALS * plain_s
        credit_s = most_s if self._credit_s is None else self._credit_s
        if k and kept:
            plainly_s = plain_s * sum(kept) / len(kept)
            credit_s += plainly_s - seconds - times.catch_up_s
        self._credit_s = min(most_s, credit_s + self.TRIAL_SHARE * seconds * steps)

    def _cost_s(self, n: int, k: int) -> float | None:
        cost = self._costs.get((n, k))
        return None if cost is None else cost.mean(0.0, 0.0)

    def _tokens(self, k: int) -> float:
        total, all_right, expected = 1.0, 1.0, self.CHANCE
        for chance in self._chances[:k]:
            expected = chance.mean(expected)
            all_right *= expected
            total += all_right
        return total

    def _tokens_per_s(self, n: int, k: int) -> float:
        cost_s = self._cost_s(n, k)
        assert cost_s is not None, "every size was tried"
        return self._tokens(k) / cost_s

    def _loss_s(self, n: int, k: int) -> float:
        """The time that a step with k drafts takes beyond a plain one, lost if none is right."""
        cost_s, plain_s = self._cost_s(n, k), self._cost_s(n, 0)
        assert cost_s is not None
        assert plain_s is not None
        return cost_s - plain_s
