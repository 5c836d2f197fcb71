"""Messages between the caller's process and its ranks, and the rank's end of the connection.

Commands are numbered values of any type, and reach every rank in the same order. A rank answers
some of them, by their number, and reports progress and failure. One thread receives and one thread
sends. So a rank can start the next command while its device still computes the last answer, and it
detects at any time, even while it waits for its peers, that the caller is gone. It then ends
itself.
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
"""Sent in place of a command to end the rank."""


class PeerError(RuntimeError):
    """A collective failed, most likely because another rank has failed."""


NumberedCommand = tuple[int, Any]
"""A number, and the value that is the command."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A command's result."""

    number: int
    value: Any


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a command."""

    number: int
    arguments: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The failure of a rank.

    Attributes:
        error: The exception, if it is one of hotloop's errors.
        summary: The exception in one line.
        by_peer: The cause is the end of another rank.
    """

    error: HotloopError | None
    summary: str
    by_peer: bool

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Describes an exception."""
        return cls(
            error=error if isinstance(error, HotloopError) else None,
            summary="".join(traceback.format_exception_only(error)).strip(),
            by_peer=isinstance(error, PeerError),
        )


Message = Answer | Progress | Failure


def send(connection: Connection, message: Any) -> None:
    """Sends a message by plain pickle: ``Connection.send`` would put tensors in shared memory."""
    connection.send_bytes(pickle.dumps(message))


def receive(connection: Connection) -> Any:
    """Receives a message of ``send``; raises EOFError or OSError if the other end is gone."""
    return pickle.loads(connection.recv_bytes())


class Caller:
    """A rank's connection to the caller."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._commands: queue.SimpleQueue[NumberedCommand | None] = queue.SimpleQueue()
        self._outgoing: queue.SimpleQueue[Callable[[], Message]] = queue.SimpleQueue()
        for work in (self._receive, self._send):
            threading.Thread(target=work, daemon=True).start()

    def commands(self) -> Iterator[NumberedCommand]:
        """Yields commands, in order, until the last."""
        while (command := self._commands.get()) is not LAST:
            yield command

    def answer(self, number: int, value: Callable[[], Any]) -> None:
        """Sends a command's result, which the sending thread gets from ``value``."""
        self._outgoing.put(lambda: Answer(number=number, value=value()))

    def report(self, number: int, *arguments: Any) -> None:
        """Reports progress of a command."""
        self._outgoing.put(lambda: Progress(number=number, arguments=arguments))

    def fail(self, error: BaseException) -> None:
        """Reports an exception, and ends the process."""
        traceback.print_exception(error)  # for the log, which may be all that remains
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
    """Ends this process at once and, if it leads a process group, the whole group."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
