"""Checkpoints of fp8, bitsandbytes and AutoRound are read as they are stored."""

import json
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stored_models import (
    RAGGED,
    Encode,
    Stored,
    assert_ranks_hold_slices,
    assert_same_model,
    noise,
    refusal,
    write_stored,
)
from test_awq_gptq import awq, gptq
from test_compressed_tensors import FORMATS, compressed, scheme_of
from torch import Tensor
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
PER_TENSOR = FP8 | {"weight_block_size": None, "activation_scheme": "static"}


def blocks(dtype: torch.dtype = torch.float32, name_of_scale: str = "weight_scale_inv") -> Encode:
    def encode(name: str, weight: Tensor) -> Stored | None:
        if name == "lm_head":
            return None
        n, k = weight.shape
        shape = (-(-n // 128), -(-k // 128))
        step = (0.5 + torch.rand(shape, generator=noise(1))) / 100
        if dtype in (torch.uint8, torch.float8_e8m0fnu):
            step = torch.exp2(step.log2().round())
            exponents = (step.log2() + 127).to(torch.uint8)
            scale = exponents.view(dtype)
        else:
            scale = step.to(dtype)
            step = scale.float()
        values = (weight * 20).to(torch.float8_e4m3fn)
        whole = step.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
        return {".weight": values, f".{name_of_scale}": scale}, values.float() * whole

    return encode


def one_scale(shape: tuple[int, ...], name_of_scale: str) -> Encode:
    def encode(name: str, weight: Tensor) -> Stored | None:
        if name == "lm_head":
            return None
        values, scale = (weight * 20).to(torch.float8_e4m3fn), torch.full(shape, 0.0123)
        return {".weight": values, f".{name_of_scale}": scale}, values.float() * scale.view(())

    return encode


SIZES: dict[str, dict[str, Any]] = {
    "whole blocks": {"hidden_size": 256, "intermediate_size": 384},
    "ragged": {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 3}
    | {"num_key_value_heads": 1},
    "smaller than a block": RAGGED,
}


@pytest.mark.parametrize("sizes", SIZES)
def test_blocks_are_worth_what_they_say_whatever_the_size(sizes, tmp_path):
    assert_same_model(*write_stored(tmp_path, blocks(), FP8, **SIZES[sizes]))


@pytest.mark.parametrize("sizes", SIZES)
def test_several_ranks_hold_slices_of_blocks(sizes, tmp_path):
    keys = SIZES[sizes] | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    assert_ranks_hold_slices(write_stored(tmp_path, blocks(), FP8, **keys)[0])


def test_scale_inv_multiplies_as_in_transformers():
    weight = torch.randn(256, 384, generator=noise(0))
    stored, worth = blocks()("x", weight) or ({}, weight)
    parts = stored[".weight"], stored[".weight_scale_inv"]
    theirs = Fp8Dequantize(None)._dequantize_one(*parts, torch.float32)
    torch.testing.assert_close(theirs, worth)


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_what_transformers_quantized_is_worth_what_it_makes_of_it(scale_fmt, tmp_path):
    config = FineGrainedFP8Config(scale_fmt=scale_fmt, modules_to_not_convert=["lm_head"])
    quantizer = SimpleNamespace(quantization_config=config)

    def encode(name: str, weight: Tensor) -> Stored | None:
        if name == "lm_head":
            return None
        made = Fp8Quantize(quantizer).convert({f"{name}.weight": weight})
        stored = {part.removeprefix(name): tensor for part, tensor in made.items()}
        values, scale = stored[".weight"], stored[".weight_scale_inv"]
        assert values.dtype == torch.float8_e4m3fn
        return stored, Fp8Dequantize(quantizer)._dequantize_one(values, scale, torch.float32)

    said = config.to_dict()
    assert_same_model(*write_stored(tmp_path, encode, said, **SIZES["whole blocks"]))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.uint8, torch.float8_e8m0fnu], ids=str
)
def test_scales_of_blocks_keep_their_type(dtype, tmp_path):
    said = FP8 | ({"scale_fmt": "ue8m0"} if dtype.itemsize == 1 else {})
    assert_same_model(*write_stored(tmp_path, blocks(dtype), said, **SIZES["ragged"]))


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_one_scale_may_serve_a_whole_matrix(name, shape, tmp_path):
    surplus = {"model.layers.0.self_attn.q_proj.activation_scale": torch.ones(())}
    encode = one_scale(shape, name)
    assert_same_model(*write_stored(tmp_path, encode, PER_TENSOR, extra=surplus))


@pytest.mark.parametrize("zero", [0.0, 1.0])
def test_zero_points_of_fp8_are_zero(zero, tmp_path):
    def encode(name: str, weight: Tensor) -> Stored | None:
        if made := one_scale((1,), "weight_scale")(name, weight):
            made[0][".weight_zero_point"] = torch.full((1,), zero).to(torch.float8_e4m3fn)
        return made

    quantized, dense = write_stored(tmp_path, encode, PER_TENSOR)
    if zero:
        assert "q_proj.weight_zero_point': holds zero points" in refusal(quantized)
    else:
        assert_same_model(quantized, dense)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (FP8 | {"weight_block_size": [64, 64]}, "one for each block of 64 x 64"),
        (FP8 | {"modules_to_not_convert": ["mlp"]}, "says that it is not quantized (fp8)"),
        (FP8 | {"fmt": "e5m2"}, "fmt"),
        ({"quant_method": "gptq", "bits": 8}, "is stored as fp8, though"),
    ],
)
def test_a_description_that_is_not_so_is_refused(said, problem, tmp_path):
    quantized, _ = write_stored(tmp_path, blocks(), said, **SIZES["whole blocks"])
    assert problem in refusal(quantized)


@pytest.mark.parametrize(("exponent", "problem"), [(255, "NaN"), (254, "too large for float32")])
def test_a_power_of_two_that_is_no_scale_is_refused(exponent, problem, tmp_path):
    def encode(name: str, weight: Tensor) -> Stored | None:
        if (made := blocks(torch.uint8)(name, weight)) and "1.mlp.up_proj" in name:
            made[0][".weight_scale_inv"][0, 0] = exponent
        return made

    message = refusal(write_stored(tmp_path, encode, FP8)[0])
    assert "1.mlp.up_proj" in message
    assert problem in message


@pytest.mark.parametrize("said", [FP8, None])
@pytest.mark.parametrize(
    ("scales", "problem"),
    [
        ((), ".weight_scale or .weight_scale_inv is missing beside it"),
        (
            (".weight_scale", ".weight_scale_inv"),
            "more than once: as float-quantized (.weight_scale) and as fp8 (.weight_scale_inv)",
        ),
    ],
)
def test_e4m3_weights_have_one_scale(said, scales, problem, tmp_path):
    def encode(name: str, weight: Tensor) -> Stored | None:
        if (made := blocks()(name, weight)) is None or "0.self_attn.q_proj" not in name:
            return made
        scale = made[0][".weight_scale_inv"]
        return {".weight": made[0][".weight"]} | dict.fromkeys(scales, scale), made[1]

    message = refusal(write_stored(tmp_path, encode, said)[0])
    assert problem in message
    assert "0.self_attn.q_proj" in message


# bitsandbytes.

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
BNB |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "_load_in_4bit": True}


def nf4(*, nested: bool, type_: str = "nf4") -> Encode:
    table = torch.cat((torch.linspace(-1, 0, 8), torch.linspace(0.08, 1, 8)))

    def encode(name: str, weight: Tensor) -> Stored | None:
        if name == "lm_head":
            return None
        n, k = weight.shape
        index = torch.randint(0, 16, (n * k,), dtype=torch.uint8, generator=noise(2))
        n_blocks = -(-n * k // 64)
        state: dict[str, Any] = {"quant_type": type_, "blocksize": 64, "dtype": "bfloat16"}
        state |= {"shape": [n, k]}
        stored = {
            ".weight": (index[::2] << 4 | index[1::2])[:, None],
            ".weight.quant_map": table,
        }
        if nested:
            absmax = torch.randint(0, 256, (n_blocks,), dtype=torch.uint8, generator=noise(3))
            levels = torch.linspace(-1, 1, 256)
            outer = 0.05 + torch.rand(-(-n_blocks // 256), generator=noise(4)) / 10
            scale = levels[absmax.long()] * outer.repeat_interleave(256)[:n_blocks] + 0.25
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
            stored |= {".weight.nested_absmax": outer, ".weight.nested_quant_map": levels}
        else:
            absmax = scale = 0.1 + torch.rand(n_blocks, generator=noise(3)) / 10
        stored[".weight.absmax"] = absmax
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        stored[f".weight.quant_state.bitsandbytes__{type_}"] = text
        worth = table[index.long()] * scale.repeat_interleave(64)[: n * k]
        return stored, worth.view(n, k)

    return encode


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("keys", [{}, RAGGED], ids=["whole", "ragged"])
def test_nf4_is_worth_what_it_says(nested, keys, tmp_path):
    assert_same_model(*write_stored(tmp_path, nf4(nested=nested), BNB, **keys))


def test_fp4_has_a_table_of_its_own(tmp_path):
    said = BNB | {"bnb_4bit_quant_type": "fp4"}
    assert_same_model(*write_stored(tmp_path, nf4(nested=False, type_="fp4"), said))


def test_integers_of_bitsandbytes_are_refused_by_name(tmp_path):
    def encode(name: str, weight: Tensor) -> Stored | None:
        stored = {".weight": weight.char(), ".SCB": torch.ones(len(weight))}
        return None if name == "lm_head" else (stored, weight)

    said = BNB | {"load_in_4bit": False, "load_in_8bit": True}
    message = refusal(write_stored(tmp_path, encode, said)[0])
    assert "says bitsandbytes int8, which is not supported" in message
    message = refusal(write_stored(tmp_path, encode, None)[0])
    assert "q_proj.SCB: it is bitsandbytes int8 in a layout that is not supported" in message


# AutoRound.

ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "int"}
ROUND |= {"sym": False, "autoround_version": "0.9.0", "iters": 200, "block_name_to_quantize": None}


PACKINGS: dict[str, Callable[..., Encode]] = {
    "auto_round:auto_gptq": gptq,
    "auto_round:gptq": gptq,
    "auto_round:gptqmodel": partial(gptq, version=2),
    "auto_round": partial(gptq, version=2),
    "auto_round:exllamav2": partial(gptq, version=2),
    "auto_round:auto_awq": awq,
}
"""What stores each: the writer subtracts 1 from zero points in AutoGPTQ's packing alone."""


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_auto_round_is_read_in_the_packing_that_it_names(packing, symmetric, tmp_path):
    said = ROUND | {"packing_format": packing, "sym": symmetric}
    assert_same_model(*write_stored(tmp_path, PACKINGS[packing](32, symmetric=symmetric), said))


@pytest.mark.parametrize(
    ("backend", "version"),
    [("auto_round:exllamav2", 2), ("auto_round:gptq:exllamav2", 1), ("auto", 1), (None, 1)],
)
def test_old_descriptions_of_auto_round_name_the_packing_as_backend(backend, version, tmp_path):
    said = ROUND | {"quant_method": "intel/auto-round", "backend": backend}
    assert_same_model(*write_stored(tmp_path, gptq(32, version=version), said))


def test_auto_round_is_read_in_the_packing_of_llm_compressor(tmp_path):
    format_, args = FORMATS["int4 in groups"]
    encode = compressed(scheme_of(format_, **args))
    said = ROUND | {"packing_format": "auto_round:llm_compressor", "sym": True}
    assert_same_model(*write_stored(tmp_path, encode, said))


def test_auto_round_may_name_the_tool_whose_packing_it_uses(tmp_path):
    said = ROUND | {"quant_method": "gptq", "desc_act": False, "damp_percent": 0.01}
    assert_same_model(*write_stored(tmp_path, gptq(32), said))


def test_auto_round_may_leave_matrices_out_or_give_them_other_bits(tmp_path):
    plain, wide = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.k_proj"

    def encode(name: str, weight: Tensor) -> Stored | None:
        if name == plain:
            return None
        return gptq(32, bits=8 if name == wide else 4)(name, weight)

    other = {plain: {"bits": 16, "data_type": "fp"}, wide: {"bits": 8}}
    assert_same_model(*write_stored(tmp_path, encode, ROUND | {"extra_config": other}))


def test_settings_of_auto_round_may_be_under_a_pattern_of_names(tmp_path):
    def encode(name: str, weight: Tensor) -> Stored | None:
        if "layers.0.mlp" in name:
            return None
        return gptq(32, bits=8 if name.endswith("1.mlp.up_proj") else 4)(name, weight)

    other = {r".*layers\.1\.mlp.*": {"bits": 4}, "model.layers.1.mlp.up_proj": {"bits": 8}}
    other |= {r"layers\.0\.mlp\.(up|gate|down)_proj": {"bits": 16}}
    assert_same_model(*write_stored(tmp_path, encode, ROUND | {"extra_config": other}))
    quantized, _ = write_stored(tmp_path / "other", encode, ROUND | {"extra_config": {"(": {}}})
    assert "is not a valid regular expression" in refusal(quantized)


def test_a_packing_of_auto_round_that_is_not_read_is_refused(tmp_path):
    said = ROUND | {"packing_format": "auto_round:fp8_static"}
    message = refusal(write_stored(tmp_path, gptq(32), said)[0])
    assert "auto-round auto_round:fp8_static, which is not supported" in message
