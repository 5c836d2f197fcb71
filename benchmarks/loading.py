"""Measures how long an AWQ checkpoint takes to load, with random integers in a model's shape.

    python benchmarks/loading.py --shape llama-3.1-8b --out FOLDER

Writes a checkpoint in AWQ's layout (4 bits, groups of 128, float16) to a temporary folder, or to
``--checkpoint``, where a later run finds it. All its layers are copies of one. Then:

    cold     a process loads it, after its files were dropped from the page cache
    warm     the same, from the page cache
    first    with ``cache_packed``, which writes the packed weights to disk too
    second   with ``cache_packed``, which reads them
    check    in one process, loads with and without the comparison of packed with unpacked numbers
             (``quant.packing_check``), in alternation, from the page cache

``load_s`` is the time in seconds until all weights are on the device, and ``start_s`` the time
until an engine of one row can answer, kernels and graphs included. GB/s are the bytes of the
files, divided by ``read_s``, the time to read, decode and pack them. Each process imports torch
before its clock starts. Kernels are built before anything is measured. ``--rehearse`` runs all of
it with a tiny shape on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu import median, table
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import WordLevel
from torch import Tensor

from hotloop import LLM
from hotloop.hardware import provenance
from hotloop.models import linear, names
from hotloop.models.families import read_config
from hotloop.models.shapes import shape as shape_of

GROUP = 128
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "GEMM"}
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
STARTS = ("cold", "warm", "first", "second")
LIMIT_S = 300.0
"""The time limit of a process."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--checkpoint", type=Path, help="a folder to keep the checkpoint in")
    parser.add_argument("--pairs", type=int, default=4, help="loads with and without the check")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rehearse", action="store_true", help="a tiny shape on a CPU")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.load:
        measured = check(args) if args.load == "check" else start(args)
        print(json.dumps(measured))
        return
    if args.rehearse:
        args.shape, args.device, args.pairs = "tiny", "cpu", min(args.pairs, 1)
    args.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"shape": args.shape, "rows": {}}
    result["provenance"] = provenance(torch.device(args.device))
    path = args.out / f"loading-{args.shape}.json"
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = args.checkpoint or scratch / "checkpoint"
        if not (folder / "config.json").exists():
            write(folder, TINY if args.rehearse else shape_of(args.shape))
        result["bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        print(f"{args.shape}: {result['bytes'] / 1e9:.2f} GB", flush=True)
        cache = {"HOTLOOP_CACHE": str(scratch / "cache")}
        for what in ("kernels", *STARTS, "check"):
            if what == "cold":
                result["dropped"] = drop_from_page_cache(folder)
            found = in_process(args, folder, what, cache)
            if what == "kernels":
                continue
            result["rows"][what] = found
            path.write_text(json.dumps(result, indent=1) + "\n")
    print(make_table(result))


def in_process(
    args: argparse.Namespace, folder: Path, what: str, cache: dict[str, str]
) -> dict[str, Any]:
    """Loads the checkpoint in a process of its own, and returns the times that it prints."""
    command = [sys.executable, __file__, "--out", str(args.out), "--checkpoint", str(folder)]
    command += ["--device", args.device, "--pairs", str(args.pairs), "--load", what]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=LIMIT_S,
        env=os.environ | cache,
    )
    print(what, done.stdout.strip()[:200], file=sys.stderr, flush=True)
    return json.loads(done.stdout)


# The checkpoint.


def write(folder: Path, keys: dict[str, Any]) -> None:
    """Writes a checkpoint of a shape: a file for each layer, and one for the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.json"
    keys = keys | {"torch_dtype": "float16", "quantization_config": AWQ}
    model = read_config(keys, config)
    generator = torch.Generator().manual_seed(0)
    layer, rest = dict[str, Tensor](), dict[str, Tensor]()
    matrices = names.linear_weights(model)
    for name, size in names.tensors(model).items():
        if names.layer_index(name) in (None, 0):
            stem = name.removesuffix(".weight")
            one = awq(*size, generator) if stem in matrices else plain(size, generator)
            found = {stem + suffix: tensor for suffix, tensor in one.items()}
            (rest if names.layer_index(name) is None else layer).update(found)
    n = len(model.layers)
    files = [rest]
    files += [
        {names.layer(i, key.split(".", 3)[3]): t for key, t in layer.items()} for i in range(n)
    ]
    where = {}
    for i, tensors in enumerate(files):
        file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        save_file(tensors, folder / file)
        where |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    # An engine needs a tokenizer; this one knows a single word.
    tokenizer = Tokenizer(WordLevel({"word": 0}, unk_token="word"))
    tokenizer.decoder = ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config.write_text(json.dumps(keys))


def awq(n: int, k: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Makes a random matrix [n, k] in AWQ's layout: words along the output features."""

    def words(rows: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, (rows, n // 8), generator=generator).int()

    scales = torch.rand(k // GROUP, n, generator=generator) / (8 * k**0.5)
    return {".qweight": words(k), ".qzeros": words(k // GROUP), ".scales": scales.half()}


def plain(size: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """Makes a norm of ones, or an embedding or head of 512 random rows, repeated."""
    if len(size) == 1:
        return {".weight": torch.ones(size, dtype=torch.float16)}
    rows = torch.randn(min(size[0], 512), size[1], generator=generator).half() / 32
    return {".weight": rows.repeat(-(-size[0] // len(rows)), 1)[: size[0]].contiguous()}


def drop_from_page_cache(folder: Path) -> bool:
    """Drops files from the page cache; returns False if the system has no call for that."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # only what is on the disk can be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


# Each of these runs in a process of its own.


def load(args: argparse.Namespace, **options: Any) -> dict[str, Any]:
    """Starts an engine, closes it, and returns the seconds of its parts."""
    began = time.perf_counter()
    with LLM(
        str(args.checkpoint), device=args.device, dtype="bfloat16", max_seq_len=64, **options
    ) as llm:
        start_s, described = time.perf_counter() - began, llm.describe()
    return {
        "start_s": start_s,
        "load_s": described.load_s,
        "read_s": described.read_s,
        "gb_s": described.load_gb_s,
        "read_bytes": described.read_bytes,
        "weight_bytes": described.weight_bytes,
        "execution": described.execution,
        "notes": described.notes,
    }


def start(args: argparse.Namespace) -> dict[str, Any]:
    """Loads once."""
    torch.ones(1, device=args.device)  # initializes the device
    return load(args, cache_packed=args.load in ("first", "second"))


def check(args: argparse.Namespace) -> dict[str, Any]:
    """Loads with and without the check in alternation, after a load that warms up."""
    samples: dict[str, list[float]] = {"with_s": [], "without_s": []}
    load(args)
    for pair in range(args.pairs):
        for name in reversed(samples) if pair % 2 else samples:
            with unchecked() if name == "without_s" else contextlib.nullcontext():
                samples[name].append(load(args)["read_s"])
    return samples


class Unchecked:
    """A replacement of ``PackingCheck`` that compares nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, chunk: Any) -> Any:
        """Returns the rows, which are not recorded."""
        return chunk

    def compare(self, packed: Sequence[Tensor]) -> Tensor:
        """Returns True: the bytes count as right."""
        return torch.ones((), dtype=torch.bool, device=packed[0].device)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Loads without the check within the block."""
    kept, linear.PackingCheck = linear.PackingCheck, Unchecked
    try:
        yield
    finally:
        linear.PackingCheck = kept


def make_table(result: dict[str, Any]) -> str:
    """Makes the table of starts, and a line about the check."""
    rows = [
        (
            what,
            f"{row['load_s']:.2f}",
            "–" if row["gb_s"] is None else f"{row['gb_s']:.2f}",
            f"{row['start_s']:.2f}",
        )
        for what in STARTS
        if (row := result["rows"].get(what))
    ]
    text = table(("start", "load (s)", "GB/s", "ready after (s)"), rows, texts=1)
    with_s, without_s = (median(result["rows"]["check"][name]) for name in ("with_s", "without_s"))
    share = (with_s - without_s) / with_s
    return (
        f"{text}\ncheck: {with_s:.3f} s with it, {without_s:.3f} without, {share:.1%} of loading\n"
    )


if __name__ == "__main__":
    main()
