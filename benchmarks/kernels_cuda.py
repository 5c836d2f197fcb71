"""Checks the CUDA kernels on this machine's GPU, and compares their speed with the memory's.

    PYTHONPATH=src:tests:tests/kernels python benchmarks/kernels_cuda.py --out FOLDER

Every section runs in a process of its own with a time limit, so that one that fails or hangs does
not stop the others. Each writes a JSON file under ``--out``.

    check      every kernel against float64, and with against without programmatic dependent launch,
               bit for bit
    tune       the best tuning of each projection within a decode step, one projection after another
    stack      decode steps of a model with random weights in one CUDA graph: whole, and parts
    formats    whole decode steps in the packed formats of other tools' checkpoints
    linear     each projection by itself, over more weights than the GPU's caches hold
    rows       9 to 64 rows: equal bits, whole steps, and each projection by several tunings
    attention  attention over short and long histories
    sample     sampling against PyTorch: equal tokens, and time

Needs torch with CUDA and cuda-bindings; nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from cuda_cases import (
    DRAWS,
    DTYPES,
    KINDS,
    Case,
    argmax_case,
    attention_case,
    embed_case,
    hard_scores,
    linear_case,
    make_weight,
    next_tokens_case,
    ngram_draft_case,
    normal,
    sample_case,
)
from torch import Tensor

from hotloop import hardware
from hotloop.engine.core import Features
from hotloop.engine.sampling import Sampler
from hotloop.kernels.cuda import step
from hotloop.kernels.cuda.attention import AttentionPlan, AttentionTuning
from hotloop.kernels.cuda.compile import Kernel, compile_kernel
from hotloop.kernels.cuda.launch import Call, Device, Launch
from hotloop.kernels.cuda.linear import (
    Epilogue,
    GemmPlan,
    LinearPlan,
    NormEpilogue,
    Prefetch,
    PrescaledInput,
    Tuning,
)
from hotloop.kernels.cuda.packing import Format, high_plane
from hotloop.kernels.cuda.tuning import (
    Projection,
    attention_tuning,
    linear_tuning,
    plan_prefetch,
    plan_rows,
    reads_plain_rows,
    wide_cycles,
)
from hotloop.kernels.cuda.wide import WidePlan, WideTuning
from hotloop.models.shapes import shape
from hotloop.types import SamplingParams

SECTIONS = {
    "check": 80, "tune": 180, "stack": 55, "formats": 90, "linear": 30, "rows": 120,
    "attention": 20, "sample": 30,
}  # fmt: skip
"""Time limit of each section, in seconds."""

CUDA = torch.device("cuda")
BEYOND_CACHES = 300_000_000
"""Bytes that do not fit the GPU's caches."""

FORMATS: dict[str, dict[str, Any]] = {
    "awq-g128": {"kind": "int4", "group_size": 128, "scale": "f16", "zero": "integer"},
    "int8-g128": {"kind": "int8", "group_size": 128},
    **KINDS,
}
"""Packed formats by name: the arguments of ``Format`` besides shapes."""

FORMATS_LIKE = {
    "int4-g128": (
        "awq-g128",
        "gptq",
        "gptq-act-order",
        "Q4_K",
        "Q4_1",
        "IQ4_XS",
        "nf4",
        "mxfp4",
        "nvfp4",
    ),
    "fp8": ("fp8-blocks",),
    "int8": ("int8-g128", "Q8_0", "Q6_K", "Q5_K"),
}
"""Formats of other tools, by the scheme of hotloop with as many bits (or the next larger one)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--scale", type=float, default=1.0, help="of the sections' time limits")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.section:
        Section(args.section, args.out, SECTIONS[args.section] * args.scale).run()
        return
    failed = []
    for name in args.sections:
        limit = SECTIONS[name] * args.scale
        command = [sys.executable, __file__, "--out", str(args.out), "--section", name]
        command += ["--scale", str(args.scale)]
        started = time.perf_counter()
        try:
            ended_well = subprocess.run(command, timeout=limit + 20, check=False).returncode == 0
        except subprocess.TimeoutExpired:
            ended_well = False
        if not ended_well:
            failed.append(name)
        seconds = time.perf_counter() - started
        print(f"== {name}: {'ok' if ended_well else 'FAILED'}, {seconds:.0f} s", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


class Section:
    """A running section: its time limit, its results, and the device."""

    def __init__(self, name: str, out: Path, limit_s: float) -> None:
        self.name, self.out = name, out
        self.ends = time.perf_counter() + limit_s
        self.device = Device(torch.device("cuda", torch.cuda.current_device()))
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.facts: dict[str, Any] = {"device": torch.cuda.get_device_name()}

    @property
    def time_is_up(self) -> bool:
        return time.perf_counter() > self.ends

    def run(self) -> None:
        print(f"== {self.name}", flush=True)
        try:
            globals()[f"{self.name}_section"](self)
        except Exception:
            self.failures.append(traceback.format_exc())
        if self.time_is_up:
            self.facts["cut_short"] = True
        self.facts["compile_seconds"] = self.device.compile_seconds
        self.facts["notes"] = sorted(self.device.notes)
        self.write()
        for failure in self.failures[:8]:
            print(failure, flush=True)
        sys.exit(1 if self.failures else 0)

    def write(self) -> None:
        content = {**self.facts, "rows": self.rows, "failures": self.failures}
        (self.out / f"{self.name}.json").write_text(json.dumps(content, indent=1) + "\n")

    def add(self, line: str, **row: Any) -> None:
        self.rows.append(row)
        print(line, flush=True)
        self.write()

    def bandwidth(self) -> float:
        """Measures the bytes per second of a plain read, once per section."""
        if "read_bytes_per_s" not in self.facts:
            self.facts["read_bytes_per_s"] = hardware.measure_read_bandwidth(CUDA)
            print(f"plain read: {self.facts['read_bytes_per_s'] / 1e9:.0f} GB/s", flush=True)
        return self.facts["read_bytes_per_s"]

    def compile(self, kernels: Iterable[Kernel]) -> None:
        """Compiles kernels in parallel, because loading them later compiles them one by one."""
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(lambda k: compile_kernel(k, self.device.architecture), set(kernels)))

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device.device).manual_seed(seed)


# Correctness.


def check_section(section: Section) -> None:
    n_ok = 0
    for title, cases in check_groups(section):
        if section.time_is_up:
            break
        started = time.perf_counter()
        try:
            made = list(cases)
            section.compile(case.call.kernel for case in made)
        except Exception:
            section.failures.append(f"{title}: {traceback.format_exc()}")
            continue
        n_failures = len(section.failures)
        for case in made:
            try:
                check(section, case)
                n_ok += 1
            except Exception as error:
                what = f"{title}: {case.call.kernel.name}: {type(error).__name__}: {error}"
                section.failures.append(what[:600])
                if "CUDA" in what:  # the context is lost
                    raise
        bad = len(section.failures) - n_failures
        seconds = time.perf_counter() - started
        section.add(
            f"{title:28} {len(made) - bad:3} of {len(made):3} right, {seconds:.1f} s",
            title=title,
            cases=len(made),
            failures=bad,
        )
        del made
    print(f"{n_ok} cases right, {len(section.failures)} wrong", flush=True)


def check(section: Section, case: Case) -> None:
    """Checks a case, and that its bits are the same when it overlaps its predecessor."""
    calls = [call for call in (case.staging, case.call) if call is not None]
    for call in calls:
        section.device.prepare(call, dependent=False)()
    torch.cuda.synchronize()
    case.check()
    first = [output.clone() for output in case.outputs]
    dependent = [section.device.prepare(call) for call in calls]
    for _ in range(3):
        for launch in dependent:
            launch()
    torch.cuda.synchronize()
    assert same_bits(first, case.outputs), "other bits with dependent launch"


def same_bits(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(some, others, strict=True)
    )


def check_groups(section: Section) -> Iterator[tuple[str, Iterator[Case]]]:
    """Yields groups of cases lazily, because weights are large."""
    tuned = {
        "staged": Tuning(),
        "together": Tuning(warps=7, tiles=2, units_per_stage=1, ring_bytes=60_000),
        "direct": Tuning(warps=16, staged_bytes=0),
    }
    limits = section.device.limits

    def products(name: str, seed: int) -> Iterator[Case]:
        generator = section.generator(seed)
        weight = make_weight(name, 333, 1152, generator)
        whole = KINDS[name].get("group_size") == 128 or KINDS[name].get("scale") == "two"
        k = 640 if whole else 576
        paired = make_weight(name, 2 * 172, k, generator, paired=True)
        for rows in (1, 2, 3, 5, 8, 9, 16, 17, 64):
            for tuning in tuned.values() if rows in (1, 5, 16) else [tuned["staged"]]:
                yield linear_case(
                    weight, rows, generator, residual=rows != 3, bias=rows == 5,
                    norm_epilogue=rows != 2, tuning=tuning, limits=limits,
                )  # fmt: skip
        for rows in (1, 8, 9):
            for tuning in (tuned["staged"], tuned["direct"]):
                yield linear_case(
                    paired, rows, generator, epilogue="swiglu", norm=True, bias=rows == 8,
                    tuning=tuning, limits=limits,
                )  # fmt: skip
        yield linear_case(weight, 2, generator, norm=True, tuning=tuned["staged"], limits=limits)

    def large(name: str, n: int, k: int, seed: int, **settings: Any) -> Iterator[Case]:
        generator = section.generator(seed)
        weight = make_weight(name, n, k, generator, paired=settings.get("epilogue") == "swiglu")
        for rows in (1, 8):
            yield linear_case(
                weight, rows, generator,
                tuning=linear_tuning(weight.form, limits, "o"), limits=limits, **settings,
            )  # fmt: skip

    def heads() -> Iterator[Case]:
        generator = section.generator(9)
        for name, n, k in (
            ("bf16", 151936, 576),
            ("int8", 49152, 576),
            ("int4-g64-asym", 32000, 4096),
            ("fp8", 128256, 1024),
        ):
            weight = make_weight(name, n, k, generator)
            for rows in (1, 3):
                yield linear_case(
                    weight, rows, generator, epilogue="logits", norm=True, tuning=Tuning(),
                    limits=limits,
                )  # fmt: skip

    def attentions() -> Iterator[Case]:
        generator = section.generator(10)
        shapes = ((9, 3, 64), (8, 8, 96), (40, 40, 128), (32, 8, 128), (64, 8, 128), (8, 2, 256))
        for n_heads, n_kv_heads, head_dim in shapes:
            for tokens, chunks, min_chunk, warps, stages, window in (
                (1, 16, 2048, 4, 1, None), (1, 3, 128, 8, 1, None), (4, 16, 256, 8, 2, None),
                (16, 2, 64, 4, 1, None), (3, 16, 64, 4, 2, 100),
            ):  # fmt: skip
                plan = AttentionPlan(
                    batch=2, tokens=tokens, n_heads=n_heads, n_kv_heads=n_kv_heads,
                    head_dim=head_dim, n_positions=1100, window=window,
                    tuning=AttentionTuning(
                        chunks=chunks, min_chunk=min_chunk, warps=warps,
                        stages=stages if head_dim < 256 else 1,
                    ),
                )  # fmt: skip
                for at in ([0, 517], [122, 1020], [15, 1099 - tokens + 1]):
                    yield attention_case(plan, at, generator, norms=n_heads == 9)

    def small() -> Iterator[Case]:
        generator = section.generator(11)
        for rows in (1, 5):
            for int8 in (False, True):
                yield embed_case(rows, 32000, 5120, generator, int8=int8)
            yield argmax_case(rows, 264, generator)
            for k in (0, 7, 15):
                yield next_tokens_case(rows, k, generator)
        for n_words in (2, 12, 200):
            yield ngram_draft_case(5000, 7, n_words, generator)

    def draws() -> Iterator[Case]:
        for vocab in (300, 32_000, 128_257):
            scores = hard_scores(vocab, 8, section.generator(vocab))
            for options in DRAWS.values():
                for max_candidates in (8192, 64):
                    yield sample_case(
                        scores, [options] * len(scores), max_candidates=max_candidates
                    )

    yield "embedding, sampling and n-gram drafts", small()
    yield "draws", draws()
    for i, name in enumerate(KINDS):
        yield f"products {name}", products(name, i)
    yield "attention", attentions()
    yield "PDL over a whole step", pdl_over_a_step(section)
    for name in ("int4-g128", "int8", "bf16", "fp8", "int4-g32-asym"):
        yield f"13B down {name}", large(name, 5120, 13824, 7, residual=True, norm_epilogue=True)
        gate_up = {"epilogue": "swiglu", "norm": True}
        yield f"13B gate and up {name}", large(name, 27648, 5120, 8, **gate_up)
    yield "heads", heads()
    yield "70B down int4-g64", large("int4-g64", 8192, 28672, 12, residual=True)


def pdl_over_a_step(section: Section) -> Iterator[Case]:
    """Compares two small decoders with the same weights, one of them launched with overlap.

    A kernel that did not wait for all of its inputs would give different ids or sums in some step.
    """
    for rows in (1, 4):
        steps = [
            DecodeStep(section, "llama-3.1-8b", "int4-g128", rows, n_layers=6, dependent=dependent)
            for dependent in (False, True)
        ]
        steps[1].share_weights(steps[0])
        for decode in steps:
            decode.prepare()
        wanted, found = [], []
        for number in range(20):
            for decode, results in zip(steps, (wanted, found), strict=True):
                decode.ids.fill_(17 + number)
                decode()
                results.append((decode.ids.clone(), decode.x.clone(), decode.logits.clone()))
        torch.cuda.synchronize()

        def verify(wanted=wanted, found=found) -> None:
            for one, other in zip(wanted, found, strict=True):
                assert not one[1].isnan().any(), "NaNs"
                assert same_bits(one, other), "other bits with overlap"

        verify()
        yield dataclasses.replace(
            embed_case(1, 10, 64, section.generator(1), int8=False), check=verify
        )


# Whole steps.


def model(name: str) -> dict[str, int]:
    """Returns the sizes of a shape."""
    config = shape(name)
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return {
        "width": config["hidden_size"],
        "feed_forward": config["intermediate_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "head_dim": head_dim,
        "vocab": config["vocab_size"],
    }


def products_of(name: str) -> dict[Projection, tuple[int, int, Epilogue, bool]]:
    """Returns N, K and the epilogue of each projection, and whether a norm comes before it."""
    m = model(name)
    q, kv = m["n_heads"] * m["head_dim"], m["n_kv_heads"] * m["head_dim"]
    return {
        "qkv": (q + 2 * kv, m["width"], "plain", True),
        "o": (m["width"], q, "plain", False),
        "gate_up": (2 * m["feed_forward"], m["width"], "swiglu", True),
        "down": (m["width"], m["feed_forward"], "plain", False),
        "head": (m["vocab"], m["width"], "logits", True),
    }


def make_format(kind: str, n: int, k: int, epilogue: Epilogue) -> Format:
    """Returns the format in which an engine holds a weight."""
    form = Format(**FORMATS[kind], n=n, k=k, paired=epilogue == "swiglu")
    return form.with_plain_rows() if reads_plain_rows(CUDA) else form


def random_packed(form: Format) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Makes a random weight that roughly preserves the size of activations.

    Returns:
        The packed bytes, the scales of output features, and the permutation of input features; None
        for those that the format lacks.
    """
    std = form.k**-0.5
    if form.kind == "bf16":
        values = torch.empty(form.nbytes // 2, dtype=torch.bfloat16, device=CUDA).normal_(0, std)
        packed = values if form.plain_rows else values.view(torch.uint8).view(form.tiles, -1)
        return packed, None, None
    words = torch.empty(form.nbytes // 8, dtype=torch.int64, device=CUDA).random_()
    packed = words.view(torch.uint8).view(form.tiles, -1)
    if form.kind == "fp8":
        packed &= 0b10111111  # below 2, and no NaNs
    size = {"fp8": 0.5, "int8": 74.0}.get(form.kind, 4.6)
    if form.table is not None:
        size = statistics.pstdev(form.table)
    scale = std / size
    if form.group_size is None:
        return packed, torch.full((form.n,), scale, device=CUDA), None
    scale_N = torch.ones(form.n, device=CUDA) if form.row_scale else None
    features_K = torch.randperm(form.k, device=CUDA).int() if form.permuted else None
    if form.kind == "nested":
        groups = high_plane(form, packed)[..., form.high.fragment_bytes :]
    else:
        groups = packed.view(-1, form.unit_bytes)[:, form.fragment_bytes :]
    if form.scale == "two":  # random integers of scales and offsets, of a mean size of 64
        factors = 32 if form.zero == "none" else 64
        groups[:, :factors].view(torch.float16).fill_(scale / 64)
        return packed, scale_N, features_K
    groups = groups.view(DTYPES[form.scale])
    groups.fill_(scale)
    if form.zero != "none":
        middle = 128.0 if form.kind == "int8" else 8.0  # of what is stored
        offset = -scale * middle if form.kind == "uint4" else 0.0
        zero = middle if form.zero == "integer" else offset
        groups.view(len(groups), -1, 2, 16)[:, :, 1] = zero
    return packed, scale_N, features_K


class DecodeStep:
    """A decode step of a model with random weights: embed, layers, head, argmax; one CUDA graph."""

    def __init__(
        self,
        section: Section,
        name: str,
        kind: str,
        rows: int,
        *,
        n_layers: int | None = None,
        context: int = 200,
        attention: AttentionTuning | None = None,
        dependent: bool = True,
        sequences: int = 1,
    ) -> None:
        self.section, self.rows, self.dependent = section, rows, dependent
        self.parts = PARTS["step"]
        m = model(name)
        self.n_layers = n_layers or m["n_layers"]
        self.products = products_of(name)
        limits = section.device.limits
        self.plans = {
            role: plan_rows(
                (form := make_format(kind, n, k, epilogue)),
                rows,
                epilogue,
                norm=norm,
                tuning=linear_tuning(form, limits, role),
                limits=limits,
            )[0][1]
            for role, (n, k, epilogue, norm) in self.products.items()
        }
        self.attention = AttentionPlan(
            batch=sequences, tokens=rows // sequences, n_heads=m["n_heads"],
            n_kv_heads=m["n_kv_heads"], head_dim=m["head_dim"], n_positions=512,
            tuning=attention or attention_tuning(
                head_dim=m["head_dim"], n_kv_heads=m["n_kv_heads"], n_positions=512,
                batch=sequences, limits=limits,
            ),
        )  # fmt: skip
        width, vocab = m["width"], m["vocab"]
        self.table = torch.empty(vocab, width, dtype=torch.bfloat16, device=CUDA).normal_()
        self.weights = [
            {role: random_packed(self.plans[role].form) for role in self.plans if role != "head"}
            for _ in range(self.n_layers)
        ]
        self.head = random_packed(self.plans["head"].form)
        cache = (sequences, m["n_kv_heads"], 512, m["head_dim"])
        self.caches = [
            [torch.randn(cache, device=CUDA).bfloat16() for _ in range(2)]
            for _ in range(self.n_layers)
        ]
        self.ids = torch.full((rows,), 5, device=CUDA)
        self.positions = torch.full((sequences,), context, device=CUDA)
        self.launches: list[Launch] = []
        self.graph: torch.cuda.CUDAGraph | None = None
        self.x = self.row_buffer(width)
        self.logits = torch.empty(rows, vocab, device=CUDA)

    def row_buffer(self, width: int) -> Tensor:
        return torch.empty(self.rows, width, dtype=torch.bfloat16, device=CUDA)

    def share_weights(self, other: DecodeStep) -> None:
        self.table, self.weights, self.head = other.table, other.weights, other.head
        self.caches = [[t.clone() for t in pair] for pair in other.caches]

    @property
    def nbytes(self) -> int:
        """The bytes of weights that a step reads, with their scales."""
        layer = sum(self.plan_bytes(role) for role in self.plans if role != "head")
        return self.n_layers * layer + (self.plan_bytes("head") if "ends" in self.parts else 0)

    def plan_bytes(self, role: str) -> int:
        form = self.plans[role].form
        return form.nbytes + (4 * form.n if form.has_channel_scales else 0)

    def prepare(self) -> None:
        """Launches all kernels once, and captures them."""
        device, dependent = self.section.device, self.dependent
        plans, attention = self.plans, self.attention
        kernels = [kernel for plan in plans.values() for kernel in plan.kernels]
        self.section.compile([*kernels, attention.kernel])
        width, rows = self.x.shape[1], self.rows
        ones = torch.ones(width, dtype=torch.bfloat16, device=CUDA)
        prescaled = PrescaledInput.empty(rows, width, 1e-5, CUDA)
        norm_epilogue = NormEpilogue(weight=ones, prescaled=prescaled)
        qkv = self.row_buffer(plans["qkv"].width)
        attended, hidden = self.row_buffer(plans["o"].form.k), self.row_buffer(plans["down"].form.k)
        attended.normal_()
        best = (
            torch.empty(rows, plans["head"].candidates, device=CUDA),
            torch.empty(rows, plans["head"].candidates, dtype=torch.int32, device=CUDA),
        )
        work = workspace(attention, *plans.values())
        added = {"residual": self.x, "norm_epilogue": norm_epilogue}
        angles = torch.arange(512 * attention.head_dim, device=CUDA).view(512, -1) / 1000.0
        rope = (angles.cos(), angles.sin())
        x, seats = self.x, torch.arange(attention.batch, device=CUDA)
        calls = [step.embed(self.ids, self.table, None, x, norm_epilogue)]
        afters = [*self.weights[1:], None]
        for weights, after, (keys, values) in zip(self.weights, afters, self.caches, strict=True):

            def prefetch(
                by: Projection, later: str, of: Any = weights
            ) -> dict[str, Prefetch | None]:
                return {"prefetch": of and plan_prefetch(by, plans[later], of[later][0])}

            options = work | prefetch("qkv", "gate_up")
            calls += calls_of(plans["qkv"], prescaled, qkv, *weights["qkv"], **options)
            if "attention" in self.parts:
                calls.append(
                    attention.call(
                        qkv, attended, keys, values, seats, self.positions, *rope, **work
                    )
                )
            for role, x_MK, y, options in (
                ("o", attended, x, added | prefetch("o", "gate_up")),
                ("gate_up", prescaled, hidden, prefetch("gate_up", "down")),
                ("down", hidden, x, added | prefetch("down", "qkv", after)),
            ):
                calls += calls_of(plans[role], x_MK, y, *weights[role], **work, **options)
        if "ends" in self.parts:
            calls += calls_of(plans["head"], prescaled, self.logits, *self.head, best=best, **work)
            calls.append(step.argmax(best, self.ids))
        # Stored, because they own the memory that the graph reads and writes.
        self.launches = [device.prepare(call, dependent=dependent) for call in calls]
        self.graph = capture(self.launches)

    def __call__(self) -> None:
        assert self.graph is not None, "not prepared"
        self.graph.replay()


def calls_of(
    plan: GemmPlan, x: Tensor | PrescaledInput, y: Tensor, *weight: Any, **options: Any
) -> list[Call]:
    """Returns the launches of a matrix product."""
    if not isinstance(plan, WidePlan):
        return [plan.call(x, y, *weight, **options)]
    operand = torch.empty(plan.operand_bytes, dtype=torch.uint8, device=CUDA)
    features_K = weight[2] if len(weight) > 2 else None
    staging = plan.staging(x, operand, features_K)
    return [staging, plan.call(x, y, *weight, operand=operand, **options)]


def workspace(*plans: AttentionPlan | GemmPlan) -> dict[str, Tensor]:
    """Allocates workspace that is large enough for any of the plans."""
    counters = max(plan.n_counters for plan in plans)
    return {
        "partial": torch.empty(max(plan.n_partial for plan in plans), device=CUDA),
        "counters": torch.zeros(counters, dtype=torch.int32, device=CUDA),
    }


PARTS = {
    "products": ("products",),
    "attention": ("products", "attention"),
    "step": ("products", "attention", "ends"),
}
"""The parts of a step that are timed: projections; also attention; also embedding and head."""


def stack_section(section: Section) -> None:
    bandwidth = section.bandwidth()
    runs: list[tuple[str, str, int, list[str]]] = [
        ("llama-2-13b", "int4-g128", 1, [*PARTS, "no overlap"]),
        ("llama-2-13b", "int4-g128", 8, ["step"]),
        ("llama-3.1-8b", "int4-g128", 1, [*PARTS]),
        ("llama-3.1-8b", "int4-g128", 8, ["step"]),
        ("llama-2-13b", "int8", 1, [*PARTS]),
        ("llama-2-13b", "int8", 8, ["step"]),
        ("llama-2-70b", "int4-g128", 1, [*PARTS]),
        ("llama-3.1-8b", "int8", 1, [*PARTS]),
        ("llama-3.1-8b", "int8", 8, ["step"]),
        ("llama-2-13b", "fp8", 1, [*PARTS]),
        ("llama-2-13b", "bf16", 1, [*PARTS]),
        ("llama-3.1-8b", "fp8", 1, [*PARTS]),
        ("llama-3.1-8b", "bf16", 1, [*PARTS]),
        ("llama-2-70b", "int8", 1, [*PARTS]),
        ("llama-2-70b", "fp8", 1, [*PARTS]),
        ("llama-2-13b", "int4-g128", 4, ["step"]),
        ("llama-2-13b", "int4-g128", 16, ["step"]),
        ("llama-2-13b", "int4-g32-asym", 1, ["step"]),
    ]
    for name, kind, rows, wanted in runs:
        if section.time_is_up:
            break
        try:
            decode = DecodeStep(section, name, kind, rows)
            for what in wanted:
                decode.dependent = what != "no overlap"
                decode.parts = PARTS.get(what, PARTS["step"])
                decode.prepare()
                seconds, nbytes = graph_seconds(decode.graph), decode.nbytes
                section.add(
                    f"{name:13} {kind:14} M={rows:<2} {seconds * 1e3:7.3f} ms "
                    f"{1 / seconds:6.1f} /s {nbytes / seconds / 1e9:5.0f} GB/s "
                    f"{nbytes / seconds / bandwidth:5.1%}  {what}",
                    model=name,
                    kind=kind,
                    rows=rows,
                    what=what,
                    seconds=seconds,
                    nbytes=nbytes,
                    share=nbytes / seconds / bandwidth,
                )
        except Exception as error:
            section.failures.append(
                f"{name} {kind} M={rows}: {type(error).__name__}: {error}"[:600]
            )
        finally:
            decode = None
            torch.cuda.empty_cache()


def formats_section(section: Section) -> None:
    """Times steps of one row in each of ``FORMATS_LIKE``, beside the scheme with as many bits."""
    bandwidth = section.bandwidth()
    for name in ("llama-2-13b", "llama-3.1-8b"):
        for scheme, others in FORMATS_LIKE.items():
            for kind in (scheme, *others, scheme):
                if section.time_is_up:
                    return
                decode = DecodeStep(section, name, kind, 1)
                decode.prepare()
                seconds, nbytes = graph_seconds(decode.graph), decode.nbytes
                section.add(
                    f"{name:13} {kind:14} {seconds * 1e3:7.3f} ms {nbytes / 1e9:6.2f} GB "
                    f"{nbytes / seconds / bandwidth:6.1%}  like {scheme}",
                    model=name,
                    kind=kind,
                    scheme=scheme,
                    seconds=seconds,
                    nbytes=nbytes,
                    share=nbytes / seconds / bandwidth,
                )
                decode = None
                torch.cuda.empty_cache()


# One kernel at a time.


def capture(launches: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return graph


def graph_seconds(graph: torch.cuda.CUDAGraph, *, min_seconds: float = 0.03) -> float:
    """Returns the seconds of a replay: the median of five measurements."""

    def timed(n: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(n):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / n

    n = max(2, round(min_seconds / timed(2)))
    return statistics.median(timed(n) for _ in range(5))


class Product:
    """A projection over enough weights to exceed the caches, timed with any tuning."""

    def __init__(self, section: Section, name: str, kind: str, role: Projection) -> None:
        self.section, self.key = section, (name, kind, role)
        n, k, self.epilogue, self.norm = products_of(name)[role]
        self.form = make_format(kind, n, k, self.epilogue)
        self.n_weights = max(6, -(-BEYOND_CACHES // self.form.nbytes))
        self.weights = [random_packed(self.form) for _ in range(self.n_weights)]
        self.has_residual = role in ("o", "down")

    def plan(self, tuning: Tuning, rows: int = 1) -> LinearPlan:
        return LinearPlan(
            form=self.form, rows=rows, epilogue=self.epilogue, norm=self.norm, tuning=tuning,
            limits=self.section.device.limits,
        )  # fmt: skip

    def seconds(self, tuning: Tuning, rows: int = 1, *, dependent: bool = True) -> float:
        return self.seconds_of(self.plan(tuning, rows), dependent=dependent)

    def seconds_of(self, plan: GemmPlan, *, dependent: bool = True) -> float:
        device, rows = self.section.device, plan.rows
        x = torch.randn(rows, self.form.k, device=CUDA).bfloat16()
        dtype = torch.float32 if self.epilogue == "logits" else torch.bfloat16
        y = torch.zeros(rows, plan.width, dtype=dtype, device=CUDA)
        settings: dict[str, Any] = workspace(plan)
        x_or_prescaled: Tensor | PrescaledInput = x
        if self.norm:
            x_or_prescaled = PrescaledInput.empty(rows, self.form.k, 1e-5, CUDA)
            x_or_prescaled.squares.fill_(1.0)
        if self.has_residual:
            ones = torch.ones(self.form.n, dtype=torch.bfloat16, device=CUDA)
            prescaled = PrescaledInput.empty(rows, self.form.n, 1e-5, CUDA)
            norm_epilogue = NormEpilogue(weight=ones, prescaled=prescaled)
            settings |= {"residual": y, "norm_epilogue": norm_epilogue}
        launches = [
            device.prepare(call, dependent=dependent)
            for weight in self.weights
            for call in calls_of(plan, x_or_prescaled, y, *weight, **settings)
        ]
        return graph_seconds(capture(launches), min_seconds=0.006) / self.n_weights


WARPS, UNITS = (8, 10, 11, 12, 14, 16, 20), (1, 2, 3, 4)
RINGS = tuple(kilobytes * 1024 for kilobytes in (48, 64, 96, 128, 160))


def tune_section(section: Section) -> None:
    """Tunes each projection within a step, where a faster kernel can slow others down."""
    for name, kind in (
        ("llama-2-13b", "int4-g128"), ("llama-3.1-8b", "int4-g128"), ("llama-2-13b", "int8"),
        ("llama-2-70b", "int4-g128"), ("llama-2-13b", "bf16"), ("llama-3.1-8b", "int8"),
    ):  # fmt: skip
        if section.time_is_up:
            return
        decode = DecodeStep(section, name, kind, 1, n_layers=8)
        best, tried = tune(section, decode)
        decode = None
        torch.cuda.empty_cache()
        for role, tuning in best.items():
            section.add(
                f"{name:13} {kind:10} {role:8} {tuning}",
                model=name,
                kind=kind,
                role=role,
                best=dataclasses.asdict(tuning),
            )
        section.add(f"  {tried[0]['us']:.1f} -> {min(t['us'] for t in tried):.1f} us", tried=tried)


def tune(section: Section, decode: DecodeStep) -> tuple[dict[str, Tuning], list[dict[str, Any]]]:
    """Finds the best tuning of each projection: varies one at a time, and keeps what is faster.

    Returns:
        The tunings, and the time of each that was tried.
    """
    tried: list[dict[str, Any]] = []

    def timed(plans: dict[str, LinearPlan]) -> float:
        decode.plans = plans
        decode.prepare()
        return graph_seconds(decode.graph, min_seconds=0.006)

    def options(plan: LinearPlan) -> list[LinearPlan]:
        made: dict[Any, LinearPlan] = {}
        for warps, units, ring_bytes in itertools.product(WARPS, UNITS, RINGS):
            tuning = Tuning(warps=warps, units_per_stage=units, ring_bytes=ring_bytes)
            other = dataclasses.replace(plan, tuning=tuning)
            if units <= -(-plan.form.units // warps) and other.layout is not None:
                made.setdefault((warps, other.layout), other)
        return list(made.values())

    best = dict(decode.plans)
    section.compile(o.kernel for plan in best.values() for o in options(plan))
    fastest = timed(best)
    tried.append({"us": fastest * 1e6, "of": "start"})
    for role in ("gate_up", "qkv", "down", "o", "gate_up", "qkv", "down", "o", "head"):
        for option in options(best[role]):
            if section.time_is_up:
                break
            seconds = timed({**best, role: option})
            tuning = dataclasses.asdict(option.tuning)
            tried.append({"us": seconds * 1e6, "of": role, "tuning": tuning})
            if seconds < 0.998 * fastest:  # less is noise
                best, fastest = {**best, role: option}, seconds
    return {role: plan.tuning for role, plan in best.items()}, tried


def linear_section(section: Section) -> None:
    bandwidth = section.bandwidth()
    for name, kind in (
        ("llama-2-13b", "int4-g128"), ("llama-3.1-8b", "int4-g128"), ("llama-2-13b", "int8"),
        ("llama-2-70b", "int4-g128"), ("llama-2-13b", "fp8"), ("llama-2-13b", "bf16"),
        ("llama-3.1-8b", "int8"), ("llama-2-13b", "int4-g64"), ("llama-2-13b", "int4-g32-asym"),
        ("llama-2-70b", "int8"), ("llama-3.1-8b", "bf16"),
    ):  # fmt: skip
        for role in products_of(name):
            if section.time_is_up:
                return
            product = Product(section, name, kind, role)
            tuning = linear_tuning(product.form, section.device.limits, role)
            us = {rows: product.seconds(tuning, rows) * 1e6 for rows in (1, 8, 16)}
            alone = product.seconds(tuning, dependent=False) * 1e6
            nbytes = product.form.nbytes
            section.add(
                f"{name:13} {kind:14} {role:8} M=1 {us[1]:7.2f} us "
                f"{nbytes / us[1] / 1e3:5.0f} GB/s {nbytes / us[1] * 1e6 / bandwidth:5.1%}  "
                f"M=8 {us[8]:7.2f}  M=16 {us[16]:7.2f}  without PDL {alone:7.2f}",
                model=name,
                kind=kind,
                role=role,
                us=us,
                us_without_pdl=alone,
                nbytes=nbytes,
                share=nbytes / us[1] * 1e6 / bandwidth,
            )
            del product
            torch.cuda.empty_cache()


# Many rows.


def rows_section(section: Section) -> None:
    check_rows(section)
    bandwidth = section.bandwidth()
    steps = [
        ("llama-3.1-8b", "int4-g128", 64), ("llama-3.1-8b", "int4-g128", 16),
        ("llama-3.1-8b", "int4-g128", 32), ("llama-3.1-8b", "bf16", 32),
        ("llama-3.1-8b", "bf16", 64), ("llama-2-13b", "int4-g128", 16),
    ]  # fmt: skip
    for name, kind, rows in steps:
        if not section.time_is_up:
            time_projections_of_rows(section, name, kind, rows, bandwidth)
    for name, kind, rows in steps:
        if not section.time_is_up:
            time_step_of_rows(section, name, kind, rows, bandwidth)


def check_rows(section: Section) -> None:
    """Checks against float64, and that one row among many has the bits of a row alone."""
    ones, many, others = [], [], []
    for name in KINDS:
        cases = rows_cases(section, name)
        ones.append(cases[0])
        many.append(cases[1])
        others += cases[2]
    every = [*ones, *itertools.chain(*many), *others]
    calls = [call for case in every for call in (case.staging, case.call) if call]
    section.compile(call.kernel for call in calls)
    print("compiled", flush=True)
    for case in every:
        try:
            check(section, case)
        except Exception as error:
            what = f"{case.call.kernel.name}: {type(error).__name__}: {error}"
            section.failures.append(what[:600])
            print(what[:300], flush=True)
            if "CUDA" in what:  # the context is lost
                raise
    for one, cases in zip(ones, many, strict=True):
        for case in cases:
            if not same_bits(one.outputs, [output[:1] for output in case.outputs]):
                section.failures.append(f"{case.call.kernel.name}: other bits than a row alone")
                print(section.failures[-1], flush=True)
    section.add(f"{len(every)} checked, {len(section.failures)} wrong", checked=len(every))


def rows_cases(section: Section, name: str) -> tuple[Case, list[Case], list[Case]]:
    """Makes the cases of a format: one row by ``linear.cu``, it among many, and other epilogues."""
    generator = section.generator(len(name))
    weight = make_weight(name, 333, 1152, generator)
    paired = make_weight(name, 344, 1152, generator, paired=True)
    x = normal(section.generator(2), 64, 1152).bfloat16()
    added = normal(section.generator(3), 64, 333).bfloat16()
    settings: dict[str, Any] = {"tuning": Tuning(warps=7), "limits": section.device.limits}

    def plain(rows: int, wide: WideTuning | None) -> Case:
        return linear_case(
            weight, rows, section.generator(1), residual_MN=added[:rows], norm_epilogue=True,
            wide=wide, x_MK=x[:rows], **settings,
        )  # fmt: skip

    many = [
        plain(rows, WideTuning(tiles=tiles, splits=splits))
        for rows, tiles, splits in (
            (9, 2, 1), (16, 1, 3), (24, 2, 7), (32, 1, 1), (40, 1, 4), (64, 2, 1),
        )
    ]  # fmt: skip
    others = [
        linear_case(
            of, rows, generator, epilogue=epilogue, norm=True, bias=True,
            wide=WideTuning(tiles=tiles, splits=splits), **settings,
        )
        for of, epilogue, rows, tiles, splits in (
            (paired, "swiglu", 16, 2, 1), (paired, "swiglu", 64, 1, 2),
            (weight, "logits", 30, 2, 1),
        )
    ]  # fmt: skip
    return plain(1, None), many, others


def time_step_of_rows(section: Section, name: str, kind: str, rows: int, bandwidth: float) -> None:
    decode = DecodeStep(section, name, kind, rows, sequences=rows, context=105)
    found = {}
    for what, parts in PARTS.items():
        decode.parts = parts
        decode.prepare()
        found[what] = graph_seconds(decode.graph)
    ms = "  ".join(f"{what} {seconds * 1e3:.3f}" for what, seconds in found.items())
    section.add(
        f"{name:13} {kind:10} M={rows:<2} {rows / found['step']:7.0f} tok/s, ms: {ms}, "
        f"bytes of weights {decode.nbytes / bandwidth * 1e3:.3f}",
        model=name,
        kind=kind,
        rows=rows,
        seconds=found,
        nbytes=decode.nbytes,
    )
    decode = None
    torch.cuda.empty_cache()


def time_projections_of_rows(
    section: Section, name: str, kind: str, rows: int, bandwidth: float
) -> None:
    """Times each projection by ``linear.cu``, and by ``wide.cu`` with its likely tunings."""
    limits = section.device.limits
    plans: dict[Projection, dict[str, GemmPlan]] = {}
    for role, (n, k, epilogue, norm) in products_of(name).items():
        form = make_format(kind, n, k, epilogue)
        tuning = linear_tuning(form, limits, role)
        common = {"form": form, "rows": rows, "epilogue": epilogue, "norm": norm}
        common |= {"tuning": tuning, "limits": limits}
        choices = [
            WideTuning(tiles=tiles, splits=splits)
            for tiles in (1, 2)
            for splits in range(1, tuning.warps + 1)
        ]
        choices.sort(key=lambda wide: wide_cycles(form, rows, tuning.warps, wide, limits))
        plans[role] = {
            f"t{wide.tiles}s{wide.splits}": WidePlan(**common, wide=wide) for wide in choices[:5]
        }
        best = choices[0]
        for ring in (64, 112):
            plans[role][f"ring{ring}"] = WidePlan(
                **common, wide=dataclasses.replace(best, ring_bytes=ring * 1024)
            )
        if (linear := LinearPlan(**common)).layout is not None:
            plans[role]["linear"] = linear
    section.compile(k for role in plans for plan in plans[role].values() for k in plan.kernels)
    for role, ways in plans.items():
        if section.time_is_up:
            return
        product = Product(section, name, kind, role)
        us = {way: product.seconds_of(plan) * 1e6 for way, plan in ways.items()}
        limit_us = product.form.nbytes / bandwidth * 1e6
        section.add(
            f"{name:13} {kind:10} {role:8} M={rows:<2} bytes {limit_us:6.1f} us  "
            + "  ".join(f"{way} {value:6.1f}" for way, value in us.items()),
            model=name, kind=kind, role=role, rows=rows, us=us, least_us=limit_us,
        )  # fmt: skip
        product = None
        torch.cuda.empty_cache()


def attention_section(section: Section) -> None:
    bandwidth = section.bandwidth()
    for name in ("llama-2-13b", "llama-3.1-8b"):
        m = model(name)
        rule = attention_tuning(
            head_dim=m["head_dim"], n_kv_heads=m["n_kv_heads"], n_positions=32_768, batch=1,
            limits=section.device.limits,
        )  # fmt: skip
        counts = sorted({rule.chunks, 2 * rule.chunks, 32})
        rings = ((8, 2), (8, 1), (4, 4), (4, 2))
        for context, batch, chunks, least, (warps, stages) in itertools.product(
            (200, 1024, 4096, 32_768), (1, 8), counts, (256, 512), rings
        ):
            if batch * context > 40_000:
                continue  # more than the memory holds
            if section.time_is_up:
                return
            if chunks > rule.chunks and context <= least * rule.chunks:
                continue  # the chunks would be the same
            tuning = AttentionTuning(
                chunks=chunks, min_chunk=least, warps=warps, stages=stages, octets=1
            )
            seconds, nbytes = attention_seconds(section, m, batch, context, tuning)
            section.add(
                f"{name:13} {batch} at {context:6}: {chunks:2} chunks of {least} or more, {warps} "
                f"warps, {stages} stages: {seconds * 1e6:7.2f} us "
                f"{nbytes / seconds / 1e9:5.0f} GB/s {nbytes / seconds / bandwidth:5.1%}",
                model=name,
                batch=batch,
                context=context,
                tuning=dataclasses.asdict(tuning),
                us=seconds * 1e6,
                nbytes=nbytes,
            )


def attention_seconds(
    section: Section, m: dict[str, int], batch: int, context: int, tuning: AttentionTuning
) -> tuple[float, int]:
    """Returns the seconds and bytes of a launch, over KV caches too large for the GPU's caches."""
    H, J, E, C = m["n_heads"], m["n_kv_heads"], m["head_dim"], context + 16
    plan = AttentionPlan(
        batch=batch, tokens=1, n_heads=H, n_kv_heads=J, head_dim=E, n_positions=C, tuning=tuning,
    )  # fmt: skip
    nbytes = 4 * batch * J * context * E
    n = max(6, min(40, -(-BEYOND_CACHES // nbytes)))
    qkv = torch.randn(batch, (H + 2 * J) * E, device=CUDA).bfloat16()
    out = torch.empty(batch, H * E, dtype=torch.bfloat16, device=CUDA)
    rope = (torch.ones(C, E, device=CUDA), torch.zeros(C, E, device=CUDA))
    positions = torch.full((batch,), context, device=CUDA)
    seats = torch.arange(batch, device=CUDA)
    work = {
        "partial": torch.empty(plan.n_partial, device=CUDA),
        "counters": torch.zeros(plan.n_counters, dtype=torch.int32, device=CUDA),
    }
    launches = []
    for _ in range(n):
        caches = [torch.zeros(batch, J, C, E, dtype=torch.bfloat16, device=CUDA) for _ in range(2)]
        call = plan.call(qkv, out, *caches, seats, positions, *rope, **work)
        launches.append(section.device.prepare(call))
    seconds = graph_seconds(capture(launches), min_seconds=0.01) / n
    return seconds, nbytes


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "usual": lambda normal: 2.5 * normal,
    "flat": lambda normal: 0.05 * normal,
    "peaked": lambda normal: (2.5 * normal).index_fill_(-1, torch.tensor([7], device=CUDA), 25.0),
}
OPTIONS = {
    "temperature": SamplingParams(temperature=0.8),
    "top-k, top-p": SamplingParams(temperature=0.8, top_k=50, top_p=0.95),
    "top-p": SamplingParams(temperature=0.8, top_p=0.95),
}


def sample_section(section: Section) -> None:
    for vocab, rows, kind, (name, params) in itertools.product(
        (32_000, 128_256), (1, 8), SCORES, OPTIONS.items()
    ):
        if section.time_is_up:
            return
        normal = torch.randn(rows, 1, vocab, generator=section.generator(vocab), device=CUDA)
        scores = SCORES[kind](normal)
        positions = torch.arange(64, device=CUDA)[:, None, None].repeat(1, rows, 1)
        chosen, us = [], []
        for launcher in (section.device, None):
            draw = drawing(scores, params, launcher)
            chosen.append(torch.stack([draw(at) for at in positions]))
            calls = [functools.partial(draw, at) for at in positions[:10]]
            us.append(graph_seconds(capture(calls), min_seconds=0.01) / len(calls) * 1e6)
        different = int((chosen[0] != chosen[1]).sum())
        line = f"V={vocab:6} rows={rows} {kind:6} {name:12}"
        if different:
            section.failures.append(f"{line}: {different} of {chosen[0].numel()} differ")
        section.add(
            f"{line} {us[0]:7.1f} us, PyTorch {us[1]:7.1f} us, {different} differ",
            vocab=vocab,
            rows=rows,
            scores=kind,
            options=name,
            us=us[0],
            us_of_torch=us[1],
            different=different,
        )


def drawing(
    scores: Tensor, params: SamplingParams, launcher: Device | None
) -> Callable[[Tensor], Tensor]:
    """Returns a function that samples at given positions: by the kernel, or by PyTorch if None."""
    rows, _, vocab = scores.shape
    sampler, no_ids = Sampler(rows, vocab, CUDA, launcher=launcher), torch.zeros(0, device=CUDA)
    for row in range(rows):
        sampler.admit(row, params, row, no_ids.long())
    best, features = scores.argmax(-1), Features.of([params])
    return lambda at: sampler.sample(scores, at, 0, features, best_BT=best).ids


if __name__ == "__main__":
    main()
