"""Measures the peak memory and the time of loading a checkpoint of gigabytes, in every encoding.

    PYTHONPATH=src:tests:tests/weights python benchmarks/load_memory.py [--layers 16]
        [--device cpu] [--cases none awq Q4_K] [--out FOLDER]

On a CPU the peak must not exceed the size of the loaded model plus three of its largest
tensors in bfloat16. On a GPU the peak includes graphs and workspace, and is only reported. A
checkpoint of random weights is written to a temporary folder for each case: an unquantized
one for each of hotloop's schemes, which quantizes it as it loads, and one in each encoding of
``tests/weights/every_encoding.py``, which is kept as it is stored. All layers are copies of one.
The vocabulary is tiny, so that the embedding does not dominate the peak. Each case is loaded in
a process of its own, from files that were just written and are in the page cache. So GB/s show
decoding and packing, not the disk. On a CPU it is loaded in two processes: one is timed, and the
peak is that of the other, in which ``malloc`` returns freed memory to the system at once, as in
``tests/weights/loading_peaks.py``. By default ``malloc`` keeps some tens of MB, which is faster.

Prints one JSON line per case, and writes them to OUT/load_memory-KIND.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hotloop.engine.llm import LLM
from hotloop.hardware import provenance
from hotloop.memory_meter import MemoryMeter
from hotloop.weights.checkpoint import open_checkpoint
from hotloop.weights.safetensors import INDEX_FILE

RESULTS = Path(__file__).parent / "results"
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
PEAK_KEYS = ("peak_bytes", "largest_tensors_above_model", "within_bound")
"""Keys of a row that the second process of a case measures."""
SCHEMES = ("none", "int8", "fp8", "int4-g128")
_FIRST_LAYER = re.compile(r"(model\.layers|blk)\.0\.")


def write_safetensors(folder: Path, case: str, n_layers: int) -> Path:
    """Writes one layer, and then a checkpoint in which all layers are copies of it."""
    from every_encoding import ENCODINGS
    from whole_models import write_folder

    keys = SHAPE | {"num_hidden_layers": 1}
    if case in SCHEMES:
        one = write_folder(folder / "one", **keys)
    else:
        (folder / "one").mkdir()
        one = ENCODINGS[case](folder / "one", **keys)
    with safe_open(one / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    (one / "model.safetensors").unlink()
    layer = {name: t for name, t in tensors.items() if _FIRST_LAYER.match(name)}
    shards = [{name: t for name, t in tensors.items() if name not in layer}]
    shards += [
        {_FIRST_LAYER.sub(rf"\1.{i}.", name): t for name, t in layer.items()}
        for i in range(n_layers)
    ]
    where = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, one / file)
        where |= dict.fromkeys(shard, file)
    (one / INDEX_FILE).write_text(json.dumps({"weight_map": where}))
    config = json.loads((one / "config.json").read_text()) | {"num_hidden_layers": n_layers}
    (one / "config.json").write_text(json.dumps(config))
    return one


def write_gguf(folder: Path, case: str, n_layers: int) -> Path:
    """Writes a file in which all layers are quantized from the same numbers."""
    import whole_models
    from every_encoding import ENCODINGS

    random_tensors = whole_models.random_tensors

    def copied_layers(
        config: dict[str, Any], dtype: torch.dtype = torch.bfloat16
    ) -> dict[str, Tensor]:
        tensors = random_tensors(config | {"num_hidden_layers": 1}, dtype)
        for name in [name for name in tensors if _FIRST_LAYER.match(name)]:
            copies = (_FIRST_LAYER.sub(rf"\1.{i}.", name) for i in range(1, n_layers))
            tensors |= dict.fromkeys(copies, tensors[name])
        return tensors

    whole_models.random_tensors = copied_layers
    try:
        return ENCODINGS[case](folder, **SHAPE, num_hidden_layers=n_layers)
    finally:
        whole_models.random_tensors = random_tensors


def write(folder: Path, case: str, n_layers: int) -> Path:
    is_gguf = re.fullmatch(r"I?Q\d\w*|MXFP4", case)
    return (write_gguf if is_gguf else write_safetensors)(folder, case, n_layers)


def measure(path: Path, case: str, device: str) -> dict[str, Any]:
    """Loads a checkpoint in this process, and reports its peak memory and time."""
    torch.ones(256, 256, device=device) @ torch.ones(256, 256, device=device)  # initializes
    checkpoint = open_checkpoint(path)
    stored = sum(info.n_bytes for info in checkpoint.tensors.values())
    checkpoint.close()
    before = psutil.Process().memory_info().rss if device == "cpu" else 0
    cpu_before, started = time.process_time(), time.perf_counter()
    with MemoryMeter(device) as meter:
        quant = case if case in SCHEMES else "auto"
        llm = LLM(str(path), quant=quant, device=device, dtype="bfloat16", max_seq_len=16)
    described, largest = llm.describe(), 2 * SHAPE["hidden_size"] * SHAPE["intermediate_size"]
    peak, model = meter.peak_bytes - before, described.weight_bytes
    row = {
        "case": case,
        "checkpoint_bytes": stored,
        "model_bytes": model,
        "largest_tensor_bytes": largest,
        "peak_bytes": peak,
        "bound_bytes": model + 3 * largest,
        "largest_tensors_above_model": round((peak - model) / largest, 2),
        "within_bound": peak <= model + 3 * largest if device == "cpu" else None,
        "method": meter.method,
        "started_s": round(time.perf_counter() - started, 2),
        "load_s": round(described.load_s, 2),
        "load_gb_per_s": described.load_gb_s,
        "processor_s": round(time.process_time() - cpu_before, 2),
        "kernels": described.kernels,
        "load_average_1m": psutil.getloadavg()[0],
    }
    llm.close()
    return row


def load_in_process(
    command: Sequence[str], environment: Mapping[str, str], limit_s: float
) -> dict[str, Any]:
    """Loads a case in a process of its own, and returns the row that it prints."""
    line = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, timeout=limit_s, env=environment
    ).stdout
    return json.loads(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=16, help="layers, of 60 million weights each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="default: all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--limit-s", type=float, default=900, help="the time limit of a case")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(measure(arguments.load, arguments.cases[0], arguments.device)))
        return 0
    from every_encoding import ENCODINGS  # the tests' libraries, which loading does not need
    from loading_peaks import ENVIRONMENT

    cases = [*SCHEMES, *ENCODINGS]
    for case in arguments.cases or ():
        if case not in cases:
            parser.error(f"--cases {case!r} is none of {', '.join(cases)}")
    device = torch.device(arguments.device)
    kind = f"{psutil.cpu_count()}-core-{platform.machine()}"
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device).replace(" ", "-").lower()
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {"layers": arguments.layers, "provenance": provenance(device)}
    rows: list[dict[str, Any]] = []
    for case in arguments.cases or cases:
        with tempfile.TemporaryDirectory() as scratch:
            path = write(Path(scratch), case, arguments.layers)
            command = [sys.executable, __file__, "--load", str(path), "--cases", case]
            command += ["--device", arguments.device]
            row, *second = (
                load_in_process(command, os.environ | variables, arguments.limit_s)
                for variables in (({}, ENVIRONMENT) if device.type == "cpu" else ({},))
            )
            for other in second:
                row |= {key: other[key] for key in PEAK_KEYS}
        print(json.dumps(row), flush=True)
        rows.append(row)
        # After every case, so that a later one that fails loses nothing.
        text = json.dumps(result | {"rows": rows}, indent=2)
        (arguments.out / f"load_memory-{kind}.json").write_text(text + "\n")
    return 1 if any(row["within_bound"] is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
