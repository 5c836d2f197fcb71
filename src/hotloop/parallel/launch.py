"""Starting the processes of ranks, watching them, and ending them.

The caller's process is not a rank. It sends commands to all ranks and gets results from one of
them; it waits for nothing else than a thread that watches every rank's connection and process, so
that whatever becomes of a rank, the caller learns of it. When one ends, all are ended, and the
caller gets the error of the one that failed first rather than those that this caused in others.

Ranks lead sessions of their own: a Ctrl-C at the terminal reaches the caller alone, and ending a
rank ends what it started. If the caller dies, they notice by their connections (see ``link``), and
by their parent (see ``program``).

What ranks compute is none of this module's business.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, BinaryIO

from hotloop.errors import HotloopError, OutOfMemoryError, RankError, RequestError
from hotloop.hardware import kernel_oom_kills
from hotloop.parallel.link import LAST, Answer, Failure, Told, receive, send

TICK_S = 0.5
"""How often processes are looked at whose connections are silent."""

PEER_GRACE_S = 2.0
"""How long to wait for a better explanation, when all that a rank says is that a peer is gone."""

LOG_TAIL_LINES = 8


@dataclass(eq=False)
class Rank:
    """A rank as the caller sees it.

    Attributes:
        index: Which one.
        connection: Where commands go and answers come from.
        process: Its process; None if somebody else started it, and ends it.
        log: What it and its libraries print, where we started it.
    """

    index: int
    connection: Connection
    process: subprocess.Popen[bytes] | None = None
    log: BinaryIO | None = None
    killed: bool = False

    def kill(self) -> None:
        """Ends its process and what that started, without asking: it may be waiting for a peer.

        One that is not ours ends itself when its connection does (see ``link``).
        """
        if self.killed:
            return  # once: later, the number can be another process's
        self.killed = True
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        else:
            with suppress(OSError), socket.socket(fileno=os.dup(self.connection.fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Ends it when there is nothing more to do; one that is not ours ends in good order."""
        if self.process is not None:
            self.kill()
        elif not self.killed:
            self.killed = True
            with suppress(OSError):
                send(self.connection, LAST)

    def close(self) -> None:
        """Waits for the end of its process, and lets go of what it leaves."""
        if self.process is not None:
            self.process.wait()
        self.connection.close()
        if self.log is not None:
            self.log.close()


def start_rank(module: str, index: int) -> Rank:
    """Starts ``python -m module INDEX FD``; ``FD`` is its end of the connection."""
    ours, theirs = Pipe()
    log = tempfile.TemporaryFile()  # noqa: SIM115 (goes when the rank does)
    try:
        process = subprocess.Popen(
            [
                *(sys.executable, "-X", "faulthandler", "-m", "hotloop.parallel.program"),
                *(str(os.getpid()), module, str(index), str(theirs.fileno())),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return Rank(index, ours, process, log)


def end_ranks(ranks: Sequence[Rank]) -> None:
    """Ends ranks that nobody watches yet."""
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.close()


class Ranks:
    """Ranks that are watched; without references to this object, or at exit, they are ended.

    Args:
        ranks: All of them, in order. The first answers commands.
    """

    def __init__(self, ranks: Sequence[Rank]) -> None:
        self._ranks, self._number = ranks, 0
        self._watch = _Watch(ranks)
        thread = threading.Thread(target=self._watch.run, name="hotloop ranks", daemon=True)
        self._finalizer = weakref.finalize(self, _end, self._watch, thread, os.getpid())
        thread.start()

    def tell(self, command: Any, *, phase: str) -> Reply:
        """Sends a command to every rank; its result, or what prevented it, comes by the reply.

        Args:
            command: Any value that can be pickled.
            phase: What an error calls the time until the next command.
        """
        self._number += 1
        reply = Reply(self._number, self._watch)
        self._watch.expect(reply, phase)
        try:
            for rank in self._ranks:
                with suppress(OSError):  # it is gone, which the watch explains
                    send(rank.connection, (self._number, command))
        except BaseException:  # a Ctrl-C in the middle of a message: no rank would understand more
            self.end()
            raise
        return reply

    def end(self) -> None:
        """Ends every rank. Nothing happens the second time."""
        self._finalizer()


class Reply:
    """The result of a command on its way. One that nobody waits for any more is dropped."""

    def __init__(self, number: int, watch: _Watch) -> None:
        self.number, self._watch = number, watch
        self.value: Any = None
        self.done = False
        self.told: deque[tuple[Any, ...]] = deque()

    def wait(self, on_told: Callable[..., None] | None = None) -> Any:
        """The result, once it is there.

        Args:
            on_told: Is told of progress meanwhile.

        Raises:
            HotloopError: The error of the rank that failed first; RankError if it is none of
                hotloop's own, or if a rank died.
        """
        while True:
            with self._watch.changed:
                while not (self.done or self.told or self._watch.error):
                    self._watch.changed.wait()
                told = [self.told.popleft() for _ in range(len(self.told))]
                if not told:
                    if self.done:
                        return self.value
                    assert self._watch.error is not None
                    raise self._watch.error
            for what in told:
                if on_told is not None:
                    on_told(*what)


@dataclass
class _Watch:
    """What the watching thread knows, shared with whoever waits."""

    ranks: Sequence[Rank]
    changed: threading.Condition = field(default_factory=threading.Condition)
    error: HotloopError | None = None
    ended: bool = False

    def __post_init__(self) -> None:
        self._replies: weakref.WeakValueDictionary[int, Reply] = weakref.WeakValueDictionary()
        self._phase = "start"
        self._oom_kills = kernel_oom_kills()

    def expect(self, reply: Reply, phase: str) -> None:
        """Remembers who waits for a command's result, and in which phase."""
        with self.changed:
            if self.error is not None:
                raise self.error
            self._replies[reply.number] = reply
            self._phase = phase

    def end(self) -> None:
        """Tells whoever waits, or asks for more, that there are no ranks any more."""
        with self.changed:
            self.ended = True
            if self.error is None:
                self.error = RequestError("the engine is closed: its ranks have ended.")
            self.changed.notify_all()

    def run(self) -> None:
        """Hands out what ranks send, until one of them fails or all are ended."""
        failures: dict[Rank, Failure | None] = {}  # None: it died without a word
        deadline = float("inf")
        while not failures or (
            all(failure and failure.by_peer for failure in failures.values())
            and time.monotonic() < deadline
        ):
            for rank, message in self._news(failures):
                if isinstance(message, Answer | Told):
                    self._hand_out(message)
                else:
                    failures[rank] = message
                    deadline = min(deadline, time.monotonic() + PEER_GRACE_S)
            if self.ended:
                return
        # The one whose own failure it is; failing that, whoever noticed first.
        own = (rank for rank, failure in failures.items() if not (failure and failure.by_peer))
        first = next(own, next(iter(failures)))
        error = self._explain(first, failures[first])
        for rank in self.ranks:
            rank.kill()
        with self.changed:
            self.error = error
            self.changed.notify_all()

    def _news(
        self, failures: dict[Rank, Failure | None]
    ) -> Iterator[tuple[Rank, Answer | Told | Failure | None]]:
        """What ranks have sent, within a tick; None for one that can say nothing any more."""
        waiting = {rank.connection: rank for rank in self.ranks if rank not in failures}
        ready = wait(list(waiting), TICK_S)
        for connection, rank in waiting.items():
            if connection in ready:
                try:
                    yield rank, receive(connection)
                except (EOFError, OSError):
                    yield rank, None
            elif not ready and rank.process is not None and rank.process.poll() is not None:
                yield rank, None  # something that it started holds its end of the connection open

    def _hand_out(self, message: Answer | Told) -> None:
        with self.changed:
            reply = self._replies.get(message.number)
            if reply is None:
                return
            if isinstance(message, Told):
                reply.told.append(message.what)
            else:
                reply.value, reply.done = message.value, True
            self.changed.notify_all()

    def _explain(self, rank: Rank, failure: Failure | None) -> HotloopError:
        n_ranks = len(self.ranks)
        if failure is not None:
            if failure.error is not None:
                return failure.error
            problem = f"failed in {self._phase}: {failure.summary}"
            return RankError(rank.index, n_ranks, problem, _tail(rank.log))
        if rank.process is None:
            return RankError(rank.index, n_ranks, f"is gone, in {self._phase}")
        with suppress(subprocess.TimeoutExpired):
            rank.process.wait(PEER_GRACE_S)
        code = rank.process.poll()
        if code == -signal.SIGKILL and kernel_oom_kills() != self._oom_kills:
            return OutOfMemoryError(self._phase)
        if code is None:
            how = "fell silent"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        return RankError(rank.index, n_ranks, f"{how} in {self._phase}", _tail(rank.log))


def _end(watch: _Watch, thread: threading.Thread, owner: int) -> None:
    """Ends the ranks of a group that nobody uses any more."""
    if os.getpid() != owner:
        return  # a fork of the caller has come to its end, not the caller
    watch.end()
    for rank in watch.ranks:
        rank.release()
    with suppress(RuntimeError):  # where the thread itself collects this garbage
        thread.join()
    for rank in watch.ranks:
        rank.close()


def _tail(log: BinaryIO | None) -> str:
    """The last lines of a rank's log."""
    if log is None:
        return ""
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-LOG_TAIL_LINES:])
