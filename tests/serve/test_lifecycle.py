"""A server from loading to its end: who asks is always answered, and nothing is left behind."""

import json
import re
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest
import uvloop
from gate import Gate
from raw import connected, read_all, request
from serving import HELLO, events, serving
from waiting import HANG_S, wait_until

from hotloop import LLM
from hotloop.errors import UnsupportedError
from hotloop.serve import served as served_module
from hotloop.serve.lifecycle import HttpServer
from hotloop.serve.settings import ServerSettings

CHAT = "/v1/chat/completions"
LONG = {"messages": HELLO, "max_tokens": 200, "ignore_eos": True}
START = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
SHORT = {"messages": HELLO, "max_tokens": 3, "ignore_eos": True, "seed": 1}


@contextmanager
def asking(server: HttpServer) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=HANG_S) as client:
        yield client


def is_idle(server: HttpServer) -> bool:
    state = server.served.model.service.state()
    return state.n_running == state.n_waiting == 0


def in_background(client: httpx2.Client, body: Any, answers: list[Any]) -> threading.Thread:
    thread = threading.Thread(target=lambda: answers.append(client.post(CHAT, json=body)))
    thread.start()
    return thread


def test_while_the_model_is_loaded_everybody_is_told_to_wait():
    with HttpServer(ServerSettings(port=0)) as server, asking(server) as client:
        for path in ("/health", "/ready"):
            health = client.get(path)
            assert (health.status_code, health.json()) == (503, {"status": "loading"})
        for response in (client.get("/v1/models"), client.post(CHAT, json=SHORT)):
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
            assert "loaded" in response.json()["error"]["message"]
        assert client.get("/metrics").status_code == 200


def test_a_full_queue_is_told_by_429_and_the_others_are_answered(llm, monkeypatch):
    with serving(llm, max_queued=1) as server, asking(server) as client:
        gate, answers = Gate(llm, monkeypatch), []
        threads = [in_background(client, SHORT, answers) for _ in range(4)]  # 3 rows, 1 waits
        service = server.served.model.service
        wait_until(lambda: sum((service.state().n_running, service.state().n_waiting)) == 4, "4")
        refused = client.post(CHAT, json=SHORT)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        gate.open.set()
        for thread in threads:
            thread.join()
        assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("where", ["queued", "in prefill", "decoding"])
def test_who_goes_away_frees_the_row(llm, monkeypatch, where, stream):
    with serving(llm) as server, asking(server) as client:
        expected = client.post(CHAT, json=SHORT).json()["choices"]
        gate, answers = Gate(llm, monkeypatch, n_free=3 if where == "decoding" else 0), []
        before = 3 if where == "queued" else 0  # there are three rows
        threads = [in_background(client, SHORT, answers) for _ in range(before)]
        service = server.served.model.service
        n_steps = service.state().n_steps
        wait_until(lambda: service._n_jobs == before, "the rows are taken")
        body = json.dumps(LONG | {"stream": stream}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as gone:
            gone.sendall(head.encode() + body)
            wait_until(lambda: service._n_jobs == before + 1, "the request is taken")
            if where == "decoding":
                wait_until(lambda: service.state().n_steps > n_steps, "it is decoded")
        counted = 'hotloop:request_cancelled_total{model_name="tiny"} 1.0'
        wait_until(lambda: counted in client.get("/metrics").text, "it is cancelled")
        gate.open.set()
        for thread in threads:
            thread.join()
        assert [answer.json()["choices"] for answer in answers] == [expected] * before
        wait_until(lambda: is_idle(server), "its row is free")
        assert client.post(CHAT, json=SHORT).json()["choices"] == expected


def test_who_goes_away_while_a_prompt_is_scored_frees_its_seat(llm, monkeypatch):
    asked = {"prompt": [[5] * 100] * 2, "echo": True, "logprobs": 1, "max_tokens": 1}
    with serving(llm) as server, asking(server) as client:
        gate = Gate(llm, monkeypatch)
        service = server.served.model.service
        with connected(server.url) as gone:
            gone.sendall(request(asked))
            wait_until(lambda: service._n_jobs == 1, "the first prompt is to be scored")
        counted = 'hotloop:request_cancelled_total{model_name="tiny"} 1.0'
        wait_until(lambda: counted in client.get("/metrics").text, "it is cancelled")
        gate.open.set()
        wait_until(lambda: is_idle(server), "its seat is free, and the other is never scored")
        wait_until(lambda: len(server._server.server_state.tasks) == 0, "nobody waits for it")


def test_a_stream_begins_at_once_and_says_so_while_nothing_comes(llm, monkeypatch):
    with serving(llm, ping_s=0.02) as server, asking(server) as client:
        gate = Gate(llm, monkeypatch)
        with client.stream("POST", CHAT, json=SHORT | {"stream": True}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = response.iter_lines()
            assert next(lines).startswith(":")
            gate.open.set()
            assert sum(line.startswith("data: ") for line in lines) == 3 + 2


def test_health_tells_that_no_iteration_ends(llm, monkeypatch):
    monkeypatch.setattr(served_module, "STALLED_S", 0.05)
    with serving(llm) as server, asking(server) as client:
        assert client.get("/health").json() == client.get("/ready").json() == {"status": "ready"}
        gate, answers = Gate(llm, monkeypatch), []
        thread = in_background(client, SHORT, answers)
        wait_until(lambda: client.get("/health").status_code == 503, "the stall is told")
        assert client.get("/health").json() == {"status": "stalled"}
        gate.open.set()
        thread.join()
        wait_until(lambda: client.get("/health").status_code == 200, "it is healthy again")


def test_when_the_engine_fails_every_stream_is_told_and_the_server_ends(folder, monkeypatch):
    options = {"dtype": "float32", "max_batch_size": 2}
    with LLM(str(folder), **options) as llm, serving(llm) as server, asking(server) as client:
        run, n_left = llm._runner.run, [20]

        def failing(command: Any) -> Any:
            n_left[0] -= 1
            if n_left[0] < 0:
                raise RuntimeError("the device is gone")
            return run(command)

        monkeypatch.setattr(llm._runner, "run", failing)
        *pieces, last = events(client.post(CHAT, json=LONG | {"stream": True}))
        assert pieces
        assert "the device is gone" in last["error"]["message"]
        assert last["error"]["type"] == "server_error"
        whole = client.post(CHAT, json=SHORT)
        assert whole.status_code == 500
        assert "the device is gone" in whole.json()["error"]["message"]
        health = client.get("/health")
        assert health.status_code == 503
        assert health.json()["status"] == "failed"
        assert not server.wait()


def test_a_server_that_stops_lets_answers_end_and_takes_no_more(llm, monkeypatch):
    with serving(llm, drain_s=HANG_S) as server, asking(server) as client:
        gate = Gate(llm, monkeypatch)
        with client.stream("POST", CHAT, json=SHORT | {"stream": True}) as response:
            server.stop()
            assert server.wait()
            closing = threading.Thread(target=server.close)
            closing.start()
            wait_until(lambda: server.served.status == "draining", "it drains")
            gate.open.set()
            response.read()
            *_, done = events(response)
            assert done == "[DONE]"
        closing.join()
        with pytest.raises(httpx2.TransportError):
            client.get("/health")


def test_what_does_not_end_in_time_is_told_so(llm, monkeypatch):
    with serving(llm, drain_s=0.0) as server, asking(server) as client:
        gate = Gate(llm, monkeypatch, n_free=10)
        with client.stream("POST", CHAT, json=LONG | {"stream": True}) as response:
            server.close()
            response.read()
            *_, last = events(response)
        gate.open.set()
        assert "closing" in last["error"]["message"]


def raw(server: HttpServer, sent: bytes = b"", *, then: bytes = b"") -> bytes:
    """Returns a server's answer to bytes, until it closes the connection.

    ``then`` is sent again and again until the answer begins.
    """
    with connected(server.url) as connection:
        connection.sendall(sent)
        while then and not select.select([connection], [], [], 0.02)[0]:
            connection.sendall(then)
        return read_all(connection)


def test_clients_have_a_time_to_send_headers_and_body(llm):
    with serving(llm, headers_s=1.0, body_s=1.0) as server, asking(server) as client:
        assert raw(server) == b"", "a connection without a request is closed"
        for sent in (START, START + b"Content-Length: 100\r\n\r\n{"):
            answer = raw(server, sent)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"request_timeout" in answer
        for sent, then in ((START, b"x: y\r\n"), (START + b"Content-Length: 9999\r\n\r\n", b" ")):
            answer = raw(server, sent, then=then)  # which never stops for long
            assert answer.startswith(b"HTTP/1.1 408 ")
        assert client.get("/health").status_code == 200


def test_connections_are_limited(llm):
    with serving(llm, max_connections=2) as server:
        with asking(server) as client, asking(server) as another, asking(server) as third:
            assert client.get("/health").status_code == another.get("/health").status_code == 200
            assert third.get("/health").status_code == 503
        with asking(server) as client:
            wait_until(lambda: client.get("/health").status_code == 200, "there is room again")


def test_a_server_that_cannot_start_says_why(monkeypatch):
    def refuse() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(uvloop, "new_event_loop", refuse)
    server = HttpServer(ServerSettings(port=0, name="tiny"))
    with pytest.raises(UnsupportedError, match=r"event loop: .*Too many open files"), server:
        pass


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (START + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (START + b"X: " + b"x" * 20_000, 431),
    ],
)
def test_an_invalid_http_request_is_answered_in_the_form_of_the_api(llm, sent, status):
    with serving(llm) as server:
        head, _, body = raw(server, sent).partition(b"\r\n\r\n")
        assert head.startswith(f"HTTP/1.1 {status} ".encode())
        assert re.search(rb"\r\nx-request-id: [0-9a-f]{24}(\r\n|$)", head)
        assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_bodies_are_limited(llm):
    with serving(llm, max_body_bytes=1000, max_depth=8) as server, asking(server) as client:
        for body in (b"x" * 1001, iter([b"x" * 600, b"x" * 600])):
            response = client.post("/v1/completions", content=body)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "request_too_large"
        for text in ("[" * 500, '{"prompt": ' + "[" * 20 + "]" * 20 + "}", '{"prompt": NaN}'):
            response = client.post("/v1/completions", content=text.encode())
            assert response.status_code == 400
            assert response.json()["error"]["code"] == "invalid_json"


def test_pieces_are_sent_at_once_and_not_held_back_for_an_acknowledgement(llm):
    with serving(llm) as server, asking(server) as client:
        client.get("/health")
        (connection,) = server._server.server_state.connections
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
