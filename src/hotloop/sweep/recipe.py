"""A recipe: the configurations to measure, the workload, and the text for quality.

It is a YAML file, which is checked completely before anything runs. The levers of a configuration
are the fields of ``EngineConfig``, so a new field can be swept at once.

    name: demo
    model: smollm2-135m
    matrix:                       # every combination, in EngineConfig's order of fields
      quant: [none, int8, int4-g64]
      execution: [auto, compile]
    cells:                        # and these
      - {quant: int8, head: none}
      - {engine: vllm, checkpoint: ./model-awq}    # another engine, and its form of the model
    defaults: {dtype: bfloat16}   # for all of them; dropped in cells where they have no effect
    workload: {prompt_tokens: 32, new_tokens: 64}
    quality: {window: 256, n_windows: 16, tasks: [topics, arc.jsonl]}    # or false
    timeout_s: 600                # per cell
    engines:                      # settings of other engines
      vllm: {python: ~/vllm/bin/python}    # its interpreter; hotloop need not be installed there

A recipe has one model: records of different models cannot be compared, so they belong in
different results folders.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import types
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Self,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PrivateAttr,
    create_model,
    model_validator,
)

from hotloop.baselines import ENGINES
from hotloop.bench.record import Workload
from hotloop.checked import MAX_COUNT, Range
from hotloop.errors import ConfigError, UnknownNameError, shorten, shorten_value
from hotloop.evaluate.perplexity import Protocol
from hotloop.evaluate.tasks import resolve_task
from hotloop.sweep.bounded_yaml import parse_yaml
from hotloop.types import OWN_ENGINE, EngineConfig, WeightSource, is_draft_model, levers
from hotloop.untrusted import Place, StrictModel, config_error, read_text, validated
from hotloop.writing import check_component

MAX_RECIPE_BYTES = 256 * 2**10
"""The largest recipe that is read, in bytes."""

MAX_CELLS = 1_000
"""The most cells of a recipe: at one minute per cell, 17 hours."""

TASK_TOKENS = 512
"""The shortest sequence for recipes with tasks, in tokens; longer items are cut."""

DEFAULT_ITEMS = 200
"""The default number of items of a task: enough to show a large loss, not to rule out a small."""

NameOrPath = Annotated[str, Field(min_length=1, max_length=4096)]
"""A name or a path."""


class QualityOptions(StrictModel):
    """The text to score, the tasks to answer, and the reference to compare with.

    Attributes:
        window: Tokens in a window.
        n_windows: The most windows to score, from the beginning of the text.
        text: A UTF-8 file, relative to the recipe; None takes the text that comes with Python.
        reference: The model to compare with, named as in ``EngineConfig``; None takes the
            unquantized model itself, or the model from which a quantized copy was made.
        against: In place of ``reference``: any model with the same vocabulary, as it is stored.
        tasks: The tasks: see ``evaluate.tasks``. Paths are relative to the recipe.
        n_items: The most items of each task, from its beginning; None for all.
        protocols: The protocols of perplexity: see ``evaluate.perplexity``.
    """

    window: Annotated[int, Field(ge=2, le=MAX_COUNT)] = 512
    n_windows: Annotated[int, Field(ge=2, le=MAX_COUNT)] = 16
    text: Annotated[Path | None, Field(strict=False)] = None
    reference: NameOrPath | None = None
    against: NameOrPath | None = None
    tasks: list[NameOrPath] = Field(default_factory=list)
    n_items: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = DEFAULT_ITEMS
    protocols: list[Protocol] = Field(default_factory=lambda: ["gptq"])

    @model_validator(mode="after")
    def _one_comparison(self) -> Self:
        if self.reference is not None and self.against is not None:
            raise ValueError(
                "give either reference or against: both name the model to compare with"
            )
        return self

    @property
    def seq_len(self) -> int:
        """Tokens that a sequence must hold."""
        return max(self.window, TASK_TOKENS if self.tasks else 0)


class EngineSettings(StrictModel):
    """Settings of all cells of one engine.

    Attributes:
        python: The interpreter, relative to the recipe; None takes hotloop's interpreter.
    """

    python: Annotated[Path | None, Field(strict=False)] = None


def _known_engine(name: str) -> str:
    if name not in ENGINES:
        raise UnknownNameError("engine", name, ENGINES)
    return name


Engine = Annotated[NameOrPath, AfterValidator(_known_engine)]


def _canonical_scheme(name: str) -> str:
    from hotloop.quant import parse_scheme  # imports torch

    return parse_scheme(name.strip()).name


def _canonical_head(name: str) -> str:
    return "auto" if name.strip() == "auto" else _canonical_scheme(name)


def _split_values(values: object) -> object:
    """Returns the values of an axis, a list or a text with commas, without spaces around them."""
    if isinstance(values, str):
        values = values.split(",")
    if isinstance(values, list):
        return [value.strip() if isinstance(value, str) else value for value in values]
    return values


def _checked_type(hint: Any) -> Any:
    """Returns the type for pydantic of a field of ``EngineConfig``, which checks its ``Range``."""
    if hint is str:
        return NameOrPath
    if get_origin(hint) in (Union, types.UnionType):
        one, none = get_args(hint)
        assert none is type(None), "a field takes one kind of value, and perhaps None"
        return _checked_type(one) | None
    if get_origin(hint) is Annotated:
        kind, *extras = get_args(hint)
        for allowed in extras:
            if isinstance(allowed, Range):
                return Annotated[kind, AfterValidator(partial(_within, allowed))]
        return _checked_type(kind)
    return hint


def _within(allowed: Range, value: float) -> float:
    if value not in allowed:
        raise ValueError(f"must be {allowed.requirement(value)}, not {shorten_value(value)}")
    return value


def _lever_types() -> dict[str, Any]:
    hints = {
        name: _checked_type(hint)
        for name, hint in get_type_hints(EngineConfig, include_extras=True).items()
    }
    return {
        name: Annotated[NameOrPath, AfterValidator(_VALIDATORS[lever.names])]
        if lever.names
        else hints[name]
        for name, lever in levers().items()
        if name != "weights"
    }


_VALIDATORS = {"scheme": _canonical_scheme, "head": _canonical_head, "engine": _known_engine}


if TYPE_CHECKING:
    Levers = Matrix = BaseModel
else:
    Levers = create_model(
        "Levers",
        __base__=StrictModel,
        __doc__="Values for some fields of EngineConfig, in one cell or in all cells.",
        **{name: (hint, None) for name, hint in _lever_types().items()},
    )
    Matrix = create_model(
        "Matrix",
        __base__=StrictModel,
        __doc__="Lists of values to try, for some fields of EngineConfig.",
        **{
            name: (Annotated[list[hint], Field(min_length=1), BeforeValidator(_split_values)], None)
            for name, hint in _lever_types().items()
        },
    )


class Recipe(StrictModel):
    """A whole experiment; the module's docstring explains the fields."""

    name: Annotated[str, AfterValidator(check_component)] = "sweep"
    model: NameOrPath
    weights: WeightSource = "checkpoint"
    defaults: Levers = Levers()
    matrix: Matrix = Matrix()
    cells: list[Levers] = Field(default_factory=list)
    workload: Workload = Workload(prompt_tokens=128, new_tokens=128)
    quality: Annotated[
        QualityOptions | None, BeforeValidator(lambda value: None if value is False else value)
    ] = QualityOptions()
    timeout_s: Annotated[float, Field(gt=0, le=1e9)] = 1800.0
    engines: dict[Engine, EngineSettings] = Field(default_factory=dict)

    _folder: Path = PrivateAttr(default=Path())

    @property
    def sha256(self) -> str:
        """Hash of the recipe's content, independent of its layout and comments."""
        return sha256_of(self.model_dump(mode="json", exclude_unset=True))

    @property
    def quality_options(self) -> QualityOptions | None:
        """``quality`` with absolute paths; None if there is nothing to score."""
        if self.weights == "random" or self.quality is None:
            return None
        text = self.quality.text and (self._folder / self.quality.text).resolve()
        tasks = [resolve_task(task, self._folder) for task in self.quality.tasks]
        return self.quality.model_copy(update={"text": text, "tasks": tasks})

    @property
    def pythons(self) -> dict[str, Path]:
        """The interpreters of engines, by the engine's name.

        Raises:
            ConfigError: An interpreter is not a program.
        """
        found = {}
        for engine, settings in self.engines.items():
            if settings.python is None:
                continue
            python = (self._folder / settings.python.expanduser()).absolute()
            if not (python.is_file() and os.access(python, os.X_OK)):
                raise ConfigError(
                    f"engines.{engine}.python: {shorten(str(python))} is not a program: give the "
                    "path of the interpreter that has the engine."
                )
            found[engine] = python
        return found


def load_recipe(path: Path | str) -> Recipe:
    """Reads and checks a recipe.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or has values that cannot be run; the
            message names their places in the recipe.
    """
    path = Path(path)
    data = parse_yaml(read_text(path, limit=MAX_RECIPE_BYTES, refuse=config_error), path)
    if not isinstance(data, dict):
        raise config_error(
            path, f"a recipe is a mapping with at least `model`, not {shorten_value(data)}."
        )
    return _checked(data, source=str(path), folder=path.parent)


def recipe_from_flags(
    model: str,
    *,
    matrix: Mapping[str, Sequence[Any]],
    defaults: Mapping[str, Any] | None = None,
    workload: Mapping[str, int] | None = None,
    quality: Mapping[str, Any] | Literal[False] | None = None,
    **others: Any,
) -> Recipe:
    """Makes the recipe of a command line, checked like a file.

    Args:
        model: See ``EngineConfig``.
        matrix: Field of ``EngineConfig`` -> values to try; fields without values are left out.
        defaults: Fields of ``EngineConfig`` for all cells; fields that are None are left out.
        workload: Fields of ``Workload``; None takes the default.
        quality: Fields of ``QualityOptions``, False for none, None for the default.
        **others: ``name``, ``weights``, ``timeout_s``; values that are None are left out.

    Raises:
        ConfigError: As for ``load_recipe``.
    """
    data = {
        "model": model,
        "matrix": {name: list(values) for name, values in matrix.items() if values},
        "defaults": _given(defaults or {}),
        "workload": workload,
        "quality": quality,
        **others,
    }
    recipe = validated(
        Recipe,
        _given(data),
        "command line",
        refuse=lambda _, problem: ConfigError(problem),
        name=_flag,
    )
    expand(recipe)
    return recipe


def _flag(place: Place) -> str:
    """Returns the command-line option that sets a value of a recipe, given by its path of keys."""
    keys = [key for key in place if isinstance(key, str)]
    if keys == ["model"]:
        return "MODEL"
    other = {"defaults.seed": "weights_seed", "workload.seed": "workload_seed"}
    return "--" + other.get(".".join(keys), keys[-1]).replace("_", "-")


def replace_models(
    recipe: Recipe,
    *,
    weights: WeightSource | None = None,
    model: str | None = None,
    draft_model: str | None = None,
    pythons: Mapping[str, Path] | None = None,
    checkpoints: Mapping[str, str] | None = None,
) -> Recipe:
    """Makes the same experiment with other weights or programs; None keeps the recipe's value.

    Args:
        recipe: The recipe to change.
        weights: The source of weights.
        model: As in ``EngineConfig``.
        draft_model: Replaces the draft model of every configuration that has one.
        pythons: The interpreters of engines, by the engine's name.
        checkpoints: By engine, the model in the form that the engine reads, for all of its cells.

    Raises:
        ConfigError: The recipe has nothing to replace, or two cells become the same.
    """
    data = recipe.model_dump(exclude_unset=True)
    for engine in (*(pythons or {}), *(checkpoints or {})):
        named = sorted({config.engine for config in expand(recipe)})
        if engine not in named:
            raise UnknownNameError(f"engine in the recipe {recipe.name!r}", engine, named)
    for engine, python in (pythons or {}).items():
        settings = data.setdefault("engines", {}).setdefault(engine, {})
        settings["python"] = python.expanduser().absolute()
    for engine, checkpoint in (checkpoints or {}).items():
        for cell in data.get("cells", []):
            if cell.get("engine") == engine:
                cell["checkpoint"] = checkpoint
    data |= _given({"weights": weights, "model": model})
    if draft_model is not None:
        if not any(is_draft_model(config.draft) for config in expand(recipe)):
            raise ConfigError(
                f"the recipe {recipe.name!r} has no cell with a draft model that {draft_model!r} "
                "could replace: leave out --draft-model."
            )

        def replaced(draft: str) -> str:
            return draft_model if is_draft_model(draft) else draft

        for levers in (data.get("defaults", {}), *data.get("cells", [])):
            if "draft" in levers:
                levers["draft"] = replaced(levers["draft"])
        if "draft" in (axes := data.get("matrix", {})):
            axes["draft"] = [replaced(draft) for draft in axes["draft"]]
    return _checked(data, source=f"recipe {recipe.name!r}", folder=recipe._folder)


def expand(recipe: Recipe) -> list[EngineConfig]:
    """Makes every configuration of a recipe: the product of the matrix, then the explicit cells.

    Cells of other engines come first, so that a sweep that is stopped early has the baselines of
    its cells.

    By default, ``max_batch_size`` is the workload's batch, and ``max_seq_len`` is the length that
    the workload and the quality windows need, so that memory is measured for the experiment, not
    for the model's whole context.

    Raises:
        ConfigError: Two cells are the same, a cell cannot hold the workload or a window, or there
            are more than ``MAX_CELLS``.
    """
    axes = recipe.matrix.model_dump(exclude_unset=True)
    if (count := math.prod(map(len, axes.values())) + len(recipe.cells)) > MAX_CELLS:
        sizes = " x ".join(f"{len(values)} {name}" for name, values in axes.items())
        raise ConfigError(
            f"the recipe has {count:,} cells ({sizes or len(recipe.cells)}), more than "
            f"{MAX_CELLS:,}: shorten the lists of `matrix`, or split the recipe."
        )
    combinations = [
        dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
    ]
    if recipe.cells and not axes:
        combinations = []  # the product of no axes is one empty cell
    explicit = [cell.model_dump(exclude_unset=True) for cell in recipe.cells]
    defaults = recipe.defaults.model_dump(exclude_unset=True)
    written = [_config(recipe, {**defaults, **levers}) for levers in combinations + explicit]
    for config, count in Counter(written).items():
        if count > 1:
            raise ConfigError(
                f"the recipe has the cell {shorten_value(config.name)} {count} times: remove it "
                "from `cells` or from a list of `matrix`."
            )
    cells = _with_defaults(defaults, combinations, explicit)
    configs = dict.fromkeys(_config(recipe, levers) for levers in cells)
    return sorted(configs, key=lambda config: config.engine == OWN_ENGINE)


def fit_to_experiment(
    config: EngineConfig, workload: Workload, quality: QualityOptions | None
) -> EngineConfig:
    """Fills in the sequence length that an experiment needs, if ``config`` has none.

    Raises:
        ConfigError: The configuration cannot hold the workload or a quality window.
    """
    asked = workload.prompt_tokens + workload.new_tokens
    needed = max(asked, quality.seq_len if quality else 0)
    if config.max_seq_len is None:
        config = replace(config, max_seq_len=needed)
    if config.max_seq_len is not None and config.max_seq_len < needed:
        what = f"workload of {asked} tokens"
        if asked < needed:
            window = quality is not None and needed == quality.window
            what = f"window of {needed} tokens" if window else f"tasks' {needed} tokens"
        raise ConfigError(
            f"max_seq_len (--max-seq-len) {config.max_seq_len} of {config.name} cannot hold the "
            f"{what}: raise it or leave it out."
        )
    if config.max_batch_size < workload.batch:
        raise ConfigError(
            f"max_batch_size (--max-batch-size) {config.max_batch_size} of {config.name} is below "
            f"the workload's batch of {workload.batch}: raise it or leave it out."
        )
    return config


def cell_names(configs: Sequence[EngineConfig]) -> list[str]:
    """Names each configuration, with distinct names.

    ``EngineConfig.name`` leaves out fields that rarely matter. A field that a sweep varies, such as
    ``prefill_chunk``, is appended.
    """
    namesakes: dict[str, list[dict[str, Any]]] = {}
    for config in configs:
        namesakes.setdefault(config.name, []).append(config.to_dict())
    varied = {
        name: [field for field in same[0] if any(other[field] != same[0][field] for other in same)]
        for name, same in namesakes.items()
    }
    return [
        "/".join([c.name, *(f"{field}={getattr(c, field)}" for field in varied[c.name])])
        for c in configs
    ]


def sha256_of(value: Any) -> str:
    """Hashes a JSON value (SHA-256, hexadecimal), independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _with_defaults(
    defaults: dict[str, Any], matrix: Sequence[dict[str, Any]], explicit: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Adds the defaults to the cells of the matrix and to the explicit cells.

    A lever that has no effect in a cell is dropped from it, unless an explicit cell sets it. Cells
    of the matrix that become equal in this way are one cell. A lever that has no effect in any cell
    stays in all of them, so that the engine refuses it.
    """
    explicit_levers = [*({} for _ in matrix), *explicit]
    whole = [{**defaults, **cell} for cell in (*matrix, *explicit)]
    field_defaults = {one.name: one.default for one in fields(EngineConfig)}
    for name, lever in levers().items():
        if lever.used is None:
            continue
        has_effect = [lever.used({**field_defaults, **cell}) for cell in whole]
        if not any(has_effect):
            continue
        for cell, own, effective in zip(whole, explicit_levers, has_effect, strict=True):
            if not effective and name not in own:
                cell.pop(name, None)
    return whole


def _config(recipe: Recipe, levers: dict[str, Any]) -> EngineConfig:
    levers = {"max_batch_size": recipe.workload.batch, **levers}
    config = EngineConfig(model=recipe.model, weights=recipe.weights, **levers)
    return fit_to_experiment(config, recipe.workload, recipe.quality_options)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _checked(data: dict[str, Any], *, source: str, folder: Path) -> Recipe:
    recipe = validated(Recipe, data, source, refuse=config_error)
    recipe._folder = folder
    try:
        expand(recipe)
    except ConfigError as error:
        raise config_error(source, str(error)) from error
    return recipe
