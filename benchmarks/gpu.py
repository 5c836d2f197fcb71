"""Decode speed on this machine's GPU, and where a step's time goes.

    python benchmarks/gpu.py --out benchmarks/results/h100 --docs docs/performance.md

Speeds are those of ``hotloop sweep`` with random weights, each cell in a process of its own:
batch 1, greedy, 200 new tokens after a prompt of 5. Then, each in a process of its own too:

    rows      the time of a step over 8 positions against that over one
    context   tokens per second and MBU after a prompt of 32,000 tokens
    prompt    time to the first token after 512
    sampling  what top-k and top-p cost over greedy

Bandwidths of single kernels, and whole steps without the engine, are ``kernels_cuda.py``'s. What
fails or takes too long is named at the end, and the rest goes on. Takes some ten minutes with all
executions, three with ``--executions fused``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hotloop.bench.record import MEASURED, Record
from hotloop.report.read import read_records
from hotloop.sweep.store import RECORDS

SCHEMES = {
    "llama-2-13b": ("none", "fp8", "int8", "int4-g128"),
    "llama-2-70b": ("fp8", "int8", "int4-g128"),
    "llama-3.1-8b": ("none", "fp8", "int8", "int4-g128"),
}
WORKLOAD = ("--prompt-tokens", "5", "--new-tokens", "200", "--repeats", "5")
CELL_S = 150
BEGIN, END = "<!-- gpu table: begin -->", "<!-- gpu table: end -->"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path, help="a page with the table's marks in it")
    parser.add_argument("--shapes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--executions", nargs="+", default=["fused", "compile", "eager"])
    parser.add_argument("--only", nargs="+", choices=(*PROBES, "speed"), default=[*PROBES, "speed"])
    parser.add_argument("--probe", choices=PROBES, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.probe:
        result = PROBES[args.probe]()
        (args.out / f"{args.probe}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(args.probe, json.dumps(result["figures"]), flush=True)
        return
    failed = []
    for probe in (name for name in PROBES if name in args.only):
        command = [sys.executable, __file__, "--out", str(args.out), "--probe", probe]
        if not run(command, CELL_S):
            failed.append(probe)
    if "speed" in args.only:
        for shape in args.shapes:
            cells = len(SCHEMES[shape]) * len(args.executions)
            if not run(sweep(shape, args.executions, args.out / shape), cells * CELL_S):
                failed.append(shape)
    table = speed_table(args.out / shape for shape in SCHEMES)
    print(table)
    (args.out / "table.md").write_text(table)
    if args.docs:
        before, _, rest = args.docs.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        args.docs.write_text(f"{before}{BEGIN}\n\n{table}{END}{after}")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def run(command: list[str], limit_s: float) -> bool:
    """Whether a command ended well within its limit."""
    try:
        return subprocess.run(command, timeout=limit_s, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def sweep(shape: str, executions: Iterable[str], out: Path) -> list[str]:
    options = ("--quant", ",".join(SCHEMES[shape]), "--execution", ",".join(executions))
    where = ("--out", str(out), "--resume", "--timeout-s", str(CELL_S))
    random = ("--weights", "random", "--shape", shape, "--no-quality")
    return [sys.executable, "-m", "hotloop", "sweep", *random, *options, *WORKLOAD, *where]


def speed_table(folders: Iterable[Path]) -> str:
    """Every cell: its speed, and what share of the memory's bandwidth that is."""
    lines = [
        "| shape | scheme | execution | decode tok/s | end-to-end tok/s | MBU | ready |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for folder in folders:
        if (folder / RECORDS).exists():
            lines += [line(folder.name, record) for record in read_records(folder)]
    return "\n".join(lines) + "\n\n"


def line(shape: str, record: Record) -> str:
    scheme, execution = record.config["quant"], (record.engine or {}).get("execution", "–")
    if record.status not in MEASURED:
        execution = record.config["execution"]
        return f"| {shape} | {scheme} | {execution} | {record.status} | | | |"
    speeds = (plus_minus(figure) for figure in (record.decode_tok_s, record.e2e_tok_s))
    mbu = f"{record.mbu.mean:.0%}".replace("%", " %") if record.mbu else "–"
    cache = (record.engine or {}).get("compile_cache") or "–"
    ready = f"{record.warmup_s:.1f} s, {cache}" if record.warmup_s is not None else "–"
    return f"| {shape} | {scheme} | {execution} | {' | '.join(speeds)} | {mbu} | {ready} |"


def plus_minus(figure: Any) -> str:
    low, high = figure.ci95 or (figure.mean, figure.mean)
    return f"{figure.mean:.1f} ± {(high - low) / 2:.1f}"


# Each of these runs alone in its process.


def rows() -> dict[str, Any]:
    """Milliseconds of a step over 1 and over 8 positions."""
    result: dict[str, Any] = {"figures": {}, "samples": {}}
    for shape, quant in (
        ("llama-2-13b", "int4-g128"), ("llama-2-13b", "int8"), ("llama-3.1-8b", "int4-g128"),
    ):  # fmt: skip
        llm = engine(shape, quant, draft="ngram", draft_tokens=7, draft_policy="always")
        eight = step_ms(llm, ids=[5, 6, 7] * 4)  # what repeats has drafts
        plain = engine(shape, quant)
        one = step_ms(plain, ids=[5, 6, 7] * 4)
        result["samples"][f"{shape}/{quant}"] = {"one_ms": one, "eight_ms": eight}
        result["figures"][f"{shape}/{quant}"] = median(eight) / median(one)
        llm.close(), plain.close()
    return result


def context() -> dict[str, Any]:
    """Decoding at 32,000 tokens of context."""
    import torch

    from hotloop.bench.measure import measure_speed
    from hotloop.bench.record import Workload
    from hotloop.hardware import measure_read_bandwidth

    bandwidth = measure_read_bandwidth(torch.device("cuda"))
    llm = engine("llama-3.1-8b", "int4-g128", max_seq_len=32768)
    workload = Workload(prompt_tokens=32000, new_tokens=128, repeats=3)
    speed = measure_speed(llm, workload, read_bytes_per_s=bandwidth, datasheet_bytes_per_s=None)
    assert speed.mbu is not None
    figures = {"decode_tok_s": speed.decode_tok_s.mean, "mbu": speed.mbu.mean}
    return {"figures": figures, "mbu": speed.mbu.model_dump(), "read_bytes_per_s": bandwidth}


def prompt() -> dict[str, Any]:
    """Seconds to the first token after 512."""
    llm = engine("llama-2-13b", "int4-g128", max_seq_len=1024)
    samples = [answer(llm, list(range(2, 514)), 4).timing.ttft_s for _ in range(8)][1:]
    return {"figures": {"ttft_512_ms": 1e3 * median(samples)}, "ttft_s": samples}


def sampling() -> dict[str, Any]:
    """Seconds per token, drawn and greedy."""
    llm = engine("llama-2-13b", "int4-g128")
    ways: dict[str, dict[str, Any]] = {
        "greedy": {}, "top-k, top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 1},
    }  # fmt: skip
    tpot: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(8):
        for way, options in ways.items():
            timing = answer(llm, [1, 2, 3, 4, 5], 200, **options).timing
            if repeat:  # the first round warms up
                tpot[way].append(timing.tpot_s)
    greedy, drawn = (median(samples) for samples in tpot.values())
    return {"figures": {"drawn_over_greedy": drawn / greedy}, "tpot_s": tpot}


def engine(shape: str, quant: str, **options: Any) -> Any:
    from hotloop import LLM

    options = {"max_seq_len": 512, "execution": "fused", **options}
    return LLM(shape, weights="random", quant=quant, **options)


def answer(llm: Any, ids: list[int], n: int, **options: Any) -> Any:
    from hotloop import SamplingParams

    return llm.generate([ids], SamplingParams(max_new_tokens=n, ignore_eos=True, **options))[0]


def step_ms(llm: Any, ids: list[int]) -> list[float]:
    """Of several answers: milliseconds that a step of the model took."""
    samples = []
    for _ in range(6):
        given = answer(llm, ids, 150)
        if given.speculation is None:
            samples.append(1e3 * given.timing.tpot_s)
        else:
            samples.append(1e3 * given.speculation.verify_s / given.speculation.n_steps)
    return samples[1:]


def median(samples: Iterable[float]) -> float:
    ordered = sorted(samples)
    return ordered[len(ordered) // 2]


PROBES = {"rows": rows, "context": context, "prompt": prompt, "sampling": sampling}


if __name__ == "__main__":
    started = time.perf_counter()
    try:
        main()
    finally:
        print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
