"""Checkpoints of compressed-tensors keep what its own library wrote into them."""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    preset_name_to_scheme,
)
from stored_models import (
    RAGGED,
    Encode,
    Stored,
    assert_same_model,
    distribution,
    noise,
    pack,
    refusal,
    scales,
    write_stored,
)
from torch import Tensor
from whole_models import write_folder

from hotloop.quant.encodings.bits import centered, unpack
from hotloop.quant.encodings.compressed_tensors import fp4_table
from hotloop.weights.checkpoint import open_checkpoint

Q_PROJ = "model.layers.0.self_attn.q_proj"
GROUPS_OF_32 = {"num_bits": 4, "strategy": "group", "group_size": 32}
CHANNELS = {"num_bits": 8, "strategy": "channel"}
BLOCKS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4 in groups": ("pack-quantized", GROUPS_OF_32),
    "int4 in groups, asymmetric": ("pack-quantized", GROUPS_OF_32 | {"symmetric": False}),
    "int4 per channel": ("pack-quantized", CHANNELS | {"num_bits": 4}),
    "int8 in groups": ("pack-quantized", GROUPS_OF_32 | {"num_bits": 8}),
    "int8 in groups, asymmetric": (
        "pack-quantized",
        GROUPS_OF_32 | {"num_bits": 8, "symmetric": False},
    ),
    "int8 per channel": ("pack-quantized", CHANNELS),
    "int8 as it is": ("int-quantized", CHANNELS),
    "int8 as it is, in groups": ("int-quantized", GROUPS_OF_32 | {"num_bits": 8}),
    "int8 as it is, asymmetric": ("int-quantized", CHANNELS | {"symmetric": False}),
    "int8 with one scale": ("int-quantized", {"num_bits": 8, "strategy": "tensor"}),
    "fp8 with one scale": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
    ),
    "fp8 per channel": ("float-quantized", CHANNELS | {"type": "float"}),
    "fp8 in blocks": ("float-quantized", BLOCKS),
    "naive": ("naive-quantized", CHANNELS),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
    ),
}


def scheme_of(format_: str, **args: Any) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args), format=format_)


def description(
    *groups: QuantizationScheme, format_: str, ignore: tuple[str, ...] = ("lm_head",)
) -> dict[str, Any]:
    config = QuantizationConfig(
        config_groups={f"group_{i}": group for i, group in enumerate(groups)},
        format=format_,
        ignore=list(ignore),
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    return config.model_dump(mode="json")


def compressed(scheme: QuantizationScheme, dtype: torch.dtype = torch.bfloat16) -> Encode:
    """Stores matrices by the library, with scales that fit their values."""
    args, format_ = scheme.weights, str(scheme.format)
    compressor = BaseCompressor.get_value_from_registry(format_)

    def encode(name: str, weight: Tensor) -> Stored | None:
        if name == "lm_head":
            return None
        n, k = weight.shape
        shape = {
            "tensor": (1,),
            "channel": (n, 1),
            "group": (n, -(-k // (args.group_size or 1))),
            "tensor_group": (n, -(-k // (args.group_size or 1))),
            "block": (-(-n // 128), -(-k // 128)),
        }[args.strategy]
        step = (0.5 + torch.rand(shape, generator=noise(1))) / 100
        state = {"weight": weight, "weight_scale": step.to(dtype)}
        if format_.startswith("nvfp4"):
            state["weight_scale"] = (step * 3000).to(torch.float8_e4m3fn).float()
            state["weight_global_scale"] = torch.tensor([3001.0])
        if format_.startswith("mxfp4"):
            state["weight_scale"] = torch.exp2(step.log2().round())
        if not args.symmetric:
            half = 1 << args.num_bits - 1
            state["weight_zero_point"] = torch.randint(
                -half, half, shape, dtype=torch.int8, generator=noise(2)
            )
        stored = compressor.compress(state, scheme)
        wide = dict(stored)
        if (
            dtype != torch.float32
            and "weight_scale" in wide
            and wide["weight_scale"].dtype == dtype
        ):
            wide["weight_scale"] = wide["weight_scale"].float()  # the library's arithmetic is its
        if format_.startswith("nvfp4"):  # the library would compute in bfloat16
            step = wide["weight_scale"].float() / wide["weight_global_scale"]
            numbers = unpack_fp4_from_uint8(wide["weight_packed"], n, k, torch.float32)
            worth = numbers * step.repeat_interleave(16, dim=1)
        else:
            worth = compressor.decompress(wide, scheme)["weight"].float()
        return {f".{part}": tensor for part, tensor in stored.items()}, worth

    return encode


def test_golden_words():
    assert pack(torch.arange(8)[None], 4).item() == 0x76543210
    negative = torch.tensor([[0x76543210]], dtype=torch.int32)
    assert centered(unpack(negative, 4), 4).tolist() == [list(range(-8, 0))]
    positive = pack(torch.arange(8, 16)[None], 4)
    assert centered(unpack(positive, 4), 4).tolist() == [list(range(8))]
    assert fp4_table(torch.device("cpu"))[[7, 15]].tolist() == [6.0, -6.0]


@pytest.mark.parametrize("name", FORMATS)
def test_what_the_library_wrote_is_worth_what_the_library_makes_of_it(name, tmp_path):
    format_, args = FORMATS[name]
    scheme = scheme_of(format_, **args)
    assert_same_model(
        *write_stored(tmp_path, compressed(scheme), description(scheme, format_=format_))
    )


@pytest.mark.parametrize("name", ["int4 in groups", "int8 per channel", "fp8 in blocks"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_scales_keep_their_type(name, dtype, tmp_path):
    format_, args = FORMATS[name]
    scheme = scheme_of(format_, **args)
    encode = compressed(scheme, dtype)
    assert_same_model(*write_stored(tmp_path, encode, description(scheme, format_=format_)))


@pytest.mark.parametrize("name", ["int4 per channel", "int8 per channel", "fp8 in blocks"])
def test_sizes_need_not_be_whole_words_or_blocks(name, tmp_path):
    format_, args = FORMATS[name]
    scheme = scheme_of(format_, **args)
    keys = RAGGED | {"intermediate_size": 203}
    encode = compressed(scheme)
    assert_same_model(*write_stored(tmp_path, encode, description(scheme, format_=format_), **keys))


PRESETS = {
    "W4A16": "pack-quantized",
    "W4A16_ASYM": "pack-quantized",
    "W8A16": "pack-quantized",
    "W8A8": "int-quantized",
    "FP8": "float-quantized",
    "FP8_DYNAMIC": "float-quantized",
    "FP8_BLOCK": "float-quantized",
    "NVFP4": "nvfp4-pack-quantized",
    "MXFP4A16": "mxfp4-pack-quantized",
}
"""What LLM Compressor's recipes name, and the format that each is stored in."""


@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_the_library_are_read_whatever_they_say_of_activations(name, tmp_path):
    scheme = preset_name_to_scheme(name, ["Linear"])
    scheme.format = PRESETS[name]
    said = description(scheme, format_=PRESETS[name])
    for_activations = said["config_groups"]["group_0"]["input_activations"]
    assert (for_activations is None) == name.endswith(("A16", "A16_ASYM"))
    scales = {f"{Q_PROJ}.input_scale": torch.ones(1), f"{Q_PROJ}.input_global_scale": torch.ones(1)}
    extra = {} if for_activations is None else scales
    keys = {"hidden_size": 128, "intermediate_size": 256}
    assert_same_model(*write_stored(tmp_path, compressed(scheme), said, extra=extra, **keys))


def test_the_name_of_a_repository_means_nothing(tmp_path):
    format_, args = FORMATS["int4 in groups"]
    scheme = scheme_of(format_, **args)
    said = description(scheme, format_=format_)
    quantized, dense = write_stored(tmp_path / "Llama-2-13B-AWQ", compressed(scheme), said)
    named = quantized.rename(quantized.with_name("Llama-2-13B-AWQ-GEMM"))
    assert_same_model(named, dense)


def test_formats_are_mixed_by_targets_and_some_matrices_are_ignored(tmp_path):
    four, eight = (
        scheme_of("pack-quantized", **GROUPS_OF_32),
        scheme_of("int-quantized", **CHANNELS),
    )
    four.targets, eight.targets = ["Linear"], [r"re:.*\.self_attn\.[kv]_proj$"]

    def encode(name: str, weight: Tensor) -> Stored | None:
        if "layers.1.mlp" in name:
            return None
        return compressed(eight if name.endswith(("k_proj", "v_proj")) else four)(name, weight)

    ignore = ("lm_head", r"re:model\.layers\.1\.mlp\..*")
    said = description(four, eight, format_="mixed-precision", ignore=ignore)
    assert_same_model(*write_stored(tmp_path, encode, said))


def test_ignored_names_are_whole_names(tmp_path):
    scheme = scheme_of("pack-quantized", **GROUPS_OF_32)
    said = description(scheme, format_="pack-quantized", ignore=("lm_head", "q_proj"))
    quantized, dense = write_stored(tmp_path, compressed(scheme), said)
    assert_same_model(quantized, dense)


def test_older_files_say_the_group_of_each_input_feature(tmp_path):
    scheme = scheme_of("pack-quantized", **GROUPS_OF_32)

    def encode(name: str, weight: Tensor) -> Stored | None:
        if (made := compressed(scheme)(name, weight)) is None:
            return None
        k = weight.shape[1]
        order = torch.randperm(k, generator=noise(4))
        group = torch.empty(k, dtype=torch.int32)
        group[order] = (torch.arange(k) // 32).int()
        scale, worth = made[0][".weight_scale"].float(), made[1]
        values = (worth.unflatten(1, (-1, 32)) / scale[..., None]).round().flatten(1)
        return made[0] | {".weight_g_idx": group}, values * scale[:, group.long()]

    said = description(scheme, format_="pack-quantized")
    assert_same_model(*write_stored(tmp_path, encode, said))


def asymmetric(**changed: Tensor) -> Encode:
    format_, args = FORMATS["int4 in groups, asymmetric"]
    encode = compressed(scheme_of(format_, **args))

    def damaged(name: str, weight: Tensor) -> Stored | None:
        made = encode(name, weight)
        if made is None or not name.endswith("0.self_attn.q_proj"):
            return made
        return made[0] | {f".{part}": tensor for part, tensor in changed.items()}, made[1]

    return damaged


def test_zero_points_need_not_be_packed(tmp_path):
    format_, args = FORMATS["int4 in groups, asymmetric"]
    scheme = scheme_of(format_, **args)

    def encode(name: str, weight: Tensor) -> Stored | None:
        if (made := compressed(scheme)(name, weight)) is None:
            return None
        packed = made[0][".weight_zero_point"]
        zeros = centered(unpack(packed.T, 4), 4).T[: len(weight)].contiguous()
        return made[0] | {".weight_zero_point": zeros}, made[1]

    assert_same_model(*write_stored(tmp_path, encode, description(scheme, format_=format_)))


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (
            {"weight_zero_point": torch.full((64, 2), 11, dtype=torch.int8)},
            "zero points are signed",
        ),
        (
            {"weight_zero_point": torch.zeros(3, 2, dtype=torch.int8)},
            "zero points are packed along",
        ),
        ({"weight_shape": torch.tensor([64, 63])}, "does not say [64, 64]"),
        ({"weight_scale": scales(64, 4)}, "says groups of 32"),
        ({"weight_scale": scales(32, 2)}, "has shape [32, 2] for a matrix of [64, 64]"),
        ({"weight_packed": torch.zeros(64, 6, dtype=torch.int32)}, "not supported"),
        ({"weight_g_idx": torch.zeros(64, dtype=torch.int32)}, "does not put 32 input features"),
    ],
)
def test_tensors_that_contradict_each_other_are_refused_by_name(changed, problem, tmp_path):
    format_, args = FORMATS["int4 in groups, asymmetric"]
    said = description(scheme_of(format_, **args), format_=format_)
    quantized, _ = write_stored(tmp_path, asymmetric(**changed), said)
    message = refusal(quantized)
    assert problem in message
    assert "q_proj" in message


def test_zero_points_that_are_missing_are_named(tmp_path):
    format_, args = FORMATS["int4 in groups"]
    scheme = scheme_of(format_, **args)
    said = description(scheme, format_=format_)
    said["config_groups"]["group_0"]["weights"]["symmetric"] = False
    message = refusal(write_stored(tmp_path, compressed(scheme), said)[0])
    assert "has no .weight_zero_point beside it" in message


def fp4_with(name: str, part: str, tensor: Callable[[Tensor], Tensor]) -> tuple[Encode, Any]:
    """Matrices of 4-bit floating point, of which one has another part."""
    format_, args = FORMATS[name]
    scheme = scheme_of(format_, **args)

    def encode(name: str, weight: Tensor) -> Stored | None:
        made = compressed(scheme)(name, weight)
        if made is not None and "0.self_attn.q_proj" in name:
            return made[0] | {part: tensor(made[0][part])}, made[1]
        return made

    return encode, description(scheme, format_=format_)


@pytest.mark.parametrize(
    ("divisor", "problem"),
    [
        (torch.tensor([-3001.0]), "holds -3001: the divisor of a matrix's scales is above 0"),
        (torch.tensor([0.0]), "holds 0: "),
        (torch.tensor([float("nan")]), "holds nan: "),
        (torch.tensor([3001.0, 3001.0]), "has shape [2] of F32: the divisor"),
        (torch.zeros(0), "has shape [0] of F32: "),
        (torch.tensor([3001.0]).half(), "has shape [1] of F16: "),
    ],
)
def test_the_divisor_of_nvfp4_is_one_positive_number(divisor, problem, tmp_path):
    encode, said = fp4_with("nvfp4", ".weight_global_scale", lambda _: divisor)
    message = refusal(write_stored(tmp_path, encode, said)[0])
    assert problem in message
    assert "model.layers.0.self_attn.q_proj.weight_global_scale" in message


@pytest.mark.parametrize(
    ("name", "part", "changed"),
    [
        ("mxfp4", ".weight_scale", lambda scale: torch.full_like(scale, 254)),
        ("nvfp4", ".weight_global_scale", lambda scale: torch.full_like(scale, 1e-37)),
    ],
)
def test_scales_that_multiply_to_infinity_are_refused_by_name(name, part, changed, tmp_path):
    encode, said = fp4_with(name, part, changed)
    message = refusal(write_stored(tmp_path, encode, said)[0])
    assert "model.layers.0.self_attn.q_proj" in message
    assert "which is too large for float32: the checkpoint is damaged" in message


def test_a_divisor_may_be_larger_than_the_models_type_holds(tmp_path):
    encode, said = fp4_with("nvfp4", ".weight_global_scale", lambda scale: scale * 100)
    quantized, _ = write_stored(tmp_path, encode, said)
    assert distribution(quantized, dtype="float16").isfinite().all()


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("nested", ["the description", "everything"])
def test_the_description_may_lie_in_text_config(nested, key, tmp_path):
    scheme = scheme_of("pack-quantized", **GROUPS_OF_32)
    said = description(scheme, format_="pack-quantized")

    def nest(folder: Path, **others: Any) -> Path:
        """Moves keys of a checkpoint's configuration into ``text_config``."""
        file = folder / "config.json"
        config = json.loads(file.read_text()) | {key: said} | others
        around = {"architectures"} if nested == "everything" else config.keys() - {key}
        config |= {"text_config": {k: config.pop(k) for k in config.keys() - around}}
        file.write_text(json.dumps(config | {"model_type": "around"}))
        return folder

    quantized, dense = write_stored(tmp_path, compressed(scheme), None)
    assert_same_model(nest(quantized), dense)
    with closing(open_checkpoint(quantized)) as checkpoint:
        assert checkpoint.quantization_config == (f"{quantized / 'config.json'}, {key}", said)
    said["ignore"].append("re:.*q_proj")
    quantized, _ = write_stored(tmp_path / "other", compressed(scheme), None)
    assert "says that it is not quantized" in refusal(nest(quantized))


def test_what_text_config_and_the_keys_around_it_contradict_each_other_in_is_named(tmp_path):
    folder = write_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    nested = {"hidden_size": 64, "rms_norm_eps": 1e-6, "_name_or_path": "x", "vocab_size": None}
    (folder / "config.json").write_text(json.dumps(config | {"text_config": nested}))
    assert "rms_norm_eps is 1e-05, but 1e-06 in text_config" in refusal(folder, quant="none")


def test_a_matrix_that_targets_name_and_that_is_not_quantized_is_refused(tmp_path):
    scheme = scheme_of("pack-quantized", **GROUPS_OF_32)

    def encode(name: str, weight: Tensor) -> Stored | None:
        return None if name == Q_PROJ else compressed(scheme)(name, weight)

    said = description(scheme, format_="pack-quantized")
    message = refusal(write_stored(tmp_path, encode, said)[0])
    assert f"{Q_PROJ}.weight" in message
    assert "says that it is quantized (compressed-tensors pack-quantized)" in message


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"format": "marlin-24"}, "compressed-tensors marlin-24, which is not supported"),
        ({"format": "int-quantized"}, "is stored as pack-quantized, though"),
        ({"sparsity_config": {"format": "sparse-bitmask"}}, "sparsity_config"),
        ({"transform_config": {"config_groups": {}}}, "transform_config"),
        ({"ignore": ["re:.*q_proj"]}, "says that it is not quantized"),
        ({"quantization_status": "calibration"}, "quantization_status"),
    ],
)
def test_a_description_that_is_not_so_is_refused(said, problem, tmp_path):
    scheme = scheme_of("pack-quantized", **GROUPS_OF_32)
    described = description(scheme, format_="pack-quantized") | said
    for group in described["config_groups"].values():
        group["format"] = None
    assert problem in refusal(write_stored(tmp_path, compressed(scheme), described)[0])
