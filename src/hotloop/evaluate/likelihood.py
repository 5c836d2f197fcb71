"""Scores continuations of contexts, through the ``Engine`` protocol.

A context and its continuation are tokenized as in lm-eval: together, as one text. The tokens after
as many as the context has by itself are the continuation's. Spaces at the end of the context are
moved to the continuation. A BOS token comes first if the model's own tokenizer puts one before a
text. A continuation without context always gets one, since its first token needs a preceding token;
a model without BOS has its end-of-sequence token there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hotloop.errors import ConfigError, HotloopError, UnsupportedError, shorten_value
from hotloop.types import Engine, Score


@dataclass(frozen=True, kw_only=True)
class Window:
    """Token ids to score together: the last ``n_scored``, each given all earlier tokens."""

    ids: tuple[int, ...]
    n_scored: int

    def __post_init__(self) -> None:
        assert 0 < self.n_scored < len(self.ids), "the first token of a window is not predicted"


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """The score of a continuation.

    Attributes:
        logprob: Natural log-probability of all its tokens together.
        is_greedy: Each of its tokens is the most likely one.
        n_tokens: The number of its tokens.
    """

    logprob: float
    is_greedy: bool
    n_tokens: int


class TextEncoder:
    """Tokenizes for an engine, with BOS if the model expects it.

    Args:
        engine: The engine.
        max_tokens: The most tokens of a window; None for the engine's own limit. Longer windows
            are truncated on the left.

    Attributes:
        n_truncated: The number of windows that were truncated so far.
    """

    def __init__(self, engine: Engine, max_tokens: int | None = None) -> None:
        described = engine.describe()
        self._engine = engine
        bos_id = described.bos_id
        self._begin = [bos_id] if described.adds_bos and bos_id is not None else []
        self._max_tokens = max_tokens or described.max_seq_len
        self.n_truncated = 0
        self._described = described

    @property
    def prefix_id(self) -> int:
        """The token at the beginning of a text without context.

        Raises:
            UnsupportedError: The model has neither BOS nor an end-of-sequence token.
        """
        described = self._described
        if described.bos_id is not None:
            return described.bos_id
        if not described.eos_ids:
            raise UnsupportedError(
                f"the tokenizer of {described.config.model} has neither a BOS nor an "
                "end-of-sequence token, of which one must come before the first token to score."
            )
        return described.eos_ids[0]

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Tokenizes a text, with BOS if it is requested and the model's tokenizer adds it."""
        ids = self._engine.encode(text)
        return [*self._begin, *ids] if add_special else ids

    def encode_pair(self, context: str, continuation: str) -> Window:
        """Tokenizes a continuation after its context, which can be empty.

        Raises:
            ConfigError: The continuation has no tokens.
        """
        if not context:
            ids = self.encode(continuation, add_special=False)
            before, after = [self.prefix_id], ids
            if ids[:1] == before:
                after = ids[1:]
        else:
            kept = context.rstrip()
            continuation, context = context[len(kept) :] + continuation, kept
            whole = self.encode(context + continuation)
            n_before = len(self.encode(context)) if context else len(self._begin)
            before, after = whole[:n_before] or [self.prefix_id], whole[n_before:]
        if not after:
            raise ConfigError(
                f"the continuation {shorten_value(continuation)} adds no token to its context, so "
                "there is nothing to score: leave the item out."
            )
        return self.window(before, after)

    def window(self, before: Sequence[int], after: Sequence[int]) -> Window:
        """Makes a window of tokens to score after context tokens, cut on the left to its limit.

        Raises:
            ConfigError: The tokens to score are more than a window holds.
        """
        if len(after) >= self._max_tokens:
            raise ConfigError(
                f"a continuation of {len(after)} tokens does not fit in the context of "
                f"{self._max_tokens} tokens: raise max_seq_len (--max-seq-len)."
            )
        ids = (*before, *after)
        self.n_truncated += len(ids) > self._max_tokens
        return Window(ids=ids[-self._max_tokens :], n_scored=len(after))


def rolling_windows(ids: Sequence[int], prefix_id: int, size: int) -> list[Window]:
    """Divides a document into windows that score each token once.

    It is the protocol of lm-eval's ``loglikelihood_rolling``: the first window begins with the
    prefix token, and each later window with the last token of the window before; the last window is
    filled up with tokens that were scored already.

    Args:
        ids: The document's tokens.
        prefix_id: The token before the first token.
        size: The most tokens of a window, 2 or more.
    """
    stream = (prefix_id, *ids)
    windows = []
    for first in range(0, len(ids), size - 1):
        end = min(first + size - 1, len(ids))
        window = stream[max(0, end + 1 - size) : end + 1]
        windows.append(Window(ids=window, n_scored=end - first))
    return windows


def score_windows(engine: Engine, windows: Iterable[Window]) -> Iterator[Likelihood]:
    """Scores windows in one call of the engine, which may batch them and share their prefixes.

    Raises:
        HotloopError: A log-probability is infinite or not a number.
    """
    windows = list(windows)
    scores = engine.score((window.ids for window in windows), share_prefixes=True)
    for window, score in zip(windows, scores, strict=True):
        yield _likelihood(window, score)


def _likelihood(window: Window, score: Score) -> Likelihood:
    logprob = score.token_logprobs[-window.n_scored :].double().sum().item()
    if not math.isfinite(logprob):
        raise HotloopError(
            "a log-probability is infinite or not a number: the arithmetic overflowed. Try dtype "
            "float32, or another quantization."
        )
    top1 = score.top1[-window.n_scored :].tolist()
    return Likelihood(
        logprob=logprob,
        is_greedy=top1 == list(window.ids[-window.n_scored :]),
        n_tokens=window.n_scored,
    )
