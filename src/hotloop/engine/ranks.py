"""Runs several ranks as one ``EngineCore``.

A ``RankGroup`` runs in the caller's process, which is not a rank itself. It sends each command to
every rank and returns rank 0's result. If a rank dies or raises, every later call raises that
rank's error.

Under torchrun, the process of rank 0 is the caller, and the other processes become ranks here.
"""

from __future__ import annotations

import sys
from typing import NoReturn, TypeVar

import torch
from torch.distributed import Store

from hotloop.engine.core import Command, Pending
from hotloop.engine.rank import Load, serve
from hotloop.engine.runner import OnProgress
from hotloop.engine.setup import Setup, ranks_here
from hotloop.parallel.launch import Rank, Ranks, end_ranks, start_rank
from hotloop.parallel.link import Caller
from hotloop.parallel.rendezvous import Torchrun, serve_store

Result = TypeVar("Result")

PROGRAM = "hotloop.engine.rank"
"""The module that a rank's process runs."""


class RankGroup:
    """``setup.config.tensor_parallel`` processes, each with a ``Runner`` of its shard.

    Args:
        setup: The configuration to load, resolved for rank 0.
        n_tokens: Token ids below this can be selected.
        progress: Called as rank 0's layers are loaded.

    Raises:
        HotloopError: A rank failed to load, or died.
        SystemExit: This process was itself a rank, started by torchrun, and the caller has ended.
    """

    def __init__(self, setup: Setup, *, n_tokens: int, progress: OnProgress | None = None) -> None:
        # On a CPU too, ranks compute a step while the tokens of the previous one travel here.
        self.asynchronous, self.captures = True, setup.captures
        self.ends_chains = setup.ends_on_host
        launched, n_ranks = Torchrun.environment(), len(setup.shards)
        if launched is not None and launched.rank > 0:
            _serve_as_rank(launched, setup, n_tokens)
        n_here = ranks_here(setup.config)
        self._store: Store | None  # lives as long as the ranks
        ranks: list[Rank] = []
        try:
            if launched is None:
                self._store, address = serve_store()
                ranks.extend(start_rank(PROGRAM, rank) for rank in range(n_ranks))
            else:
                self._store, address = launched.store(), launched.address
                ranks.append(start_rank(PROGRAM, 0))
                ranks += launched.accept_ranks(self._store)
            self._ranks = Ranks(ranks)
        except BaseException:
            end_ranks(ranks)
            raise
        load = Load(
            setup=setup,
            n_tokens=n_tokens,
            store=address,
            n_threads=max(1, torch.get_num_threads() // n_here),
            one_machine=n_here == n_ranks,
        )
        try:
            self.batch_invariant = self._ranks.send_to_all(load, phase=load.phase).wait(progress)
        except BaseException:
            self.close()
            raise

    def run(self, command: Command[Result]) -> Pending[Result]:
        """See ``EngineCore``. The result is rank 0's.

        Its shard is the largest, so the memory and the bytes that it reports bound every rank's.
        """
        return self._ranks.send_to_all(command, phase=command.phase)

    def close(self) -> None:
        """Ends the ranks."""
        self._ranks.end()
        if Torchrun.environment() is None:  # else torchrun's ranks may still use the store
            self._store = None


def _serve_as_rank(launched: Torchrun, setup: Setup, n_tokens: int) -> NoReturn:
    """Serves the caller, the process of rank 0, until it closes, and exits."""
    caller = Caller(launched.call(launched.store()))
    serve(caller, launched.rank, launched.local_rank, own=(setup, n_tokens))
    sys.exit(0)
