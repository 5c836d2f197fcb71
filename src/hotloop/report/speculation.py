"""Explains from records why speculative decoding paid, or did not.

A step with k drafts takes longer than a plain step: by the time to make the drafts, and the time to
verify more positions. It pays if its additional tokens compensate for that. The step times were
measured for every k. The number of tokens depends on the acceptance, so speed is a curve over the
acceptance.

In the curve, each draft is accepted with the same probability p if all earlier drafts are, so that
a step with k drafts yields 1 + p + … + p^k tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from hotloop.bench.record import Record, SpeculationFigures, StepCost
from hotloop.report.differences import Difference, format_speed_change, speed_difference
from hotloop.report.numbers import half_width, percent, significant, uncertain
from hotloop.report.recommend import unstable_suffix

ACCEPTANCES = (0.6, 0.7, 0.8, 0.9, 0.95)
"""The acceptances for which tables list the speed."""

_DRAFT_LEVERS = ("draft", "draft_quant", "draft_tokens", "draft_policy", "assume_acceptance")


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """A cell with drafts.

    Attributes:
        record: Its record.
        figures: Its drafting statistics.
        plain: The same cell without drafts, if there is one.
        gain: The difference of ln speed from that cell.
    """

    record: Record
    figures: SpeculationFigures
    plain: Record | None
    gain: Difference | None

    @cached_property
    def costs(self) -> dict[int, StepCost]:
        """The measured costs by number of drafts; empty if a plain step was not timed."""
        costs = {cost.k: cost for cost in self.figures.costs}
        return costs if 0 in costs and len(costs) > 1 else {}

    @property
    def sizes(self) -> list[int]:
        """The numbers of drafts, from 1, whose steps were timed."""
        return sorted(k for k in self.costs if k > 0)

    def step_s(self, k: int) -> float:
        """Returns the device's time of a step with k drafts, in seconds."""
        return self.costs[k].draft_s + self.costs[k].verify_s

    def speed_at(self, p: float, k: int) -> float:
        """Returns tokens per second with k drafts at acceptance p, by the device's time."""
        return expected_tokens(p, k) / self.step_s(k)

    def best_at(self, p: float) -> int:
        """Returns the number of drafts, from 1, that is fastest at acceptance p."""
        return max(self.sizes, key=lambda k: self.speed_at(p, k))

    def gain_at(self, p: float) -> float:
        """Returns the speed at acceptance p with the best k, relative to plain steps."""
        return self.speed_at(p, self.best_at(p)) * self.step_s(0)

    @cached_property
    def break_even(self) -> tuple[float, int] | None:
        """The lowest acceptance at which drafting pays, and its k; None if drafting never pays."""
        found = [(p, k) for k in self.sizes if (p := self.break_even_of(k)) is not None]
        return min(found, default=None)

    def break_even_of(self, k: int) -> float | None:
        """Returns the acceptance at which k drafts are as fast as none; None if there is none."""
        cost = self.step_s(k) / self.step_s(0)
        if cost > k + 1:
            return None
        low, high = 0.0, 1.0
        while (middle := (low + high) / 2) not in (low, high):
            low, high = (middle, high) if expected_tokens(middle, k) < cost else (low, middle)
        return high if cost > 1 else 0.0

    @cached_property
    def best_measured(self) -> int | None:
        """The number of drafts that is fastest at the measured acceptance; None if unknown."""
        speeds = {}
        for k in self.costs:
            shares = self.figures.acceptance[:k]
            if len(shares) == k and None not in shares:
                kept = sum(share for share in shares if share is not None)
                speeds[k] = (1 + kept) / self.step_s(k)
        return max(speeds, key=lambda k: speeds[k]) if len(speeds) > 1 else None

    @property
    def explanation(self) -> str:
        """A sentence on the acceptance that drafting needs to pay, and the measured one."""
        if not self.costs:
            return "step times were not recorded"
        most = self.sizes[-1]
        cost = self.step_s(most) / self.step_s(0)
        drafts = "draft" if most == 1 else "drafts"
        text = f"a step with {most} {drafts} takes as long as {cost:.2f} plain steps"
        if self.break_even is None:
            text += "; drafting pays at no acceptance"
        elif self.break_even[0] == 0:
            text += "; drafting costs nothing"
        else:
            p, k = self.break_even
            drafts = "draft" if k == 1 else "drafts"
            text += f"; drafting pays from an acceptance of {percent(p)} on, with {k} {drafts}"
        first = next(iter(self.figures.acceptance), None)
        if first is not None:
            kind = "assumed" if self.figures.assumed_acceptance is not None else "measured"
            text += f"; the {kind} acceptance of first drafts is {percent(first)}"
        if self.best_measured is not None:
            text += f", and {self.best_measured} drafts per step are fastest"
        return text

    @property
    def costs_text(self) -> str:
        """Milliseconds of drafting + verifying in a step, by number of drafts."""
        return "; ".join(
            f"{k}: {significant(cost.draft_s * 1e3, 3)} + {significant(cost.verify_s * 1e3, 3)}"
            for k, cost in sorted(self.costs.items())
        )

    @property
    def speed_texts(self) -> list[str]:
        """Tokens per second at each of ``ACCEPTANCES``, with the best number of drafts there."""
        if not self.costs:
            return ["–"] * len(ACCEPTANCES)
        best = [(p, self.best_at(p)) for p in ACCEPTANCES]
        return [f"{significant(self.speed_at(p, k), 3)} ({k})" for p, k in best]

    @property
    def plain_speed_text(self) -> str:
        """Tokens per second without drafts, by the device's time."""
        return significant(1 / self.step_s(0), 3)

    @property
    def gain_text(self) -> str:
        """Its speed relative to plain decoding, as a change in percent."""
        return format_speed_change(self.gain) + unstable_suffix(self.record, self.plain)

    @property
    def tokens_per_step(self) -> str:
        """Tokens per step."""
        figure = self.figures.tokens_per_step
        return uncertain(figure.mean, half_width(figure))

    @property
    def acceptance(self) -> str:
        """The share of drafts accepted at each position."""
        shares = self.figures.acceptance
        text = " ".join("–" if share is None else percent(share) for share in shares) or "–"
        assumed = self.figures.assumed_acceptance
        return text if assumed is None else f"{text} (assumed: {percent(assumed)} of each)"

    @property
    def draft_share(self) -> str:
        """The share of the device's time spent drafting."""
        share = self.figures.draft_share
        return "–" if share is None else percent(share)

    @property
    def plain_step_share(self) -> str:
        """The share of steps without drafts."""
        return percent(self.figures.off_share)


def details(record: Record) -> list[tuple[str, str]]:
    """Returns labels and values of a record with drafts; empty if step times are not known."""
    pairs = []
    for cell in drafting([record]):
        if cell.costs:
            speeds = zip(ACCEPTANCES, cell.speed_texts, strict=True)
            plain = cell.plain_speed_text
            listed = ", ".join(f"{percent(p)}: {speed}" for p, speed in speeds)
            pairs += [
                ("drafting", cell.explanation),
                ("ms to draft + verify", f"by number of drafts, {cell.costs_text}"),
                ("tok/s (drafts)", f"by acceptance, {listed}; {plain} without drafts"),
            ]
    return pairs


def expected_tokens(p: float, k: int) -> float:
    """Returns the tokens of a step with k drafts, each accepted with probability p."""
    return math.fsum(p**i for i in range(k + 1))


def drafting(records: Sequence[Record]) -> tuple[Drafting, ...]:
    """Collects the cells with drafts."""
    found = []
    for record in records:
        if record.speculation is None:
            continue
        plain = next((r for r in records if _is_plain_twin(r, record)), None)
        gain = speed_difference(plain, record) if plain else None
        found.append(Drafting(record=record, figures=record.speculation, plain=plain, gain=gain))
    return tuple(found)


def _is_plain_twin(record: Record, drafted: Record) -> bool:
    if record.speculation is not None or record.decode_tok_s is None or record.baseline:
        return False

    def other_levers(of: Record) -> dict[str, object]:
        return {name: value for name, value in of.config.items() if name not in _DRAFT_LEVERS}

    return other_levers(record) == other_levers(drafted)
