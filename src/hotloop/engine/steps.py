"""Runs decode steps: device programs that read rows and update them for the next step.

A step is embed, layers, logits, sample, accept. It reads tokens and positions from the rows and
writes the next ones there, so that steps can follow each other without the host. The host gets a
``Sampled`` of each step.

With speculative decoding a step is two programs: a drafter proposes k tokens for every row, and the
model verifies them in one forward of k + 1 positions. At each position it samples a token as it
would without drafts; drafts that equal these tokens are accepted, and the step yields the tokens up
to the first rejected draft. Every token is thus the model's own: with greedy decoding or sampling,
speculation changes the times of tokens and never the tokens (see ``speculation``). If steps are
short, several steps, drafts included, are one program.

If a request has a grammar, the model has two programs: *forward* keeps the logits, and *choose*
samples once the host has written the masks of allowed tokens (``constraints``).

``eager`` runs a program operation by operation. ``compile`` compiles the forward with torch.compile
(``forward``); ``fused`` runs it with our own kernels (``fused``), and samples with one kernel. On a
GPU, both capture each size of program once in a CUDA graph (``graphs``), which removes the host's
work between kernels.

Shape letters: B rows of a step, T positions of each, D drafts, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from hotloop.engine.chains import ChainEnd
from hotloop.engine.constraints import Constraints, Drafts
from hotloop.engine.core import Features, Step, StepKind, StepTimes, padded_rows
from hotloop.engine.forward import Forward
from hotloop.engine.graphs import Graphs
from hotloop.engine.rows import Rows
from hotloop.engine.sampling import Sampled, Sampler
from hotloop.engine.simulated_acceptance import simulate_acceptance
from hotloop.engine.speculation import Drafter

Result = TypeVar("Result")

MIN_LENGTH = 256
"""The fewest cache positions that attention reads; above it, the number is a power of two."""

Timestamps = Sequence[Any]
"""The start of a step and the end of each of its parts: clock readings in seconds, or CUDA events.
"""


def step_times(timestamps: Timestamps) -> StepTimes:
    """Returns the times between timestamps, once the device has passed the last one."""
    spans = [
        end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3
        for begin, end in itertools.pairwise(timestamps)
    ]
    catch_up_s, draft_s, model_s = spans
    return StepTimes(catch_up_s=catch_up_s, draft_s=draft_s, model_s=model_s)


@dataclasses.dataclass(frozen=True)
class _Program:
    """The key of a program: a CUDA graph is captured for each.

    Attributes:
        part: The part of a step that it runs; see ``Stepper._programs``.
        n: Rows to compute.
        k: Drafts of each.
        first_seat: See ``Forward``.
        length: See ``Forward``.
        features: The features that the sampler needs.
        n_steps: Steps that it runs.
        drafter: The number of the drafter.
    """

    part: Literal["draft", "step", "drafting steps", "forward", "choose"]
    n: int
    k: int
    first_seat: int | None = None
    length: int = 0
    features: Features = dataclasses.field(default_factory=Features)
    n_steps: int = 1
    drafter: int = 0


class _Inputs(NamedTuple):
    """The input of a step.

    Attributes:
        drafts: int64 [B, D]; None without drafts.
        ids: int64 [B, T], the newest token of each row and its drafts.
        positions: int64 [B, T], their positions.
    """

    drafts: Tensor | None
    ids: Tensor
    positions: Tensor


class Stepper:
    """Runs decode steps.

    Args:
        forward: The model.
        rows: The rows to advance.
        sampler: Samples tokens.
        constraints: The grammars of the rows.
        drafters: The drafters, of which each step uses one; empty without speculative decoding.
        max_drafts: The most drafts in a step.
        verified: Numbers of drafts that programs verify, ascending: a chain that ends early is
            padded to one of them.
        chain_end: Ends chains of drafts early; None never does.
        assumed_acceptance: See ``EngineConfig.assume_acceptance``.
        n_positions: Positions of the cache.
        captures: Whether programs become CUDA graphs.
        compiles: Whether the forward is compiled for each number of tokens.
        indexes_seats: Attention kernels index the cache by seat and stop at each row's position. If
            not, they get the length of cache to read, and the first seat if seats are in order.
    """

    def __init__(
        self,
        forward: Forward,
        rows: Rows,
        sampler: Sampler,
        constraints: Constraints,
        *,
        drafters: Sequence[Drafter],
        max_drafts: int,
        verified: Sequence[int],
        chain_end: ChainEnd | None = None,
        assumed_acceptance: float | None = None,
        n_positions: int,
        captures: bool,
        compiles: bool,
        indexes_seats: bool,
    ) -> None:
        self.forward, self.rows, self.sampler, self.drafters = forward, rows, sampler, drafters
        self.constraints, self._max_drafts, self._verified = constraints, max_drafts, verified
        self.n_positions = n_positions
        self.assumed_acceptance = assumed_acceptance
        self.indexes_seats = indexes_seats
        self._device = rows.positions.device
        self._drafts = rows.positions.new_full((len(rows.positions), max(1, max_drafts)), -1)
        self._graphs = Graphs(self._device) if captures else None
        self._chain_end, self._compiles = chain_end, compiles
        self._made: set[Hashable] = set()  # the arguments of _make
        self._compiled: set[tuple[int, int, int | None]] = set()  # see _make
        self._ran: set[_Program] = set()  # programs run or compiled, where none are captured

    def step(self, step: Step) -> tuple[Sampled, Timestamps | None, Mapping[int, str]]:
        """Runs a step, which yields one token or more for each row.

        On a CPU, where the host can read drafts at no cost, a step verifies only the drafts that
        exist, and a step without any draft is a plain step.

        Returns:
            Tensors that are valid until the next step of the same size; the timestamps of the
            step's parts, or None without a drafter or if something was compiled; and why grammars
            have failed, by row.
        """
        n, k = step.n, step.k
        wanted = self.sampler.relevant(step.features)
        if self._graphs is not None:  # fewer sizes to compile and to capture
            n = padded_rows(n, len(self.rows.positions))
        self.rows.place(step.seats, step.undrafted)
        in_order = n == step.n and not step.any_seats
        first_seat = self._first_seat(step.seats) if in_order else None
        reads = (first_seat, self.length(step.longest))
        kinds = step.kinds or ((k, step.drafter, step.n_steps),)
        if (made := (n, reads, wanted, kinds)) not in self._made:
            self._make(*made)
            self._made.add(made)
        if not self.drafters:
            sampled, failures = self._sample(step, n, 0, reads, wanted)
            return sampled, None, failures
        drafts: Drafts = ()
        n_programs_before = self.n_programs
        timestamps = [self._timestamp()]
        for i, drafter in enumerate(self.drafters):
            if k == 0 or i != step.drafter:
                drafter.skip(step.seats)
        if k:
            programs = self._programs(n, k, reads, wanted, step.n_steps, step.drafter)
            self.drafters[step.drafter].catch_up(step)
            if self._chain_end is not None:  # in the mean over rows, padding counts as 0
                self._chain_end.set_min_probability(step.min_probability * step.n / n)
            timestamps.append(self._timestamp())
            if step.n_steps > 1:
                sampled = self._run(*programs["drafting steps"])
                timestamps += [timestamps[-1], self._timestamp()]  # its parts are not timed
                is_timed = self.n_programs == n_programs_before
                return sampled, timestamps if is_timed else None, {}
            on_host = self._device.type == "cpu" and self._graphs is None
            self._run(*programs["draft"])
            if wanted.constrain:
                drafted = [row for row in range(step.n) if row not in step.undrafted]
                drafts, replaced = self.constraints.redraft(self._drafts[:n, :k], drafted)
                self.drafters[step.drafter].skip([step.seats[row] for row in replaced])
            if on_host:
                n_drafted = int((self._drafts[:n, :k] >= 0).any(dim=0).sum())
                k = min(k, next(size for size in self._verified if size >= n_drafted))
                drafts = [row[:k] for row in drafts] if k else ()
        else:
            timestamps.append(self._timestamp())
        timestamps.append(self._timestamp())
        sampled, failures = self._sample(step, n, k, reads, wanted, drafts)
        timestamps.append(self._timestamp())
        is_timed = self.n_programs == n_programs_before
        return sampled, timestamps if is_timed else None, failures

    def _make(
        self,
        n: int,
        reads: tuple[int | None, int],
        features: Features,
        kinds: Sequence[StepKind],
    ) -> None:
        """Captures or compiles the programs of these kinds of steps that do not exist yet.

        It changes no row. What it writes to the cache is beyond the tokens of the rows, so later
        steps overwrite it before it is read.
        """
        if self._graphs is not None:
            for k, drafter, n_steps in kinds:
                if n_steps > 1 and features.constrain:
                    continue
                programs = self._programs(n, k, reads, features, n_steps, drafter)
                for program, run in programs.values():
                    self._graphs.make(program, partial(run, program), self._state)
        elif self._compiles:
            for k in sorted({k for k, _, _ in kinds}):
                # Includes k = 0: on a CPU, a step for which no drafts are found runs that program.
                if (size := (n, k, reads[0])) not in self._compiled:
                    program = _Program("forward", n, k, *reads)
                    self._forward(program, self._inputs(program))
                    self._compiled.add(size)
                programs = self._programs(n, k, reads, features)
                self._ran |= {program for part, (program, _) in programs.items() if part != "draft"}

    def _programs(
        self,
        n: int,
        k: int,
        reads: tuple[int | None, int],
        features: Features,
        n_steps: int = 1,
        drafter: int = 0,
    ) -> Mapping[str, tuple[_Program, Callable[[_Program], Any]]]:
        """Returns the programs of a kind of step by part, each with the function that runs it.

        Args:
            n: Rows to compute.
            k: Drafts of each.
            reads: First seat and length of the cache that attention reads.
            features: The features that the sampler needs.
            n_steps: Steps of one program.
            drafter: The number of the drafter.
        """
        parts: list[tuple[_Program, Callable[[_Program], Any]]] = []
        if k and n_steps > 1:
            assert not features.constrain, "a grammar needs each token on the host"
            several = _Program("drafting steps", n, k, *reads, features, n_steps, drafter)
            return {several.part: (several, self._drafting_steps)}
        if k:
            drafting = dataclasses.replace(features, logprobs=False, constrain=False)
            draft = _Program("draft", n, k, *reads, drafting, drafter=drafter)
            parts.append((draft, self._draft))
        if features.constrain:
            _ = self._logits  # made before a capture
            parts.append((_Program("forward", n, k, *reads), self._keep_logits))
            parts.append((_Program("choose", n, k, features=features), self._choose))
        else:
            parts.append((_Program("step", n, k, *reads, features, n_steps), self._steps))
        return {program.part: (program, run) for program, run in parts}

    def _sample(
        self,
        step: Step,
        n: int,
        k: int,
        reads: tuple[int | None, int],
        features: Features,
        drafts: Drafts = (),
    ) -> tuple[Sampled, Mapping[int, str]]:
        """Runs the model and samples; with grammars, the host writes the masks in between.

        Args:
            step: The step.
            n: Rows to compute.
            k: Drafts of each.
            reads: First seat and length of the cache that attention reads.
            features: The features that the program has.
            drafts: The drafts on the host, if there are grammars.

        Returns:
            See ``step``.
        """
        programs = self._programs(n, k, reads, features, step.n_steps)
        if not features.constrain:
            return self._run(*programs["step"]), {}
        assert step.n_steps == 1, "a grammar needs each token on the host"
        self._run(*programs["forward"])
        masks_BTW, drafts_BD = self.constraints.masks(n, k + 1), self._drafts[:n, :k]
        failures = self.constraints.fill(step.n, masks_BTW, drafts, drafts_BD)
        return self._run(*programs["choose"]), failures

    def length(self, longest: int) -> int:
        """Returns the number of cache positions that a step reads for ``longest``."""
        if self.indexes_seats:
            return self.n_positions
        length = max(MIN_LENGTH, 1 << (longest - 1).bit_length())
        return min(length, self.n_positions)

    def _first_seat(self, seats: tuple[int, ...]) -> int | None:
        """Returns the first seat if attention needs it and seats are in order, else None.

        A CUDA graph bakes in ``first_seat``, so only 0 and None are captured.
        """
        first, *_ = seats
        in_order = seats == tuple(range(first, first + len(seats)))
        if self.indexes_seats or not in_order or (self._graphs is not None and first > 0):
            return None
        return first

    def _draft(self, program: _Program) -> None:
        """Drafts k tokens for each row, into ``_drafts``; -1 for rows that get none."""
        n, k = program.n, program.k
        drafts = self.drafters[program.drafter].propose(
            n,
            k,
            first_seat=program.first_seat,
            length=program.length,
            features=dataclasses.replace(program.features, logprobs=False),
            end=self._chain_end,
        )
        self._drafts[:n, :k].copy_(drafts.masked_fill(self.rows.undrafted[:n], -1))

    def _steps(self, program: _Program) -> Sampled:
        """Runs a step, or the plain steps of a multi-step program."""
        return Sampled.joined([self._model(program) for _ in range(program.n_steps)])

    def _drafting_steps(self, program: _Program) -> Sampled:
        """Runs the steps of a multi-step program with drafts."""
        steps = []
        for _ in range(program.n_steps):
            self._draft(program)
            steps.append(self._model(program))
        return Sampled.joined(steps)

    def _model(self, program: _Program) -> Sampled:
        """Runs the model on the newest tokens and their drafts, samples, and accepts."""
        inputs = self._inputs(program)
        logits_BTV, best_BT = self._forward(program, inputs)
        return self._accept(program, inputs, logits_BTV, best_BT=best_BT)

    def _inputs(self, program: _Program) -> _Inputs:
        drafts_BD = self._drafts[: program.n, : program.k] if program.k else None
        return _Inputs(drafts_BD, *self.rows.next_tokens(program.n, drafts_BD))

    def _forward(self, program: _Program, inputs: _Inputs) -> tuple[Tensor, Tensor | None]:
        return self.forward(
            inputs.ids,
            inputs.positions,
            self.rows.seats[: program.n],
            first_seat=program.first_seat,
            length=program.length,
        )

    @cached_property
    def _logits(self) -> Tensor:
        """The logits of a step with grammars, float32 [B * T, V] in the first rows."""
        n_rows = len(self.rows.positions) * (1 + self._max_drafts)
        V = len(self.sampler.vocabulary.rows)
        return torch.empty(n_rows, V, dtype=torch.float32, device=self._device)

    def _keep_logits(self, program: _Program) -> None:
        """Runs the model and keeps its logits for ``_choose``."""
        logits_BTV, _ = self._forward(program, self._inputs(program))
        self._logits[: program.n * (program.k + 1)] = logits_BTV.flatten(0, 1)

    def _choose(self, program: _Program) -> Sampled:
        """Samples from the kept logits under the grammars' masks, and accepts."""
        n, T = program.n, program.k + 1
        logits_BTV = self._logits[: n * T].view(n, T, -1)
        masks_BTW = self.constraints.masks(n, T)
        return self._accept(program, self._inputs(program), logits_BTV, masks_BTW=masks_BTW)

    def _accept(
        self,
        program: _Program,
        inputs: _Inputs,
        logits_BTV: Tensor,
        *,
        best_BT: Tensor | None = None,
        masks_BTW: Tensor | None = None,
    ) -> Sampled:
        """Samples, and appends the tokens that are accepted to the rows."""
        features, (drafts_BD, ids_BT, positions_BT) = program.features, inputs
        after_BT = positions_BT + 1 if features.draw or features.adjust else None
        sampled = self.sampler.sample(
            logits_BTV, after_BT, 0, features, drafts_BD, best_BT=best_BT, masks_BTW=masks_BTW
        )
        ids = sampled.ids
        if drafts_BD is not None and self.assumed_acceptance is not None:
            ids = simulate_acceptance(ids, drafts_BD, ids_BT, positions_BT, self.assumed_acceptance)
        n_kept_B, n_drafts_B = self.rows.accept(ids, drafts_BD)
        sampled = dataclasses.replace(sampled, ids=ids, n_kept=n_kept_B, n_drafts=n_drafts_B)
        if features.adjust:
            self.sampler.update_penalties(ids, 0, n_kept_B)
        return sampled

    def _run(self, program: _Program, run: Callable[[_Program], Result]) -> Result:
        """Runs a program: its CUDA graph if programs are captured, else ``run``."""
        if self._graphs is None:
            self._ran.add(program)
            return run(program)
        return self._graphs.run(program, partial(run, program), self._state)

    @property
    def _state(self) -> Sequence[Tensor]:
        """The tensors that programs change, except those that every step writes anew."""
        return (self.rows.history, self.rows.positions, *self.sampler.penalty_state)

    @property
    def n_programs(self) -> int:
        """The number of programs so far; the first run of each compiles or captures it."""
        return len(self._ran) if self._graphs is None else self._graphs.n_captured

    def _timestamp(self) -> Any:
        """Takes a timestamp: on a GPU, the time when the work launched so far is complete."""
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
