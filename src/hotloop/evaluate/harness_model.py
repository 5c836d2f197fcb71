"""hotloop as a model of lm-eval (extra ``hotloop[eval]``; this module imports lm-eval).

    lm_eval.simple_evaluate(model=EngineLM(engine), tasks=["arc_easy"])

Requests are tokenized by ``evaluate.likelihood``, in the same way as by lm-eval's own Hugging Face
backend, and results are the same except for rounding. All requests of a kind go to the engine in
one call, which may batch them. ``prefix_token_id`` is BOS if the model has one. lm-eval's base
class would put the end-of-sequence token there; a model that was not trained with that token at the
beginning loses most of its accuracy. Chat templates are not applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance  # pyrefly: ignore[missing-import]
from lm_eval.api.model import TemplateLM  # pyrefly: ignore[missing-import]
from lm_eval.models.utils import (  # pyrefly: ignore[missing-import]
    handle_stop_sequences,
    normalize_gen_kwargs,
)

from hotloop.errors import RequestError
from hotloop.evaluate.likelihood import TextEncoder, Window, rolling_windows, score_windows
from hotloop.types import Engine, SamplingParams

MAX_NEW_TOKENS = 256
"""The most tokens of an answer if the task sets no limit, as in lm-eval's own backends."""


class EngineLM(TemplateLM):
    """An engine as lm-eval's model: log-likelihoods, rolling log-likelihoods, and generation.

    Args:
        engine: Any engine of the ``Engine`` protocol.

    Attributes:
        engine: The same engine.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self._encoder = TextEncoder(engine)
        self._max_tokens = engine.describe().max_seq_len

    @property
    def max_length(self) -> int:
        """The most tokens of context before a predicted token."""
        return self._max_tokens - 1

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        ends = self.engine.describe().eos_ids
        return ends[0] if ends else self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token at the beginning of a text without context: BOS if the model has one."""
        return self._encoder.prefix_id

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        **_: Any,
    ) -> list[int]:
        """Tokenizes, with BOS if the tokenizer adds it and ``add_special_tokens`` is not False."""
        return self._encoder.encode(string, add_special=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        **_: Any,
    ) -> list[tuple[float, bool]]:
        windows = [self._encoder.window(before, after) for _, before, after in requests]
        scores = score_windows(self.engine, windows)
        return [(score.logprob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(
        self,
        requests: list[Instance],
        disable_tqdm: bool = False,  # noqa: ARG002
    ) -> list[float]:
        """Scores whole documents, each token once."""
        documents = [self._rolling(request.args[0]) for request in requests]
        scores = score_windows(self.engine, [w for windows in documents for w in windows])
        return [sum(next(scores).logprob for _ in windows) for windows in documents]

    def _rolling(self, text: str) -> list[Window]:
        ids = self._encoder.encode(text)
        return rolling_windows(ids, self.prefix_token_id, self._max_tokens)

    def generate_until(
        self,
        requests: list[Instance],
        disable_tqdm: bool = False,  # noqa: ARG002
    ) -> list[str]:
        """Answers prompts; all with the same options in one call of the engine.

        Raises:
            RequestError: A task requests more new tokens than the context holds.
        """
        answers = [""] * len(requests)
        groups: dict[SamplingParams, list[int]] = {}
        for i, request in enumerate(requests):
            _, options = request.args
            groups.setdefault(self._params(options), []).append(i)
        for params, members in groups.items():
            assert params.max_new_tokens is not None, "lm-eval sets a limit or takes the default"
            room = self.max_length - params.max_new_tokens
            if room < 1:
                raise RequestError(
                    f"the task requests {params.max_new_tokens} new tokens, and the context holds "
                    f"{self._max_tokens} with the prompt: raise max_seq_len (--max-seq-len)."
                )
            prompts = [self._encoder.encode(requests[i].args[0])[-room:] for i in members]
            made = self.engine.generate(prompts, params)
            for i, generation in zip(members, made, strict=True):
                answers[i] = generation.text
        return answers

    def _params(self, options: dict[str, Any]) -> SamplingParams:
        options = dict(normalize_gen_kwargs(options, MAX_NEW_TOKENS))
        stop: Sequence[str] = handle_stop_sequences(options.get("until"), eos=None)
        sampling: dict[str, Any] = {}
        if options.get("do_sample"):
            names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            sampling = {name: options[name] for name in names if name in options}
        return SamplingParams(
            max_new_tokens=options["max_gen_toks"],
            stop=tuple(text for text in stop if text),
            seed=0,
            **sampling,
        )
