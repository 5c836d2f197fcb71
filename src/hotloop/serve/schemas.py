"""Bodies of requests, as clients send them. Fields that are not here are ignored.

A null means an absent field: ``bodies.read`` removes nulls. The ranges of sampling options are
those of ``SamplingParams``.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from hotloop.checked import MAX_COUNT, MAX_SEED
from hotloop.serve.errors import ApiError
from hotloop.serve.settings import ServerSettings
from hotloop.serve.structured_output import format_grammar, vllm_grammar
from hotloop.types import MAX_ANSWERS, MAX_LOGPROBS, Grammar, SamplingParams


class Body(BaseModel):
    """A body whose unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompts(value: Any) -> list[str | list[int]]:
    """Lists the prompts of a field, which is one prompt or several, each text or token ids."""

    def is_ids(prompt: Any) -> bool:
        return isinstance(prompt, list) and set(map(type, prompt)) <= {int}

    if isinstance(value, str) or (value and is_ids(value)):
        return [value]
    if isinstance(value, list) and all(isinstance(p, str) or is_ids(p) for p in value):
        return value
    raise ValueError("must be text, a list of token ids, or a list of such prompts")


_GUIDED = ("json", "regex", "grammar", "choice")
"""Suffixes of vLLM's older fields, after ``guided_``."""


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Extension(Body):
    """Extensions of the API by hotloop.

    Attributes:
        details: Mark in a chat's stream which text was drafted.
        speculate: See ``SamplingParams``.
    """

    details: bool | None = None
    speculate: bool | None = None


_NO_EXTENSION, _NO_STREAM_OPTIONS = Extension(), StreamOptions()


class SamplingBody(Body):
    """Sampling options, for every route that generates."""

    # The defaults that are models come from factories, which return the same object each time:
    # pydantic would make a deep copy of a plain default for each request.
    model: str | None = None
    hotloop: Extension = Field(default_factory=lambda: _NO_EXTENSION)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=lambda: _NO_STREAM_OPTIONS)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_tokens: Annotated[int, Field(le=MAX_COUNT)] | None = None
    min_tokens: int | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    seed: int | None = None
    stop: Annotated[list[str], BeforeValidator(_listed)] = []
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    ignore_eos: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] = {}
    guided_json: Any = None
    guided_regex: Any = None
    guided_grammar: Any = None
    guided_choice: Any = None

    @property
    def limit_field(self) -> str:
        """The name of the field that limits the tokens of an answer."""
        return "max_tokens"

    @property
    def limit(self) -> int | None:
        """The most tokens of an answer, which may exceed the context; None takes the default."""
        return self.max_tokens

    @property
    def n_logprobs(self) -> int | None:
        """Alternatives of each token's log-probability; None for no log-probabilities."""
        return None

    @property
    def grammar(self) -> Grammar | None:
        """The grammar of the content of an answer; None for any content.

        Raises:
            ApiError: There are several grammars, or one is not supported.
            RequestError: A source is too large.
        """
        guided = {kind: getattr(self, f"guided_{kind}") for kind in _GUIDED}
        asked = (
            self._format_grammar(),
            vllm_grammar("structured_outputs", self.structured_outputs),
            vllm_grammar("guided", guided),
        )
        given = [grammar for grammar in asked if grammar is not None]
        if len(given) > 1:
            raise ApiError(
                400,
                "structured_outputs: the request has several grammars: give one.",
                param="structured_outputs",
            )
        return given[0] if given else None

    def _format_grammar(self) -> Grammar | None:
        return format_grammar("response_format", self.response_format)

    def params(self, defaults: SamplingParams, settings: ServerSettings) -> SamplingParams:
        """Returns the model's ``defaults``, with the client's options.

        Raises:
            ApiError: There are too many stop strings, the limit of tokens is below 1, or the
                grammar is not supported.
            RequestError: Another option is out of range, a stop string is empty, or a grammar is
                too large.
        """
        if len(self.stop) > settings.max_stops:
            raise ApiError(400, f"stop has more than {settings.max_stops} strings.", param="stop")
        limit = self.limit
        if limit is not None and limit < 1:
            field = self.limit_field
            raise ApiError(400, f"{field}: must be 1 or more, not {limit}.", param=field)
        given: dict[str, Any] = {
            "max_new_tokens": limit,
            "min_new_tokens": self.min_tokens,
            "n": self.n,
            "temperature": self.temperature,
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": None if self.logit_bias is None else tuple(self.logit_bias.items()),
            "seed": None if self.seed in (None, -1) else self.seed % (MAX_SEED + 1),
            "stop": tuple(self.stop) or None,
            "ignore_eos": self.ignore_eos,
            "logprobs": self.n_logprobs,
            "speculate": self.hotloop.speculate,
        }
        fields = {k: v for k, v in given.items() if v is not None}
        if (grammar := self.grammar) is not None:  # which may be large, so it is not cached
            return replace(defaults, grammar=grammar, **fields)
        is_small = sum(map(len, self.stop)) <= _MAX_CACHED_STOP_CHARS
        with_fields = _with_fields if is_small else _with_fields.__wrapped__
        return with_fields(defaults, tuple(fields.items()))


_MAX_CACHED_STOP_CHARS = 1024
"""The most characters of stop strings in cached options: a body can have millions."""


@functools.lru_cache(64)
def _with_fields(defaults: SamplingParams, fields: tuple[tuple[str, Any], ...]) -> SamplingParams:
    """Replaces fields of sampling options; cached, since most requests have the same options."""
    return replace(defaults, **dict(fields))


class CompletionBody(SamplingBody):
    """The body of ``/v1/completions``."""

    prompts: Annotated[list[str | list[int]], PlainValidator(_prompts), Field(alias="prompt")]
    echo: bool = False
    suffix: str | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    return_token_ids: bool = False
    best_of: int | None = None

    @property
    def n_logprobs(self) -> int | None:
        """See ``SamplingBody``."""
        return self.logprobs


class Conversation(Body):
    """Messages, and options of the chat template."""

    messages: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    tools: list[dict[str, Any]] | None = None


class ChatBody(SamplingBody, Conversation):
    """The body of ``/v1/chat/completions``."""

    max_completion_tokens: Annotated[int, Field(le=MAX_COUNT)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True

    @property
    def limit_field(self) -> str:
        """See ``SamplingBody``."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def limit(self) -> int | None:
        """See ``SamplingBody``."""
        return _or_all_the_context(getattr(self, self.limit_field))

    @property
    def n_logprobs(self) -> int | None:
        """See ``SamplingBody``."""
        return self.top_logprobs if self.logprobs else None


class TextOptions(Body):
    """The field ``text`` of ``/v1/responses``."""

    format: dict[str, Any] = {"type": "text"}


class ResponsesBody(SamplingBody):
    """The body of ``/v1/responses``."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(le=MAX_COUNT)] | None = None
    text: TextOptions = Field(default_factory=TextOptions)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    include: list[str] = []
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    metadata: dict[str, Any] = {}
    chat_template_kwargs: dict[str, Any] = {}
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    background: bool = False

    @property
    def limit_field(self) -> str:
        """See ``SamplingBody``."""
        return "max_output_tokens"

    @property
    def limit(self) -> int | None:
        """See ``SamplingBody``."""
        return _or_all_the_context(self.max_output_tokens)

    @property
    def n_logprobs(self) -> int | None:
        """See ``SamplingBody``."""
        return self.top_logprobs if "message.output_text.logprobs" in self.include else None

    def _format_grammar(self) -> Grammar | None:
        if self.response_format is not None:
            raise ApiError(
                400,
                "response_format: /v1/responses takes the answer format in text.format.",
                param="response_format",
            )
        return format_grammar("text.format", self.text.format)


def _or_all_the_context(limit: int | None) -> int:
    """Returns a limit beyond the context if there is none, as OpenAI and vLLM do."""
    return MAX_COUNT if limit is None else limit


class TokenizeBody(Conversation):
    """The body of ``/tokenize``."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """The body of ``/detokenize``."""

    model: str | None = None
    tokens: list[int]


FinishReason = Literal["stop", "length", "tool_calls"]
"""Why an answer ended, by the API's names."""
