"""How answers of engines that round differently are compared."""

from collections.abc import Sequence

from hotloop import Generation


def assert_top_two_agree(ours: Sequence[Generation], theirs: Sequence[Generation]) -> None:
    """At the first token that differs, each side's is among the other's two likeliest.

    Args:
        ours: Answers with log-probabilities, of two alternatives at least.
        theirs: Another engine's answers to the same prompts.
    """
    for mine, its in zip(ours, theirs, strict=True):
        for here, there in zip(mine.logprobs, its.logprobs, strict=True):
            if here.token_id != there.token_id:
                assert here.token_id in dict(there.top[:2])
                assert there.token_id in dict(here.top[:2])
                break
