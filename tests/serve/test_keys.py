"""Who may ask: keys, and the pages of other origins."""

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from serving import HELLO, serving

from hotloop.serve.app import create_app
from hotloop.serve.lifecycle import HttpServer
from hotloop.serve.served import ServedModel
from hotloop.serve.settings import ServerSettings

ASKED = {"messages": HELLO, "max_tokens": 1}
KEYS = ("first", "zweiter Schlüssel")
PAGE = "http://page.example"


@pytest.fixture(scope="module")
def guarded(llm) -> Iterator[httpx2.Client]:
    """A server with two keys, for one page's origin."""
    with (
        serving(llm, keys=KEYS, cors_origins=(PAGE,)) as server,
        httpx2.Client(base_url=server.url, timeout=600) as client,
    ):
        yield client


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer first"},
        {"Authorization": "bearer  first"},
        {"Authorization": "Bearer zweiter Schlüssel".encode()},
        {"api-key": "first"},
        {"x-api-key": "first"},
    ],
)
def test_a_key_opens_every_route(guarded, headers):
    assert guarded.get("/v1/models", headers=headers).status_code == 200
    assert guarded.post("/v1/chat/completions", json=ASKED, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer firs"}, {"Authorization": "Basic first"}]
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/tokenize", "/nothing"])
def test_without_a_key_nothing_is_open_but_health(guarded, headers, path):
    response = guarded.get(path, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert guarded.get("/health", headers=headers).status_code == 200


def test_every_route_but_the_page_and_health_needs_a_key(guarded):
    app: Any = create_app(ServedModel(ServerSettings()))
    paths = {route.path.replace("{name:path}", "tiny") for route in app._app.routes}
    is_open = {path for path in paths if guarded.get(path).status_code != 401}
    assert is_open == {"/", "/health", "/ready"}
    assert len(paths) == 12


def test_prefixes_are_not_shared_between_keys(guarded):
    asked = ASKED | {"messages": [{"role": "user", "content": "word " * 20}]}

    def cached_tokens(key: str) -> int:
        headers = {"api-key": key.encode()}
        usage = guarded.post("/v1/chat/completions", json=asked, headers=headers).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert [cached_tokens(key) for key in (KEYS[0], KEYS[1])] == [0, 0]
    assert cached_tokens(KEYS[0]) >= 32


def test_a_page_of_an_allowed_origin_may_ask_and_no_other(guarded):
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    for origin, allowed in ((PAGE, True), ("http://other.example", False)):
        headers = {"Origin": origin}
        asked = guarded.options("/v1/chat/completions", headers=headers | preflight)
        assert (asked.status_code == 200) == allowed, "a preflight has no key"
        body = ASKED | {"stream": True}
        answer = guarded.post(
            "/v1/chat/completions", json=body, headers=headers | {"api-key": "first"}
        )
        for response in (asked, answer):
            found = response.headers.get("access-control-allow-origin")
            assert found == (PAGE if allowed else None)
            assert "access-control-allow-credentials" not in response.headers


def test_where_all_origins_are_allowed_none_is_reflected_with_credentials():
    with HttpServer(ServerSettings(port=0, cors_origins=("*",))) as server:
        headers = {"Origin": PAGE, "Cookie": "session=1"}
        preflight = {"Access-Control-Request-Method": "GET"}
        for response in (
            httpx2.get(f"{server.url}/health", headers=headers),
            httpx2.options(f"{server.url}/v1/models", headers=headers | preflight),
        ):
            assert response.headers["access-control-allow-origin"] == "*"
            assert "access-control-allow-credentials" not in response.headers


def test_requests_without_a_key_are_counted_as_errors(guarded):
    def n_refused() -> float:
        text = guarded.get("/metrics", headers={"api-key": "first"}).text
        lines = [line for line in text.splitlines() if 'status="401"' in line and "_total" in line]
        return float(lines[0].split()[-1]) if lines else 0.0

    before = n_refused()
    assert guarded.get("/v1/models").status_code == 401
    assert n_refused() == before + 1
