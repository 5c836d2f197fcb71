"""Malformed checkpoints: every kind is refused by name, before anything is built from it."""

import functools
import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from malformed import Case, check, parametrize
from safetensors.torch import save
from torch import Tensor
from weights_files import write_gguf
from whole_models import CONFIG, gguf_keys, load, random_tensors, write_gguf_model

from hotloop.weights.checkpoint import open_checkpoint, read_model
from hotloop.weights.recognition import recognize_matrices

HUGE = 10**30
DIGITS = "DIGITS"  # stands for a number of 5,000 digits, which json cannot write
TENSORS = random_tensors(CONFIG)
NORM, Q_PROJ = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

NO_NUMBERS: dict[str, Any] = {
    "text": "many",
    "number-as-text": "64",
    "true": True,
    "list": [64],
    "object": {"a": 64},
    "nan": math.nan,
    "infinity": math.inf,
    "minus-infinity": -math.inf,
    "digits": DIGITS,
    "negative": -1,
    "zero": 0,
    "megabyte": "x" * 2**20,
}
NO_SWITCHES = {label: NO_NUMBERS[label] for label in ("text", "list", "object", "nan", "negative")}
NO_SWITCHES |= {"false-as-text": "false", "one": 1, "huge": HUGE}
COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias")


@functools.cache
def weights() -> bytes:
    return save(TENSORS)


def write_model(
    folder: Path, change: Callable[[dict[str, Tensor]], object] | None = None, **keys: Any
) -> Path:
    """A model of one file with its configuration, without a tokenizer."""
    tensors = dict(TENSORS)
    if change is not None:
        change(tensors)
    (folder / "model.safetensors").write_bytes(save(tensors) if change else weights())
    text = json.dumps(CONFIG | keys).replace(f'"{DIGITS}"', "9" * 5000)
    (folder / "config.json").write_text(text)
    return folder


def opened(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    try:
        model, _ = read_model(checkpoint)
        recognize_matrices(checkpoint, model)
    finally:
        checkpoint.close()


def configurations() -> list[Case]:
    """Every key with every value that it cannot have."""
    values: dict[str, dict[str, Any]] = dict.fromkeys(COUNTS, NO_NUMBERS)
    values = {key: each | {"fraction": 2.5, "huge": 10**12} for key, each in values.items()}
    values["rope_theta"] = NO_NUMBERS | {"huge": HUGE}
    values["rms_norm_eps"] = {k: v for k, v in values["rope_theta"].items() if k != "zero"}
    values |= dict.fromkeys(SWITCHES, NO_SWITCHES)
    values["architectures"] = {"text": "Llama", "two": ["A", "B"], "number": 1, "object": {"a": 1}}
    values["hidden_act"] = {"number": 1, "list": ["silu"], "megabyte": "x" * 2**20}
    values["rope_scaling"] = {"text": "linear", "list": [1], "number": 2, "true": True}
    gptq, groups = {"quant_method": "gptq", "bits": 4}, {"quant_method": "compressed-tensors"}
    values["quantization_config"] = {
        "true": True,
        "list": [gptq],
        "text": "gptq",
        "empty": {},
        "method": {"quant_method": "x"},
        "method-list": {"quant_method": ["gptq"]},
        "bits-text": gptq | {"bits": "4"},
        "bits-huge": gptq | {"bits": 10**12},
        "group-size": gptq | {"group_size": -2},
        "no-group": gptq | {"group_size": 0},
        "dynamic": gptq | {"dynamic": [1]},
        "unknown": gptq | {"surprise": {"deeply": ["nested"]}},
        "groups": groups | {"config_groups": {"group_0": {"targets": "Linear"}}},
        "sparse": groups | {"config_groups": {}, "sparsity_config": {"format": "sparse-bitmask"}},
        "block": {"quant_method": "fp8", "weight_block_size": [128]},
    }

    def case(key: str, label: str, value: Any) -> Case:
        said = "config.json" if value in (DIGITS, math.inf, -math.inf) or value != value else key
        return Case(
            f"config-{key}-{label}",
            lambda folder: opened(write_model(folder, **{key: value})),
            ("config.json", said),
        )

    cases = [case(k, label, value) for k, each in values.items() for label, value in each.items()]
    sizes = {"vocab_size": 10**9, "hidden_size": 10**9, "intermediate_size": 10**9}
    sizes |= {"num_hidden_layers": 9_999, "head_dim": 2**20}
    cases += [
        Case(
            f"config-{key}-beyond-the-tensors",
            lambda folder, key=key, value=value: opened(write_model(folder, **{key: value})),
            ("num_hidden_layers",) if key == "num_hidden_layers" else ("tensor", "calls for"),
        )
        for key, value in sizes.items()
    ]
    return cases


def rope_settings() -> list[Case]:
    """Every setting of every type with values that are no such number."""
    lists = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    types: dict[str, dict[str, Any]] = {
        "linear": {"factor": 2.0},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 2.0, "beta_fast": 32.0, "attention_factor": 1.0},
        "llama3": {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "longrope": lists,
    }
    wrong = {"zero": 0, "negative": -2.0, "text": "2", "true": True, "huge": 10**40, "list": ["a"]}
    cases = []
    for kind, settings in types.items():
        for key in settings:
            for label, value in wrong.items():
                scaling = settings | {"rope_type": kind, key: value}
                cases.append(
                    Case(
                        f"rope-{kind}-{key}-{label}",
                        lambda folder, s=scaling: opened(write_model(folder, rope_scaling=s)),
                        ("config.json", key),
                    )
                )
    return cases


def no_weights() -> list[Case]:
    """Tensors of types that hold no weights, and values that no type of arithmetic holds."""
    cases = []
    for name in (EMBEDDING, NORM, Q_PROJ, HEAD):
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.float64, torch.float8_e4m3fn):

            def change(tensors: dict[str, Tensor], name: str = name, dtype: Any = dtype) -> None:
                tensors[name] = tensors[name].float().to(dtype)

            is_e4m3_matrix = dtype == torch.float8_e4m3fn and name in (Q_PROJ, HEAD)
            right = "weight_scale_inv is missing" if is_e4m3_matrix else "F32, F16 or BF16"
            cases.append(
                Case(
                    f"{name}-{dtype}",
                    lambda folder, change=change: load(write_model(folder, change)),
                    ("model.safetensors", name, right),
                )
            )
    beyond = {
        "bfloat16": (3.4e38, {"dtype": torch.bfloat16}),
        "float16": (1e38, {"dtype": torch.float16}),
        "int8-float16": (1e38, {"dtype": torch.float16, "quant": "int8"}),
        "int8": (3.4e38, {"quant": "int8"}),
        "fp8": (3.4e38, {"quant": "fp8"}),
        "int4": (-3.4e38, {"quant": "int4-g32"}),
        "int4-asym": (3.4e38, {"quant": "int4-g32-asym"}),
        "nan": (math.nan, {}),
        "infinity": (math.inf, {"quant": "int8"}),
    }
    for label, (value, options) in beyond.items():
        for name in (Q_PROJ, NORM) if options.get("quant") is None else (Q_PROJ,):

            def put(tensors: dict[str, Tensor], name: str = name, value: float = value) -> None:
                tensors[name] = tensors[name].float()
                tensors[name].view(-1)[3] = value

            cases.append(
                Case(
                    f"{name}-beyond-{label}",
                    lambda folder, put=put, o=options: load(write_model(folder, put), **o),
                    ("model.safetensors", name),
                )
            )

    def spoil_head(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][1, 1] = math.nan

    cases.append(
        Case(
            "nan-in-a-head-beside-a-tied-embedding",
            lambda folder: load(write_model(folder, spoil_head, tie_word_embeddings=True)),
            (HEAD, "NaN"),
        )
    )
    return cases


def safetensors_headers() -> list[Case]:
    """A header in which one thing is wrong."""

    def entry(**changes: Any) -> Callable[[dict[str, Any]], object]:
        return lambda header: header[NORM].update(changes)

    changes: dict[str, tuple[Callable[[dict[str, Any]], object], tuple[str, ...]]] = {
        "shape-text": (entry(shape="64"), (NORM,)),
        "shape-true": (entry(shape=[True]), (NORM,)),
        "shape-negative": (entry(shape=[-64]), (NORM,)),
        "shape-huge": (entry(shape=[10**12]), (NORM,)),
        "shape-beyond-bits": (entry(shape=[HUGE, HUGE]), (NORM,)),
        "shape-of-many": (entry(shape=[1] * 100_000), (NORM,)),
        "shape-fraction": (entry(shape=[64.0]), (NORM,)),
        "dtype-number": (entry(dtype=16), (NORM,)),
        "dtype-unknown": (entry(dtype="F4"), (NORM, "F4")),
        "dtype-megabyte": (entry(dtype="F" * 2**20), (NORM,)),
        "offsets-text": (entry(data_offsets="0"), (NORM,)),
        "offsets-one": (entry(data_offsets=[0]), (NORM,)),
        "offsets-true": (entry(data_offsets=[False, True]), (NORM,)),
        "offsets-reversed": (entry(data_offsets=[128, 0]), (NORM,)),
        "offsets-huge": (entry(data_offsets=[2**70, 2**70 + 128]), (NORM,)),
        "offsets-beyond": (entry(data_offsets=[2**40, 2**40 + 128]), (NORM,)),
        "entry-null": (lambda header: header.update({NORM: None}), (NORM,)),
        "entry-list": (lambda header: header.update({NORM: []}), (NORM,)),
        "name-of-a-megabyte": (
            lambda header: header.update({"n" * 2**20: header.pop(NORM)}),
            (NORM, "missing"),
        ),
        "entry-left-out": (lambda header: header.pop(NORM), ("model.safetensors",)),
    }

    def run(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
        data = weights()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        write_model(folder)
        file = folder / "model.safetensors"
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        load(folder)

    cases = [
        Case(f"safetensors-{label}", lambda folder, c=change: run(folder, c), names)
        for label, (change, names) in changes.items()
    ]

    def raw(folder: Path, data: bytes) -> None:
        write_model(folder)
        (folder / "model.safetensors").write_bytes(data)
        opened(folder)

    contents = {
        "empty": b"",
        "zeros": bytes(4096),
        "length-of-everything": b"\xff" * 4096,
        "length-just-allowed": (99_999_999).to_bytes(8, "little") + b"{}",
        "not-json": (4).to_bytes(8, "little") + b"abcd",
        "not-utf-8": (4).to_bytes(8, "little") + b"\xff\xfe\xff\xfe",
        "nested": (200_000).to_bytes(8, "little") + b"[" * 200_000,
        "pickle": b"\x80\x02}q\x00.",
        "zip": b"PK\x03\x04" + bytes(100),
    }
    return cases + [
        Case(f"safetensors-{label}", lambda folder, d=data: raw(folder, d), ("model.safetensors",))
        for label, data in contents.items()
    ]


GGUF_COUNTS = {
    "block_count": "block_count",
    "embedding_length": "embedding_length",
    "feed_forward_length": "feed_forward_length",
    "context_length": "context_length",
    "attention.head_count": "attention.head_count",
    "attention.head_count_kv": "attention.head_count",
    "attention.key_length": "attention.key_length",
    "rope.dimension_count": "rope.dimension_count",
}


@functools.cache
def gguf_tensors() -> dict[str, tuple[np.ndarray, str]]:
    return {"token_embd.weight": (np.zeros((8, 64), np.float32), "F32")} | {
        "blk.1.attn_norm.weight": (np.ones(64, np.float32), "F32")
    }


def gguf_metadata() -> list[Case]:
    """Every key with every value that it cannot have: the file and the key are named."""
    wrong: dict[str, Any] = {
        "text": "many",
        "true": True,
        "list": [64, 64],
        "texts": ["a", "b"],
        "fraction": 2.5,
        "nan": math.nan,
        "negative": -1,
        "zero": 0,
        "huge": 2**63,
    }
    no_numbers = {label: wrong[label] for label in ("text", "true", "list", "nan", "negative")}
    values: dict[str, dict[str, Any]] = dict.fromkeys(GGUF_COUNTS, wrong)
    values["attention.layer_norm_rms_epsilon"] = no_numbers | {"one": 1.0}
    values["rope.freq_base"] = no_numbers | {"zero": 0.0, "huge": 1e30}
    values["rope.scaling.factor"] = no_numbers | {"infinity": math.inf}
    values["rope.scaling.type"] = {"unknown": "su", "number": 1, "true": True}
    values["attention.sliding_window"] = no_numbers | {"huge": 2**63}
    values["expert_count"] = {"some": 8, "text": "none", "list": [0]}
    values["of_unknown_meaning"] = {"number": 1}

    def run(folder: Path, key: str, value: Any) -> None:
        keys = gguf_keys() | {key: value}
        opened(write_gguf(folder / "m.gguf", gguf_tensors(), keys=keys))

    cases = [
        Case(
            f"gguf-{key}-{label}",
            lambda folder, k=key, v=value: run(folder, k, v),
            ("m.gguf", f"llama.{key}" if label != "negative" else key),
        )
        for key, each in values.items()
        for label, value in each.items()
    ]
    general = {
        "general.alignment": (True, "32", 0, 2**40, [32]),
        "split.no": ("0", 5, True),
        "split.count": ("1", 5, [1]),
    }

    def run_general(folder: Path, key: str, value: Any) -> None:
        path = folder / "m.gguf"
        opened(write_gguf(path, gguf_tensors(), keys=gguf_keys(), general={key: value}))

    cases += [
        Case(
            f"gguf-{key}-{i}",
            lambda folder, k=key, v=value: run_general(folder, k, v),
            ("m.gguf",),
        )
        for key, each in general.items()
        for i, value in enumerate(each)
    ]
    return cases


def gguf_headers() -> list[Case]:
    """Counts, lengths and offsets that the file is too small for, and files that are none."""

    def header(n_tensors: int = 0, n_keys: int = 0, version: int = 3) -> bytes:
        return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    def key(name: bytes, kind: int, value: bytes) -> bytes:
        return text(name) + struct.pack("<I", kind) + value

    array = struct.pack("<IQ", 5, 2**40)
    contents = {
        "tensors-2-63": header(2**63) + bytes(100),
        "keys-2-63": header(0, 2**63) + bytes(100),
        "keys-beyond-the-file": header(0, 100) + bytes(100),
        "text-2-63": header(0, 1) + struct.pack("<Q", 2**63) + bytes(100),
        "value-text-2-40": header(0, 1) + key(b"a", 8, struct.pack("<Q", 2**40)) + bytes(100),
        "list-2-40": header(0, 1) + key(b"tokenizer.ggml.precompiled_charsmap", 9, array),
        "list-of-texts-2-40": header(0, 1) + key(b"a", 9, struct.pack("<IQ", 8, 2**40)) + bytes(99),
        "list-of-lists": header(0, 1) + key(b"a", 9, struct.pack("<IQ", 9, 1)) + bytes(100),
        "type-unknown": header(0, 1) + key(b"a", 77, bytes(100)),
        "key-not-utf-8": header(0, 1) + key(b"\xff\xfe", 4, bytes(100)),
        "key-twice": header(0, 2) + 2 * key(b"k" * 2**20, 4, bytes(4)) + bytes(100),
        "dimensions-2-31": header(1) + text(b"t") + struct.pack("<I", 2**31) + bytes(100),
        "version-0": header(version=0) + bytes(100),
        "version-99": header(version=99) + bytes(100),
        "version-swapped": header(version=3 << 24) + bytes(100),
        "empty": b"",
        "magic-alone": b"GGUF",
        "zeros": bytes(1000),
        "text": b"version 1\n" * 100,
    }

    def run(folder: Path, data: bytes) -> None:
        (folder / "m.gguf").write_bytes(data)
        opened(folder / "m.gguf")

    cases = [
        Case(f"gguf-header-{label}", lambda folder, d=data: run(folder, d), ("m.gguf",))
        for label, data in contents.items()
    ]

    def tensor(folder: Path, **changes: Any) -> None:
        shape, kind, offset = (
            changes.get("shape", (8,)),
            changes.get("kind", 0),
            changes.get("at", 0),
        )
        entry = text(changes.get("name", b"output_norm.weight")) + struct.pack("<I", len(shape))
        entry += struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)
        path = write_gguf(folder / "m.gguf", {}, keys=gguf_keys())
        data = path.read_bytes()
        path.write_bytes(
            data[:8] + struct.pack("<Q", 1) + data[16:].rstrip(b"\0") + entry + bytes(64)
        )
        opened(path)

    tensors: dict[str, dict[str, Any]] = {
        "type-unknown": {"kind": 999},
        "type-integer": {"kind": 26},
        "offset-2-63": {"at": 2**63},
        "offset-beyond": {"at": 10**9},
        "shape-2-63": {"shape": (2**63,)},
        "shape-product": {"shape": (2**40, 2**40)},
        "shape-of-none": {"shape": ()},
        "name-unknown": {"name": b"blk.0.attn_qkv.weight"},
        "name-of-a-megabyte": {"name": b"n" * 2**20},
    }
    return cases + [
        Case(f"gguf-tensor-{label}", lambda folder, c=changes: tensor(folder, **c), ("m.gguf",))
        for label, changes in tensors.items()
    ]


def rope_factors() -> list[Case]:
    def run(folder: Path, factors: list[float]) -> None:
        extra = {"rope_freqs.weight": (np.array(factors, np.float32), "F32")}
        opened(write_gguf(folder / "m.gguf", gguf_tensors() | extra, keys=gguf_keys()))

    wrong = {
        "zero": [0.0] * 8,
        "nan": [math.nan] * 8,
        "negative": [-1.0] * 8,
        "infinite": [math.inf] * 8,
        "too-few": [1.0] * 7,
        "too-many": [1.0] * 9,
    }
    return [
        Case(f"rope-freqs-{label}", lambda f, w=values: run(f, w), ("m.gguf", "rope_freqs.weight"))
        for label, values in wrong.items()
    ]


def not_files() -> list[Case]:
    """Each file of a model in turn as what is no file."""

    def pipe(path: Path) -> None:
        os.mkfifo(path)

    def loop(path: Path) -> None:
        path.symlink_to(path)

    def device(path: Path) -> None:
        path.symlink_to("/dev/zero")

    def folder_instead(path: Path) -> None:
        path.mkdir()

    def nothing_there(path: Path) -> None:
        path.symlink_to(path.with_name("nowhere"))

    kinds = (pipe, loop, device, folder_instead, nothing_there)

    def run(folder: Path, name: str, make: Callable[[Path], None]) -> None:
        write_model(folder)
        if name == "model.safetensors.index.json":
            (folder / "model.safetensors").unlink()
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        opened(folder / name if name == "m.gguf" else folder)

    files = ("config.json", "model.safetensors", "model.safetensors.index.json", "m.gguf")
    return [
        Case(
            f"{name}-{make.__name__}",
            lambda folder, n=name, m=make: run(folder, n, m),
            (str(name),) if make not in (loop, nothing_there) else (),
        )
        for name in files
        for make in kinds
        if not (name == "m.gguf" and make is folder_instead)
    ]


CASES = [
    *configurations(),
    *rope_settings(),
    *no_weights(),
    *safetensors_headers(),
    *gguf_metadata(),
    *gguf_headers(),
    *rope_factors(),
    *not_files(),
]


@parametrize(CASES)
def test_a_malformed_checkpoint_is_refused_by_name(case, tmp_path):
    check(case, tmp_path)


def test_there_are_cases_of_every_kind():
    assert len(CASES) > 300
    assert len({case.name for case in CASES}) == len(CASES)


def add(tensors: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    tensors[name] = tensor


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8)),
        ("model.rotary_emb.cos_cached", torch.ones(4, 4)),
        ("model.layers.1.self_attn.k_scale", torch.ones(1)),
        ("model.layers.1.self_attn.v_proj.v_scale", torch.ones(())),
        ("model.layers.2.mlp.up_proj.weight", torch.ones(3)),
        ("model.layers.0.mlp.down_proj.bias", torch.zeros(64)),
    ],
)
def test_surplus_tensors_that_change_nothing_are_accepted(name, tensor, tmp_path):
    load(write_model(tmp_path, lambda tensors: add(tensors, name, tensor)))


@pytest.mark.parametrize(
    "keys", [{"expert_count": 0}, {"attention.sliding_window": 0}, {"rope.scaling.type": "none"}]
)
def test_keys_that_switch_something_off_are_accepted(keys, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", gguf_tensors(), keys=gguf_keys() | keys)
    opened(path)


def test_a_whole_gguf_model_is_read_without_its_suffix(tmp_path):
    path = write_gguf_model(tmp_path / "m.gguf", tied=False)
    load(path.rename(tmp_path / "model"))
