"""Bodies with values in the wrong places: each is served or refused, and none is our fault."""

import copy
import random
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from scripted import write_answers
from serving import serving

from hotloop import LLM

SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "", "parameters": SCHEMA}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
CHAT = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "r"},
        {"role": "tool", "tool_call_id": "1", "content": "x"},
    ],
    "tools": [{"type": "function", "function": FUNCTION}],
    "tool_choice": "required",
    "chat_template_kwargs": {"script": "A"},
    "logprobs": True,
    "max_tokens": 2,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
RESPONSE = {
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "r"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
    ],
    "instructions": "be brief",
    "tools": [{"type": "function", **FUNCTION}],
    "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
    "max_output_tokens": 2,
}
BODIES = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "tool_choice": "auto", "response_format": FORMAT}),
    ("/v1/responses", RESPONSE),
    ("/tokenize", {"messages": CHAT["messages"], "tools": CHAT["tools"]}),
]
VALUES = (None, True, -1, 10**30, "", "auto", [], [{}], {}, {"type": "function"}, {"a": [1]}, "é")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    folder = write_answers(tmp_path_factory.mktemp("fuzz"), {"A": ["yes ", "no."]})
    with (
        LLM(str(folder), dtype="float32") as llm,
        serving(llm) as server,
        httpx2.Client(base_url=server.url, timeout=600) as client,
    ):
        yield client


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All containers of a JSON value, each with each of its keys."""
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    for key in keys:
        yield value, key
        yield from places(value[key])


@pytest.mark.parametrize("seed", range(4))
def test_no_body_is_a_fault_of_the_server(client, seed):
    rng = random.Random(seed)
    statuses = set()
    for _ in range(60):
        route, body = copy.deepcopy(rng.choice(BODIES))
        container, key = rng.choice(list(places(body)))
        container[key] = copy.deepcopy(rng.choice(VALUES))
        response = client.post(route, json=body)
        assert response.status_code in (200, 400), (response.text, body)
        statuses.add(response.status_code)
    assert statuses == {200, 400}


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {"9" * 5000: 1}},
        {"tools": [{"type": "x" * 5000}]},
        {"messages": [{"role": "user", "content": [{"type": "x" * 5000}]}]},
        {"x" * 5000: 1, "model": "y" * 5000},
    ],
    ids=lambda fields: next(iter(fields))[:10],
)
def test_an_error_does_not_repeat_a_long_value(client, fields):
    response = client.post("/v1/chat/completions", json={**CHAT, **fields})
    assert response.status_code in (400, 404)
    assert len(response.text) < 1500
