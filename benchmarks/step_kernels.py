"""Divides the time of a captured decode step among its kernels, by torch's profiler (CUPTI).

    python benchmarks/step_kernels.py --out FOLDER --cells llama-3.1-8b/none --rows 1 8 32 64

For each cell and number of rows an engine decodes, and a profile of some steps has the begin
and end of every kernel of the replayed graph. With programmatic dependent launch a kernel begins
before its predecessor ends. So the time of a kernel is counted from the end of its predecessor
to its own end, and these times add up to the step. They are summed by the kernel's place in a
layer. The gaps between steps, where the device is idle, are a row of their own. Step times with
the profiler are compared with those without.

With ``--patches`` the process also has an engine of each patched copy (``patched.py``), with
the same weights. The engines take turns, and their tokens and logits are compared bit for bit.
``--rehearse`` runs what a CPU can: engines of a tiny model, and the sums over a made-up trace.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from gpu import median, run, table
from multi_gpu import write_tiny
from patched import ROOT, Imported, copy_with

LIMIT_S = 300.0
"""The time limit of a cell."""

N_LOGITS = 9
"""Steps whose logits are compared."""

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
    """A kernel on the device: its name, begin and end, in microseconds."""

    name: str
    begin: float
    end: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", nargs="+", default=["llama-3.1-8b/none"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument(
        "--patches", nargs="*", type=Path, default=[], help="as git diff makes them"
    )
    parser.add_argument("--rounds", type=int, default=4, help="measurements of each kind")
    parser.add_argument("--steps", type=int, default=12, help="steps of a profile")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model on a CPU")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.job:
        profile(args.job, args)
        return
    if args.rehearse:
        write_tiny(args.out / "rehearsal-model")
        args.cells = [f"{args.out / 'rehearsal-model'}/none"]
    failed = []
    for cell in args.cells:
        command = [sys.executable, __file__, "--out", str(args.out), "--job", cell]
        command += ["--rows", *map(str, args.rows), "--patches", *map(str, args.patches)]
        command += ["--rounds", str(args.rounds), "--steps", str(args.steps)]
        if not run(command + ["--rehearse"] * args.rehearse, LIMIT_S):
            failed.append(cell)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def profile(cell: str, args: argparse.Namespace) -> None:
    """Profiles the steps of all versions, and writes the file after each number of rows."""
    import torch

    shape, _, scheme = cell.rpartition("/")
    device = "cpu" if args.rehearse else "cuda"
    path = args.out / f"kernels-{Path(shape).name}-{scheme}.json"
    with tempfile.TemporaryDirectory() as folder:
        sources = {"main": ROOT / "src"} | {
            patch.stem: copy_with(patch, Path(folder, patch.stem)) / "src" for patch in args.patches
        }
        versions = {
            name: Version(source, shape, scheme, args.rows, device)
            for name, source in sources.items()
        }
        found: dict[str, Any] = {"cell": cell, "rows": {}}
        with versions["main"].active():
            from hotloop.hardware import provenance

            found["provenance"] = provenance(torch.device(device))
        for n in args.rows:
            of_rows = compare(versions, n, args)
            found["rows"][str(n)] = of_rows
            path.write_text(json.dumps(found) + "\n")
            print(f"{cell}, {n} rows\n{report(of_rows)}", flush=True)
        for version in versions.values():
            version.close()


def compare(
    versions: dict[str, Version], n: int, args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Measures steps of ``n`` rows of each version, which take turns."""
    found: dict[str, dict[str, Any]] = {name: {"step_us": []} for name in versions}
    for round_ in range(1 + args.rounds):
        for name in list(versions)[:: -1 if round_ % 2 else 1]:
            step_us = versions[name].step_us(n)
            if round_:  # the first captures graphs
                found[name]["step_us"].append(step_us)
    for name, version in versions.items():
        spans = version.spans(n, args.steps)
        found[name] |= {
            "bits": version.bits(n),
            "parts_us": parts(spans, version.n_layers),
            "kernels": [tuple(span) for span in last_step(spans)],
        }
    return found


class Version:
    """An engine of one version of hotloop.

    Args:
        source: The folder that has the package.
        shape: The shape of its model.
        scheme: The scheme of its weights, which are random, and the same in all versions.
        rows: Numbers of rows to measure.
        device: ``cuda``; on ``cpu`` only the host's part of it runs.
    """

    def __init__(
        self, source: Path, shape: str, scheme: str, rows: Sequence[int], device: str
    ) -> None:
        self._imported, self._device = Imported(source), device
        with self.active():
            from hotloop import LLM, SamplingParams

            self._llm: Any = LLM(
                shape,
                weights="random",
                quant=scheme,
                execution="fused" if device == "cuda" else "eager",
                device=device,
                dtype="bfloat16" if device == "cuda" else "float32",
                max_batch_size=max(rows),
                max_seq_len=256,
            )
            self._params = SamplingParams(max_new_tokens=120, ignore_eos=True)
        self._scheduler = self._llm._scheduler
        self._scheduler.n_steps = 1  # a launch is a step
        # The made-up trace that stands in for a profile on a CPU has two layers.
        self.n_layers = len(self._llm._setup.model.layers) if device == "cuda" else 2
        self._tokens: dict[int, Any] = {}

    def active(self) -> AbstractContextManager[None]:
        """Makes imports find this version within the block; see ``patched.Imported``."""
        return self._imported.active()

    def close(self) -> None:
        """Frees its memory."""
        with self.active():
            self._llm.close()

    def step_us(self, n: int) -> float:
        """Measures the mean time of a step while ``n`` prompts are answered, in microseconds."""
        with self.active():
            answers = self._llm.generate(prompts(n), self._params)
        self._tokens[n] = [answer.token_ids for answer in answers]
        return 1e6 * n / sum(answer.timing.decode_tok_s for answer in answers)

    def bits(self, n: int) -> str:
        """Hashes the last answers' tokens, and the logits of the first steps of new sequences."""
        import torch

        stepper = self._llm._runner._stepper
        seats = torch.arange(n, device=self._device)
        hashed = hashlib.sha256(repr(self._tokens[n]).encode())
        with self.active(), self._llm._streams.hold(), torch.inference_mode():
            if self._device == "cuda":
                torch.cuda.synchronize()  # the engine has a stream of its own
            for position in range(N_LOGITS):
                ids, positions = 7 + position + seats[:, None], torch.full_like(seats, position)
                length = stepper.length(N_LOGITS)
                logits, *_ = stepper.forward(
                    ids, positions[:, None], seats, first_seat=0, length=length
                )
                hashed.update(logits.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        return hashed.hexdigest()[:16]

    def spans(self, n: int, steps: int) -> list[Span]:
        """Profiles some steps at about 60 positions."""
        import torch

        scheduler = self._scheduler
        on_gpu, kinds = torch.autograd.DeviceType.CUDA, [torch.profiler.ProfilerActivity.CUDA]
        with self.active(), self._llm._streams.hold():
            requests = self._llm.requests(prompts(n), self._params)
            for request in requests:
                scheduler.submit(request)
            before = scheduler.n_steps_run
            while scheduler.n_steps_run < before + n + 40:  # all are rows
                scheduler.iterate()
            profiler: Any = nullcontext()
            if self._device == "cuda":
                torch.cuda.synchronize()
                profiler = torch.profiler.profile(activities=kinds)
            with profiler:
                end = scheduler.n_steps_run + steps
                while scheduler.n_steps_run < end:
                    scheduler.iterate()
                if self._device == "cuda":
                    torch.cuda.synchronize()
            for request in requests:
                scheduler.cancel(request)
            while not scheduler.idle:
                scheduler.iterate()
        if self._device != "cuda":
            return rehearsal()
        return [
            Span(event.name, event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if event.device_type == on_gpu
        ]


def prompts(n: int) -> list[list[int]]:
    return [[1, 2, 3, 4, 5 + i] for i in range(n)]


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
    """Names the place of each kernel: a layer has four matrix products, and the head comes last."""
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
    """Sums the times of kernels by their place: means over steps, in microseconds.

    With many rows a matrix product can take several launches. Then a layer does not have four, and
    the places of matrix products are unknown: all of them are summed as ``products``.
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


def report(found: dict[str, dict[str, Any]]) -> str:
    """Makes a table of parts, the longest first, with a column of microseconds for each version."""
    first, *_ = found.values()
    longest = sorted(first["parts_us"], key=first["parts_us"].__getitem__, reverse=True)
    names = dict.fromkeys([*longest, *(name for one in found.values() for name in one["parts_us"])])
    rows = [
        (name, *(f"{one['parts_us'].get(name, 0.0):,.1f}" for one in found.values()))
        for name in names
    ]
    totals = (f"{sum(one['parts_us'].values()):,.0f}" for one in found.values())
    steps = [median(one["step_us"]) for one in found.values()]
    rows += [
        ("all, profiled", *totals),
        ("a step, not profiled", *(f"{step_us:,.1f}" for step_us in steps)),
        ("relative to the first", *(f"{step_us / steps[0]:.1%}" for step_us in steps)),
        (
            "bits",
            *("equal" if one["bits"] == first["bits"] else "DIFFER" for one in found.values()),
        ),
    ]
    return table(("us of a step", *found), rows, texts=1)


def rehearsal() -> list[Span]:
    """Makes a trace of three steps of two layers, whose kernels overlap by half."""
    layer = ["linear_a", "attention", "linear_b", "linear_c", "linear_d"]
    names = ["next_tokens", "embed", *layer, *layer, "linear_head", "argmax", "accept"]
    return [
        Span(name, 100.0 * step + 5 * i, 100.0 * step + 5 * i + 10)
        for step in range(3)
        for i, name in enumerate(names)
    ]


if __name__ == "__main__":
    main()
