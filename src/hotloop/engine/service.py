"""``Service``: one engine for many clients, driven by one thread.

Any thread submits and cancels; the service's thread runs the scheduler. Each request has a
``Ticket``, a queue of the pieces of its answer. A slow client fills only its own queue, and is
cancelled once that is full. After each iteration the service wakes the clients whose queues got a
piece: threads by an event of their own, an asyncio loop by one call for all of its clients. If few
clients got a piece, the service's thread calls their receivers, if they have any
(``Ticket.set_receiver``), instead of waking them.

>>> with Service(llm) as service:
...     ticket = service.submit([1, 2, 3], SamplingParams())
...     for piece in ticket:
...         ...

In a coroutine, with ``Service(llm, loop=asyncio.get_running_loop())``:

>>> while not ticket.done:
...     await ticket.arrived()
...     for piece in ticket.take():
...         ...

If the engine fails, every ticket raises the error, and the service takes no more requests.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

from hotloop.engine.llm import LLM
from hotloop.engine.request import Request
from hotloop.engine.scheduler import Job
from hotloop.errors import (
    HotloopError,
    QueueFullError,
    RequestError,
    ServiceClosedError,
    SlowClientError,
)
from hotloop.text.tokenizer import Tokenizer
from hotloop.types import (
    Delta,
    EngineDescription,
    Grammar,
    Prompt,
    SamplingParams,
    Score,
)

MAX_QUEUED = 64
"""The most answers that wait for a seat, by default."""

MAX_UNREAD_BYTES = 4 * 2**20
"""The most bytes of an answer that may wait in the queue of its ticket, by default."""

SWITCH_INTERVAL_S = 1e-4
"""Python's switch interval while a service runs: how long another thread may hold the interpreter
before the service's thread gets it. The default of 5 ms is longer than a step."""

SUBMIT_YIELD_S = 1e-3
"""The longest that a client's thread waits after it has submitted, in seconds, so that the thread
of the service gets the interpreter and can launch the prompt."""

FIRST_PIECE_YIELD_S = 2e-4
"""How long the service's thread sleeps, in seconds, after clients got a first piece, so that their
threads get the interpreter. The next step is already launched then."""

MAX_RECEIVERS = 4
"""The most receivers (``Ticket.set_receiver``) that the service's thread calls after an iteration.
More calls could delay the next step."""

Piece = Delta | Score
"""A piece of an answer, or the score of a window."""


class Ticket:
    """A request that was submitted, and the pieces of its answer that have not been taken.

    With several answers a piece's ``index`` is the index of its answer; answer j to prompt i has
    the index i × n + j. The last piece of each answer has a ``generation``; the generation of a
    cancelled answer has the finish reason ``cancelled``.

    Args:
        jobs: The answers, or the window to score.
        event: Set when pieces or an error have arrived.
        n: Answers to each prompt, which follow each other in ``jobs``.
        max_unread_bytes: The most bytes in the queue: the bytes of the text, 8 for a token, 16 for
            a log-probability.

    Attributes:
        prompt_tokens: Tokens of the prompts or the window.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        event: threading.Event | asyncio.Event,
        *,
        n: int = 1,
        max_unread_bytes: int,
    ) -> None:
        self._jobs = tuple(jobs)
        self.prompt_tokens = sum(map(_n_input_tokens, self._jobs[::n]))
        self._n_open, self._event, self._max_unread_bytes = len(self._jobs), event, max_unread_bytes
        self._pieces: deque[tuple[Piece, int]] = deque()  # each with its bytes
        self._n_put = self._n_taken = 0  # bytes; each is written by one side only
        self._error: HotloopError | None = None
        self._receive: Callable[[], bool] | None = None

    @property
    def done(self) -> bool:
        """Whether everything has been taken, or the error of a failed request has been raised."""
        return not (self._n_open or self._pieces or self._error)

    def set_receiver(self, receive: Callable[[], bool] | None) -> None:
        """Sets a function that the service's thread calls when pieces arrive.

        That takes a fraction of the time of waking the client's thread. On a CPU, it is time that
        the model's threads lack.

        Args:
            receive: Takes the pieces that have arrived, and returns True if the client need not be
                woken. It is not called for the last piece, and must neither wait nor raise. None:
                the client is always woken.
        """
        self._receive = receive

    def take(self) -> list[Piece]:
        """Takes what has arrived, in order, without waiting.

        Raises:
            HotloopError: The request has failed. It is raised once all earlier pieces have been
                taken.
        """
        self._event.clear()
        pieces = []
        while self._pieces:
            piece, n_bytes = self._pieces.popleft()
            self._n_taken += n_bytes
            pieces.append(piece)
        if not pieces and self._error is not None:
            error, self._error = self._error, None
            raise error
        return pieces

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits in a thread until a piece can be taken; returns False after ``timeout_s``."""
        assert isinstance(self._event, threading.Event), "in a coroutine, await arrived()"
        return self._ready or self._event.wait(timeout_s)

    async def arrived(self) -> None:
        """Waits in the service's event loop until a piece can be taken."""
        assert isinstance(self._event, asyncio.Event), "the service has no event loop"
        if not self._ready:
            await self._event.wait()

    def __iter__(self) -> Iterator[Piece]:
        """Takes all pieces, waiting for each in this thread."""
        while not self.done:
            self.wait()
            yield from self.take()

    @property
    def _ready(self) -> bool:
        return bool(self._pieces) or self._error is not None or not self._n_open

    @property
    def _all_put(self) -> bool:
        return self._n_open == 0

    def _put(self, piece: Piece, *, is_last: bool) -> bool:
        """Appends a piece, in the service's thread; returns False if the queue is full."""
        n_bytes = _n_bytes(piece)
        self._n_put += n_bytes
        self._pieces.append((piece, n_bytes))
        self._n_open -= is_last
        return self._n_put - self._n_taken <= self._max_unread_bytes

    def _fail(self, error: HotloopError) -> None:
        self._error, self._n_open = error, 0


@dataclass(frozen=True, kw_only=True)
class ServiceState:
    """The service at one moment.

    Attributes:
        n_running: Answers and windows that have a seat, in prefill or decoding.
        n_waiting: Answers and windows that wait for a seat.
        n_captured: Programs captured or compiled since the service was ready; normally 0.
        n_steps: Decode steps since the engine was made.
        n_step_rows: Sum of the numbers of rows of these steps.
        stalled_s: Seconds since the last iteration ended, while there is work; else 0.
        error: The error that has ended the service; None while it runs.
    """

    n_running: int
    n_waiting: int
    n_captured: int
    n_steps: int
    n_step_rows: int
    stalled_s: float
    error: HotloopError | None


class Service:
    """Serves requests from a thread that drives an engine's scheduler.

    While it runs, it is the engine's only user: the engine's own ``generate``, ``stream`` and
    ``score`` are refused.

    Args:
        llm: The engine. It stays open when the service closes.
        max_queued: The most answers that may wait for a seat when a request is submitted.
        max_unread_bytes: The most bytes in the queue of a ticket; a ticket with more is cancelled.
            See ``Ticket``.
        loop: The event loop that takes the pieces; None for threads.

    Raises:
        RequestError: The engine is closed, is generating, or has another service.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        max_queued: int = MAX_QUEUED,
        max_unread_bytes: int = MAX_UNREAD_BYTES,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._llm, self._loop, self._max_unread_bytes = llm, loop, max_unread_bytes
        self._max_jobs = llm.config.max_batch_size + max_queued
        self._max_queued = max_queued
        self._changed = threading.Condition()
        self._inbox: deque[tuple[Ticket, bool]] = deque()  # True: cancel the ticket
        self._tickets: dict[Job, Ticket] = {}  # of jobs that have not ended
        self._n_jobs = 0  # jobs that have not ended, and jobs in the inbox
        self._closing = self._ending = self._closed = False
        self._error: HotloopError | None = None
        self._busy_since: float | None = None
        self._launched = threading.Event()  # set by the first iteration after an idle time
        self._held: AbstractContextManager[None] = llm.held_by_service()
        self._held.__enter__()
        try:
            self._scheduler = llm.prepare_to_serve()
        except BaseException:
            self._held.__exit__(None, None, None)
            raise
        self._n_programs = self._scheduler.n_programs
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(min(self._interval, SWITCH_INTERVAL_S))
        self._thread = threading.Thread(target=self._run, name="hotloop-service", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------ any thread

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None for random weights."""
        return self._llm.tokenizer

    @property
    def default_sampling(self) -> SamplingParams:
        """See ``LLM.default_sampling``."""
        return self._llm.default_sampling

    @cached_property
    def description(self) -> EngineDescription:
        """See ``LLM.describe``."""
        return self._llm.describe()

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        salt: str = "",
        clamp: bool = False,
    ) -> Ticket:
        """Submits a prompt.

        Args:
            prompt: As for ``LLM.generate``; text is tokenized in this thread.
            params: Sampling options; None takes the model's own defaults.
            salt: Only requests with the same salt reuse each other's prefixes.
            clamp: Reduce ``max_new_tokens`` to the room in the context, instead of refusing the
                request.

        Raises:
            ContextLengthError: The prompt does not fit the context.
            RequestError: The prompt or an option cannot be used.
            QueueFullError: Too many requests are waiting.
            ServiceClosedError: The service has been closed, or is draining.
            HotloopError: The engine has failed; it is the error with which it failed.
        """
        return self.submit_all([prompt], params, salt=salt, clamp=clamp)

    def submit_all(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        salt: str = "",
        clamp: bool = False,
    ) -> Ticket:
        """Submits several prompts as one request: all of them or none.

        Args:
            prompts: One prompt or more.
            params: See ``submit``.
            salt: See ``submit``.
            clamp: See ``submit``.

        Raises:
            RequestError: There is no prompt.
            HotloopError: As ``submit``.
        """
        if not prompts:
            raise RequestError("there is no prompt: give at least one.")
        requests = self._llm.requests(prompts, params, salt=salt, clamp=clamp)
        return self._add(requests, len(requests) // len(prompts))

    def score(self, ids: Sequence[int], *, full: bool = False, n_top: int = 0) -> Ticket:
        """Submits a window of token ids to score; its only piece is a ``Score``.

        Args:
            ids: The window.
            full: Also return the whole distribution at each position, as ``Score.log_probs``.
            n_top: Also return this many most likely tokens at each position, as ``Score.top``.

        Raises:
            HotloopError: As ``submit``.
        """
        return self._add([self._llm.scoring(ids, full=full, n_top=n_top)])

    def check_grammar(self, grammar: Grammar) -> None:
        """Refuses a grammar as ``submit`` would.

        Raises:
            RequestError: It cannot be used.
        """
        self._llm.check_grammar(grammar)

    def cancel(self, ticket: Ticket) -> None:
        """Cancels the unfinished answers of a request, within two steps; does not wait."""
        with self._changed:
            self._inbox.append((ticket, True))
            self._changed.notify()

    def state(self) -> ServiceState:
        """Returns the state of the service; never waits for the engine."""
        busy_since, n_running = self._busy_since, self._scheduler.n_running
        return ServiceState(
            n_running=n_running,
            n_waiting=max(0, self._n_jobs - n_running),
            n_captured=self._scheduler.n_programs - self._n_programs,
            n_steps=self._scheduler.n_steps_run,
            n_step_rows=self._scheduler.n_rows_run,
            stalled_s=0.0 if busy_since is None else time.monotonic() - busy_since,
            error=self._error,
        )

    def drain(self, timeout_s: float) -> bool:
        """Refuses new requests, and waits until all earlier requests have ended.

        Returns:
            Whether all have ended.
        """
        with self._changed:
            self._closing = True
            return self._changed.wait_for(
                lambda: self._n_jobs == 0 or self._error is not None, timeout_s
            )

    def close(self) -> None:
        """Cancels all requests and ends the thread. The engine can be used again."""
        with self._changed:
            self._closing = self._ending = True
            self._changed.notify_all()
        self._thread.join()
        if not self._closed:
            self._closed = True
            sys.setswitchinterval(self._interval)
            self._held.__exit__(None, None, None)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, jobs: Sequence[Job], n: int = 1) -> Ticket:
        event = threading.Event() if self._loop is None else asyncio.Event()
        ticket = Ticket(jobs, event, n=n, max_unread_bytes=self._max_unread_bytes)
        with self._changed:
            if self._error is not None:
                raise self._error
            if self._closing:
                raise ServiceClosedError
            if self._n_jobs >= self._max_jobs:  # a request of several answers may exceed the limit
                raise QueueFullError(self._max_queued)
            self._n_jobs += len(jobs)
            self._inbox.append((ticket, False))
            self._changed.notify()
            idle = self._busy_since is None
        if idle:
            self._launched.wait(SUBMIT_YIELD_S)
        return ticket

    # ------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._take_inbox()
                woken: dict[Ticket, None] = {}
                pieces = self._scheduler.iterate()
                if not self._launched.is_set():
                    self._launched.set()
                for job, delta in pieces:
                    self._deliver(job, delta, woken)
                if self._wake(woken) and any(map(_is_first, pieces)):
                    time.sleep(FIRST_PIECE_YIELD_S)
            self._take_inbox()
            self._end(None)
        except BaseException as error:  # a panic of a Rust library is no Exception
            failed = error if isinstance(error, HotloopError) else _engine_error(error)
            with self._changed:
                self._error = failed
            self._end(failed)

    def _wait_for_work(self) -> bool:
        """Waits until there is work; returns False once the service ends."""
        with self._changed:
            if self._scheduler.idle and not self._inbox:
                self._busy_since = None
                self._launched.clear()
                self._changed.wait_for(lambda: self._inbox or self._ending)
            self._busy_since = time.monotonic()
            return not self._ending

    def _take_inbox(self) -> None:
        """Submits new requests to the scheduler, and cancels those that clients have cancelled."""
        woken: dict[Ticket, None] = {}
        while self._inbox:
            ticket, cancelled = self._inbox.popleft()
            for job in ticket._jobs:
                if not cancelled:
                    self._tickets[job] = ticket
                    self._scheduler.submit(job)
                elif job in self._tickets:
                    self._cancel(job)
                    woken[ticket] = None
        self._wake(woken)

    def _deliver(self, job: Job, delta: Delta | None, woken: dict[Ticket, None]) -> None:
        """Appends a piece to its queue; cancels a ticket whose queue is full."""
        ticket = self._tickets.get(job)
        if ticket is None:  # another answer of its ticket has failed in this iteration
            return
        woken[ticket] = None
        if isinstance(job, Request) and job.failed:
            self._fail(ticket, self._llm.failure(job))
            return
        piece = delta if isinstance(job, Request) else job.score()
        assert piece is not None, "a request has deltas"
        if job.ended:
            self._forget(job)
        if not ticket._put(piece, is_last=job.ended) and not ticket._all_put:
            self._fail(ticket, SlowClientError(self._max_unread_bytes))

    def _cancel(self, job: Job) -> None:
        """Cancels a job; for a prompt, its client gets a last piece that says so."""
        ticket = self._forget(job)
        self._scheduler.cancel(job)
        if isinstance(job, Request):
            last = Delta(index=job.index, text="", token_ids=(), generation=job.generation())
            ticket._put(last, is_last=True)
        else:
            ticket._n_open -= 1

    def _fail(self, ticket: Ticket, error: HotloopError) -> None:
        """Ends a ticket with an error, and cancels its unfinished jobs."""
        for job in ticket._jobs:
            if job in self._tickets:
                self._forget(job)
                self._scheduler.cancel(job)
        ticket._fail(error)

    def _forget(self, job: Job) -> Ticket:
        with self._changed:
            self._n_jobs -= 1
            self._changed.notify_all()
        return self._tickets.pop(job)

    def _wake(self, tickets: dict[Ticket, None]) -> bool:
        """Calls the receivers of tickets, and wakes the clients of the other tickets.

        Returns:
            Whether a client was woken.
        """
        few, events = len(tickets) <= MAX_RECEIVERS, []
        for ticket in tickets:
            receive = ticket._receive
            more_comes = ticket._n_open and ticket._error is None
            if not (few and receive is not None and more_comes and receive()):
                events.append(ticket._event)
        if not events:
            return False
        if self._loop is None:
            _set(events)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_set, events)
        return True

    def _end(self, error: HotloopError | None) -> None:
        """Ends all tickets, with an error or as cancelled."""
        with self._changed:
            queued = [ticket for ticket, cancel in self._inbox if not cancel]
            self._inbox.clear()
        tickets = dict.fromkeys([*self._tickets.values(), *queued])
        if error is None:
            for job in list(self._tickets):
                self._cancel(job)
        else:
            for ticket in tickets:
                self._fail(ticket, error)
        with self._changed:
            self._n_jobs = 0
            self._busy_since = None
            self._changed.notify_all()
        self._wake(tickets)


def _n_input_tokens(job: Job) -> int:
    return len(job.prompt_ids if isinstance(job, Request) else job.ids)


def _n_bytes(piece: Piece) -> int:
    """Returns the approximate bytes of a piece; 0 for a score, the only piece of its ticket."""
    if not isinstance(piece, Delta):
        return 0
    n_bytes = len(piece.text.encode()) + 8 * len(piece.token_ids)
    if piece.logprobs:
        n_bytes += 16 * sum(1 + len(each.top) for each in piece.logprobs)
    return n_bytes


def _is_first(piece: tuple[Job, Delta | None]) -> bool:
    """Returns whether a piece has the first tokens of an answer."""
    job, delta = piece
    if delta is None or not isinstance(job, Request):
        return False
    return len(delta.token_ids) == len(job.token_ids)


def _set(events: Sequence[threading.Event | asyncio.Event]) -> None:
    for event in events:
        event.set()


def _engine_error(error: BaseException) -> HotloopError:
    """Describes an error that is not hotloop's own, such as one of the device's driver."""
    failed = HotloopError(f"the engine has failed: {type(error).__name__}: {error}")
    failed.__cause__ = error
    return failed
