"""Structured output over HTTP: enforced or refused, never ignored."""

import json
import re
from typing import Any

import httpx2
import openai
import pytest
from pydantic import BaseModel
from serving import HELLO

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 3, "maximum": 7}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}
ROUTES = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "Hello"},
}


def ask(client: httpx2.Client, route: str, **body: Any) -> httpx2.Response:
    return client.post(route, json={**ROUTES[route], "max_tokens": 60, **body})


def text_of(response: httpx2.Response) -> str:
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assert choice["finish_reason"] == "stop"
    return choice["message"]["content"] if "message" in choice else choice["text"]


def is_valid(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"n", "ok"} and value["n"] in range(3, 8) and value["ok"] in (True, False)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "asked",
    [
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA},
            }
        },
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}},
        {"guided_json": SCHEMA},
    ],
    ids=["response_format", "structured_outputs", "text", "guided"],
)
def test_an_answer_follows_its_schema(client, route, asked):
    assert is_valid(text_of(ask(client, route, seed=1, **asked)))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"response_format": {"type": "regex", "regex": "[ab]{3}c"}}, "[ab]{3}c"),
        ({"structured_outputs": {"regex": "[ab]{3}c"}}, "[ab]{3}c"),
        ({"guided_regex": "[ab]{3}c"}, "[ab]{3}c"),
        ({"response_format": {"type": "lark", "grammar": 'start: "x" /y+/ "z"'}}, "xy+z"),
        ({"structured_outputs": {"grammar": 'start: "x" "z"'}}, "xz"),
        ({"structured_outputs": {"choice": ["yes", 'n"o']}}, 'yes|n"o'),
        ({"guided_choice": ["only"]}, "only"),
        ({"guided_choice": ["\x7f\x00\n", "\x7f\u2028"]}, "\x7f\x00\n|\x7f\u2028"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_an_answer_follows_its_grammar(client, route, asked, pattern):
    assert re.fullmatch(pattern, text_of(ask(client, route, seed=1, **asked)))


@pytest.mark.parametrize("route", ROUTES)
def test_an_answer_is_a_json_object_where_that_is_asked(client, route):
    # A random model hardly ends a text by itself.
    biased = {"logit_bias": {str(i): -100 for i in range(200, 300)}}
    response = ask(client, route, seed=1, response_format={"type": "json_object"}, **biased)
    assert response.status_code == 200
    choice = response.json()["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    assert text.startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(text), dict)


def test_a_text_is_any_text(client):
    for asked in ({"response_format": {"type": "text"}}, {"structured_outputs": {}}):
        assert ask(client, "/v1/chat/completions", **asked).status_code == 200


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "needs a schema"),
        ({"response_format": {"type": "regex", "regex": ""}}, "needs a regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "regex, choice were given"),
        ({"structured_outputs": {"regex": "a"}, "guided_json": {}}, "several"),
        ({"structured_outputs": {"choice": []}}, "choice cannot have the value []"),
        ({"structured_outputs": {"structural_tag": {}}}, "'structural_tag' is not supported"),
        ({"guided_regex": 0}, "regex cannot have the value 0"),
        ({"guided_regex": "("}, "regular expression"),
        ({"structured_outputs": {"json": "{"}}, "JSON"),
        ({"guided_json": {"type": "nothing"}}, "nothing"),
        ({"guided_json": {"patternProperties": {"a": {}}}}, "patternProperties"),
        ({"guided_json": {"description": "x" * 300_000}}, "bytes"),
        ({"guided_grammar": "start: missing"}, "grammar"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
    ],
    ids=str,
)
def test_an_unsupported_format_is_refused_and_the_next_request_is_answered(
    client, route, asked, word
):
    response = ask(client, route, **asked)
    assert response.status_code == 400, response.text
    assert word in response.json()["error"]["message"]
    assert ask(client, route, max_tokens=1).status_code == 200


class Sky(BaseModel):
    blue: bool


def test_the_clients_own_parsing_gets_its_type(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.parse(
            model="tiny", messages=HELLO, response_format=Sky, seed=1
        )
    assert isinstance(answer.choices[0].message.parsed, Sky)
