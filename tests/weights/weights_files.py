"""Tiny checkpoints, made on the spot."""

import json
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize

GGUF_KEYS = {
    "block_count": 1,
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}
EMBEDDING = {"token_embd.weight": (np.zeros((8, 64), np.float32), "F32")}


def write_safetensors(path: Path, header: dict, data: bytes) -> None:
    """A file with any header, sound or not."""
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_gguf(
    path: Path,
    tensors: dict[str, tuple[np.ndarray, str]],
    *,
    arch: str = "llama",
    keys: dict | None = None,
    general: dict | None = None,
    split: tuple[int, int, int] | None = None,
) -> Path:
    """A GGUF file of float arrays, each quantized to its type; uint8 arrays are blocks already.

    ``keys`` change the architecture's own metadata (None takes one away), ``general`` adds any.
    """
    writer = GGUFWriter(path, arch)
    if split:
        for key, value in zip(("no", "count"), split[:2], strict=True):
            writer.add_uint16(f"split.{key}", value)
        writer.add_int32("split.tensors.count", split[2])
    merged = {f"{arch}.{key}": value for key, value in (GGUF_KEYS | (keys or {})).items()}
    for key, value in (merged | (general or {})).items():
        match value:
            case None:
                pass
            case bool():
                writer.add_bool(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
            case float():
                writer.add_float32(key, value)
            case _ if value < 0:
                writer.add_int64(key, value)
            case _ if value >= 2**32:
                writer.add_uint64(key, value)
            case _:
                writer.add_uint32(key, value)
    for name, (array, type_name) in tensors.items():
        kind = GGMLQuantizationType[type_name]
        data = array if array.dtype == np.uint8 else quantize(array, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(rows: int, columns: int, type_name: str, seed: int = 0) -> np.ndarray:
    """Blocks of any type with random bits; float16 scales in them are kept finite."""
    elements, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    generator = np.random.default_rng(seed)
    # 0x3C3C is about 1.06 as a float16: a byte below 0x7C in its upper half is a finite one.
    return generator.integers(0, 0x7C, (rows, columns // elements * n_bytes), dtype=np.uint8)


_HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
_HALVES |= {"IQ4_NL": (0,), "IQ4_XS": (0,)}
"""Where the half-precision factors of a block are."""

RANDOM_BLOCKS = frozenset({*_HALVES, "MXFP4"})
"""Types for which there are only random blocks here."""


def weight_blocks(rows: int, columns: int, type_name: str, seed: int = 0) -> np.ndarray:
    """Blocks with random integers of all values that are worth small weights."""
    elements, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (rows, columns // elements, n_bytes), dtype=np.uint8)
    if type_name == "MXFP4":
        blocks[:, :, 0] = generator.integers(117, 123, blocks.shape[:2])
    for at in _HALVES.get(type_name, ()):
        factor = generator.uniform(1e-4, 3e-4, (*blocks.shape[:2], 1)).astype(np.float16)
        blocks[:, :, at : at + 2] = factor.view(np.uint8)
    return blocks.reshape(rows, -1)


def llama_rows(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """The row order in which llama.cpp's converter stores query and key projections."""
    halves = weight.unflatten(0, (n_heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)
