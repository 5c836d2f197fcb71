"""Chats over HTTP: a stream and a whole response are the same answer."""

from pathlib import Path
from typing import Any

import httpx2
import pytest
from serving import HELLO, events, serving

from hotloop import LLM

LONG = {"role": "user", "content": "x" * 500}
GREEDY = {"messages": HELLO, "max_tokens": 12, "temperature": 0, "ignore_eos": True}


def chat(client: httpx2.Client, **body: Any) -> httpx2.Response:
    return client.post("/v1/chat/completions", json={**GREEDY, **body})


def test_a_stream_is_the_whole_answer_in_pieces(client):
    whole = chat(client).json()
    (choice,) = whole["choices"]
    *chunks, done = events(chat(client, stream=True))
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == choice["message"]["content"]
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert deltas[0]["content"], "the role comes with the first token"
    ends = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert ends == [None] * (len(ends) - 1) + ["length"]
    assert choice["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == 12
    assert all("usage" not in chunk for chunk in chunks)


def test_the_usage_of_a_stream_comes_last_and_only_if_asked_for(client):
    whole = chat(client).json()["usage"]
    *chunks, usage, done = events(chat(client, stream=True, stream_options={"include_usage": True}))
    assert done == "[DONE]"
    assert all("usage" not in chunk for chunk in chunks)
    assert usage["choices"] == []
    counted = "prompt_tokens", "completion_tokens", "total_tokens"
    assert [usage["usage"][name] for name in counted] == [whole[name] for name in counted]
    for options in ({}, None, {"include_usage": False}):
        chunks = events(chat(client, stream=True, stream_options=options))
        assert all("usage" not in chunk for chunk in chunks[:-1])


def test_an_answer_without_a_limit_may_fill_the_context(client):
    answer = chat(client, max_tokens=None).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 320
    body = {"input": HELLO, "temperature": 0, "ignore_eos": True}
    response = client.post("/v1/responses", json=body).json()
    assert response["max_output_tokens"] is None
    assert response["usage"]["total_tokens"] == 320


@pytest.mark.parametrize(
    ("body", "status", "code", "word"),
    [
        ({"model": "gpt"}, 404, "model_not_found", "gpt"),
        ({"messages": []}, 400, None, "at least one"),
        ({"messages": "Hello"}, 400, "invalid_value", "messages"),
        ({"messages": [{"role": "nobody", "content": ""}]}, 400, None, "nobody cannot speak"),
        ({"temperature": -1}, 400, None, "temperature"),
        ({"n": 10**6}, 400, "invalid_value", "n: "),
        ({"messages": [LONG]}, 400, "context_length_exceeded", "320 tokens"),
    ],
)  # fmt: skip
def test_an_unsupported_request_is_answered_in_the_form_of_the_api(
    client, body, status, code, word
):
    response = chat(client, **body)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert word in error["message"]


def test_a_stream_tells_which_text_was_drafted_if_asked_to(folder: Path) -> None:
    drafting = {"draft": str(folder), "draft_tokens": 3, "draft_policy": "always"}
    with (
        LLM(str(folder), dtype="float32", max_batch_size=1, **drafting) as llm,
        serving(llm) as server,
        httpx2.Client(base_url=server.url, timeout=600) as client,
    ):
        whole = chat(client).json()["choices"][0]["message"]["content"]
        *plain, _ = events(chat(client, stream=True, hotloop={"details": None}))
        *chunks, _ = events(chat(client, stream=True, hotloop={"details": True}))
    assert all("hotloop" not in chunk for chunk in plain)
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(texts) == whole
    told = [chunk["hotloop"]["accepted"] if "hotloop" in chunk else None for chunk in chunks]
    # A token of the prefill, steps of drafts and a token of the model's own, and the finish reason.
    assert told == [None, 3, None, 3, None, 2, None, None]
    assert all(texts[:-1])
