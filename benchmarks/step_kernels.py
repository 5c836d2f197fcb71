"""Divides the time of a captured decode step among its kernels, by torch's profiler (CUPTI).

    python benchmarks/step_kernels.py --out FOLDER --cells llama-3.1-8b/none --rows 1 8 32 64

For each cell and number of rows an engine decodes; a profile of some steps has the begin and end of
every kernel of the replayed graph. A kernel that overlaps its predecessor (dependent launch) begins
before that ends, so its *span* is the time from the end of the one before to its own end: spans add
up to the step. They are summed by place in the layer. The gaps between steps, where the device has
nothing to do, are a row of their own. Times with the profiler are compared with those without.
``--rehearse`` runs what a CPU can: the sums over a recorded trace.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpu import run, table

LIMIT_S = 150.0

PREFIXES = {
    "linear": "linear",
    "wide": "wide",
    "stage": "staging of x",
    "attention": "attention",
    "embed": "first kernels",
    "next_tokens": "first kernels",
    "argmax": "argmax and acceptance",
    "accept": "argmax and acceptance",
    "all_reduce": "all-reduce",
}
"""The role of a kernel, by the beginning of its name."""


class Span(NamedTuple):
    """A kernel on the device, in microseconds."""

    name: str
    begin: float
    end: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", nargs="+", default=["llama-3.1-8b/none"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--steps", type=int, default=12, help="steps of a profile")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.rehearse:
        print(report(parts(rehearsal(), n_layers=2), 100.0))
        return
    if args.job:
        profile(args.job, args.rows, args.steps, args.out)
        return
    failed = []
    for cell in args.cells:
        rows = ["--rows", *map(str, args.rows), "--steps", str(args.steps)]
        command = [sys.executable, __file__, "--out", str(args.out), *rows, "--job", cell]
        if not run(command, LIMIT_S):
            failed.append(cell)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def profile(cell: str, rows: Sequence[int], steps: int, out: Path) -> None:
    """Profiles steps of each number of rows, in one engine."""
    import torch

    from hotloop import LLM, SamplingParams
    from hotloop.hardware import provenance

    shape, _, scheme = cell.rpartition("/")
    llm = LLM(
        shape,
        weights="random",
        quant=scheme,
        execution="fused",
        device="cuda",
        max_batch_size=max(rows),
        max_seq_len=512,
    )
    scheduler, n_layers = llm._scheduler, len(llm._setup.model.layers)
    scheduler.n_steps = 1  # a launch is a step
    found: dict[str, Any] = {"cell": cell, "provenance": provenance(torch.device("cuda"))}
    params = SamplingParams(max_new_tokens=200, ignore_eos=True)
    for n in rows:
        prompts = [[1, 2, 3, 4, 5 + i] for i in range(n)]
        answers = [llm.generate(prompts, params) for _ in range(3)][1:]
        step_us = min(1e6 * n / sum(a.timing.decode_tok_s for a in each) for each in answers)
        requests = llm.requests(prompts, params)
        with llm._turns.hold():
            for request in requests:
                scheduler.submit(request)
            before = scheduler.n_steps_run
            while scheduler.n_steps_run < before + n + 40:  # all are rows, at some 100 positions
                scheduler.iterate()
            torch.cuda.synchronize()
            kinds = [torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=kinds) as profiler:
                end = scheduler.n_steps_run + steps
                while scheduler.n_steps_run < end:
                    scheduler.iterate()
                torch.cuda.synchronize()
            for request in requests:
                scheduler.cancel(request)
            while not scheduler.idle:
                scheduler.iterate()
        on_gpu = torch.autograd.DeviceType.CUDA
        spans = [
            Span(event.name, event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if event.device_type == on_gpu
        ]
        of_steps = parts(spans, n_layers)
        found[str(n)] = {
            "step_us": step_us,
            "parts_us": of_steps,
            "kernels": [tuple(span) for span in last_step(spans)],
        }
        (out / f"kernels-{shape}-{scheme}.json").write_text(json.dumps(found) + "\n")
        print(f"{cell}, {n} rows\n{report(of_steps, step_us)}", flush=True)
    llm.close()


def steps_of(spans: Sequence[Span]) -> list[list[Span]]:
    """Divides kernels into steps, which begin with ``next_tokens``; the last may be incomplete."""
    steps: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: span.begin):
        if span.name.startswith("next_tokens"):
            steps.append([])
        if steps:
            steps[-1].append(span)
    return steps


def last_step(spans: Sequence[Span]) -> list[Span]:
    """Returns the kernels of the last complete step."""
    return steps_of(spans)[-2]


def role(name: str) -> str:
    """Returns what a kernel does, by its name."""
    return next((what for prefix, what in PREFIXES.items() if name.startswith(prefix)), "other")


def places(step: Sequence[Span], n_layers: int) -> list[str]:
    """Names the place of each kernel: matrix products come four a layer, and then the head."""
    names, n_products = [], 0
    for span in step:
        what = role(span.name)
        if what in ("linear", "wide"):
            layer, which = divmod(n_products, 4)
            what = "head" if layer == n_layers else ("qkv", "o", "gate and up", "down")[which]
            n_products += 1
        names.append(what)
    return names


def parts(spans: Sequence[Span], n_layers: int) -> dict[str, float]:
    """Sums the spans of kernels by their place; means over steps, in microseconds.

    Each kernel of a place counts, so that one of several launches for many rows does; the pattern
    of four products a layer then does not hold, and all are ``products``.
    """
    pairs = list(itertools.pairwise(steps_of(spans)))
    total: dict[str, float] = {}
    for step, after in pairs:
        n_products = sum(role(span.name) in ("linear", "wide") for span in step)
        names = places(step, n_layers)
        if n_products != 4 * n_layers + 1:
            products = ("qkv", "o", "gate and up", "down", "head")
            names = ["products" if name in products else name for name in names]
        end = step[0].begin
        for span, name in zip(step, names, strict=True):
            total[name] = total.get(name, 0.0) + max(0.0, span.end - end)
            end = max(end, span.end)
        total["between steps"] = total.get("between steps", 0.0) + after[0].begin - end
    return {name: sum_us / len(pairs) for name, sum_us in total.items()}


def report(of_steps: dict[str, float], step_us: float) -> str:
    """Makes a table of parts, the longest first."""
    ordered = sorted(of_steps.items(), key=lambda part: -part[1])
    rows = [(name, f"{us:,.0f}", f"{us / step_us:.1%}") for name, us in ordered]
    rows += [("all, profiled", f"{sum(of_steps.values()):,.0f}", "")]
    rows += [("a step, not profiled", f"{step_us:,.0f}", "")]
    return table(("part", "us a step", "of the step"), rows, texts=1)


def rehearsal() -> list[Span]:
    """Makes the trace of three steps of two layers, whose kernels overlap by half."""
    layer = ["linear_a", "attention", "linear_b", "linear_c", "linear_d"]
    names = ["next_tokens", "embed", *layer, *layer, "linear_head", "argmax", "accept"]
    return [
        Span(name, 100.0 * step + 5 * i, 100.0 * step + 5 * i + 10)
        for step in range(3)
        for i, name in enumerate(names)
    ]


if __name__ == "__main__":
    main()
