"""The commands between an engine's host side and its device side, and their results.

An ``EngineCore`` runs commands, in the order in which they are given. A ``Runner`` runs them on its
device; a ``RankGroup`` sends them to ranks, each of which has a Runner. A command returns a
``Pending`` at once, whose result arrives later, so that the next step can start before the tokens
of the last one have been looked at.

Nothing here needs torch: the host side can be tested against a core that has no device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from hotloop.types import SamplingParams, Score, TokenLogprob

Result = TypeVar("Result", covariant=True)

FEW = 64
"""Where no request's top-k is larger, top-k and top-p are decided among so many candidates."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """The capabilities that the requests of a step need of the sampler.

    Attributes:
        draw: A request does not decode greedily.
        truncate: A request uses top-k, top-p or min-p.
        n_best: Among how many of the most likely tokens top-k and top-p are to be decided: 0 where
            no request uses either, None for all tokens.
        penalize: A request uses a repetition penalty.
        logprobs: A request wants log-probabilities.
    """

    draw: bool = False
    truncate: bool = False
    n_best: int | None = 0
    penalize: bool = False
    logprobs: bool = False

    @classmethod
    def of(cls, requests: Iterable[SamplingParams]) -> Features:
        """The features that these requests need together."""
        requests = list(requests)
        drawn = [p for p in requests if not p.greedy]
        ranked = [p for p in drawn if p.top_k or p.top_p < 1]
        few = all(0 < p.top_k <= FEW for p in ranked)
        return cls(
            draw=bool(drawn),
            truncate=any(p.top_k or p.top_p < 1 or p.min_p for p in drawn),
            n_best=0 if not ranked else FEW if few else None,
            penalize=any(p.repetition_penalty != 1 for p in requests),
            logprobs=any(p.logprobs is not None for p in requests),
        )


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """How long the device spent on the parts of one step, in seconds.

    Attributes:
        catch_up_s: The drafter's reading of tokens that came from steps without drafts.
        draft_s: Making drafts.
        model_s: The model.
    """

    catch_up_s: float = 0.0
    draft_s: float = 0.0
    model_s: float = 0.0

    def __truediv__(self, n: int) -> StepTimes:
        """An n-th of each."""
        return StepTimes(
            catch_up_s=self.catch_up_s / n, draft_s=self.draft_s / n, model_s=self.model_s / n
        )


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The tokens of a step, on the host.

    Attributes:
        rows: Each row's tokens, with log-probabilities where a request wants them.
        n_drafts: How many drafts each row had.
        k: How many drafts the step was made for; 0 if no row had any.
        times: How long it took, where there is a drafter.
    """

    rows: Sequence[Sequence[tuple[int, TokenLogprob | None]]]
    n_drafts: Sequence[int]
    k: int = 0
    times: StepTimes | None = None


class Command(Generic[Result]):
    """A command to the device's side; its type parameter is the type of its result.

    Attributes:
        phase: The phase that an error names if the command fails.
    """

    phase: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class Admit(Command[StepResult]):
    """Prefills a prompt, and samples the first token of its answer, the only row of the result.

    Attributes:
        row: The row that the request gets.
        seat: The seat in the cache that the prompt is written into.
        params: How to sample.
        seed: Seeds the draws.
        prompt_ids: The prompt.
    """

    phase = "prefill"

    row: int
    seat: int
    params: SamplingParams
    seed: int
    prompt_ids: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class MoveRow(Command[None]):
    """Moves a request into another row, and overwrites that row.

    Its seat stays its seat: ``Step.seats`` says so.
    """

    phase = "decode"

    source: int
    target: int


@dataclass(frozen=True, kw_only=True)
class Step(Command[StepResult]):
    """Takes a decode step, or several plain ones, one after the other, as one program.

    Attributes:
        n: How many rows, from the first.
        seats: The seat of every row there is. The device may compute more rows than ``n``, up to a
            size that it has captured: the seats of rows without a request must hold nothing.
        longest: Exceeds every position in use, drafts included.
        features: What the sampler must do.
        k: Drafts for each row.
        n_steps: How many steps; 1 with drafts.
        known: By row in use, a position that its newest token has reached.
        slack: How far beyond that it may be, because of steps under way.
    """

    phase = "decode"

    n: int
    seats: tuple[int, ...]
    longest: int
    features: Features
    k: int = 0
    n_steps: int = 1
    known: Mapping[int, int] = dataclasses.field(default_factory=dict)
    slack: int = 0


@dataclass(frozen=True, kw_only=True)
class ScoreWindow(Command[Score]):
    """Scores a window of token ids.

    Attributes:
        seat: The seat that it is written into.
        ids: Two tokens or more.
        full: Also give the whole distribution at each position.
    """

    phase = "score"

    seat: int
    ids: Sequence[int]
    full: bool


@dataclass(frozen=True)
class Synchronize(Command[None]):
    """Waits until the device has done everything it was told before."""

    phase = "synchronize"


@dataclass(frozen=True)
class StartMeter(Command[None]):
    """Starts to measure the peak of memory."""

    phase = "meter"


@dataclass(frozen=True)
class StopMeter(Command[int]):
    """Bytes at the peak since ``StartMeter``; of several ranks, on the one that has most."""

    phase = "meter"


@dataclass(frozen=True)
class Describe(Command[dict[str, Any]]):
    """The fields of ``EngineDescription`` that the device's side knows."""

    phase = "describe"


class Pending(Protocol[Result]):
    """A result on its way to the host."""

    def wait(self) -> Result:
        """Waits for the result.

        Raises:
            HotloopError: What prevented it.
        """
        ...


@dataclass(frozen=True)
class Done(Generic[Result]):
    """A ``Pending`` that has arrived."""

    value: Result

    def wait(self) -> Result:
        """See ``Pending``."""
        return self.value


class EngineCore(Protocol):
    """The device's side of an engine."""

    @property
    def asynchronous(self) -> bool:
        """Whether ``run`` returns before the device has taken a step."""
        ...

    @property
    def captures(self) -> bool:
        """Whether programs become CUDA graphs."""
        ...

    def run(self, command: Command[Result]) -> Pending[Result]:
        """Runs a command after those given before, without waiting for a step.

        Raises:
            HotloopError: It failed, or the device's side has ended.
        """
        ...

    def close(self) -> None:
        """Frees the device."""
        ...
