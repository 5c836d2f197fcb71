"""The thread pool of the CPU kernels: every chunk is committed once, without waits."""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from waiting import HANG_S

from hotloop.kernels import cpu

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

PROMISES = [
    "every_size",
    "worker_that_does_not_come_back",
    "several_callers",
    "forked_child",
    "pauses",
]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    built = tmp_path_factory.mktemp("pool") / "pool_program"
    source = Path(__file__).with_name("pool_program.cpp")
    include = f"-I{cpu.SOURCE.parent}"
    command = [str(COMPILER), "-std=c++20", "-O1", "-pthread", include, str(source), "-o"]
    subprocess.run([*command, str(built)], check=True, timeout=HANG_S)
    return built


@needs_compiler
@pytest.mark.parametrize("promise", PROMISES)
def test_pool_keeps_its_promise(promise, program):
    if promise == "worker_that_does_not_come_back" and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor: there are no workers")
    done = subprocess.run([program, promise], capture_output=True, text=True, timeout=HANG_S)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason()))
def test_torch_stays_on_one_thread_while_ours_keep_theirs():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with cpu.single_threaded_torch():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        with contextlib.suppress(ZeroDivisionError), cpu.single_threaded_torch():
            raise ZeroDivisionError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
