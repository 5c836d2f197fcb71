"""Log-probabilities in the API's two forms: ``content`` for chats, four lists for completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hotloop.text.detokenize import Detokenizer
from hotloop.text.tokenizer import Tokenizer
from hotloop.types import Score, TokenLogprob

Lists = dict[str, list[Any]]

MIN_LOGPROB = -9999.0
"""Replaces minus infinity, which JSON does not have, as in OpenAI's API."""


def finite(logprob: float) -> float:
    """Returns a log-probability as a finite number."""
    return max(logprob, MIN_LOGPROB)


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    r"""Returns the text of a token; for a part of a character its bytes, as ``bytes:\xe2\x82``."""
    data = _bytes(tokenizer, token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    if token_id >= tokenizer.vocab_size:  # a row of the embedding without a token
        return b""
    return tokenizer.token_bytes(token_id, skip_special=False)


def chat_logprobs(tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob]) -> dict[str, Any]:
    """Returns the ``logprobs`` of a chat's choice."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_text(tokenizer, token_id),
            "logprob": finite(logprob),
            "bytes": list(_bytes(tokenizer, token_id)),
        }

    content = [
        entry(each.token_id, each.logprob) | {"top_logprobs": [entry(*top) for top in each.top]}
        for each in logprobs
    ]
    return {"content": content}


ScoredToken = tuple[int, float | None, Sequence[tuple[int, float]]]
"""A token's id, its log-probability (None for the first of a prompt) and alternatives."""


def scored_prompt(ids: Sequence[int], score: Score | None, n: int) -> list[ScoredToken]:
    """Returns the tokens of a prompt with their log-probabilities.

    Args:
        ids: The prompt.
        score: Its score, with ``n`` most likely tokens if ``n`` is above 1; None for a prompt of
            one token.
        n: Alternatives of each token.
    """
    scored: list[ScoredToken] = [(ids[0], None, ())]
    if score is None:
        return scored
    logprobs = score.token_logprobs.tolist()
    if score.top is not None:
        tokens, values = (each.tolist() for each in score.top)
    else:
        assert score.top1_logprobs is not None, "hotloop's engine has them"
        values = [[value] for value in score.top1_logprobs.tolist()]
        tokens = [[token] for token in score.top1.tolist()]
    for i, token_id in enumerate(ids[1:]):
        scored.append((token_id, logprobs[i], list(zip(tokens[i], values[i], strict=True))[:n]))
    return scored


class CompletionLogprobs:
    """Makes the ``logprobs`` of a completion's choice, for its prompt and its answer's pieces.

    ``text_offset`` counts the characters before a token from the prompt's beginning.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._text = Detokenizer(tokenizer)
        self._offset = 0

    def of_prompt(self, ids: Sequence[int], scored: Sequence[ScoredToken]) -> Lists | None:
        """Returns the lists of a prompt's tokens; None if they were not requested."""
        if scored:
            return self._lists(scored)
        for token_id in ids:
            self._advance(token_id)
        return None

    def of_answer(self, logprobs: Iterable[TokenLogprob]) -> Lists:
        """Returns the lists of an answer's next tokens."""
        return self._lists((each.token_id, each.logprob, each.top) for each in logprobs)

    def _lists(self, tokens: Iterable[ScoredToken]) -> Lists:
        lists: Lists = {
            name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        for token_id, logprob, top in tokens:
            text = token_text(self._tokenizer, token_id)
            lists["tokens"].append(text)
            lists["text_offset"].append(self._offset)
            self._advance(token_id)
            lists["token_logprobs"].append(None if logprob is None else finite(logprob))
            lists["top_logprobs"].append(
                None if logprob is None else self._tops(text, logprob, top)
            )
        return lists

    def _tops(
        self, text: str, logprob: float, top: Iterable[tuple[int, float]]
    ) -> dict[str, float]:
        """Returns alternatives by their text; for equal texts, the most likely one."""
        tops: dict[str, float] = {}
        for token_id, value in top:
            name = token_text(self._tokenizer, token_id)
            tops[name] = max(finite(value), tops.get(name, MIN_LOGPROB))
        tops.setdefault(text, finite(logprob))
        return tops

    def _advance(self, token_id: int) -> None:
        if token_id < self._tokenizer.vocab_size:  # a row of the embedding may have no token
            self._offset += len(self._text.push(token_id))
