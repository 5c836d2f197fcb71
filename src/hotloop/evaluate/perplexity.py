"""Perplexity by the protocols of other tools, to compare with their figures.

``gptq``, the protocol of all paired figures, is in ``quality``. The others:

- ``llama.cpp`` (its ``llama-perplexity``): windows without overlap, each with BOS at the beginning
  if the tokenizer adds one; only predictions in the second half of a window count.
- ``lm-eval`` (its ``wikitext`` and other ``loglikelihood_rolling`` tasks): every token of a
  document counts once, the first after a prefix token. There are two figures, per word (divided at
  white space) and per byte, so that tokenizers can be compared.

A figure is exp of the mean negative log-likelihood, and its interval is clustered by window.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from hotloop.bench.record import MAX_NUMBER, Figure
from hotloop.bench.statistics import clustered_mean_figure
from hotloop.errors import HotloopError
from hotloop.evaluate.likelihood import TextEncoder, Window, rolling_windows, score_windows
from hotloop.evaluate.windows import take_document, take_windows
from hotloop.types import Engine

Protocol = Literal["gptq", "llama.cpp", "lm-eval"]

PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)

MAX_NLL = math.floor(math.log(MAX_NUMBER))

OnWindow = Callable[[int, int], None]
"""Called after each window with (windows done, windows in all)."""


def perplexities(
    engine: Engine,
    text: str,
    protocols: Sequence[Protocol],
    *,
    size: int,
    limit: int,
    on_window: OnWindow | None = None,
) -> dict[str, Figure]:
    """Measures perplexity by each protocol except ``gptq``.

    Args:
        engine: The engine.
        text: The text; as many tokens as fill the windows are taken from its beginning.
        protocols: The protocols.
        size: Tokens of a window.
        limit: The most windows.
        on_window: Called after each window.

    Returns:
        ``llama.cpp``, ``lm-eval word`` and ``lm-eval byte``, as far as they were requested.
    """
    figures: dict[str, Figure] = {}
    encoder = TextEncoder(engine, size)
    if "llama.cpp" in protocols:
        windows = _second_halves(encoder, text, size, limit)
        figures["llama.cpp"] = _perplexity(*_nll(engine, windows, on_window))
    if "lm-eval" in protocols:
        document, ids = take_document(encoder.encode, text, (size - 1) * limit)
        windows = rolling_windows(ids, encoder.prefix_id, size)
        sums, sizes = _nll(engine, windows, on_window)
        units = {"word": len(re.split(r"\s+", document)), "byte": len(document.encode())}
        for unit, n in units.items():
            figures[f"lm-eval {unit}"] = _perplexity(sums, sizes, per=len(ids) / n)
    return figures


def perplexity_of(nll: Figure) -> Figure:
    """Returns the exponential of a mean negative log-likelihood.

    The standard error is computed by the delta method; exp is applied to the interval and the
    samples.

    Raises:
        HotloopError: A perplexity exceeds the largest number of a record.
    """
    if (worst := max(nll.samples)) > MAX_NLL:
        raise HotloopError(
            f"the perplexity of a window is exp({worst:.0f}): the predictions are broken. Try "
            "dtype float32, or another quantization."
        )
    perplexity = math.exp(nll.mean)
    return Figure(
        mean=perplexity,
        ci95=None if nll.ci95 is None else (math.exp(nll.ci95[0]), math.exp(nll.ci95[1])),
        se=None if nll.se is None else min(perplexity * nll.se, MAX_NUMBER),
        n=nll.n,
        samples=tuple(map(math.exp, nll.samples)),
    )


def _second_halves(encoder: TextEncoder, text: str, size: int, limit: int) -> list[Window]:
    begin = encoder.encode("")
    return [
        Window(ids=(*begin, *window[len(begin) :]), n_scored=size - 1 - size // 2)
        for window in take_windows(encoder.encode, text, size, limit)
    ]


def _nll(
    engine: Engine, windows: Sequence[Window], on_window: OnWindow | None
) -> tuple[list[float], list[int]]:
    """Returns each window's sum of negative log-likelihoods, and number of scored tokens."""
    sums = []
    for i, score in enumerate(score_windows(engine, windows), start=1):
        sums.append(-score.logprob)
        if on_window:
            on_window(i, len(windows))
    return sums, [window.n_scored for window in windows]


def _perplexity(sums: Sequence[float], sizes: Sequence[int], *, per: float = 1.0) -> Figure:
    """Returns the perplexity per token, or per unit, with ``1 / per`` units per token."""
    scaled = [nll * per for nll in sums]
    return perplexity_of(clustered_mean_figure(scaled, sizes, within=(-MAX_NLL, MAX_NLL)))
