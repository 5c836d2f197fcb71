"""The recipes of the published tables, from a file to a table, on a machine that is too small."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hotloop import hardware
from hotloop.baselines import ENGINES
from hotloop.baselines.hotloop import ENGINE
from hotloop.bench.record import Record
from hotloop.engine import memory
from hotloop.report.published import make_published_tables
from hotloop.sweep.cell import run_cell
from hotloop.sweep.job import make_jobs
from hotloop.sweep.plan import PlannedCell, plan
from hotloop.sweep.recipe import Recipe, expand, load_recipe, replace_models
from hotloop.types import EngineConfig

RECIPES = Path(__file__).parents[2] / "recipes"
GIB = 2**30
LEVERS = ("quant", "execution", "tensor_parallel", "draft", "draft_quant")


@pytest.fixture
def _one_small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU to count and 40 GiB to fill, with which nothing else can be done."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(hardware, "resolve_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr("hotloop.engine.setup.resolve_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr("hotloop.engine.setup.compile_unavailable_reason", lambda _: None)
    # A CUDA build of torch would look for the driver, of which there may be none.
    monkeypatch.setattr("hotloop.engine.setup.fused_unavailable_reason", lambda _: "of the test")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(memory, "free_bytes", lambda _: 40 * GIB)
    device = {"name": "A small GPU", "kind": "cuda", "read_bytes_per_s": 1e12}
    monkeypatch.setattr(hardware, "provenance", lambda _: {"device": device})


def with_random_weights(name: str) -> Recipe:
    return replace_models(load_recipe(RECIPES / name), weights="random")


def levers(config: EngineConfig) -> tuple:
    return tuple(getattr(config, name) for name in LEVERS)


TABLE = [
    (quant, execution, n, "none", "auto")
    for quant in ("int8", "int4-g128")
    for execution in ("eager", "compile", "fused")
    for n in (1, 2, 4)
]
BASELINE = ("int4-g128-asym", "auto", 1, "none", "auto")
WITH_DRAFTS = [
    ("int4-g128", "compile", n, "llama-2-13b", draft_quant)
    for n in (1, 2, 4)
    for draft_quant in ("int4-g128", "int8")
]


@pytest.mark.parametrize(
    ("name", "cells"),
    [("asclepius-13b", [BASELINE, *TABLE]), ("llama-2-70b", TABLE + WITH_DRAFTS)],
)
def test_a_recipe_is_the_references_table_cell_by_cell_and_the_fused_step(name, cells):
    recipe = with_random_weights(f"{name}.yaml")
    assert [levers(config) for config in expand(recipe)] == cells
    workload = recipe.workload
    assert (workload.prompt_tokens, workload.new_tokens, workload.repeats) == (5, 200, 5)


def test_the_demo_is_the_same_levers_without_a_draft_model():
    recipe = load_recipe(RECIPES / "demo-full.yaml")
    assert [levers(config) for config in expand(recipe)] == [
        *(
            (quant, execution, n, "none", "auto")
            for quant in ("int8", "int4-g64")
            for execution in ("eager", "compile")
            for n in (1, 2)
        ),
        *(
            ("int4-g64", "compile", n, draft, "auto")
            for n in (1, 2)
            for draft in ("ngram", "exit-10")
        ),
    ]
    assert {config.device for config in expand(recipe)} == {"cpu"}


def by_levers(cells: list[PlannedCell]) -> dict[tuple, PlannedCell]:
    return {levers(cell.config): cell for cell in cells}


@pytest.mark.usefixtures("_one_small_gpu")
def test_a_plan_says_what_fits_what_does_not_and_how_many_gpus_are_missing():
    cells = by_levers(plan(with_random_weights("llama-2-70b.yaml")))
    too_big = cells["int8", "eager", 1, "none", "auto"]
    assert too_big.fits is False
    assert too_big.predicted_bytes["weights_bytes"] == pytest.approx(64.5 * GIB, rel=0.01)
    assert cells["int4-g128", "compile", 1, "none", "auto"].fits is True
    for n in (2, 4):
        assert cells["int8", "eager", n, "none", "auto"].unsupported == f"needs {n} GPUs, found 1"


@pytest.mark.usefixtures("_one_small_gpu")
def test_a_draft_model_takes_its_own_weights_and_cache_beside_the_models():
    (big,) = plan(Recipe(model="llama-2-70b", weights="random", quality=None))
    (small,) = plan(Recipe(model="llama-2-13b", weights="random", quality=None))
    drafted = Recipe(
        model="llama-2-70b",
        weights="random",
        quality=None,
        defaults={"draft": "llama-2-13b"},
    )
    (both,) = plan(drafted)
    for part in ("weights_bytes", "cache_bytes"):
        of_each = [cell.predicted_bytes[part] for cell in (big, small)]
        assert both.predicted_bytes[part] == sum(of_each)


def create(_config: EngineConfig) -> None:
    raise AssertionError("a cell that cannot run must not be tried")


NEVER_LOADED = replace(ENGINE, create=create)
UNREADABLE = replace(NEVER_LOADED, reads_checkpoints=False)


def run_all(recipe: Recipe) -> list[Record]:
    source = f"{__name__}:NEVER_LOADED"
    jobs = make_jobs(expand(recipe), recipe.workload, recipe.quality_options)
    return [run_cell(job.model_copy(update={"source": source})) for job in jobs]


@pytest.mark.usefixtures("_one_small_gpu")
def test_what_cannot_run_is_a_row_of_the_table_that_says_by_how_much(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda _: 4 * GIB)
    (table,) = make_published_tables(run_all(with_random_weights("llama-2-70b.yaml")))
    assert table.title == "llama-2-70b, random weights on A small GPU"
    shown = {row.cells[:4]: row.cells[4] for row in table.rows}
    assert len(shown) == 24
    notes = dict(enumerate(table.notes, start=1))

    def note(*cells: str) -> str:
        text, _, number = shown[cells].partition(" [")
        assert text in ("did not fit", "unsupported")
        return notes[int(number.rstrip("]"))]

    said = note("int8", "no", "1", "–")
    assert said.startswith("did not fit on a single GPU: needs 66.")
    assert said.endswith(" GiB, 4.00 GiB free")
    drafted = note("int4-g128", "yes", "1", "llama-2-13b:int8-4")
    assert drafted.startswith("did not fit on a single GPU: needs 4")
    assert note("int8", "yes", "2", "–") == "unsupported: needs 2 GPUs, found 1"
    with_draft = note("int4-g128", "yes", "4", "llama-2-13b:int4-g128-4")
    assert with_draft == "unsupported: needs 4 GPUs, found 1"


def test_a_recipe_without_weights_says_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = load_recipe(RECIPES / "asclepius-13b.yaml")
    with pytest.raises(ValueError, match=r"only a shape.*--weights random.*--model"):
        make_jobs(expand(recipe), recipe.workload, None)
    checkpoint = tmp_path / "model.gguf"
    checkpoint.write_bytes(b"weights")
    recipe = replace_models(recipe, model=str(checkpoint))
    for engine in ("hotloop", "vllm"):
        monkeypatch.setitem(ENGINES, engine, f"{__name__}:UNREADABLE")
    jobs = make_jobs(expand(recipe), recipe.workload, None)
    assert len({job.weights_sha256 for job in jobs} - {None}) == 1
