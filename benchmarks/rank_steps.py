"""Runs decode steps of one rank of a model, to measure the cost of all-reduces.

    python benchmarks/rank_steps.py RANK PORT JOB OUT

``multi_gpu.py`` starts it once for every rank, and serves torch's store at ``PORT``. ``JOB`` is a
JSON object (``Job``). Rank 0 writes to ``OUT``:

    step_ms           time of an unchanged step, in several rounds
    without_sums_ms   the same without all-reduces. The tokens are wrong; the difference in time is
                      the cost of all-reduces, including waits for other ranks.
    kernels           from torch.profiler, in an unchanged round: the share of time in all-reduces
                      (and in the argmax over ranks), and the time of each kernel. Profiling slows
                      steps down.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hotloop.engine.core import Admit, Admitted, Features, Step, Synchronize
from hotloop.engine.runner import Runner
from hotloop.engine.setup import Setup, prepare
from hotloop.parallel.collectives import Group, Inboxes, ProcessGroup, Use
from hotloop.parallel.rendezvous import LOOPBACK, Address
from hotloop.types import EngineConfig, SamplingParams

PROMPT = (1, 2, 3, 4, 5)
GREEDY = SamplingParams(ignore_eos=True)

OWN_ALL_REDUCE = re.compile(r"^all_reduce_|_over_ranks")
"""Matches names of all-reduce kernels of the fused step."""

ALL_REDUCE = re.compile(
    rf"all_?reduce|hotloop_parallel::sum|{OWN_ALL_REDUCE.pattern}", re.IGNORECASE
)
"""Matches names of all-reduce kernels, and of operators on a CPU, of every backend."""

Span = tuple[str, float, float]
"""A name, and its beginning and end in microseconds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """The model to step.

    Attributes:
        config: Fields of ``EngineConfig``.
        rounds: How often to measure.
        steps: Steps of a round.
    """

    config: dict[str, Any]
    rounds: int
    steps: int

    @property
    def n_positions(self) -> int:
        """Positions that all steps need: two more rounds, for warm-up and profiling."""
        return len(PROMPT) + (self.rounds + 2) * self.steps + 1

    def setup(self, rank: int) -> Setup:
        config = EngineConfig(**self.config, max_seq_len=self.n_positions)
        return prepare(config).on(rank, rank)


class WithoutSums(Group):
    """A group whose all-reduces return their input."""

    def __init__(self, group: Group) -> None:
        self._group, self.rank, self.size = group, group.rank, group.size
        self.max, self.all_gather = group.max, group.all_gather
        self.gather_to_first = group.gather_to_first

    def sum(self, x: Tensor) -> Tensor:
        return x

    def inboxes(self, nbytes: int, use: Use) -> Inboxes | None:
        """Returns only the rank's own inbox, so that the same kernels run without waits."""
        found = self._group.inboxes(nbytes, use)
        if found is None or use == "argmax":
            return found
        return dataclasses.replace(found, rank=0, addresses=[found.addresses[self.rank]])


class Stepping:
    """A ``Runner`` that decodes one sequence."""

    def __init__(self, job: Job, setup: Setup, group: Group) -> None:
        self.job, self.setup = job, setup
        self.runner = Runner(setup, n_tokens=setup.model.vocab_size, group=group)
        prompt = Admitted(seat=0, params=GREEDY, seed=0, prompt_ids=PROMPT)
        self.runner.run(Admit(row=0, prompts=[prompt])).wait()
        step = Step(n=1, seats=(0,), longest=job.n_positions, features=Features.of([GREEDY]))
        self.step = lambda: self.runner.run(step)
        self.round_ms()  # compiles, captures, warms up

    def round_ms(self) -> float:
        """Times a step, in milliseconds; like an engine, it launches one step ahead."""
        self.runner.run(Synchronize()).wait()
        started = time.perf_counter()
        ahead = self.step()
        for _ in range(self.job.steps - 1):
            behind, ahead = ahead, self.step()
            behind.wait()
        ahead.wait()
        return 1e3 * (time.perf_counter() - started) / self.job.steps

    def profile(self) -> dict[str, Any]:
        """Runs a round, on rank 0 under torch's profiler; the other ranks return nothing."""
        kinds = torch.profiler.ProfilerActivity
        on_gpu = self.setup.device.type == "cuda"
        if self.setup.rank > 0:
            self.round_ms()
            return {}
        with torch.profiler.profile(activities=[kinds.CUDA if on_gpu else kinds.CPU]) as profiler:
            self.round_ms()
        wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
        spans = [
            (event.name, event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if event.device_type == wanted
        ]
        return summary(spans, self.job.steps)


def summary(spans: Sequence[Span], n_steps: int) -> dict[str, Any]:
    """Summarizes kernels, in microseconds per step.

    Kernels overlap: times by name can add up to more than the step, while the share of all-reduce
    counts every moment once.
    """
    if not spans:
        return {"failed": "the profiler saw nothing"}
    spans = without_waits(spans)
    whole_us = max(end for *_, end in spans) - min(begin for _, begin, _ in spans)
    all_reduces = [(begin, end) for name, begin, end in spans if ALL_REDUCE.search(name)]
    by_name: Counter[str] = Counter()
    for name, begin, end in spans:
        by_name[name] += end - begin
    return {
        "all_reduce_share": covered(all_reduces) / whole_us,
        "all_reduce_us": covered(all_reduces) / n_steps,
        "all_reduces": len(all_reduces) / n_steps,
        "step_us": whole_us / n_steps,
        "us_by_name": {name[:120]: us / n_steps for name, us in by_name.most_common(15)},
    }


def without_waits(spans: Iterable[Span]) -> list[Span]:
    """Sorts spans, and lets those of our all-reduce kernels begin when all earlier ones have ended.

    These kernels start early (programmatic dependent launch), and wait for the matrix product whose
    results they send.
    """
    result, reached = [], float("-inf")
    for name, begin, end in sorted(spans, key=lambda span: span[1]):
        begins = min(end, max(begin, reached)) if OWN_ALL_REDUCE.search(name) else begin
        result.append((name, begins, end))
        reached = max(reached, end)
    return result


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Returns the length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def measure(job: Job, setup: Setup, group: Group) -> dict[str, Any]:
    ways: dict[str, Group] = {"step_ms": group, "without_sums_ms": WithoutSums(group)}
    result: dict[str, Any] = {"all_reduce": group.kernel, "notes": group.notes}
    for way, used_group in ways.items():
        stepping = Stepping(job, setup, used_group)
        result[way] = [stepping.round_ms() for _ in range(job.rounds)]
        if used_group is group:
            result["kernels"] = stepping.profile()
        stepping.runner.close()
    return result


def main() -> None:
    rank, port = map(int, sys.argv[1:3])
    job, out = Job(**json.loads(sys.argv[3])), Path(sys.argv[4])
    setup = job.setup(rank)
    size = len(setup.shards)
    if setup.device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
    store = Address(host=LOOPBACK, port=port).connect()
    group = ProcessGroup(store, rank, size, setup.device, all_reduce=setup.config.all_reduce)
    result = measure(job, setup, group)
    if rank == 0:
        out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
