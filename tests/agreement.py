"""How answers of engines that round differently are compared."""

from collections.abc import Sequence

from hotloop import Generation
from hotloop.types import TokenLogprob

ALTERNATIVES = 5
"""Log-probabilities that are asked for."""

TIE = 0.03
"""Difference of log-probabilities that rounding to bfloat16 explains in models this small."""


def assert_top_two_agree(
    ours: Sequence[Generation], theirs: Sequence[Generation], tie: float = TIE
) -> None:
    """At the first token that differs, each side's is among the other's two likeliest.

    What ties with the second likeliest counts: random models have it often.

    Args:
        ours: Answers with log-probabilities of ``ALTERNATIVES``.
        theirs: Another engine's answers to the same prompts.
        tie: The largest difference of log-probabilities that is none.
    """
    for mine, its in zip(ours, theirs, strict=True):
        for here, there in zip(mine.logprobs, its.logprobs, strict=True):
            if here.token_id != there.token_id:
                assert_likely(here.token_id, there, tie)
                assert_likely(there.token_id, here, tie)
                break


def assert_likely(token_id: int, among: TokenLogprob, tie: float) -> None:
    _, (_, second), *_ = among.top
    likely = {other for other, logprob in among.top if logprob >= second - tie}
    assert token_id in likely, f"{token_id} is not among the likeliest of {among.top}"
