"""The scheduler: admits requests, launches steps, and delivers tokens.

It owns requests from submission to their end: the queue, each request's row and seat, when a
prompt is prefilled, and the number of drafts and steps of the next launch. A *row* is a request's
index in a step, dense from 0; a *seat* is its place in the KV cache. The caller runs iterations of
the scheduler, and may submit and cancel in between:

>>> while not scheduler.idle:
...     for request, delta in scheduler.iterate():
...         ...

The host runs one step behind the device: an iteration launches a step before it processes the
tokens of the previous one. If those end a request, its tokens of the in-flight step are discarded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hotloop.engine.core import (
    Admit,
    EngineCore,
    Features,
    MoveRow,
    Pending,
    Step,
    StepResult,
    StepTimes,
)
from hotloop.engine.draft_control import DraftController
from hotloop.engine.request import Request
from hotloop.types import Delta

MAX_MULTI_STEP_S = 8e-3
"""The longest that a multi-step program may delay its first token: half a frame at 60 Hz."""

MAX_MULTI_STEPS = 8
"""The most steps of a multi-step program; those after a request's end are wasted."""


def n_multi_steps(step_s: float) -> int:
    """Chooses the number of steps of a multi-step program, a power of two.

    Several steps amortize the gap between graph launches (some microseconds) and the host's work
    per launch (some hundred), which with the smallest models takes longer than a step.

    Args:
        step_s: Time of one step, in seconds.
    """
    n = min(MAX_MULTI_STEPS, max(1, int(MAX_MULTI_STEP_S / step_s)))
    return 1 << (n.bit_length() - 1)


class Scheduler:
    """Drives an ``EngineCore`` for any number of requests.

    Args:
        core: The device side.
        n_rows: The most requests in a step, and seats in the cache.
        n_positions: Tokens that a seat holds.
        controller: Chooses the number of drafts; None without a drafter.
        n_steps: Steps of a multi-step program, used while no request waits; see
            ``n_multi_steps``.
    """

    def __init__(
        self,
        core: EngineCore,
        *,
        n_rows: int,
        n_positions: int,
        controller: DraftController | None = None,
        n_steps: int = 1,
    ) -> None:
        self.controller, self.n_steps = controller, n_steps
        self._core, self._n_positions = core, n_positions
        self._waiting: deque[Request] = deque()
        self._rows: list[Request | None] = [None] * n_rows
        # A permutation: rows without a request map to unused seats, so that a step which computes
        # them does not overwrite a cache in use.
        self._seats = list(range(n_rows))
        self._launched: _Launched | None = None

    @property
    def idle(self) -> bool:
        """Whether no request is waiting, running or in flight."""
        return not (self._waiting or self._launched or any(self._rows))

    def submit(self, request: Request) -> None:
        """Appends a request to the queue."""
        self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Cancels a request and frees its row and seat; does nothing if it has ended.

        Its tokens of in-flight steps are discarded.
        """
        if request.ended:
            return
        request.finish_reason = "cancelled"
        if request in self._waiting:
            self._waiting.remove(request)
        self._release(request)
        if self._launched is not None and all(r.ended for r in self._launched.requests.values()):
            self._launched = None

    def iterate(self) -> Iterator[tuple[Request, Delta]]:
        """Runs one iteration: admits requests, launches a step, and delivers the previous one.

        Yields:
            Each new piece of an answer. The last piece of a failed request has no generation.
        """
        while self._waiting and None in self._rows:
            yield from self._deliver(self._admit(self._waiting.popleft()))
        # The next step is launched before the previous one's tokens are processed, except on a
        # synchronous device, which has completed it anyway.
        previous, self._launched = self._launched, self._launch()
        if previous is not None:
            yield from self._deliver(previous)
        if self._launched is not None and not self._core.asynchronous:
            launched, self._launched = self._launched, None
            yield from self._deliver(launched)

    # ------------------------------------------------------------------------------ rows and seats

    def _admit(self, request: Request) -> _Launched:
        """Prefills a prompt into the seat of a free row, and samples its first token."""
        if not any(self._rows):
            self._seats.sort()  # attention reads seats in order without a gather
        row = self._rows.index(None)
        self._rows[row] = request
        admit = Admit(
            row=row,
            seat=self._seats[row],
            params=request.params,
            seed=request.seed,
            prompt_ids=request.prompt_ids,
        )
        return _Launched({0: request}, self._core.run(admit))

    def _release(self, request: Request) -> None:
        """Frees a request's row and seat, if it has them."""
        if request in self._rows:
            self._rows[self._rows.index(request)] = None

    def _compact(self) -> int:
        """Moves the last rows into holes, so that used rows come first; returns their number."""
        n = sum(request is not None for request in self._rows)
        for source in range(n, len(self._rows)):
            if self._rows[source] is None:
                continue
            target = self._rows.index(None)
            self._core.run(MoveRow(source=source, target=target))
            rows, seats = self._rows, self._seats
            rows[source], rows[target] = rows[target], rows[source]
            seats[source], seats[target] = seats[target], seats[source]
        return n

    # ------------------------------------------------------------------------------ steps

    def _launch(self) -> _Launched | None:
        """Launches a decode step for every request that needs one, without waiting for it."""
        in_flight = self._launched
        n_in_flight: dict[Request, int] = {}
        if in_flight is not None:
            n_in_flight = dict.fromkeys(in_flight.requests.values(), in_flight.n_steps)
        remaining: dict[Request, int] = {}
        for request in filter(None, self._rows):
            n_remaining = request.n_remaining - n_in_flight.get(request, 0)
            if n_remaining > 0:
                remaining[request] = n_remaining
            elif not self._waiting:  # else a waiting request takes the row, and no row has to move
                self._release(request)
        if not remaining:
            return None
        n = self._compact()
        active = {row: r for row, r in enumerate(self._rows[:n]) if r in remaining}
        # The positions of the newest tokens on the host; in-flight steps may advance them.
        known_positions = {
            row: len(r.prompt_ids) + len(r.token_ids) - 1 for row, r in active.items()
        }
        slack = 0 if in_flight is None else in_flight.n_steps + in_flight.k
        furthest = max(known_positions.values()) + slack
        k, least, most = 0, min(remaining.values()), max(remaining.values())
        if self.controller is not None:
            room = self._n_positions - 1 - furthest
            k = self.controller.choose(n, min(most, room) - 1)
        several = k == 0 and not self._waiting and least >= self.n_steps
        n_steps = self.n_steps if several else 1
        step = Step(
            n=n,
            seats=tuple(self._seats),
            longest=furthest + k + n_steps,
            features=Features.of(r.params for r in active.values()),
            k=k,
            n_steps=n_steps,
            known_positions=known_positions,
            slack=slack,
        )
        return _Launched(active, self._core.run(step), n=n, k=k, n_steps=n_steps)

    def _deliver(self, launched: _Launched) -> Sequence[tuple[Request, Delta]]:
        """Delivers a step's tokens to their requests, and frees the rows of those that end."""
        result = launched.pending.wait()
        # The other requests ended after this step was launched.
        running = {row: r for row, r in launched.requests.items() if not r.ended}
        if self.controller is not None and launched.n:
            kept = [len(result.rows[row]) for row in running]
            self.controller.observe(
                launched.n, result.k, times=result.times, kept=kept, steps=launched.n_steps
            )
        deltas = []
        for row, request in running.items():
            text, ids = "", []
            for token_id, logprob in result.rows[row]:
                if token_id < 0:
                    request.failed = True
                    break
                text += request.accept(token_id, logprob)
                ids.append(token_id)
                if request.finish_reason is not None:
                    break  # the step's further tokens are beyond the end
            if self.controller is not None and launched.n:
                request.count_steps(
                    1 if launched.n_steps == 1 else len(ids),
                    n_step_tokens=len(result.rows[row]),
                    n_kept=len(ids),
                    n_drafts=result.n_drafts[row],
                    times=(result.times or StepTimes()) / len(running),
                )
            if request.ended:
                self._release(request)
            delta = Delta(
                index=request.index,
                text=text,
                token_ids=tuple(ids),
                generation=None if request.finish_reason is None else request.generation(),
            )
            deltas.append((request, delta))
        return deltas


@dataclass(frozen=True)
class _Launched:
    """A launched prefill, step or multi-step program, and the request of each row.

    It has ``n`` rows with ``k`` drafts each; ``n`` is 0 for a prefill.
    """

    requests: Mapping[int, Request]
    pending: Pending[StepResult]
    n: int = 0
    k: int = 0
    n_steps: int = 1
