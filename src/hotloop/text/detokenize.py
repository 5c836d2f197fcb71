"""Incremental detokenizing: from token ids to characters, and up to a stop string.

Both classes withhold text that is not final yet. They take linear time: nothing is decoded twice.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hotloop.text.tokenizer import Tokenizer


class Detokenizer:
    """Decodes one sequence token by token.

    The concatenated results are the text by which ``tokenizer.decode(preceding + ids)`` extends
    ``tokenizer.decode(preceding)``. So the space that a SentencePiece vocabulary adds before a text
    is removed only at the beginning of a text, never within one.

    Args:
        tokenizer: The tokenizer.
        preceding: The tokens before the sequence, such as its prompt. They must end with a whole
            character.
        skip_special: Leave out control tokens.
        visible: Control tokens, by their spelling, that are not left out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        preceding: Iterable[int] = (),
        skip_special: bool = True,
        visible: Iterable[str] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        added = tokenizer.backend.added_ids
        self._visible = frozenset(added[text] for text in visible if text in added)
        self._strip_space = tokenizer.strips_leading_space and not any(
            tokenizer.token_bytes(i, skip_special=skip_special)
            for i in preceding
            if i < tokenizer.vocab_size  # a row of the embedding without a token has no text
        )
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Takes the next token; returns the text that is now final, in whole characters.

        Raises:
            RequestError: The token is outside the vocabulary.
        """
        skip = self._skip_special and token_id not in self._visible
        data = self._tokenizer.token_bytes(token_id, skip_special=skip)
        if data and self._strip_space:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Ends the sequence; returns the withheld text, with U+FFFD for an incomplete character."""
        return self._utf8.decode(b"", final=True)


class StopFilter:
    """Passes text up to the first stop string, without any part of the stop string.

    The first stop string is the one that is complete first; of several that are complete at the
    same character, the longest. So the result does not depend on how the text is divided into
    pieces.

    Args:
        stops: The stop strings, none of them empty.

    Attributes:
        matched: The stop string that was found; None until then.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        assert all(self._stops), "a stop string must not be empty"
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Takes more text; returns the text that cannot begin a stop string."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, end, self.matched = min(found)
            self._held = ""
        else:
            end = final_length(text, self._stops)
            self._held = text[end:]
        return text[:end]

    def flush(self) -> str:
        """Ends the text; returns the withheld text, which is not a stop string."""
        held, self._held = self._held, ""
        return held


def final_length(text: str, sought: Sequence[str]) -> int:
    """Returns the length of ``text`` without the longest suffix that begins one of ``sought``.

    More text could complete that suffix. The time depends on the length of the texts sought, not on
    that of ``text``.
    """
    end = len(text)
    for one in sought:
        start = text.find(one[0], max(0, len(text) - len(one) + 1), end)
        while start >= 0:
            if one.startswith(text[start:]):
                end = start
                break
            start = text.find(one[0], start + 1, end)
    return end
