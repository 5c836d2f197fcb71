"""Measures a server's behavior: latency, intervals between events, loops, reproducibility.

It needs only the server's URL. Prompts are plain English that begins with a salt, a word that no
earlier prompt had. So a server with a prefix cache has no part of a prompt the first time (cold),
and all of it the second time (warm). A loop is a passage that an answer repeats.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hotloop.baselines.completions import Completion, CompletionsClient
from hotloop.bench.record import Figure, Workload
from hotloop.bench.statistics import mean_figure

_MAX_PERIOD = 64
"""The longest passage, in words, whose repetition is detected."""

_MIN_REPETITIONS = 3
"""A passage with at least this many consecutive repetitions is a loop."""


@dataclass(frozen=True, kw_only=True)
class AnswerDifferences:
    """Counts of greedy answers to the same prompts that differ.

    Attributes:
        n: Pairs of answers.
        n_equal: Pairs of equal answers.
        first_difference: For each pair that differs, the characters before the first difference.
    """

    n: int
    n_equal: int
    first_difference: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ServerBehavior:
    """The behavior of a server. Samples are prompts.

    Attributes:
        model: The served model.
        server: The server's own name; empty if it does not report one.
        n_prompt_tokens: Tokens of a prompt, if the server counts them.
        n_tokens: Tokens of an answer, if the server counts them.
        cold_ttft_s: Seconds to the first event of an answer to a new prompt.
        warm_ttft_s: Seconds to the first event for a prompt that was just answered.
        tpot_s: Seconds per token after the first event, if the server counts tokens and sends them
            one after another.
        interval_s: Seconds between events: the quantiles 0.5, 0.9 and 0.99, and the longest.
        tokens_per_event: Mean number of tokens of an event, if the server counts them.
        loop_share: Share of the words of answers that repeat a passage for the third time or more.
        repeated: Comparison of the cold and the warm answer to the same prompt.
        against: Comparison of this server's answers with the other server's, if there is one.
        refused_fields: Fields of requests that the server refuses.
    """

    model: str
    server: str
    n_prompt_tokens: Figure | None
    n_tokens: Figure | None
    cold_ttft_s: Figure
    warm_ttft_s: Figure
    tpot_s: Figure | None
    interval_s: tuple[float, float, float, float] | None
    tokens_per_event: Figure | None
    loop_share: Figure
    repeated: AnswerDifferences
    against: AnswerDifferences | None
    refused_fields: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields, as JSON can hold them."""
        values = asdict(self)
        return {k: v.model_dump() if isinstance(v, Figure) else v for k, v in values.items()}


def measure_server(
    client: CompletionsClient,
    workload: Workload,
    text: str,
    *,
    against: CompletionsClient | None = None,
    on_prompt: Callable[[int, int], None] | None = None,
) -> ServerBehavior:
    """Sends each of some prompts twice to a server, and once to another server.

    Args:
        client: The server.
        workload: Its prompt tokens are the approximate words of a prompt, its new tokens the tokens
            of an answer, and its repeats the number of prompts. Its batch is not used.
        text: The text from which prompts are taken.
        against: A server of the same model, such as one without speculation.
        on_prompt: Called after each prompt with (prompts done, prompts in all).

    Raises:
        ServerError: A server fails.
    """
    cold: list[Completion] = []
    warm: list[Completion] = []
    other: list[Completion] = []
    client.complete("Hello", 2)  # connects
    if against is not None:
        against.complete("Hello", 2)
    for done, prompt in enumerate(_prompts(workload, text), start=1):
        for answers in (cold, warm):
            answers.append(client.complete(prompt, workload.new_tokens, ignore_eos=True))
        if against is not None:
            other.append(against.complete(prompt, workload.new_tokens, ignore_eos=True))
        if on_prompt:
            on_prompt(done, workload.repeats)
    both = cold + warm
    return ServerBehavior(
        model=client.model,
        server=client.server,
        n_prompt_tokens=_known([answer.n_prompt_tokens for answer in cold]),
        n_tokens=_known([answer.n_tokens for answer in both]),
        cold_ttft_s=mean_figure([answer.times[0] for answer in cold]),
        warm_ttft_s=mean_figure([answer.times[0] for answer in warm]),
        tpot_s=_known([_tpot_s(answer) for answer in both]),
        interval_s=_quantiles([s for answer in both for s in answer.intervals_s]),
        tokens_per_event=_known([n and n / len(a.times) for a in both for n in (a.n_tokens,)]),
        loop_share=mean_figure([loop_share(answer.text) for answer in cold], within=(0, 1)),
        repeated=compare_answers(cold, warm),
        against=compare_answers(cold, other) if against is not None else None,
        refused_fields=client.refused,
    )


def loop_share(text: str) -> float:
    """Returns the share of a text's words that are in the third or a later repetition of a passage.

    The repetitions are consecutive, and the passage has at most ``_MAX_PERIOD`` words.
    """
    words = text.split()
    in_loop = [False] * len(words)
    for period in range(1, min(_MAX_PERIOD, len(words) // _MIN_REPETITIONS) + 1):
        run = 0
        for i in range(period, len(words)):
            run = run + 1 if words[i] == words[i - period] else 0
            if run >= (_MIN_REPETITIONS - 1) * period:
                first = i - period + 1 if run == (_MIN_REPETITIONS - 1) * period else i
                in_loop[first : i + 1] = [True] * (i + 1 - first)
    return sum(in_loop) / len(words) if words else 0.0


def compare_answers(some: Sequence[Completion], others: Sequence[Completion]) -> AnswerDifferences:
    """Compares answers to the same prompts, in pairs."""
    pairs = [(a.text, b.text) for a, b in zip(some, others, strict=True)]
    different = [(a, b) for a, b in pairs if a != b]
    return AnswerDifferences(
        n=len(pairs),
        n_equal=len(pairs) - len(different),
        first_difference=tuple(_common_prefix_length(a, b) for a, b in different),
    )


def _common_prefix_length(a: str, b: str) -> int:
    unequal = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(unequal, min(len(a), len(b)))


def _prompts(workload: Workload, text: str) -> Iterator[str]:
    """Yields a passage of the text for each repeat, after a salt."""
    words, n = text.split(), workload.prompt_tokens
    for i in range(workload.repeats):
        start = i * n % max(1, len(words) - n)
        yield " ".join([secrets.token_hex(8), *words[start : start + n]])


def _tpot_s(answer: Completion) -> float | None:
    if answer.n_tokens is None or answer.n_tokens < 2 or answer.times[0] == answer.times[-1]:
        return None
    return (answer.times[-1] - answer.times[0]) / (answer.n_tokens - 1)


def _known(values: Sequence[float | None]) -> Figure | None:
    known = [float(value) for value in values if value is not None]
    return mean_figure(known) if known else None


def _quantiles(seconds: Sequence[float]) -> tuple[float, float, float, float] | None:
    if not seconds:
        return None
    import numpy as np

    low, middle, high, longest = np.quantile(seconds, [0.5, 0.9, 0.99, 1.0]).tolist()
    return low, middle, high, longest
