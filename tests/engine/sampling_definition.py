"""The definition of SamplingParams, implemented a second time, token by token."""

from collections.abc import Sequence

import numpy as np

from hotloop import SamplingParams


def distribution(
    logits: np.ndarray, params: SamplingParams, seen: list[int], answer: Sequence[int] = ()
) -> np.ndarray:
    """The definition in SamplingParams, in float64, token by token."""
    scores = logits.astype(np.float64).copy()
    for i, bias in params.logit_bias:
        scores[i] += bias
    for i in {*seen, *answer}:
        scores[i] *= 1 / params.repetition_penalty if scores[i] > 0 else params.repetition_penalty
    for i in answer:
        scores[i] -= params.frequency_penalty
    for i in set(answer):
        scores[i] -= params.presence_penalty
    if params.temperature == 0:
        return np.eye(len(scores))[scores.argmax()]
    scores = scores / params.temperature
    best_first = np.argsort(-scores, kind="stable")
    kept = list(best_first[: params.top_k or len(scores)])
    weights = np.exp(scores - scores.max())
    share = {i: weights[i] / weights[kept].sum() for i in kept}
    nucleus, total = [], 0.0
    for i in kept:
        if total >= params.top_p and nucleus:
            break
        nucleus.append(i)
        total += share[i]
    most_likely = share[kept[0]]
    final = [i for i in nucleus if share[i] >= params.min_p * most_likely]
    probabilities = np.zeros(len(scores))
    probabilities[final] = weights[final] / weights[final].sum()
    return probabilities
