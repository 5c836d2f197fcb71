"""A checkpoint's configuration decides the engine's context, execution and notes."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from tiny_models import write_random

from hotloop.checked import MAX_SEED
from hotloop.engine import fused
from hotloop.engine.setup import prepare
from hotloop.errors import CheckpointError, ConfigError
from hotloop.kernels.linear import KernelFormat, LinearSpec
from hotloop.models.families import family_of, read_config
from hotloop.types import EngineConfig


def rewrite(folder, **keys):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return str(folder)


def test_the_default_context_is_the_one_whose_frequencies_do_not_depend_on_its_length(tmp_path):
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    model = rewrite(
        write_random(tmp_path),
        rope_scaling=scaling,
        rope_parameters=None,
        max_position_embeddings=64,
    )
    by_default = prepare(EngineConfig(model=model))
    assert (by_default.n_positions, by_default.notes) == (64, ())
    longer = prepare(EngineConfig(model=model, max_seq_len=200))
    assert longer.model.max_position == 256
    assert any("rope scaling 'dynamic'" in note for note in longer.notes)


def test_layers_of_different_windows_are_for_the_fused_step_and_of_different_heads_are_not():
    keys = dict(family_of({"architectures": ["Qwen3ForCausalLM"]}).tiny) | {"head_dim": 64}
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    mixed = read_config(keys | windows)
    assert fused.unsupported_reason(mixed, (), torch.bfloat16, 1) is None
    first, *others = mixed.layers
    wider = dataclasses.replace(first, attention=dataclasses.replace(first.attention, n_heads=8))
    uneven = dataclasses.replace(mixed, layers=(wider, *others))
    assert "same heads and widths" in str(fused.unsupported_reason(uneven, (), torch.bfloat16, 1))
    gelu = dataclasses.replace(
        first, feed_forward=dataclasses.replace(first.feed_forward, activation="gelu_tanh")
    )
    other = dataclasses.replace(mixed, layers=(gelu, *others))
    assert "silu, not gelu_tanh" in str(fused.unsupported_reason(other, (), torch.bfloat16, 1))


def test_number_formats_that_the_fused_step_cannot_hold_are_named():
    keys = dict(family_of({"architectures": ["Qwen3ForCausalLM"]}).tiny) | {"head_dim": 64}
    model = read_config(keys)

    def spec(**format_: Any) -> LinearSpec:
        form = KernelFormat(**{"group_size": 32} | format_)
        return LinearSpec(format=form, n=64, k=64, dtype=torch.bfloat16, device="cuda", fused=True)

    four = spec(kind="int4", scale_dtype=torch.bfloat16)
    eight = spec(kind="int8", scale_dtype=torch.float16)
    odd = spec(kind="int4", scale_dtype=torch.bfloat16, group_size=8)
    sorted_ = spec(kind="int4", scale_dtype=torch.bfloat16, permutation_hash="another")
    for pieces, reason in (
        ([four], None),
        ([four, eight], None),
        ([four, sorted_], None),
        ([four, odd], "it supports only groups of a multiple of 16, not 8 (qkv_proj)"),
    ):
        matrices = [("qkv_proj", pieces)]
        said = fused.unsupported_reason(model, matrices, torch.bfloat16, 1)
        assert (said and said.partition(";")[0]) == reason


def test_sizes_are_compared_with_the_tensors_before_anything_is_built(tmp_path):
    model = rewrite(write_random(tmp_path), num_hidden_layers=9_999)
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        prepare(EngineConfig(model=model))


@pytest.mark.parametrize("seed", [0, MAX_SEED])
def test_a_draft_model_of_random_weights_has_another_seed_than_the_model(tmp_path, seed):
    model = str(write_random(tmp_path))
    setup = prepare(EngineConfig(model=model, draft=model, weights="random", seed=seed))
    assert setup.config.seed == seed
    assert setup.draft.setup.config.seed != seed


def test_another_engine_is_not_hotloops_to_make():
    with pytest.raises(ConfigError, match="engine 'other' is not hotloop's own"):
        prepare(EngineConfig(model="m", engine="other"))
