"""Measures decode speed on this machine's GPU, and the parts of a step's time.

    python benchmarks/gpu.py --out benchmarks/results/h100 --docs docs/gpu-tables.md

Every part runs in a process of its own with a time limit. Parts that fail or take too long are
named at the end. Results of an earlier run under ``--out`` remain in the tables.

    speed     ``hotloop sweep`` with random weights: batch 1, greedy, prompts of 5 tokens, 200 new
              tokens
    kernels   whole steps without the engine, their parts, and every matrix product by itself
              (``kernels_cuda.py``)
    rows      the time of a step that verifies 8 positions, relative to one position
    context   tokens per second and MBU after prompts of 4,000 and 32,000 tokens
    prompt    time to the first token, with prompts of 5 to 8,192 tokens
    sampling  the cost of top-k and top-p relative to greedy decoding

Takes some four minutes with ``--executions fused``, and half an hour with all of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from hotloop import LLM, Generation, SamplingParams
from hotloop.bench.measure import measure_speed
from hotloop.bench.record import MEASURED, Record, Workload
from hotloop.hardware import measure_read_bandwidth, provenance
from hotloop.report.read import read_records
from hotloop.report.recommend import MIN_REPEATS
from hotloop.sweep.store import RECORDS

SCHEMES = {
    "llama-2-13b": ("none", "fp8", "int8", "int4-g128"),
    "llama-2-70b": ("fp8", "int8", "int4-g128"),
    "llama-3.1-8b": ("none", "fp8", "int8", "int4-g128"),
}
WORKLOAD = ("--prompt-tokens", "5", "--new-tokens", "200")
REPEATS = {"fused": 5, "compile": 3, "eager": 2}
"""Repeats by execution mode; eager takes up to a quarter of a second for a token."""
CELL_S = 200
"""The time limit of a cell, a probe, or half of ``kernels``, in seconds."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path, help="a page with marks for the tables of this --out")
    parser.add_argument("--shapes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--executions", nargs="+", default=list(REPEATS), choices=REPEATS)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--probe", choices=PROBES, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    begin, end = (f"<!-- tables of {args.out.name}: {which} -->" for which in ("begin", "end"))
    require_marks(parser, args.docs, begin, end)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.probe:
        result = PROBES[args.probe]() | {"provenance": provenance(torch.device("cuda"))}
        (args.out / f"{args.probe}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(args.probe, json.dumps(result["figures"]), flush=True)
        return
    failed = []
    if "kernels" in args.only and not run(kernels(args.out / "kernels"), 2 * CELL_S):
        failed.append("kernels")
    for probe in (name for name in PROBES if name in args.only):
        command = [sys.executable, __file__, "--out", str(args.out), "--probe", probe]
        if not run(command, CELL_S):
            failed.append(probe)
    if "speed" in args.only:
        for shape, execution in itertools.product(args.shapes, args.executions):
            limit_s = len(SCHEMES[shape]) * CELL_S
            if not run(sweep(shape, execution, args.out / shape), limit_s):
                failed.append(f"{shape} {execution}")
    made = tables(args.out)
    print(made)
    if args.docs:
        write_between(args.docs, begin, end, made)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def tables(out: Path) -> str:
    """Makes all tables of a folder of results."""
    found = [
        speed_table(out / shape for shape in SCHEMES),
        figures_table(out),
        steps_table(out / "kernels" / "stack.json"),
        products_table(out / "kernels" / "linear.json"),
    ]
    return "\n".join(filter(None, found))


def run(command: list[str], limit_s: float) -> bool:
    """Runs a command; returns whether it succeeded within its limit."""
    try:
        return subprocess.run(command, timeout=limit_s, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def sweep(shape: str, execution: str, out: Path) -> list[str]:
    options = ("--quant", ",".join(SCHEMES[shape]), "--execution", execution)
    options += ("--repeats", str(REPEATS[execution]))
    where = ("--out", str(out), "--resume", "--timeout-s", str(CELL_S))
    random = ("--weights", "random", "--shape", shape, "--no-quality")
    return [sys.executable, "-m", "hotloop", "sweep", *random, *options, *WORKLOAD, *where]


def kernels(out: Path) -> list[str]:
    script = Path(__file__).with_name("kernels_cuda.py")
    return [sys.executable, str(script), "--out", str(out), "--sections", "stack", "linear"]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> str:
    """Formats a markdown table whose first ``texts`` columns are words; empty without rows."""
    if not rows:
        return ""
    rule = ["---" if i < texts else "---:" for i in range(len(head))]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows))


def speed_table(folders: Iterable[Path]) -> str:
    """Makes the table of all cells: speed, and share of the memory's bandwidth."""
    head = ("shape", "scheme", "execution", "decode tok/s", "end-to-end tok/s", "MBU",
            "warm-up (compile cache)")  # fmt: skip
    rows = [
        line(folder.name, record)
        for folder in folders
        if (folder / RECORDS).exists()
        for record in read_records(folder)
    ]
    return table(head, rows, texts=3)


def figures_table(out: Path) -> str:
    """Makes the table of all probes."""
    found = [(probe, out / f"{probe}.json") for probe in PROBES]
    figures = [
        ((PROBES[probe].__doc__ or "").rstrip("."), name, f"{value:.3g}")
        for probe, path in found
        if path.exists()
        for name, value in json.loads(path.read_text())["figures"].items()
    ]
    return table(("figure", "case", "value"), figures, texts=2)


def steps_table(path: Path) -> str:
    """Makes the table of the parts of a step without the engine, in milliseconds."""
    head = ("shape", "scheme", "weight read (ms)", "layers' matrix products (ms)", "attention (ms)",
            "head, first and last kernels (ms)", "step (ms)", "bandwidth",
            "M = 8 / M = 1")  # fmt: skip
    found = json.loads(path.read_text()) if path.exists() else {"rows": []}
    ms = {(r["model"], r["kind"], r["rows"], r["what"]): 1e3 * r["seconds"] for r in found["rows"]}
    rows = []
    for r in found["rows"]:
        if r["rows"] != 1 or r["what"] != "step":
            continue
        of = (r["model"], r["kind"])
        step = ms[*of, 1, "step"]
        parts = [ms.get((*of, 1, what)) for what in ("products", "attention")]
        shares = ["–", "–", "–"]
        if None not in parts:
            products, attention = parts
            shares = [_part(each) for each in (products, attention - products, step - attention)]
        eight = ms.get((*of, 8, "step"))
        alone = 1e3 * r["nbytes"] / found["read_bytes_per_s"]
        last = "–" if eight is None else f"{eight / step:.2f}"
        rows.append((*of, f"{alone:.3f}", *shares, f"{step:.3f}", percent(r["share"]), last))
    return table(head, rows, texts=2)


def _part(ms: float) -> str:
    """Formats a part of a step: a difference of separate runs can come out below 0."""
    return f"{ms:.3f}" if ms >= 0 else "noise"


def products_table(path: Path) -> str:
    """Makes the table of matrix products alone: microseconds, and read bandwidth."""
    found = json.loads(path.read_text())["rows"] if path.exists() else []
    roles = list(dict.fromkeys(r["role"] for r in found))
    of = {(r["model"], r["kind"], r["role"]): r for r in found}
    rows = []
    for model, kind in dict.fromkeys((r["model"], r["kind"]) for r in found):
        cells = [of.get((model, kind, role)) for role in roles]
        shown = [
            "–" if r is None else f"{r['us']['1']:.1f} µs, {percent(r['share'])}" for r in cells
        ]
        rows.append((model, kind, *shown))
    return table(("shape", "scheme", *roles), rows, texts=2)


def line(shape: str, record: Record) -> tuple[str, ...]:
    scheme, execution = record.config["quant"], (record.engine or {}).get("execution", "–")
    if record.status not in MEASURED:
        return (shape, scheme, record.config["execution"], record.status, "", "", "")
    speeds = [speed(record), plus_minus(record.e2e_tok_s)]
    mbu = percent(record.mbu.mean) if record.mbu else "–"
    cache = (record.engine or {}).get("compile_cache") or "–"
    ready = f"{record.warmup_s:.1f} s, {cache}" if record.warmup_s is not None else "–"
    return (shape, scheme, execution, *speeds, mbu, ready)


def speed(record: Record) -> str:
    """Formats the decode speed of a measured record; one that is not well known says so."""
    figure = record.decode_tok_s
    assert figure is not None, "only measured records have a speed"
    doubts = ["unstable"] * (record.status == "unstable")
    doubts += [f"{figure.n} repeats"] * (figure.n < MIN_REPEATS)
    return plus_minus(figure) + (f" ({', '.join(doubts)})" if doubts else "")


def plus_minus(figure: Any) -> str:
    low, high = figure.ci95 or (figure.mean, figure.mean)
    return f"{figure.mean:.1f} ± {(high - low) / 2:.1f}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def require_marks(parser: argparse.ArgumentParser, page: Path | None, begin: str, end: str) -> None:
    """Exits with a message if a page has no place for the results."""
    if page and not (page.exists() and all(mark in page.read_text() for mark in (begin, end))):
        parser.error(f"{page} has no place for the tables: put {begin} and {end} there.")


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replaces the text between two marks of a page."""
    before, _, rest = page.read_text().partition(begin)
    _, found, after = rest.partition(end)
    assert found, f"{page} lacks the marks {begin} and {end}"
    page.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")


# Each of these runs alone in its process.


def rows() -> dict[str, Any]:
    """Step time, 8 positions / 1 position."""
    result: dict[str, Any] = {"figures": {}, "samples": {}}
    for shape, quant in (
        ("llama-2-13b", "int4-g128"), ("llama-2-13b", "int8"), ("llama-3.1-8b", "int4-g128"),
        ("llama-3.1-8b", "int8"),
    ):  # fmt: skip
        llm = engine(shape, quant, draft="ngram", draft_tokens=7, draft_policy="always")
        eight = step_ms(llm, ids=[5, 6, 7] * 4)  # the n-gram drafter needs a repetition
        plain = engine(shape, quant)
        one = step_ms(plain, ids=[5, 6, 7] * 4)
        result["samples"][f"{shape}, {quant}"] = {"one_ms": one, "eight_ms": eight}
        result["figures"][f"{shape}, {quant}"] = median(eight) / median(one)
        llm.close(), plain.close()
    return result


def context() -> dict[str, Any]:
    """llama-3.1-8b, int4-g128, decoding."""
    bandwidth = measure_read_bandwidth(torch.device("cuda"))
    llm = engine("llama-3.1-8b", "int4-g128", max_seq_len=32768)
    result: dict[str, Any] = {"figures": {}, "mbu": {}, "read_bytes_per_s": bandwidth}
    for n in (4000, 32000):
        workload = Workload(prompt_tokens=n, new_tokens=128, repeats=3)
        speed = measure_speed(llm, workload, read_bytes_per_s=bandwidth, datasheet_bytes_per_s=None)
        assert speed.mbu is not None
        after = f"after {n:,} tokens"
        result["figures"] |= {
            f"{after}, tok/s": speed.decode_tok_s.mean,
            f"{after}, MBU": speed.mbu.mean,
        }
        result["mbu"][after] = speed.mbu.model_dump()
    return result


PROMPTS = {"llama-3.1-8b": (5, 64, 512, 2048, 8192), "llama-2-13b": (5, 64, 512, 2048)}


def prompt() -> dict[str, Any]:
    """TTFT (ms)."""
    result: dict[str, Any] = {"figures": {}, "ttft_s": {}}
    for shape, quant in itertools.product(PROMPTS, ("int4-g128", "int8", "none")):
        llm = engine(shape, quant, max_seq_len=max(PROMPTS[shape]) + 8)
        for n in PROMPTS[shape]:
            ids = [2 + i % 1000 for i in range(n)]
            samples = [answer(llm, ids, 4).timing.ttft_s for _ in range(11)]
            case = f"{shape}, {quant}, {n}-token prompt"
            result["figures"][case] = 1e3 * median(samples[1:])
            result["ttft_s"][case] = samples  # the first one warmed up this length
        llm.close()
    return result


def sampling() -> dict[str, Any]:
    """llama-2-13b, int4-g128, seconds per token / greedy."""
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
    return {"figures": {"top-k 50, top-p 0.95": drawn / greedy}, "tpot_s": tpot}


def engine(shape: str, quant: str, **options: Any) -> LLM:
    options = {"max_seq_len": 512, "execution": "fused", **options}
    return LLM(shape, weights="random", quant=quant, **options)


def answer(llm: LLM, ids: list[int], n: int, **options: Any) -> Generation:
    return llm.generate([ids], SamplingParams(max_new_tokens=n, ignore_eos=True, **options))[0]


def step_ms(llm: LLM, ids: list[int]) -> list[float]:
    """Returns milliseconds per step of the model, over several answers."""
    samples = []
    for _ in range(6):
        given = answer(llm, ids, 150)
        if given.speculation is None:
            samples.append(1e3 * given.timing.tpot_s)
        else:
            samples.append(1e3 * given.speculation.verify_s / given.speculation.n_steps)
    return samples[1:]


def median(samples: Iterable[float]) -> float:
    """Returns the median; of an even number of samples, the upper one of the middle two."""
    ordered = sorted(samples)
    return ordered[len(ordered) // 2]


PROBES = {"rows": rows, "context": context, "prompt": prompt, "sampling": sampling}
PARTS = ("speed", "kernels", *PROBES)


if __name__ == "__main__":
    started = time.perf_counter()
    try:
        main()
    finally:
        print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
