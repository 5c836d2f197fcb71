"""Options that several commands share, with one class for each type of ``types`` that they make.

Options of an engine are made from the levers of ``EngineConfig``. Other options are written here; a
test checks that every field has an option. With a default of None, the model or the device decides.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter, Token

from hotloop.errors import ConfigError, shorten_value
from hotloop.types import (
    EXACT_CPU_CHUNK,
    MAX_GRAMMAR_BYTES,
    MIN_PREFILL_CHUNK,
    EngineConfig,
    Grammar,
    GrammarKind,
    Lever,
    SamplingParams,
    WeightSource,
    levers,
)

PROMPT = Group("Prompt", sort_key=0)
MODEL = Group("Model", sort_key=1)
MATRIX = Group(
    "Matrix",
    sort_key=2,
    help="Each takes several values, separated by commas; every combination is measured.",
)
EXECUTION = Group("Execution", sort_key=3)
SPECULATION = Group("Speculation", sort_key=4)
SAMPLING = Group("Sampling", sort_key=5)
WORKLOAD = Group("Workload", sort_key=6)
QUALITY = Group("Quality", sort_key=7)
SERVER = Group("Server", sort_key=8)
OUTPUT = Group("Output", sort_key=9)


def option(group: Group, text: str, default: str | None = None, **more: Any) -> Parameter:
    """Makes the parameter of an option.

    Args:
        group: The part of the help page that lists it.
        text: Its help.
        default: Its default in words, if the value does not show it.
        more: Further arguments of ``Parameter``.
    """
    if default is not None:
        more["show_default"] = default
    return Parameter(group=group, help=text, **more)


def integer(group: Group, text: str, default: str | None = None, **more: Any) -> Parameter:
    """Makes the parameter of an option that is a whole number; cyclopts alone would round 1.5."""
    return option(group, text, default, converter=_whole, **more)


def _whole(_type: object, tokens: Sequence[Token]) -> int:
    (token,) = tokens
    try:
        return int(token.value)
    except ValueError:
        raise ValueError(f"{shorten_value(token.value)} is not a whole number.") from None


LEVERS = levers()

_HINTS = get_type_hints(EngineConfig)
_GROUPS = {"Model": MODEL, "Execution": EXECUTION, "Speculation": SPECULATION}


def lever_option(name: str, text: str | None = None, default: str | None = None) -> Parameter:
    """Makes the parameter of a field of ``EngineConfig``, from its ``Lever``.

    Args:
        name: The field.
        text: The help, if a command takes other values; None for the lever's help.
        default: The default in words, if a command has another; None for the lever's default.
    """
    lever = LEVERS[name]
    make = integer if _is_number(name) else option
    words = default or lever.default
    return make(_GROUPS[lever.group or "Model"], text or lever.help, words, **_alias(lever))


def _is_number(name: str) -> bool:
    return int in (_HINTS[name], *get_args(_HINTS[name]))


def _is_real_number(name: str) -> bool:
    return float in get_args(_HINTS[name])


def _alias(lever: Lever) -> dict[str, Any]:
    return {} if lever.alias is None else {"alias": lever.alias}


def _with_choices(name: str) -> str:
    """Returns the help of a lever with several values, with the choices if they are few."""
    if get_origin(_HINTS[name]) is not Literal:
        return LEVERS[name].help
    return f"{LEVERS[name].help} Of {', '.join(get_args(_HINTS[name]))}."


Model = Annotated[str, option(MODEL, "A folder, a .gguf file, or the name of a pulled model.")]
Tolerance = Annotated[
    float, option(QUALITY, "Increase of ln perplexity that a recommendation tolerates.")
]
Json = Annotated[bool, option(OUTPUT, "Print JSON instead of text for people.")]


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Options of a command, as fields."""

    def given(self) -> dict[str, Any]:
        """Returns the options that differ from their defaults."""
        values = ((field, getattr(self, field.name)) for field in fields(self))
        return {field.name: value for field, value in values if value != field.default}


class _OneEngine(_Options):
    """Options of one engine: the levers that have a group."""

    def config(self, model: str) -> EngineConfig:
        """Makes the configuration of ``model``, read from its checkpoint."""
        return EngineConfig(model=model, **asdict(self))


class _ServedEngine(_OneEngine):
    """Options of an engine that serves several requests at once; None where one was not given."""

    def config(self, model: str) -> EngineConfig:
        """Makes the configuration of ``model``, with a server's defaults."""
        return EngineConfig(model=model, **SERVED_DEFAULTS | self.given())

    def overrides(self, config: EngineConfig) -> dict[str, Any]:
        """Returns the levers that differ in this engine from a measured configuration.

        They are the given levers, and a server's defaults for levers that the configuration leaves
        to hotloop.
        """
        left = [
            name for name in SERVED_DEFAULTS if getattr(config, name) == getattr(EngineConfig, name)
        ]
        return {name: SERVED_DEFAULTS[name] for name in left} | self.given()


class _ManyEngines(_Options):
    """Options of several engines: the same levers, each with several values."""

    def matrix(self) -> dict[str, list[Any]]:
        """Returns the levers with several values, given or by default."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        by_default = {name: lever.sweep for name, lever in LEVERS.items() if lever.sweep}
        axes = {name: _values(name, text) for name, text in (by_default | given).items()}
        return {name: values for name, values in axes.items() if len(values) > 1}

    def defaults(self) -> dict[str, Any]:
        """Returns the levers that were given with one value, for all engines."""
        axes = {name: _values(name, text) for name, text in self.given().items()}
        return {name: values[0] for name, values in axes.items() if len(values) == 1}


def listed(text: str) -> list[str]:
    """Splits the values of an option that takes several; spaces around a value are ignored."""
    return [value.strip() for value in text.split(",")]


def _values(name: str, text: str) -> list[Any]:
    """Returns the values of a lever; an invalid number is left for the recipe to refuse."""
    values: list[Any] = listed(text)
    if _is_real_number(name):
        return [_number(float, value) for value in values]
    if _HINTS[name] is bool:
        return [{"true": True, "false": False}.get(v.lower(), v) for v in values]
    if not _is_number(name):
        return values
    return [_number(int, value) for value in values]


def _number(kind: Callable[[str], Any], text: str) -> Any:
    """Converts a text to a number; returns the text if it is none."""
    try:
        return kind(text)
    except ValueError:
        return text


def _one_value(name: str) -> tuple[str, Any, Any]:
    hint: Any = _HINTS[name]
    return name, Annotated[hint, lever_option(name)], field(default=getattr(EngineConfig, name))


def _served_value(name: str) -> tuple[str, Any, Any]:
    """Makes the option of a lever of a server's engine.

    Its default is None, which tells an option that was not given from one that was given with the
    lever's own default.
    """
    hint: Any = _HINTS[name] | None
    default = getattr(EngineConfig, name)
    words = _SERVED_WORDS.get(name) or LEVERS[name].default
    if words is None and default not in (None, False):
        words = str(default)
    return name, Annotated[hint, lever_option(name, default=words)], field(default=None)


def _several_values(name: str) -> tuple[str, Any, Any]:
    lever = LEVERS[name]
    default = lever.sweep or lever.default or str(getattr(EngineConfig, name))
    parameter = option(MATRIX, _with_choices(name), default, **_alias(lever))
    return name, Annotated[str | None, parameter], field(default=None)


def _options(name: str, base: type[_Options], fields: Iterable[tuple[str, Any, Any]]) -> Any:
    """Makes a class of options from its fields and a class with its methods."""
    made = make_dataclass(name, fields, bases=(base,), frozen=True, kw_only=True)
    made.__module__ = __name__  # or cyclopts would take it for one of Python's own types
    return Parameter(name="*")(made)


SERVED_DEFAULTS: dict[str, Any] = {"max_batch_size": 8, "prefix_cache": "chunks"}
"""Defaults of a server that differ from those of an engine, for several requests at once."""

_SERVED_WORDS = {name: str(value) for name, value in SERVED_DEFAULTS.items()}
_SERVED_WORDS["prefill_chunk"] = f"{MIN_PREFILL_CHUNK}, on a CPU {EXACT_CPU_CHUNK}"
"""A server's defaults in words. ``setup.served_prefill_chunk`` decides the prefill chunk."""

LEVERS_WITH_OPTIONS = tuple(name for name, lever in LEVERS.items() if lever.group is not None)
"""The levers with an option of their own."""

if TYPE_CHECKING:
    EngineOptions, MatrixOptions, FitOptions = _OneEngine, _ManyEngines, _Options
    ServedEngineOptions = _ServedEngine
else:
    EngineOptions = _options("EngineOptions", _OneEngine, map(_one_value, LEVERS_WITH_OPTIONS))
    ServedEngineOptions = _options(
        "ServedEngineOptions", _ServedEngine, map(_served_value, LEVERS_WITH_OPTIONS)
    )
    MatrixOptions = _options(
        "MatrixOptions", _ManyEngines, map(_several_values, LEVERS_WITH_OPTIONS)
    )
    FitOptions = _options(
        "FitOptions",
        _Options,
        map(
            _one_value,
            (
                *("tensor_parallel", "dtype", "device"),
                *("max_seq_len", "max_batch_size", "prefill_chunk", "draft"),
            ),
        ),
    )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class WeightOptions(_Options):
    """Options for measuring without a checkpoint: random weights of a model's shape."""

    weights: Annotated[
        WeightSource | None,
        option(MODEL, LEVERS["weights"].help, EngineConfig.weights),
    ] = None
    shape: Annotated[
        str | None,
        option(MODEL, "Instead of MODEL, for random weights: a built-in shape (hotloop info)."),
    ] = None
    weights_seed: Annotated[int, lever_option("seed")] = EngineConfig.seed

    def model(self, model: str | None) -> str:
        """Returns the name of the model, given as MODEL or as ``--shape``.

        Raises:
            ConfigError: Neither or both are given, there is no such shape, or a shape is given
                without random weights.
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
    """Replacements of a recipe's models and interpreters; see ``sweep.recipe.replace_models``."""

    model: Annotated[
        str | None, option(MODEL, "With a recipe: the model to use in place of the recipe's.")
    ] = None
    draft_model: Annotated[
        str | None, option(MODEL, "With a recipe: the draft model to use in place of the recipe's.")
    ] = None
    checkpoint: Annotated[
        tuple[str, ...],
        option(
            MODEL,
            "ENGINE=PATH, with a recipe: the checkpoint that another engine reads, such as "
            "vllm=./my-model-awq. Can be repeated.",
        ),
    ] = ()
    python: Annotated[
        tuple[str, ...],
        option(
            EXECUTION,
            "ENGINE=PATH, with a recipe: the interpreter with another engine installed, such as "
            "vllm=~/vllm/bin/python. Can be repeated.",
        ),
    ] = ()

    def by_engine(self, name: Literal["checkpoint", "python"]) -> dict[str, str]:
        """Returns the paths of an option, by the engine's name.

        Raises:
            ConfigError: A value is not ``ENGINE=PATH``.
        """
        paths = {}
        for value in getattr(self, name):
            engine, _, path = value.partition("=")
            if not engine or not path or engine in paths:
                raise ConfigError(
                    f"--{name} {shorten_value(value)}: give ENGINE=PATH, once for each engine."
                )
            paths[engine] = path
        return paths


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TemplateOptions(_Options):
    """Options of the chat template."""

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
        """Returns the template's variables, by name.

        Raises:
            ConfigError: An argument is not ``NAME=VALUE``, or its name cannot be given.
        """
        from hotloop.text.chat import RESERVED_VARIABLES

        variables: dict[str, Any] = {}
        for argument in self.template_arg:
            name, equals, value = argument.partition("=")
            if not equals or not name.isidentifier():
                raise ConfigError(
                    f"--template-arg {shorten_value(argument)}: give NAME=VALUE, such as "
                    "enable_thinking=false."
                )
            if name in RESERVED_VARIABLES or name in variables:
                problem = "is given twice" if name in variables else "is set by hotloop"
                raise ConfigError(f"--template-arg {shorten_value(argument)}: {name} {problem}.")
            variables[name] = _json_or_text(value)
        return variables


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
    """Refuses NaN and Infinity, which Python accepts and JSON does not have."""
    raise json.JSONDecodeError("not JSON", constant, 0)


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {shorten_value(digits)} is too large")
    return number


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SamplingOptions(_Options):
    """Sampling: ``SamplingParams``, where None keeps the model's own default."""

    max_new_tokens: Annotated[
        int | None,
        integer(SAMPLING, "The most tokens to generate.", "see above", alias="-n"),
    ] = None
    min_new_tokens: Annotated[
        int | None,
        integer(
            SAMPLING, "The fewest tokens to generate before an end-of-sequence token is allowed."
        ),
    ] = None
    n: Annotated[
        int | None,
        integer(SAMPLING, "The number of answers to the prompt; answer i has the seed plus i."),
    ] = None
    temperature: Annotated[
        float | None,
        option(
            SAMPLING,
            "Sampling temperature; 0 always selects the most likely token.",
            "the model's own, or 0",
        ),
    ] = None
    top_k: Annotated[
        int | None, integer(SAMPLING, "Keep the k most likely tokens; 0 keeps all.")
    ] = None
    top_p: Annotated[
        float | None, option(SAMPLING, "Keep the fewest tokens whose probabilities reach this sum.")
    ] = None
    min_p: Annotated[
        float | None,
        option(SAMPLING, "Keep tokens at least this fraction as likely as the most likely."),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        option(SAMPLING, "Above 1, tokens of the prompt and the answer become less likely."),
    ] = None
    presence_penalty: Annotated[
        float | None,
        option(SAMPLING, "Subtracted from the logits of tokens that are in the answer."),
    ] = None
    frequency_penalty: Annotated[
        float | None,
        option(SAMPLING, "Subtracted from a token's logit for each time that it is in the answer."),
    ] = None
    logit_bias: Annotated[
        tuple[str, ...],
        option(SAMPLING, "ID=NUMBER, added to a token's logit; -100 bans it. Can be repeated."),
    ] = ()
    seed: Annotated[
        int | None,
        integer(SAMPLING, "Seed of sampling, for reproducible answers.", "a new one each time"),
    ] = None
    stop: Annotated[
        tuple[str, ...], option(SAMPLING, "Text that ends the answer; can be repeated.")
    ] = ()
    ignore_eos: Annotated[bool, option(SAMPLING, "Ignore end-of-sequence tokens.")] = False
    logprobs: Annotated[
        int | None,
        integer(SAMPLING, "With --json: log-probabilities, with this many alternatives."),
    ] = None
    json_schema: Annotated[
        str | None,
        option(SAMPLING, "A JSON schema, or a file with one, that the answer must follow."),
    ] = None
    grammar: Annotated[
        Path | None,
        option(SAMPLING, "A file with a grammar, in Lark's notation, that the answer must follow."),
    ] = None

    def check(self, *, json: bool) -> None:
        """Refuses values that no model can use, before a model is loaded.

        Raises:
            ConfigError: Log-probabilities are requested where they are not printed, or there are
                two grammars.
            RequestError: A value is invalid.
        """
        if None not in (self.json_schema, self.grammar):
            raise ConfigError("give either --json-schema or --grammar.")
        if self.logprobs is not None and not json:
            raise ConfigError("--logprobs: only --json prints log-probabilities. Add --json.")
        grammar = self.params(SamplingParams()).grammar
        if grammar is not None:
            from hotloop.engine.grammar import check_syntax

            check_syntax(grammar)

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """Returns the model's ``defaults``, with the given options.

        Raises:
            ConfigError: A logit bias is not ``ID=NUMBER``, or a file cannot be read.
            RequestError: A value is invalid.
        """
        given = self.given()
        if self.logit_bias:
            given["logit_bias"] = dict(map(_bias, self.logit_bias))
        if self.grammar is not None:
            given["grammar"] = _grammar("lark", self.grammar)
        if self.json_schema is not None:
            del given["json_schema"]
            given["grammar"] = _schema(self.json_schema)
        return replace(defaults, **given)


def _grammar(kind: GrammarKind, file: Path) -> Grammar:
    from hotloop.untrusted import config_error, read_text

    return Grammar(kind=kind, source=read_text(file, limit=MAX_GRAMMAR_BYTES, refuse=config_error))


def _schema(given: str) -> Grammar:
    """Returns the grammar of a schema, given as a JSON object or boolean, or else as a file."""
    if given.lstrip().startswith("{") or given.strip() in ("true", "false"):
        return Grammar(kind="json_schema", source=given)
    return _grammar("json_schema", Path(given))


def _bias(text: str) -> tuple[int, float]:
    token_id, equals, number = text.partition("=")
    try:
        if equals:
            return int(token_id), float(number)
    except ValueError:
        pass
    raise ConfigError(
        f"--logit-bias {shorten_value(text)}: give ID=NUMBER, such as 1234=-100 to ban a token."
    )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class WorkloadOptions(_Options):
    """The timed workload: ``bench.record.Workload``."""

    prompt_tokens: Annotated[int, integer(WORKLOAD, "Tokens in each prompt.")] = 128
    new_tokens: Annotated[int, integer(WORKLOAD, "Tokens decoded for each prompt.")] = 128
    batch: Annotated[int, integer(WORKLOAD, "Prompts that are decoded together.")] = 1
    repeats: Annotated[int, integer(WORKLOAD, "Timed runs, after one warm-up run.")] = 5
    workload_seed: Annotated[int, integer(WORKLOAD, "Seed of the prompts.")] = 0

    def fields(self) -> dict[str, int]:
        """Returns the fields of ``Workload``."""
        values = asdict(self)
        values["seed"] = values.pop("workload_seed")
        return values


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class QualityOptions(_Options):
    """The scored text and tasks: ``sweep.recipe.QualityOptions``."""

    text: Annotated[
        Path | None,
        option(QUALITY, "A UTF-8 text file to score.", "the help topics that come with Python"),
    ] = None
    window: Annotated[int, integer(QUALITY, "Tokens in a window of the text.")] = 512
    n_windows: Annotated[int, integer(QUALITY, "The most windows to score.")] = 16
    reference: Annotated[
        str | None,
        option(
            QUALITY,
            "The unquantized model to compare with.",
            "the model itself, or the source of a quantized copy",
        ),
    ] = None

    against: Annotated[
        str | None,
        option(
            QUALITY,
            "Compare with this model instead, as it is stored; its vocabulary must be the same.",
        ),
    ] = None
    tasks: Annotated[
        str | None,
        option(
            QUALITY,
            "Tasks to answer, separated by commas: topics, which needs no file; a .jsonl file; "
            "lm-eval:NAME. They give a verdict on accuracy.",
            "none",
        ),
    ] = None
    n_items: Annotated[
        int, integer(QUALITY, "The most items of each task to answer; 0 for all.", alias="--items")
    ] = 200
    protocols: Annotated[
        str,
        option(QUALITY, "Perplexity protocols, separated by commas: gptq, llama.cpp, lm-eval."),
    ] = "gptq"

    def fields(self) -> dict[str, Any]:
        """Returns the fields of ``sweep.recipe.QualityOptions``."""
        return asdict(self) | {
            "tasks": listed(self.tasks) if self.tasks else [],
            "n_items": self.n_items or None,
            "protocols": listed(self.protocols),
        }


DEFAULT_FIT = FitOptions()
DEFAULT_ENGINE = EngineOptions()
DEFAULT_SERVED_ENGINE = ServedEngineOptions()
DEFAULT_MATRIX = MatrixOptions()
DEFAULT_WEIGHTS = WeightOptions()
DEFAULT_REPLACEMENT = ReplacementOptions()
DEFAULT_TEMPLATE = TemplateOptions()
DEFAULT_SAMPLING = SamplingOptions()
DEFAULT_WORKLOAD = WorkloadOptions()
DEFAULT_QUALITY = QualityOptions()
