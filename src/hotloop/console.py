"""The rich console of hotloop, which interprets no markup and no control sequences of text.

This module imports rich, so import it only where something is printed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from hotloop.printable import printable

HEARTBEAT_S = 30.0
"""The longest silence of a long step without a terminal."""


class SafeConsole(Console):
    """A console that does not interpret text as markup, and escapes control characters.

    Strings are printed without markup, emoji codes and highlighting unless the call asks for them,
    and all rendered text goes through ``printable``. Control sequences of rich's own, such as
    colors and cursor movements, are unchanged.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Renders as ``Console.render`` does, with text made printable."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(printable(text), style)

    def on_broken_pipe(self) -> None:
        """Passes a BrokenPipeError on to ``hotloop.cli.app.main``; rich would end the process."""
        raise


class Heartbeat:
    """Repeats the current step in a line whenever nothing was printed for a while.

    A log without lines for minutes looks like a program that hangs. The lines are printed by a
    thread, within the ``with`` block.

    Args:
        say: Prints a line.
        period_s: The longest silence.
    """

    def __init__(self, say: Callable[[str], object], period_s: float = HEARTBEAT_S) -> None:
        self._say, self._period_s = say, period_s
        self._step, self._began = "", time.monotonic()
        self._spoke_at = self._began
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def spoke(self) -> None:
        """Notes that a line was printed."""
        self._spoke_at = time.monotonic()

    def begin(self) -> None:
        """Counts the seconds of the following steps from now."""
        self._began = time.monotonic()

    def step(self, step: str) -> None:
        """Sets the current step, with its progress; empty for none."""
        with self._lock:
            self._step = step

    def _beat(self) -> None:
        while not self._ended.wait(self._period_s / 4):
            with self._lock:
                now = time.monotonic()
                if self._step and now - self._spoke_at >= self._period_s:
                    self._say(f"{self._step}, {now - self._began:.0f} s so far")
                    self.spoke()
