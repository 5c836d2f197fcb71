"""Starts, watches and ends the processes of ranks.

The caller's process is not a rank. It sends commands to all ranks, and gets results from one of
them. A thread watches every rank's connection and process, so that the caller never waits for a
rank that has ended. When a rank fails, all ranks are ended, and the caller gets the error of the
first failure, not the errors that it caused in other ranks.

Each rank leads a process session: SIGINT from the terminal reaches only the caller, and ending a
rank ends the processes that it started. Ranks detect the end of the caller by their connection (see
``link``) and by their parent process (see ``program``).

This module does not know what ranks compute.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, BinaryIO

import psutil

from hotloop.child_process import ChildProcess, signal_name
from hotloop.errors import HotloopError, OutOfMemoryError, RankError, RequestError
from hotloop.parallel.link import LAST, Answer, Failure, Progress, receive, send
from hotloop.writing import tail

TICK_S = 0.5
"""Interval of checks of processes whose connections send nothing."""

PEER_GRACE_S = 2.0
"""Time to wait for the cause, if a rank reports only that one of its peers is gone."""

SILENCE_S = 30.0
"""Time without an answer after which a warning names the ranks that do not respond."""

LOG_TAIL_LINES = 8
"""Lines of a failed rank's log that its error quotes."""


@dataclass(eq=False)
class Rank:
    """The caller's view of a rank.

    Attributes:
        index: Its number.
        connection: Carries commands to it, and its answers.
        process: Its process; None if it was started elsewhere (by torchrun).
        log: The output of its process, if the caller started it.
        killed: Its connection has been shut down, or the last message sent. It is set only for a
            rank whose process was started elsewhere.
    """

    index: int
    connection: Connection
    process: ChildProcess | None = None
    log: BinaryIO | None = None
    killed: bool = False

    def kill(self) -> None:
        """Kills its process and the processes that it started: it may be waiting for a peer.

        A process that the caller did not start ends itself when its connection closes (see
        ``link``).
        """
        if self.process is not None:
            self.process.kill()
        elif not self.killed:
            self.killed = True
            with suppress(OSError), socket.socket(fileno=os.dup(self.connection.fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)

    def is_stopped(self) -> bool:
        """Returns whether its process is stopped (SIGSTOP); False if it was started elsewhere."""
        if self.process is None:
            return False
        try:
            return psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED
        except psutil.Error:  # it has ended, which the watch explains
            return False

    def release(self) -> None:
        """Ends an idle rank; a process that the caller did not start shuts down by itself."""
        if self.process is not None:
            self.kill()
        elif not self.killed:
            self.killed = True
            with suppress(OSError):
                send(self.connection, LAST)

    def close(self) -> None:
        """Waits for the end of its process, and closes its connection and log."""
        if self.process is not None:
            self.process.wait()
        self.connection.close()
        if self.log is not None:
            self.log.close()


def start_rank(module: str, index: int) -> Rank:
    """Starts ``python -m module INDEX FD``; ``FD`` is its end of the connection."""
    ours, theirs = Pipe()
    log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the rank)
    try:
        process = ChildProcess(
            [
                *("-m", "hotloop.parallel.program"),
                *(str(os.getpid()), module, str(index), str(theirs.fileno())),
            ],
            output=log,
            fds=(theirs.fileno(),),
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return Rank(index, ours, process, log)


def end_ranks(ranks: Sequence[Rank]) -> None:
    """Ends ranks that are not watched yet."""
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.close()


class Ranks:
    """A group of watched ranks. They are ended with the last reference to the group, or at exit.

    Args:
        ranks: All ranks, in order. The first one answers commands.
    """

    def __init__(self, ranks: Sequence[Rank]) -> None:
        self._ranks, self._number = ranks, 0
        self._watch = _Watch(ranks)
        thread = threading.Thread(target=self._watch.run, name="hotloop ranks", daemon=True)
        self._finalizer = weakref.finalize(self, _end, self._watch, thread, os.getpid())
        try:
            thread.start()
        except BaseException:  # KeyboardInterrupt: the thread may run already
            self.end()
            raise

    def send_to_all(self, command: Any, *, phase: str) -> Reply:
        """Sends a command to every rank.

        Args:
            command: Any value that can be pickled.
            phase: The phase that begins; errors name it until the next command.

        Returns:
            A reply, whose ``wait`` returns the command's result or raises its error.

        Raises:
            HotloopError: A rank has failed, or the ranks have ended.
        """
        self._number += 1
        reply = Reply(self._number, self._watch)
        self._watch.expect(reply, phase)
        try:
            for rank in self._ranks:
                with suppress(OSError):  # the rank is gone: the watch reports it
                    send(rank.connection, (self._number, command))
        except BaseException:  # KeyboardInterrupt in mid-message makes the next one unreadable
            self.end()
            raise
        return reply

    def end(self) -> None:
        """Ends every rank; later calls do nothing."""
        self._finalizer()


class Reply:
    """The pending result of a command. It is dropped with the last reference to the reply."""

    def __init__(self, number: int, watch: _Watch) -> None:
        self.number, self._watch = number, watch
        self.value: Any = None
        self.done = False
        self.progress: deque[tuple[Any, ...]] = deque()

    def wait(self, on_progress: Callable[..., None] | None = None) -> Any:
        """Waits for the result.

        Args:
            on_progress: Called with progress meanwhile.

        Raises:
            HotloopError: The error of the rank that failed first; RankError if that error is not
                hotloop's, or if a rank died.
        """
        warned = False
        while True:
            with self._watch.changed:
                while not (self.done or self.progress or self._watch.error):
                    heard = self._watch.changed.wait(SILENCE_S)
                    if not heard and not warned:
                        warned = True
                        warnings.warn(self._watch.silence_warning(), stacklevel=2)
                progress = [self.progress.popleft() for _ in range(len(self.progress))]
                if not progress:
                    if self.done:
                        return self.value
                    assert self._watch.error is not None
                    raise self._watch.error
            for arguments in progress:
                if on_progress is not None:
                    on_progress(*arguments)


@dataclass
class _Watch:
    """State of the watching thread, shared with the threads that wait for replies."""

    ranks: Sequence[Rank]
    changed: threading.Condition = field(default_factory=threading.Condition)
    error: HotloopError | None = None
    ended: bool = False

    def __post_init__(self) -> None:
        self._replies: weakref.WeakValueDictionary[int, Reply] = weakref.WeakValueDictionary()
        self._phase = "start"

    def expect(self, reply: Reply, phase: str) -> None:
        """Registers the reply that waits for a command's result, and sets the phase.

        Raises:
            HotloopError: A rank has failed, or the ranks have ended.
        """
        with self.changed:
            if self.error is not None:
                raise self.error
            self._replies[reply.number] = reply
            self._phase = phase

    def silence_warning(self) -> str:
        """Returns a warning that names the stopped ranks, or else rank 0, which should answer."""
        stopped, n = [str(rank.index) for rank in self.ranks if rank.is_stopped()], len(self.ranks)
        if not stopped:
            who = f"rank 0 of {n} may be busy, or wait for another"
        elif len(stopped) == 1:
            who = f"rank {stopped[0]} of {n} is stopped (SIGCONT resumes it)"
        else:
            who = f"ranks {' and '.join(stopped)} of {n} are stopped (SIGCONT resumes them)"
        return f"no answer for {SILENCE_S:.0f} s in {self._phase}: {who}. Still waiting."

    def end(self) -> None:
        """Makes all pending and later replies raise an error: the ranks have ended."""
        with self.changed:
            self.ended = True
            if self.error is None:
                self.error = RequestError("the engine is closed: its ranks have ended.")
            self.changed.notify_all()

    def run(self) -> None:
        """Delivers the ranks' messages, until a rank fails or all are ended."""
        failures: dict[Rank, Failure | None] = {}  # None: it died without a message
        deadline = float("inf")
        if self.ended:  # before this thread could be joined: the ranks may be closed
            return
        while not failures or (
            all(failure and failure.by_peer for failure in failures.values())
            and time.monotonic() < deadline
        ):
            for rank, message in self._messages(failures):
                if isinstance(message, Answer | Progress):
                    self._deliver(message)
                else:
                    failures[rank] = message
                    deadline = min(deadline, time.monotonic() + PEER_GRACE_S)
            if self.ended:
                return
        # The first rank with a failure of its own, or else the first that reported a peer's.
        own = (rank for rank, failure in failures.items() if not (failure and failure.by_peer))
        first = next(own, next(iter(failures)))
        error = self._explain(first, failures[first])
        for rank in self.ranks:
            rank.kill()
        with self.changed:
            self.error = error
            self.changed.notify_all()

    def _messages(
        self, failures: dict[Rank, Failure | None]
    ) -> Iterator[tuple[Rank, Answer | Progress | Failure | None]]:
        """Yields the messages of ranks within a tick; None for a rank that has ended."""
        waiting = {rank.connection: rank for rank in self.ranks if rank not in failures}
        ready = wait(list(waiting), TICK_S)
        for connection, rank in waiting.items():
            if connection in ready:
                try:
                    yield rank, receive(connection)
                except (EOFError, OSError):
                    yield rank, None
            elif not ready and rank.process is not None and rank.process.poll() is not None:
                yield rank, None  # a process that it started holds the connection open

    def _deliver(self, message: Answer | Progress) -> None:
        with self.changed:
            reply = self._replies.get(message.number)
            if reply is None:
                return
            if isinstance(message, Progress):
                reply.progress.append(message.arguments)
            else:
                reply.value, reply.done = message.value, True
            self.changed.notify_all()

    def _explain(self, rank: Rank, failure: Failure | None) -> HotloopError:
        n_ranks = len(self.ranks)
        if failure is not None:
            if failure.error is not None:
                return failure.error
            problem = f"failed in {self._phase}: {failure.summary}"
            return RankError(rank.index, n_ranks, problem, _last_lines(rank.log))
        if rank.process is None:
            return RankError(rank.index, n_ranks, f"closed its connection in {self._phase}")
        code = rank.process.wait(PEER_GRACE_S)
        if rank.process.oom_killed():
            return OutOfMemoryError(self._phase)
        if code is None:
            how = "does not respond"
        elif code < 0:
            how = f"was killed by {signal_name(code)}"
        else:
            how = f"ended with exit code {code}"
        return RankError(rank.index, n_ranks, f"{how} in {self._phase}", _last_lines(rank.log))


def _end(watch: _Watch, thread: threading.Thread, owner: int) -> None:
    """Ends the ranks of a group; runs when nothing refers to the group any more, or at exit."""
    if os.getpid() != owner:
        return  # a fork of the caller ends, not the caller
    watch.end()
    for rank in watch.ranks:
        rank.release()
    with suppress(RuntimeError):  # the thread runs this itself, or has not reached ``run`` yet
        thread.join()
    for rank in watch.ranks:
        rank.close()


def _last_lines(log: BinaryIO | None) -> str:
    return "\n".join(tail(log, LOG_TAIL_LINES)) if log else ""
