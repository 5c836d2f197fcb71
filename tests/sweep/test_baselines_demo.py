"""recipes/baselines-demo.yaml: the demo's model in three engines, with a smaller workload."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from hotloop.bench.record import MEASURED, Workload
from hotloop.errors import ModelNotFoundError
from hotloop.report.table import make_table
from hotloop.sweep.recipe import QualityOptions, expand, load_recipe
from hotloop.sweep.runner import run_sweep
from hotloop.weights.hub import resolve_model

RECIPE = Path(__file__).parents[2] / "recipes/baselines-demo.yaml"


def test_the_engines_are_beside_hotloops_own_cells_with_the_same_weights():
    cells = {(c.engine, c.quant, c.execution) for c in expand(load_recipe(RECIPE))}
    assert {("transformers", "auto", "auto"), ("llama-cpp", "auto", "auto")} <= cells
    assert {("hotloop", "none", "eager"), ("hotloop", "auto", "compile")} <= cells


@pytest.mark.slow
def test_every_engine_is_a_row_timed_and_scored_against_hotloops_reference(tmp_path):
    recipe = load_recipe(RECIPE)
    try:
        resolve_model(recipe.model)
    except ModelNotFoundError:
        pytest.skip(f"{recipe.model} is not here: hotloop pull {recipe.model}")
    recipe = recipe.model_copy(
        update={
            "cells": [cell for cell in recipe.cells if cell.engine is not None],
            "workload": Workload(prompt_tokens=8, new_tokens=8, repeats=2),
            "quality": QualityOptions(window=32, n_windows=2),
        }
    )
    theirs, llama = run_sweep(recipe, tmp_path)
    assert theirs.status in MEASURED, theirs.reason
    assert theirs.quality_protocol.reference == "none/eager bfloat16"
    assert abs(theirs.delta_ln_ppl.mean) < 0.05
    assert 0 < theirs.kl_mean.mean < 0.05
    assert theirs.mbu is not None
    if find_spec("llama_cpp") is None:
        assert llama.status == "unsupported"
        assert "pip install llama-cpp-python" in llama.reason
    else:
        assert llama.status in MEASURED, llama.reason
        assert llama.kl_mean.mean < 0.1
    table = make_table([theirs, llama])
    assert [row.record.baseline for row in table.rows] == ["transformers", "llama-cpp"]
    assert dict(table.context)["other engines"].startswith(("transformers ", "llama-cpp-python "))
