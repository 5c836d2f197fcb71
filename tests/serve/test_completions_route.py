"""Completions over HTTP: prompts of text and of token ids, echo, log-probabilities."""

import asyncio
import threading
from typing import Any

import httpx2
import pytest
from serving import events
from tiny_models import encode

from hotloop.serve import bodies, completions
from hotloop.serve.lifecycle import HttpServer

TEXT = "The engine decodes"
GREEDY = {"prompt": TEXT, "max_tokens": 5, "temperature": 0, "ignore_eos": True}


def complete(client: httpx2.Client, **body: Any) -> httpx2.Response:
    return client.post("/v1/completions", json={**GREEDY, **body})


def choices(client: httpx2.Client, **body: Any) -> list[dict[str, Any]]:
    response = complete(client, **body)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def streamed(client: httpx2.Client, **body: Any) -> dict[int, dict[str, Any]]:
    """The choices of a stream, put together."""
    found: dict[int, dict[str, Any]] = {}
    *chunks, done = events(complete(client, stream=True, **body))
    assert done == "[DONE]"
    for chunk in chunks:
        (piece,) = chunk["choices"]
        choice = found.setdefault(
            piece["index"],
            {"index": piece["index"], "text": "", "logprobs": None, "finish_reason": None},
        )
        assert choice["finish_reason"] is None, "nothing follows the end"
        choice["finish_reason"] = piece["finish_reason"]
        choice["text"] += piece["text"]
        if piece["logprobs"] is not None:
            lists = choice["logprobs"] or {name: [] for name in piece["logprobs"]}
            choice["logprobs"] = {name: lists[name] + piece["logprobs"][name] for name in lists}
    return found


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"logprobs": 2},
        {"echo": True, "logprobs": 1},
        {"echo": True},
        {"n": 2, "prompt": [TEXT, encode(TEXT)], "echo": True, "logprobs": 3},
        {"echo": True, "logprobs": 0, "max_tokens": 0},
    ],
)
def test_a_stream_is_the_whole_answer_in_pieces(client, body):
    whole = choices(client, **body)
    assert [choice["index"] for choice in whole] == list(range(len(whole)))
    assert streamed(client, **body) == dict(enumerate(whole))


def test_token_ids_are_the_text_that_they_spell_and_prompts_keep_their_order(client):
    other = "and that other letters"
    (one,), (two,) = choices(client), choices(client, prompt=other)
    mixed = choices(client, prompt=[encode(other), encode(TEXT)])
    assert [choice["text"] for choice in mixed] == [two["text"], one["text"]]
    assert choices(client, prompt=encode(TEXT)) == [one]
    assert len({choice["text"] for choice in choices(client, prompt=[TEXT, other], n=2)}) == 2
    usage = complete(client, prompt=[TEXT, other], n=2).json()["usage"]
    assert usage["prompt_tokens"] == len(encode(TEXT)) + len(encode(other))
    assert usage["completion_tokens"] == 4 * 5


def scored(server: HttpServer, ids: list[int]) -> list[float]:
    """The engine's own scores of a prompt."""

    async def score() -> list[float]:
        ticket = server.served.model.service.score(ids)
        await ticket.arrived()
        (score,) = ticket.take()
        return score.token_logprobs.tolist()

    return asyncio.run_coroutine_threadsafe(score(), server.loop).result(600)


def test_echoed_log_probabilities_are_the_scores_of_the_engine(client, server):
    ids = encode(TEXT)
    (choice,) = choices(client, echo=True, logprobs=1, max_tokens=1)
    lists = choice["logprobs"]
    assert {len(each) for each in lists.values()} == {len(ids) + 1}
    assert lists["token_logprobs"][0] is lists["top_logprobs"][0] is None
    (alone,) = choices(client, max_tokens=1, logprobs=1)
    assert choice["text"] == TEXT + alone["text"]
    assert lists["token_logprobs"][-1] == alone["logprobs"]["token_logprobs"][0]
    assert lists["text_offset"][-1] == alone["logprobs"]["text_offset"][0] == len(TEXT)
    for token, offset in zip(lists["tokens"], lists["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    greedy = [
        logprob == max(top.values())
        for logprob, top in zip(lists["token_logprobs"][1:], lists["top_logprobs"][1:], strict=True)
    ]
    assert greedy[-1]
    assert lists["token_logprobs"][1:-1] == scored(server, ids)
    (full,) = choices(client, echo=True, logprobs=5, max_tokens=0)
    assert full["logprobs"]["token_logprobs"] == lists["token_logprobs"][:-1]
    for few, many in zip(
        lists["top_logprobs"][1:-1], full["logprobs"]["top_logprobs"][1:], strict=True
    ):
        assert max(few.values()) == max(many.values())
        assert set(few) <= set(many)


def test_a_prompt_of_one_token_has_an_echo(client):
    (choice,) = choices(client, prompt=[70], echo=True, logprobs=1, max_tokens=1)
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert len(choice["logprobs"]["tokens"]) == 2


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "empty"),
        ({"prompt": [[]], "echo": True, "logprobs": 1}, "empty"),
        ({"n": 0, "echo": True, "max_tokens": 0}, "n: "),
        ({"prompt": [[5], 5]}, "prompt"),
        ({"prompt": [300]}, "outside the vocabulary"),
        ({"prompt": ["a"] * 300, "n": 100}, "30000 answers"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "16"),
    ],
)
def test_an_unsupported_request_is_refused(client, body, word):
    response = complete(client, **body)
    assert response.status_code == 400
    assert word in response.json()["error"]["message"]


def test_large_bodies_are_parsed_and_tokenized_outside_the_event_loop(client, monkeypatch):
    threads: list[str] = []

    def watch(module: Any, name: str) -> None:
        function = getattr(module, name)
        told = lambda *args: threads.append(threading.current_thread().name) or function(*args)  # noqa: E731
        monkeypatch.setattr(module, name, told)

    watch(bodies, "_parse")
    watch(completions, "_encoded")
    for size, is_outside in ((10, False), (2 * bodies.LARGE_BYTES, True)):
        threads.clear()
        complete(client, prompt="x" * size)
        assert len(threads) == 2
        assert all((thread != "hotloop-http") == is_outside for thread in threads), size


def test_token_ids_are_told_if_asked_for(client):
    (whole,) = choices(client, return_token_ids=True)
    assert len(whole["token_ids"]) == 5
    *chunks, _ = events(complete(client, stream=True, return_token_ids=True))
    pieces = [chunk["choices"][0] for chunk in chunks]
    assert [token for piece in pieces for token in piece.get("token_ids", ())] == whole["token_ids"]
    assert "token_ids" not in choices(client)[0]
