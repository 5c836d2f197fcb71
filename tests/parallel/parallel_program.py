"""Ranks without an engine, so that they start fast: ``python -m parallel_program RANK FD``.

Commands are a method of ``Program`` and its arguments. Those with an argument ``who`` concern that
rank; the others wait for it forever, as in a collective.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

from hotloop.errors import CheckpointError
from hotloop.parallel.link import Caller, PeerError


def wait_for_peer() -> None:
    ctypes.CDLL(None).sleep(1000)  # in C, as in a collective: no Python runs in this thread


class Program:
    def __init__(self, caller: Caller, rank: int) -> None:
        self.caller, self.rank = caller, rank

    def pid(self) -> int:
        return os.getpid()

    def add(self, a: int, b: int) -> int:
        return a + b

    def wait_for_file(self, path: Path) -> str:
        while not path.exists():
            time.sleep(0.02)
        return "waited"

    def report(self, number: int) -> str:
        for i in range(3 * (self.rank == 0)):
            self.caller.report(number, "phase", i)
        return "reported"

    def raise_known(self, who: int) -> None:
        if self.rank == who:
            raise CheckpointError("some/file", "is damaged", tensor="some.tensor")
        wait_for_peer()

    def raise_unknown(self, who: int) -> None:
        if self.rank == who:
            raise KeyError("no such thing")
        wait_for_peer()

    def raise_after_peers(self, who: int) -> None:
        """The others report the failure of ``who`` before it does so itself."""
        if self.rank == who:
            time.sleep(0.5)
            raise CheckpointError("some/file", "is damaged")
        raise PeerError("connection reset")

    def lose_peers(self) -> None:
        raise PeerError("connection reset")

    def exit(self, who: int) -> None:
        if self.rank == who:
            print("these are my last words", file=sys.stderr, flush=True)
            os._exit(3)
        wait_for_peer()

    def die(self, who: int) -> None:
        if self.rank == who:
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for_peer()

    def die_leaving_a_child(self, who: int) -> None:
        """The child has a copy of this end of the connection, which therefore stays open."""
        if self.rank == who:
            file = int(sys.argv[2])
            os.set_inheritable(file, True)
            subprocess.Popen(["sleep", "1000"], close_fds=False)
            os._exit(5)
        wait_for_peer()

    def hang(self) -> None:
        wait_for_peer()


def main() -> None:
    rank, file = map(int, sys.argv[1:])
    caller = Caller(Connection(file))
    program = Program(caller, rank)
    try:
        for number, (command, *arguments) in caller.commands():
            arguments = (number,) if command == "report" else arguments
            result = getattr(program, command)(*arguments)
            if rank == 0:
                caller.answer(number, lambda result=result: result)
    except BaseException as error:
        caller.fail(error)


if __name__ == "__main__":
    main()
