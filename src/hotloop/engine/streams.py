"""Streams of answers that share one scheduler, and run it from one thread or several.

The scheduler has no thread of its own. A thread that asks its stream for the next piece runs an
iteration of the scheduler, and gives the other streams their pieces. If another thread is already
running an iteration, it waits for that one. So a lone stream runs the scheduler inline.
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
    """Jobs that are submitted by one call and cancelled together, and pieces not yet returned.

    Attributes:
        jobs: Its jobs that have not ended.
        pieces: Pieces of its jobs that ``Streams.next`` has not returned.
        error: The error that ended it early; None if there was none.
    """

    def __init__(self) -> None:
        self.jobs: dict[Job, None] = {}
        self.pieces: deque[Piece] = deque()
        self.error: Exception | None = None

    @property
    def ready(self) -> bool:
        """Whether ``Streams.next`` can return without running an iteration of the scheduler."""
        return bool(self.pieces) or not self.jobs or self.error is not None


class Streams:
    """The streams of a scheduler, and the lock by which one thread at a time uses the scheduler.

    Args:
        scheduler: The scheduler.

    Attributes:
        held: A service uses the scheduler alone, so no stream can be opened.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.held = False
        self._released = threading.Condition()
        self._acquired = False
        self._stream_of: dict[Job, Stream] = {}
        # Closed streams whose jobs are still to be cancelled. The garbage collector can close a
        # stream at any point of any thread, even of the one that has the scheduler. So closing only
        # appends here, and the thread that has the scheduler cancels the jobs.
        self._closed: deque[Stream] = deque()

    @contextmanager
    def hold(self) -> Generator[None]:
        """Keeps the scheduler for a service, in the ``with`` block.

        Raises:
            RequestError: A service has it, or streams are open.
        """
        with self.exclusive():
            self.check_not_held()
            if self._stream_of:
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
        """Submits jobs, and returns their stream.

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
        """Submits another job to a stream that has not been closed.

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
        self._stream_of[job] = stream
        self.scheduler.submit(job)

    def next(self, stream: Stream) -> Piece | None:
        """Returns a stream's next piece; None after the last.

        Raises:
            Exception: The device side has failed, in an iteration of any stream.
        """
        while not stream.ready:
            if self._acquire(stream):
                try:
                    self._iterate()
                finally:
                    self._release()
        if stream.pieces:
            return stream.pieces.popleft()
        if stream.error is not None:
            raise stream.error
        return None

    def close(self, stream: Stream) -> None:
        """Cancels the jobs of a stream that have not ended, without waiting."""
        if stream.jobs:
            self._closed.append(stream)
            self._cancel_closed()

    def fail(self, error: Exception) -> None:
        """Ends all streams with an error. The caller must hold the scheduler (``exclusive``)."""
        streams = dict.fromkeys(self._stream_of.values())
        self._cancel(streams)
        for stream in streams:
            stream.error = error

    @contextmanager
    def exclusive(self) -> Generator[None]:
        """Acquires the scheduler for the ``with`` block, when no stream or service uses it."""
        self._acquire()
        try:
            yield
        finally:
            self._release()

    def _iterate(self) -> None:
        """Runs an iteration of the scheduler, and gives each stream its pieces."""
        try:
            pieces = self.scheduler.iterate()
        except Exception as error:
            self.fail(error)
            return
        for job, piece in pieces:
            stream = self._stream_of[job]
            stream.pieces.append((job, piece))
            if job.ended:
                del stream.jobs[job]
                del self._stream_of[job]

    def _acquire(self, stream: Stream | None = None) -> bool:
        """Waits for the scheduler and acquires it; False if the stream is ready first."""
        with self._released:
            while self._acquired and not (stream is not None and stream.ready):
                self._released.wait()
            if stream is not None and stream.ready:
                return False
            self._acquired = True
            return True

    def _release(self) -> None:
        with self._released:
            self._acquired = False
            self._released.notify_all()
        self._cancel_closed()

    def _cancel_closed(self) -> None:
        """Cancels the jobs of closed streams; if a thread has the scheduler, that thread does."""
        while self._closed:
            with self._released:
                if self._acquired:
                    return
                self._acquired = True
            while self._closed:
                self._cancel([self._closed.popleft()])
            with self._released:
                self._acquired = False
                self._released.notify_all()

    def _cancel(self, streams: Iterable[Stream]) -> None:
        for stream in streams:
            for job in stream.jobs:
                self.scheduler.cancel(job)
                self._stream_of.pop(job, None)
            stream.jobs.clear()
