"""Streams that the service's thread writes itself: what arrives is what the event loop would send.

A test stops the engine until a stream has begun, so that all of its pieces come after that.
"""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from gate import Gate
from raw import connected, read_all, request, status_of
from serving import events, serving
from waiting import wait_until

import hotloop.engine.service
from hotloop import LLM, SamplingParams
from hotloop.serve.answers import _Body
from hotloop.serve.completions import CompletionFormatter
from hotloop.serve.lifecycle import HttpServer
from hotloop.serve.protocol import DIRECT_BODY, DirectBody
from hotloop.serve.settings import ServerSettings

N = 40
ASKED = {"prompt": [5, 6, 7], "max_tokens": N, "temperature": 0, "ignore_eos": True}
STREAMED = ASKED | {"stream": True, "return_token_ids": True}


def opened(gate: Gate, server: HttpServer) -> None:
    """Opens the gate once all streams have begun, and their beginnings have been sent."""

    def begun() -> bool:
        tickets = list(server.served.service._tickets.values())
        connections = list(server._server.server_state.connections)
        unsent = sum(each.transport.get_write_buffer_size() for each in connections)
        return bool(tickets) and all(ticket._receive for ticket in tickets) and not unsent

    wait_until(begun, "a stream has begun")
    gate.open.set()


@contextmanager
def wake_ups(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts the clients of each wake-up of the event loop."""
    found, wake = [], hotloop.engine.service._set
    with monkeypatch.context() as patch:
        counted = lambda events: found.append(len(events)) or wake(events)  # noqa: E731
        patch.setattr(hotloop.engine.service, "_set", counted)
        yield found


def token_ids(response: httpx2.Response) -> list[int]:
    *chunks, done = events(response)
    assert done == "[DONE]"
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]].count("length") == 1
    return [i for c in chunks for choice in c["choices"] for i in choice.get("token_ids", ())]


@pytest.fixture(scope="module")
def answer(llm: LLM) -> list[int]:
    """The answer's tokens by the engine alone."""
    params = SamplingParams(max_new_tokens=N, temperature=0.0, ignore_eos=True)
    return list(llm.generate([[5, 6, 7]], params)[0].token_ids)


def test_a_lone_stream_wakes_the_event_loop_for_its_end_alone(llm, answer, monkeypatch):
    with serving(llm) as server, wake_ups(monkeypatch) as found:
        gate = Gate(llm, monkeypatch)
        threading.Thread(target=opened, args=(gate, server)).start()
        response = httpx2.post(f"{server.url}/v1/completions", json=STREAMED, timeout=600)
        assert token_ids(response) == answer
        assert found == [1]


def test_of_several_streams_the_event_loop_is_woken(llm, answer, monkeypatch):
    monkeypatch.setattr(hotloop.engine.service, "MAX_RECEIVERS", 0)
    with serving(llm) as server, wake_ups(monkeypatch) as found:
        response = httpx2.post(f"{server.url}/v1/completions", json=STREAMED, timeout=600)
        assert token_ids(response) == answer
        assert len(found) > 1


def test_a_client_that_falls_behind_gets_every_piece_in_order(llm, answer, monkeypatch):
    with serving(llm) as server:
        server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        gate = Gate(llm, monkeypatch)
        with connected(server.url, receive_bytes=4096) as slow:
            asked = STREAMED | {"logprobs": 20}
            slow.sendall(request(asked, fields="Connection: close\r\n"))
            opened(gate, server)
            wait_until(lambda: server.served.service.state().n_running == 0, "all is generated")
            said = read_all(slow)
    response = httpx2.Response(200, content=dechunked(said))
    assert token_ids(response) == answer


def dechunked(said: bytes) -> bytes:
    """The body of a response in chunks, each of which is whole."""
    assert status_of(said) == 200
    _, _, rest = said.partition(b"\r\n\r\n")
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        n = int(size, 16)
        assert rest[n : n + 2] == b"\r\n"
        body, rest = body + rest[:n], rest[n + 2 :]
    assert n == 0, "the last chunk is empty"
    return body


def test_a_body_that_is_not_chunked_is_written_by_the_event_loop(llm, answer, monkeypatch):
    with serving(llm) as server, connected(server.url) as connection:
        gate = Gate(llm, monkeypatch)
        connection.sendall(request(STREAMED).replace(b"HTTP/1.1", b"HTTP/1.0"))
        opened(gate, server)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert token_ids(httpx2.Response(200, content=body)) == answer


def test_a_fault_while_an_event_is_made_ends_that_stream_alone(llm, answer, monkeypatch):
    make, n_made = CompletionFormatter.events, []

    def faulty(self: CompletionFormatter, *args: Any) -> str:
        n_made.append(threading.current_thread().name)
        if len(n_made) == 3:
            raise ZeroDivisionError
        return make(self, *args)

    with serving(llm) as server:
        with monkeypatch.context() as patch:
            patch.setattr(CompletionFormatter, "events", faulty)
            gate = Gate(llm, monkeypatch)
            threading.Thread(target=opened, args=(gate, server)).start()
            broken = httpx2.post(f"{server.url}/v1/completions", json=STREAMED, timeout=600)
        assert n_made == ["hotloop-service"] * 3
        assert events(broken)[-1]["error"]["message"]
        response = httpx2.post(f"{server.url}/v1/completions", json=STREAMED, timeout=600)
        assert token_ids(response) == answer


def test_a_fault_in_the_services_thread_is_left_to_the_stream_by_comments():
    """A comment may fall due between the fault and the wake-up of the stream, which raises it."""
    sent: list[bytes] = []
    pass_on: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message["body"])

    def faulty() -> str:
        raise ZeroDivisionError

    async def stream() -> None:
        direct = SimpleNamespace(last_write_s=0.0, n_bytes=0, write=lambda make: make())
        direct.flush = direct.close = lambda: None
        body = _Body(ServerSettings(ping_s=0.0), send, {DIRECT_BODY: lambda: direct})
        ticket: Any = SimpleNamespace(set_receiver=pass_on.append)
        with body.written_by_service(ticket, faulty):
            assert pass_on[0]() is False, "the stream is woken"
            async with body:
                for _ in range(100):  # a comment is due in each turn
                    await asyncio.sleep(0)
                assert not sent
                with pytest.raises(ZeroDivisionError):
                    await body.write(lambda: "more")
                while not sent:
                    await asyncio.sleep(0)
        assert set(sent) == {b": waiting\n\n"}

    asyncio.run(stream())


class Transport:
    """A transport whose event loop writes when a test says so."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.waiting, self.closing = b"", False

    def get_extra_info(self, _: str) -> socket.socket:
        return self._connection

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return len(self.waiting)

    def write(self, data: bytes) -> None:
        assert not self.closing, "uvloop refuses to write then"
        self.waiting += data


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        yield ours, theirs


def test_what_the_socket_does_not_take_is_left_to_the_event_loop(pair):
    ours, theirs = pair
    transport = Transport(ours)
    body = DirectBody(transport)  # pyrefly: ignore
    assert body.write(lambda: "")
    assert body.write(lambda: "abc")
    assert theirs.recv(100) == b"3\r\nabc\r\n"
    large = "x" * 2**22
    assert not body.write(lambda: large)
    body_waits(body)
    body.flush()
    body_waits(body)  # the event loop has not written it yet
    taken = b""
    while len(taken) < len(large) + 10 - len(transport.waiting):
        taken += theirs.recv(2**20)
    assert taken + transport.waiting == b"400000\r\n" + large.encode() + b"\r\n"
    transport.waiting = b""
    assert body.write(lambda: "é")
    assert theirs.recv(100) == b"2\r\n\xc3\xa9\r\n"
    assert body.n_bytes == 3 + len(large) + 2
    transport.closing = True
    body_waits(body)
    body.close()


def body_waits(body: DirectBody) -> None:
    """Expects that it neither makes nor writes a part now."""
    made = []
    assert not body.write(lambda: made.append(1) or "more")
    assert not made


def test_a_connection_that_broke_is_left_to_the_event_loop(pair):
    ours, theirs = pair
    transport = Transport(ours)
    body = DirectBody(transport)  # pyrefly: ignore
    theirs.close()
    assert not body.write(lambda: "abc")
    body_waits(body)
    transport.closing = True  # as the event loop finds out
    body.flush()
    assert not transport.waiting
    body.close()
