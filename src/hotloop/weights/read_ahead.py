"""Reads ahead in a thread, by a bounded number of bytes, in the order of requests.

Reading from a file releases Python's lock, so it overlaps with decoding, quantizing and packing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class ReadAhead(Generic[Value]):
    """Runs jobs in a thread, and returns their results one by one, in order.

    An exception of a job is raised in place of its result, and ends the thread.

    Args:
        jobs: The jobs; their iterator runs in the thread too.
        n_bytes: Counts the bytes of a result.
        limit: The most bytes of results that wait. A larger result waits alone.
    """

    def __init__(
        self, jobs: Iterable[Callable[[], Value]], n_bytes: Callable[[Value], int], limit: int
    ) -> None:
        self._jobs, self._n_bytes, self._limit = jobs, n_bytes, limit
        self._ready: deque[tuple[Value, int]] = deque()
        self._waiting_bytes = 0
        self._unplaced: int | None = None  # bytes of a result that is read, and waits for room
        self._error: BaseException | None = None
        self._ended = self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def next(self) -> Value:
        """Waits for the next result.

        Raises:
            BaseException: The exception of its job.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended)
            if not self._ready:
                assert self._error is not None, "more results than jobs"
                raise self._error
            value, n_bytes = self._ready.popleft()
            self._waiting_bytes -= n_bytes
            self._changed.notify_all()
        return value

    def close(self) -> None:
        """Ends the thread, after the job that it is running."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _is_full(self) -> bool:
        """Returns whether the result that was read last has to wait for room."""
        if self._unplaced is None or not self._ready:
            return False
        return self._waiting_bytes + self._unplaced > self._limit

    def _run(self) -> None:
        try:
            for job in self._jobs:
                value = job()
                n_bytes = self._n_bytes(value)
                with self._changed:
                    self._unplaced = n_bytes
                    self._changed.wait_for(lambda: self._stopped or not self._is_full())
                    self._unplaced = None
                    if self._stopped:
                        return
                    self._ready.append((value, n_bytes))
                    self._waiting_bytes += n_bytes
                    self._changed.notify_all()
                del value
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
