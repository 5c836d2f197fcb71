"""A request on its way through the engine, as the host knows it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Set as AbstractSet

from hotloop.engine.core import StepTimes
from hotloop.text.detokenize import Detokenizer, StopFilter
from hotloop.text.tokenizer import Tokenizer
from hotloop.types import (
    FinishReason,
    Generation,
    SamplingParams,
    Speculation,
    Timing,
    TokenLogprob,
)


class Request:
    """A prompt, its answer so far, and whether that has ended.

    Args:
        index: Which prompt of the call it is.
        prompt_ids: The prompt.
        params: How to sample.
        seed: Seeds the draws.
        max_new_tokens: Where the answer ends at the latest.
        eos_ids: Tokens that end it.
        tokenizer: Makes text of tokens; None gives no text.
        starts_text: The answer is a text of its own, not the prompt's continuation.
        submitted_s: When it was submitted, by ``time.perf_counter``.
        speculates: Whether there is a drafter, so that steps are counted.

    Attributes:
        index: Which prompt of the call it is.
        finish_reason: Why it ended; None while it goes on, and where it failed.
        failed: The model gave no next token, since logits were not finite.
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
    ) -> None:
        self.index, self.prompt_ids, self.params, self.seed = index, prompt_ids, params, seed
        self.max_new_tokens = max_new_tokens
        self.eos_ids = frozenset() if params.ignore_eos else eos_ids
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.failed = False
        after = () if starts_text else prompt_ids
        self._detokenizer = Detokenizer(tokenizer, after=after) if tokenizer else None
        self._stops = StopFilter(params.stop)
        self._text: list[str] = []
        self._submitted_s = submitted_s
        self._first_s = self._last_s = submitted_s
        self._speculation = Speculation() if speculates else None

    @property
    def ended(self) -> bool:
        """Whether no more tokens are wanted."""
        return self.failed or self.finish_reason is not None

    @property
    def n_wanted(self) -> int:
        """Tokens that the answer may still have."""
        return self.max_new_tokens - len(self.token_ids)

    def accept(self, token_id: int, logprob: TokenLogprob | None) -> str:
        """Appends the next token; returns the text that is certain now, and notices the end."""
        self._last_s = time.perf_counter()
        if not self.token_ids:
            self._first_s = self._last_s
        self.token_ids.append(token_id)
        if self.params.logprobs is not None:
            assert logprob is not None, "the step computes log-probabilities"
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

    def count_steps(
        self, n: int, *, given: int, taken: int, n_drafts: int, share: StepTimes
    ) -> None:
        """Counts a step with drafts, or plain ones of an engine that has a drafter.

        Args:
            n: How many steps; one if there were drafts.
            given: Tokens that they brought this request.
            taken: Those of them before its end.
            n_drafts: Drafts that its row had.
            share: Its share of their time.
        """
        assert self._speculation is not None, "there is no drafter"
        self._speculation += Speculation(
            n_steps=n,
            n_off=n if n_drafts == 0 else 0,
            n_tokens=taken,
            proposed=(1,) * n_drafts,
            accepted=tuple(int(position < given - 1) for position in range(n_drafts)),
            draft_s=share.catch_up_s + share.draft_s,
            verify_s=share.model_s,
        )

    def generation(self) -> Generation:
        """The whole answer, once it has ended."""
        assert self.finish_reason is not None, "the request goes on"
        return Generation(
            prompt_ids=tuple(self.prompt_ids),
            token_ids=tuple(self.token_ids),
            text="".join(self._text),
            finish_reason=self.finish_reason,
            timing=Timing(
                n_tokens=len(self.token_ids),
                ttft_s=self._first_s - self._submitted_s,
                e2e_s=self._last_s - self._submitted_s,
            ),
            logprobs=tuple(self.logprobs) if self.params.logprobs is not None else None,
            speculation=self._speculation,
        )

    def _end_of_text(self) -> str:
        """The text that detokenizer and stop filter held back, which can complete a stop string."""
        assert self._detokenizer is not None
        text = self._stops.push(self._detokenizer.flush())
        if self._stops.matched is not None:
            self.finish_reason = "stop"
            return text
        return text + self._stops.flush()
