"""What is refused before any route sees it."""

import pytest
from serving import HELLO

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
