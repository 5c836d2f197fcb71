"""Only ranks are let in, and nobody who says nothing keeps them waiting."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch.distributed as dist

from hotloop.errors import ConfigError, RankError
from hotloop.parallel.link import receive, send
from hotloop.parallel.rendezvous import LOOPBACK, Address, Torchrun


def torchrun(rank: int) -> Torchrun:
    return Torchrun(
        rank=rank,
        world_size=3,
        local_rank=rank,
        local_world_size=3,
        address=Address(host=LOOPBACK, port=0),
        serves=False,
    )


@pytest.mark.parametrize("name", ["RANK", "MASTER_PORT", "LOCAL_WORLD_SIZE"])
def test_a_variable_that_is_no_number_is_refused_with_the_names_of_all(name, monkeypatch):
    numbers = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"), "1")
    for variable, value in (numbers | {"MASTER_ADDR": LOOPBACK, name: "two"}).items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=r"LOCAL_WORLD_SIZE must be whole numbers.*'two'"):
        Torchrun.environment()


def where(store: dist.Store) -> tuple[str, int]:
    """Waits for the caller to listen; returns its address."""
    host, port, _ = json.loads(store.get("caller"))
    return host, port


@pytest.mark.parametrize("said", [b"", b"\0", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 8])
def test_ranks_connect_though_strangers_connect_too(said):
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as pool, ExitStack() as strangers:
        accepted = pool.submit(torchrun(0).accept_ranks, store)
        for _ in range(3):
            stranger = strangers.enter_context(socket.create_connection(where(store)))
            stranger.sendall(said)
        calls = [pool.submit(torchrun(rank).call, store) for rank in (2, 1)]
        ranks, (two, one) = accepted.result(), [call.result() for call in calls]
    assert [rank.index for rank in ranks] == [1, 2]
    for rank, own in zip(ranks, (one, two), strict=True):
        send(rank.connection, "for you")
        assert receive(own) == "for you"
        rank.close()
        own.close()


def test_a_missing_rank_is_named_though_a_stranger_connects(monkeypatch):
    monkeypatch.setattr("hotloop.parallel.rendezvous.CALL_TIMEOUT_S", 0.3)
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        accepted = pool.submit(torchrun(0).accept_ranks, store)
        with socket.create_connection(where(store)):
            pool.submit(torchrun(1).call, store).result()
            with pytest.raises(RankError, match=r"rank 2 of 3 did not connect within 0\.3 s"):
                accepted.result()


def test_a_caller_without_the_secret_is_an_error(monkeypatch):
    monkeypatch.setattr("hotloop.parallel.rendezvous.HANDSHAKE_S", 1)
    store = dist.HashStore()
    with socket.create_server((LOOPBACK, 0)) as silent:
        store.set("caller", json.dumps((*silent.getsockname(), "00")))
        with pytest.raises(RankError, match="could not reach rank 0's process"):
            torchrun(1).call(store)
