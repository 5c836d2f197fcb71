"""The CUDA kernels compile for every supported architecture; no GPU is needed for that."""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from cached_builds import kept_folder
from cuda_cases import KINDS, OURS, PLAIN_ROWS

from hotloop.kernels.cuda import compile as compiler
from hotloop.kernels.cuda import prompt, step
from hotloop.kernels.cuda.attention import HEAD_DIMS, AttentionPlan, AttentionTuning
from hotloop.kernels.cuda.chain import chain_kernel
from hotloop.kernels.cuda.compile import (
    ARCHITECTURES,
    CompileError,
    Kernel,
    compile_kernel,
    unavailable_reason,
)
from hotloop.kernels.cuda.dequantize import dequantize_kernel
from hotloop.kernels.cuda.launch import Limits
from hotloop.kernels.cuda.linear import LinearPlan, Tuning
from hotloop.kernels.cuda.packing import Format
from hotloop.kernels.cuda.sample import sample_kernel
from hotloop.kernels.cuda.wide import WidePlan, WideTuning, can_be_direct

LIMITS = Limits(n_sms=132, shared_bytes=227 * 1024)
ROWS = "plain rows"
FORMATS = KINDS | {ROWS: PLAIN_ROWS}

# With the bindings installed, as by `make test`, a missing NVRTC is a failure and not a skip.
REASON = unavailable_reason()
needs_nvrtc = pytest.mark.skipif("is not installed" in str(REASON), reason=str(REASON))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOTLOOP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def kept_cache(monkeypatch) -> None:
    """Keeps compiled kernels for the next run, for this version of NVRTC and all sources."""
    sources = (path.read_text() for path in sorted(compiler.SOURCES.glob("*.cu*")))
    folder = kept_folder("compiled-kernels", version("nvidia-cuda-nvrtc"), *sources)
    monkeypatch.setenv("HOTLOOP_CACHE", str(folder))


def linear_kernels(name: str) -> list[Kernel]:
    kernels = []
    parts = [("swiglu", True)]
    if name in (*OURS, ROWS):  # whose own part of the arithmetic is more than reading scales
        parts = [("plain", False), ("swiglu", True), ("plain", True), ("logits", True)]
    for epilogue, norm in parts:
        form = Format(
            **FORMATS[name],
            n=5120,
            k=5120,
            paired=epilogue == "swiglu",
        )
        settings = [(1, 1 << 20), (9, 0)]
        if name in ("int8", "int4-g128"):  # the widest for one type with groups and one without
            settings += [(32, 0), (64, 0)]
        if name in ("int8", "int4-g128", ROWS):
            settings += [(8, 1 << 20)]  # x arrives in parts
        for rows, staged_bytes in settings:
            plan = LinearPlan(
                form=form,
                rows=rows,
                epilogue=epilogue,
                norm=norm,
                tuning=Tuning(staged_bytes=staged_bytes, part_bytes=1 << 20),
                limits=LIMITS,
            )
            kernels.append(plan.kernel)
        if not form.plain_rows:
            kernels.append(dequantize_kernel(form))
    return list(dict.fromkeys(kernels))


def wide_kernels(name: str) -> list[Kernel]:
    kernels = []
    parts = [("plain", 64, 1), ("swiglu", 64, 2), ("logits", 16, 2)]
    for epilogue, rows, tiles in parts if name in (*OURS, ROWS) else parts[1:2]:
        form = Format(
            **FORMATS[name],
            n=5120,
            k=5120,
            paired=epilogue == "swiglu",
        )
        plan = WidePlan(
            form=form,
            rows=rows,
            epilogue=epilogue,
            norm=epilogue != "plain",
            limits=LIMITS,
            wide=WideTuning(
                tiles=tiles,
                splits=2 if epilogue == "plain" else 1,
                direct=epilogue == "swiglu" and can_be_direct(form),
            ),
            has_next=epilogue != "logits",
        )
        kernels += plan.kernels
    return kernels


def attention_kernels() -> list[Kernel]:
    return [
        AttentionPlan(
            batch=1,
            tokens=tokens,
            n_heads=8,
            n_kv_heads=8,
            head_dim=head_dim,
            n_positions=64,
            tuning=AttentionTuning(stages=stages, turns=turns),
            stores_operand=stages == 1,
        ).kernel
        for head_dim in HEAD_DIMS
        for tokens, stages, turns in ((1, 2, 1), (16, 2, 1), (1, 1, 1), (1, 1, 2))
        if stages == 2 or head_dim == 128
    ]


def prompt_kernels() -> list[Kernel]:
    return list(dict.fromkeys(k for head_dim in HEAD_DIMS for k in prompt.kernels(head_dim)))


def step_kernels() -> list[Kernel]:
    embeds = [step.embed_kernel(int8=int8) for int8 in (False, True)]
    ends = [step.next_tokens_kernel(), step.argmax_kernel(), step.accept_kernel()]
    ends += [step.argmax_over_ranks_kernel(), step.ngram_draft_kernel()]
    sums = [step.all_reduce_kernel(ranks) for ranks in (2, 3, 4, 8)]
    return [*embeds, step.add_kernel(), *sums, *ends, sample_kernel(), chain_kernel()]


OTHERS = {"attention": attention_kernels, "prompt": prompt_kernels, "step": step_kernels}

COMPLETE = ("sm_80", "sm_90a")
"""Architectures of all kernels: the source has two branches, below sm_90 and from it on. For the
others two kernels of each group are compiled, and one of a format of other tools."""


@needs_nvrtc
@pytest.mark.usefixtures("kept_cache")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("group", [*FORMATS, *OTHERS])
def test_kernels_compile_for_every_architecture(group, architecture):
    if group == ROWS and architecture in ("sm_80", "sm_89"):
        pytest.skip("it copies no boxes of tensors")
    kernels = OTHERS[group]() if group in OTHERS else linear_kernels(group)
    if group in FORMATS and compiler.has_warpgroups(architecture):
        kernels += wide_kernels(group)
    assert len({kernel.name for kernel in kernels}) == len(set(kernels)), "a name means one kernel"
    if architecture not in COMPLETE:
        kernels = [kernels[0], kernels[-1]] if group in OURS or group in OTHERS else kernels[:1]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for compiled in pool.map(lambda k: compile_kernel(k, architecture), kernels):
            assert compiled.cubin[:4] == b"\x7fELF"
            assert compiled.note is None


@needs_nvrtc
def test_a_compiled_kernel_is_cached(cache):
    first = compile_kernel(step.argmax_kernel(), "sm_90a")
    again = compile_kernel(step.argmax_kernel(), "sm_90a")
    assert (again.cubin, again.seconds) == (first.cubin, 0.0)
    assert first.seconds > 0
    assert len(list(cache.iterdir())) == 1, "and nothing else is"


@needs_nvrtc
@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:0], lambda b: b[:99] + b"x" + b[100:]]
)
def test_a_damaged_cached_kernel_is_compiled_again(cache, damage):
    first = compile_kernel(step.argmax_kernel(), "sm_90a")
    (path,) = cache.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    again = compile_kernel(step.argmax_kernel(), "sm_90a")
    assert again.cubin == first.cubin
    assert again.seconds > 0
    assert compile_kernel(step.argmax_kernel(), "sm_90a").seconds == 0, "whole again"


@pytest.fixture
def unwritable(tmp_path, monkeypatch) -> Path:
    """Makes the cache folder a file; returns the temporary folder that replaces it."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOTLOOP_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"hotloop-{os.getuid()}"


@needs_nvrtc
def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_one(unwritable):
    compiled = compile_kernel(step.argmax_kernel(), "sm_90a")
    assert compiled.cubin[:4] == b"\x7fELF"
    assert compiled.note is None
    assert len(list((unwritable / "kernels").iterdir())) == 1
    assert compile_kernel(step.argmax_kernel(), "sm_90a").seconds == 0


@needs_nvrtc
def test_without_a_writable_cache_kernels_are_compiled_with_a_note(unwritable):
    unwritable.mkdir(mode=0o700)
    (unwritable / "kernels").write_text("")
    compiled = compile_kernel(step.argmax_kernel(), "sm_90a")
    assert compiled.cubin[:4] == b"\x7fELF"
    assert str(compiled.note).startswith("compiled kernels are not kept: ")
    assert str(unwritable / "kernels") in str(compiled.note)


@needs_nvrtc
def test_another_architecture_or_kernel_is_another_file(cache):
    for architecture in ("sm_80", "sm_90a"):
        for kernel in step_kernels():
            compile_kernel(kernel, architecture)
    assert len(list(cache.iterdir())) == 2 * len(step_kernels())


@needs_nvrtc
def test_source_that_does_not_compile_raises_with_the_compilers_log(cache):
    kernel = Kernel(
        name="broken", file="step.cu", function="no_such_function", args="EmbedArgs", threads=32
    )
    with pytest.raises(CompileError, match="no_such_function"):
        compile_kernel(kernel, "sm_90a")
    assert not cache.exists()


def test_missing_bindings_are_explained(monkeypatch):
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda _: None)
    reason = unavailable_reason.__wrapped__()
    assert reason == "cuda-bindings is not installed (pip install 'hotloop[cuda]')"


def test_arguments_are_all_given_and_contiguous():
    x = torch.zeros(2, 8)
    arguments = step.ArgmaxArguments
    given = {"best_value": x, "best_index": x, "n": 8}
    with pytest.raises(AssertionError, match="ids"):
        arguments.of(**given)
    with pytest.raises(AssertionError, match="contiguous"):
        arguments.of(**given, ids=x.T)
    args, tensors = arguments.of(**given, ids=None)
    assert (args.best_value, args.ids, args.n) == (x.data_ptr(), None, 8)
    assert len(tensors) == 2
