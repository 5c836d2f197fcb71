"""Faults planted in a quantized copy are seen by ``eval COPY --against THE_GOOD_COPY``.

The good copy against itself shows nothing beyond the floor; a layer whose scales are doubled, and
one zero point that is off by one step, in one group of 32 weights, show more.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from whole_models import write_folder

from hotloop.bench.record import Record
from hotloop.evaluate.reference_store import ReferenceStore
from hotloop.sweep.cell import score_cell
from hotloop.sweep.events import ignore
from hotloop.sweep.job import make_jobs
from hotloop.sweep.recipe import QualityOptions
from hotloop.sweep.reference import with_reference
from hotloop.types import EngineConfig
from hotloop.weights.quantize import quantize_checkpoint

QUANT = "int4-g32-asym"
LAYER = "model.layers.0."


def double_the_scales_of_a_layer(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        if name.startswith(LAYER) and name.endswith(".scale"):
            tensors[name] = tensors[name] * 2


def move_one_zero_by_a_step(tensors: dict[str, Tensor]) -> None:
    name = LAYER + "mlp.down_proj.weight"
    tensors[f"{name}.offset"][5, 1] += tensors[f"{name}.scale"][5, 1]


def nothing(_: dict[str, Tensor]) -> None:
    pass


def scored(folder: Path, plant: Callable[[dict[str, Tensor]], None]) -> Record:
    source = write_folder(folder / "source")
    good, other = (
        quantize_checkpoint(source, folder / name, quant=QUANT, source_name=str(source))
        for name in ("good", "other")
    )
    (file,) = other.glob("*.safetensors")
    tensors = load_file(file)
    plant(tensors)
    save_file(tensors, file)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 60)
    quality = QualityOptions(window=32, n_windows=24, text=folder / "text.txt", against=str(good))
    config = EngineConfig(model=str(other), device="cpu", dtype="float32", max_seq_len=32)
    (job,) = make_jobs([config], None, quality)
    with ReferenceStore(folder / "references") as store, torch.no_grad():
        record = score_cell(with_reference(job, store, ignore))
    assert record.quality_reason is None
    assert record.quality_protocol is not None
    assert record.quality_protocol.reference == f"as stored/eager float32 of {good}"
    return record


def test_the_good_copy_against_itself_shows_the_floor_and_no_more(tmp_path):
    record = scored(tmp_path, nothing)
    assert record.kl_mean is not None
    assert record.kl_floor is not None
    assert abs(record.kl_mean.mean) < 1e-6
    assert abs(record.kl_floor.mean) < 1e-6
    assert record.same_top1 is not None
    assert record.same_top1.mean == 1


@pytest.mark.parametrize("plant", [double_the_scales_of_a_layer, move_one_zero_by_a_step])
def test_a_planted_fault_is_seen_far_above_the_floor(tmp_path, plant):
    record = scored(tmp_path, plant)
    assert record.kl_mean is not None
    assert record.kl_mean.ci95 is not None
    assert record.kl_floor is not None
    assert record.kl_mean.ci95[0] > 20 * max(record.kl_floor.mean, 1e-7)
    assert record.kl_max is not None
    assert record.kl_max > record.kl_mean.mean
