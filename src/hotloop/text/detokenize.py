"""Text as it arrives: token ids to characters, and characters up to a stop string.

Both classes hold back what is not certain yet and cost time in proportion to what they are fed:
nothing is decoded twice. They know nothing of sampling; the engine asks them what to show.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hotloop.text.tokenizer import Tokenizer


class Detokenizer:
    """Decodes one sequence token by token.

    All it returns, joined, is what ``tokenizer.decode(after + ids)`` adds to
    ``tokenizer.decode(after)``. So the space that a SentencePiece vocabulary puts before a text is
    left out at the beginning of a text alone, never within one.

    Args:
        tokenizer: What the tokens belong to.
        after: The tokens before the sequence, which hold whole characters.
        skip_special: Leave control tokens out.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, after: Iterable[int] = (), skip_special: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strip_space = tokenizer.strips_leading_space and not any(
            tokenizer.token_bytes(i, skip_special=skip_special)
            for i in after
            if i < tokenizer.vocab_size  # a row of the embedding without a token has no text
        )
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Takes the next token; returns the text that is now certain, whole characters only.

        Raises:
            RequestError: The token is outside the vocabulary.
        """
        data = self._tokenizer.token_bytes(token_id, skip_special=self._skip_special)
        if data and self._strip_space:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Ends the sequence; returns what was held back, with U+FFFD for half a character."""
        return self._utf8.decode(b"", final=True)


class StopFilter:
    """Lets text through up to the first stop string, and never any part of that.

    The first stop string is the one that is complete first; of those complete at the same
    character, the longest. So the outcome does not depend on where the pieces of text end.

    Args:
        stops: The stop strings, none of them empty.

    Attributes:
        matched: The stop string that was met; None until then.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        assert all(self._stops), "a stop string must not be empty"
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Takes more text; returns what cannot be the beginning of a stop string."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, end, self.matched = min(found)
            self._held = ""
        else:
            end = self._certain(text)
            self._held = text[end:]
        return text[:end]

    def flush(self) -> str:
        """Ends the text; returns what was held back, which turned out to be no stop string."""
        held, self._held = self._held, ""
        return held

    def _certain(self, text: str) -> int:
        """Where the longest end of ``text`` that begins a stop string begins."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)
