"""Measures peak resident memory while a multi-gigabyte checkpoint is quantized on load.

It must not exceed the quantized model plus three of the checkpoint's largest tensors. A checkpoint
of random bfloat16 weights is written to a temporary folder, in shards, with the proportions of
Llama-2-70B, where the matrices of a block are nearly as large as the embedding and little can hide
behind it. Each scheme is loaded in a process of its own.

    python benchmarks/load_memory.py [--gigabytes 3] [--schemes none int8 int4-g128]

Prints one JSON line per scheme, and writes them to benchmarks/results/load_memory-KIND.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import tokenizers
import torch

from hotloop.engine.llm import LLM
from hotloop.hardware import provenance
from hotloop.memory_meter import MemoryMeter
from hotloop.models import names
from hotloop.models.families import read_config
from hotloop.weights.checkpoint import open_checkpoint
from hotloop.weights.writer import SafetensorsWriter

RESULTS = Path(__file__).parent / "results"
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 16384,
}


def write_checkpoint(folder: Path, gigabytes: float) -> None:
    """Makes a Llama of ``SHAPE`` with enough layers for ``gigabytes`` of bfloat16."""
    shape = next(
        shape
        for n in range(1, 1000)
        if 2 * read_config(shape := SHAPE | {"num_hidden_layers": n}).n_params >= gigabytes * 1e9
    )
    torch.manual_seed(0)
    with SafetensorsWriter(folder, max_shard_bytes=10**9) as writer:
        for name, size in names.tensors(read_config(shape)).items():
            writer.add(name, torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02))
        (writer.staging / "config.json").write_text(json.dumps(shape))
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {character: i for i, character in enumerate(alphabet)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        tokenizer.save(str(writer.staging / "tokenizer.json"))


def measure(folder: Path, quant: str) -> dict[str, Any]:
    """Loads the checkpoint in this process, and reports its peak memory."""
    torch.ones(256, 256) @ torch.ones(256, 256)  # what torch sets up once is not the model's
    tensors = open_checkpoint(folder).tensors.values()
    largest = max(info.shape[0] * info.shape[-1] for info in tensors if len(info.shape) == 2) * 2
    before = psutil.Process().memory_info().rss
    with MemoryMeter("cpu") as meter:
        llm = LLM(str(folder), quant=quant, device="cpu", dtype="bfloat16", max_seq_len=16)
    model = llm.describe().weight_bytes
    peak = meter.peak_bytes - before
    return {
        "quant": quant,
        "checkpoint_bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        "model_bytes": model,
        "largest_tensor_bytes": largest,
        "peak_bytes": peak,
        "bound_bytes": model + 3 * largest,
        "largest_tensors_above_model": round((peak - model) / largest, 2),
        "within_bound": peak <= model + 3 * largest,
        "method": meter.method,
        "load_s": round(llm.describe().load_s, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the checkpoint")
    parser.add_argument("--schemes", nargs="+", default=["none", "int8", "int4-g128"])
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(measure(arguments.load, *arguments.schemes)))
        return 0
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        print(f"writing {arguments.gigabytes} GB of weights", file=sys.stderr)
        write_checkpoint(folder, arguments.gigabytes)
        for quant in arguments.schemes:
            command = [sys.executable, __file__, "--load", str(folder), "--schemes", quant]
            line = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            print(line, end="", flush=True)
            rows.append(json.loads(line))
    kind = f"{psutil.cpu_count()}-core-{platform.machine()}"
    RESULTS.mkdir(exist_ok=True)
    result = {"rows": rows, "provenance": provenance(torch.device("cpu"))}
    (RESULTS / f"load_memory-{kind}.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(row["within_bound"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
