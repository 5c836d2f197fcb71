"""Times the CPU kernels without the engine: the parts of a step's time, and the cost of more rows.

The matrix products of a whole SmolLM2-135M run in the order of a decode step, so that each weight
comes from memory as it does there, with one row and with the rows of verification. The kernels
are called as the decoder calls them. Attention is timed separately, since its keys and values stay
in the processor's cache at this size.

    python benchmarks/cpu_kernels.py --out benchmarks/results/cpu-kernels.json

The rest of a step is its small operations, the compiled wrapper and the sampler.

It reports medians, and the sum of the minimum time of each matrix product. Other work on the
machine hardly affects minima, so they can be compared between versions on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hotloop import hardware
from hotloop.kernels import cpu
from hotloop.kernels.cpu.huge_pages import move_to_huge_pages
from hotloop.kernels.linear import DENSE, LinearKernel, LinearSpec, choose_linear
from hotloop.quant import QTensor, Scheme, parse_head_scheme, parse_scheme
from hotloop.quant.encodings import gguf

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 30, 9, 3, 64
SHAPES = {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536)}
HEAD = (49152, 576)
SCHEMES = ("none", "int8", "fp8", "int4-g64", "int4-g32-asym")
BLOCKS = (gguf.Q4_0, gguf.Q4_1, gguf.Q8_0, gguf.MXFP4, gguf.IQ4_NL, gguf.Q4_K, gguf.Q6_K)
"""GGUF types. Blocks of 256 do not divide 576 features; such matrices are Q8_0 instead."""

ROWS = (1, 2, 3, 5, 9)

MatrixProduct = tuple[str, LinearKernel, list[Tensor]]
"""A matrix product: its name, its kernel and its packed weight."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--passes", type=int, default=40)
    parser.add_argument("--positions", type=int, nargs="+", default=[37, 500])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if reason := cpu.unavailable_reason():
        parser.error(reason)
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "what": "our CPU kernels at the shapes of SmolLM2-135M; medians over passes",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": args.threads,
        "passes": args.passes,
        "products": {},
        "attention": {},
    }
    with torch.inference_mode():
        models = {scheme: matrix_products(*schemes_of(scheme)) for scheme in SCHEMES}
        models |= {blocks.type: matrix_products(blocks, blocks) for blocks in BLOCKS}
        move_to_huge_pages(t for model in models.values() for _, _, weight in model for t in weight)
        times: dict[tuple[str, int], list[list[float]]] = {}
        for _ in range(args.passes):  # schemes and rows alternate, so that slow phases affect all
            for scheme, model in models.items():
                for rows in ROWS:
                    times.setdefault((scheme, rows), []).append(one_pass(model, rows))
        for scheme, model in models.items():
            result["products"][scheme] = report(scheme, model, times)
        for position in args.positions:
            result["attention"][position] = attention(position, args.passes)
    result["provenance"] = hardware.provenance(hardware.resolve_device("cpu"))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def schemes_of(name: str) -> tuple[Scheme, Scheme]:
    """Returns the schemes of layers and head."""
    return parse_scheme(name), parse_head_scheme("auto", parse_scheme(name))


def random_weight(form: Scheme | gguf.Blocks, n: int, k: int) -> Tensor | QTensor:
    if not isinstance(form, gguf.Blocks):
        return form.quantize(torch.randn(n, k, dtype=torch.bfloat16) / k**0.5)
    blocks = form if k % form.size == 0 else gguf.Q8_0
    stored = torch.randint(0, 60, (n, k // blocks.size * blocks.n_bytes), dtype=torch.uint8)
    return blocks.decode({gguf.BLOCKS: stored}, (n, k))


def matrix_products(body: Scheme | gguf.Blocks, head: Scheme | gguf.Blocks) -> list[MatrixProduct]:
    """Makes every matrix product of a step, in order, with random weights."""
    shapes = [(name, shape, body) for _ in range(LAYERS) for name, shape in SHAPES.items()]
    made: list[MatrixProduct] = []
    for name, (n, k), form in [*shapes, ("head", HEAD, head)]:
        weight = random_weight(form, n, k)
        kernel, _ = choose_linear(
            LinearSpec(
                format=weight.format if isinstance(weight, QTensor) else DENSE,
                n=n,
                k=k,
                dtype=torch.bfloat16,
                device="cpu",
            )
        )
        made.append((name, kernel, kernel.pack(weight)))
    return made


def one_pass(model: list[MatrixProduct], rows: int) -> list[float]:
    """Times the matrix products of a step; returns the seconds of each."""
    widths = {name: k for name, (_, k) in {**SHAPES, "head": HEAD}.items()}
    x = {name: torch.randn(rows, k, dtype=torch.bfloat16) for name, k in widths.items()}
    seconds = []
    for name, kernel, weight in model:
        started = time.perf_counter()
        kernel(x[name], *weight)
        seconds.append(time.perf_counter() - started)
    return seconds


def report(
    scheme: str, model: list[MatrixProduct], times: dict[tuple[str, int], list[list[float]]]
) -> dict[str, Any]:
    calls = {name: sum(other == name for other, _, _ in model) for name in (*SHAPES, "head")}
    nbytes = {name: sum(t.nbytes for t in weight) for name, _, weight in model}
    names = [name for name, _, _ in model]

    def total(name: str, seconds: list[float]) -> float:
        return sum(s for other, s in zip(names, seconds, strict=True) if other == name)

    one_row = {
        name: statistics.median(total(name, p) for p in times[scheme, 1]) / n
        for name, n in calls.items()
    }
    steps = {rows: statistics.median(map(sum, times[scheme, rows])) for rows in ROWS}
    sum_of_minima = sum(map(min, zip(*times[scheme, 1], strict=True)))
    print(scheme)
    for name, seconds in one_row.items():
        rate = nbytes[name] / seconds / 1e9
        print(f"  {name:8} {1e6 * seconds:7.1f} us x {calls[name]:2}   {rate:5.1f} GB/s")
    ratios = "  ".join(f"{rows}: {steps[rows] / steps[1]:.2f}" for rows in ROWS)
    line = f"  together {1e3 * steps[1]:.2f} ms, at least {1e3 * sum_of_minima:.2f}"
    print(f"{line};  t(M)/t(1) {ratios}", flush=True)
    return {
        "us_per_call": {name: 1e6 * seconds for name, seconds in one_row.items()},
        "calls": calls,
        "bytes_per_call": nbytes,
        "least_ms_per_step": 1e3 * sum_of_minima,
        "ms_per_step_by_rows": {rows: 1e3 * seconds for rows, seconds in steps.items()},
    }


def attention(position: int, passes: int) -> dict[int, float]:
    """Times one layer's attention, in microseconds by number of tokens up to ``position``."""
    keys, values = torch.randn(2, 1, KV_HEADS, 1024, HEAD_DIM, dtype=torch.bfloat16).unbind(0)
    found = {}
    for T in ROWS:
        q = torch.randn(1, T, HEADS, HEAD_DIM, dtype=torch.bfloat16)
        positions = torch.arange(position + 1 - T, position + 1)[None]
        seats = torch.zeros(1, dtype=torch.int64)
        arguments = (q, keys, values, seats, positions, 0, HEAD_DIM**-0.5)
        samples = []
        for _ in range(10 * passes):
            started = time.perf_counter()
            torch.ops.hotloop_cpu.decode_attention.default(*arguments)
            samples.append(time.perf_counter() - started)
        found[T] = 1e6 * statistics.median(samples)
    listed = "  ".join(f"{T}: {us:.1f}" for T, us in found.items())
    print(f"attention at position {position}, us by tokens  {listed}")
    return found


if __name__ == "__main__":
    main()
