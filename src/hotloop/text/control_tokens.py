"""Keeps the text of messages text, even where it spells a control token such as ``<|im_end|>``.

A chat template writes control tokens and the text of messages into one string. So before the
template runs, a mark is inserted before each control token that a message spells.
``Backend.encode_marked`` then parses only unmarked control tokens, and drops the marks. The text
between marks is unchanged, so that templates can trim, split and search messages as usual.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

from hotloop.errors import RequestError, shorten_value
from hotloop.untrusted import MAX_DEPTH

MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
"""Candidates for the mark: Unicode's noncharacters, which are not meant for interchange."""


def any_of(texts: Iterable[str]) -> str:
    """Returns a regular expression that matches any of ``texts``, and prefers longer ones.

    Without texts it matches nothing.
    """
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return "|".join(map(re.escape, longest_first)) or "(?!)"  # which never matches


class ControlTokens:
    """The control tokens of a vocabulary, by their spelling."""

    def __init__(self, texts: Iterable[str]) -> None:
        texts = [text for text in texts if text]
        self._anywhere = re.compile(any_of(texts))
        self._starts = re.compile(f"(?={any_of(texts)})")
        self._proper_prefixes = {text[:n] for text in texts for n in range(1, len(text))}
        self._longest = max(map(len, self._proper_prefixes), default=0)

    def spelled_in(self, text: str) -> list[str]:
        """Returns the control tokens that ``text`` spells, each once, in order."""
        return list(dict.fromkeys(self._anywhere.findall(text)))

    def marked(self, value: Any, mark: str) -> Any:
        """Copies a JSON value with ``mark`` before every control token in its texts.

        A mark is also inserted where the end of a text is the beginning of a control token, which
        the next text in the prompt could complete.

        Raises:
            RequestError: The value is not JSON, or nested more than ``MAX_DEPTH`` levels deep.
        """
        return _with_texts(value, lambda text: self._marked_text(text, mark))

    def _marked_text(self, text: str, mark: str) -> str:
        end = len(text.rstrip())  # templates trim
        positions = {match.start() for match in self._starts.finditer(text)}
        positions |= {
            start
            for start in range(max(0, end - self._longest), end)
            if text[start:end] in self._proper_prefixes
        }
        edges = [0, *sorted(positions), len(text)]
        return mark.join(text[start:stop] for start, stop in pairwise(edges))


def unused_mark(value: Any) -> str:
    """Finds a mark that does not occur in the texts of a JSON value.

    Raises:
        RequestError: All marks occur in them; or the value is not JSON, or nested too deep.
    """
    used: set[str] = set()

    def note_marks(text: str) -> str:
        if not text.isascii():
            used.update(character for character in MARKS if character in text)
        return text

    _with_texts(value, note_marks)
    for mark in MARKS:
        if mark not in used:
            return mark
    raise RequestError(
        "the messages contain all 32 noncharacters from U+FDD0 to U+FDEF: remove one of them."
    )


def _with_texts(value: Any, change: Callable[[str], str], levels: int = MAX_DEPTH) -> Any:
    """Copies a JSON value, with ``change`` applied to each of its texts, keys included.

    Values of other types are refused, since their texts could not be changed.
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
