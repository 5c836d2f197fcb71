"""Shared types: a configuration, a request, a result, and the engine protocol.

They are plain frozen values that only validate themselves. They can be printed, hashed, compared,
sent to another process and written to a record. torch is not imported here: the command line reads
this module before it knows whether it needs torch.

Shape letters, here and everywhere: B sequences in a batch, T tokens of one sequence, V vocabulary.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Protocol,
    get_type_hints,
    runtime_checkable,
)

from hotloop.checked import MAX_COUNT, Count, Range, Seed, check_fields
from hotloop.errors import ConfigError, RequestError, shorten_value

if TYPE_CHECKING:
    from torch import Tensor

StepExecution = Literal["eager", "compile", "fused"]
"""Execution mode: ``eager`` is plain PyTorch, ``compile`` is torch.compile, ``fused`` is hotloop's
CUDA kernels. On GPUs ``compile`` and ``fused`` run in CUDA graphs."""

Execution = Literal["auto", StepExecution]
"""Execution mode as a user asks for it: ``auto`` is ``fused`` where that runs, else ``eager``."""

WeightSource = Literal["checkpoint", "random"]
"""Source of weights. ``random`` needs only the model's shape; it serves to measure speed and fit.
"""

DType = Literal["auto", "float32", "bfloat16", "float16"]
"""Element type of activations and of unquantized weights. ``auto`` lets the device decide."""

AllReduce = Literal["auto", "nccl", "symm_mem", "gloo", "shm"]
"""All-reduce backend. On GPUs: NCCL, or for small tensors symmetric memory (``symm_mem``), through
which ranks read each other's addends; ``auto`` is ``symm_mem`` where that works, else ``nccl``. On
CPUs: gloo, or memory that the ranks of one machine share (``shm``); ``auto`` is ``shm`` where that
works, else ``gloo``."""

CopyFormat = Literal["hotloop", "compressed-tensors"]
"""Format of a quantized copy: hotloop's own, or compressed-tensors, which vLLM and transformers
read too."""

DraftPolicy = Literal["adaptive", "always"]
"""Policy of drafting: only while it pays, as measured at run time, or in every step."""

PrefixReuse = Literal["none", "chunks", "tokens"]
"""Reuse of keys and values of earlier requests for prompts that begin with the same tokens:
``tokens`` reuses those of every token, also of answers. ``chunks`` reuses only those that equal,
bit for bit, the result of a new prefill: of whole prefill chunks of prompts or, with CPU kernels
and chunks of up to ``EXACT_CPU_CHUNK`` tokens, of every token."""

PrefixCache = Literal["auto", PrefixReuse]
"""Prefix reuse as a user asks for it: ``auto`` is ``tokens`` in a chat, else ``none``."""

FinishReason = Literal["eos", "stop", "length", "cancelled"]
"""Why a generation ended: end-of-sequence token, stop string, token limit, or cancellation."""

DEFAULT_CACHE_BYTES = 2**30
"""Bytes of KV cache that limit the default context."""

MIN_DEFAULT_SEQ_LEN = 4096
"""The minimum of the default context, in tokens, unless the model's own context is shorter."""

DEFAULT_NEW_TOKENS = 256
"""The most tokens of an answer if neither the caller nor the model's generation config sets a
limit."""

MAX_DRAFT_TOKENS = 256
"""The most tokens that ``EngineConfig.draft_tokens`` can draft for one step."""

OWN_ENGINE = "hotloop"
"""The value of ``EngineConfig.engine`` that is hotloop's own engine."""

MIN_PREFILL_CHUNK, MAX_PREFILL_CHUNK = 512, 8192
"""The default number of prompt tokens of one forward pass: the minimum, and with ``fused`` the
maximum, which is reduced if the device's memory is too small."""

EXACT_CPU_CHUNK = 64
"""The longest chunk whose tokens get the same bits from CPU kernels as in decode steps. Longer
chunks use PyTorch's attention, which is faster for them."""

MAX_DELTA_LN_PPL = 0.02
"""Increase of ln perplexity that a recommendation tolerates by default: 2 % more perplexity."""

MAX_ACCURACY_LOSS = 0.01
"""The non-inferiority margin of accuracy: the smallest loss that would matter, as a share of the
reference's accuracy. It is fixed before anything is measured."""

MAX_ANSWERS = 128
"""The most answers to one prompt that ``SamplingParams.n`` can ask for."""

MAX_GRAMMAR_BYTES = 256 * 2**10
"""The largest source of a grammar, in UTF-8."""

MAX_LOGPROBS = 20
"""The most alternatives per token that ``SamplingParams.logprobs`` can ask for."""


NESTED_DRAFTER = "self"
"""The drafter that uses the high planes of the model's own weights (``reference.split_planes``)."""


def exit_layers(draft: str) -> int | None:
    """Returns N of a value ``exit-N`` of ``EngineConfig.draft``; None for other values."""
    match = re.fullmatch(r"exit-(\d{1,9})", draft)
    return int(match[1]) if match else None


def self_scheme(draft: str) -> str | None:
    """Returns SCHEME of a value ``self-SCHEME`` of ``EngineConfig.draft``, and "" of ``self``.

    The result is None for other values.
    """
    if draft == NESTED_DRAFTER:
        return ""
    prefix, dash, scheme = draft.partition("-")
    return scheme if (prefix, dash) == ("self", "-") and scheme else None


def drafters(draft: str) -> tuple[str, ...]:
    """Returns the drafters that a value of ``EngineConfig.draft`` names; none for ``none``.

    Only drafters without another model can be combined, as in ``ngram+self-int4-g64``. Any other
    value is a draft model, whatever characters its path has.
    """
    parts = tuple(part.strip() for part in re.split("[+,]", draft))
    if all(map(_needs_no_model, parts)):
        return parts
    return () if draft == "none" else (draft,)


def _needs_no_model(drafter: str) -> bool:
    is_own = exit_layers(drafter) is not None or self_scheme(drafter) is not None
    return drafter == "ngram" or is_own


def is_draft_model(draft: str) -> bool:
    """Returns whether a value of ``EngineConfig.draft`` names a draft model."""
    return not all(map(_needs_no_model, drafters(draft)))


def draft_name(
    draft: str, quant: str, n_tokens: int, policy: str, assumed: float | None = None
) -> str:
    """Returns the name of a drafting configuration, such as ``ngram-4`` or ``llama-2-13b:int8-4``.

    The arguments are the fields ``draft``, ``draft_quant``, ``draft_tokens``, ``draft_policy`` and
    ``assume_acceptance`` of ``EngineConfig``.
    """
    if draft == "none":
        return "none"
    name = Path(draft).name
    if quant != "auto":
        name += f":{quant}"
    name += f"-{n_tokens}{'-always' if policy == 'always' else ''}"
    return name if assumed is None else f"{name}-assumed{assumed:g}"


@dataclass(frozen=True, kw_only=True)
class Lever:
    """The options, help and sweep values of a field of ``EngineConfig``.

    Command-line options, axes of a sweep's matrix, keys of recipes and help pages are made from it.

    Attributes:
        help: A sentence or two on its effect.
        group: The part of a help page that lists it; None if the command line has another option
            for it, or none.
        default: The default in words, if the field's own value does not show it.
        sweep: The values that a sweep tries by default, separated by commas; None for the default.
        alias: Another name of its option.
        names: The kind of names that it takes, if another module has the list.
        used: Returns whether it has an effect, by the other fields of a configuration; None if it
            always has.
    """

    help: str
    group: Literal["Model", "Execution", "Speculation"] | None = None
    default: str | None = None
    sweep: str | None = None
    alias: str | None = None
    names: Literal["scheme", "head", "engine"] | None = None
    used: Callable[[Mapping[str, Any]], bool] | None = None


def _is_other_engine(config: Mapping[str, Any]) -> bool:
    return config["engine"] != OWN_ENGINE


def _has_ranks(config: Mapping[str, Any]) -> bool:
    return config["tensor_parallel"] > 1


def _has_checkpoint(config: Mapping[str, Any]) -> bool:
    return config["weights"] == "checkpoint"


def _drafts(config: Mapping[str, Any]) -> bool:
    return config["draft"] != "none"


def _has_draft_model(config: Mapping[str, Any]) -> bool:
    return is_draft_model(config["draft"])


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The configuration of an engine.

    The same value drives ``generate``, ``chat``, ``serve``, ``bench``, ``eval`` and ``sweep``. Each
    field describes itself in its :class:`Lever`; see :func:`levers`.

    Attributes:
        model: A local path (folder or ``.gguf``), a pulled name, or a built-in shape's name.
    """

    model: str
    weights: Annotated[
        WeightSource,
        Lever(help="Source of weights. random needs no checkpoint: it shows speed and fit."),
    ] = "checkpoint"
    quant: Annotated[
        str,
        Lever(
            help="Weight quantization: auto keeps what the file has; none, int8, int8-gN (N 32, "
            "64 or 128), fp8, int4 (that is int4-g128), int4-gN, int4-gN-asym, or int4-gN-zp; "
            "-cal after an int4 scheme fits its scales to the model's activations.",
            group="Model",
            sweep="auto,int8,int4-g64",
            names="scheme",
        ),
    ] = "auto"
    head: Annotated[
        str,
        Lever(
            help="Quantization of the output head, and of an embedding tied to it. auto is int8 "
            "under any --quant but auto and none.",
            group="Model",
            names="head",
        ),
    ] = "auto"
    execution: Annotated[
        Execution,
        Lever(
            help="Plain PyTorch (eager), torch.compile (compile), or hotloop's CUDA kernels "
            "(fused). auto is fused if it runs here, else eager.",
            group="Execution",
            sweep="auto,compile",
        ),
    ] = "auto"
    tensor_parallel: Annotated[
        Count,
        Lever(
            help="The number of ranks that split every layer; on GPUs, each has one GPU.",
            group="Execution",
            alias="--tp",
        ),
    ] = 1
    all_reduce: Annotated[
        AllReduce,
        Lever(
            help="All-reduce backend of several ranks. auto is symm_mem on GPUs and shm (shared "
            "memory) on CPUs if it works, else nccl and gloo.",
            group="Execution",
            used=_has_ranks,
        ),
    ] = "auto"
    draft: Annotated[
        str,
        Lever(
            help="Speculative decoding: none; ngram, which looks drafts up in the text so far; "
            "exit-N, the model's first N layers; self, the model with only the high half of each "
            "weight (needs --quant int8-gN); self-SCHEME, the model in another scheme, such as "
            "self-int4-g128; several of these, as in ngram+self; or a smaller model with the same "
            "vocabulary.",
            group="Speculation",
        ),
    ] = "none"
    draft_quant: Annotated[
        str,
        Lever(
            help="Weight quantization of a draft model, like --quant.",
            group="Speculation",
            names="scheme",
            used=_has_draft_model,
        ),
    ] = "auto"
    draft_tokens: Annotated[
        int,
        Range(1, MAX_DRAFT_TOKENS),
        Lever(
            help="The most tokens that are drafted for one step.",
            group="Speculation",
            used=_drafts,
        ),
    ] = 4
    draft_policy: Annotated[
        DraftPolicy,
        Lever(
            help="Draft only while measurements show that it pays (adaptive), or in every step "
            "(always).",
            group="Speculation",
            used=_drafts,
        ),
    ] = "adaptive"
    assume_acceptance: Annotated[
        Annotated[float, Range(0, 1)] | None,
        Lever(
            help="With random weights: accept each draft with this probability, to measure the "
            "speed at this acceptance rate. Tables mark it as assumed.",
            group="Speculation",
            default="drafts are verified",
            used=_drafts,
        ),
    ] = None
    device: Annotated[
        str, Lever(help="Torch device, such as cpu or cuda:0.", group="Execution")
    ] = "auto"
    dtype: Annotated[
        DType, Lever(help="Element type of activations and unquantized weights.", group="Model")
    ] = "auto"
    max_batch_size: Annotated[
        Count, Lever(help="The most sequences that are decoded at once.", group="Execution")
    ] = 1
    max_seq_len: Annotated[
        Count | None,
        Lever(
            help="The most tokens of a sequence, prompt and answer together.",
            group="Execution",
            default="the model's context, limited to 1 GiB of KV cache but to no less than 4,096 "
            "tokens; in bench, eval and sweep the length that the measurement needs",
        ),
    ] = None
    prefill_chunk: Annotated[
        Count | None,
        Lever(
            help="The most prompt tokens in one forward pass.",
            group="Execution",
            default=f"{MIN_PREFILL_CHUNK}, with fused up to {MAX_PREFILL_CHUNK}",
        ),
    ] = None
    cache_packed: Annotated[
        bool,
        Lever(
            help="Store the packed weights in the cache folder. The next start reads them instead "
            "of the checkpoint.",
            group="Model",
            used=_has_checkpoint,
        ),
    ] = False
    prefix_cache: Annotated[
        PrefixCache,
        Lever(
            help="Reuse keys and values of earlier requests with the same first tokens. tokens "
            "reuses those of every token, answers included. chunks reuses only those that change "
            "no bit of an answer: of whole prefill chunks, or with CPU kernels and chunks of up to "
            f"{EXACT_CPU_CHUNK} tokens, of every token.",
            group="Execution",
            default="tokens in chat, else none",
        ),
    ] = "auto"
    seed: Annotated[Seed, Lever(help="Seed of random weights.")] = 0
    engine: Annotated[
        str,
        Lever(
            help="Engine that runs the model. Only the cells of a recipe choose one.",
            names="engine",
        ),
    ] = OWN_ENGINE
    checkpoint: Annotated[
        str | None,
        Lever(
            help="The same model in a form that another engine reads, such as an AWQ copy for vllm "
            "or a .gguf file for llama-cpp.",
            default="the model",
            used=_is_other_engine,
        ),
    ] = None
    url: Annotated[
        str | None,
        Lever(
            help="The server of the engine endpoint, such as http://localhost:8000/v1; "
            "#NAME after it chooses one of several models.",
            default="none",
            used=_is_other_engine,
        ),
    ] = None

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        for name in ("checkpoint", "url"):
            if self.engine == OWN_ENGINE and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} {shorten_value(getattr(self, name))} is for other engines than "
                    f"{OWN_ENGINE}: leave it out, or name the engine."
                )

    @property
    def name(self) -> str:
        """A short, sortable name of non-default fields, such as ``int4-g64/compile``."""
        own = self.engine == OWN_ENGINE
        parts = [] if own else [self.engine]
        if own or (self.quant, self.head) != ("auto", "auto"):
            parts.append(self.quant if self.head == "auto" else f"{self.quant}+head={self.head}")
        if own or self.execution != "auto":
            parts.append(self.execution)
        if self.tensor_parallel != 1:
            parts.append(f"tp{self.tensor_parallel}")
        if self.all_reduce != "auto":
            parts.append(self.all_reduce)
        if self.draft != "none":
            parts.append(f"draft={self.draft_name}")
        if self.dtype != "auto":
            parts.append(self.dtype)
        if self.max_batch_size != 1:
            parts.append(f"batch{self.max_batch_size}")
        return "/".join(parts)

    @property
    def source(self) -> str:
        """The model's checkpoint, in the form that the engine reads."""
        return self.checkpoint or self.model

    @property
    def draft_name(self) -> str:
        """The name of the drafting configuration; see :func:`draft_name`."""
        drafting = self.draft, self.draft_quant, self.draft_tokens, self.draft_policy
        return draft_name(*drafting, self.assume_acceptance)

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields, as JSON can hold them."""
        return asdict(self)


def levers() -> dict[str, Lever]:
    """Returns the levers of ``EngineConfig`` by name, in its order of fields."""
    hints = get_type_hints(EngineConfig, include_extras=True)
    return {
        name: extra
        for name, hint in hints.items()
        for extra in getattr(hint, "__metadata__", ())
        if isinstance(extra, Lever)
    }


GrammarKind = Literal["json_object", "json_schema", "regex", "lark"]
"""Kind of a grammar: any JSON object, a JSON schema, a regular expression (Rust's syntax, of the
whole answer), or a context-free grammar in llguidance's variant of Lark."""


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """A grammar that an answer must follow.

    An engine refuses a grammar that is invalid, or that it cannot enforce, before it generates
    anything.

    Attributes:
        kind: Its kind.
        source: Its text; a JSON schema may be a mapping, too. Empty for ``json_object``.
    """

    kind: GrammarKind
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind == "json_schema" and isinstance(self.source, Mapping):
            object.__setattr__(self, "source", _as_json(self.source))
        check_fields(self, RequestError)
        if (self.kind == "json_object") != (self.source == ""):
            raise RequestError(
                f"a grammar of kind {self.kind} needs a source."
                if self.source == ""
                else "a grammar of kind json_object has no source: json_schema has one."
            )
        if (size := len(self.source.encode("utf-8", "surrogatepass"))) > MAX_GRAMMAR_BYTES:
            raise RequestError(
                f"the grammar has {size:,} bytes, but at most {MAX_GRAMMAR_BYTES:,} are allowed."
            )


def _as_json(schema: Mapping[str, Any]) -> str:
    try:
        return json.dumps(schema, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the JSON schema cannot be written as JSON: {error}.") from error


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Rules for choosing the next token, and for stopping.

    The order is: grammar, logit bias, repetition penalty, frequency and presence penalty, minimum
    length, temperature, top-k, top-p, min-p, draw. The draw depends on the seed, the position and
    the logits alone, never on which other sequences are in the batch.

    Attributes:
        max_new_tokens: The most tokens to produce. A number that exceeds the room left in the
            context is refused. None takes the number that the model's own generation config
            suggests, or ``DEFAULT_NEW_TOKENS``, limited to the room left in the context.
        min_new_tokens: End-of-sequence tokens cannot be selected before this many tokens. Stop
            strings still end the answer.
        n: Answers to each prompt. Answer i is drawn with the seed + i; without a seed each answer
            has a fresh one.
        temperature: Divides the logits; 0 always takes the most likely token.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the fewest most likely tokens whose probabilities reach this sum.
        min_p: Keep tokens at least this fraction as likely as the most likely one.
        repetition_penalty: Divides positive and multiplies negative logits of tokens that are
            already in the prompt or the answer (Keskar et al. 2019, CTRL); 1 does nothing.
        presence_penalty: A number that is subtracted from the logits of tokens in the answer.
        frequency_penalty: A number that is subtracted from a token's logit once for each time that
            the token is in the answer.
        logit_bias: Pairs, or a mapping, of token ids and numbers that are added to their logits;
            -100 in effect bans a token.
        seed: Seed of the draw; None takes a fresh one.
        stop: A string that ends the answer, or several. Neither a stop string nor a part of one is
            ever emitted.
        ignore_eos: Continue after end-of-sequence tokens, as timed runs do.
        logprobs: Return the log-probability of each token, and the log-probabilities of this many
            most likely tokens at its position, by the model's distribution before any of the
            options above; None returns neither.
        visible_tokens: Control tokens, by their spelling, to include in the answer's text. The text
            leaves out all other control tokens. Tokens that the vocabulary lacks have no effect.
        grammar: The grammar that the answer follows. Only tokens that the grammar allows can be
            selected, and at the end of the grammar only end-of-sequence tokens. An answer that is
            cut off by ``max_new_tokens`` or a stop string may be incomplete: some continuation of
            it follows the grammar.
        speculate: Draft for this answer, if the engine has a drafter. It changes no token.
    """

    max_new_tokens: Count | None = None
    min_new_tokens: Annotated[int, Range(0, MAX_COUNT, "0 or more")] = 0
    n: Annotated[int, Range(1, MAX_ANSWERS)] = 1
    temperature: Annotated[float, Range(0, 1e30, "0 or more")] = 0.0
    top_k: Annotated[int, Range(0, MAX_COUNT, "0 (off) or more")] = 0
    top_p: Annotated[float, Range(0, 1, "above 0 and at most 1", open=True)] = 1.0
    min_p: Annotated[float, Range(0, 1)] = 0.0
    repetition_penalty: Annotated[float, Range(0.001, 1000)] = 1.0
    presence_penalty: Annotated[float, Range(-100, 100)] = 0.0
    frequency_penalty: Annotated[float, Range(-100, 100)] = 0.0
    logit_bias: Annotated[tuple[tuple[int, float], ...], Range(-100, 100)] = ()
    seed: Seed | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: Annotated[int, Range(0, MAX_LOGPROBS)] | None = None
    visible_tokens: tuple[str, ...] = ()
    grammar: Grammar | None = None
    speculate: bool = True

    def __post_init__(self) -> None:
        check_fields(self, RequestError)
        for name in ("ignore_eos", "min_new_tokens"):
            if self.grammar is not None and getattr(self, name):
                raise RequestError(
                    f"{name} contradicts a grammar, which decides where the answer can end: leave "
                    "one of them out."
                )

    @property
    def greedy(self) -> bool:
        """True if the most likely token is always taken."""
        return self.temperature == 0

    @property
    def adjusts_logits(self) -> bool:
        """True if an option changes logits before any token is selected."""
        penalties = self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty
        return any(penalties) or bool(self.logit_bias) or self.min_new_tokens > 0


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """One token's log-probability (natural logarithm) and the most likely alternatives.

    ``top`` holds ``(token id, log-probability)`` pairs, most likely first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of one request, in seconds since it was submitted.

    Attributes:
        n_tokens: Tokens produced, counted by the engine.
        ttft_s: Submit to the first token on the host: tokenizing, queueing, prefill and sampling.
        e2e_s: Submit to the last token on the host.
        queue_s: Submit to the first chunk of prefill: tokenizing and waiting for a seat.
    """

    n_tokens: int
    ttft_s: float
    e2e_s: float
    queue_s: float = 0.0

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first.

        NaN if it is unknown: for a single token, and if all tokens arrived together, as from a
        server behind a proxy that buffers.
        """
        if self.n_tokens < 2 or self.e2e_s == self.ttft_s:
            return math.nan
        return (self.e2e_s - self.ttft_s) / (self.n_tokens - 1)

    @property
    def decode_tok_s(self) -> float:
        """Tokens per second after the first one: 1 / TPOT; NaN where that is."""
        return 1 / self.tpot_s

    @property
    def e2e_tok_s(self) -> float:
        """All tokens over the whole time, prefill included."""
        return self.n_tokens / self.e2e_s


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """Drafting statistics of one request, or of several together.

    A step gives a request one token, and one more for each draft before the first rejected draft.

    Attributes:
        n_steps: Steps that decoded the request.
        n_plain_steps: Steps without drafts, among these.
        n_tokens: Tokens that the steps produced.
        proposed: Drafts made at each draft position.
        accepted: Drafts accepted at each draft position.
        draft_s: Seconds that the device spent making drafts.
        verify_s: Seconds that the device spent in the model, in steps with and without drafts. It
            includes the time of drafting where one program runs several steps with drafts.
    """

    n_steps: int = 0
    n_plain_steps: int = 0
    n_tokens: int = 0
    proposed: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    draft_s: float = 0.0
    verify_s: float = 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens kept per step; NaN without steps."""
        return self.n_tokens / self.n_steps if self.n_steps else math.nan

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Acceptance rate at each draft position; NaN where there were no drafts."""
        return tuple(
            kept / made if made else math.nan
            for made, kept in zip(self.proposed, self.accepted, strict=True)
        )

    def __add__(self, other: Speculation) -> Speculation:
        """Returns the sum of both."""
        return Speculation(
            n_steps=self.n_steps + other.n_steps,
            n_plain_steps=self.n_plain_steps + other.n_plain_steps,
            n_tokens=self.n_tokens + other.n_tokens,
            proposed=_add_positions(self.proposed, other.proposed),
            accepted=_add_positions(self.accepted, other.accepted),
            draft_s=self.draft_s + other.draft_s,
            verify_s=self.verify_s + other.verify_s,
        )


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Device time of one step with k drafts for each row: medians over steps.

    Attributes:
        k: Drafts for each row; 0 in a plain step.
        n_steps: Steps that were timed.
        draft_s: Seconds to make the drafts.
        verify_s: Seconds in the model, which verifies them.
    """

    k: int
    n_steps: int
    draft_s: float
    verify_s: float


def _add_positions(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x + y for x, y in itertools.zip_longest(a, b, fillvalue=0))


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The answer to one prompt.

    Attributes:
        prompt_ids: The tokens of the prompt.
        token_ids: The tokens produced, an end-of-sequence token included. The timing counts these.
        text: The text of the answer, without the stop string.
        finish_reason: Why the answer ended.
        timing: Times of the request.
        logprobs: Log-probabilities of the tokens; None if the request wants none.
        speculation: Drafting statistics; None without a drafter.
        cached_tokens: Tokens of the prompt that the prefix cache held, which were not prefilled.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    timing: Timing
    logprobs: tuple[TokenLogprob, ...] | None = None
    speculation: Speculation | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A piece of a streamed answer.

    Attributes:
        index: Index of the answer. With ``SamplingParams.n`` answers to each prompt, answer j to
            prompt i has the index i × n + j; with one, this is the index of the prompt.
        text: Text that later tokens cannot change. It is empty while a character is incomplete, or
            while the text may be the beginning of a stop string.
        token_ids: The tokens of this piece.
        logprobs: Their log-probabilities; None if the request wants none.
        generation: The whole answer; only the last piece of each answer has it.
        n_accepted: The number of accepted drafts, which are the first of the tokens.
        n_accepted_chars: The number of characters that the accepted drafts added, which are the
            first of the text.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    generation: Generation | None = None
    n_accepted: int = 0
    n_accepted_chars: int = 0


@dataclass(frozen=True, kw_only=True)
class Score:
    """A model's predictions on one window of T tokens: T - 1 of them.

    Attributes:
        token_logprobs: Natural log-probability of each token after the first, float32 [T - 1].
        top1: The most likely token at each position, int64 [T - 1].
        top1_logprobs: Its log-probability, float32 [T - 1]; None from an engine without it.
        log_probs: The whole distribution, float32 [T - 1, V], if it was requested and the engine
            returns it.
        top: The ids, int64 [T - 1, K], and log-probabilities, float32 [T - 1, K], of the K most
            likely tokens, if they were requested, or if the engine returns no more.
    """

    token_logprobs: Tensor
    top1: Tensor
    top1_logprobs: Tensor | None = None
    log_probs: Tensor | None = None
    top: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class EngineDescription:
    """A running engine: what its configuration was resolved to, and its sizes and load times.

    Attributes:
        config: The configuration as requested.
        family: The model family, or the baseline's own name of it.
        device: The torch device in use.
        device_name: The device's own name.
        dtype: Element type of activations.
        execution: The execution mode; None for an engine without one.
        vocab_size: Token ids are below this.
        max_seq_len: Tokens that a seat can hold.
        n_params: Parameters of the model, a tied embedding counted once. This and the bytes are
            None if another engine does not report them.
        weight_bytes: Bytes of weights resident on one rank.
        weight_bytes_per_step: Bytes of weights one decode step reads on one rank: embedding rows
            that are not read do not count, a tied head does.
        kv_bytes_per_token: Bytes of cache one token of one sequence takes on one rank.
        kernels: The kernel of each kind of layer, such as ``{"qkv_proj": "int8/torch"}``.
        notes: Why a faster path was not taken, and other notes for readers of results.
        load_s: Seconds from start to weights in place.
        warmup_s: Seconds of compilation, capture and first runs after that.
        read_bytes: Bytes of weights that rank 0 read from files; None where it read none.
        read_s: Seconds from the first of these bytes to all weights in place, a part of ``load_s``.
        compile_cache: ``warm`` if compiled artifacts were found in the cache, ``cold`` if they were
            made; None if none are used.
        version: Name and version of the engine, if it is not hotloop's own.
        settings: Its settings, by its own names.
        bos_id: The token that begins a text, whether or not the tokenizer adds it.
        adds_bos: The model's own tokenizer puts it before a text. ``encode`` does not.
        eos_ids: Tokens that end an answer, the tokenizer's own end-of-sequence token first.
    """

    config: EngineConfig
    family: str
    device: str
    device_name: str
    dtype: str
    vocab_size: int
    max_seq_len: int
    n_params: int | None
    weight_bytes: int | None
    weight_bytes_per_step: int | None
    kv_bytes_per_token: int | None
    kernels: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    load_s: float = 0.0
    warmup_s: float = 0.0
    read_bytes: int | None = None
    read_s: float | None = None
    compile_cache: Literal["cold", "warm"] | None = None
    execution: StepExecution | None = None
    version: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    bos_id: int | None = None
    adds_bos: bool = False
    eos_ids: tuple[int, ...] = ()

    @property
    def load_gb_s(self) -> float | None:
        """GB of weights that rank 0 read and put in place per second; None if it read none."""
        if self.read_bytes is None or not self.read_s:
            return None
        return self.read_bytes / self.read_s / 1e9

    @property
    def name(self) -> str:
        """The configuration's name, with the actual execution mode in place of ``auto``."""
        return replace(self.config, execution=self.execution or self.config.execution).name


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Predicted bytes by purpose, and free bytes; for several ranks, of the largest rank.

    Attributes:
        weights_bytes: Exact bytes of the resident weights, a drafter's included.
        cache_bytes: Exact bytes of the KV cache.
        workspace_bytes: An upper estimate of the further bytes of a forward pass: the activations
            of a prefill chunk, its logits when it is scored, and the largest dequantized matrix.
        device: The device that holds the model.
        free_bytes: Free bytes of that device.
        draft_bytes: The part of ``weights_bytes`` that only a drafter needs.
    """

    weights_bytes: int
    cache_bytes: int
    workspace_bytes: int
    device: str
    free_bytes: int
    draft_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Weights, cache and workspace together."""
        return self.weights_bytes + self.cache_bytes + self.workspace_bytes

    def to_dict(self) -> dict[str, int]:
        """Returns the byte counts, total included, for records."""
        counts = {k: v for k, v in asdict(self).items() if k != "device"}
        return counts | {"total_bytes": self.total_bytes}


@dataclass(frozen=True, kw_only=True)
class ChatPrompt:
    """A conversation up to where the model's answer begins, made by ``Tokenizer.chat_prompt``.

    Attributes:
        token_ids: The conversation, control tokens included.
        starts_text: The answer is a message of its own: it begins without the space that
            SentencePiece puts before a text. False where it continues a message.
    """

    token_ids: tuple[int, ...]
    starts_text: bool = True

    def __len__(self) -> int:
        return len(self.token_ids)


Prompt = str | Sequence[int] | ChatPrompt
"""Text, which is tokenized with the special tokens that the model itself adds; token ids, which are
used as they are; or a conversation. An answer to text or token ids continues the prompt: prompt and
answer are one text."""


class PeakMemory(Protocol):
    """The measurement of an engine's meter, once its block has ended."""

    @property
    def peak_bytes(self) -> int | None:
        """Bytes at the peak; for several ranks, the maximum. None if not known."""
        ...


@runtime_checkable
class DraftingEngine(Protocol):
    """An engine that can time its steps by their number of drafts."""

    def step_costs(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> tuple[StepCost, ...]:
        """Times steps of every number of drafts that it uses, 0 included, over these prompts.

        Numbers of drafts without a timed step are left out.
        """
        ...


class Engine(Protocol):
    """Anything that can be measured: hotloop's own engine, and every baseline.

    ``bench`` and ``evaluate`` use only this protocol, so a baseline is measured by the same code as
    hotloop.
    """

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Generation]:
        """Answers every prompt, in order.

        Raises:
            RequestError: A prompt cannot be served.
        """
        ...

    def score(
        self,
        windows: Iterable[Sequence[int]],
        *,
        full: bool = False,
        share_prefixes: bool = False,
    ) -> Iterator[Score]:
        """Scores windows of token ids, in their order.

        Args:
            windows: The windows.
            full: Also return the whole distribution at each position. This does not change a bit
                of the other scores.
            share_prefixes: The engine may compute the beginning that consecutive windows have in
                common once, which may change the rounding of scores.
        """
        ...

    def encode(self, text: str) -> list[int]:
        """Tokenizes plain text, with no special tokens added."""
        ...

    def describe(self) -> EngineDescription:
        """Describes the engine that runs."""
        ...

    def meter(self) -> AbstractContextManager[PeakMemory]:
        """Measures the memory of the ``with`` block it manages, wherever the engine runs."""
        ...

    def close(self) -> None:
        """Frees the memory on the device. The engine cannot be used afterwards."""
        ...
