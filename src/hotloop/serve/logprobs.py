"""Log-probabilities in the API's two shapes: ``content`` of chats, four lists of completions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hotloop.text.tokenizer import Tokenizer
from hotloop.types import TokenLogprob

LEAST = -9999.0
"""In place of minus infinity, which JSON does not have; OpenAI's API has it, too."""


def finite(logprob: float) -> float:
    """Returns a log-probability as JSON can hold it."""
    return max(logprob, LEAST)


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    r"""Returns the text of a token; of a part of a character its bytes, as ``bytes:\xe2\x82``."""
    data = tokenizer.token_bytes(token_id, skip_special=False)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob]) -> dict[str, Any]:
    """Returns the ``logprobs`` of a chat's choice."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_text(tokenizer, token_id),
            "logprob": finite(logprob),
            "bytes": list(tokenizer.token_bytes(token_id, skip_special=False)),
        }

    content = [
        entry(each.token_id, each.logprob) | {"top_logprobs": [entry(*top) for top in each.top]}
        for each in logprobs
    ]
    return {"content": content}


class CompletionLogprobs:
    """Makes the ``logprobs`` of a completion's choice, a piece after the other.

    Args:
        tokenizer: The model's.
        offset: Characters before the first token.
    """

    def __init__(self, tokenizer: Tokenizer, offset: int) -> None:
        self._tokenizer, self._offset = tokenizer, offset

    def piece(self, logprobs: Iterable[TokenLogprob]) -> dict[str, Any]:
        """Returns the lists of some tokens."""
        return self.entries((each.token_id, each.logprob, each.top) for each in logprobs)

    def entries(
        self, tokens: Iterable[tuple[int, float | None, Iterable[tuple[int, float]]]]
    ) -> dict[str, Any]:
        """Returns the lists of some tokens: their ids, log-probabilities and alternatives.

        The first token of a prompt has no log-probability.
        """
        lists: dict[str, list[Any]] = {
            name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        for token_id, logprob, top in tokens:
            text = token_text(self._tokenizer, token_id)
            lists["tokens"].append(text)
            lists["text_offset"].append(self._offset)
            self._offset += len(self._tokenizer.decode([token_id], skip_special=False))
            if logprob is None:
                lists["token_logprobs"].append(None)
                lists["top_logprobs"].append(None)
                continue
            lists["token_logprobs"].append(finite(logprob))
            tops = {text: finite(logprob)}
            for other, its in top:
                name = token_text(self._tokenizer, other)
                tops[name] = max(finite(its), tops.get(name, LEAST))
            lists["top_logprobs"].append(tops)
        return lists
