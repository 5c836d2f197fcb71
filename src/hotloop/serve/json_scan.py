"""``JsonScanner``: finds the end of a JSON value in text that arrives in parts.

It follows the grammar and stores only the open brackets, so that the arguments of tool calls can be
sent on while they arrive. It does not build the value; ``json.loads`` does.
"""

from __future__ import annotations

import re
from typing import Literal

from hotloop.untrusted import MAX_DEPTH, MAX_NUMBER_CHARS

SPACE = " \t\n\r"
"""Whitespace between the tokens of JSON."""

_IN_STRING = re.compile(r'[^"\\\x00-\x1f]*')
_IN_WORD = re.compile(r"[0-9A-Za-z+.-]*", re.ASCII)
_WORD_CHARACTER = re.compile(r"[0-9A-Za-z+.-]", re.ASCII)
_WORD = re.compile(r"true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?", re.ASCII)
_ESCAPED = frozenset('"\\/bfnrtu')
_HEX = frozenset("0123456789abcdefABCDEF")
_CLOSES = {"{": "}", "[": "]"}

_Expected = Literal["value", "value or ]", "key", "key or }", ":", ", or end", "string", "word"]


class JsonScanner:
    """Scans one JSON value, to find its end.

    Attributes:
        state: ``open`` until the value is complete (``done``), or cannot become one (``broken``). A
            number is complete at the character after it.
    """

    def __init__(self) -> None:
        self.state: Literal["open", "done", "broken"] = "open"
        self._expected: _Expected = "value"
        self._stack: list[str] = []  # open brackets
        self._is_key = False
        self._escape = ""  # the open escape sequence of a string
        self._word = ""

    def push(self, text: str) -> int:
        """Takes more text; returns how many of its characters belong to the value.

        The remaining characters are not read: they follow the value, or the first of them makes it
        invalid.
        """
        at = 0
        while at < len(text) and self.state == "open":
            if self._expected == "string":
                at = self._in_string(text, at)
            elif self._expected == "word":
                at = self._in_word(text, at)
            elif text[at] in SPACE:
                at += 1
            elif self._expected in ("value", "value or ]") and _WORD_CHARACTER.match(text, at):
                self._word, self._expected = "", "word"
            elif self._structure(text[at]):
                at += 1
            else:
                self.state = "broken"
        return at

    def _in_string(self, text: str, at: int) -> int:
        if not self._escape:
            match = _IN_STRING.match(text, at)
            assert match is not None, "the pattern matches nothing, too"
            at = match.end()
            if at == len(text):
                return at
        if not self._take(text[at]):
            self.state = "broken"
            return at
        return at + 1

    def _take(self, character: str) -> bool:
        """Takes a character that ends a string or belongs to an escape sequence in it."""
        if self._escape:
            is_hex = self._escape != "\\"
            if character not in (_HEX if is_hex else _ESCAPED):
                return False
            self._escape += character
            if self._escape[1] != "u" or len(self._escape) == len("\\u0000"):
                self._escape = ""
        elif character == "\\":
            self._escape = character
        elif character == '"' and self._is_key:
            self._expected = ":"
        elif character == '"':
            self._end_value()
        else:
            return False
        return True

    def _in_word(self, text: str, at: int) -> int:
        match = _IN_WORD.match(text, at)
        assert match is not None, "the pattern matches nothing, too"
        self._word += match[0]
        if len(self._word) > MAX_NUMBER_CHARS:
            self.state = "broken"
        elif match.end() < len(text):
            if _WORD.fullmatch(self._word):
                self._end_value()
            else:
                self.state = "broken"
        return match.end()

    def _structure(self, character: str) -> bool:
        """Takes a character outside strings and words; returns False if it is not allowed there."""
        expected = self._expected
        if character == '"' and expected not in (":", ", or end"):
            self._is_key = expected in ("key", "key or }")
            self._expected = "string"
        elif expected == ":" and character == ":":
            self._expected = "value"
        elif expected == ", or end" and character == ",":
            self._expected = "key" if self._stack[-1] == "{" else "value"
        elif character in "}]" and expected in (", or end", f"key or {character}", "value or ]"):
            if _CLOSES[self._stack[-1]] != character:
                return False
            self._stack.pop()
            self._end_value()
        elif character in _CLOSES and expected in ("value", "value or ]"):
            self._stack.append(character)
            self._expected = "key or }" if character == "{" else "value or ]"
            return len(self._stack) <= MAX_DEPTH
        else:
            return False
        return True

    def _end_value(self) -> None:
        if self._stack:
            self._expected = ", or end"
        else:
            self.state = "done"
