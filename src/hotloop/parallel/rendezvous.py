"""Rendezvous of ranks through a key-value store that all of them can reach.

Ranks that the caller starts use a store that the caller serves on the loopback interface, at a port
that the system picks. Ranks that torchrun starts (or anything else that sets ``RANK``,
``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``) use torchrun's store. In that
case the process with rank 0 is the caller, and starts rank 0 as another process on its machine; the
other processes become the other ranks, and connect to the caller, whose address and secret are in
the store.
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
"""Time limit for the ranks of torchrun to connect to the caller."""

HANDSHAKE_S = 30
"""Time limit of each message of the handshake."""

TICK_S = 0.1
"""Interval at which the caller collects ranks that have connected."""

_CALLER = "caller"


@dataclass(frozen=True, kw_only=True)
class Address:
    """Address of a store.

    Attributes:
        host: Host name or IP address.
        port: Port.
        prefix: Prefix of hotloop's keys.
    """

    host: str
    port: int
    prefix: str = "hotloop"

    def connect(self) -> dist.Store:
        """Connects to the store."""
        store = dist.TCPStore(self.host, self.port, is_master=False)
        return dist.PrefixStore(self.prefix, store)


def serve_store() -> tuple[dist.Store, Address]:
    """Serves a store for ranks on this machine, as long as the returned store is referenced."""
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return store, Address(host=LOOPBACK, port=port)


@dataclass(frozen=True, kw_only=True)
class Torchrun:
    """The environment that torchrun sets for a process.

    Attributes:
        rank: Number of this process.
        world_size: The number of processes.
        local_rank: Number of this process among those on this machine.
        local_world_size: The number of processes on this machine.
        address: Address of torchrun's store.
        serves: Whether this process must serve the store.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: Address
    serves: bool

    @classmethod
    def environment(cls) -> Torchrun | None:
        """Reads the environment; returns None if torchrun did not start this process.

        Raises:
            ConfigError: A variable is not a whole number.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        if not all(name in os.environ for name in (*names, "MASTER_ADDR")):
            return None
        try:
            rank, world_size, local_rank, port = (int(os.environ[name]) for name in names)
            local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        except ValueError as error:
            variables = ", ".join((*names, "LOCAL_WORLD_SIZE"))
            raise ConfigError(
                f"the environment variables {variables} must be whole numbers, as torchrun sets "
                f"them ({error}): start hotloop by torchrun, or unset them."
            ) from error
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
        """Connects to the store, or serves it."""
        if not self.serves:
            return self.address.connect()
        store = dist.TCPStore(
            self.address.host, self.address.port, is_master=True, wait_for_workers=False
        )
        return dist.PrefixStore(self.address.prefix, store)

    def accept_ranks(self, store: dist.Store) -> list[Rank]:
        """Waits for the other ranks to connect, and returns them in order.

        Raises:
            RankError: A rank did not connect in time.
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
                    # In a thread: a silent connection must not delay the others.
                    handshake = (reached, secret, arrived)
                    threading.Thread(target=_accept, args=handshake, daemon=True).start()
                while not arrived.empty():
                    rank = arrived.get()
                    if rank.index in missing:
                        missing.remove(rank.index)
                        ranks.append(rank)
                    else:
                        rank.connection.close()
                if missing and time.monotonic() > deadline:
                    end_ranks(ranks)
                    problem = f"did not connect within {CALL_TIMEOUT_S:g} s"
                    raise RankError(min(missing), self.world_size, problem)
        return sorted(ranks, key=lambda rank: rank.index)

    def call(self, store: dist.Store) -> Connection:
        """Connects this rank to the caller.

        Raises:
            RankError: The caller cannot be reached, or does not know the secret.
        """
        host, port, secret = json.loads(store.get(_CALLER))
        try:
            with (
                socket.create_connection((host, port), timeout=HANDSHAKE_S) as reached,
                _limited(reached) as connection,
            ):
                answer_challenge(connection, bytes.fromhex(secret))
                deliver_challenge(connection, bytes.fromhex(secret))
                send(connection, self.rank)
                return connection
        except (OSError, EOFError, AuthenticationError) as error:
            problem = f"could not reach rank 0's process at {host}:{port}: {error}"
            raise RankError(self.rank, self.world_size, problem) from error


def _accept(reached: socket.socket, secret: bytes, arrived: queue.SimpleQueue[Rank]) -> None:
    """Authenticates a connection, and queues its rank; drops a connection that is not a rank's."""
    with reached, suppress(OSError, EOFError, AuthenticationError):
        with _limited(reached) as connection:
            deliver_challenge(connection, secret)
            answer_challenge(connection, secret)
            index = receive(connection)
        arrived.put(Rank(index, connection))


@contextmanager
def _limited(reached: socket.socket) -> Generator[Connection]:
    """Limits the time of each message within the block; closes the connection after an error."""
    reached.settimeout(None)
    connection = Connection(os.dup(reached.fileno()))

    def limit(seconds: float) -> None:
        # Set on the socket: Connection reads its file descriptor, past Python's timeouts.
        interval = struct.pack("ll", int(seconds), 0)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            reached.setsockopt(socket.SOL_SOCKET, option, interval)

    try:
        limit(HANDSHAKE_S)
        yield connection
        limit(0)  # no limit
    except BaseException:
        connection.close()
        raise
