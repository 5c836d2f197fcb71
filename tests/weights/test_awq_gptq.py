"""Checkpoints of AWQ and GPTQ keep their integers, zero points and scales."""

import dataclasses
import json
import re
from contextlib import closing

import pytest
import torch
from cuda_emulation import EmulatedDevice, needs_compiler
from safetensors.torch import load_file
from stored_models import (
    RAGGED,
    Encode,
    Stored,
    assert_ranks_hold_slices,
    assert_same_model,
    codes,
    distribution,
    pack,
    refusal,
    scales,
    spread,
    write_stored,
)
from torch import Tensor
from transformers import (
    AutoRoundConfig,
    AwqConfig,
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    GPTQConfig,
)
from whole_models import assert_same_weights, load

from hotloop import LLM
from hotloop.engine.memory import predict_memory
from hotloop.engine.setup import prepare
from hotloop.errors import HotloopError, UnsupportedError
from hotloop.quant.claims import read_claims
from hotloop.quant.encodings.awq import _unpack
from hotloop.quant.encodings.bits import unpack
from hotloop.quant.encodings.gptq import _zero_points
from hotloop.types import EngineConfig
from hotloop.weights.checkpoint import open_checkpoint, stored_form
from hotloop.weights.identity import identify_checkpoint
from hotloop.weights.quantize import quantize_checkpoint

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "GEMM"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}


def groups(k: int, group_size: int) -> int:
    return -(-k // group_size)


def awq(
    group_size: int, *, symmetric: bool = False, changed: dict[str, Tensor] | None = None
) -> Encode:
    def encode(name: str, weight: Tensor) -> Stored | None:
        if name == "lm_head":
            return None
        n, k = weight.shape
        size = k if group_size == -1 else group_size
        q, zeros = codes(k, n, bits=4), codes(groups(k, size), n, bits=4, seed=1)
        if symmetric:
            zeros = torch.full_like(zeros, 8)
        scale = scales(groups(k, size), n)
        stored = {
            ".qweight": pack(q, 4, AWQ_ORDER),
            ".qzeros": pack(zeros, 4, AWQ_ORDER),
            ".scales": scale,
        }
        worth = (q.T - spread(zeros.T, size, k)) * spread(scale.T, size, k)
        return stored | (changed or {}), worth

    return encode


def gptq(
    group_size: int,
    *,
    bits: int = 4,
    version: int = 1,
    symmetric: bool = False,
    act_order: bool = False,
    lm_head: bool = False,
) -> Encode:
    def encode(name: str, weight: Tensor) -> Stored | None:
        if name == "lm_head" and not lm_head:
            return None
        n, k = weight.shape
        size = k if group_size == -1 else group_size
        half = 1 << bits - 1
        q, zeros = codes(k, n, bits=bits), codes(groups(k, size), n, bits=bits, seed=1)
        if symmetric:
            zeros = torch.full_like(zeros, half)
        scale, group = scales(groups(k, size), n), torch.arange(k) // size
        if act_order:
            own = torch.Generator().manual_seed(sum(map(ord, name)))  # q, k and v differ
            group = group[torch.randperm(k, generator=own)]
        words = pack(zeros, bits)
        if version == 1:  # one subtraction from a word: a zero of 0 borrows from its neighbor
            words = words - sum(1 << place for place in range(0, 32, bits))
        stored = {
            ".qweight": pack(q.T, bits).T,
            ".qzeros": words,
            ".scales": scale,
            ".g_idx": group.int(),
        }
        return stored, ((q - zeros[group]) * scale[group].float()).T

    return encode


def test_golden_words():
    eight = torch.arange(8)[None]
    assert pack(eight, 4, AWQ_ORDER).item() == 0x75316420
    assert pack(eight, 4).item() == 0x76543210
    assert unpack(pack(eight, 4), 4).tolist() == eight.tolist()
    assert unpack(pack(eight, 8), 8).tolist() == eight.tolist()
    assert _unpack(pack(eight, 4, AWQ_ORDER)).T.tolist() == [[q - 8 for q in range(8)]]


@pytest.mark.parametrize(
    ("word", "bits", "zeros"),
    [
        (0x77777777, 4, [8] * 8),
        (0x7777776F, 4, [0] + [8] * 7),  # a zero of 0 borrows from the next one
        (0xEEEEEEEF, 4, [0] * 8),
        (0xEEEEEEEE, 4, [15] * 8),
        (0x7F7F7F7F, 8, [128] * 4),
        (0xFEFEFEFF, 8, [0] * 4),
    ],
)
def test_golden_words_of_gptqs_first_version(word, bits, zeros):
    stored = torch.tensor([[word - (word >> 31 << 32)]], dtype=torch.int32)
    half = 1 << bits - 1
    assert _zero_points(stored, bits, version=1).tolist() == [[zero - half for zero in zeros]]


@pytest.mark.parametrize("group_size", [32, 16, -1])
def test_awq_is_worth_what_it_says(group_size, tmp_path):
    said = AWQ | {"group_size": group_size}
    quantized, dense = write_stored(tmp_path, awq(group_size), said)
    assert_same_model(quantized, dense)
    with LLM(str(quantized), device="cpu", dtype="float32") as llm:
        assert (llm.config.quant, llm.config.head) == ("auto", "auto")
    with closing(open_checkpoint(quantized)) as checkpoint:
        form = stored_form(checkpoint)
    assert form.is_quantized
    assert form.summary.startswith("awq (")
    assert "I32 for 28" in form.summary


def test_groups_need_not_divide_the_input_features(tmp_path):
    for i, encode in enumerate((awq(32), gptq(32))):
        (folder := tmp_path / str(i)).mkdir()
        said = (AWQ, GPTQ)[i]
        assert_same_model(*write_stored(folder, encode, said, **RAGGED))


def test_the_description_of_old_awq_files_lies_beside_the_configuration(tmp_path):
    said = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    assert_same_model(*write_stored(tmp_path, awq(32), said, file="quant_config.json"))


def test_the_files_of_old_autogptq_have_names_of_their_own(tmp_path):
    said = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": False}
    said |= {"true_sequential": True, "model_name_or_path": None, "model_file_base_name": "x"}
    quantized, dense = write_stored(tmp_path, gptq(32), said, file="quantize_config.json")
    (quantized / "model.safetensors").rename(quantized / "gptq_model-4bit-32g.safetensors")
    assert_same_model(quantized, dense)


def test_the_description_may_be_missing_where_tensors_say_it_all(tmp_path):
    assert_same_model(*write_stored(tmp_path, awq(32), None))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_zero_points_of_gptq_are_read_in_both_versions(bits, version, tmp_path):
    said = GPTQ | {"bits": bits, "checkpoint_format": {1: "gptq", 2: "gptq_v2"}[version]}
    encode = gptq(32, bits=bits, version=version)
    assert_same_model(*write_stored(tmp_path, encode, said))


@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_zero_points_tell_the_version_whatever_the_label(bits, version, label, tmp_path):
    said = GPTQ | {"bits": bits, "sym": True, "checkpoint_format": label}
    encode = gptq(32, bits=bits, version=version, symmetric=True)
    assert_same_model(*write_stored(tmp_path, encode, said))


@pytest.mark.parametrize("group_size", [16, -1])
def test_act_order_is_read_by_the_group_of_each_input_feature(group_size, tmp_path):
    said = GPTQ | {"group_size": group_size, "desc_act": True}
    assert_same_model(*write_stored(tmp_path, gptq(group_size, act_order=True), said))


@pytest.mark.parametrize("execution", ["eager", pytest.param("fused", marks=needs_compiler)])
@pytest.mark.parametrize("n_orders", [4, 7], ids=["one of each input", "one of each matrix"])
def test_every_order_of_input_features_is_forecast(n_orders, execution, tmp_path, monkeypatch):
    monkeypatch.setattr("hotloop.engine.runner.device_of", lambda _: EmulatedDevice())
    monkeypatch.setattr("hotloop.engine.setup.fused_unavailable_reason", lambda _: None)

    def encode(name: str, weight: Tensor) -> Stored | None:
        of_input = re.sub("[qkv]_proj|(gate|up)_proj", "projection", name)
        return gptq(32, act_order=True)(of_input if n_orders == 4 else name, weight)

    said, keys = GPTQ | {"desc_act": True}, {"head_dim": 64, "num_hidden_layers": 1}
    model, _ = write_stored(tmp_path, encode, said, **keys)
    with LLM(str(model), device="cpu", execution=execution, max_seq_len=16) as llm:
        decoder = llm._runner._model.decoder
        (block,) = decoder.blocks
        assert sum(len(linear.pieces) for linear in block.linears.values()) == n_orders
        resident = {t.data_ptr(): t.untyped_storage().nbytes() for t in decoder.buffers()}
        predicted = predict_memory(llm.config)
        assert predicted.weights_bytes == llm.describe().weight_bytes == sum(resident.values())


def test_act_order_is_refused_where_ranks_would_split_its_input_features(tmp_path):
    quantized, _ = write_stored(tmp_path, gptq(16, act_order=True), GPTQ | {"group_size": 16})
    for_one = EngineConfig(model=str(quantized), device="cpu")
    assert prepare(for_one).config.quant == "auto"
    with pytest.raises(UnsupportedError, match=r"o_proj are permuted \(act-order\)"):
        prepare(dataclasses.replace(for_one, tensor_parallel=2))


def test_input_features_in_their_own_order_are_not_permuted(tmp_path):
    quantized, _ = write_stored(tmp_path, gptq(32), GPTQ | {"desc_act": True})
    setup = prepare(EngineConfig(model=str(quantized), device="cpu", tensor_parallel=2))
    assert not any(scheme.format(64).permuted for scheme in setup.schemes.values())


def test_matrices_may_be_left_out_or_have_settings_of_their_own(tmp_path):
    def encode(name: str, weight: Tensor) -> Stored | None:
        if "layers.0.mlp" in name:
            return None
        bits, size = (8, 16) if "o_proj" in name else (4, 32)
        return gptq(size, bits=bits)(name, weight)

    dynamic = {r"-:.*\.0\.mlp\..*": {}, r"+:.*o_proj$": {"bits": 8, "group_size": 16}}
    assert_same_model(*write_stored(tmp_path, encode, GPTQ | {"dynamic": dynamic}))


def test_modules_that_awq_did_not_convert_are_named_by_whole_parts(tmp_path):
    def encode(name: str, weight: Tensor) -> Stored | None:
        return None if "layers.1.mlp" in name else awq(32)(name, weight)

    said = AWQ | {"modules_to_not_convert": ["model.layers.1.mlp"]}
    assert_same_model(*write_stored(tmp_path, encode, said))
    said = AWQ | {"modules_to_not_convert": ["layers.1.ml"]}
    (tmp_path / "other").mkdir()
    quantized, _ = write_stored(tmp_path / "other", encode, said)
    assert "says that it is quantized (awq gemm)" in refusal(quantized)


def test_a_quantized_head_is_used(tmp_path):
    said = GPTQ | {"lm_head": True}
    assert_same_model(*write_stored(tmp_path, gptq(32, lm_head=True), said, vocab_size=264))


@pytest.mark.parametrize("quant", ["auto", "none", "int8"])
@pytest.mark.parametrize(
    ("encode", "said"),
    [
        (awq(32), AWQ),
        (gptq(32, bits=8), GPTQ | {"bits": 8}),
        (gptq(-1), GPTQ | {"group_size": -1}),
        (awq(128), AWQ | {"group_size": 128}),  # 192 input features: a rank holds one group
        (gptq(128), GPTQ | {"group_size": 128}),
    ],
    ids=["awq", "gptq", "gptq per channel", "awq, ragged", "gptq, ragged"],
)
def test_several_ranks_hold_slices_of_what_is_stored(quant, encode, said, tmp_path):
    assert_ranks_hold_slices(write_stored(tmp_path, encode, said)[0], quant=quant)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (AWQ | {"bits": 8}, "is stored as awq of 4 bits"),
        (AWQ | {"group_size": 64}, "says groups of 64"),
        (AWQ | {"version": "gemv"}, "configuration says awq gemv, which is not supported"),
        (AWQ | {"version": "GEMV_fast"}, "says awq gemv_fast, which is not supported"),
        (AWQ | {"version": "marlin"}, "configuration says awq marlin, which is not supported"),
        (AWQ | {"modules_to_not_convert": ["q_proj"]}, "says that it is not quantized"),
        (GPTQ, "is stored as awq, though the checkpoint's configuration says gptq"),
        (AWQ | {"surprise": 1}, "surprise"),
        (AWQ | {"quant_method": "spqr"}, "quant_method 'spqr' is not supported"),
    ],
)
def test_a_description_that_contradicts_the_tensors_is_refused(said, problem, tmp_path):
    quantized, _ = write_stored(tmp_path, awq(32), said)
    message = refusal(quantized)
    assert problem in message
    assert "quantized" in message


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (GPTQ | {"sym": True}, "with zero points, though"),
        (GPTQ | {"checkpoint_format": "marlin"}, "gptq, checkpoint_format marlin"),
        (GPTQ | {"dynamic": {"(a+)+$": {}}}, "repeats too much"),
        (GPTQ | {"dynamic": {"+:[": {}}}, "not a valid regular expression"),
        (None, "does not say which (checkpoint_format: gptq or gptq_v2)"),
    ],
)
def test_a_description_of_gptq_that_cannot_be_is_refused(said, problem, tmp_path):
    quantized, _ = write_stored(tmp_path, gptq(32), said)
    assert problem in refusal(quantized)


def test_zero_points_of_awq_that_are_all_half_the_range_are_symmetric(tmp_path):
    quantized, dense = write_stored(tmp_path, awq(32, symmetric=True), AWQ)
    assert_same_model(quantized, dense)
    setup = prepare(EngineConfig(model=str(quantized), device="cpu"))
    assert {scheme.format(64).zero for scheme in setup.schemes.values()} == {"none"}


@pytest.mark.parametrize("said", ["gptq", "gptq_v2", None])
def test_a_version_of_zero_points_that_is_assumed_is_noted(said, tmp_path):
    described = GPTQ | ({} if said is None else {"checkpoint_format": said})
    encode = gptq(32, version=2 if said == "gptq_v2" else 1)
    quantized, dense = write_stored(tmp_path, encode, described)
    assert_same_model(quantized, dense)
    notes = prepare(EngineConfig(model=str(quantized), device="cpu")).notes
    assumed = [note for note in notes if "14 matrices are read as GPTQ's version 1" in note]
    assert len(assumed) == (said is None)


def test_a_tied_head_may_be_left_out_although_it_is_said_to_be_quantized(tmp_path):
    said = GPTQ | {"lm_head": True}
    assert_same_model(*write_stored(tmp_path, gptq(32), said, tie_word_embeddings=True))


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_groups_of_none_are_refused(method, tmp_path):
    encode, said = {"awq": (awq(32), AWQ), "gptq": (gptq(32), GPTQ)}[method]
    message = refusal(write_stored(tmp_path, encode, said | {"group_size": 0})[0])
    assert "group_size: must be -1 or at least 1, not 0" in message


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_scales_stay_in_float16_where_the_model_is_in_bfloat16(method, tmp_path):
    encode, said = {"awq": (awq(32), AWQ), "gptq": (gptq(32), GPTQ)}[method]
    quantized, dense = write_stored(tmp_path, encode, said, torch_dtype="bfloat16")
    setup = prepare(EngineConfig(model=str(quantized), device="cpu", dtype="bfloat16"))
    formats = [scheme.format(64) for scheme in setup.schemes.values()]
    assert {form.scale_dtype for form in formats if form.kind != "dense"} == {torch.float16}
    worth = load_file(dense / "model.safetensors")
    attention = load(quantized, dtype=torch.bfloat16).layers[0].attention
    got = attention.o_proj(torch.eye(64, dtype=torch.bfloat16)).float().T
    assert torch.equal(got, worth["model.layers.0.self_attn.o_proj.weight"].bfloat16().float())


def test_a_description_without_a_method_is_refused(tmp_path):
    quantized, _ = write_stored(tmp_path, awq(32), {})
    assert "quant_method is missing" in refusal(quantized)


Q = "model.layers.0.self_attn.q_proj"  # square: 64 x 64


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({".scales": scales(64, 2)}, "AWQ or GPTQ in a layout that is not supported"),  # GEMV
        ({".qweight": torch.zeros(16, 64, dtype=torch.int16)}, "not supported"),  # GEMV fast
        ({".qweight": torch.zeros(4, 128, dtype=torch.int32)}, "not supported"),  # Marlin
        ({".qweight": torch.zeros((), dtype=torch.int32)}, "not supported"),
        ({".scales": torch.zeros(0, 64).half()}, "has 0 groups along 64 input features"),
        ({".scales": scales(2, 64).double()}, "holds scales as F64"),
        ({".scales": scales(2, 64) * torch.nan}, "NaN"),
        ({".qzeros": torch.zeros(2, 64, dtype=torch.int8)}, "has shape [2, 64] of I8"),
        ({".surplus": torch.ones(3)}, "not a part of the model"),
    ],
)
def test_tensors_that_are_not_awqs_are_refused_by_name(changed, problem, tmp_path):
    def encode(name: str, weight: Tensor) -> Stored | None:
        return awq(32, changed=changed if name == Q else None)(name, weight)

    quantized, _ = write_stored(tmp_path, encode, AWQ)
    message = refusal(quantized)
    assert problem in message
    assert Q in message


def changed_in_q(encode: Encode, **parts: Tensor | None) -> Encode:
    """One matrix has other parts; None takes one out."""

    def changed(name: str, weight: Tensor) -> Stored | None:
        if (made := encode(name, weight)) is None or name != Q:
            return made
        stored = dict(made[0]) | {f".{part}": tensor for part, tensor in parts.items()}
        return {part: tensor for part, tensor in stored.items() if tensor is not None}, made[1]

    return changed


def words(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("is_said", [True, False])
@pytest.mark.parametrize(
    ("encode", "said", "parts", "problem"),
    [
        (awq(32), AWQ, {"qzeros": None}, ".qzeros is missing beside it"),
        (gptq(32), GPTQ, {"scales": None}, ".scales is missing beside it"),
        (
            awq(32),
            AWQ,
            {"weight": torch.zeros(64, 64)},
            "more than once: as awq (.qweight) and as .weight",
        ),
        (
            awq(32),
            AWQ,
            {"weight_packed": words(64, 8), "weight_scale": torch.ones(64, 2)},
            "more than once: as awq (.qweight) and as pack-quantized (.weight_packed)",
        ),
        (
            gptq(32),
            GPTQ,
            {"weight_packed": words(64, 7)},
            "more than once: as gptq (.qweight) and as compressed-tensors (.weight_packed)",
        ),
        (
            gptq(32),
            GPTQ,
            {"qzeros": None, "weight": torch.zeros(64, 64)},
            "more than once: as AWQ or GPTQ (.qweight) and as .weight",
        ),
    ],
)
def test_parts_that_are_missing_and_matrices_that_are_there_twice_are_named(
    encode, said, parts, problem, is_said, tmp_path
):
    described = said | {"checkpoint_format": None} if is_said else None
    if described is None and said is GPTQ:
        encode = gptq(32, symmetric=True)
    quantized, _ = write_stored(tmp_path, changed_in_q(encode, **parts), described)
    message = refusal(quantized)
    assert problem in message
    assert Q in message


@pytest.mark.parametrize(
    ("encode", "said", "parts", "problem"),
    [
        (gptq(32), GPTQ, {"qweight": words(7, 64)}, "[7, 64] of I32, and should be [8, 64] of I32"),
        (awq(32), AWQ, {"qweight": words(64, 7)}, "[64, 7] of I32, and should be [64, 8] of I32"),
        (gptq(32), GPTQ, {"qweight": None}, ".qweight is missing beside it"),
        (
            gptq(32),
            GPTQ,
            {"qweight": words(8, 64, dtype=torch.int64)},
            "of I64 where its encoding calls for [8, 64] of I32",
        ),
        (gptq(32), GPTQ | {"group_size": -1}, {}, "says one group (group_size -1)"),
        (
            gptq(32),
            GPTQ,
            {"g_idx": torch.tensor([0] * 40 + [7] * 24).int()},
            "puts input feature 40 into group 7 of 2",
        ),
    ],
)
def test_parts_that_are_not_so_are_named_with_what_would_be_right(
    encode, said, parts, problem, tmp_path
):
    message = refusal(write_stored(tmp_path, changed_in_q(encode, **parts), said)[0])
    assert problem in message
    assert "q_proj" in message


def test_surplus_tensors_that_hold_nothing_are_accepted(tmp_path):
    extra = {
        "model.layers.0.self_attn.q_proj.bias": torch.zeros(64),
        "model.layers.0.self_attn.k_proj.input_scale": torch.ones(1),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    quantized, dense = write_stored(tmp_path, awq(32), AWQ, extra=extra)
    (quantized / "consolidated.safetensors").write_bytes(b"the same weights once more")
    assert_same_model(quantized, dense)


def test_a_copy_of_a_quantized_checkpoint_is_hotloops_own(tmp_path):
    quantized, _ = write_stored(tmp_path, awq(32), AWQ)
    notes: list[str] = []
    copy = quantize_checkpoint(quantized, tmp_path / "copy", quant="int8", on_note=notes.append)
    assert notes == ["14 matrices stored as awq are dequantized, and quantized again as int8."]
    assert "quantization_config" not in json.loads((copy / "config.json").read_text())
    assert_same_weights(load(copy), load(quantized, quant="int8"))
    with pytest.raises(HotloopError, match="'auto' keeps what the source stores"):
        quantize_checkpoint(quantized, tmp_path / "other", quant="auto")


def test_the_files_that_describe_a_checkpoint_are_part_of_its_content(tmp_path):
    said = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    quantized, _ = write_stored(tmp_path, awq(32), said, file="quant_config.json")
    before = identify_checkpoint(quantized)
    (quantized / "quant_config.json").write_text("{}")
    assert identify_checkpoint(quantized) != before


@pytest.mark.parametrize("quant", ["int8", "none"])
def test_a_named_scheme_quantizes_again_and_says_so(quant, tmp_path):
    quantized, dense = write_stored(tmp_path, awq(32), AWQ)
    torch.testing.assert_close(
        distribution(quantized, quant=quant), distribution(dense, quant=quant)
    )
    with LLM(str(quantized), quant=quant, device="cpu") as llm:
        (note,) = [note for note in llm.describe().notes if "awq" in note]
    assert note.startswith("14 matrices stored as awq are dequantized")
    assert ("quantized again as int8" in note) == (quant == "int8")


GPTQMODEL_AWQ = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": False}
GPTQMODEL_AWQ |= {"quant_method": "awq", "checkpoint_format": "gemm", "pack_dtype": "int32"}
GPTQMODEL_AWQ |= {"meta": {"quantizer": ["gptqmodel:5.0.0"]}, "zero_point": True, "version": "gemm"}


@pytest.mark.parametrize("said", [AwqConfig(bits=4, group_size=32).to_dict(), GPTQMODEL_AWQ])
def test_descriptions_of_awq_by_newer_tools_are_read(said, tmp_path):
    assert_same_model(*write_stored(tmp_path, awq(32), said))
    quantized, _ = write_stored(tmp_path / "other", awq(32), said | {"version": "gemv"})
    assert "gemv, which is not supported" in refusal(quantized)


def test_the_description_of_gptq_by_todays_writer_is_read(tmp_path):
    said = GPTQMODEL_AWQ | {"quant_method": "gptq", "method": "gptq", "checkpoint_format": "gptq"}
    said |= {
        "format": "gptq",
        "act_group_aware": True,
        "damp_percent": 0.05,
        "static_groups": False,
    }
    del said["zero_point"], said["version"]
    assert_same_model(*write_stored(tmp_path, gptq(32, symmetric=True), said))


@pytest.mark.parametrize(
    "config",
    [
        AwqConfig(bits=4, group_size=128, modules_to_not_convert=["lm_head"]),
        GPTQConfig(bits=4, group_size=128, desc_act=True),
        FineGrainedFP8Config(modules_to_not_convert=["lm_head"]),
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        AutoRoundConfig(bits=4, group_size=128),
        CompressedTensorsConfig(
            config_groups={"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
            format="pack-quantized",
            quantization_status="compressed",
        ),
    ],
    ids=lambda config: type(config).__name__,
)
def test_descriptions_that_transformers_writes_are_read(config):
    said = json.loads(json.dumps(config.to_dict()))
    claim = read_claims("config.json", said)("model.layers.0.mlp.up_proj")
    assert claim.quantized
    assert claim.encodings
