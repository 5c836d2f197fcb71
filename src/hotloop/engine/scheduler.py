"""The scheduler: admits requests, launches steps, and delivers tokens.

It owns requests from submission to their end: the queue, the row and the seat of each, when a
prompt is prefilled, how many drafts and how many steps come next. A *row* is a request's place in a
step, dense from 0; a *seat* is its place in the KV cache. Whoever drives the scheduler takes
``turn`` after ``turn``, and may submit and cancel in between:

>>> while not scheduler.idle:
...     for request, delta in scheduler.turn():
...         ...

The host runs one step behind the device: a turn launches a step before it looks at the tokens of
the one before. A request that turns out to have ended drops what the later step brings it.
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

BURST_S = 8e-3
"""Tokens that come together may have taken this long, half of what a screen shows a picture."""

MOST_STEPS = 8
"""Steps that are one program: a request that ends among the first has the others run in vain."""


def multi_step(step_s: float) -> int:
    """How many steps to give a GPU at once, a power of two.

    Between programs it does nothing for some microseconds, and the host is busy for some hundred:
    with the smallest models, longer than with a step.
    """
    n = min(MOST_STEPS, max(1, int(BURST_S / step_s)))
    return 1 << (n.bit_length() - 1)


class Scheduler:
    """Drives an ``EngineCore`` for any number of requests.

    Args:
        core: The device's side.
        n_rows: The most requests in a step, and seats in the cache.
        n_positions: Tokens that a seat holds.
        controller: Chooses the number of drafts; None where there is no drafter.
        n_steps: Steps to take at once while nothing waits; see ``multi_step``.
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
        # A permutation, so that rows without a request are in seats that hold nothing: what a step
        # computes for them overwrites no cache in use.
        self._seats = list(range(n_rows))
        self._launched: _Launched | None = None

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do until the next request."""
        return not (self._waiting or self._launched or any(self._rows))

    def submit(self, request: Request) -> None:
        """Puts a request behind those that wait."""
        self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Ends a request, which frees its row and seat; nothing happens if it has ended.

        What steps under way bring it is dropped.
        """
        if request.ended:
            return
        request.finish_reason = "cancelled"
        if request in self._waiting:
            self._waiting.remove(request)
        self._release(request)
        if self._launched is not None and all(r.ended for r in self._launched.requests.values()):
            self._launched = None

    def turn(self) -> Iterator[tuple[Request, Delta]]:
        """Admits requests to free rows, launches a step, and delivers the one before.

        Yields:
            Each piece of an answer, as soon as it is there. A failed request's last piece has no
            generation.
        """
        while self._waiting and None in self._rows:
            yield from self._deliver(self._admit(self._waiting.popleft()))
        # The next step starts before the last one's tokens are looked at, unless the device is
        # done with it anyway.
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
            self._seats.sort()  # rows whose seats are in order need no look-up of seats
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
        """Frees a request's row and seat, if it has any."""
        if request in self._rows:
            self._rows[self._rows.index(request)] = None

    def _compact(self) -> int:
        """Moves the last rows into holes, so that rows in use are the first ones; how many."""
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
        """Starts a decode step for every request that needs one, without waiting for it."""
        under_way = self._launched
        n_coming: dict[Request, int] = {}
        if under_way is not None:
            n_coming = dict.fromkeys(under_way.requests.values(), under_way.n_steps)
        wanted: dict[Request, int] = {}
        for request in filter(None, self._rows):
            n_more = request.n_wanted - n_coming.get(request, 0)
            if n_more > 0:
                wanted[request] = n_more
            elif not self._waiting:  # else the next request takes its row, and no row has to move
                self._release(request)
        if not wanted:
            return None
        n = self._compact()
        active = {row: r for row, r in enumerate(self._rows[:n]) if r in wanted}
        # Where newest tokens are, as far as is known; steps under way can take them further.
        known = {row: len(r.prompt_ids) + len(r.token_ids) - 1 for row, r in active.items()}
        slack = 0 if under_way is None else under_way.n_steps + under_way.k
        furthest = max(known.values()) + slack
        k, least, most = 0, min(wanted.values()), max(wanted.values())
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
            known=known,
            slack=slack,
        )
        return _Launched(active, self._core.run(step), n=n, k=k, n_steps=n_steps)

    def _deliver(self, launched: _Launched) -> Sequence[tuple[Request, Delta]]:
        """Hands a step's tokens to their requests, and frees the rows of those that end."""
        result = launched.pending.wait()
        # The others ended a step ago, when this one was already on its way.
        going = {row: r for row, r in launched.requests.items() if not r.ended}
        if self.controller is not None and launched.n:
            kept = [len(result.rows[row]) for row in going]
            self.controller.observe(
                launched.n, result.k, times=result.times, kept=kept, steps=launched.n_steps
            )
        deltas = []
        for row, request in going.items():
            text, ids = "", []
            for token_id, logprob in result.rows[row]:
                if token_id < 0:
                    request.failed = True
                    break
                text += request.accept(token_id, logprob)
                ids.append(token_id)
                if request.finish_reason is not None:
                    break  # what else the step brought is beyond the end
            if self.controller is not None and launched.n:
                request.count_steps(
                    1 if launched.n_steps == 1 else len(ids),
                    given=len(result.rows[row]),
                    taken=len(ids),
                    n_drafts=result.n_drafts[row],
                    share=(result.times or StepTimes()) / len(going),
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
    """A step under way, or several as one program, with the request of each row.

    ``n`` rows with ``k`` drafts each; a prompt's first token comes of no step, and n is 0.
    """

    requests: Mapping[int, Request]
    pending: Pending[StepResult]
    n: int = 0
    k: int = 0
    n_steps: int = 1
