"""Loading gives every tensor its place, and refuses by name whatever does not fit."""

import json
import re
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from whole_models import (
    CONFIG,
    CPU,
    assert_same_weights,
    load,
    load_from,
    random_tensors,
    write_folder,
)

from hotloop.errors import CheckpointError, ConfigError
from hotloop.kernels.pack import _VALUES_AT_ONCE
from hotloop.models.families import FAMILIES, family_of, read_config
from hotloop.quant import parse_scheme
from hotloop.weights.checkpoint import open_checkpoint, read_model
from hotloop.weights.quantize import quantize_checkpoint
from hotloop.weights.source import _VALUES_OF_PIECE, RandomSource
from hotloop.weights.writer import SafetensorsWriter

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.0.post_attention_layernorm.weight"
SCHEMES = ["none", "int8", "fp8", "int4-g32-asym", "int4-g64"]


def refusal(path: Path, **options: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)
    return caught.value


# Where things go.


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("quant", ["none", "int8"])
def test_every_tensor_is_where_the_arithmetic_looks_for_it(architecture, quant, tmp_path):
    keys = dict(family_of({"architectures": [architecture]}).tiny)
    folder = write_folder(tmp_path / "m", **keys)
    tensors, decoder = load_file(folder / "model.safetensors"), load(folder, quant=quant)
    scheme = parse_scheme(quant)

    def expected(*parts: str) -> list[Tensor]:
        joined = scheme.quantize(torch.cat([tensors[f"{part}.weight"] for part in parts]))
        if isinstance(joined, Tensor):
            return [joined]
        return [joined.values, joined.scale.view(-1)]

    for i, block in enumerate(decoder.layers):
        attention, mlp = (f"model.layers.{i}.{part}" for part in ("self_attn", "mlp"))
        qkv = [f"{attention}.{x}_proj" for x in "qkv"]
        for linear, parts in (
            (block.attention.qkv_proj, qkv),
            (block.attention.o_proj, [f"{attention}.o_proj"]),
            (block.feed_forward.gate_up_proj, [f"{mlp}.gate_proj", f"{mlp}.up_proj"]),
            (block.feed_forward.down_proj, [f"{mlp}.down_proj"]),
        ):
            for packed, whole in zip(linear.packed, expected(*parts), strict=True):
                assert torch.equal(packed, whole)
            biases = [tensors[f"{p}.bias"] for p in parts if f"{p}.bias" in tensors]
            if biases:
                assert torch.equal(linear.bias, torch.cat(biases))
            else:
                assert linear.bias is None
        assert torch.equal(
            block.attention.norm.weight, tensors[f"model.layers.{i}.input_layernorm.weight"]
        )
    assert torch.equal(decoder.norm.weight, tensors["model.norm.weight"])


@pytest.mark.parametrize("quant", SCHEMES)
@pytest.mark.parametrize("tied", [False, True])
def test_reading_a_few_rows_at_a_time_changes_no_bit(quant, tied, tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "m", tie_word_embeddings=tied)
    whole = load(folder, quant=quant)
    monkeypatch.setattr("hotloop.weights.tensor_file.CHUNK_BYTES", 7 * 64 * 4)
    monkeypatch.setitem(_VALUES_OF_PIECE, "cpu", 7 * 64)
    monkeypatch.setitem(_VALUES_AT_ONCE, "cpu", 32 * 64)
    assert_same_weights(load(folder, quant=quant), whole)


def test_shards_load_as_one_file_does(tmp_path):
    single = write_folder(tmp_path / "single")
    with SafetensorsWriter(tmp_path / "sharded", max_shard_bytes=50_000) as writer:
        for name, tensor in random_tensors(CONFIG).items():
            writer.add(name, tensor)
        (writer.staging / "config.json").write_text(json.dumps(CONFIG))
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert_same_weights(load(tmp_path / "sharded"), load(single))


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_rounded_once_to_the_type_that_is_asked_for(stored, dtype, tmp_path):
    folder = write_folder(tmp_path / "m", dtype=stored)
    decoder = load(folder, dtype=dtype)
    expected = load_file(folder / "model.safetensors")[DOWN].to(dtype)
    assert torch.equal(decoder.layers[1].feed_forward.down_proj.packed[0], expected)
    assert {t.dtype for t in decoder.state_dict().values()} == {dtype}


def test_parts_of_unlike_types_join_without_loss(tmp_path):
    def widen(tensors: dict[str, Tensor]) -> None:
        tensors[Q_PROJ] = tensors[Q_PROJ].float() * 1.001

    folder = write_folder(tmp_path / "m", widen)
    decoder = load(folder, dtype=torch.float32)
    stored = load_file(folder / "model.safetensors")[Q_PROJ]
    assert torch.equal(decoder.layers[1].attention.qkv_proj.packed[0][:64], stored)


@pytest.mark.parametrize("head", ["none", "int8", "fp8", "int4-g64"])
def test_tied_embedding_gives_the_rows_that_the_head_multiplies_with(head, tmp_path):
    folder = write_folder(tmp_path / "m", tie_word_embeddings=True)
    decoder = load(folder, quant="int8", head=head)
    stored = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    quantized = parse_scheme(head).quantize(stored)
    rows = quantized if isinstance(quantized, Tensor) else quantized.dequantize(torch.bfloat16)
    assert torch.equal(decoder.embedding(torch.arange(len(rows))), rows)
    shared = decoder.embedding.packed[0].data_ptr() == decoder.head.packed[0].data_ptr()
    assert shared, "one copy serves both"


def test_untied_embedding_is_never_quantized(tmp_path):
    folder = write_folder(tmp_path / "m")
    stored = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(load(folder, quant="int4-g64", head="int8").embedding.packed[0], stored)


def test_progress_counts_every_layer(tmp_path):
    seen: list[tuple[int, int]] = []
    load(write_folder(tmp_path / "m"), on_layer=lambda *at: seen.append(at))
    assert seen == [(1, 2), (2, 2)]


# What is refused.


@pytest.mark.parametrize("quant", ["none", "int4-g32"])
@pytest.mark.parametrize(
    "name", [Q_PROJ, NORM, "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"]
)
def test_missing_tensor_is_named(name, quant, tmp_path):
    error = refusal(write_folder(tmp_path / "m", lambda t: t.pop(name)), quant=quant)
    assert error.tensor == name
    assert "missing from the checkpoint" in str(error)


def test_missing_bias_is_named(tmp_path):
    name = "model.layers.1.self_attn.o_proj.bias"
    folder = write_folder(tmp_path / "m", lambda t: t.pop(name), attention_bias=True)
    assert refusal(folder).tensor == name


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.scale", "model.layers.0.self_attn.q_norm.weight"]
)
def test_surplus_tensor_is_named(name, tmp_path):
    error = refusal(write_folder(tmp_path / "m", lambda t: t.update({name: torch.ones(3)})))
    assert (error.file, error.tensor) == (tmp_path / "m" / "model.safetensors", name)
    assert "not a part of the model" in str(error)


@pytest.mark.parametrize("name", [Q_PROJ, NORM, "lm_head.weight"])
def test_wrong_shape_is_named_with_the_right_one(name, tmp_path):
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][1:].contiguous()

    error = refusal(write_folder(tmp_path / "m", damage))
    right = list(random_tensors(CONFIG)[name].shape)
    assert (error.file, error.tensor) == (tmp_path / "m" / "model.safetensors", name)
    assert f"has shape {[right[0] - 1, *right[1:]]}" in str(error)
    assert f"calls for {right}" in str(error)


@pytest.mark.parametrize("quant", ["none", "int8", "int4-g64"])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named_with_their_place(quant, bad, tmp_path, monkeypatch):
    monkeypatch.setitem(_VALUES_OF_PIECE, "cpu", 10 * 64)

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[Q_PROJ][37, 5] = bad

    error = refusal(write_folder(tmp_path / "m", damage), quant=quant)
    assert error.tensor == Q_PROJ
    assert "NaN or infinite, the first at [37, 5]" in str(error)


def test_norm_that_is_not_finite_is_refused_too(tmp_path):
    error = refusal(write_folder(tmp_path / "m", lambda t: t[NORM].fill_(float("nan"))))
    assert error.tensor == NORM


def test_tied_model_may_repeat_its_head(tmp_path):
    plain = write_folder(tmp_path / "plain", tie_word_embeddings=True)
    repeated = write_folder(
        tmp_path / "repeated",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
        tie_word_embeddings=True,
    )
    assert_same_weights(load(repeated), load(plain))


def test_stored_rotary_frequencies_are_passed_over(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = write_folder(tmp_path / "m", lambda t: t.update({name: torch.ones(8)}))
    assert_same_weights(load(folder), load(write_folder(tmp_path / "plain")))


def test_groups_that_do_not_divide_are_refused_by_the_matrix(tmp_path):
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj has 64 input features"):
        load(write_folder(tmp_path / "m"), quant="int4-g128")


# A quantized checkpoint that is damaged.


def damage_quantized(folder: Path, tensors: dict[str, Tensor | None]) -> None:
    file = folder / "model.safetensors"
    stored = load_file(file) | tensors
    save_file({name: t for name, t in stored.items() if t is not None}, file)


@pytest.mark.parametrize(
    ("part", "damaged", "says"),
    [
        ("scale", None, "missing"),
        ("offset", None, "missing"),
        ("values", None, "missing"),
        ("scale", torch.ones(64, 3).bfloat16(), "has shape [64, 3] of BF16"),
        ("scale", torch.ones(64), "has shape [64] of F32"),
        ("scale", torch.ones(64, 2), "calls for [64, 2] of BF16"),
        ("values", torch.zeros(64, 64, dtype=torch.int8), "calls for [64, 32] of U8"),
        ("scale", torch.full((64, 2), torch.nan).bfloat16(), "NaN"),
    ],
)
def test_quantized_parts_are_held_against_their_scheme(part, damaged, says, tmp_path):
    source = write_folder(tmp_path / "m")
    folder = quantize_checkpoint(source, tmp_path / "q", quant="int4-g32-asym")
    damage_quantized(folder, {f"{Q_PROJ}.{part}": damaged})
    error = refusal(folder)
    assert says in str(error)
    assert str(error.tensor) in f"{Q_PROJ}.{part}"


def test_symmetric_scheme_refuses_stored_offsets(tmp_path):
    source = write_folder(tmp_path / "m")
    folder = quantize_checkpoint(source, tmp_path / "q", quant="int4-g32")
    damage_quantized(folder, {f"{Q_PROJ}.offset": torch.zeros(64, 2).bfloat16()})
    assert refusal(folder).tensor == f"{Q_PROJ}.offset"


# Random weights.


@pytest.mark.parametrize("quant", SCHEMES)
def test_random_weights_depend_on_their_seed_alone(quant):
    keys = CONFIG | {"attention_bias": True}

    def make(seed: int) -> dict[str, Tensor]:
        source = RandomSource(seed, torch.bfloat16, CPU)
        return load_from(None, source, read_config(keys), quant=quant).state_dict()

    state = torch.random.get_rng_state()
    first, again, other = make(0), make(0), make(1)
    assert torch.equal(torch.random.get_rng_state(), state), "torch's own generator is the user's"
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    table = "embedding.packed0"
    assert not torch.equal(first[table], other[table])
    assert first[table].float().std().item() == pytest.approx(0.02, rel=0.05)
    for name, tensor in first.items():
        if re.search(r"norm\.weight$", name):
            assert (tensor == 1).all()
        if name.endswith("bias"):
            assert not tensor.any()


# Switches that the tensors overrule.


def test_a_head_of_its_own_is_used_though_the_configuration_ties_it(tmp_path):
    def add_head(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()

    tied = write_folder(tmp_path / "m", add_head, tie_word_embeddings=True)
    untied = write_folder(tmp_path / "u", add_head, tie_word_embeddings=False)
    with closing(open_checkpoint(tied)) as checkpoint:
        model, (note,) = read_model(checkpoint)
    assert not model.tie_embeddings
    assert "lm_head.weight is not the embedding" in note
    assert_same_weights(load(tied), load(untied))
    copies = [
        quantize_checkpoint(path, path.with_suffix(".q"), quant="int8") for path in (tied, untied)
    ]
    assert_same_weights(load(copies[0]), load(copies[1]))


def test_a_head_that_equals_a_tied_embedding_is_a_copy_of_it(tmp_path):
    def add_copy(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    folder = write_folder(tmp_path / "m", add_copy, tie_word_embeddings=True)
    with closing(open_checkpoint(folder)) as checkpoint:
        model, notes = read_model(checkpoint)
    assert (model.tie_embeddings, notes) == (True, ())
    assert_same_weights(load(folder), load(write_folder(tmp_path / "n", tie_word_embeddings=True)))


def test_biases_of_queries_keys_and_values_need_none_of_the_output_projection(tmp_path):
    def without(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("o_proj.bias")]:
            del tensors[name]

    folder = write_folder(tmp_path / "m", without, attention_bias=True)
    with closing(open_checkpoint(folder)) as checkpoint:
        model, (note,) = read_model(checkpoint)
    assert {(a.qkv_bias, a.o_bias) for a in (layer.attention for layer in model.layers)} == {
        (True, False)
    }
    assert "o_proj has no bias" in note
    first = load(folder).blocks[0].attention
    assert first.qkv_proj.bias is not None
    assert first.o_proj.bias is None
