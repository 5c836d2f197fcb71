"""``main``: runs a command line, and returns the exit code.

Help pages are files, written by ``help_pages`` and kept up to date by a test: building a page takes
a third of a second of imports, and reading a file takes none. Commands are imported when they are
called.

Exit codes: 0 is success, 1 a failure, 2 an invalid command line or input, 130 a stop by Ctrl-C, and
141 an output whose reader has closed it.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hotloop import __version__
from hotloop.cli.interrupts import ctrl_c_after_imports
from hotloop.cli.output import discard_output, open_streams, print_error
from hotloop.errors import (
    CheckpointError,
    ConfigError,
    HotloopError,
    ModelNotFoundError,
    RequestError,
    UnsupportedError,
    shorten,
)

if TYPE_CHECKING:
    from cyclopts import App

COMMANDS = (
    *("generate", "chat", "serve", "bench", "sweep", "eval", "report", "compare"),
    *("pull", "quantize", "info"),
)
"""The commands, in the order of the help page. Each is ``app`` of the module with its name."""

TRACEBACK = "HOTLOOP_TRACEBACK"
"""The environment variable that shows the traceback of an error."""

HELP_FLAGS = ("--help", "-h")

USAGE_ERRORS = (
    CheckpointError,
    ConfigError,
    ModelNotFoundError,
    RequestError,
    UnsupportedError,
)
"""Errors of the command line, or of a file that it names."""


def cyclopts_app() -> App:
    """Makes the cyclopts app of the command line; a command is imported when it is used."""
    from cyclopts import App, Parameter

    app = App(
        name="hotloop",
        help="Fast LLM decoding at batch 1, and the experiment that picks a configuration.",
        version=f"hotloop {__version__}",
        help_flags=HELP_FLAGS,
        help_format="rich",
        help_epilogue="Run hotloop COMMAND --help for the options of a command.",
        default_parameter=Parameter(negative=(), show_default=_shown_default),
        suppress_keyboard_interrupt=False,
        exit_on_error=False,
        print_error=False,
        result_action="return_value",
    )
    for rank, command in enumerate(COMMANDS):
        app.command(f"hotloop.cli.{command}:app", name=command, sort_key=rank)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code.

    An error is printed on stderr, after its traceback if ``TRACEBACK`` is set in the environment.

    Args:
        argv: The arguments after the program's name; None takes the process's own.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not open_streams():
        print_error("standard output is closed: open it, or send it to a file or /dev/null.")
        return 1
    try:
        with ctrl_c_after_imports():
            code = _run(argv)
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        discard_output()
        return 141
    except HotloopError as error:
        return _failed(error, str(error))
    except OSError as error:
        discard_output()
        name = shorten(os.fsdecode(error.filename)) if error.filename else ""
        subject = name or "input or output failed"  # only errors of opening have the file's name
        return _failed(error, f"{subject}: {error.strerror or error}.")
    except MemoryError as error:
        return _failed(error, "this machine has too little memory for this command.")
    except SystemExit:
        raise
    except BaseException as error:  # panics of some libraries are not an Exception
        problem = ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split()))))
        hint = "" if _wants_traceback() else f" with the traceback that {TRACEBACK}=1 prints"
        return _failed(
            error, f"{shorten(problem, 500)}. This is a bug in hotloop: please report it{hint}."
        )
    return code


def _failed(error: BaseException, message: str) -> int:
    """Prints an error, and returns the exit code."""
    if _wants_traceback():
        traceback.print_exception(error)
    print_error(message)
    return 2 if isinstance(error, USAGE_ERRORS) else 1


def _wants_traceback() -> bool:
    return os.environ.get(TRACEBACK, "0") not in ("", "0")


def _run(argv: list[str]) -> int:
    if argv == ["--version"]:
        print(f"hotloop {__version__}")
        return 0
    if (page := help_page(argv)) is not None:
        sys.stdout.write(page.read_text(encoding="utf-8"))
        return 0

    from cyclopts import CycloptsError

    try:
        return cyclopts_app()(argv) or 0
    except CycloptsError as error:
        command = f" {argv[0]}" if argv[0] in COMMANDS else ""
        print_error(f"{shorten(str(error), 1000)}\nTry: hotloop{command} --help")
        return 2


def help_page(argv: Sequence[str]) -> Path | None:
    """Returns the help page that a command line requests; None if it requests none."""
    pages = Path(__file__).parent / "help"
    if not argv or argv[0] in HELP_FLAGS:
        return pages / "hotloop.txt"
    before_delimiter = argv[: argv.index("--")] if "--" in argv else argv
    if argv[0] in COMMANDS and any(flag in before_delimiter for flag in HELP_FLAGS):
        return pages / f"{argv[0]}.txt"
    return None


def _shown_default(value: object) -> object | None:
    """Returns the default that help shows; None for flags that are off and empty lists."""
    return None if value is False or value == () else value
