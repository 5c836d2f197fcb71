"""Control tokens spelled in text that must not become them.

A chat template writes control tokens and the text of messages into one string. So that a message
cannot write control tokens too, a mark is set before each one that it spells, before the template
sees it, and the string is encoded by ``Backend.encode_marked``, which takes only what is unmarked
for a control token and drops the marks. The text between marks is untouched, so templates that
trim, split or search a message find what they expect.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hotloop.errors import RequestError

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
        """
        if isinstance(value, str):
            return self._marked_text(value, mark)
        if isinstance(value, Mapping):
            return {self.marked(k, mark): self.marked(v, mark) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.marked(item, mark) for item in value]
        return value

    def _marked_text(self, text: str, mark: str) -> str:
        end = len(text.rstrip())  # templates trim
        places = {match.start() for match in self._starts.finditer(text)}
        places |= {
            start
            for start in range(max(0, end - self._longest), end)
            if text[start:end] in self._beginnings
        }
        for place in sorted(places, reverse=True):
            text = f"{text[:place]}{mark}{text[place:]}"
        return text


def unused_mark(value: Any) -> str:
    """A mark that no text of a JSON value holds.

    Raises:
        RequestError: They hold all of them.
    """
    used = {character for text in _texts(value) for character in MARKS if character in text}
    for mark in MARKS:
        if mark not in used:
            return mark
    raise RequestError("the messages hold every one of Unicode's noncharacters: leave one out.")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
