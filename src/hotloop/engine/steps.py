"""Runs decode steps: device programs that read rows and update them for the next step.

A step is embed, layers, logits, sample, accept. It reads tokens and positions from the rows and
writes the next ones there, so that steps can follow each other without the host. The host gets a
``Sampled`` of each step.

With speculative decoding a step is two programs: a drafter proposes k tokens for every row, and the
model verifies them in one forward of k + 1 positions. At each position it samples a token as it
would without drafts; drafts that equal these tokens are accepted, and the step yields the tokens up
to the first rejected draft. Every token is thus the model's own: with greedy decoding or sampling,
speculation changes when tokens come and never which (see ``speculation``).

``eager`` runs a program operation by operation. ``compile`` compiles the forward with torch.compile
(``forward``); ``fused`` runs it with our own kernels (``fused``) and samples with one. On a GPU,
both capture each size of program once in a CUDA graph (``graphs``), which removes the host's work
between kernels.

Shape letters: B rows of a step, T positions of each, D drafts, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from hotloop.engine.core import Features, Step, StepTimes, padded_rows
from hotloop.engine.forward import Forward
from hotloop.engine.graphs import Graphs
from hotloop.engine.rows import Rows
from hotloop.engine.sampling import Sampled, Sampler
from hotloop.engine.speculation import Drafter, assume

Result = TypeVar("Result")

SMALLEST_LENGTH = 256
"""Attention reads at least this many cache positions; beyond, the next power of two."""

Timestamps = Sequence[Any]
"""Start of a step and ends of its parts: clock readings in seconds, or CUDA events."""


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
    """The key of a program: a CUDA graph is captured for each."""

    drafting: bool
    n: int
    k: int
    first_seat: int | None
    length: int
    features: Features
    n_steps: int = 1
    drafter: int = 0


class Stepper:
    """Runs decode steps.

    Args:
        forward: The model.
        rows: The rows to advance.
        sampler: Samples tokens.
        drafters: Draft tokens, one of them in each step; none without speculative decoding.
        max_drafts: The most drafts in a step.
        assumed_acceptance: See ``EngineConfig.assume_acceptance``.
        n_positions: Positions of the cache.
        captures: Whether programs become CUDA graphs.
        indexes_seats: Attention kernels index the cache by seat and stop at each row's position.
            Others get the length of cache to read, and the first seat if seats are in order.
    """

    def __init__(
        self,
        forward: Forward,
        rows: Rows,
        sampler: Sampler,
        *,
        drafters: Sequence[Drafter],
        max_drafts: int,
        assumed_acceptance: float | None = None,
        n_positions: int,
        captures: bool,
        indexes_seats: bool,
    ) -> None:
        self.forward, self.rows, self.sampler, self.drafters = forward, rows, sampler, drafters
        self.n_positions = n_positions
        self.assumed_acceptance = assumed_acceptance
        self.indexes_seats = indexes_seats
        self._device = rows.positions.device
        self._drafts = rows.positions.new_full((len(rows.positions), max(1, max_drafts)), -1)
        self._graphs = Graphs(self._device) if captures else None
        self._ran: set[_Program] = set()  # programs run, where none are captured

    def step(self, step: Step) -> tuple[Sampled, Timestamps | None]:
        """Runs a step, which yields one token or more for each row.

        On a CPU, where the host can read drafts at no cost, a step without any draft is plain.

        Returns:
            Tensors that are valid until the next step of the same size; and the timestamps of the
            step's parts, or None without a drafter or if something was compiled.
        """
        n, k = step.n, step.k
        wanted = self.sampler.relevant(step.features)
        if self._graphs is not None:  # fewer sizes to compile and to capture
            n = padded_rows(n, len(self.rows.positions))
        self.rows.place(step.seats)
        first_seat = self._first_seat(step.seats) if n == step.n else None
        reads = (first_seat, self.length(step.longest))
        if not self.drafters:
            program = _Program(False, n, 0, *reads, wanted, step.n_steps)
            return self._run(program, self._steps), None
        n_made = self.n_programs
        timestamps = [self._timestamp()]
        for i, drafter in enumerate(self.drafters):
            if k == 0 or i != step.drafter:
                drafter.skip(step.seats)
        if k:
            self.drafters[step.drafter].catch_up(step)
            timestamps.append(self._timestamp())
            features = dataclasses.replace(wanted, logprobs=False)
            self._run(_Program(True, n, k, *reads, features, drafter=step.drafter), self._draft)
            if self._device.type == "cpu" and (self._drafts[:n, 0] < 0).all():
                k = 0
        else:
            timestamps.append(self._timestamp())
        timestamps.append(self._timestamp())
        program = _Program(False, n, k, *reads, wanted, step.n_steps)
        sampled = self._run(program, self._steps)
        timestamps.append(self._timestamp())
        return sampled, timestamps if self.n_programs == n_made else None

    def length(self, longest: int) -> int:
        """Returns the cache positions that a step reads which needs the first ``longest``."""
        if self.indexes_seats:
            return self.n_positions
        length = max(SMALLEST_LENGTH, 1 << (longest - 1).bit_length())
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
        n, k = program.n, program.k
        drafts = self.drafters[program.drafter].propose(
            n,
            k,
            first_seat=program.first_seat,
            length=program.length,
            features=program.features,
        )
        self._drafts[:n, :k].copy_(drafts)

    def _steps(self, program: _Program) -> Sampled:
        """Runs a step, or the plain steps of a multi-step program."""
        return Sampled.joined([self._model(program) for _ in range(program.n_steps)])

    def _model(self, program: _Program) -> Sampled:
        n, k, features = program.n, program.k, program.features
        drafts_BD = self._drafts[:n, :k] if k else None
        ids_BT, positions_BT = self.rows.next_tokens(n, drafts_BD)
        logits_BTV, best_BT = self.forward(
            ids_BT,
            positions_BT,
            self.rows.seats[:n],
            first_seat=program.first_seat,
            length=program.length,
        )
        after_BT = positions_BT + 1 if features.draw or features.adjust else None
        sampled = self.sampler.sample(logits_BTV, after_BT, 0, features, drafts_BD, best_BT=best_BT)
        ids = sampled.ids
        if drafts_BD is not None and self.assumed_acceptance is not None:
            ids = assume(ids, drafts_BD, ids_BT, positions_BT, self.assumed_acceptance)
        n_kept_B, n_drafts_B = self.rows.accept(ids, drafts_BD)
        sampled = dataclasses.replace(sampled, ids=ids, n_kept=n_kept_B, n_drafts=n_drafts_B)
        if features.adjust:
            self.sampler.remember(ids, 0, n_kept_B)
        return sampled

    def _run(self, program: _Program, run: Callable[[_Program], Result]) -> Result:
        if self._graphs is None:
            self._ran.add(program)
            return run(program)
        state = (self.rows.history, self.rows.positions, *self.sampler.memory)
        return self._graphs.run(program, lambda: run(program), state)

    @property
    def n_programs(self) -> int:
        """The number of programs so far; the first run of each compiles or captures."""
        return len(self._ran) if self._graphs is None else self._graphs.n_captured

    def _timestamp(self) -> Any:
        """Takes a timestamp: on a GPU, of when it completes the work launched so far."""
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
