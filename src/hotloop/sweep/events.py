"""Events of a sweep, as they happen.

``run_sweep`` passes these frozen values to its ``on_event``. Events of a cell's own process arrive
through a pipe.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter

from hotloop.bench.record import Record
from hotloop.errors import HotloopError, shorten_value
from hotloop.untrusted import parse_json

Phase = Literal[
    "start", "predict", "load", "speed", "quality", "greedy answers", "tasks", "reference"
]
"""The phase of a cell: starting its process, predicting memory, loading (with compilation and
warm-up), timing, scoring, comparing greedy answers with scores, answering tasks; or, for the
reference, scoring and storing the distributions."""


@dataclass(frozen=True)
class Notice:
    """A message to the user, such as one about an incomplete line; the sweep continues."""

    message: str


@dataclass(frozen=True)
class ReferenceStarted:
    """Scoring of the reference ``cell`` starts."""

    cell: str


@dataclass(frozen=True)
class ReferenceFinished:
    """The reference is stored in a ``folder``, or is missing for a ``reason``.

    It has been scored now, or by an earlier command (``reused``).
    """

    cell: str
    reason: str | None = None
    n_bytes: int = 0
    folder: str = ""
    reused: bool = False


@dataclass(frozen=True)
class CellSkipped:
    """A cell that an earlier run has finished."""

    record: Record


@dataclass(frozen=True)
class CellStarted:
    """Cell number ``index`` of ``total``, counted from 1."""

    cell: str
    index: int
    total: int
    attempt: int = 1


@dataclass(frozen=True)
class CellPhase:
    """A cell, or the reference, entered a phase or made progress in it.

    ``total`` is the number of repeats, windows or items of the phase, 0 in phases without progress;
    ``decode_tok_s`` is the speed of the last repeat.
    """

    cell: str
    phase: Phase
    done: int = 0
    total: int = 0
    decode_tok_s: float | None = None


@dataclass(frozen=True)
class CellSoFar:
    """What is known of a running cell, kept if its process ends without a finished record.

    Its status and reason are those of a cell that has not finished.
    """

    record: Record


@dataclass(frozen=True)
class CellFinished:
    """A cell ended."""

    record: Record


Event = (
    Notice
    | ReferenceStarted
    | ReferenceFinished
    | CellSkipped
    | CellStarted
    | CellPhase
    | CellSoFar
    | CellFinished
)
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Drops the event; an ``on_event`` for callers that need none."""


_FROM_CELL: dict[str, TypeAdapter[Any]] = {
    kind.__name__: TypeAdapter(kind) for kind in (CellPhase, CellSoFar, CellFinished)
}


def to_line(event: Event) -> bytes:
    """Returns an event of a cell's own process as one line of JSON."""
    kind = type(event).__name__
    return json.dumps({kind: _FROM_CELL[kind].dump_python(event, mode="json")}).encode() + b"\n"


def from_line(line: bytes) -> Event:
    """Returns the event that ``to_line`` wrote.

    Raises:
        HotloopError: The line is not an event.
    """
    try:
        ((kind, value),) = parse_json(line, "an event").items()
        return _FROM_CELL[kind].validate_python(value)
    except (ValueError, KeyError) as error:
        raise HotloopError(
            f"its process sent a line that is not an event: {shorten_value(line)}"
        ) from error
