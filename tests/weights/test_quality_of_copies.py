"""A quantized copy costs what quantizing on load costs: it is never its own reference."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from whole_models import write_folder

from hotloop.bench.record import Record
from hotloop.errors import ConfigError
from hotloop.evaluate.reference_store import ReferenceStore
from hotloop.sweep.cell import score_cell
from hotloop.sweep.events import ignore
from hotloop.sweep.job import Job, make_jobs
from hotloop.sweep.plan import plan
from hotloop.sweep.recipe import QualityOptions, Workload, recipe_from_flags
from hotloop.sweep.reference import is_reference, with_reference
from hotloop.types import EngineConfig
from hotloop.weights.quantize import quantize_checkpoint

QUANT = "int4-g64"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "source")


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return quantize_checkpoint(source, tmp_path / "copy", quant=QUANT, source_name=str(source))


def job(model: Path, quant: str = "auto") -> Job:
    text = model.parent / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    config = EngineConfig(
        model=str(model), quant=quant, device="cpu", dtype="float32", max_seq_len=16
    )
    quality = QualityOptions(window=16, n_windows=4, text=text)
    (made,) = make_jobs([config], Workload(prompt_tokens=1, new_tokens=2), quality)
    return made


def scored(made: Job, folder: Path) -> Record:
    with ReferenceStore(folder / "references") as store:
        return score_cell(with_reference(made, store, ignore))


def test_a_copy_costs_what_quantizing_on_load_costs(source, copy, tmp_path):
    of_copy, on_load = scored(job(copy), tmp_path), scored(job(source, QUANT), tmp_path)
    assert of_copy.cell == on_load.cell == f"{QUANT}/eager/float32"
    assert of_copy.config["quant"] == QUANT
    assert of_copy.kl_mean is not None
    assert of_copy.kl_mean.mean > 1e-5
    assert of_copy.kl_mean == on_load.kl_mean
    assert of_copy.delta_ln_ppl == on_load.delta_ln_ppl
    assert of_copy.quality_protocol is not None
    assert of_copy.quality_protocol.reference == f"none/eager float32 of {source}"


def test_the_quality_of_a_copy_is_unknown_without_its_source(source, copy):
    shutil.rmtree(source)
    record = score_cell(job(copy))
    assert record.status == "ok"
    assert record.perplexity is not None
    assert record.delta_ln_ppl is None
    assert "no unquantized reference" in str(record.quality_reason)


def test_a_dry_run_calls_a_copy_by_its_scheme(copy):
    cells = plan(recipe_from_flags(str(copy), matrix={"quant": ["auto"]}, quality=False))
    assert [cell.cell for cell in cells] == [f"{QUANT}/auto"]


def test_the_reference_itself_is_not_scored_twice(source, copy):
    assert is_reference(job(source))
    assert not is_reference(job(source, QUANT))
    assert not is_reference(job(copy))


def test_a_text_without_a_whole_window_is_refused_at_once(source, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("fox")
    with pytest.raises(ConfigError, match=r"the text has \d+ tokens, fewer than a window of 64"):
        make_jobs(
            [EngineConfig(model=str(source))],
            Workload(prompt_tokens=1, new_tokens=2),
            QualityOptions(window=64, n_windows=2, text=text),
        )
