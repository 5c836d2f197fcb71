"""Machines on which the CPU kernels cannot be built: the reason given, and the fallback."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from waiting import HANG_S

from hotloop.kernels import cpu
from hotloop.kernels.attention import choose_attention, torch_attention
from hotloop.kernels.linear import LinearSpec, choose_linear
from hotloop.quant import parse_scheme

pytestmark = pytest.mark.usefixtures("forked_processes")


def reason_here() -> str | None:
    """Returns the reason of a fresh process; in this one the operators may be loaded already."""
    return cpu.unavailable_reason.__wrapped__()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOTLOOP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_a_failing_compiler_is_named_with_its_output(tmp_path, cache, monkeypatch):
    broken = script(
        tmp_path / "broken-c++",
        'test "$1" = --version && echo broken 1.0 && exit 0\n'
        'echo "fatal: no such header" >&2; exit 1',
    )
    monkeypatch.setenv("CXX", broken)
    reason = reason_here()
    assert reason is not None
    assert reason.startswith(f"building the CPU kernels with {broken} failed, so decoding is ")
    assert reason.endswith("fatal: no such header")
    assert not list((cache / "kernels").iterdir()), "nothing half-made is left"


@pytest.mark.parametrize("compiler", ["false", "/nowhere/c++"])
def test_a_compiler_that_does_not_work_is_named(compiler, cache, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    assert f"building the CPU kernels with {compiler} failed, so" in str(reason_here())
    assert not cache.exists()


@pytest.mark.usefixtures("cache")
def test_missing_compiler_is_explained(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert reason_here() == (
        "no C++ compiler found, so decoding is several times slower (install g++, or set CXX)"
    )


@pytest.mark.usefixtures("cache")
def test_library_that_cannot_be_loaded_is_a_reason_too(tmp_path, monkeypatch):
    nonsense = script(
        tmp_path / "c++",
        'test "$1" = --version && echo 1.0 && exit 0\n'
        'while test "$1" != -o; do shift; done; echo no library > "$2"',
    )
    monkeypatch.setenv("CXX", nonsense)
    assert f"building the CPU kernels with {nonsense} failed, so" in str(reason_here())


def test_cache_that_cannot_be_written_is_replaced_by_a_temporary_one(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CXX", script(tmp_path / "c++", "echo 1.0"))
    monkeypatch.setenv("HOTLOOP_CACHE", str(tmp_path / "file"))
    assert "failed" in str(reason_here())
    assert (tmp_path / f"hotloop-{os.getuid()}" / "kernels").is_dir()


@pytest.mark.parametrize("name", ["none", "int8", "int4-g64", "int4-g32-asym"])
def test_next_kernel_is_taken_and_the_reason_noted(name, monkeypatch):
    monkeypatch.setattr(cpu, "unavailable_reason", lambda: "no compiler today")
    form = LinearSpec(
        format=parse_scheme(name).format(128), n=64, k=128, dtype=torch.bfloat16, device="cpu"
    )
    kernel, notes = choose_linear(form)
    base, how = {"none": ("dense", "torch"), "int8": ("int8", "torch")}.get(
        name, ("int4", "dequantized")
    )
    assert kernel.name == f"{base}/{how}"
    assert notes[0] == f"{base}/cpu not used: no compiler today"
    slow = [f"{kernel.name} is used instead, and is slow"] * (how == "dequantized")
    assert [note.partition(":")[0] for note in notes[1:]] == slow
    weight = parse_scheme(name).quantize(torch.randn(64, 128).bfloat16())
    dense = weight if isinstance(weight, torch.Tensor) else weight.dequantize(torch.bfloat16)
    x = torch.randn(1, 128).bfloat16()
    torch.testing.assert_close(kernel(x, *kernel.pack(weight)), x @ dense.T, rtol=0.02, atol=0.1)


def test_attention_falls_back_with_the_reason(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable_reason", lambda: "no compiler today")
    chosen = choose_attention(torch.device("cpu"), torch.bfloat16)
    assert chosen == ("torch", torch_attention, ["attention/cpu not used: no compiler today"])


def test_processes_that_build_at_once_get_the_same_library(tmp_path, cache, monkeypatch):
    slow = script(
        tmp_path / "c++",
        'test "$1" = --version && echo 1.0 && exit 0\n'
        f'echo built >> {tmp_path / "log"}; while test "$1" != -o; do shift; done\n'
        f'echo half > "$2"; while test "$(wc -l < {tmp_path / "log"})" -lt 2; do sleep 0.05; done\n'
        'echo whole > "$2"',
    )
    monkeypatch.setenv("CXX", slow)
    program = (
        "from hotloop.kernels import cpu; import sys; print(cpu._build(sys.argv[1]).read_text())"
    )
    command = [sys.executable, "-c", program, slow]
    builds = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [build.communicate(timeout=HANG_S)[0].split() for build in builds] == [["whole"]] * 2
    assert len(list((cache / "kernels").iterdir())) == 1, "nothing half-made is left"


@pytest.mark.usefixtures("cache")
def test_a_build_that_was_killed_leaves_nothing_that_is_taken_for_a_library(tmp_path):
    hang, started = tmp_path / "hang", tmp_path / "started"
    compiler = script(
        tmp_path / "c++",
        'test "$1" = --version && echo 1.0 && exit 0\n'
        'while test "$1" != -o; do shift; done; echo half > "$2"\n'
        f"touch {started}; while test -e {hang}; do sleep 0.05; done\n"
        'echo whole > "$2"',
    )
    hang.touch()
    program = "from hotloop.kernels import cpu; import sys; cpu._build(sys.argv[1])"
    command = [sys.executable, "-c", program, compiler]
    with subprocess.Popen(command) as build:
        while not started.exists():
            assert build.poll() is None, "the build ended before it was killed"
            time.sleep(0.05)
        build.kill()
    hang.unlink()
    assert cpu._build(compiler).read_text() == "whole\n"


def test_files_of_a_killed_build_are_removed_by_a_later_one(tmp_path, cache, monkeypatch):
    left, recent = cache / "kernels" / "build-old", cache / "kernels" / "build-new"
    for folder in (left, recent):
        folder.mkdir(parents=True)
        (folder / "cpu.so").touch()
    hour_ago = time.time() - 3600
    os.utime(left, (hour_ago, hour_ago))
    broken = script(tmp_path / "c++", 'test "$1" = --version && echo 1.0 && exit 0; exit 1')
    monkeypatch.setenv("CXX", broken)
    assert reason_here() is not None
    assert [path.name for path in (cache / "kernels").iterdir()] == ["build-new"]
