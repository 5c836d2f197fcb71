"""The messages between the caller's process and its ranks, and the rank's end of the connection.

Commands are numbered values of any type; they reach every rank in the same order. A rank answers
some of them, by their number, and tells of its progress and of its end. A thread receives and a
thread sends, so that a rank can start the next command while the last one's answer is still being
computed on its device; and so that it notices at any time, even while it waits for its peers, that
the caller is gone. It then ends itself.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from hotloop.errors import HotloopError

LAST = None
"""Sent in place of a command, after which no other comes: the rank ends."""


class PeerError(RuntimeError):
    """A collective failed: most likely because another rank is gone, whose own error says more."""


Command = tuple[int, Any]
"""A number, and the value that is the command."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A command's result."""

    number: int
    value: Any


@dataclass(frozen=True, kw_only=True)
class Told:
    """Progress, for whoever waits for a command's result."""

    number: int
    what: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The last words of a rank.

    Attributes:
        error: What it raised, if that is one of hotloop's errors.
        summary: The exception in one line.
        by_peer: It only met another rank's end.
    """

    error: HotloopError | None
    summary: str
    by_peer: bool

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """What there is to say of an exception."""
        return cls(
            error=error if isinstance(error, HotloopError) else None,
            summary="".join(traceback.format_exception_only(error)).strip(),
            by_peer=isinstance(error, PeerError),
        )


Message = Answer | Told | Failure


def send(connection: Connection, message: Any) -> None:
    """Sends by plain pickling: the connection's own would put tensors into shared memory."""
    connection.send_bytes(pickle.dumps(message))


def receive(connection: Connection) -> Any:
    """Receives what ``send`` sent; EOFError or OSError when the other end is gone."""
    return pickle.loads(connection.recv_bytes())


class Caller:
    """The caller, as a rank sees it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._outgoing: queue.SimpleQueue[Callable[[], Message]] = queue.SimpleQueue()
        for work in (self._receive, self._send):
            threading.Thread(target=work, daemon=True).start()

    def commands(self) -> Iterator[Command]:
        """What is to be done, in order, until there is nothing more."""
        while (command := self._commands.get()) is not LAST:
            yield command

    def answer(self, number: int, value: Callable[[], Any]) -> None:
        """Sends a command's result, which ``value`` gives in time, in another thread."""
        self._outgoing.put(lambda: Answer(number=number, value=value()))

    def tell(self, number: int, *what: Any) -> None:
        """Tells of progress with a command."""
        self._outgoing.put(lambda: Told(number=number, what=what))

    def fail(self, error: BaseException) -> None:
        """Reports an exception, and ends the process."""
        traceback.print_exception(error)  # the log may be all that is left
        self._outgoing.put(lambda: Failure.of(error))
        threading.Event().wait()  # the sender ends the process

    def _receive(self) -> None:
        while True:
            try:
                command = receive(self._connection)
            except (EOFError, OSError):
                end_group()
            self._commands.put(command)
            if command is LAST:  # the other end may go
                return

    def _send(self) -> None:
        while True:
            try:
                message = self._outgoing.get()()
            except BaseException as error:
                traceback.print_exception(error)
                message = Failure.of(error)
            try:
                send(self._connection, message)
            except OSError:
                end_group()
            if isinstance(message, Failure):
                sys.stderr.flush()
                end_group()


def end_group() -> NoReturn:
    """Ends this process and, where it leads a group, what it started, whatever they wait for."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
