"""The process of one rank: ``python -m hotloop.engine.rank RANK FD``.

It loads its shard into a Runner, then runs the commands that the caller sends over the connection
at the file descriptor FD. Its output goes to a log, which is shown only if the rank fails.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from hotloop.engine.core import Command
from hotloop.engine.runner import Runner
from hotloop.engine.setup import Setup
from hotloop.parallel.collectives import ProcessGroup
from hotloop.parallel.link import Caller
from hotloop.parallel.rendezvous import Address, Torchrun


@dataclass(frozen=True, kw_only=True)
class Load(Command[bool]):
    """Loads a rank's shard of a model; returns ``EngineCore.batch_invariant``.

    It is a rank's first command.

    Attributes:
        setup: The configuration to load.
        n_tokens: Token ids below this can be selected.
        store: The address of the rendezvous store.
        n_threads: Threads of a rank on a CPU.
        one_machine: All ranks are on this machine.
    """

    phase = "load"

    setup: Setup
    n_tokens: int
    store: Address
    n_threads: int
    one_machine: bool


def serve(
    caller: Caller, rank: int, local_rank: int, *, own: tuple[Setup, int] | None = None
) -> None:
    """Loads a shard and runs commands until the caller closes; an error ends the process.

    Args:
        caller: The sender of commands.
        rank: The number of this rank.
        local_rank: Its number among those on this machine.
        own: Setup and ``n_tokens``, if this process has resolved them itself (torchrun).
    """
    try:
        commands = caller.commands()
        number, load = next(commands)
        setup, n_tokens = own or (load.setup, load.n_tokens)
        group = _join(load, setup := setup.on(rank, local_rank))

        def progress(*what: Any) -> None:
            if rank == 0:
                caller.report(number, *what)

        runner = Runner(setup, n_tokens=n_tokens, progress=progress, group=group)
        if rank == 0:
            caller.answer(number, lambda: runner.batch_invariant)
        for number, command in commands:
            pending = runner.run(command)
            if rank == 0:
                caller.answer(number, pending.wait)  # waits in another thread
    except BaseException as error:
        caller.fail(error)


def _join(load: Load, setup: Setup) -> ProcessGroup:
    """Joins the process group of all ranks."""
    if setup.device.type == "cpu":
        torch.set_num_threads(load.n_threads)
    # By default gloo uses the address of the host's name, which may not be reachable.
    if load.one_machine:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return ProcessGroup(
        load.store.connect(),
        setup.rank,
        len(setup.shards),
        setup.device,
        all_reduce=setup.config.all_reduce,
    )


def main() -> None:
    """Serves the caller that started this process."""
    rank, file = map(int, sys.argv[1:])
    os.set_inheritable(file, False)  # or a child process could hold it open
    launched = Torchrun.environment()
    serve(Caller(Connection(file)), rank, launched.local_rank if launched else rank)


if __name__ == "__main__":
    main()
