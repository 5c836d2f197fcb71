"""Commands from an engine's host side to its device side, and their results.

An ``EngineCore`` runs commands in order. A ``Runner`` runs them on its device; a ``RankGroup``
sends them to ranks, each of which has a Runner. A command returns a ``Pending`` at once and its
result arrives later, so that the next step can start before the tokens of the previous one are
processed.

This module does not import torch: the host side can be tested against a core without a device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from hotloop.types import SamplingParams, Score, TokenLogprob

Result = TypeVar("Result", covariant=True)

TOP_K_CANDIDATES = 64
"""The number of most likely tokens that top-k and top-p filter, instead of the whole vocabulary, if
no request's top-k exceeds it."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """The features of the sampler that the requests of a step need.

    Attributes:
        draw: A request samples, and does not decode greedily.
        truncate: A request uses top-k, top-p or min-p.
        n_candidates: Number of most likely tokens that top-k and top-p filter; 0 if no request uses
            either, None for the whole vocabulary.
        adjust: A request changes logits: by penalties, ``logit_bias`` or ``min_new_tokens``.
        logprobs: A request wants log-probabilities.
        constrain: A request has a grammar.
    """

    draw: bool = False
    truncate: bool = False
    n_candidates: int | None = 0
    adjust: bool = False
    logprobs: bool = False
    constrain: bool = False

    @classmethod
    def of(cls, params: Iterable[SamplingParams]) -> Features:
        """Returns the features that requests with these options need together."""
        first, *others = map(cls._of_one, params)
        return functools.reduce(operator.or_, others, first)

    @classmethod
    def _of_one(cls, params: SamplingParams) -> Features:
        drawn = not params.greedy
        ranked = drawn and bool(params.top_k or params.top_p < 1)
        limited = 0 < params.top_k <= TOP_K_CANDIDATES
        return cls(
            draw=drawn,
            truncate=ranked or (drawn and params.min_p > 0),
            n_candidates=0 if not ranked else TOP_K_CANDIDATES if limited else None,
            adjust=params.adjusts_logits,
            logprobs=params.logprobs is not None,
            constrain=params.grammar is not None,
        )

    def __or__(self, other: Features) -> Features:
        """Returns the features that two requests need together."""
        candidates = self.n_candidates, other.n_candidates
        known = [n for n in candidates if n is not None]
        return Features(
            draw=self.draw or other.draw,
            truncate=self.truncate or other.truncate,
            n_candidates=max(known) if len(known) == 2 else None,
            adjust=self.adjust or other.adjust,
            logprobs=self.logprobs or other.logprobs,
            constrain=self.constrain or other.constrain,
        )

    def includes(self, other: Features) -> bool:
        """Returns whether a program with these features can run requests that need ``other``."""

        def n_candidates(features: Features) -> float:
            return math.inf if features.n_candidates is None else features.n_candidates

        flags = ("draw", "truncate", "adjust", "logprobs", "constrain")
        return n_candidates(self) >= n_candidates(other) and all(
            getattr(self, flag) >= getattr(other, flag) for flag in flags
        )


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Device time of the parts of one step, in seconds.

    Attributes:
        catch_up_s: Prefill of the draft model with tokens of steps without drafts.
        draft_s: Drafting.
        model_s: Forward of the model, and sampling.
    """

    catch_up_s: float = 0.0
    draft_s: float = 0.0
    model_s: float = 0.0

    def __truediv__(self, n: int) -> StepTimes:
        """Divides each time by n."""
        return StepTimes(
            catch_up_s=self.catch_up_s / n, draft_s=self.draft_s / n, model_s=self.model_s / n
        )


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The tokens of a step, on the host.

    Attributes:
        rows: Accepted tokens of each row, with log-probabilities if a request needs them.
        n_drafts: Number of drafts of each row.
        k: Draft positions that the step verified; 0 if no row had drafts.
        times: Times of the step; None without a drafter, and for the first step of a size.
        n_programs: Programs that were captured or compiled for steps so far, on this rank.
        failures: Why grammars have failed, by row. The tokens of such a row are invalid.
        later: The results of the later steps of a multi-step program with drafts.
    """

    rows: Sequence[Sequence[tuple[int, TokenLogprob | None]]]
    n_drafts: Sequence[int]
    k: int = 0
    times: StepTimes | None = None
    n_programs: int = 0
    failures: Mapping[int, str] = dataclasses.field(default_factory=dict)
    later: Sequence[StepResult] = ()


class Command(Generic[Result]):
    """A command to the device side; its type parameter is the type of its result.

    Attributes:
        phase: The phase that an error names if the command fails.
    """

    phase: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class Prefill(Command[None]):
    """Prefills one chunk of a prompt other than its last, which ``Admit`` prefills.

    Attributes:
        seat: The request's seat in the cache.
        start: Position of the chunk's first token.
        ids: The tokens of the chunk.
    """

    phase = "prefill"

    seat: int
    start: int
    ids: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class PrefillBatching:
    """Limits of batched prefill, within which each prompt gets the same bits as alone.

    Cached tokens of a prompt do not count. The prompts of a batch need equally many forwards: the
    shortest would otherwise wait for the longest.

    Attributes:
        max_prompts: Prompts of a batch.
        max_prompt_tokens: Tokens of each prompt.
        max_tokens: Tokens of all prompts together.
        max_forward_tokens: Tokens of one prompt in one forward.
    """

    max_prompts: int
    max_prompt_tokens: int
    max_tokens: int
    max_forward_tokens: int

    def n_forwards(self, n: int) -> int:
        """Returns the number of forwards that a prompt of ``n`` tokens needs."""
        return -(-n // self.max_forward_tokens)


@dataclass(frozen=True)
class QueryPrefillBatching(Command[PrefillBatching | None]):
    """Returns the limits of batched prefill; None if an ``Admit`` takes one prompt only."""

    phase = "describe"


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """A prompt whose last chunk is prefilled.

    Attributes:
        seat: The request's seat in the cache.
        params: The request's sampling options.
        seed: Seed of its sampling.
        eos_ids: Tokens that end its answer.
        prompt_ids: The whole prompt.
        start: Position of the chunk's first token: the seat holds those before.
        n_cached: Tokens that the seat held before the prompt's first chunk.
    """

    seat: int
    params: SamplingParams
    seed: int
    eos_ids: frozenset[int] = frozenset()
    prompt_ids: Sequence[int]
    start: int = 0
    n_cached: int = 0


@dataclass(frozen=True, kw_only=True)
class Admit(Command[StepResult]):
    """Prefills the last chunks of prompts together, and adds the requests to the rows.

    The result has a row for each prompt: the first token of its answer.

    Attributes:
        row: The row of the first request; the other requests get the next rows.
        prompts: The prompts; several only within the limits of ``PrefillBatching``.
    """

    phase = "prefill"

    row: int
    prompts: Sequence[Admitted]


@dataclass(frozen=True, kw_only=True)
class CopySeat(Command[None]):
    """Copies the first ``n`` positions of a seat into another seat."""

    phase = "prefill"

    source: int
    target: int
    n: int


@dataclass(frozen=True, kw_only=True)
class MoveRow(Command[None]):
    """Moves a request into another row, and overwrites that row.

    The request keeps its seat: ``Step.seats`` maps the new row to it.
    """

    phase = "decode"

    source: int
    target: int


StepKind = tuple[int, int, int]
"""A kind of step: drafts for each row, the number of their drafter, and steps of one program."""


@dataclass(frozen=True, kw_only=True)
class Step(Command[StepResult]):
    """Runs one decode step, or ``n_steps`` steps as one program (multi-step).

    Attributes:
        n: Number of rows, from the first.
        seats: The seat of each row. The device may compute more rows than ``n``, up to a captured
            size; it maps those to a scratch seat of its own.
        longest: An exclusive upper bound on the positions in use, those of drafts included.
        features: The features that the sampler needs.
        k: Drafts for each row.
        drafter: The number of the drafter that makes them.
        undrafted: Rows that get no drafts.
        min_probability: A chain of drafts ends once the probability that all of its drafts are
            accepted is below this; 0 never ends one. It has no effect without
            ``EngineCore.ends_chains``.
        n_steps: Number of steps; 1 with a grammar.
        known_positions: For each row in use, a lower bound on the position of its newest token.
        slack: The most tokens that steps in flight may add to a row, so the newest token's position
            is at most ``known_positions`` plus this.
        any_seats: Run the program that looks up each row's seat, even if the seats are
            consecutive: a server has captured no other program.
        kinds: The kinds of steps that can follow with these rows and features. Their programs are
            captured or compiled together with the program of this step, so that no later step of
            these requests has to wait for it.
    """

    phase = "decode"

    n: int
    seats: tuple[int, ...]
    longest: int
    features: Features
    k: int = 0
    drafter: int = 0
    undrafted: frozenset[int] = frozenset()
    min_probability: float = 0.0
    n_steps: int = 1
    known_positions: Mapping[int, int] = dataclasses.field(default_factory=dict)
    slack: int = 0
    any_seats: bool = False
    kinds: tuple[StepKind, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ScoreBatching:
    """Limits of batched scoring.

    Attributes:
        chunk: The most tokens of a chunk in a batch. A window that can share a prefix with others
            (``Scoring.group``) is divided into chunks of this size. Only the last chunks of windows
            are batched.
        max_windows: Windows of a batch.
        max_tokens: Tokens of all windows together, each taken to be as long as the longest.
        exact: The bits of a row do not depend on the other rows of a batch. Otherwise only windows
            that can share a prefix are batched, so that the scores of all others depend neither on
            the number of seats nor on load.
    """

    chunk: int
    max_windows: int = 1
    max_tokens: int = 0
    exact: bool = True

    def holds(self, lengths: Sequence[int]) -> bool:
        """Returns whether last chunks of these lengths can be scored as one batch."""
        n = len(lengths)
        longest = max(lengths)
        fits = longest <= self.chunk and n * longest <= self.max_tokens
        return n == 1 or (n <= self.max_windows and fits)


@dataclass(frozen=True)
class QueryScoreBatching(Command[ScoreBatching]):
    """Returns the limits of batched scoring."""

    phase = "describe"


@dataclass(frozen=True, kw_only=True)
class WindowChunk:
    """A chunk of a window of token ids.

    Attributes:
        seat: The seat in the cache to use.
        start: Position of the chunk's first token: the seat holds those before.
        ids: The tokens of the chunk, and the one that follows: two or more.
    """

    seat: int
    start: int
    ids: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class ScoreWindows(Command[Sequence[Score]]):
    """Scores chunks of windows together; the result has a score for each.

    Attributes:
        chunks: The chunks; several only within the limits of ``ScoreBatching``.
        full: Also return the whole distribution at each position.
        n_top: Also return this many most likely tokens at each position.
    """

    phase = "score"

    chunks: Sequence[WindowChunk]
    full: bool
    n_top: int = 0


@dataclass(frozen=True)
class Synchronize(Command[None]):
    """Waits until the device has completed every earlier command."""

    phase = "synchronize"


@dataclass(frozen=True)
class StartMeter(Command[None]):
    """Starts measuring peak memory."""

    phase = "meter"


@dataclass(frozen=True)
class StopMeter(Command[int]):
    """Returns peak bytes since ``StartMeter``, the maximum over ranks."""

    phase = "meter"


@dataclass(frozen=True)
class Describe(Command[dict[str, Any]]):
    """Returns the fields of ``EngineDescription`` that only the device side knows."""

    phase = "describe"


def padded_rows(n: int, n_rows: int) -> int:
    """Returns the rows that a captured step computes for ``n``: a power of two, or ``n_rows``."""
    return min(1 << (n - 1).bit_length(), n_rows)


class Pending(Protocol[Result]):
    """The result of a command, which arrives later."""

    def wait(self) -> Result:
        """Waits for the result.

        Raises:
            HotloopError: The command failed.
        """
        ...


@dataclass(frozen=True)
class Done(Generic[Result]):
    """A ``Pending`` whose result has arrived."""

    value: Result

    def wait(self) -> Result:
        """See ``Pending``."""
        return self.value


class EngineCore(Protocol):
    """The device side of an engine."""

    @property
    def asynchronous(self) -> bool:
        """Whether ``run`` returns before the device has completed a step."""
        ...

    @property
    def captures(self) -> bool:
        """Whether programs become CUDA graphs."""
        ...

    @property
    def ends_chains(self) -> bool:
        """Whether chains of drafts can end early."""
        ...

    @property
    def batch_invariant(self) -> bool:
        """Whether the bits of a token's keys and values do not depend on the rest of its batch.

        If so, a chunk, a part of a chunk and a decode step compute the same bits for a token.
        """
        ...

    def run(self, command: Command[Result]) -> Pending[Result]:
        """Runs a command after all earlier ones, without waiting for its result.

        Raises:
            HotloopError: It failed, or the device side has ended.
        """
        ...

    def close(self) -> None:
        """Frees the memory on the device."""
        ...
