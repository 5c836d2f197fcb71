"""Malformed input, as a table of cases: every one is refused by name, or rightly accepted.

A case breaks one thing. What it must not do is the same for all: raise anything but a
``HotloopError``, hang, take much memory, or put into the error's text what a terminal would obey.
"""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import pytest

from hotloop.errors import HotloopError

TIME_LIMIT_S = 300.0
"""For what hangs: generous, since the machine may be busy."""

MEMORY_LIMIT_KIB = 512 * 1024
"""More than this, taken for one refusal, is a size that was believed before it was checked."""

MESSAGE_LIMIT = 2_000
"""Characters of an error's text: a value of a megabyte is not repeated in full."""


@dataclass(frozen=True)
class Case:
    """One malformed input.

    Attributes:
        name: The test's id.
        run: Makes the input in an empty folder and gives it to hotloop.
        names: Texts that the error must hold: the file, and the key, value, tensor or option.
            None where the input is odd and yet rightly accepted.
    """

    name: str
    run: Callable[[Path], object]
    names: tuple[str, ...] | None


def parametrize(cases: list[Case]) -> pytest.MarkDecorator:
    """A test that is run for each case, as its argument ``case``."""
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def check(case: Case, folder: Path) -> None:
    """Runs a case in a folder of its own and asserts that it ends as it must."""
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with _time_limit(case.name):
        if case.names is None:
            case.run(folder)
            return
        with pytest.raises(HotloopError) as raised:
            case.run(folder)
    message = str(raised.value)
    for name in case.names:
        assert name in message, f"the error does not name {name!r}: {message}"
    assert len(message) <= MESSAGE_LIMIT, f"{len(message)} characters: {message[:200]}"
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert grown_kib <= MEMORY_LIMIT_KIB, f"took {grown_kib / 1024:.0f} MiB to refuse"


class _TookTooLongError(BaseException):
    """Not an Exception: nothing under test may take it for its own."""


@contextlib.contextmanager
def _time_limit(name: str) -> Iterator[None]:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise _TookTooLongError(f"{name} took more than {TIME_LIMIT_S:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
