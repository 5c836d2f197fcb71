"""Requests that are refused before any route sees them."""

import pytest
from serving import HELLO
from starlette.applications import Starlette
from starlette.datastructures import Headers

from hotloop.serve.errors import ApiError
from hotloop.serve.gate import Gate, is_loopback
from hotloop.serve.settings import ServerSettings

ASKED = {"messages": HELLO, "max_tokens": 1}
PAGE = "http://page.example"


def test_without_origins_there_is_no_cors(client):
    answer = client.post("/v1/chat/completions", json=ASKED, headers={"Origin": PAGE})
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:80", 200),
        ("LOCALHOST:1", 200),
        ("rebound.example", 403),
        ("localhost.rebound.example", 403),
    ],
)
def test_on_a_loopback_address_other_names_are_refused(client, host, status):
    assert client.get("/health", headers={"Host": host}).status_code == status


def test_headers_are_limited(client):
    many = {f"x-{i}": "1" for i in range(101)}
    assert client.get("/health", headers=many).status_code == 431
    long = client.get("/health", headers={"x": "1" * 2**14})
    assert long.status_code == 431
    assert long.json()["error"]["type"] == "invalid_request_error"


def test_unknown_routes_and_methods_are_errors_in_the_shape_of_the_api(client):
    for response, status in (
        (client.post("/v1/embeddings", json={}), 404),
        (client.get("/v1/completions"), 405),
        (client.get("/v1/models/other"), 404),
    ):
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    doubled = client.post("/v1/v1/completions", json={}).json()["error"]["message"]
    assert "no route POST /v1/v1/completions" in doubled


@pytest.mark.parametrize("given", ["My.Example", "my.example:8000", "[::2]:80", "::2"])
def test_an_allowed_host_is_a_name_however_it_is_written(given):
    gate = Gate(Starlette(), ServerSettings(allowed_hosts=(given,)))
    host = "[::2]:9" if "::2" in given else "my.example:9"
    gate._check_host(Headers({"host": host}))
    with pytest.raises(ApiError, match="does not accept the host name"):
        gate._check_host(Headers({"host": "other.example"}))


def test_a_host_name_is_a_loopback_in_any_case():
    assert is_loopback("LocalHost")
    assert not is_loopback("localhost.example")
