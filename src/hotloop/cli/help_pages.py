"""``python -m hotloop.cli.help_pages``: writes the help pages that ``main`` prints.

The pages are cyclopts' own output, 80 columns wide and without colors. Run this after any change
of a command or an option; a test fails until then.
"""

from __future__ import annotations

import io
from pathlib import Path

from hotloop.cli.app import COMMANDS, cyclopts_app

PAGES = Path(__file__).parent / "help"


def render(command: str | None) -> str:
    """Returns the help page of a command, or of hotloop itself for None."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=80, no_color=True, force_terminal=False)
    app = cyclopts_app()
    for each in COMMANDS:
        app[each]  # imports it: the list of commands shows only those
    app.help_print([command] if command else [], console=console)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def main() -> None:
    """Writes every page."""
    for command in (None, *COMMANDS):
        (PAGES / f"{command or 'hotloop'}.txt").write_text(render(command), encoding="utf-8")


if __name__ == "__main__":
    main()
