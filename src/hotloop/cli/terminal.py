"""Reads terminal input of a conversation: lines, Ctrl-C, and typing during an answer."""

from __future__ import annotations

import os
import signal
import sys
import termios
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext

from hotloop.errors import RequestError

ReadLine = Callable[[str], str]
"""A function that returns the next line, given the prompt to show; raises EOFError at the end."""

_PASTES_MARKED, _PASTES_PLAIN = "\033[?2004h", "\033[?2004l"


class CtrlC:
    """Handles Ctrl-C within the ``with`` block.

    At the prompt it raises KeyboardInterrupt. While an answer is generated it sets a flag, which
    ``relay`` reads between tokens, so that a step of the engine is not interrupted; if Ctrl-C is
    pressed twice, because no token arrives, it raises KeyboardInterrupt. At other times it does
    nothing.
    """

    def __init__(self) -> None:
        self._pressed = threading.Event()
        self._reading = self._answering = False

    def __enter__(self) -> CtrlC:
        self._before = signal.signal(signal.SIGINT, self._on_sigint)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_sigint(self, _signum: int, _frame: object) -> None:
        if self._reading or (self._answering and self._pressed.is_set()):
            raise KeyboardInterrupt
        self._pressed.set()

    def while_reading(self, read_line: ReadLine) -> ReadLine:
        """Wraps a function that reads a line: Ctrl-C raises KeyboardInterrupt in it."""

        def read(prompt: str) -> str:
            self._reading = True
            try:
                return read_line(prompt)
            finally:
                self._reading = False
                self._pressed.clear()

        return read

    @contextmanager
    def while_answering(self) -> Generator[Callable[[], bool]]:
        """Yields a function that returns whether Ctrl-C was pressed since a line was last read."""
        self._answering = True
        try:
            yield self._pressed.is_set
        finally:
            self._answering = False


@contextmanager
def line_reader() -> Generator[ReadLine]:
    """Yields the function that reads a line, with line editing in a terminal.

    In a terminal, pasted text of several lines counts as one line, and typing during an answer is
    not shown before the next prompt.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield _read_plain_line
        return
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession()
    pastes = os.environ.get("TERM", "dumb") != "dumb"

    def read_line(prompt: str) -> str:
        try:
            return session.prompt(prompt, enable_suspend=True)
        finally:
            _write_if(pastes, _PASTES_MARKED)  # for pastes during the answer, too

    with _typing_hidden():
        try:
            yield read_line
        finally:
            _write_if(pastes, _PASTES_PLAIN)


def _read_plain_line(prompt: str) -> str:
    if sys.stdin.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
    # Bytes, since a text stream decodes large blocks: an invalid byte would lose earlier lines.
    source, encoding = getattr(sys.stdin, "buffer", sys.stdin), sys.stdin.encoding or "utf-8"
    line = source.readline()
    try:
        line = line if isinstance(line, str) else line.decode(encoding)
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not text in {encoding}: {error}.") from error
    if not line:
        raise EOFError
    return line.removesuffix("\n").removesuffix("\r")


@contextmanager
def _typing_hidden() -> Generator[None]:
    """Hides typing, which the terminal keeps for the next prompt."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    hidden = [*before]
    hidden[3] &= ~(termios.ECHO | termios.ICANON)
    try:
        termios.tcsetattr(descriptor, termios.TCSANOW, hidden)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)


def _write_if(condition: bool, text: str) -> None:
    if condition:
        sys.stdout.write(text)
        sys.stdout.flush()


NO_CTRL_C = nullcontext(lambda: False)
"""Replaces ``CtrlC.while_answering`` if Ctrl-C should end the program."""
