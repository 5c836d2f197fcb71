"""Which cells are one measurement, and which engine runs them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from sweep_fakes import create
from waiting import HANG_S

from hotloop import hardware
from hotloop.baselines import ENGINES, EngineKind
from hotloop.errors import ConfigError
from hotloop.sweep import job as job_module
from hotloop.sweep import models
from hotloop.sweep.job import Job, make_cells, make_jobs
from hotloop.sweep.models import Models
from hotloop.sweep.recipe import (
    QualityOptions,
    Recipe,
    Workload,
    load_recipe,
    recipe_from_flags,
)
from hotloop.sweep.runner import run_sweep
from hotloop.types import EngineConfig
from hotloop.weights.identity import Quantization, StoredForm

FAKE = EngineKind(create=create)


def cells(*configs: EngineConfig) -> list[str]:
    return [cell.name for cell in make_cells(configs, Models())]


@pytest.fixture
def copy(monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy that ``hotloop quantize`` wrote."""
    written = Quantization(scheme="int4-g64", head="int8")
    monkeypatch.setattr(models, "resolve_model", Path)
    monkeypatch.setattr(
        models, "read_stored_form", lambda _: StoredForm(types=(), quantization=written)
    )
    return "copy"


def test_a_copy_has_one_cell_for_no_scheme_and_for_its_own(copy):
    own = EngineConfig(model=copy, quant="int4-g64")
    assert cells(EngineConfig(model=copy), own) == ["int4-g64/auto"]
    assert cells(own, EngineConfig(model=copy, quant="int8")) == ["int4-g64/auto", "int8/auto"]


@pytest.mark.parametrize(
    "same",
    [
        {"execution": "eager"},
        {"device": "cpu"},
        {"dtype": "bfloat16"},
        {"head": "int8"},
        {"draft_tokens": 7, "draft_policy": "always"},
        {"prefill_chunk": 512},
    ],
)
def test_cells_that_make_the_same_engine_are_one(same, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    base = {"model": "llama-2-7b", "weights": "random", "quant": "int8"}
    assert cells(EngineConfig(**base), EngineConfig(**base | same)) == ["int8/auto"]


@pytest.mark.parametrize(
    "other",
    [{"execution": "compile"}, {"head": "none"}, {"dtype": "float32"}, {"seed": 1}],
)
def test_cells_that_make_another_engine_are_two(other):
    base = {"model": "llama-2-7b", "weights": "random", "quant": "int8"}
    assert len(cells(EngineConfig(**base), EngineConfig(**base | other))) == 2


# --- what a finished cell is known by


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, a draft model and a text; the engine is a fake."""
    for name in ("model", "draft"):
        (tmp_path / f"{name}.gguf").write_bytes(name.encode())
    (tmp_path / "text.txt").write_text("some words")
    monkeypatch.setitem(ENGINES, "hotloop", f"{__name__}:FAKE")
    monkeypatch.setitem(ENGINES, "other", f"{__name__}:FAKE")
    return tmp_path


def job(
    folder: Path, *, model: str = "model.gguf", draft: str | None = "draft.gguf", **options
) -> Job:
    workload = Workload(prompt_tokens=4, new_tokens=8, **options.pop("workload", {}))
    windows = options.pop("quality", {})
    text = folder / options.pop("text", "text.txt")
    passed = {name: options.pop(name, None) for name in ("pythons", "provenance")}
    drafts = str(folder / draft) if draft else "none"
    config = EngineConfig(model=str(folder / model), draft=drafts, **options)
    quality = QualityOptions(**{"window": 4, "n_windows": 2, "text": text} | windows)
    (made,) = make_jobs([config], workload, quality, **passed)
    return made


@pytest.mark.parametrize(
    "change",
    [
        {"quant": "int8"},
        {"execution": "compile"},
        {"tensor_parallel": 2},
        {"draft_tokens": 5},
        {"max_seq_len": 99},
        {"device": "cuda"},
        {"engine": "other"},
        {"pythons": {"hotloop": Path("/opt/python")}},
        {"workload": {"repeats": 9}},
        {"workload": {"seed": 1}},
        {"quality": {"n_windows": 3}},
        {"quality": {"window": 5}},
    ],
    ids=str,
)
def test_what_decides_a_result_is_measured_anew(folder, change):
    assert job(folder, **change).key != job(folder).key


@pytest.mark.parametrize("file", ["model.gguf", "draft.gguf", "text.txt"])
def test_another_content_of_the_same_name_is_measured_anew(folder, file):
    before = job(folder).key
    (folder / file).write_bytes(b"another content")
    assert job(folder).key != before


def test_other_versions_and_other_machines_are_measured_anew(folder, monkeypatch):
    keys = {job(folder).key}
    with monkeypatch.context() as patch:
        patch.setattr(job_module, "__version__", "0.0.1")
        keys.add(job(folder).key)
    with monkeypatch.context() as patch:
        patch.setattr(job_module, "version", lambda _: "2.0")
        keys.add(job(folder).key)
    monkeypatch.setattr(hardware, "machine", lambda: {"cpu": "another"})
    assert len(keys | {job(folder).key}) == 4


def test_a_reference_is_of_this_code_and_machine_and_a_finished_cell_outlives_a_change_of_code(
    folder, monkeypatch
):
    first = job(folder)
    files = {first.reference_job(folder).reference}
    with monkeypatch.context() as patch:
        patch.setattr(job_module, "code_hash", lambda: "other code")
        changed = job(folder)
        assert changed.key == first.key
        files.add(changed.reference_job(folder).reference)
    monkeypatch.setattr(hardware, "machine", lambda: {"cpu": "another"})
    files.add(first.reference_job(folder).reference)
    assert len(files) == 3


def test_names_and_places_of_the_same_content_resume(folder):
    before = job(folder, provenance={"recipe": {"name": "a"}})
    for name in ("model", "draft"):
        (folder / f"{name}.gguf").rename(folder / f"{name}-moved.gguf")
    (folder / "text.txt").rename(folder / "moved.txt")
    moved = {"model": "model-moved.gguf", "draft": "draft-moved.gguf", "text": "moved.txt"}
    after = job(folder, **moved, provenance={"recipe": {"name": "b"}})
    assert after.key == before.key
    assert after.reference_job(folder).reference == before.reference_job(folder).reference


# --- engines


def test_a_cell_names_its_engine_and_the_reference_is_hotloops_own(folder):
    theirs = job(folder, engine="other", draft=None, quant="int8")
    assert theirs.cell == "other/int8"
    scoring = theirs.reference_job(folder)
    assert (scoring.config.engine, scoring.config.quant) == ("hotloop", "none")
    assert scoring.python is None


def test_an_engine_that_is_not_registered_is_refused_by_its_key():
    with pytest.raises(ConfigError, match=r"engine.*unknown engine 'vlm'.*hotloop"):
        recipe_from_flags("m", matrix={"engine": ["hotloop", "vlm"]})


def write_recipe(folder: Path, python: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(
        "model: some-shape\nweights: random\nworkload: {prompt_tokens: 4, new_tokens: 8}\n"
        f"timeout_s: {HANG_S}\n"
        f"matrix: {{engine: [other]}}\nengines: {{other: {{python: {python}}}}}\n"
    )
    return load_recipe(path)


def test_an_engine_runs_under_its_own_interpreter_with_this_very_hotloop(
    folder, monkeypatch, tmp_path
):
    monkeypatch.setitem(ENGINES, "other", "sweep_fakes_child:FAKE")
    here = Path(__file__).parent
    python = folder / "python"
    python.write_text(
        "#!/bin/sh\n"
        f"echo another interpreter >> {tmp_path}/started\n"
        f"export PYTHONPATH={here}:{here.parent}\n"
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    (record,) = run_sweep(write_recipe(folder, "python"), tmp_path / "out")
    assert (record.status, record.baseline) == ("ok", "other"), record.reason
    assert (tmp_path / "started").read_text() == "another interpreter\n"


@pytest.mark.parametrize("python", ["gone", "model.gguf", "."])
def test_an_interpreter_that_is_no_program_is_refused_before_anything_runs(folder, python):
    recipe = write_recipe(folder, python)
    with pytest.raises(ConfigError, match=r"engines.other.python: .* is not a program"):
        run_sweep(recipe, folder / "out")
    assert not (folder / "out").exists()
