"""The scheduler: admits requests, launches steps, and delivers tokens.

It owns requests from submission to their end: the queue, each request's row and seat, when a
chunk of a prompt is prefilled, and the number of drafts and steps of the next launch. A *row* is a
request's index in a step, dense from 0; a *seat* is its place in the KV cache (``seats``). The
caller runs iterations of the scheduler, and may submit and cancel in between:

>>> while not scheduler.idle:
...     for request, delta in scheduler.iterate():
...         ...

An iteration launches a decode step of all rows and at most one chunk of one prompt. While the
device computes them, the host delivers the tokens of the previous launch. So the host runs one step
behind the device, and a long prompt delays the other requests by one chunk at a time. A request
takes part in steps once the last chunk of its prompt has been launched. When a token ends a
request, the scheduler discards the tokens that a step in flight still computes for it.

Chunks begin at multiples of the chunk size, whatever the load, so that the bits of a result do not
depend on the load. Short prompts that wait together are prefilled in one forward, if each gets the
same bits as alone (``core.PrefillBatching``). Windows to score that wait together are scored in one
forward (``core.ScoreBatching``). If windows have a common prefix, the first of them is scored
before the others, which then reuse its keys and values (``seats``).
"""

from __future__ import annotations

import functools
import operator
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import fmean
from typing import Any

from hotloop.engine.core import (
    Admit,
    Admitted,
    CopySeat,
    EngineCore,
    Features,
    MoveRow,
    Pending,
    Prefill,
    PrefillBatching,
    ScoreBatching,
    ScoreWindows,
    Step,
    StepKind,
    StepResult,
    StepTimes,
    WindowChunk,
)
from hotloop.engine.draft_control import PLAIN, Choice, DraftController
from hotloop.engine.request import Request, Scoring
from hotloop.engine.seats import MIN_SHARED_TOKENS, Seat, Seats, common_prefix
from hotloop.types import Delta, PrefixReuse, Score

MAX_MULTI_STEP_S = 8e-3
"""The longest that a multi-step program may delay its first token: half a frame at 60 Hz."""

MAX_MULTI_STEPS = 8
"""The most steps of a multi-step program; steps after a request's end are wasted."""


def n_multi_steps(step_s: float) -> int:
    """Chooses the number of steps of a multi-step program, a power of two.

    Several steps per launch amortize the gap between graph launches (some microseconds) and the
    host's work per launch (some hundred microseconds), which exceeds a step of the smallest models.

    Args:
        step_s: Time of one step, in seconds.
    """
    n = min(MAX_MULTI_STEPS, max(1, int(MAX_MULTI_STEP_S / step_s)))
    return 1 << (n.bit_length() - 1)


def n_drafting_steps(n_steps: int) -> int:
    """Returns the number of steps of a multi-step program with drafts, for a single request.

    Only single requests have such programs: otherwise a server would have to capture twice as many.
    A step with drafts takes about twice as long as a plain step.

    Args:
        n_steps: Steps of a multi-step program of plain steps.
    """
    return max(1, n_steps // 2)


@functools.cache
def step_kinds(
    arms: Sequence[tuple[int, int]], n_steps: int, *, alone: bool
) -> tuple[StepKind, ...]:
    """Returns the kinds of steps that a scheduler can launch.

    Args:
        arms: See ``DraftController.arms``.
        n_steps: Steps of a multi-step program of plain steps; 1 for no such programs.
        alone: The steps are those of a single request.
    """
    kinds = [(k, drafter, 1) for drafter, k in arms]
    if n_steps > 1:
        kinds.append((0, 0, n_steps))
    if alone and (n_drafting := n_drafting_steps(n_steps)) > 1:
        kinds += [(k, drafter, n_drafting) for drafter, k in arms if k]
    return tuple(kinds)


Job = Request | Scoring
"""Work of the scheduler: a prompt to answer, or a window to score."""


class Scheduler:
    """Drives an ``EngineCore`` for any number of requests.

    Args:
        core: The device side.
        n_rows: The most requests in a step, and seats in the cache.
        n_positions: Tokens that a seat holds.
        chunk: Tokens of a chunk of prefill.
        controller: Chooses the drafter and the number of drafts; None without a drafter.
        n_steps: Plain steps of a multi-step program, used while no request waits; see
            ``n_multi_steps``.
        prefix_cache: See ``EngineConfig.prefix_cache``.
        prefill_batching: Limits of batched prefill; None if prompts are prefilled one by one.
        score_batching: Limits of batched scoring; None if windows are scored one by one.

    Attributes:
        n_steps: See above.
        n_programs: Programs that the device side has captured or compiled for steps.
        n_steps_run: Decode steps launched so far.
        n_rows_run: Sum of the numbers of rows of these steps.
        feature_sets: The sets of sampler features for which programs were captured, the smallest
            first. A step runs the first program that has every feature its requests need. None if
            each step gets a program with exactly those features.
    """

    def __init__(
        self,
        core: EngineCore,
        *,
        n_rows: int,
        n_positions: int,
        chunk: int,
        controller: DraftController | None = None,
        n_steps: int = 1,
        prefix_cache: PrefixReuse = "none",
        prefill_batching: PrefillBatching | None = None,
        score_batching: ScoreBatching | None = None,
    ) -> None:
        self.controller, self.n_steps = controller, n_steps
        self.n_programs = self.n_steps_run = self.n_rows_run = 0
        self.feature_sets: Sequence[Features] | None = None
        self._core, self._n_positions, self._chunk = core, n_positions, chunk
        self._prefill_batching = prefill_batching
        self._score_batching = score_batching or ScoreBatching(chunk=chunk)
        self._waiting: deque[Job] = deque()
        self._prefilling: _Prefilling | None = None
        self._rows: list[Request | None] = [None] * n_rows
        self._seats = Seats(n_rows, reuse=prefix_cache, chunk=chunk)
        self._seat_of: dict[Job, Seat] = {}
        # Undelivered launches, one list for each iteration that launched any. There are two lists
        # from a launch until the launches of the previous iteration are delivered, else one.
        self._in_flight: deque[list[_Launched]] = deque([[]])
        self._undelivered: deque[tuple[_Launched, StepResult]] = deque()
        self._chunk_next = False  # only for a synchronous device

    @property
    def idle(self) -> bool:
        """Whether no request is waiting, running or in flight."""
        busy = self._waiting or self._seat_of or self._undelivered or any(self._in_flight)
        return not busy

    @property
    def n_waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        """Jobs that have a seat: prompts in prefill, and rows."""
        return len(self._seat_of)

    def submit(self, job: Job) -> None:
        """Appends a request or a window to the queue."""
        self._waiting.append(job)

    def cancel(self, job: Job) -> None:
        """Cancels a request and frees its row and seat; does nothing if it has ended.

        Tokens that steps in flight compute for it are discarded.
        """
        if job.ended:
            return
        if isinstance(job, Request):
            job.finish_reason = "cancelled"
        else:
            job.ended = True
        if job in self._waiting:
            self._waiting.remove(job)
        self._release(job, forget=isinstance(job, Scoring))
        for launched in self._in_flight:
            launched[:] = [each for each in launched if not each.ended]

    def forget(self) -> None:
        """Forgets the tokens that free seats hold."""
        self._seats.forget()

    def iterate(self) -> list[tuple[Job, Delta | None]]:
        """Launches a step and a chunk after it, or delivers an earlier launch.

        Each call delivers one launch as soon as the device has completed it, so that a step's
        tokens do not wait for the chunk after it. If a launch has several steps with drafts, they
        are delivered one by one. The next step and chunk are launched when all launches but the
        newest are delivered: the host is one step ahead of the device.

        A synchronous device has completed a launch when the launch returns. A call then launches
        either a step or a chunk, by turns, and delivers it at once.

        Returns:
            The new pieces of answers; None for a window that has been scored. The last piece of a
            failed request has no generation.
        """
        if self._undelivered:  # a call returns at most one piece per job
            return self._deliver_step(*self._undelivered.popleft())
        if not self._core.asynchronous:
            launches = [self._launch_step, self._launch_chunk]
            first, second = reversed(launches) if self._chunk_next else launches
            launched = first() or second()
            self._chunk_next = launched is not None and launched.n > 0
            return [] if launched is None else self._deliver(launched)
        if len(self._in_flight) == 1:
            both = (self._launch_step(), self._launch_chunk())
            self._in_flight.append([each for each in both if each is not None])
        previous = self._in_flight[0]
        launched = previous.pop(0) if previous else None
        if not previous:
            self._in_flight.popleft()
        return [] if launched is None else self._deliver(launched)

    # ------------------------------------------------------------------------------ rows and seats

    def _release(self, job: Job, *, forget: bool = False) -> None:
        """Frees a job's row and seat, if it has them; with ``forget`` also the seat's tokens."""
        if self._prefilling is not None and self._prefilling.job is job:
            self._prefilling = None
        if job in self._rows:
            self._rows[self._rows.index(job)] = None
        seat = self._seat_of.pop(job, None)
        if seat is None:
            return
        if isinstance(job, Request):
            self._seats.release(seat, job.token_ids[:-1])  # the last one was not an input
        else:
            self._seats.release(seat)
        if forget or (isinstance(job, Request) and job.failed):
            self._seats.clear(seat)

    def _compact(self) -> int:
        """Moves the last rows into holes, so that used rows come first; returns their number."""
        rows, n = self._rows, sum(request is not None for request in self._rows)
        for source in range(n, len(rows)):
            if rows[source] is not None:
                target = rows.index(None)
                self._core.run(MoveRow(source=source, target=target))
                rows[source], rows[target] = None, rows[source]
        return n

    # ------------------------------------------------------------------------------ steps

    def _launch_step(self) -> _Launched | None:
        """Launches a decode step for every request that needs one, without waiting for it."""
        min_added: dict[Request, int] = {}  # tokens that steps in flight add
        max_added: dict[Request, int] = {}
        for launched in chain.from_iterable(self._in_flight):
            for request in launched.requests.values():
                min_added[request] = min_added.get(request, 0) + launched.n_steps
                added = launched.n_steps * (1 + launched.choice.k)
                max_added[request] = max_added.get(request, 0) + added
        remaining: dict[Request, int] = {}
        for row, request in enumerate(self._rows):
            if request is None:
                continue
            n_remaining = request.n_remaining - min_added.get(request, 0)
            if n_remaining > 0:
                remaining[request] = n_remaining
            else:
                self._rows[row] = None
        if not remaining:
            return None
        n = self._compact()
        active = {row: r for row, r in enumerate(self._rows[:n]) if r is not None}
        # The positions of the newest tokens on the host; steps in flight may advance them.
        known_positions = {
            row: len(r.prompt_ids) + len(r.token_ids) - 1 for row, r in active.items()
        }
        slack = max(max_added.get(request, 0) for request in active.values())
        max_position = max(known_positions[row] + max_added.get(r, 0) for row, r in active.items())
        choice = Choice()
        if self.controller is not None:
            limits = {r: remaining[r] - 1 if r.params.speculate else 0 for r in active.values()}
            choice = self.controller.choose(limits, self._n_positions - 2 - max_position)
        k = choice.k
        alone = not self._waiting and self._prefilling is None
        features = self._features(active.values())
        n_steps = self.n_steps if k == 0 else n_drafting_steps(self.n_steps) if n == 1 else 1
        has_room = max_position + n_steps * (k + 1) < self._n_positions
        if not (alone and min(remaining.values()) >= n_steps and has_room) or features.constrain:
            n_steps = 1
        step = Step(
            n=n,
            seats=tuple(self._seat_of[request].index for request in active.values()),
            longest=max_position + n_steps * (k + 1),
            features=features,
            k=k,
            drafter=choice.drafter,
            min_probability=choice.min_probability,
            undrafted=frozenset(row for row, r in active.items() if not r.params.speculate),
            n_steps=n_steps,
            known_positions=known_positions,
            slack=slack,
            any_seats=self.feature_sets is not None,
            kinds=self._kinds(active.values()),
        )
        self.n_steps_run += n_steps
        self.n_rows_run += n_steps * n
        return _Launched(self._core.run(step), requests=active, n=n, choice=choice, n_steps=n_steps)

    def _features(self, requests: Iterable[Request]) -> Features:
        """Returns the features of a step's program; unneeded features change no token."""
        needed = functools.reduce(operator.or_, (request.features for request in requests))
        if self.feature_sets is None:
            return needed
        return next((each for each in self.feature_sets if each.includes(needed)), needed)

    def _kinds(self, requests: Collection[Request]) -> tuple[StepKind, ...]:
        """Returns the kinds of steps that can follow, if their programs are to be made now."""
        alone = len(requests) == 1
        # Compiling takes seconds: a lone request's steps are compiled before the engine is ready,
        # those of several requests when they are run.
        if self.feature_sets is not None or not (self._core.captures or alone):
            return ()
        drafted = self.controller is not None and any(r.params.speculate for r in requests)
        arms = self.controller.arms if self.controller is not None and drafted else (PLAIN,)
        return step_kinds(arms, self.n_steps, alone=alone)

    # ------------------------------------------------------------------------------ prefill

    def _launch_chunk(self) -> _Launched | None:
        """Launches the next chunk of a prompt or of a window, or several prompts at once."""
        prefilling, self._prefilling = self._prefilling or self._next_prefill(), None
        if prefilling is None:
            return None
        job, seat, start = prefilling.job, prefilling.seat, prefilling.start
        if isinstance(job, Scoring):
            return self._launch_windows(prefilling, job)
        end = prefilling.end(self._chunk)
        if end == prefilling.n:
            return self._admit([prefilling, *self._batched_with(prefilling)])
        self._prefilling, prefilling.start = prefilling, end
        pending = self._core.run(
            Prefill(seat=seat.index, start=start, ids=job.prompt_ids[start:end])
        )
        self._seats.hold(seat, job.prompt_ids, end)
        return _Launched(pending, prefilling=job)

    def _batched_with(self, first: _Prefilling) -> Iterator[_Prefilling]:
        """Takes prompts that are prefilled together with this one off the queue, in its order."""
        limits, n, n_tokens = self._prefill_batching, 1, first.n - first.start
        if limits is None or n_tokens > limits.max_prompt_tokens:
            return
        n_forwards = limits.n_forwards(n_tokens)
        while n < limits.max_prompts and self._waiting and isinstance(self._waiting[0], Request):
            following = self._next_prefill()
            if following is None:  # no seat is free
                return
            n_new = following.n - following.start
            n, n_tokens = n + 1, n_tokens + n_new
            is_short = (
                n_new <= limits.max_prompt_tokens and following.end(self._chunk) == following.n
            )
            fits = n_tokens <= limits.max_tokens and limits.n_forwards(n_new) == n_forwards
            if not (is_short and fits):
                self._prefilling = following  # by itself, in the next iteration
                return
            yield following

    def _launch_windows(self, first: _Prefilling, job: Scoring) -> _Launched:
        """Launches the next chunk of a window; with its last one, other windows are scored too."""
        size = self._window_chunk(job)
        windows, is_last = {job: first}, first.end(size) == first.n
        if is_last:
            windows |= self._scored_with(first, job)
        chunks = []
        for window, each in windows.items():
            start, end = each.start, each.end(self._window_chunk(window))
            ids = window.ids[start : end + 1]
            chunks.append(WindowChunk(seat=each.seat.index, start=start, ids=ids))
            self._seats.hold_window(each.seat, window, end)
            each.start = end
        if not is_last:
            self._prefilling = first
        command = ScoreWindows(chunks=chunks, full=job.full, n_top=job.n_top)
        return _Launched(self._core.run(command), scored=tuple(windows), is_last=is_last)

    def _window_chunk(self, window: Scoring) -> int:
        """Returns the chunk size of a window: that of prompts, unless it can share a prefix."""
        return self._chunk if window.group is None else self._score_batching.chunk

    def _scored_with(self, first: _Prefilling, job: Scoring) -> dict[Scoring, _Prefilling]:
        """Takes further windows off the queue, in its order, that are scored with this one."""
        taken: dict[Scoring, _Prefilling] = {}
        lengths = [first.n - first.start]
        while self._waiting and self._seats.any_free:
            following = self._waiting[0]
            if not isinstance(following, Scoring):
                break
            if not self._can_be_scored_with(following, [job, *taken]):
                break
            least = len(following.ids) - 1 - self._seats.n_cached(following)
            if not self._score_batching.holds([*lengths, least]):
                break
            prefilling = self._next_prefill()
            assert prefilling is not None, "a seat is free"
            n_new = prefilling.n - prefilling.start
            is_last = prefilling.end(self._window_chunk(following)) == prefilling.n
            if not (is_last and self._score_batching.holds([*lengths, n_new])):
                self._prefilling = prefilling  # by itself, in the next iteration
                break
            lengths.append(n_new)
            taken[following] = prefilling
        return taken

    def _can_be_scored_with(self, window: Scoring, others: Sequence[Scoring]) -> bool:
        """Returns whether a window is scored with others; if not, it waits to reuse a prefix."""
        if (window.full, window.n_top) != (others[0].full, others[0].n_top):
            return False
        shares_nothing = window.group is None or others[0].group is None
        if shares_nothing and not self._score_batching.exact:
            return False
        if window.group is None:
            return True
        alike = [common_prefix(o.ids, window.ids) for o in others if o.group is window.group]
        return max(alike, default=0) < self._seats.n_cached(window) + MIN_SHARED_TOKENS

    def _admit(self, prompts: Sequence[_Prefilling]) -> _Launched:
        """Launches the last chunks of prompts, whose requests become rows."""
        # One request takes the first free row; several requests take consecutive rows.
        row = self._rows.index(None) if len(prompts) == 1 else self._compact()
        admitted, requests = [], {}
        for i, prefilling in enumerate(prompts):
            job = prefilling.job
            assert isinstance(job, Request), "windows have no rows"
            self._rows[row + i] = requests[i] = job
            admitted.append(
                Admitted(
                    seat=prefilling.seat.index,
                    params=job.params,
                    seed=job.seed,
                    eos_ids=job.eos_ids,
                    prompt_ids=job.prompt_ids,
                    start=prefilling.start,
                    n_cached=job.n_cached,
                )
            )
        pending = self._core.run(Admit(row=row, prompts=admitted))
        for i, prefilling in enumerate(prompts):
            self._seats.hold(prefilling.seat, requests[i].prompt_ids, prefilling.n)
        return _Launched(pending, requests=requests)

    def _next_prefill(self) -> _Prefilling | None:
        """Gives the first job of the queue a seat, if one is free."""
        if not self._waiting or not self._seats.any_free:
            return None
        job = self._waiting.popleft()
        if isinstance(job, Scoring):
            placement = self._seats.place_window(job)
            # The last common token is an input again: it predicts the first token that differs.
            start = max(0, placement.n_cached - 1)
            if start > 0:
                assert placement.window is not None, "a window wrote its prefix"
                job.reuse_scores(placement.window, start)
        else:
            placement = self._seats.place(job.prompt_ids, job.salt)
            start = placement.n_cached
            job.start(start)
        seat = self._seat_of[job] = placement.seat
        if placement.source is not None:
            copy = CopySeat(source=placement.source.index, target=seat.index, n=placement.n_cached)
            self._core.run(copy)
        return _Prefilling(job, seat, start)

    # ------------------------------------------------------------------------------ delivery

    def _deliver(self, launched: _Launched) -> list[tuple[Job, Delta | None]]:
        """Delivers a launch's tokens or score, and frees the seats of jobs that end."""
        result = launched.pending.wait()
        if launched.scored:
            return self._deliver_scores(launched.scored, result, is_last=launched.is_last)
        if not launched.requests:
            return []
        self.n_programs = max(self.n_programs, result.n_programs)
        self._undelivered.extend((launched, step) for step in result.later)
        if launched.choice.k:
            launched.mean_drafts = fmean(max(step.n_drafts) for step in (result, *result.later))
        return self._deliver_step(launched, result)

    def _deliver_step(
        self, launched: _Launched, result: StepResult
    ) -> list[tuple[Job, Delta | None]]:
        """Delivers the tokens of a step, or of the plain steps of a multi-step program."""
        # The other requests ended before this step, or after it was launched.
        running = {row: r for row, r in launched.requests.items() if not r.ended}
        n_steps = 1 if launched.choice.k else launched.n_steps
        if self.controller is not None and launched.n:
            self.controller.observe(
                launched.n,
                result.k,
                choice=launched.choice,
                times=result.times,
                kept={request: len(result.rows[row]) for row, request in running.items()},
                steps=n_steps,
                n_made=max(result.n_drafts),
                mean_made=launched.mean_drafts,
            )
        deltas: list[tuple[Job, Delta | None]] = []
        for row, request in running.items():
            texts, ids = [], []
            request.grammar_failure = result.failures.get(row)
            for token_id, logprob in result.rows[row]:
                if request.grammar_failure is not None or token_id < 0:
                    request.failed = True
                    break
                texts.append(request.accept(token_id, logprob))
                ids.append(token_id)
                if request.finish_reason is not None:
                    break  # the step's further tokens are beyond the end
            if self.controller is not None and launched.n:
                request.count_steps(
                    1 if n_steps == 1 else len(ids),
                    n_step_tokens=len(result.rows[row]),
                    n_kept=len(ids),
                    n_drafts=result.n_drafts[row],
                    times=(result.times or StepTimes()) / len(running),
                )
            if request.ended:
                self._release(request)
            # A step with drafts yields the accepted drafts and one token of the model's own.
            n_accepted = len(result.rows[row]) - 1 if result.n_drafts[row] else 0
            delta = Delta(
                index=request.index,
                text="".join(texts),
                token_ids=tuple(ids),
                logprobs=request.newest_logprobs(len(ids)),
                generation=None if request.finish_reason is None else request.generation(),
                n_accepted=min(n_accepted, len(ids)),
                n_accepted_chars=sum(map(len, texts[:n_accepted])),
            )
            deltas.append((request, delta))
        return deltas

    def _deliver_scores(
        self, windows: Sequence[Scoring], parts: Sequence[Score], *, is_last: bool
    ) -> list[tuple[Job, Delta | None]]:
        """Adds the scores of chunks to windows; returns the windows that are complete."""
        scored: list[tuple[Job, Delta | None]] = []
        for window, part in zip(windows, parts, strict=True):
            if window.ended:
                continue
            window.parts.append(part)
            if is_last:
                window.finish()
                self._release(window)
                scored.append((window, None))
        return scored


@dataclass(slots=True)
class _Prefilling:
    """A job whose prompt or window is being prefilled, and the position of its next chunk."""

    job: Job
    seat: Seat
    start: int

    @property
    def n(self) -> int:
        """The number of tokens to prefill, cached ones included."""
        return len(self.job.prompt_ids) if isinstance(self.job, Request) else len(self.job.ids) - 1

    def end(self, chunk: int) -> int:
        """Returns the end of its next chunk, for chunks of this size."""
        return min(self.n, self.start - self.start % chunk + chunk)


@dataclass(slots=True)
class _Launched:
    """A launched chunk, step or multi-step program.

    Attributes:
        pending: Its result.
        requests: The request of each row of the result.
        prefilling: The request of a chunk that is not the last of its prompt.
        scored: The windows that chunks belong to.
        is_last: The chunks are the last of their windows.
        n: Rows of the step; 0 for a chunk.
        choice: How the step drafts.
        n_steps: Steps of the program.
        mean_drafts: The number of drafts of a step's longest chain, as the mean over its steps.
    """

    pending: Pending[Any]
    requests: Mapping[int, Request] = field(default_factory=dict)
    prefilling: Request | None = None
    scored: Sequence[Scoring] = ()
    is_last: bool = False
    n: int = 0
    choice: Choice = field(default_factory=Choice)
    n_steps: int = 1
    mean_drafts: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether no job needs the result any more."""
        jobs: list[Job | None] = [*self.requests.values(), self.prefilling, *self.scored]
        return all(job is None or job.ended for job in jobs)
