"""Measures the loads of a small server: concurrent sequences, and prompts of several lengths.

    python benchmarks/small_batches.py --out benchmarks/results/h200-small-batches \
        --docs docs/performance.md

Two kinds of measurements, each of a shape and a scheme in a process of its own with a time limit:

    sequences  total decode tok/s and mean TTFT of 1 to 64 sequences, with prompts of 5 tokens and
               200 new tokens
    prompts    TTFT, with prompts of 512 to 32,768 tokens

Weights are random, decoding is greedy and `fused`, on one GPU and on two. Results of an earlier
run under ``--out`` remain in the tables; ``--kinds`` without a name makes the tables alone. On an
H200 they have vLLM's figures beside them (``VLLM``).
``--rehearse`` runs everything with a tiny model on a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu import median, require_marks, run, table, write_between
from multi_gpu import write_tiny

from hotloop import LLM, SamplingParams
from hotloop.hardware import provenance
from hotloop.models.shapes import shape

SHAPES = ("llama-3.1-8b", "llama-2-13b")
SCHEMES = ("int4-g128", "none", "int8", "fp8")
GPUS = (1, 2)
SEQUENCES = (1, 2, 4, 8, 16, 32, 64)
PROMPTS = (512, 2048, 8192, 32_768)
KINDS = ("sequences", "prompts")
AT_ONCE = "at once"
"""The kind of the table of TTFT of concurrent sequences; its samples are those of ``sequences``."""

ANSWER = 8
"""Positions of a cache beyond the longest prompt."""

LIMIT_S = 200.0
"""The time limit of a measurement: an engine of one kind, shape and scheme."""

VLLM: dict[tuple[str, str, str, int], dict[int, float]] = {
    ("sequences", "llama-3.1-8b", "int4-g128", 1): {
        1: 307, 8: 2422, 16: 4560, 32: 7891, 64: 10714,
    },
    ("sequences", "llama-3.1-8b", "none", 1): {1: 210, 8: 1632, 32: 6168, 64: 11248},
    ("sequences", "llama-2-13b", "int4-g128", 1): {1: 223, 8: 1613, 16: 2849, 32: 4387},
    ("sequences", "llama-2-13b", "int4-g128", 2): {1: 276},
    ("prompts", "llama-3.1-8b", "int4-g128", 1): {512: 27.0, 2048: 89, 8192: 354},
    ("prompts", "llama-3.1-8b", "none", 1): {512: 26.3, 2048: 51, 8192: 221},
    ("prompts", "llama-2-13b", "int4-g128", 1): {2048: 156},
}  # fmt: skip
"""Figures of vLLM 0.26.0 on H200s of one host, 2026-11-29, with CUDA graphs and FlashAttention 3,
int4 as AWQ by Marlin: total decode tok/s by sequences, and TTFT in ms by tokens of the prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One measurement.

    Attributes:
        kind: ``sequences`` or ``prompts``.
        shape: The shape of the model, or a folder with one.
        scheme: The scheme of its weights.
        gpus: Ranks.
        sizes: Numbers of sequences, or of prompt tokens.
        device: As in ``EngineConfig``.
        execution: As in ``EngineConfig``.
        new_tokens: New tokens of each sequence.
        repeats: Measurements of each size, after one that warms up.
    """

    kind: str
    shape: str
    scheme: str
    gpus: int
    sizes: tuple[int, ...]
    device: str = "cuda"
    execution: str = "fused"
    new_tokens: int = 200
    repeats: int = 5

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.kind}-{Path(self.shape).name}-{self.scheme}-tp{self.gpus}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path, help="a page with marks for the tables of this --out")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--gpus", nargs="+", type=int, help="instead of 1, and 2 where there are 2")
    parser.add_argument("--sequences", nargs="+", type=int, default=list(SEQUENCES))
    parser.add_argument("--prompts", nargs="+", type=int, default=list(PROMPTS))
    parser.add_argument("--rehearse", action="store_true", help="a tiny model on a CPU")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.job:
        measure(Job(**json.loads(args.job)), args.out)
        return
    begin, end = (f"<!-- tables of {args.out.name}: {which} -->" for which in ("begin", "end"))
    require_marks(parser, args.docs, begin, end)
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for job in rehearsal(args.out) if args.rehearse else jobs(args):
        fields = json.dumps(dataclasses.asdict(job))
        command = [sys.executable, __file__, "--out", str(args.out), "--job", fields]
        if not run(command, LIMIT_S):
            failed.append(job.name)
    tables = make_tables(args.out)
    print(tables)
    if args.docs:
        write_between(args.docs, begin, end, tables)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def jobs(args: argparse.Namespace) -> list[Job]:
    """Returns the measurements to run, those of one GPU first."""
    gpus = args.gpus or [n for n in GPUS if n <= torch.cuda.device_count()]
    return [
        Job(kind=kind, shape=name, scheme=scheme, gpus=n, sizes=sizes(kind, name, args))
        for n, kind, name, scheme in itertools.product(gpus, args.kinds, args.shapes, args.schemes)
    ]


def sizes(kind: str, name: str, args: argparse.Namespace) -> tuple[int, ...]:
    """Returns numbers of sequences, or of prompt tokens that fit the shape's context."""
    if kind == "sequences":
        return tuple(args.sequences)
    longest = shape(name)["max_position_embeddings"] - ANSWER
    return tuple(n for n in args.prompts if n <= longest)


def rehearsal(out: Path) -> list[Job]:
    """Returns the measurements of a rehearsal, one of each kind."""
    model = out / "rehearsal-model"
    write_tiny(model)
    common: dict[str, Any] = {"shape": str(model), "scheme": "int4-g64", "gpus": 1}
    common |= {"device": "cpu", "execution": "eager", "new_tokens": 4, "repeats": 2}
    return [
        Job(kind="sequences", sizes=(1, 3), **common), Job(kind="prompts", sizes=(5, 40), **common),
    ]  # fmt: skip


def measure(job: Job, out: Path) -> None:
    """Runs a measurement, and writes a file of its samples after every size."""
    of_sequences = job.kind == "sequences"
    llm = LLM(
        job.shape,
        weights="random",
        quant=job.scheme,
        execution=job.execution,
        device=job.device,
        tensor_parallel=job.gpus,
        max_batch_size=max(job.sizes) if of_sequences else 1,
        max_seq_len=5 + job.new_tokens if of_sequences else max(job.sizes) + ANSWER,
    )
    found: dict[str, Any] = {"job": dataclasses.asdict(job), "samples": {}, "ttft_ms": {}}
    found["provenance"] = provenance(torch.device(job.device))
    for size in job.sizes:
        samples, ttft_ms = zip(
            *(sample(llm, job, size) for _ in range(1 + job.repeats)), strict=True
        )
        found["samples"][str(size)], found["ttft_ms"][str(size)] = samples[1:], ttft_ms[1:]
        (out / f"{job.name}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(job.name, size, f"{median(samples[1:]):.6g}", flush=True)
    llm.close()


def sample(llm: LLM, job: Job, size: int) -> tuple[float, float]:
    """Measures ``size`` concurrent sequences, or one prompt of ``size`` tokens.

    Returns:
        For sequences, total decode tok/s and mean TTFT in ms. For a prompt, its TTFT in ms, twice.
    """
    params = SamplingParams(max_new_tokens=job.new_tokens, ignore_eos=True)
    if job.kind == "sequences":
        prompts = [[1, 2, 3, 4, 5 + i] for i in range(size)]
        timings = [one.timing for one in llm.generate(prompts, params)]
        tok_s = sum(timing.decode_tok_s for timing in timings)
        return tok_s, 1e3 * sum(timing.ttft_s for timing in timings) / size
    ids = [2 + i % 500 for i in range(size)]
    (answer,) = llm.generate([ids], dataclasses.replace(params, max_new_tokens=4))
    ttft_ms = 1e3 * answer.timing.ttft_s
    return ttft_ms, ttft_ms


# The tables.


def make_tables(out: Path) -> str:
    """Makes a table of each kind: medians, with vLLM's figures beside them on an H200.

    The last table has the TTFT of concurrent sequences, from files whose samples have it.
    """
    found = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    of_kinds = {kind: [one for one in found if one["job"]["kind"] == kind] for kind in KINDS}
    of_kinds[AT_ONCE] = [
        one | {"samples": one["ttft_ms"]} for one in of_kinds["sequences"] if one.get("ttft_ms")
    ]
    return "\n".join(filter(None, (kind_table(kind, each) for kind, each in of_kinds.items())))


def kind_table(kind: str, found: Sequence[dict[str, Any]]) -> str:
    """Makes the table of one kind: a row per shape, scheme, GPUs and engine."""
    sizes = sorted({int(size) for one in found for size in one["samples"]})
    word, after = {"sequences": ("sequence", ""), AT_ONCE: ("prompt", " at once")}.get(
        kind, ("token", "")
    )
    head = ("shape", "scheme", "GPUs", "engine")
    head += tuple(f"{size:,} {word}{'s' if size > 1 else ''}{after}" for size in sizes)
    rows = []
    for one in sorted(found, key=sort_key):
        job = one["job"]
        medians = {int(size): median(samples) for size, samples in one["samples"].items()}
        of = (Path(job["shape"]).name, job["scheme"], str(job["gpus"]))
        rows.append((*of, "hotloop", *cells(sizes, medians)))
        vllm = VLLM.get((kind, job["shape"], job["scheme"], job["gpus"]), {})
        if vllm and "H200" in str(one["provenance"]):
            rows.append((*of, "vLLM", *cells(sizes, vllm)))
    return table(head, rows, texts=4)


def sort_key(found: dict[str, Any]) -> tuple[int, int, int, str]:
    """Returns the sort key: GPUs, shape and scheme in the order of the lists above, then a name."""
    job = found["job"]
    shape, scheme = (
        names.index(job[field]) if job[field] in names else len(names)
        for names, field in ((SHAPES, "shape"), (SCHEMES, "scheme"))
    )
    return job["gpus"], shape, scheme, job["shape"]


def cells(sizes: Iterable[int], figures: dict[int, float]) -> list[str]:
    return [
        "–" if (value := figures.get(size)) is None else f"{value:,.{0 if value >= 100 else 1}f}"
        for size in sizes
    ]


if __name__ == "__main__":
    main()
