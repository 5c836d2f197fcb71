"""Compares greedy answers with the same engine's scores.

The other figures of quality come from scoring, which uses neither drafts nor sampling nor a KV
cache that grows token by token, so a bug in these would not show. Here the timed engine decodes
greedily, and its answers are scored afterwards: every generated token should be the most likely
one, except where two are so close that rounding decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hotloop.bench.record import GreedyFigures
from hotloop.bench.statistics import share_figure
from hotloop.types import Engine, SamplingParams

MAX_PROMPTS = 4
MAX_PROMPT_TOKENS = 64
MAX_NEW_TOKENS = 32


def greedy_agreement(
    engine: Engine,
    windows: Sequence[Sequence[int]],
    on_prompt: Callable[[int, int], None] | None = None,
) -> GreedyFigures | None:
    """Continues the beginnings of some windows greedily, and scores the answers.

    Args:
        engine: The engine, as it is timed.
        windows: The windows of a text.
        on_prompt: Called after each prompt with (prompts done, prompts in all).

    Returns:
        The agreement; None if the windows are too short for a prompt and an answer, or if the
        engine does not return the tokens of its answers, as some servers do not.
    """
    n_prompt = min(MAX_PROMPT_TOKENS, len(windows[0]) // 2)
    n_new = min(MAX_NEW_TOKENS, len(windows[0]) - n_prompt)
    prompts = [list(window[:n_prompt]) for window in windows[:MAX_PROMPTS]]
    if n_prompt < 1:
        return None
    params = SamplingParams(max_new_tokens=n_new, ignore_eos=True)
    # One prompt at a time: an engine that is timed on one row has no more.
    answers = [engine.generate([prompt], params)[0].token_ids for prompt in prompts]
    if not all(answers):
        return None
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    same, trials, gap_max = [], [], 0.0
    for i, score in enumerate(engine.score(texts, full=True)):
        n, log_probs = len(answers[i]), score.log_probs if score.top is None else score.top[1]
        assert log_probs is not None, (
            "the engine returned no whole distributions, which were requested"
        )
        gaps = log_probs[-n:].amax(dim=-1) - score.token_logprobs[-n:]
        gap_max = max(gap_max, gaps.max().item())
        same.append(int((gaps <= 0).sum()))  # any of equally likely tokens may be generated
        trials.append(n)
        if on_prompt:
            on_prompt(i + 1, len(texts))
    return GreedyFigures(
        draft=engine.describe().config.draft_name,
        agreement=share_figure(same, trials),
        gap_max=gap_max,
    )
