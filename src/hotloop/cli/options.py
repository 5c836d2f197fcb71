"""Options that several verbs share: one class for each value of ``types`` that they make.

Defaults are those of that value; a test holds every field of it to have an option. An option whose
default is None leaves the choice to the model or the device.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter, Token

from hotloop.errors import ConfigError, shorten_value
from hotloop.types import (
    LEAST_PREFILL_CHUNK,
    MOST_PREFILL_CHUNK,
    AllReduce,
    DraftPolicy,
    DType,
    EngineConfig,
    Execution,
    SamplingParams,
    WeightSource,
)

PROMPT = Group("Prompt", sort_key=0)
MODEL = Group("Model", sort_key=1)
MATRIX = Group("Matrix", sort_key=2, help="Every combination is measured; separate by commas.")
EXECUTION = Group("Execution", sort_key=3)
SPECULATION = Group("Speculation", sort_key=4)
SAMPLING = Group("Sampling", sort_key=5)
WORKLOAD = Group("Workload", sort_key=6)
QUALITY = Group("Quality", sort_key=7)
OUTPUT = Group("Output", sort_key=8)


def option(group: Group, text: str, default: str | None = None, **more: Any) -> Parameter:
    """A parameter's help, with its default in words where the value does not say it."""
    if default is not None:
        more["show_default"] = default
    return Parameter(group=group, help=text, **more)


def integer(group: Group, text: str, default: str | None = None, **more: Any) -> Parameter:
    """The parameter of a whole number. cyclopts alone would round 1.5."""
    return option(group, text, default, converter=_whole, **more)


def _whole(_type: object, tokens: Sequence[Token]) -> int:
    (token,) = tokens
    try:
        return int(token.value)
    except ValueError:
        raise ValueError(f"{shorten_value(token.value)} is not a whole number.") from None


Model = Annotated[
    str, option(MODEL, "A folder, a .gguf file, a pulled name, or a built-in shape's name.")
]
Dtype = Annotated[DType, option(MODEL, "Element type of activations and of unquantized weights.")]
Tolerance = Annotated[
    float, option(QUALITY, "The increase of ln perplexity that a recommendation tolerates.")
]
Json = Annotated[bool, option(OUTPUT, "Print JSON instead of text for people.")]


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Options of a verb that belong together."""

    def given(self) -> dict[str, Any]:
        """Those that differ from their defaults."""
        values = ((field, getattr(self, field.name)) for field in fields(self))
        return {field.name: value for field, value in values if value != field.default}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DeviceOptions(_Options):
    """Where an engine runs and what it makes room for: a part of ``EngineConfig``."""

    device: Annotated[str, option(EXECUTION, "A torch device such as cpu or cuda:0.")] = (
        EngineConfig.device
    )
    max_seq_len: Annotated[
        int | None,
        integer(
            EXECUTION,
            "Tokens a sequence can hold, prompt and answer.",
            "the model's, cut to 1 GiB of cache but not below 4,096; or what is measured",
        ),
    ] = EngineConfig.max_seq_len
    max_batch_size: Annotated[int, integer(EXECUTION, "Sequences decoded at once.")] = (
        EngineConfig.max_batch_size
    )
    prefill_chunk: Annotated[
        int | None,
        integer(
            EXECUTION,
            "The most prompt tokens in one forward.",
            f"{LEAST_PREFILL_CHUNK}, with fused up to {MOST_PREFILL_CHUNK}",
        ),
    ] = EngineConfig.prefill_chunk


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DraftOptions(DeviceOptions):
    """Those, and how drafts are made, whoever makes them."""

    draft_quant: Annotated[str, option(SPECULATION, "Weights of a draft model, as --quant.")] = (
        EngineConfig.draft_quant
    )
    draft_tokens: Annotated[int, integer(SPECULATION, "The most tokens drafted for one step.")] = (
        EngineConfig.draft_tokens
    )
    draft_policy: Annotated[
        DraftPolicy, option(SPECULATION, "Draft where it pays, as measured, or in every step.")
    ] = EngineConfig.draft_policy


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class EngineOptions(DraftOptions):
    """One engine: ``EngineConfig`` but for the model and where its weights are from."""

    quant: Annotated[
        str, option(MODEL, "Weights: none, int8, fp8, int4-gN (N 32, 64 or 128), or int4-gN-asym.")
    ] = EngineConfig.quant
    head: Annotated[
        str, option(MODEL, "The output head: a scheme, or auto, int8 if anything is quantized.")
    ] = EngineConfig.head
    dtype: Dtype = EngineConfig.dtype
    execution: Annotated[
        Execution,
        option(
            EXECUTION,
            "Plain PyTorch (eager), torch.compile (compile), or CUDA kernels of our own (fused). "
            "auto is fused where that runs, else eager.",
        ),
    ] = EngineConfig.execution
    tensor_parallel: Annotated[
        int, integer(EXECUTION, "Ranks that share every layer, one GPU each.", alias="--tp")
    ] = EngineConfig.tensor_parallel
    all_reduce: Annotated[
        AllReduce,
        option(EXECUTION, "What GPUs add up on. auto is symm_mem where that works, else nccl."),
    ] = EngineConfig.all_reduce
    draft: Annotated[
        str,
        option(
            SPECULATION,
            "Who drafts: ngram, looking up the text so far; exit-N, the first N layers; or a "
            "smaller model of the same vocabulary.",
        ),
    ] = EngineConfig.draft

    def config(self, model: str) -> EngineConfig:
        """The configuration of ``model`` read from its checkpoint."""
        return EngineConfig(model=model, **asdict(self))


DEFAULT_SCHEMES = "none,int8,int4-g64"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class MatrixOptions(DraftOptions):
    """Many engines: each option with commas is an axis of the matrix."""

    quant: Annotated[
        str | None,
        option(
            MATRIX,
            "Schemes: none, int8, fp8, int4-gN, int4-gN-asym.",
            f"{DEFAULT_SCHEMES}; a quantized copy's own",
        ),
    ] = None
    head: Annotated[str, option(MATRIX, "Schemes of the output head.")] = EngineConfig.head
    execution: Annotated[str, option(MATRIX, "Of auto, eager, compile and fused.")] = "auto,compile"
    tensor_parallel: Annotated[
        str, option(MATRIX, "Ranks that share every layer, such as 1,2,4.", alias="--tp")
    ] = str(EngineConfig.tensor_parallel)
    all_reduce: Annotated[
        str, option(MATRIX, "What several GPUs add up on: of auto, nccl and symm_mem.")
    ] = EngineConfig.all_reduce
    draft: Annotated[str, option(MATRIX, "Of none, ngram, exit-N and draft models.")] = (
        EngineConfig.draft
    )
    dtype: Annotated[str, option(MATRIX, "Of auto, float32, bfloat16 and float16.")] = (
        EngineConfig.dtype
    )

    def matrix(self) -> dict[str, list[Any]]:
        """The values of each axis."""
        said = {axis: getattr(self, axis) for axis in _AXES}
        axes: dict[str, list[Any]] = {a: listed(v) for a, v in said.items() if v is not None}
        axes["tensor_parallel"] = [int(n) if n.isdecimal() else n for n in axes["tensor_parallel"]]
        return axes

    def defaults(self) -> dict[str, Any]:
        """The fields that are the same for all engines, where they were given."""
        return {name: value for name, value in self.given().items() if name not in _AXES}


def listed(text: str) -> list[str]:
    """The values of an option that takes several; spaces around a value mean nothing."""
    return [value.strip() for value in text.split(",")]


_AXES = ("quant", "head", "execution", "tensor_parallel", "all_reduce", "draft", "dtype")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class WeightOptions(_Options):
    """Measuring without a checkpoint: random weights of a model's shape."""

    weights: Annotated[
        WeightSource | None,
        option(MODEL, "random needs no checkpoint: it shows speed and fit.", EngineConfig.weights),
    ] = None
    shape: Annotated[
        str | None,
        option(MODEL, "Instead of MODEL, for random weights: a built-in shape (hotloop info)."),
    ] = None
    weights_seed: Annotated[int, integer(MODEL, "Seed of random weights.")] = EngineConfig.seed

    def model(self, model: str | None) -> str:
        """The name of the model, whether it was given as MODEL or as ``--shape``.

        Raises:
            ConfigError: Neither or both are given, there is no such shape, or it is without random
                weights.
        """
        from hotloop.models.shapes import SHAPES, shape

        name = model if self.shape is None else self.shape
        if name is None or None not in (model, self.shape):
            raise ConfigError("give either MODEL or --shape NAME.")
        if self.shape is not None:
            shape(self.shape)
        is_shape = self.shape is not None or (name in SHAPES and not Path(name).exists())
        if is_shape and self.weights != "random":
            raise ConfigError(f"{name!r} is only a shape, without weights: add --weights random.")
        return name


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ReplacementOptions(_Options):
    """Other models than a recipe's: see ``sweep.recipe.replace_models``."""

    model: Annotated[str | None, option(MODEL, "With a recipe: in place of its model.")] = None
    draft_model: Annotated[
        str | None, option(MODEL, "With a recipe: in place of its draft model.")
    ] = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TemplateOptions(_Options):
    """How a conversation becomes a prompt."""

    chat_template: Annotated[
        Path | None, option(PROMPT, "A Jinja file in place of the model's own chat template.")
    ] = None
    template_arg: Annotated[
        tuple[str, ...],
        option(
            PROMPT,
            "NAME=VALUE for the chat template, such as enable_thinking=false. VALUE is JSON, or "
            "else text. Can be repeated.",
        ),
    ] = ()

    def variables(self) -> dict[str, Any]:
        """The template's variables, by name.

        Raises:
            ConfigError: An argument is not ``NAME=VALUE``, or its name cannot be given.
        """
        variables: dict[str, Any] = {}
        for argument in self.template_arg:
            name, equals, value = argument.partition("=")
            if not equals or not name.isidentifier():
                raise ConfigError(
                    f"--template-arg {shorten_value(argument)}: give NAME=VALUE, such as "
                    "enable_thinking=false."
                )
            if name in _NOT_VARIABLES or name in variables:
                problem = "is given twice" if name in variables else "is not for you to set"
                raise ConfigError(f"--template-arg {shorten_value(argument)}: {name} {problem}.")
            variables[name] = _json_or_text(value)
        return variables


_NOT_VARIABLES = ("messages", "add_generation_prompt", "continue_final_message")


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value, parse_constant=_not_json, parse_float=_finite)
    except json.JSONDecodeError:
        return value
    except (RecursionError, ValueError) as error:  # nested too deep, a number too large
        raise ConfigError(
            f"--template-arg: the value {shorten_value(value)} cannot be read: {error}."
        ) from error


def _not_json(constant: str) -> float:
    """Refuses NaN and Infinity, which Python takes and JSON does not have."""
    raise json.JSONDecodeError("not JSON", constant, 0)


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {shorten_value(digits)} is too large")
    return number


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SamplingOptions(_Options):
    """How to sample: ``SamplingParams``, where None keeps the model's own default."""

    max_new_tokens: Annotated[
        int | None,
        integer(SAMPLING, "The most tokens to produce.", "see above", alias="-n"),
    ] = None
    temperature: Annotated[
        float | None,
        option(SAMPLING, "0 takes the most likely token, always.", "the model's own, or 0"),
    ] = None
    top_k: Annotated[int | None, integer(SAMPLING, "Keep the k most likely tokens; 0: all.")] = None
    top_p: Annotated[
        float | None, option(SAMPLING, "Keep the fewest tokens whose probabilities reach this sum.")
    ] = None
    min_p: Annotated[
        float | None,
        option(SAMPLING, "Keep tokens at least this fraction as likely as the likeliest."),
    ] = None
    repetition_penalty: Annotated[
        float | None, option(SAMPLING, "Above 1, tokens seen before become less likely.")
    ] = None
    seed: Annotated[
        int | None, integer(SAMPLING, "Makes the answer reproducible.", "a fresh one each time")
    ] = None
    stop: Annotated[
        tuple[str, ...], option(SAMPLING, "Text that ends the answer; can be repeated.")
    ] = ()
    ignore_eos: Annotated[bool, option(SAMPLING, "Go on past the end of the answer.")] = False
    logprobs: Annotated[
        int | None,
        integer(SAMPLING, "With --json: log-probabilities, with this many alternatives."),
    ] = None

    def check(self, *, json: bool) -> None:
        """Refuses values that no model can use, before one is loaded.

        Raises:
            ConfigError: Log-probabilities are asked for where they are not printed.
            RequestError: A value is none.
        """
        if self.logprobs is not None and not json:
            raise ConfigError("--logprobs: only --json prints log-probabilities. Add --json.")
        self.params(SamplingParams())

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """The model's ``defaults``, changed by what was given."""
        return replace(defaults, **self.given())


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class WorkloadOptions(_Options):
    """What to time: ``bench.record.Workload``."""

    prompt_tokens: Annotated[int, integer(WORKLOAD, "Tokens in each prompt.")] = 128
    new_tokens: Annotated[int, integer(WORKLOAD, "Tokens decoded for each, whatever they say.")] = (
        128
    )
    batch: Annotated[int, integer(WORKLOAD, "Prompts at once.")] = 1
    repeats: Annotated[int, integer(WORKLOAD, "Timed runs, after one that is not.")] = 5
    workload_seed: Annotated[int, integer(WORKLOAD, "Seed of the prompts.")] = 0

    def fields(self) -> dict[str, int]:
        """The fields of ``Workload``."""
        values = asdict(self)
        values["seed"] = values.pop("workload_seed")
        return values


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class QualityOptions(_Options):
    """On what to score: ``sweep.recipe.QualityOptions``."""

    text: Annotated[
        Path | None,
        option(QUALITY, "A UTF-8 text to predict.", "the help topics that come with Python"),
    ] = None
    window: Annotated[int, integer(QUALITY, "Tokens in a window of the text.")] = 512
    n_windows: Annotated[int, integer(QUALITY, "The most windows to score.")] = 16
    reference: Annotated[
        str | None,
        option(
            QUALITY,
            "The unquantized model to compare with.",
            "the model itself, or what a quantized copy was made from",
        ),
    ] = None

    def fields(self) -> dict[str, Any]:
        """The fields of that other ``QualityOptions``."""
        return asdict(self)


DEFAULT_DEVICE = DeviceOptions()
DEFAULT_ENGINE = EngineOptions()
DEFAULT_MATRIX = MatrixOptions()
DEFAULT_WEIGHTS = WeightOptions()
DEFAULT_REPLACEMENT = ReplacementOptions()
DEFAULT_TEMPLATE = TemplateOptions()
DEFAULT_SAMPLING = SamplingOptions()
DEFAULT_WORKLOAD = WorkloadOptions()
DEFAULT_QUALITY = QualityOptions()
DEFAULT_TOLERANCE = 0.02
