"""Hostile and unlucky clients, and engines that fail: nothing of them is left, and nobody notices.

After each of these tests no row is in use, there is no thread, process, connection or object of a
request left, and the next answer is the same, bit for bit.
"""

import gc
import itertools
import json
import logging
import socket
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import psutil
import pytest
from raw import connected, error_of, read_all, request, reset_when_closed, status_of
from serving import events, serving
from waiting import wait_until

from hotloop import LLM
from hotloop.serve.lifecycle import HttpServer
from hotloop.serve.protocol import LimitedProtocol

ASKED = {"prompt": [5, 6, 7], "max_tokens": 40, "temperature": 0, "ignore_eos": True, "logprobs": 2}
LONG = ASKED | {"max_tokens": 300, "stream": True}
MIB = 2**20

Choice = dict[str, Any]


def answer(url: str) -> Choice:
    """An answer and its log-probabilities."""
    response = httpx2.post(f"{url}/v1/completions", json=ASKED, timeout=600)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


@pytest.fixture(scope="module")
def first(llm: LLM) -> Choice:
    """The answer of a server that nobody has disturbed."""
    with serving(llm) as server:
        return answer(server.url)


def left() -> Counter[str]:
    """Counts what requests and servers can leave behind."""
    gc.collect()
    modules = ("hotloop.serve", "hotloop.engine.service", "hotloop.engine.request", "uvicorn")
    found = Counter(
        f"{type(each).__module__}.{type(each).__qualname__}"
        for each in gc.get_objects()
        if str(type(each).__module__).startswith(modules)
    )
    process = psutil.Process()
    found.update(f"thread {thread.name}" for thread in threading.enumerate())
    found.update(f"process {child.pid}" for child in process.children(recursive=True))
    found["files"] = process.num_fds()
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(llm: LLM, first: Choice, request: pytest.FixtureRequest) -> Iterator[None]:
    before, n_failed = left(), request.session.testsfailed
    yield
    if request.session.testsfailed > n_failed:
        return  # its traceback holds what the test held
    wait_until(lambda: not left() - before, f"{left() - before} are gone")
    assert llm._scheduler.idle
    with serving(llm) as server:
        assert answer(server.url) == first


def expect_as_before(server: HttpServer, first: Choice) -> None:
    """Waits until nobody is served, and compares the next answer."""
    state = server.served.model.service.state
    wait_until(lambda: state().n_running == state().n_waiting == 0, "rows are free")
    wait_until(lambda: not server._server.server_state.connections, "connections have ended")
    assert answer(server.url) == first


# ------------------------------------------------------------------------------ clients that go


def drop(url: str, i: int) -> None:
    """Connects, gets as far as ``i`` says, and goes, by a reset or in peace."""
    bytes_ = request(LONG | {"prompt": [5 + i % 7] * (1 + i), "stream": i % 3 > 0})
    sent = (0, 30, len(bytes_) - 20, len(bytes_), len(bytes_))[i % 5]
    with connected(url) as connection:
        if i % 2:
            reset_when_closed(connection)
        connection.sendall(bytes_[:sent])
        if i % 5 == 4 and i % 3 > 0:
            connection.recv(1000)


def test_200_clients_that_connect_and_drop(llm, first):
    with serving(llm, max_queued=200) as server:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda i: drop(server.url, i), range(200)))
        expect_as_before(server, first)


def test_clients_that_have_gone_leave_no_memory(llm, first):
    big = request(b'{"prompt": "' + b"x" * 2 * MIB + b'", "n": 0}')
    sizes = []
    with serving(llm, max_queued=200) as server:

        def come_and_go() -> None:
            for i in range(60):
                drop(server.url, i)
            for sent in (big, big[:-MIB], *(sent for sent, _ in NO_REQUESTS)):
                with connected(server.url) as connection:
                    connection.sendall(sent)
            expect_as_before(server, first)

        come_and_go()  # which fills caches
        tracemalloc.start()
        try:
            for _ in range(4):
                come_and_go()
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
    grown = min(after - before for before, after in itertools.pairwise(sizes))
    assert grown < 72 * 500, f"less than each client's request: {sizes}"


def test_who_does_not_read_is_dropped_and_the_others_do_not_wait_for_it(llm, first):
    with serving(llm, send_s=0.5) as server:
        server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with connected(server.url, receive_bytes=4096) as stalled:
            stalled.sendall(request(LONG | {"logprobs": 20}))
            for _ in range(3):  # beside another row float32 is rounded differently
                assert answer(server.url)["text"] == first["text"]
            expect_as_before(server, first)  # it has no connection any more
            unread = read_all(stalled)
        assert status_of(unread) == 200
        assert b"[DONE]" not in unread


def test_a_connection_that_is_idle_or_whose_whole_answer_is_not_read_ends(llm, first):
    with serving(llm, keep_alive_s=1) as server:
        server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with connected(server.url) as idle, connected(server.url, receive_bytes=4096) as stalled:
            idle.sendall(request(ASKED))
            assert status_of(read_all(idle)) == 200, "and then it is closed"
            stalled.sendall(request(LONG | {"stream": False, "logprobs": 20}))
            expect_as_before(server, first)
            assert not read_all(stalled).endswith(b"}")


@pytest.mark.parametrize("stream", [True, False])
def test_who_ends_its_side_of_a_connection_has_disconnected(llm, first, stream):
    with serving(llm) as server, connected(server.url) as connection:
        state = server.served.model.service.state
        n_steps = state().n_steps
        connection.sendall(request(LONG | {"stream": stream}))
        wait_until(lambda: state().n_steps > n_steps, "it is decoded")
        connection.shutdown(socket.SHUT_WR)
        told = read_all(connection)
        expect_as_before(server, first)
        cancelled = 'hotloop:request_cancelled_total{model_name="tiny"} 1.0'
        assert cancelled in httpx2.get(f"{server.url}/metrics", timeout=600).text
    assert b"[DONE]" not in told


# ------------------------------------------------------------------------------ bytes


def test_a_request_may_come_byte_by_byte(llm, first, monkeypatch):
    receive = LimitedProtocol.data_received

    def bytewise(self: LimitedProtocol, data: bytes) -> None:
        """What was sent one by one can arrive together."""
        for byte in data:
            receive(self, bytes([byte]))

    monkeypatch.setattr(LimitedProtocol, "data_received", bytewise)
    with serving(llm) as server, connected(server.url) as connection:
        for byte in request(ASKED, fields="Connection: close\r\n"):
            connection.sendall(bytes([byte]))
        _, _, body = read_all(connection).partition(b"\r\n\r\n")
        assert json.loads(body)["choices"] == [first]


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
NO_REQUESTS = [
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), 400),  # of TLS
    (b"GET\r\n\r\n", 400),
    (request(b"{}", fields="Content-Length: 3\r\n"), 400),
    (request(b"{}", fields="Content-Length: -1\r\n"), 400),
    (request(b"{}", fields="Transfer-Encoding: gzip\r\n"), 501),
    (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
    (b"POST /v1/completions HTTP/1.1\r\n\r\n", 400),
    (CHUNKED + b"fffffffffffffffffffff\r\n", 400),
    (CHUNKED + b"-1\r\n", 400),
    (CHUNKED.replace(b"localhost", b"elsewhere") + b"-1\r\n", 400),  # refused twice, told once
]


def test_an_invalid_http_request_is_refused_and_its_connection_ends(llm, caplog):
    with serving(llm) as server:
        for bytes_, status in NO_REQUESTS:
            with connected(server.url) as connection:
                connection.sendall(bytes_)
                told = read_all(connection)
            assert status_of(told) == status, bytes_
            assert error_of(told)["type"] == "invalid_request_error"
            assert told.count(b"HTTP/1.1") == 1
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert not errors, "a client's fault is not traced as one of the server"


HOSTILE = [
    (b'{"prompt": "' + b"x" * 10 * MIB + b'"}', 413),
    (b"[" * 10**6, 400),
    (b'{"prompt":' * 10**5, 400),
    (b'{"logit_bias":' + b"[" * 100 + b"]" * 100 + b"}", 400),
    (b'{"prompt": "\xff"}', 400),
    (b'{"prompt": "\xed\xa0\x80"}', 400),  # a surrogate in UTF-8
    (b'{"prompt": "\\ud800"}', 400),
    (b'{"prompt": "x", "stop": "\\udfff\\ud800"}', 400),
    (b'{"prompt": "x", "model": "\\ud800"}', 400),
    (b'{"prompt": "x", "max_tokens": 1' + b"0" * 5000 + b"}", 400),
    (b'{"prompt": [' + b"9" * 5000 + b"]}", 400),
    (b'{"prompt": [300]}', 400),
    (b'{"prompt": [-1]}', 400),
    (b'{"prompt": [1.5]}', 400),
    (b'{"prompt": [true]}', 400),
    (b'{"prompt": []}', 400),
    (b'{"prompt": [[]]}', 400),
    (b'{"prompt": "x", "temperature": NaN}', 400),
    (b'{"prompt": "x", "temperature": 1e999}', 400),
    (b'{"prompt": "x", "n": 1e9}', 400),
    (b"null", 400),
    (b"{", 400),
    (b"", 400),
]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_hostile_body_is_refused_and_the_engine_does_not_notice(llm, chunked):
    with serving(llm) as server, httpx2.Client(base_url=server.url, timeout=600) as client:
        for body, status in HOSTILE:
            content = iter([body[:9], body[9:]]) if chunked else body
            response = client.post("/v1/completions", content=content)
            assert response.status_code == status, (body[:40], response.text)
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_half_a_character_in_a_message_is_refused(llm):
    with serving(llm) as server:
        for content in (b'"\\ud800"', b'[{"type": "text", "text": "\\udc00"}]'):
            body = b'{"messages": [{"role": "user", "content": ' + content + b"}]}"
            response = httpx2.post(f"{server.url}/v1/chat/completions", content=body, timeout=600)
            assert response.status_code == 400, response.text


# ------------------------------------------------------------------------------ engines that fail


def test_an_exception_in_mid_stream_ends_every_stream_with_an_error(llm, monkeypatch):
    with serving(llm) as server, ThreadPoolExecutor(4) as pool:
        state, run, n_calls = server.served.model.service.state, llm._runner.run, itertools.count()

        def n_requests() -> int:
            return state().n_running + state().n_waiting

        def broken(command: Any) -> Any:
            """Begins once all have come, and fails when three answers have begun."""
            wait_until(lambda: n_requests() == 4, "four have come")
            if next(n_calls) < 40:
                return run(command)
            assert state().n_running == 3
            raise RuntimeError("the device is lost")

        def ask(i: int) -> httpx2.Response:
            body = LONG | {"prompt": [5, i], "stream": i > 0}
            return httpx2.post(f"{server.url}/v1/completions", json=body, timeout=600)

        monkeypatch.setattr(llm._runner, "run", broken)
        streams = [pool.submit(ask, i) for i in (1, 2, 3)]
        wait_until(lambda: n_requests() == 3, "the streams have come")
        answers = [pool.submit(ask, 0), *streams]
        responses = [each.result() for each in answers]
        for response in responses[1:]:
            assert response.status_code == 200
            *_, last = events(response)
            assert "the device is lost" in last["error"]["message"]
        assert responses[0].status_code == 500
        health = httpx2.get(f"{server.url}/health", timeout=600)
        assert health.status_code == 503
        assert "the device is lost" in health.text
        refused = httpx2.post(f"{server.url}/v1/completions", json=ASKED, timeout=600)
        assert refused.status_code in (500, 503)
        assert server.wait() is False, "the command ends, and not with success"
        monkeypatch.setattr(llm._runner, "run", run)
