"""Decode steps: a program on the device that reads rows and leaves them ready for the next step.

A step is embed, layers, logits, sample, accept. Its tokens and positions come from the rows, and
the next ones are left there, so that steps can follow each other without the host. The host gets a
``Sampled`` of each step.

With speculative decoding a step is two programs: a drafter proposes k tokens for every row, and
the model looks at k + 1 positions at once. At each it chooses a token as it would have done without
drafts; the drafts that equal its choices were right, and so are the choices up to the first that
was not. Every token is thus the model's own: greedy or drawn, with whatever options, speculation
changes when tokens come and never which (see ``speculation``).

``eager`` runs a program operation by operation. ``compile`` hands the model part to torch.compile
(``forward``); ``fused`` runs it on kernels of our own (``fused``), and draws with one. Both, on a
GPU, capture each size of program once in a CUDA graph (``graphs``): what the host does between
kernels then costs nothing.

Shape letters: B rows of a step, T positions of each, D drafts, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from hotloop.engine.core import Features, Step, StepTimes
from hotloop.engine.forward import Forward
from hotloop.engine.graphs import Graphs
from hotloop.engine.rows import Rows
from hotloop.engine.sampling import Sampled, Sampler
from hotloop.engine.speculation import Drafter

Result = TypeVar("Result")

SMALLEST_LENGTH = 256
"""Attention reads at least this many cache positions; beyond, the next power of two."""

Marks = Sequence[Any]
"""Clock readings in seconds, or events on the device: where a step began, and its parts ended."""


def step_times(marks: Marks) -> StepTimes:
    """The times between marks, once the device has passed the last one."""
    spans = [
        end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3
        for begin, end in itertools.pairwise(marks)
    ]
    catch_up_s, draft_s, model_s = spans
    return StepTimes(catch_up_s=catch_up_s, draft_s=draft_s, model_s=model_s)


@dataclasses.dataclass(frozen=True)
class _Program:
    """One size of a program: what a CUDA graph is captured for."""

    drafting: bool
    n: int
    k: int
    first_seat: int | None
    length: int
    features: Features
    n_steps: int = 1


class Stepper:
    """Runs decode steps.

    Args:
        forward: The model.
        rows: The rows to advance.
        sampler: Chooses tokens.
        drafter: Makes drafts; None for none.
        max_drafts: The most drafts in a step.
        n_positions: Positions of the cache.
        captures: Whether programs become CUDA graphs.
        reads_each_row: Whether attention looks up the seat of each row, and reads no more of it
            than the row needs. Other attention is told how much of the cache to read, and whether
            the seats are in order.
    """

    def __init__(
        self,
        forward: Forward,
        rows: Rows,
        sampler: Sampler,
        *,
        drafter: Drafter | None,
        max_drafts: int,
        n_positions: int,
        captures: bool,
        reads_each_row: bool,
    ) -> None:
        self.forward, self.rows, self.sampler, self.drafter = forward, rows, sampler, drafter
        self.n_positions = n_positions
        self.reads_each_row = reads_each_row
        self._device = rows.positions.device
        self._drafts = rows.positions.new_full((len(rows.positions), max(1, max_drafts)), -1)
        self._graphs = Graphs(self._device) if captures else None
        self._ran: set[_Program] = set()  # those without graphs

    def step(self, step: Step) -> tuple[Sampled, Marks | None]:
        """One token or more for each row.

        On a CPU, where looking at drafts costs nothing, a step in which no row has one is plain.

        Returns:
            Tensors that stay as they are until the next step of the same size; and, where there is
            a drafter and nothing had to be compiled, the marks of its parts.
        """
        n, k = step.n, step.k
        wanted = self.sampler.relevant(step.features)
        if self._graphs is not None:  # fewer sizes to compile and to capture
            n = min(1 << (n - 1).bit_length(), len(self.rows.positions))
        self.rows.place(step.seats)
        reads = (self._first_seat(step.seats[:n]), self.length(step.longest))
        if self.drafter is None:
            program = _Program(False, n, 0, *reads, wanted, step.n_steps)
            return self._run(program, self._steps), None
        n_made = self._n_made
        marks = [self._mark()]
        if k:
            self.drafter.catch_up(step)
            marks.append(self._mark())
            features = dataclasses.replace(wanted, logprobs=False)
            self._run(_Program(True, n, k, *reads, features), self._draft)
            if self._device.type == "cpu" and (self._drafts[:n, 0] < 0).all():
                k = 0
        else:
            self.drafter.skip(n)
            marks.append(self._mark())
        marks.append(self._mark())
        program = _Program(False, n, k, *reads, wanted, step.n_steps)
        sampled = self._run(program, self._steps)
        marks.append(self._mark())
        return sampled, marks if self._n_made == n_made else None

    def length(self, longest: int) -> int:
        """How much of the cache a step reads that must see ``longest`` positions."""
        if self.reads_each_row:
            return self.n_positions
        length = max(SMALLEST_LENGTH, 1 << (longest - 1).bit_length())
        return min(length, self.n_positions)

    def _first_seat(self, seats: tuple[int, ...]) -> int | None:
        """The first seat, where that is of use: seats are in order, and attention needs to know.

        Graphs read it from the device: there are two of a size, with and without the order from 0.
        """
        first, *_ = seats
        in_order = seats == tuple(range(first, first + len(seats)))
        if self.reads_each_row or not in_order or (self._graphs is not None and first > 0):
            return None
        return first

    def _draft(self, program: _Program) -> None:
        assert self.drafter is not None, "there is no drafter"
        n, k = program.n, program.k
        drafts = self.drafter.propose(
            n,
            k,
            first_seat=program.first_seat,
            length=program.length,
            features=program.features,
        )
        self._drafts[:n, :k].copy_(drafts)

    def _steps(self, program: _Program) -> Sampled:
        """Plain steps that follow each other on the device."""
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
        after_BT = positions_BT + 1 if features.draw else None
        sampled = self.sampler.sample(logits_BTV, after_BT, 0, features, drafts_BD, best_BT=best_BT)
        n_kept_B, n_drafts_B = self.rows.accept(sampled.ids, drafts_BD)
        sampled = dataclasses.replace(sampled, n_kept=n_kept_B, n_drafts=n_drafts_B)
        if features.penalize:
            kept_BT = sampled.ids
            if n_kept_B is not None:
                kept = torch.arange(k + 1, device=n_kept_B.device) < n_kept_B[:, None]
                kept_BT = kept_BT.where(kept, kept_BT[:, :1])
            self.sampler.remember(kept_BT, 0)
        return sampled

    def _run(self, program: _Program, run: Callable[[_Program], Result]) -> Result:
        if self._graphs is None:
            self._ran.add(program)
            return run(program)
        state = (self.rows.history, self.rows.positions, self.sampler.seen_RV)
        return self._graphs.run(program, lambda: run(program), state)

    @property
    def _n_made(self) -> int:
        """The number of programs so far; the first run of each compiles or captures something."""
        return len(self._ran) if self._graphs is None else self._graphs.n_captured

    def _mark(self) -> Any:
        """This moment: on a GPU, the one at which it has done what it was told so far."""
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
