"""Parts of an answer: a parser makes them from a model's text, and a route converts them to JSON.

A ``Parser`` converts the text of the engine's deltas to parts of the API's messages: it separates
content, reasoning and tool calls. The text may be divided anywhere, and the parser withholds text
whose kind is not certain yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """The next text of the message's content."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The next text of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The beginning of a tool call: its index among the message's calls, its id, and its name."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next text of a call's arguments, which are JSON in a string."""

    index: int
    text: str


Part = Content | Reasoning | CallStart | CallArguments


class Parser(Protocol):
    """Divides the text of one answer into parts."""

    def push(self, text: str) -> Sequence[Part]:
        """Takes more text; returns the parts that are certain now."""
        ...

    def end(self) -> Sequence[Part]:
        """Ends the text; returns the parts that were withheld."""
        ...


class PlainText:
    """A parser of answers that are content and nothing else."""

    def push(self, text: str) -> Sequence[Part]:
        """See ``Parser``."""
        return (Content(text),) if text else ()

    def end(self) -> Sequence[Part]:
        """See ``Parser``."""
        return ()
