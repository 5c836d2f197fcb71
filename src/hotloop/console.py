"""The rich console of hotloop, which interprets no markup and no control sequences of text.

This module imports rich, so import it only where something is printed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from hotloop.printable import printable


class SafeConsole(Console):
    """A console that does not interpret text as markup, and escapes control characters.

    Strings are printed without markup, emoji codes and highlighting unless the call asks for them,
    and all rendered text goes through ``printable``. Control sequences of rich's own, such as
    colours and cursor movements, are unchanged.
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
