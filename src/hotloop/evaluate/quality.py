"""Measures the quality of an engine's predictions, alone and against the unquantized model.

Perplexity alone is insensitive: windows of text differ far more than a quantization changes any of
them. So the comparison is paired: both models predict the same tokens of the same windows, and the
figure is the difference per window. KL divergence uses the whole distribution, and shows changes
that do not affect the correct token.

All windows are of equal length, so the mean of their means is the mean over all predictions.
Intervals are clustered by article, if the text has enough articles, else by window (see
``bench.statistics``). They hold for more text of the same kind; other kinds of text can give other
results. Sums are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hotloop.bench.record import DepthFigures, Figure
from hotloop.bench.statistics import mean_figure, positive_mean_figure, share_figure
from hotloop.errors import ConfigError, HotloopError
from hotloop.evaluate.perplexity import MAX_NLL, OnWindow, perplexity_of
from hotloop.evaluate.reference import (
    Reference,
    ReferenceKey,
    ReferenceWriter,
    full_log_probs,
    hash_windows,
    row_slices,
    shifted_float16,
)
from hotloop.types import Engine, Score

DEPTHS = (1024, 8192, 32768)
"""Positions that divide long windows into the parts of ``Quality.by_depth``."""

MAX_FLOOR_TOKENS = 512
"""The most tokens at the beginning of a window that are scored twice, for the floor of the KL
divergence; half a window, if that is less."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Quality of an engine's predictions. Samples are windows; logarithms are natural.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per token. Its samples are the windows'
            perplexities, and its mean is their geometric mean. Its standard error is computed by
            the delta method, and its interval is exp of the interval of the mean logarithm.
        delta_ln_ppl: ln perplexity minus the reference's, paired by window; above 0 is worse.
        kl_mean: KL(reference || model) per predicted token, in nats; its interval is computed for
            the logarithm of the mean.
        kl_median: The median of the KL divergence over all predicted tokens.
        kl_p90: Its 90 % quantile.
        kl_p95: Its 95 % quantile.
        kl_p99: Its 99 % quantile.
        kl_p99_9: Its 99.9 % quantile.
        kl_max: The maximum over all predicted tokens.
        kl_at_least: In place of these figures, for an engine that returns only the probabilities of
            the most likely tokens: a lower bound of the mean. All other tokens count as one.
        delta_p: The probability of the text's token minus the reference's, in -1 to 1.
        delta_p_rms: Root mean square of that difference over all predicted tokens.
        same_top1: Same-top-1 rate: the share of positions at which both models have the same most
            likely token.
        kl_floor: The reference's divergence from itself; see ``Reference.floor``.
        by_depth: The same figures by position in the window, if windows are longer than the first
            of ``DEPTHS``.
    """

    perplexity: Figure
    delta_ln_ppl: Figure | None = None
    kl_mean: Figure | None = None
    kl_median: float | None = None
    kl_p90: float | None = None
    kl_p95: float | None = None
    kl_p99: float | None = None
    kl_p99_9: float | None = None
    kl_max: float | None = None
    kl_at_least: Figure | None = None
    delta_p: Figure | None = None
    delta_p_rms: float | None = None
    same_top1: Figure | None = None
    kl_floor: Figure | None = None
    by_depth: tuple[DepthFigures, ...] = ()


def measure_quality(
    engine: Engine,
    windows: Sequence[Sequence[int]],
    *,
    reference: Reference | None = None,
    articles: Sequence[int] | None = None,
    on_window: OnWindow | None = None,
) -> Quality:
    """Scores every window with ``engine``, and compares with ``reference`` if there is one.

    This function keeps only one window's distributions in memory at a time.

    Args:
        engine: The engine, as it was timed.
        windows: Token ids, all of the same length; see ``make_windows``.
        reference: The unquantized model's predictions on the same windows.
        articles: The number of windows in each article, to cluster standard errors by article; None
            clusters them by window.
        on_window: Called after each window.

    Raises:
        ConfigError: There are no windows, their lengths differ, or the reference has other windows.
        HotloopError: The engine's predictions are infinite or not numbers.
    """
    _check_windows(windows)
    if reference is not None and reference.windows_sha256 != hash_windows(windows):
        raise ConfigError(
            "the reference was scored on other tokens: its text, window or tokenizer differs. "
            "Score it "
            "again on these windows."
        )
    nll: list[Tensor] = []
    reference_nll: list[Tensor] = []
    kl: list[Tensor] = []
    same_top1: list[Tensor] = []
    partial = False

    def add(index: int, score: Score) -> None:
        nonlocal partial
        partial |= score.top is not None
        nll.append(-_finite(score.token_logprobs, "log-probabilities", index).cpu())
        if reference is not None:
            reference_nll.append(-reference.token_logprobs[index].double())
            kl.append(_finite(_window_kl(score, reference, index), "divergences", index))
            same_top1.append(score.top1.cpu() == reference.top1[index])
        if on_window:
            on_window(index + 1, len(windows))

    _score_each(engine, windows, add, full=reference is not None)
    figures = _Figures(nll, reference_nll, kl, same_top1, partial, articles)
    whole = figures.between(1, len(windows[0]))
    if reference is None:
        return Quality(**whole, by_depth=figures.by_depth())
    delta_p = (-torch.stack(nll)).exp() - (-torch.stack(reference_nll)).exp()
    return Quality(
        **whole,
        **({} if partial else _quantiles(kl)),
        delta_p=mean_figure(delta_p.mean(dim=1).tolist(), within=(-1, 1), clusters=articles),
        delta_p_rms=delta_p.square().mean().sqrt().item(),
        kl_floor=positive_mean_figure(reference.floor.tolist()),
        by_depth=figures.by_depth(),
    )


@dataclass(frozen=True)
class _Figures:
    """Values of each prediction, a tensor [window - 1] per window.

    Without a reference, all lists but ``nll`` are empty. ``partial`` says that ``kl`` has lower
    bounds.
    """

    nll: list[Tensor]
    reference_nll: list[Tensor]
    kl: list[Tensor]
    same_top1: list[Tensor]
    partial: bool
    articles: Sequence[int] | None

    def between(self, start: int, end: int) -> dict[str, Any]:
        """Returns the figures of predicted positions from ``start`` to before ``end``."""
        part = slice(start - 1, end - 1)
        nll = [window[part].mean().item() for window in self.nll]
        figures: dict[str, Any] = {"perplexity": _perplexity(nll, self.articles)}
        if self.reference_nll:
            reference = [window[part].mean().item() for window in self.reference_nll]
            increase = [mine - theirs for mine, theirs in zip(nll, reference, strict=True)]
            kl = [window[part].mean().item() for window in self.kl]
            same = [int(window[part].sum()) for window in self.same_top1]
            figures |= {
                "delta_ln_ppl": mean_figure(increase, clusters=self.articles),
                "kl_at_least" if self.partial else "kl_mean": positive_mean_figure(
                    kl, clusters=self.articles
                ),
                "same_top1": share_figure(same, [end - start] * len(same), clusters=self.articles),
            }
        return figures

    def by_depth(self) -> tuple[DepthFigures, ...]:
        size = len(self.nll[0]) + 1
        bounds = [1, *(depth for depth in DEPTHS if depth < size), size]
        if len(bounds) == 2:
            return ()
        return tuple(
            DepthFigures(start=start, end=end, **self.between(start, end))
            for start, end in pairwise(bounds)
        )


def write_reference(
    engine: Engine,
    windows: Sequence[Sequence[int]],
    path: Path,
    key: ReferenceKey,
    on_window: OnWindow | None = None,
) -> Reference:
    """Scores every window with the unquantized ``engine``, writes the reference and opens it.

    The beginnings of some windows are scored twice, the second time in shorter windows, whose
    matrix products have other shapes. The divergence between the two is the floor: a smaller
    divergence cannot be distinguished from rounding. ``on_window`` counts these windows too.

    Raises:
        ConfigError: There are no windows, their lengths differ, or they contradict ``key``.
        HotloopError: The disk is too full, or a prediction is infinite or not a number.
    """
    _check_windows(windows)
    n = max(2, min(len(windows[0]) // 2, MAX_FLOOR_TOKENS))
    stored: list[Tensor] = []

    def report(n_done: int) -> None:
        if on_window:
            on_window(n_done, len(windows) + key.n_floor)

    with ReferenceWriter(path, key, windows).open() as writer:

        def add(index: int, score: Score) -> None:
            _finite(score.token_logprobs, "log-probabilities", index)
            writer.add(score)
            if index < key.n_floor:
                stored.append(shifted_float16(full_log_probs(score, key.vocab_size)[: n - 1]).cpu())
            report(index + 1)

        def add_floor(index: int, score: Score) -> None:
            log_q_TV = full_log_probs(score, key.vocab_size)
            kl = kl_divergence(stored[index].float(), log_q_TV.cpu())
            writer.floor.append(_finite(kl, "divergences", index).mean().item())
            report(len(windows) + index + 1)

        _score_each(engine, windows, add, full=True)
        beginnings = [window[:n] for window in windows[: key.n_floor]]
        _score_each(engine, beginnings, add_floor, full=True)
    return Reference(path, key)


def kl_divergence(log_p_TV: Tensor, log_q_TV: Tensor) -> Tensor:
    """Computes KL(p || q) = sum over V of p (ln p - ln q), in nats, float64 [T].

    Rows are normalized here, so each may be shifted by a constant, if exp does not overflow. Terms
    are float32, and their sums float64: with sums in float32, rounding would show as a divergence
    of about 1e-7.

    Args:
        log_p_TV: Log-probabilities of p, float32 [T, V]; minus infinity where p is 0.
        log_q_TV: Log-probabilities of q, float32 [T, V].
    """

    def total(x_TV: Tensor) -> Tensor:
        return x_TV.sum(dim=-1, dtype=torch.float64)

    p_TV = log_p_TV.exp()
    # 0 (ln 0 - ln q) is 0 by continuity; the arithmetic gives NaN.
    terms_TV = torch.where(p_TV > 0, p_TV * (log_p_TV - log_q_TV), 0)
    p_sum, q_sum = total(p_TV), total(log_q_TV.exp())
    return total(terms_TV) / p_sum - p_sum.log() + q_sum.log()


def _score_each(
    engine: Engine,
    windows: Sequence[Sequence[int]],
    consume: Callable[[int, Score], None],
    *,
    full: bool,
) -> None:
    scores = iter(engine.score(windows, full=full))
    for index in range(len(windows)):
        # No variable, zip or enumerate may hold this score while the engine makes the next one:
        # its distributions can be gigabytes.
        consume(index, next(scores))


def _window_kl(score: Score, reference: Reference, index: int) -> Tensor:
    if score.top is not None:
        slices = row_slices(len(score.top1), reference.key.vocab_size)
        return torch.cat([_coarse_kl(score.top, reference, index, rows) for rows in slices])
    log_q_TV = full_log_probs(score, reference.key.vocab_size)
    return torch.cat(
        [
            kl_divergence(reference.log_probs(index, rows).to(log_q_TV.device), log_q_TV[rows])
            for rows in row_slices(*log_q_TV.shape)
        ]
    ).cpu()


def _coarse_kl(top: tuple[Tensor, Tensor], reference: Reference, index: int, rows: slice) -> Tensor:
    """Computes the KL divergence with all tokens except ``top`` merged into one, float64 [rows].

    Merging makes it a lower bound.
    """
    ids_TK, log_q_TK = (part[rows].cpu() for part in top)
    log_p_TV = torch.log_softmax(reference.log_probs(index, rows), dim=-1)
    log_p_TK = log_p_TV.gather(1, ids_TK)
    others_TV = log_p_TV.scatter(1, ids_TK, -math.inf)
    log_p_rest = others_TV.logsumexp(dim=-1)
    q_rest = 1 - log_q_TK.double().exp().sum(dim=-1)
    log_q_rest = q_rest.clamp_min(torch.finfo(torch.float32).eps).log().float()
    return kl_divergence(
        torch.cat((log_p_TK, log_p_rest[:, None]), dim=1),
        torch.cat((log_q_TK.float(), log_q_rest[:, None]), dim=1),
    )


def _quantiles(kl: Sequence[Tensor]) -> dict[str, Any]:
    kl_per_token = torch.cat(list(kl)).numpy()

    def quantile(share: float) -> float:
        return float(np.quantile(kl_per_token, share))

    return {
        "kl_median": quantile(0.5),
        "kl_p90": quantile(0.9),
        "kl_p95": quantile(0.95),
        "kl_p99": quantile(0.99),
        "kl_p99_9": quantile(0.999),
        "kl_max": float(kl_per_token.max()),
    }


def _perplexity(nll: Sequence[float], articles: Sequence[int] | None) -> Figure:
    return perplexity_of(mean_figure(nll, within=(-MAX_NLL, MAX_NLL), clusters=articles))


def _check_windows(windows: Sequence[Sequence[int]]) -> None:
    lengths = {len(window) for window in windows}
    if len(lengths) != 1 or min(lengths) < 2:
        raise ConfigError(
            f"quality needs windows of one length, 2 tokens or more, not {sorted(lengths)}."
        )


def _finite(x: Tensor, what: str, window: int) -> Tensor:
    bad = int((~x.isfinite()).sum())
    if bad:
        raise HotloopError(
            f"{bad} of {x.numel()} {what} in window {window + 1} are infinite or not a number: the "
            "arithmetic overflowed. Try dtype float32, or another quantization."
        )
    return x.double()
