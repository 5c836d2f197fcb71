"""Ranks as threads of this process, without the cost of starting processes."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import reduce
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from waiting import HANG_S

from hotloop.engine.core import Command, Done, Pending, StepResult
from hotloop.engine.runner import Runner
from hotloop.engine.setup import Setup
from hotloop.parallel.collectives import Group, Inboxes

T = TypeVar("T")


class _Exchange:
    def __init__(self, size: int) -> None:
        self.given: list[Tensor | None] = [None] * size
        self.kept: list[Tensor] = []  # which others write into
        self.barrier = threading.Barrier(size, timeout=HANG_S)


class ThreadGroup(Group):
    """One thread's view of a group."""

    def __init__(self, rank: int, size: int, exchange: _Exchange) -> None:
        self.rank, self.size, self._exchange = rank, size, exchange

    @property
    def kernel(self) -> str:
        return "threads"

    def all_gather(self, x: Tensor) -> Tensor:
        self._exchange.given[self.rank] = x
        self._exchange.barrier.wait()
        gathered = torch.stack(self._exchange.given)  # fails, as a real one would, if shapes differ
        self._exchange.barrier.wait()
        return gathered

    def sum(self, x: Tensor) -> Tensor:
        return reduce(Tensor.add, self.all_gather(x).unbind())

    def max(self, x: Tensor) -> Tensor:
        return self.all_gather(x).amax(dim=0)

    def inboxes(self, nbytes: int, use: str) -> Inboxes:  # noqa: ARG002 (all alike)
        mine = torch.zeros(nbytes, dtype=torch.uint8)
        addresses = self.all_gather(torch.tensor(mine.data_ptr())).tolist()
        self._exchange.kept.append(mine)
        return Inboxes(rank=self.rank, addresses=addresses, memory=self._exchange)

    def gather_to_first(self, x: Tensor) -> Tensor | None:
        gathered = self.all_gather(x)
        return gathered if self.rank == 0 else None


class ThreadRanks:
    """``size`` threads, each a rank, that run the same function in parallel."""

    def __init__(self, size: int) -> None:
        self._exchange = _Exchange(size)
        self.groups = [ThreadGroup(rank, size, self._exchange) for rank in range(size)]
        self._pools = [ThreadPoolExecutor(1) for _ in range(size)]

    def run(self, work: Callable[[ThreadGroup], T]) -> list[T]:
        """Runs ``work`` on every rank; returns the results, or raises the first exception."""

        def guarded(group: ThreadGroup) -> T:
            try:
                return work(group)
            except BaseException:
                self._exchange.barrier.abort()
                raise

        futures = [
            pool.submit(guarded, group)
            for pool, group in zip(self._pools, self.groups, strict=True)
        ]
        errors = [error for f in futures if (error := f.exception())]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        if errors:
            raise errors[0]
        return [future.result() for future in futures]


class ThreadRunner:
    """As ``RankGroup``."""

    asynchronous = captures = False
    ends_chains = True

    def __init__(self, setup: Setup, *, n_tokens: int, **_: object) -> None:
        self.ranks = ThreadRanks(len(setup.shards))
        self.runners = self.ranks.run(
            lambda group: Runner(setup.on(group.rank, group.rank), n_tokens=n_tokens, group=group)
        )

    def run(self, command: Command[Any]) -> Pending[Any]:
        results = self.ranks.run(lambda group: self.runners[group.rank].run(command).wait())
        if isinstance(results[0], StepResult):
            tokens = [[[token for token, _ in row] for row in each.rows] for each in results]
            assert all(other == tokens[0] for other in tokens), "every rank has the same tokens"
        return Done(results[0])

    def close(self) -> None:
        self.ranks.run(lambda group: self.runners[group.rank].close())


@contextmanager
def ranks_as_threads() -> Iterator[None]:
    """Engines of several ranks have threads for ranks meanwhile."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)  # a rank is a thread already
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hotloop.engine.llm.RankGroup", ThreadRunner)
        yield
    torch.set_num_threads(n)
