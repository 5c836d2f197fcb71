"""Control tokens spelled in text that must not become them.

A chat template writes control tokens and the text of messages into one string. So that a message
cannot write control tokens too, a mark is set before each one that it spells, before the template
sees it, and the string is encoded by ``Backend.encode_marked``, which takes only what is unmarked
for a control token and drops the marks. The text between marks is untouched, so templates that
trim, split or search a message find what they expect.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

from hotloop.errors import RequestError, shorten_value
from hotloop.outside import MAX_DEPTH

MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
"""Unicode's noncharacters, which no text for interchange holds."""


def any_of(texts: Iterable[str]) -> str:
    """A regular expression that finds the longest of ``texts``; ``(?!)`` finds nothing."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return "|".join(map(re.escape, longest_first)) or "(?!)"


class ControlTokens:
    """The control tokens of a vocabulary, by their spelling."""

    def __init__(self, texts: Iterable[str]) -> None:
        texts = [text for text in texts if text]
        self._anywhere = re.compile(any_of(texts))
        self._starts = re.compile(f"(?={any_of(texts)})")
        self._beginnings = {text[:n] for text in texts for n in range(1, len(text))}
        self._longest = max(map(len, self._beginnings), default=0)

    def spelled_in(self, text: str) -> list[str]:
        """Those that ``text`` spells, each once, in order."""
        return list(dict.fromkeys(self._anywhere.findall(text)))

    def marked(self, value: Any, mark: str) -> Any:
        """A JSON value whose texts have ``mark`` before every control token.

        The beginning of one at a text's end is marked too: the next text can complete it.

        Raises:
            RequestError: The value is none of JSON, or nested more than ``MAX_DEPTH`` levels deep.
        """
        return _with_texts(value, lambda text: self._marked_text(text, mark))

    def _marked_text(self, text: str, mark: str) -> str:
        end = len(text.rstrip())  # templates trim
        places = {match.start() for match in self._starts.finditer(text)}
        places |= {
            start
            for start in range(max(0, end - self._longest), end)
            if text[start:end] in self._beginnings
        }
        edges = [0, *sorted(places), len(text)]
        return mark.join(text[start:stop] for start, stop in pairwise(edges))


def unused_mark(value: Any) -> str:
    """Finds a mark that no text of a JSON value holds.

    Raises:
        RequestError: The texts hold all of them; or the value is none of JSON, or nested too deep.
    """
    used: set[str] = set()

    def look_at(text: str) -> str:
        used.update(character for character in MARKS if character in text)
        return text

    _with_texts(value, look_at)
    for mark in MARKS:
        if mark not in used:
            return mark
    raise RequestError("the messages hold every one of Unicode's noncharacters: leave one out.")


def _with_texts(value: Any, change: Callable[[str], str], levels: int = MAX_DEPTH) -> Any:
    """Copies a JSON value, with ``change`` applied to each of its texts, keys included.

    No other value is let through: its texts would stay as they are.
    """
    if isinstance(value, str):
        return change(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if not isinstance(value, Mapping | list | tuple):
        raise RequestError(
            "messages and template variables must be JSON values (text, numbers, booleans, None, "
            f"lists and dicts), not {shorten_value(value)} of type {type(value).__name__}."
        )
    if levels == 0:
        raise RequestError(
            f"messages and template variables must not be nested more than {MAX_DEPTH} levels deep."
        )
    if isinstance(value, Mapping):
        return {
            change(_checked_key(key)): _with_texts(item, change, levels - 1)
            for key, item in value.items()
        }
    return [_with_texts(item, change, levels - 1) for item in value]


def _checked_key(key: Any) -> str:
    if not isinstance(key, str):
        raise RequestError(
            f"the keys of messages and template variables must be text, not {shorten_value(key)}."
        )
    return key
