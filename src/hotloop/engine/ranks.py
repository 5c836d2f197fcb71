"""Several ranks with the interface of one ``Runner``.

A ``RankGroup`` runs in the caller's process, which is no rank itself, and hands on to every rank
what a Runner would be told; rank 0's results are the group's. If a rank dies or raises, whatever is
asked of the group raises that rank's error.

Launched by torchrun, the process of rank 0 is the caller, and the others become ranks here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from hotloop.engine.execution import Step
from hotloop.engine.rank import Start, serve
from hotloop.engine.runner import Progress
from hotloop.engine.setup import Setup, ranks_here
from hotloop.parallel.launch import Rank, Ranks, Reply, end_ranks, start_rank
from hotloop.parallel.link import Caller
from hotloop.parallel.rendezvous import Torchrun, serve_store
from hotloop.types import SamplingParams, Score

PROGRAM = "hotloop.engine.rank"
"""The module that a rank's process runs."""


class RankGroup:
    """As ``Runner``, over ``setup.config.tensor_parallel`` processes.

    Args:
        setup: What to load, as rank 0 has it.
        n_tokens: Token ids that may be chosen are below this.
        progress: Told of rank 0's layers as they are loaded.

    Raises:
        HotloopError: What a rank raised while it loaded, or how it died.
        SystemExit: This process was a rank itself, and is not needed any more.
    """

    def __init__(self, setup: Setup, *, n_tokens: int, progress: Progress | None = None) -> None:
        self.asynchronous = setup.device.type == "cuda"
        self.captures = self.asynchronous and setup.execution != "eager"
        launched, n_ranks = Torchrun.environment(), len(setup.shards)
        if launched is not None and launched.rank > 0:
            _be_rank(launched, setup, n_tokens)
        n_here = ranks_here(setup.config)
        ranks: list[Rank] = []
        try:
            if launched is None:
                self._store, address = serve_store()  # which lives as long as we do
                ranks.extend(start_rank(PROGRAM, rank) for rank in range(n_ranks))
            else:
                self._store, address = launched.store(), launched.address
                ranks.append(start_rank(PROGRAM, 0))
                ranks += launched.accept_ranks(self._store)
            self._ranks = Ranks(ranks)
        except BaseException:
            end_ranks(ranks)
            raise
        start = Start(
            setup=setup,
            n_tokens=n_tokens,
            store=address,
            n_threads=max(1, torch.get_num_threads() // n_here),
            one_machine=n_here == n_ranks,
        )
        try:
            self._ranks.tell("load", start).wait(progress)
        except BaseException:
            self.close()
            raise

    def admit(
        self, slot: int, params: SamplingParams, seed: int, prompt_ids: Sequence[int]
    ) -> Reply:
        """As ``Runner.admit``."""
        return self._ranks.tell("admit", slot, params, seed, prompt_ids)

    def step(self, step: Step) -> Reply:
        """As ``Runner.step``."""
        return self._ranks.tell("step", step)

    def score(self, ids: Sequence[int], full: bool) -> Score:
        """As ``Runner.score``."""
        return self._ranks.tell("score", ids, full).wait()

    def synchronize(self) -> None:
        """As ``Runner.synchronize``: on rank 0, which waits for its part in everything."""
        self._ranks.tell("synchronize").wait()

    def start_meter(self) -> None:
        """As ``Runner.start_meter``."""
        self._ranks.tell("start_meter").wait()

    def stop_meter(self) -> int:
        """As ``Runner.stop_meter``."""
        return self._ranks.tell("stop_meter").wait()

    def describe(self) -> dict[str, Any]:
        """As ``Runner.describe``: of rank 0, which holds no less than any other."""
        return self._ranks.tell("describe").wait()

    def close(self) -> None:
        """Ends the ranks."""
        self._ranks.end()


def _be_rank(launched: Torchrun, setup: Setup, n_tokens: int) -> NoReturn:
    """Serves the caller, the process of rank 0, until it needs this one no more."""
    caller = Caller(launched.call(launched.store()))
    serve(caller, launched.rank, launched.local_rank, own=(setup, n_tokens))
    sys.exit(0)
