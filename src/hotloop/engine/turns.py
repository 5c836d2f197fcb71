"""Streams that drive one scheduler together, from one thread or several.

A stream that needs its next piece runs an iteration of the scheduler, unless another thread is
running one, and hands the other streams their pieces. So a lone stream runs the scheduler inline,
without a further thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

from hotloop.engine.scheduler import Job, Scheduler
from hotloop.errors import RequestError
from hotloop.types import Delta

Piece = tuple[Job, Delta | None]
"""A new piece of an answer; None for a window that has been scored."""


class Stream:
    """Jobs that are cancelled together, and their pieces that have not been taken.

    Attributes:
        jobs: Its jobs that have not ended.
        pieces: The pieces.
        error: The error that ended it early; None if there was none.
    """

    def __init__(self) -> None:
        self.jobs: dict[Job, None] = {}
        self.pieces: deque[Piece] = deque()
        self.error: Exception | None = None

    @property
    def ready(self) -> bool:
        """Whether ``Turns.next`` can return without running an iteration of the scheduler."""
        return bool(self.pieces) or not self.jobs or self.error is not None


class Turns:
    """Lets one stream at a time use a scheduler.

    Args:
        scheduler: The scheduler.

    Attributes:
        held: A service has the scheduler, and streams cannot be opened.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.held = False
        self._turn_ended = threading.Condition()
        self._taken = False
        self._streams: dict[Job, Stream] = {}
        # Streams that the garbage collector ended. It can run at any point of any thread, so it
        # only appends here; the thread that has the scheduler cancels their jobs.
        self._left: deque[Stream] = deque()

    @contextmanager
    def hold(self) -> Generator[None]:
        """Keeps the scheduler for a service, in the ``with`` block.

        Raises:
            RequestError: A service has it, or streams are open.
        """
        with self.exclusive():
            self.check_not_held()
            if self._streams:
                raise RequestError(
                    "this engine is in the middle of a stream: exhaust or close the stream before "
                    "the engine is served."
                )
            self.held = True
        try:
            yield
        finally:
            self.held = False

    def check_not_held(self) -> None:
        """Refuses a call while a service has the scheduler.

        Raises:
            RequestError: A service has the scheduler.
        """
        if self.held:
            raise RequestError(
                "this engine has a service, which is its only user: submit to the service, or "
                "close it first."
            )

    def open(self, jobs: Sequence[Job]) -> Stream:
        """Submits jobs.

        Raises:
            RequestError: A service has the scheduler.
        """
        stream = Stream()
        with self.exclusive():
            self.check_not_held()
            for job in jobs:
                self._submit(stream, job)
        return stream

    def add(self, stream: Stream, job: Job) -> None:
        """Submits another job to a stream that has not been abandoned.

        Raises:
            RequestError: A service has the scheduler.
            Exception: The error that ended the stream early.
        """
        with self.exclusive():
            self.check_not_held()
            if stream.error is not None:
                raise stream.error
            self._submit(stream, job)

    def _submit(self, stream: Stream, job: Job) -> None:
        stream.jobs[job] = None
        self._streams[job] = stream
        self.scheduler.submit(job)

    def next(self, stream: Stream) -> Piece | None:
        """Returns a stream's next piece; None after the last.

        Raises:
            Exception: The device side has failed, in an iteration of any stream.
        """
        while not stream.ready:
            if self._take(stream):
                try:
                    self._iterate()
                finally:
                    self._give_back()
        if stream.pieces:
            return stream.pieces.popleft()
        if stream.error is not None:
            raise stream.error
        return None

    def leave(self, stream: Stream) -> None:
        """Cancels the jobs of a stream that have not ended. It does not wait."""
        if stream.jobs:
            self._left.append(stream)
            self._cancel_left()

    def fail(self, error: Exception) -> None:
        """Ends all streams with an error. The caller must hold the scheduler (``exclusive``)."""
        streams = dict.fromkeys(self._streams.values())
        self._cancel(streams)
        for stream in streams:
            stream.error = error

    @contextmanager
    def exclusive(self) -> Generator[None]:
        """Acquires the scheduler for the ``with`` block, when no stream or service uses it."""
        self._take()
        try:
            yield
        finally:
            self._give_back()

    def _iterate(self) -> None:
        try:
            pieces = self.scheduler.iterate()
        except Exception as error:
            self.fail(error)
            return
        for job, piece in pieces:
            stream = self._streams[job]
            stream.pieces.append((job, piece))
            if job.ended:
                del stream.jobs[job]
                del self._streams[job]

    def _take(self, stream: Stream | None = None) -> bool:
        """Waits for the scheduler and acquires it; False if the stream is ready first."""
        with self._turn_ended:
            while self._taken and not (stream is not None and stream.ready):
                self._turn_ended.wait()
            if stream is not None and stream.ready:
                return False
            self._taken = True
            return True

    def _give_back(self) -> None:
        with self._turn_ended:
            self._taken = False
            self._turn_ended.notify_all()
        self._cancel_left()

    def _cancel_left(self) -> None:
        """Cancels abandoned streams; if a thread has the scheduler, that thread does it."""
        while self._left:
            with self._turn_ended:
                if self._taken:
                    return
                self._taken = True
            while self._left:
                self._cancel([self._left.popleft()])
            with self._turn_ended:
                self._taken = False
                self._turn_ended.notify_all()

    def _cancel(self, streams: Iterable[Stream]) -> None:
        for stream in streams:
            for job in stream.jobs:
                self.scheduler.cancel(job)
                self._streams.pop(job, None)
            stream.jobs.clear()
