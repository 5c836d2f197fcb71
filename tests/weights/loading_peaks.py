"""Measures the peak memory of loading a checkpoint of each encoding, in a process of its own.

    python tests/weights/loading_peaks.py FOLDER [ENCODING...]

prints one JSON object: by encoding, the bytes above what was resident before, those of the model,
and those of its largest matrix in bfloat16. The thread that reads ahead is as far as it may be at
every step.

glibc's malloc keeps freed memory, and the more the larger the allocations were that a process freed
before: up to two of these tensors, which are small. ``ENVIRONMENT`` has it return what is freed.
"""

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch
from stored_models import Encode, write_stored
from test_awq_gptq import AWQ, GPTQ, awq, gptq
from test_compressed_tensors import FORMATS, compressed, description, scheme_of
from test_fp8_bitsandbytes import BNB, FP8, PER_TENSOR, blocks, nf4, one_scale
from test_gguf_as_stored import KINDS
from whole_models import load, write_folder, write_gguf_model

from hotloop.memory_meter import MemoryMeter
from hotloop.weights import tensor_file
from hotloop.weights.quantize import quantize_checkpoint
from hotloop.weights.read_ahead import ReadAhead

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(64 * 2**10)}

SIZES = {"hidden_size": 1024, "intermediate_size": 6144, "num_hidden_layers": 1, "head_dim": 256}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
LARGEST = 1024 * 6144 * 2


def stored(encode: Encode, said: dict[str, Any]) -> Callable[[Path], Path]:
    return lambda folder: write_stored(folder, encode, said, **SIZES)[0]


def library(name: str) -> Callable[[Path], Path]:
    format_, args = FORMATS[name]
    scheme = scheme_of(format_, **args)
    return stored(compressed(scheme), description(scheme, format_=format_))


def gguf(kind: str) -> Callable[[Path], Path]:
    return lambda folder: write_gguf_model(folder / "m.gguf", kind, tied=True, **SIZES)


def hotloop(quant: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return quantize_checkpoint(write_folder(folder / "m", **SIZES), folder / "q", quant=quant)

    return make


ENCODINGS = {
    "plain": lambda folder: write_folder(folder / "m", **SIZES),
    "plain F32": lambda folder: write_folder(folder / "m", dtype=torch.float32, **SIZES),
    "hotloop int4": hotloop("int4-g64"),
    "hotloop int8": hotloop("int8"),
    "awq": stored(awq(32), AWQ),
    "gptq": stored(gptq(32), GPTQ),
    "gptq of 8 bits": stored(gptq(32, bits=8), GPTQ | {"bits": 8}),
    "gptq, act-order": stored(gptq(32, act_order=True), GPTQ | {"desc_act": True}),
    **{name: library(name) for name in FORMATS},
    "block fp8": stored(blocks(), FP8),
    "per-tensor fp8": stored(one_scale((), "weight_scale"), PER_TENSOR),
    "nf4": stored(nf4(nested=True), BNB),
    **{kind: gguf(kind) for kind in KINDS},
    "plain, with a draft": lambda folder: write_folder(folder / "m", **SIZES),
}


def measure(path: Path, **options: str) -> dict[str, int]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not resident
    with MemoryMeter("cpu") as before:
        pass
    with MemoryMeter("cpu") as meter:
        decoder = load(path, **options)
    storages = [tensor.untyped_storage() for tensor in decoder.buffers()]
    model = sum({each.data_ptr(): each.nbytes() for each in storages}.values())
    return {"peak": meter.peak_bytes - before.peak_bytes, "model": model, "largest": LARGEST}


def read_as_far_as_possible() -> None:
    """Has every step of loading wait for the thread that reads ahead: the most is held then.

    Several threads read parts of what it reads, as they do of larger tensors.
    """
    tensor_file.PART_BYTES = 64 * 2**10
    next_result = ReadAhead.next

    def waited(ahead: ReadAhead[Any]) -> Any:
        while not (ahead._is_full() or ahead._ended):
            time.sleep(0.001)
        return next_result(ahead)

    ReadAhead.next = waited


def main() -> None:
    folder, *names = sys.argv[1:]
    assert ENVIRONMENT.items() <= os.environ.items(), "malloc keeps what is freed"
    read_as_far_as_possible()
    torch.set_num_threads(1)
    load(write_folder(Path(folder) / "warm"), quant="int4-g64")  # what is set up once
    measured = {}
    for i, name in enumerate(names or ENCODINGS):
        place = Path(folder) / str(i)
        place.mkdir()
        # The description of hotloop's own says the scheme.
        options = {} if name.startswith("hotloop") else {"quant": "auto"}
        if name.endswith("with a draft"):
            options["draft"] = "int4-g64"
        measured[name] = measure(ENCODINGS[name](place), **options)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
