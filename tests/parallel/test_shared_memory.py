"""Exchanges of ranks through shared memory: exact, in any number of ranks, without a hang."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from waiting import HANG_S, wait_until

from hotloop.kernels import cpu, reference
from hotloop.parallel.rendezvous import serve_store
from hotloop.parallel.shared_memory import SharedMemory

pytestmark = [
    pytest.mark.usefixtures("forked_processes"),
    pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())),
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux"),
]

PART = 2**16  # bytes; longer tensors are exchanged in pieces


def on_ranks(n: int, work: Callable[[int, Tensor], Any], memory: Tensor | None = None) -> list[Any]:
    """Runs ``work(rank, memory)`` on threads that are the ranks, and returns their results."""
    if memory is None:
        memory = zeros(n)
    with ThreadPoolExecutor(n) as pool:
        runs = [pool.submit(work, rank, memory) for rank in range(n)]
        return [run.result(timeout=HANG_S) for run in runs]


def zeros(n: int) -> Tensor:
    return torch.zeros(torch.ops.hotloop_cpu.exchange_bytes(n), dtype=torch.uint8)


def normal(n: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return 3 * torch.randn(n, *shape, generator=torch.Generator().manual_seed(n)).to(dtype)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_rank_gets_the_bits_that_are_specified(n, dtype):
    for shape in ((0,), (1,), (1, 1, 576), (257, 257)):
        parts = normal(n, *shape, dtype=dtype)
        expected = reference.sum_of_parts(parts)

        def add(rank: int, memory: Tensor, parts: Tensor = parts) -> Tensor:
            return torch.ops.hotloop_cpu.sum_over_ranks(parts[rank], memory, rank, n)

        for total in on_ranks(n, add):
            assert total.dtype == dtype
            assert torch.equal(total, expected)


def test_numbers_that_are_none_stay_none():
    parts = normal(2, 64, dtype=torch.bfloat16)
    parts[0, 0], parts[0, 1], parts[1, 1] = torch.nan, torch.inf, -torch.inf
    sums = on_ranks(
        2, lambda rank, m: torch.ops.hotloop_cpu.sum_over_ranks(parts[rank], m, rank, 2)
    )
    for total in sums:
        assert total.isnan().nonzero().flatten().tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64, torch.uint8])
def test_tensors_of_any_type_and_length_are_gathered(dtype):
    for length in (1, 3, PART // 8 - 1, PART + 1):
        parts = (normal(3, length) * 10).to(dtype)

        def gather(rank: int, memory: Tensor, parts: Tensor = parts) -> Tensor:
            return torch.ops.hotloop_cpu.gather_over_ranks(parts[rank], memory, rank, 3)

        for gathered in on_ranks(3, gather):
            assert torch.equal(gathered, parts)


@pytest.mark.parametrize("n", [2, 5])
def test_thousands_of_exchanges_with_ranks_that_come_late_keep_their_order(n):
    def exchange(rank: int, memory: Tensor) -> None:
        pauses = random.Random(rank)
        for i in range(2000):
            if pauses.random() < 0.01:
                time.sleep(pauses.random() * 2e-3)  # longer than others spin
            mine = torch.full((1 + i % 40,), 1000.0 * i + rank)
            total = torch.ops.hotloop_cpu.sum_over_ranks(mine, memory, rank, n)
            assert total.tolist() == [1000.0 * i * n + n * (n - 1) / 2] * len(mine)

    on_ranks(n, exchange)


def test_the_number_of_exchanges_may_wrap_around():
    memory = zeros(2)
    for rank in range(2):
        memory[64 * rank : 64 * rank + 4] = torch.tensor([0xFD, 0xFF, 0xFF, 0xFF])

    def exchange(rank: int, memory: Tensor) -> None:
        for i in range(8):
            mine = torch.tensor([10 * i + rank])
            gathered = torch.ops.hotloop_cpu.gather_over_ranks(mine, memory, rank, 2)
            assert gathered.flatten().tolist() == [10 * i, 10 * i + 1]

    on_ranks(2, exchange, memory)
    assert memory[:4].tolist() == [5, 0, 0, 0]


def test_tensors_of_different_lengths_are_an_error_on_every_rank():
    def exchange(rank: int, memory: Tensor) -> str:
        with pytest.raises(RuntimeError) as caught:
            torch.ops.hotloop_cpu.sum_over_ranks(torch.ones(3 + rank), memory, rank, 2)
        return str(caught.value)

    assert all("tensors of one size" in error for error in on_ranks(2, exchange))


PROGRAM = """
import sys, torch
import torch.distributed as dist
from hotloop.parallel.shared_memory import SharedMemory
from hotloop.parallel.rendezvous import Address
port, rank, n = map(int, sys.argv[1:])
shared = SharedMemory(Address(host="127.0.0.1", port=port).connect(), rank, n)
assert shared.reason is None, shared.reason
for i in range(300):
    mine = torch.tensor([float(i + rank)])
    total = torch.ops.hotloop_cpu.sum_over_ranks(mine, shared.tensor, rank, n)
    assert total.item() == n * i + n * (n - 1) / 2
print("added", flush=True)
sys.stdin.readline()
if rank == 0:
    print("waits", flush=True)
    torch.ops.hotloop_cpu.sum_over_ranks(mine, shared.tensor, rank, n)
"""


@pytest.mark.parametrize("pinned", [False, True], ids=["free", "pinned"])
def test_more_processes_than_processors_exchange_and_one_that_waits_for_good_sleeps(pinned):
    n = 3
    _store, address = serve_store()
    one = {min(os.sched_getaffinity(0))}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, (address.port, rank, n))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(n)
    ]
    try:
        for rank in ranks:
            if pinned:
                os.sched_setaffinity(rank.pid, one)
        assert [rank.stdout.readline() for rank in ranks] == ["added\n"] * n
        # Rank 0 waits for the others, which do not come: it sleeps, and can be ended.
        ranks[0].stdin.write("\n")
        ranks[0].stdin.flush()
        assert ranks[0].stdout.readline() == "waits\n"
        waits = psutil.Process(ranks[0].pid)
        wait_until(lambda: waits.status() == psutil.STATUS_SLEEPING, "rank 0 sleeps")
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


# What cannot be shared is told.


def test_what_is_not_the_memory_of_rank_0_is_not_used(tmp_path):
    store = dist.HashStore()
    other = (tmp_path / "other").open("wb+")
    other.write(bytes(100))
    other.flush()
    for file in (other.fileno(), 10**6):
        store.set("shared_memory", json.dumps((os.getpid(), file, "00ff")))
        shared = SharedMemory(store, 1, 2)
        assert shared.tensor is None
        path = f"/proc/{os.getpid()}/fd/{file}"
        assert path in shared.reason
        known = {f"{path} is not rank 0's memory", f"[Errno 2] No such file or directory: {path!r}"}
        assert shared.reason in known


def test_rank_0_without_memory_tells_the_others(monkeypatch):
    def refuse(_: str) -> int:
        raise OSError("no memory today")

    monkeypatch.setattr(os, "memfd_create", refuse)
    store = dist.HashStore()
    ranks = [SharedMemory(store, rank, 2) for rank in range(2)]
    assert [rank.tensor for rank in ranks] == [None, None]
    assert ranks[0].reason == "no memory today"


def test_the_reason_why_kernels_cannot_be_built_is_told(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable_reason", lambda: "no compiler today")
    store = dist.HashStore()
    assert [SharedMemory(store, rank, 2).reason for rank in range(2)] == ["no compiler today"] * 2
