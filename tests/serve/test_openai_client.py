"""openai-python, unmodified, against a server: what it asks for and how it reads what it gets."""

import asyncio
import itertools
import threading
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel
from serving import HELLO, serving
from tiny_models import encode
from waiting import HANG_S, wait_until

from hotloop import LLM
from hotloop.serve.lifecycle import HttpServer

CHAT = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_completion_tokens": 12}
IGNORING = {"extra_body": {"ignore_eos": True}}


def client_of(server: HttpServer, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, timeout=HANG_S)


@pytest.fixture
def api(llm: LLM) -> Iterator[openai.OpenAI]:
    with serving(llm) as server, client_of(server) as client:
        yield client


def test_it_lists_the_model_and_knows_that_there_is_no_other(api):
    (model,) = api.models.list()
    assert model.id == api.models.retrieve("tiny").id == "tiny"
    assert model.max_model_len == 320
    with pytest.raises(openai.NotFoundError) as caught:
        api.chat.completions.create(**CHAT | {"model": "gpt-5"})
    assert caught.value.code == "model_not_found"


def test_a_chat_is_the_same_whole_streamed_and_by_its_helper(api):
    whole = api.chat.completions.create(**CHAT, **IGNORING)
    (choice,) = whole.choices
    assert choice.finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    assert whole.usage.prompt_tokens_details.cached_tokens == 0
    chunks = list(
        api.chat.completions.create(
            **CHAT, **IGNORING, stream=True, stream_options={"include_usage": True}
        )
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == choice.message.content
    assert chunks[-1].usage.completion_tokens == 12
    with (
        pytest.raises(openai.LengthFinishReasonError) as caught,
        api.chat.completions.stream(**CHAT, **IGNORING) as stream,
    ):
        stream.until_done().get_final_completion()
    (helped,) = caught.value.completion.choices
    assert helped.message.content == choice.message.content


class Color(BaseModel):
    name: Literal["red", "blue"]
    is_dark: bool


def test_an_answer_is_parsed_as_the_class_that_was_asked_for(api):
    options = CHAT | {"max_completion_tokens": 100}
    answer = api.chat.completions.parse(**options, response_format=Color)
    assert answer.choices[0].message.parsed in [
        Color(name=name, is_dark=is_dark) for name in ("red", "blue") for is_dark in (True, False)
    ]


def test_log_probabilities_of_a_chat_are_read(api):
    answer = api.chat.completions.create(**CHAT, **IGNORING, logprobs=True, top_logprobs=3, n=2)
    for choice in answer.choices:
        entries = choice.logprobs.content
        assert len(entries) == 12
        assert all(len(entry.top_logprobs) == 3 for entry in entries)
        assert all(entry.token == entry.top_logprobs[0].token for entry in entries), "greedy"
        text = b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace")
        assert text.replace("<end>", "") == choice.message.content


def test_completions_of_text_and_of_token_ids_are_equal(api):
    options = {"model": "tiny", "temperature": 0, "max_tokens": 6, **IGNORING}
    text = "The engine decodes"
    answer = api.completions.create(prompt=[text, "the token"], logprobs=2, echo=True, **options)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text.startswith(text)
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    by_ids = api.completions.create(prompt=encode(text), **options)
    assert text + by_ids.choices[0].text == answer.choices[0].text
    streamed = api.completions.create(prompt=text, stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in streamed) == by_ids.choices[0].text


def test_errors_are_of_their_own_kinds(llm):
    with serving(llm, keys=("right",)) as server:
        with client_of(server, "wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with client_of(server, "right") as client:
            long = [{"role": "user", "content": "x" * 1000}]
            with pytest.raises(openai.BadRequestError, match="maximum context length is 320") as e:
                client.chat.completions.create(**CHAT | {"messages": long})
            assert e.value.code == "context_length_exceeded"
            with pytest.raises(openai.BadRequestError, match="temperature"):
                client.chat.completions.create(**CHAT | {"temperature": -1})


def test_an_error_in_mid_stream_is_raised_once_the_pieces_before_it_were_given(llm, monkeypatch):
    run, n_left = llm._runner.run, itertools.count(20, -1)

    def failing(command: Any) -> Any:
        if next(n_left) < 0:
            raise RuntimeError("the device is gone")
        return run(command)

    with serving(llm) as server, client_of(server) as client, monkeypatch.context() as patch:
        patch.setattr(llm._runner, "run", failing)
        options = CHAT | {"max_completion_tokens": 100, "stream": True}
        pieces = client.chat.completions.create(**options, **IGNORING)
        assert next(pieces).choices[0].delta.role == "assistant"
        with pytest.raises(openai.APIError, match="the device is gone"):
            list(pieces)


def test_a_full_queue_is_tried_again_by_the_client_itself(llm):
    with serving(llm, max_queued=0) as server, client_of(server) as client:
        service = server.served.model.service
        long = {"max_completion_tokens": 250, "stream": True}
        running = [client.chat.completions.create(**CHAT | long, **IGNORING) for _ in range(3)]
        patient = client.with_options(max_retries=1000)
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(patient.chat.completions.create(**CHAT, **IGNORING))
        )
        thread.start()
        for stream in running:
            stream.close()
        thread.join()
        assert answers[0].usage.completion_tokens == 12
        wait_until(lambda: service.state().n_running == 0, "the rows are free")


def test_an_asynchronous_client_that_stops_reading_frees_the_row(llm: LLM):
    async def ask(url: str) -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            options = CHAT | {"max_completion_tokens": 250}
            stream = await client.chat.completions.create(**options, **IGNORING, stream=True)
            async for chunk in stream:
                assert chunk.choices
                break
            await stream.close()

    with serving(llm) as server:
        service = server.served.model.service
        asyncio.run(ask(server.url))
        wait_until(lambda: service.state().n_running == 0, "the row is free")
