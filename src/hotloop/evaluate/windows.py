"""Cuts a tokenized text into the windows that are scored."""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence

from hotloop.errors import ConfigError

ENOUGH_ARTICLES = 20
"""The fewest articles to cluster by: with fewer clusters, a standard error is imprecise."""

_CHARS_PER_TOKEN = 8
"""A first guess of the characters of a token; if it is too low, more of the text is tokenized."""

_SPARE_TOKENS = 256
"""Tokens before a cut of the text that are not used, since the cut may have changed them."""

_LEAD_CHARS = 256
"""Characters before an article that are tokenized together with it."""


def take_windows(
    encode: Callable[[str], list[int]], text: str, size: int, limit: int | None = None
) -> list[list[int]]:
    """Returns the windows of a text, and tokenizes no more of it than they need.

    A cut of the text changes only tokens near the cut, and the last ``_SPARE_TOKENS`` before it are
    not used. So the windows equal those of the whole text.

    Args:
        encode: Tokenizes a text.
        text: The text.
        size: See ``make_windows``.
        limit: See ``make_windows``.

    Raises:
        ConfigError: As for ``make_windows``.
    """
    if limit is not None:
        needed = size * limit + _SPARE_TOKENS
        n_chars = needed * _CHARS_PER_TOKEN
        while n_chars < len(text):
            if len(ids := encode(text[:n_chars])) >= needed:
                return make_windows(ids, size, limit)
            n_chars *= 2
    return make_windows(encode(text), size, limit)


def take_document(
    encode: Callable[[str], list[int]], text: str, n_tokens: int
) -> tuple[str, list[int]]:
    """Returns the beginning of a text, cut at white space to ``n_tokens``, and its tokens.

    Args:
        encode: Tokenizes a text.
        text: The text.
        n_tokens: The most tokens to take.
    """
    n_chars = min(len(text), n_tokens * _CHARS_PER_TOKEN)
    document = text[:n_chars]
    while len(ids := encode(document)) > n_tokens:
        n_chars = n_chars * n_tokens // len(ids)
        kept = re.match(r"(?s).*(?<=\S)(?=\s)", text[: n_chars + 1])
        document = kept[0] if kept else text[:n_chars]
        n_chars = len(document) - 1  # shorter next time, whatever the tokenizer does
    return document, ids


def make_windows(ids: Sequence[int], size: int, limit: int | None = None) -> list[list[int]]:
    """Cuts windows of equal length from the beginning of a text, without overlap.

    It is the protocol of GPTQ (Frantar et al. 2022): the text is tokenized as a whole and cut every
    ``size`` tokens, and the incomplete last window is dropped. No token is added at the beginning;
    each window is scored by itself, and so has ``size - 1`` predictions.

    Args:
        ids: The whole text's tokens.
        size: Tokens in a window, 2 or more.
        limit: The most windows to take; None takes all.

    Raises:
        ConfigError: ``size`` or ``limit`` is out of range, or the text is shorter than one window.
    """
    if size < 2:
        raise ConfigError(f"a window must hold at least 2 tokens, not {size}.")
    if limit is not None and limit < 1:
        raise ConfigError(f"the number of windows must be at least 1, not {limit}.")
    n_windows = len(ids) // size
    if n_windows == 0:
        raise ConfigError(
            f"the text has {len(ids)} tokens, fewer than a window of {size}. "
            "Use a longer text or a smaller window."
        )
    n_windows = n_windows if limit is None else min(n_windows, limit)
    return [list(ids[i * size : (i + 1) * size]) for i in range(n_windows)]


def windows_per_article(
    encode: Callable[[str], list[int]], text: str, starts: Sequence[int], size: int, n_windows: int
) -> tuple[int, ...] | None:
    """Counts the windows of each article, in the order of the text.

    A window belongs to the article that contains its middle. Each article is tokenized together
    with the ``_LEAD_CHARS`` characters before it, and the number of tokens of these characters
    alone is subtracted. So the end of an article is wrong by about a token at most: the error of
    each cut is subtracted again with the next article, and errors do not accumulate.

    Args:
        encode: Tokenizes a text.
        text: The text.
        starts: The offsets in characters at which its articles begin.
        size: Tokens of a window.
        n_windows: The number of windows, from the beginning of the text.

    Returns:
        The number of windows of each article; None if the windows are of fewer articles than
        ``ENOUGH_ARTICLES``.
    """
    if len(starts) < ENOUGH_ARTICLES:
        return None
    ends, needed = [len(encode(text[: starts[0]]))], n_windows * size
    for start, end in itertools.pairwise((*starts, len(text))):
        if ends[-1] >= needed:
            break
        before = max(0, start - _LEAD_CHARS)
        n_tokens = len(encode(text[before:end])) - len(encode(text[before:start]))
        ends.append(ends[-1] + n_tokens)
    last = len(ends) - 1
    middles = (i * size + size // 2 for i in range(n_windows))
    articles = itertools.groupby(min(bisect_right(ends, middle), last) for middle in middles)
    counts = tuple(len(list(windows)) for _, windows in articles)
    return counts if len(counts) >= ENOUGH_ARTICLES else None
