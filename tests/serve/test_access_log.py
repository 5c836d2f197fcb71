"""The access log: a line about each request, without anything that was said in it."""

import re
from collections.abc import Iterator

import httpx2
import pytest
from serving import HELLO
from waiting import wait_until

from hotloop import LLM
from hotloop.engine.service import Service
from hotloop.serve.lifecycle import HttpServer
from hotloop.serve.settings import ServerSettings

LINE = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ 127\.0\.0\.1 (?P<method>[A-Z]+) (?P<path>\S+) "
    r"(?P<status>\d{3}|-) \d+\.\d{3}s (?P<bytes>\d+)B (?P<id>\S+)"
)
BODY = {"messages": HELLO, "max_tokens": 3}


@pytest.fixture
def logged(llm: LLM) -> Iterator[tuple[httpx2.Client, list[str]]]:
    """A client of a server with keys, and the lines of its log once the server has closed."""
    lines: list[str] = []
    settings = ServerSettings(port=0, name="tiny", drain_s=5.0, keys=("secret-key",))
    with HttpServer(settings, lines.append) as server, Service(llm, loop=server.loop) as service:
        server.attach(service)
        key = {"Authorization": "Bearer secret-key"}
        with httpx2.Client(base_url=server.url, timeout=600, headers=key) as client:
            yield client, lines
        server.close()


def written(lines: list[str], n: int) -> list[str]:
    """The lines, once there are ``n``: an answer may be read before its line is written."""
    wait_until(lambda: len(lines) >= n, f"{n} lines")
    return lines


def test_each_request_is_a_line_with_its_id_and_nothing_that_was_said(logged):
    client, lines = logged
    answers = [
        client.post("/v1/chat/completions", json=BODY),
        client.post("/v1/chat/completions", json=BODY | {"stream": True}),
        client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 2, "n": 0}),
        client.get("/v1/models?Hello=secret", headers={"x-request-id": "mine-7"}),
        client.get("/v1/models", headers={"Authorization": "Bearer wrong"}),
        client.get("/no%0Awhere%20200%20forged"),
    ]
    found = [LINE.fullmatch(line) for line in written(lines, len(answers))]
    assert all(found), lines
    assert [line["status"] for line in found if line] == [str(a.status_code) for a in answers]
    assert [line["id"] for line in found if line] == [a.headers["x-request-id"] for a in answers]
    assert [int(line["bytes"]) for line in found if line] == [len(a.content) for a in answers]
    assert [a.status_code for a in answers] == [200, 200, 400, 200, 401, 404]
    assert answers[3].headers["x-request-id"] == "mine-7"
    assert "Hello" not in (said := "\n".join(lines))
    assert "secret" not in said
    assert "Bearer" not in said


def test_an_id_that_could_not_stand_in_a_line_is_replaced(logged):
    client, lines = logged
    for given in ("a b", "x" * 200, "é", ""):
        headers = {"x-request-id": given.encode()}
        response = client.get("/health", headers=headers)
        assert re.fullmatch(r"[0-9a-f]{24}", response.headers["x-request-id"])
    assert len(written(lines, 4)) == 4


def test_a_fault_of_ours_has_an_id_and_a_line(logged, monkeypatch):
    client, lines = logged

    def fails(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("hotloop.serve.models._model", fails)
    response = client.get("/v1/models")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    (line,) = map(LINE.fullmatch, written(lines, 1))
    assert line is not None
    assert (line["status"], line["id"]) == ("500", response.headers["x-request-id"])
