"""The rich console on which everything of hotloop is printed: text from outside stays text.

Importing this imports rich, so that it is imported where something is about to be printed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from hotloop.printable import printable


class SafeConsole(Console):
    """A console that neither interprets markup in text nor lets the terminal obey it.

    A string is printed without markup, emoji codes and highlighting unless the call asks for them,
    and whatever is rendered goes through ``printable``. Sequences of rich's own, such as colours
    and cursor movements, are not text and are left alone.
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
        """Leaves a BrokenPipeError to ``hotloop.cli.app.main``; rich would end the process."""
        raise
