"""Simulates the draft controller on texts and costs, and compares it with the best fixed choice.

A simulated text has no tokens: for each drafter, it says of each position whether the draft is
right.  Drafts never change the tokens of an engine, so every choice meets the same text. Texts
are stationary, or switch between good and bad stretches, or are those that ``chains.py``
recorded. Costs are in units of a plain step, as measured on two CPU cores and on an H200, with
noise. As in an engine, a step is chosen before the result of the step before it is known, and the
controller has warmed up on another text.

For each text and costs it prints the speed, relative to plain steps, of the best fixed number of
drafts, and of the controller in the first answer of an engine and in later ones: the mean over
engines, and the lowest. The results do not depend on the machine.

    python benchmarks/draft_control.py --chains benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from hotloop.engine.core import StepTimes
from hotloop.engine.draft_control import DraftController, sizes_up_to

Drafts = Sequence[tuple[bool, float]]
"""For each token of a text, whether its draft is right, and the drafter's probability of it."""

Text = Callable[[Random, int], Drafts]
"""Makes the drafts of n tokens."""

SURE = 0.99
"""The drafter's probability of the drafts that are nearly certain; see ``_draft``."""


@dataclass(frozen=True)
class Costs:
    """Costs of steps. Those in plain steps are multiples of the time of a plain step.

    Attributes:
        plain_s: Time of a plain step.
        draft: The cost of a draft in plain steps, for each drafter.
        verify: The cost of verifying k drafts, in plain steps.
        noise: The standard deviation of the logarithm of a step's time.
        cold: The time of the first step of its kind, relative to later ones.
        n_steps: The plain steps that one program runs; it runs half as many steps with drafts.
        verifies_all: Positions without a draft are verified too, as in CUDA graphs.
        drift: The standard deviation of the logarithm of the machine's speed, which keeps changing
            over some ``DRIFT_STEPS`` plain steps; speeds are relative to plain steps at the time.
    """

    plain_s: float
    draft: tuple[float, ...]
    verify: dict[int, float]
    noise: float
    cold: float = 1.0
    n_steps: int = 1
    verifies_all: bool = False
    drift: float = 0.0

    @property
    def mean_plain_s(self) -> float:
        """The mean time of a plain step, with noise and delays."""
        delays = 1 + DELAYED if self.noise > 0.01 else 1.0
        return self.plain_s * math.exp(self.noise**2 / 2) * delays

    def time_of(self, drafter: int, k: int, n_made: int | None = None) -> float:
        """Returns the time of a step with up to k drafts, in plain steps."""
        n_made = k if n_made is None else n_made
        if n_made == 0:
            return 1.0
        return self.draft[drafter] * n_made + self.verify[k if self.verifies_all else n_made]


DELAYED = 0.02
"""The share of steps on a CPU that take twice their time."""

DRIFT_STEPS = 400
"""Plain steps within which a machine's speed changes, where it drifts."""

CPU = {1: 1.04, 2: 0.95, 3: 1.2, 4: 1.45}
CPU_INT8 = {1: 1.06, 2: 1.15, 3: 1.32, 4: 1.5}
COSTS = {
    "cpu none": Costs(0.0125, (0.43,), CPU, 0.06, 1.5),
    "cpu int8": Costs(0.0125, (0.55,), CPU_INT8, 0.06, cold=1.5),
    "cpu int8 measured": Costs(
        0.0069, (0.78,), {1: 1.12, 2: 1.3, 3: 1.45, 4: 1.6}, 0.06, 1.5, drift=0.08
    ),
    "cpu none drifts": Costs(0.0125, (0.43,), CPU, 0.06, 1.5, drift=0.08),
    "h200 13b none": Costs(
        0.0060, (0.36,), {1: 1.02, 2: 1.04, 4: 1.06, 7: 1.1}, 0.004, verifies_all=True
    ),
    "h200 8b int8": Costs(
        0.0021, (0.68,), {1: 1.075, 2: 1.13, 4: 1.17, 7: 1.22}, 0.004, n_steps=4, verifies_all=True
    ),
    "h200 70b int8": Costs(
        0.0172, (0.58,), {1: 1.056, 2: 1.063, 4: 1.08, 7: 1.12}, 0.004, verifies_all=True
    ),
}


def stationary(p: float) -> Text:
    """Makes a text whose drafts are right with probability ``p``."""
    return lambda random, n: [_draft(random, p) for _ in range(n)]


def _draft(random: Random, p: float) -> tuple[bool, float]:
    """Draws whether a draft is right, with probability ``p``, and the drafter's probability of it.

    The share p * p of drafts is nearly certain, and the drafter's probabilities are calibrated.
    """
    probability = SURE if random.random() < p * p else (p - SURE * p * p) / (1 - p * p)
    return random.random() < probability, probability


def switching(high: float, low: float, length: int) -> Text:
    """Makes a text of alternately good and bad stretches of about ``length`` tokens."""

    def made(random: Random, n: int) -> Drafts:
        drafts: list[tuple[bool, float]] = []
        good = random.random() < 0.5
        while len(drafts) < n:
            stretch = max(1, round(random.gauss(length, length / 5)))
            drafts += [_draft(random, high if good else low) for _ in range(stretch)]
            good = not good
        return drafts[:n]

    return made


def recorded(chains: Sequence[tuple[list[float], int]]) -> Text:
    """Makes a text that repeats the acceptance that ``chains.py`` recorded, from any token on."""
    drafts: list[tuple[bool, float]] = []
    for probabilities, accepted in chains:
        drafts += [(True, p) for p in probabilities[:accepted]]
        drafts += [(False, p) for p in probabilities[accepted : accepted + 1]]

    def made(random: Random, n: int) -> Drafts:
        start = random.randrange(len(drafts))
        return [drafts[(start + i) % len(drafts)] for i in range(n)]

    return made


class Request:
    """A request without content, of which a controller needs only the identity."""


@dataclass
class Engine:
    """A simulated engine, whose steps take the given times.

    Attributes:
        controller: The ``DraftController``.
        costs: The costs of its steps.
        random: The source of noise.
        found: For each drafter, the probability that it finds a draft.
        ran: The kinds of steps that have run: drafter, number of drafts.
        n_plain: Plain steps so far.
        n_all: Steps so far.
        slowness: The logarithm of the current time of a plain step, relative to its usual time.
    """

    controller: Any
    costs: Costs
    random: Random
    found: tuple[float, ...] = (1.0,)
    ran: set[tuple[int, int]] = field(default_factory=set)
    n_plain: int = 0
    n_all: int = 0
    slowness: float = 0.0

    def answer(self, n: int, texts: Sequence[Sequence[Text]]) -> float:
        """Answers requests with n tokens each; returns the time relative to plain steps.

        Args:
            n: Tokens of each.
            texts: For each request, a text of each drafter.
        """
        requests = {
            Request(): [text(self.random, n + 64) for text in drafters] for drafters in texts
        }
        at = dict.fromkeys(requests, 0)
        seconds, plain_s, late = 0.0, 0.0, []
        while min(at.values()) < n:
            limits = dict.fromkeys(requests, 99)
            choice = self.controller.choose(limits, 99)
            for observe in late:  # the step before, which was in flight
                observe()
            late = []
            n_steps = self.costs.n_steps
            n_results = 1
            if choice.k:
                n_results, n_steps = (max(1, n_steps // 2) if len(requests) == 1 else 1), 1
            program_s, results, lengths = 0.0, [], []
            for _ in range(n_results):
                k = choice.k
                if k and self.random.random() >= self.found[choice.drafter]:
                    k = 0
                kept, n_made = {}, 0
                for request, texts_of in requests.items():
                    i, accepted = at[request], 0
                    drafts = texts_of[choice.drafter][i : i + k]
                    made = length(drafts, choice.min_probability)
                    n_made = max(n_made, made)
                    while accepted < made and drafts[accepted][0]:
                        accepted += 1
                    kept[request] = accepted + 1 if choice.k else n_steps
                    at[request] = min(n + 30, i + kept[request])
                step_s = self._time_s(choice.drafter, k, n_made)
                first = (choice.drafter, k) not in self.ran
                self.ran.add((choice.drafter, k))
                if first:
                    step_s *= self.costs.cold
                seconds += step_s * n_steps
                tokens = sum(kept.values()) / len(kept)
                plain_s += self.costs.mean_plain_s * math.exp(self.slowness) * tokens
                self._drift(step_s * n_steps / self.costs.plain_s)
                self.n_all += n_steps
                self.n_plain += n_steps * (n_made == 0)
                program_s += step_s * n_steps / n_results
                lengths.append(n_made)
                results.append((k if self.costs.verifies_all else n_made, kept, n_made))
            times: StepTimes | None = StepTimes(model_s=program_s)
            if first and self.costs.cold == 1.0:
                times = None  # its graph was captured, so no time was measured
            for k, kept, n_made in results:
                observed = {"choice": choice, "times": times, "kept": kept, "steps": n_steps}
                observed |= {"n_made": n_made, "mean_made": statistics.fmean(lengths)}
                observe = functools.partial(self.controller.observe, len(requests), k, **observed)
                late.append(observe)
        for observe in late:
            observe()
        return seconds / plain_s

    def _drift(self, steps: float) -> None:
        """Changes the speed of the machine, as an Ornstein-Uhlenbeck process."""
        kept = math.exp(-steps / DRIFT_STEPS)
        spread = self.costs.drift * math.sqrt(1 - kept**2)
        self.slowness = self.slowness * kept + self.random.gauss(0.0, spread)

    def _time_s(self, drafter: int, k: int, n_made: int) -> float:
        noise = self.costs.noise
        factor = math.exp(self.random.gauss(0.0, noise) + self.slowness)
        if noise > 0.01 and self.random.random() < DELAYED:
            factor *= 2.0
        return self.costs.plain_s * self.costs.time_of(drafter, k, n_made) * factor


def length(drafts: Drafts, min_probability: float) -> int:
    """Returns the length of a chain that ends once its probability is below ``min_probability``."""
    survival, n = 1.0, 0
    for _, probability in drafts:
        n, survival = n + 1, survival * probability
        if survival < min_probability:
            break
    return n


def best_fixed(costs: Costs, texts: Sequence[Text], found: Sequence[float]) -> tuple[float, int]:
    """Returns the speed of the best fixed choice, relative to plain steps, and its k."""
    random, best = Random(99), (1.0, 0)
    for drafter, text in enumerate(texts):
        right = text(random, 20_000)
        for k in costs.verify:
            i, seconds = 0, 0.0
            while i < len(right) - 16:
                if random.random() >= found[drafter]:
                    i, seconds = i + 1, seconds + 1.0
                    continue
                accepted = 0
                while accepted < k and right[i + accepted][0]:
                    accepted += 1
                i, seconds = i + accepted + 1, seconds + costs.time_of(drafter, k)
            best = max(best, (i / seconds, k))
    return best


def simulate(
    new_controller: Callable[..., Any],
    costs: Costs,
    texts: Sequence[Text],
    *,
    found: Sequence[float] = (1.0, 1.0),
    rows: int = 1,
    lengths: Sequence[int] = (128, 128, 128, 128),
    engines: int = 24,
    warm_up: float = 0.4,
) -> list[list[float]]:
    """Returns the speed, relative to plain steps, of each answer of each engine."""
    speeds = []
    for seed in range(engines):
        engine = Engine(new_controller(n_drafters=len(texts)), costs, Random(seed), tuple(found))
        engine.answer(33 * len(texts), [[stationary(warm_up)] * len(texts)])
        engine.controller.forget_texts()
        speeds.append([1 / engine.answer(n, [texts] * rows) for n in lengths])
    return speeds


def cases(chains: Path | None) -> Iterator[tuple[str, Text]]:
    """Yields texts and their names."""
    for p in (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.92):
        yield f"p {p}", stationary(p)
    for length in (20, 60, 200):
        yield f"0.95 / 0.2 by {length}", switching(0.95, 0.2, length)
    if chains is not None:
        for name, found in json.loads(chains.read_text())["chains"].items():
            yield name, recorded(found)


def main() -> None:
    """Prints a line for each text and costs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--chains", type=Path, help="a file of chains.py, whose texts are added")
    parser.add_argument("--costs", nargs="+", choices=list(COSTS), default=list(COSTS))
    parser.add_argument("--engines", type=int, default=24)
    parser.add_argument("--rows", type=int, default=1)
    args = parser.parse_args()

    for name in args.costs:
        sizes = sizes_up_to(max(COSTS[name].verify))
        new = functools.partial(DraftController, sizes, ends_early=True)
        for label, text in cases(args.chains):
            best, k = best_fixed(COSTS[name], [text], [1.0])
            options = {"rows": args.rows, "engines": args.engines}
            short = simulate(new, COSTS[name], [text], **options)
            long = simulate(new, COSTS[name], [text], lengths=(512, 512), **options)
            first = [each[0] for each in short]
            later = [statistics.mean(each[1:]) for each in short]
            print(
                f"{name:14} {label:16} best {best:.2f} with {k}  128: first {mean(first)}"
                f"  later {mean(later)}  512: first {mean([each[0] for each in long])}"
                f"  later {mean([each[1] for each in long])}"
            )


def mean(speeds: Sequence[float]) -> str:
    """Formats the mean and the lowest speed."""
    return f"{statistics.mean(speeds):.3f} ({min(speeds):.2f})"


if __name__ == "__main__":
    main()
