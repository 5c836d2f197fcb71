"""Common parts of other engines: library import, unsupported levers, and tokenization.

Token ids come from hotloop: prompts and windows are the same for every engine of a sweep.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hotloop.errors import RequestError, UnsupportedError, shorten, shorten_value
from hotloop.types import (
    ChatPrompt,
    EngineConfig,
    FinishReason,
    Generation,
    Prompt,
    SamplingParams,
    Score,
    Timing,
    levers,
)

if TYPE_CHECKING:
    from torch import Tensor

    from hotloop.engine.setup import Setup
    from hotloop.text.tokenizer import Tokenizer

_ANY_ENGINE = ("weights", "seed", "engine", "checkpoint", "max_batch_size", "max_seq_len")
"""Levers that every engine supports, or that only choose the engine and its model."""


def import_library(config: EngineConfig, module: str, package: str) -> Any:
    """Imports an engine's library.

    Raises:
        UnsupportedError: It is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise _broken(package, error) from error
        raise UnsupportedError(
            f"{package} is not installed (pip install {package}). If another interpreter has it, "
            f"name that interpreter: --python {config.engine}=PATH."
        ) from error
    except (ImportError, OSError, RuntimeError) as error:  # a shared library, or another version
        raise _broken(package, error) from error


def _broken(package: str, error: Exception) -> UnsupportedError:
    return UnsupportedError(f"{package} is installed but cannot be imported: {shorten(str(error))}")


def check_levers(
    config: EngineConfig, supported: Iterable[str], choices: Mapping[str, Any]
) -> None:
    """Refuses options that an engine does not support, instead of ignoring them.

    Args:
        config: The configuration.
        supported: The levers that the engine supports, with all of their values.
        choices: Levers of which it supports only some values, and these values.

    Raises:
        UnsupportedError: Another lever is set, or a lever has an unsupported value.
    """
    for name in levers():
        value = getattr(config, name)
        if name in choices and value not in choices[name]:
            listed = ", ".join(map(str, choices[name]))
            raise UnsupportedError(
                f"{config.engine} does not support {name} {shorten_value(value)}. It supports: "
                f"{listed}."
            )
        if name in (*_ANY_ENGINE, *supported, *choices) or value == getattr(EngineConfig, name):
            continue
        raise UnsupportedError(
            f"{config.engine} does not support the option {name} ({shorten_value(value)}): leave "
            "it out."
        )


def prepare_own(config: EngineConfig, quant: str = "none") -> Setup:
    """Resolves another engine's model and device as hotloop would; see ``engine.setup.prepare``.

    Args:
        config: The configuration.
        quant: ``none`` if the weights are read, and dequantized; ``auto`` if the engine reads them
            itself, in whatever form they are stored.

    Raises:
        HotloopError: The model, the device or an option is not supported, or this interpreter
            lacks a package that hotloop reads models with.
    """
    try:
        from hotloop.engine.setup import prepare  # imports torch
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"the interpreter of {config.engine} lacks {error.name}, which hotloop needs to read "
            "models and to measure: install it there too."
        ) from error

    return prepare(
        EngineConfig(
            model=config.source,
            weights=config.weights,
            quant=quant,
            execution="eager",
            device=config.device,
            dtype=config.dtype,
            max_batch_size=config.max_batch_size,
            max_seq_len=config.max_seq_len,
        )
    )


def tokenizer_of(config: EngineConfig) -> Tokenizer | None:
    """Loads the model's tokenizer; returns None for random weights, which have none."""
    if config.weights == "random":
        return None

    from hotloop.text.tokenizer import load_tokenizer
    from hotloop.weights.hub import resolve_model

    return load_tokenizer(resolve_model(config.model))


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Converts an engine's prompts to token ids, and its answers from token ids.

    Attributes:
        engine: The engine's name, for errors.
        tokenizer: The model's tokenizer; None for random weights.
        vocab_size: The number of token ids.
        max_seq_len: Tokens of a prompt and its answer together.
    """

    engine: str
    tokenizer: Tokenizer | None
    vocab_size: int
    max_seq_len: int

    def encode(self, text: str) -> list[int]:
        """Tokenizes plain text, with no special tokens added."""
        return self._tokenizer.encode(text, add_special=False)

    def prompts(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[tuple[int, ...]]:
        """Returns the token ids of prompts.

        Raises:
            RequestError: A prompt or an option cannot be served.
        """
        _check_greedy(self.engine, params)
        token_ids = [self._ids(prompt) for prompt in prompts]
        longest = max(map(len, token_ids), default=0) + self.new_tokens(params)
        if longest > self.max_seq_len:
            raise RequestError(
                f"a prompt and its answer take {longest} tokens, more than {self.max_seq_len}: "
                "shorten them, or raise max_seq_len."
            )
        return token_ids

    def new_tokens(self, params: SamplingParams) -> int:
        """Returns the most tokens of an answer."""
        if params.max_new_tokens is None:
            raise RequestError(f"{self.engine} needs max_new_tokens.")
        return params.max_new_tokens

    def end_ids(self, params: SamplingParams) -> frozenset[int]:
        """Returns the tokens that end an answer."""
        if params.ignore_eos or self.tokenizer is None:
            return frozenset()
        return self.tokenizer.eos_ids

    def answer(
        self,
        prompt: tuple[int, ...],
        token_ids: Sequence[int],
        times: Sequence[float],
        params: SamplingParams,
    ) -> Generation:
        """Makes the answer to a prompt.

        Args:
            prompt: Its token ids.
            token_ids: The tokens of the answer; tokens after its end are left out.
            times: Seconds from submit to the arrival of each token on the host.
            params: The options of the request.
        """
        ends = self.end_ids(params)
        n = next((i for i, token in enumerate(token_ids, 1) if token in ends), len(token_ids))
        kept = tuple(token_ids[:n])
        reason: FinishReason = "eos" if kept and kept[-1] in ends else "length"
        return Generation(
            prompt_ids=prompt,
            token_ids=kept,
            text=self.tokenizer.decode(kept) if self.tokenizer else "",
            finish_reason=reason,
            timing=Timing(n_tokens=n, ttft_s=times[0], e2e_s=times[n - 1]),
        )

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, ChatPrompt):
            return prompt.token_ids
        ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise RequestError("a prompt needs at least one token.")
        return tuple(ids)

    @property
    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("random weights have no tokenizer: give token ids.")
        return self.tokenizer


class UnknownMemory(AbstractContextManager["UnknownMemory"]):
    """The meter of an engine whose memory cannot be measured from outside."""

    peak_bytes = None

    def __exit__(self, *_: object) -> None:
        """Measures nothing."""


def check_window(window: Sequence[int], max_seq_len: int) -> None:
    """Refuses a window that cannot be scored.

    Raises:
        RequestError: It is too short or too long.
    """
    if not 2 <= len(window) <= max_seq_len:
        raise RequestError(
            f"a window to score must have 2 to {max_seq_len} tokens, not {len(window)}."
        )


def score_of(logits_TV: Tensor, window: Sequence[int], *, full: bool) -> Score:
    """Makes the score of a window.

    Args:
        logits_TV: Logits after each of its tokens except the last, [T - 1, V].
        window: Its token ids.
        full: Also return the whole distributions.
    """
    import torch

    log_probs_TV = torch.log_softmax(logits_TV.float(), dim=-1)
    tokens_T = torch.tensor(window[1:], device=log_probs_TV.device)
    return Score(
        token_logprobs=log_probs_TV.gather(1, tokens_T[:, None])[:, 0].cpu(),
        top1=log_probs_TV.argmax(dim=-1).cpu(),
        log_probs=log_probs_TV if full else None,
    )


def score_of_top(
    entries: Sequence[Mapping[int, float]], window: Sequence[int], k: int, *, top: bool
) -> Score:
    """Makes the score of a window from an engine that returns only the most likely tokens.

    Args:
        entries: For each of its tokens except the last, log-probabilities by token id: of the next
            token, and of the ``k`` most likely tokens.
        window: Its token ids.
        k: See ``entries``.
        top: Also return the most likely tokens.
    """
    import torch

    ranked = [sorted(entry.items(), key=lambda item: -item[1])[:k] for entry in entries]
    k = min(map(len, ranked))
    ids_TK = torch.tensor([[token for token, _ in entry[:k]] for entry in ranked])
    log_probs_TK = torch.tensor([[value for _, value in entry[:k]] for entry in ranked])
    own = [entry[token] for entry, token in zip(entries, window[1:], strict=True)]
    return Score(
        token_logprobs=torch.tensor(own),
        top1=ids_TK[:, 0],
        top=(ids_TK, log_probs_TK) if top else None,
    )


def _check_greedy(engine: str, params: SamplingParams) -> None:
    plain = SamplingParams(
        max_new_tokens=params.max_new_tokens, ignore_eos=params.ignore_eos, seed=params.seed
    )
    if params != plain:
        raise RequestError(
            f"{engine} is measured with greedy decoding: leave out all other sampling options."
        )
