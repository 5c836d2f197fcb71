"""The programs that a server can need: sizes of steps, and features of the sampler.

A captured program takes tens of milliseconds to make, and a compiled one seconds, so a server makes
all of them before it is ready. Their number is kept small by running a step with more features than
it needs: a request that does not use a feature gets the same tokens with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec

from hotloop.engine.core import TOP_K_CANDIDATES, Features, Step, padded_rows
from hotloop.engine.draft_control import PLAIN, draft_arms, sizes_up_to
from hotloop.engine.scheduler import step_kinds
from hotloop.engine.setup import Setup
from hotloop.engine.steps import MIN_LENGTH

SERVED_FEATURES = (
    Features(),
    Features(draw=True, truncate=True, n_candidates=TOP_K_CANDIDATES),
    Features(draw=True, truncate=True, n_candidates=TOP_K_CANDIDATES, adjust=True, logprobs=True),
    Features(draw=True, truncate=True, n_candidates=None, adjust=True, logprobs=True),
)
"""The sets of features of a server's programs, ascending: greedy decoding; sampling; all features,
for common values of top-k; all features, for any top-k. In fused steps the kernel that samples
handles any top-k alike, so the last two are one program."""


def served_features(setup: Setup) -> Sequence[Features]:
    """Returns ``SERVED_FEATURES`` and, if there can be grammars, each set with grammars too."""
    if not setup.has_tokenizer or find_spec("llguidance") is None:
        return SERVED_FEATURES
    return (*SERVED_FEATURES, *(replace(each, constrain=True) for each in SERVED_FEATURES))


def serving_steps(setup: Setup, n_steps: int) -> Sequence[Step]:
    """Returns a step for each program that a server can need, the largest first.

    It is empty where nothing is captured or compiled.

    Args:
        setup: The engine's setup.
        n_steps: Steps of a multi-step program of plain steps.
    """
    return tuple(_steps(setup, n_steps)) if setup.makes_programs else ()


def _steps(setup: Setup, n_steps: int) -> Iterator[Step]:
    n_rows = setup.config.max_batch_size
    sizes = {padded_rows(n, n_rows) if setup.captures else n for n in range(1, n_rows + 1)}
    arms = (PLAIN,)
    if setup.draft is not None:
        arms = draft_arms(sizes_up_to(setup.config.draft_tokens), len(setup.draft.names))
    for n in sorted(sizes, reverse=True):
        for k, drafter, n_program_steps in step_kinds(arms, n_steps, alone=n == 1):
            for features in reversed(served_features(setup)):
                if n_program_steps > 1 and features.constrain:
                    continue
                for longest in _lengths(setup):
                    yield Step(
                        n=n,
                        seats=tuple(range(n)),
                        longest=longest,
                        features=features,
                        k=k,
                        drafter=drafter,
                        n_steps=n_program_steps,
                        any_seats=True,
                    )


def _lengths(setup: Setup) -> Sequence[int]:
    """Returns a value of ``Step.longest`` for each length of cache with its own program."""
    if setup.fused or setup.device.type == "cpu":  # kernels stop at a row's position
        return (setup.n_positions,)
    lengths = [MIN_LENGTH]
    while lengths[-1] < setup.n_positions:
        lengths.append(2 * lengths[-1])
    return [min(length, setup.n_positions) for length in reversed(lengths)]
