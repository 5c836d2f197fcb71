"""The host's state of a request: its prompt, the answer so far, and its end.

A ``Request`` generates; a ``Scoring`` scores a window of tokens. The scheduler takes either.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from hotloop.engine.core import Features, StepTimes
from hotloop.text.detokenize import Detokenizer, StopFilter
from hotloop.text.tokenizer import Tokenizer
from hotloop.types import (
    FinishReason,
    Generation,
    SamplingParams,
    Score,
    Speculation,
    Timing,
    TokenLogprob,
)

if TYPE_CHECKING:
    from torch import Tensor


class Request:
    """A prompt, its answer so far, and whether the answer has ended.

    Args:
        index: Index of the answer in its call, see ``Delta``.
        prompt_ids: The prompt.
        params: Sampling options.
        seed: Seed of its sampling.
        max_new_tokens: The most tokens of the answer.
        eos_ids: Tokens that end the answer.
        tokenizer: Detokenizes the answer; None for no text.
        starts_text: The answer is a text of its own, not a continuation of the prompt.
        submitted_s: When it was submitted, by ``time.perf_counter``.
        speculates: There is a drafter, so steps are counted.
        salt: Only requests with the same salt reuse each other's prefixes.

    Attributes:
        index: Index of the answer in its call, see ``Delta``.
        n_cached: Tokens of the prompt that were not prefilled, since a seat held them.
        features: The features of the sampler that it needs.
        finish_reason: Why it ended; None while it is running, or if it failed.
        failed: The logits of the next token were not finite, or its grammar has failed.
        grammar_failure: Why its grammar has failed; None if it has not.
    """

    def __init__(
        self,
        index: int,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        seed: int,
        max_new_tokens: int,
        eos_ids: AbstractSet[int],
        tokenizer: Tokenizer | None,
        starts_text: bool = False,
        submitted_s: float,
        speculates: bool,
        salt: str = "",
    ) -> None:
        self.index, self.prompt_ids, self.params, self.seed = index, prompt_ids, params, seed
        self.features = Features.of([params])
        self.salt, self.n_cached = salt, 0
        self.max_new_tokens = max_new_tokens
        self.eos_ids = frozenset() if params.ignore_eos else frozenset(eos_ids)
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.failed = False
        self.grammar_failure: str | None = None
        # A grammar applies to the tokens' bytes, which include a space before the first word.
        preceding = () if starts_text and params.grammar is None else prompt_ids
        self._detokenizer = (
            Detokenizer(tokenizer, preceding=preceding, visible=params.visible_tokens)
            if tokenizer
            else None
        )
        self._stops = StopFilter(params.stop)
        self._text: list[str] = []
        self._submitted_s = submitted_s
        self._started_s = self._first_s = self._last_s = submitted_s
        self._counts = _Counts() if speculates else None

    @property
    def ended(self) -> bool:
        """Whether the request has finished or failed."""
        return self.failed or self.finish_reason is not None

    @property
    def n_remaining(self) -> int:
        """The most tokens that may still be generated."""
        return self.max_new_tokens - len(self.token_ids)

    def start(self, n_cached: int) -> None:
        """Records that the request has a seat, which holds the first tokens of its prompt."""
        self._started_s = time.perf_counter()
        self.n_cached = n_cached

    def accept(self, token_id: int, logprob: TokenLogprob | None) -> str:
        """Appends the next token, sets ``finish_reason`` at the end, and returns the new text."""
        self._last_s = time.perf_counter()
        if not self.token_ids:
            self._first_s = self._last_s
        self.token_ids.append(token_id)
        if self.params.logprobs is not None:
            assert logprob is not None, "the step returned no log-probabilities"
            top = logprob.top[: self.params.logprobs]
            self.logprobs.append(dataclasses.replace(logprob, top=top))
        text = ""
        if token_id in self.eos_ids:
            self.finish_reason = "eos"
        elif self._detokenizer is not None:
            text = self._stops.push(self._detokenizer.push(token_id))
            if self._stops.matched is not None:
                self.finish_reason = "stop"
        if self.finish_reason is None and len(self.token_ids) == self.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason in ("eos", "length") and self._detokenizer is not None:
            text += self._end_of_text()
        self._text.append(text)
        return text

    def newest_logprobs(self, n: int) -> tuple[TokenLogprob, ...] | None:
        """Returns the log-probabilities of the newest ``n`` tokens; None if it wants none."""
        if self.params.logprobs is None:
            return None
        return tuple(self.logprobs[len(self.logprobs) - n :])

    def count_steps(
        self, n: int, *, n_step_tokens: int, n_kept: int, n_drafts: int, times: StepTimes
    ) -> None:
        """Counts a step with drafts, or plain steps of an engine with a drafter.

        Args:
            n: Number of steps; 1 with drafts.
            n_step_tokens: Tokens that the steps produced for this request.
            n_kept: How many of them are part of the answer; the others are beyond its end.
            n_drafts: Number of drafts of its row.
            times: The request's share of the steps' times.
        """
        counts = self._counts
        assert counts is not None, "there is no drafter"
        counts.n_steps += n
        counts.n_plain_steps += n if n_drafts == 0 else 0
        counts.n_tokens += n_kept
        counts.draft_s += times.catch_up_s + times.draft_s
        counts.verify_s += times.model_s
        for position in range(n_drafts):
            if position == len(counts.proposed):
                counts.proposed.append(0)
                counts.accepted.append(0)
            counts.proposed[position] += 1
            counts.accepted[position] += position < n_step_tokens - 1

    def generation(self) -> Generation:
        """Returns the whole answer of a finished request."""
        assert self.finish_reason is not None, "the request has not finished"
        return Generation(
            prompt_ids=tuple(self.prompt_ids),
            token_ids=tuple(self.token_ids),
            text="".join(self._text),
            finish_reason=self.finish_reason,
            timing=Timing(
                n_tokens=len(self.token_ids),
                ttft_s=self._first_s - self._submitted_s,
                e2e_s=self._last_s - self._submitted_s,
                queue_s=self._started_s - self._submitted_s,
            ),
            logprobs=tuple(self.logprobs) if self.params.logprobs is not None else None,
            speculation=None if self._counts is None else self._counts.speculation(),
            cached_tokens=self.n_cached,
        )

    def _end_of_text(self) -> str:
        """Flushes detokenizer and stop filter; their text may complete a stop string."""
        assert self._detokenizer is not None
        text = self._stops.push(self._detokenizer.flush())
        if self._stops.matched is not None:
            self.finish_reason = "stop"
            return text
        return text + self._stops.flush()


@dataclasses.dataclass(slots=True)
class _Counts:
    """The sums of a ``Speculation`` so far, to which every step adds in place."""

    n_steps: int = 0
    n_plain_steps: int = 0
    n_tokens: int = 0
    proposed: list[int] = dataclasses.field(default_factory=list)
    accepted: list[int] = dataclasses.field(default_factory=list)
    draft_s: float = 0.0
    verify_s: float = 0.0

    def speculation(self) -> Speculation:
        return Speculation(
            n_steps=self.n_steps,
            n_plain_steps=self.n_plain_steps,
            n_tokens=self.n_tokens,
            proposed=tuple(self.proposed),
            accepted=tuple(self.accepted),
            draft_s=self.draft_s,
            verify_s=self.verify_s,
        )


class Scoring:
    """A window of tokens to score, chunk by chunk.

    Args:
        ids: The window, two tokens or more.
        full: Also return the whole distribution at each position.
        n_top: Also return this many most likely tokens at each position.
        group: Windows of one group that have a common prefix share its keys and values, and its
            scores. They are cancelled together, and ``full`` must be False. None for a window that
            shares nothing.

    Attributes:
        n_cached: Number of its first tokens whose keys, values and scores are those of an earlier
            window.
        parts: The scores of its chunks so far; once it has been scored, that of the whole window.
        ended: Whether it has been scored or cancelled.
    """

    def __init__(
        self, ids: list[int], *, full: bool, n_top: int = 0, group: object | None = None
    ) -> None:
        self.ids, self.full, self.n_top, self.group = ids, full, n_top, group
        self.parts: list[Score] = []
        self.ended, self.n_cached = False, 0
        self._earlier: Scoring | None = None

    def reuse_scores(self, earlier: Scoring, n: int) -> None:
        """Takes the first ``n`` predictions from a window that is scored before this one."""
        self._earlier, self.n_cached = earlier, n

    def finish(self) -> None:
        """Joins the scores of its parts, after those that it reuses."""
        if self._earlier is not None:
            self.parts.insert(0, _first(self._earlier.score(), self.n_cached))
        self._earlier = None
        if len(self.parts) > 1:
            self.parts = [_joined(self.parts)]
        self.ended = True

    def score(self) -> Score:
        """Returns the score of the whole window, once it has been scored."""
        (whole,) = self.parts
        return whole


def _first(score: Score, n: int) -> Score:
    """Returns the score of the first ``n`` predictions, without distributions."""
    assert score.top1_logprobs is not None, "the engine gives them"
    return Score(
        token_logprobs=score.token_logprobs[:n],
        top1=score.top1[:n],
        top1_logprobs=score.top1_logprobs[:n],
    )


def _joined(parts: Sequence[Score]) -> Score:
    """Joins the scores of consecutive parts of a window."""
    import torch

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    tops = [part.top for part in parts if part.top is not None]
    return Score(
        token_logprobs=joined("token_logprobs"),
        top1=joined("top1"),
        top1_logprobs=joined("top1_logprobs"),
        log_probs=joined("log_probs") if parts[0].log_probs is not None else None,
        top=(torch.cat([i for i, _ in tops]), torch.cat([v for _, v in tops])) if tops else None,
    )
