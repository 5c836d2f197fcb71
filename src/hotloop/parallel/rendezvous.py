"""How ranks find each other: a key-value store that every one of them can reach.

Ranks that we start share one that the caller serves on the loopback interface, at a port that the
system picks. Ranks that torchrun started (or whatever else sets its environment: ``RANK``,
``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``, ``MASTER_PORT``) use torchrun's. There, the process
of rank 0 is the caller, which starts rank 0 on its own machine; the other processes become the
other ranks and call the caller, whose address and secret they find in the store.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

import torch.distributed as dist

from hotloop.errors import ConfigError, RankError
from hotloop.parallel.launch import Rank, end_ranks
from hotloop.parallel.link import receive, send

LOOPBACK = "127.0.0.1"
CALL_TIMEOUT_S = 300.0
"""How long the caller waits for the ranks that others started."""

GREETING_S = 30
"""How long each message of a greeting may take."""

TICK_S = 0.1
"""How often the caller looks who has arrived."""

_CALLER = "caller"


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a store is.

    Attributes:
        host: A name or a number.
        port: Its port.
        prefix: What our keys begin with.
    """

    host: str
    port: int
    prefix: str = "hotloop"

    def connect(self) -> dist.Store:
        """A client of it."""
        store = dist.TCPStore(self.host, self.port, is_master=False)
        return dist.PrefixStore(self.prefix, store)


def serve_store() -> tuple[dist.Store, Address]:
    """A store for the ranks on this machine; it lives as long as the first of the two."""
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return store, Address(host=LOOPBACK, port=port)


@dataclass(frozen=True, kw_only=True)
class Torchrun:
    """What torchrun tells a process by its environment.

    Attributes:
        rank: This process.
        world_size: All processes.
        local_rank: This process among those on this machine.
        local_world_size: How many are on this machine.
        address: Of torchrun's store.
        serves: Whether nobody serves the store yet and this process must.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: Address
    serves: bool

    @classmethod
    def environment(cls) -> Torchrun | None:
        """What this process was told; None if torchrun did not start it.

        Raises:
            ConfigError: A variable holds no number.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        if not all(name in os.environ for name in (*names, "MASTER_ADDR")):
            return None
        try:
            rank, world_size, local_rank, port = (int(os.environ[name]) for name in names)
            local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        except ValueError as error:
            raise ConfigError(f"torchrun's environment ({', '.join(names)}): {error}.") from error
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=local_world_size,
            address=Address(host=os.environ["MASTER_ADDR"], port=port, prefix=f"hotloop/{attempt}"),
            serves=rank == 0 and not by_agent,
        )

    def store(self) -> dist.Store:
        """The store, served by this process if nobody else does."""
        if not self.serves:
            return self.address.connect()
        store = dist.TCPStore(
            self.address.host, self.address.port, is_master=True, wait_for_workers=False
        )
        return dist.PrefixStore(self.address.prefix, store)

    def accept_ranks(self, store: dist.Store) -> list[Rank]:
        """The other ranks, as the caller sees them, in order.

        Raises:
            RankError: One did not come in time.
        """
        secret = secrets.token_bytes(32)
        missing, ranks = set(range(1, self.world_size)), []
        arrived: queue.SimpleQueue[Rank] = queue.SimpleQueue()
        deadline = time.monotonic() + CALL_TIMEOUT_S
        with socket.create_server((self.address.host, 0)) as listener:
            listener.settimeout(TICK_S)
            caller = (self.address.host, listener.getsockname()[1], secret.hex())
            store.set(_CALLER, json.dumps(caller))
            while missing:
                with suppress(TimeoutError):
                    reached, _ = listener.accept()
                    # In a thread: whoever says nothing must not keep the others waiting.
                    greeting = (reached, secret, arrived)
                    threading.Thread(target=_greet, args=greeting, daemon=True).start()
                while not arrived.empty():
                    rank = arrived.get()
                    if rank.index in missing:
                        missing.remove(rank.index)
                        ranks.append(rank)
                    else:
                        rank.connection.close()
                if missing and time.monotonic() > deadline:
                    end_ranks(ranks)
                    problem = f"did not come within {CALL_TIMEOUT_S:g} s"
                    raise RankError(min(missing), self.world_size, problem)
        return sorted(ranks, key=lambda rank: rank.index)

    def call(self, store: dist.Store) -> Connection:
        """This rank's connection to the caller.

        Raises:
            RankError: The caller is not there, or is somebody else.
        """
        host, port, secret = json.loads(store.get(_CALLER))
        try:
            with (
                socket.create_connection((host, port), timeout=GREETING_S) as reached,
                _limited(reached) as connection,
            ):
                answer_challenge(connection, bytes.fromhex(secret))
                deliver_challenge(connection, bytes.fromhex(secret))
                send(connection, self.rank)
                return connection
        except (OSError, EOFError, AuthenticationError) as error:
            problem = f"could not reach rank 0's process at {host}:{port}: {error}"
            raise RankError(self.rank, self.world_size, problem) from error


def _greet(reached: socket.socket, secret: bytes, arrived: queue.SimpleQueue[Rank]) -> None:
    """Lets in a rank that called; drops whoever is none."""
    with reached, suppress(OSError, EOFError, AuthenticationError):  # no rank, or too slow a one
        with _limited(reached) as connection:
            deliver_challenge(connection, secret)
            answer_challenge(connection, secret)
            index = receive(connection)
        arrived.put(Rank(index, connection))


@contextmanager
def _limited(reached: socket.socket) -> Generator[Connection]:
    """A connection whose messages must come in time within the block; closed if it fails."""
    reached.settimeout(None)
    connection = Connection(os.dup(reached.fileno()))

    def limit(seconds: float) -> None:
        # On the socket itself: the connection reads its file, past Python's timeouts.
        interval = struct.pack("ll", int(seconds), 0)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            reached.setsockopt(socket.SOL_SOCKET, option, interval)

    try:
        limit(GREETING_S)
        yield connection
        limit(0)  # none
    except BaseException:
        connection.close()
        raise
