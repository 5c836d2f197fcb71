"""Cells of other engines: their form of the model, their interpreter, and what they are compared
with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_models import write_random
from waiting import HANG_S

from hotloop.baselines import ENGINES
from hotloop.cli.options import ReplacementOptions
from hotloop.errors import ConfigError, UnknownNameError
from hotloop.sweep.events import ignore
from hotloop.sweep.job import Job, make_jobs
from hotloop.sweep.process import run_isolated
from hotloop.sweep.recipe import Recipe, expand, load_recipe, replace_models
from hotloop.types import EngineConfig

RECIPE = """
model: {model}
cells:
  - {{quant: none, execution: eager}}
  - {{engine: transformers}}
workload: {{prompt_tokens: 3, new_tokens: 4}}
quality: {{window: 8, n_windows: 2}}
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return write_random(folder)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The same model with another content."""
    folder = tmp_path / "copy"
    folder.mkdir()
    return write_random(folder, embedding_std=0.5)


@pytest.fixture
def recipe(tmp_path: Path, model: Path) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=model))
    return load_recipe(path)


def test_an_engines_form_of_the_model_is_compared_with_the_recipes_model(recipe, model, copy):
    recipe = replace_models(recipe, checkpoints={"transformers": str(copy)})
    other, own = make_jobs(expand(recipe), recipe.workload, recipe.quality_options)
    assert (own.config.source, other.config.source) == (str(model), str(copy))
    assert other.config.model == str(model)
    assert other.weights_sha256 != own.weights_sha256
    assert other.reference_model == str(model)
    folder = Path("anywhere")
    assert other.reference_job(folder).reference == own.reference_job(folder).reference


def test_the_content_of_a_form_counts_and_not_its_place(recipe, copy):
    def key(checkpoint: Path) -> str:
        replaced = replace_models(recipe, checkpoints={"transformers": str(checkpoint)})
        return make_jobs(expand(replaced), replaced.workload, None)[0].key

    before = key(copy)
    moved = copy.rename(copy.with_name("moved"))
    assert key(moved) == before
    assert make_jobs(expand(recipe), recipe.workload, None)[0].key != before


def test_an_interpreter_of_the_command_line_replaces_the_recipes(recipe):
    given = ReplacementOptions(python=(f"transformers={sys.executable}",)).by_engine("python")
    pythons = {engine: Path(path) for engine, path in given.items()}
    assert replace_models(recipe, pythons=pythons).pythons == pythons


@pytest.mark.parametrize("value", ["transformers", "=x", "transformers="])
def test_a_value_without_engine_or_path_is_refused(value):
    with pytest.raises(ConfigError, match="ENGINE=PATH"):
        ReplacementOptions(python=(value,)).by_engine("python")


def test_an_engine_that_no_cell_has_is_named(recipe):
    with pytest.raises(UnknownNameError, match="Did you mean 'transformers'"):
        replace_models(recipe, checkpoints={"transformer": "x"})


@pytest.mark.parametrize("field", ["checkpoint", "url"])
def test_hotloop_itself_has_no_other_form_of_a_model_and_no_server(field):
    with pytest.raises(ConfigError, match=f"{field} 'x' is for other engines"):
        EngineConfig(model="m", **{field: "x"})


def test_an_interpreter_that_lacks_a_package_is_named_with_it(tmp_path):
    python = tmp_path / "python"
    said = "ModuleNotFoundError: No module named 'pydantic'"
    python.write_text(f'#!/bin/sh\necho "{said}" >&2\nexit 1\n')
    python.chmod(0o755)
    job = Job(
        cell="llama-cpp",
        config=EngineConfig(model="m", engine="llama-cpp"),
        source=ENGINES["llama-cpp"],
        python=python,
    )
    record = run_isolated(job, log=tmp_path / "log", timeout_s=HANG_S, on_event=ignore)
    assert record.status == "unsupported"
    assert record.reason.startswith(f"{python} lacks the package pydantic")
