"""``/v1/responses`` with OpenAI's own client, and what it is sent."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from scripted import write_answers
from serving import serving

from hotloop import LLM
from hotloop.errors import HotloopError
from hotloop.serve.lifecycle import HttpServer
from hotloop.serve.parts import PlainText
from hotloop.serve.responses import ResponsesFormatter, messages_of
from hotloop.types import Delta

THOUGHT = ["<think>", "\nwell", ", so\n", "</think>", "\n\nI look", " and see"]
CALL = ['.<tool_call>{"name": "weather", "arguments"', ': {"city": "Oslo"}', "}</tool_call>"]
ANSWERS = {"A": ["Hello ", "world", "!!"], "B": [*THOUGHT, *CALL]}

WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def client_of(server: HttpServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600, max_retries=0)


@contextmanager
def client_of_answers(folder: Path, answers: dict[str, list[str]]) -> Iterator[openai.OpenAI]:
    with (
        LLM(str(write_answers(folder, answers)), dtype="float32", max_batch_size=2) as llm,
        serving(llm) as server,
        client_of(server) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with client_of_answers(tmp_path_factory.mktemp("responses"), ANSWERS) as client:
        yield client


def asked(script: str = "A", **options: Any) -> dict[str, Any]:
    variables = {"chat_template_kwargs": {"script": script}}
    return {"model": "tiny", "input": "Hello", "temperature": 0, "extra_body": variables} | options


def test_a_response_has_the_text_and_the_usage(client):
    response = client.responses.create(**asked(store=True, metadata={"a": "b"}, user="me"))
    assert response.output_text == "Hello world!!"
    assert (response.status, response.error) == ("completed", None)
    assert response.metadata == {"a": "b"}
    assert response.usage is not None
    assert response.usage.output_tokens == 4  # the end of the sequence, too
    assert response.usage.total_tokens == response.usage.input_tokens + 4
    (item,) = response.output
    assert (item.type, item.status, item.role) == ("message", "completed", "assistant")


def test_a_response_that_is_cut_off_is_incomplete(client):
    response = client.responses.create(**asked(max_output_tokens=2))
    assert response.output_text == "Hello world"
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    *_, last = client.responses.create(**asked(max_output_tokens=2, stream=True))
    assert last.type == "response.incomplete"
    assert last.response.output[0].status == "incomplete"


MESSAGE = [
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]
REASONING = [kind.replace("output_text", "reasoning_text") for kind in MESSAGE]
CALLS = [
    "response.output_item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
]


def test_the_events_of_a_stream_come_in_order_and_are_numbered(client):
    events = list(client.responses.create(**asked("B", stream=True, tools=[WEATHER])))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    once = [kind for i, kind in enumerate(kinds) if kind != kinds[i - 1] or "delta" not in kind]
    begin = ["response.created", "response.in_progress"]
    assert once == [*begin, *REASONING, *MESSAGE, *CALLS, "response.completed"]


def test_a_stream_is_the_whole_response_in_pieces(client):
    whole = client.responses.create(**asked("B", tools=[WEATHER]))
    reasoning, message, call = whole.output
    assert reasoning.content[0].text == "well, so"
    assert message.content[0].text == "I look and see."
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Oslo"})
    assert whole.usage.output_tokens_details.reasoning_tokens > 0

    texts = ["", "", ""]
    last = None
    for event in client.responses.create(**asked("B", stream=True, tools=[WEATHER])):
        last = event
        if event.type.endswith(".delta"):
            texts[event.output_index] += event.delta
        elif event.type == "response.output_item.done":
            assert event.item.status == "completed"
    assert texts == ["well, so", "I look and see.", call.arguments]
    assert last.type == "response.completed"

    def told(response: Any) -> list[dict[str, Any]]:
        left_out = {"id", "call_id"}
        return [item.model_dump(exclude=left_out) for item in response.output]

    assert told(last.response) == told(whole)
    assert last.response.usage == whole.usage


def test_the_clients_own_stream_puts_a_response_together(client):
    with client.responses.stream(**asked("B", tools=[WEATHER])) as stream:
        response = stream.get_final_response()
    assert response.output_text == "I look and see."
    assert response.output[2].name == "weather"


def test_logprobs_are_those_of_the_messages_tokens(client):
    options = asked(include=["message.output_text.logprobs"], top_logprobs=2)
    (item,) = client.responses.create(**options).output
    tokens = [each.token for each in item.content[0].logprobs]
    assert tokens[:3] == ["Hello ", "world", "!!"]
    assert all(len(each.top_logprobs) == 2 for each in item.content[0].logprobs)
    streamed = [
        each.token
        for event in client.responses.create(**options, stream=True)
        if event.type == "response.output_text.delta"
        for each in event.logprobs
    ]
    assert streamed[:3] == tokens[:3]


def test_items_of_earlier_responses_are_taken_as_they_were_given(client):
    first = client.responses.create(**asked("B", tools=[WEATHER]))
    result = {"type": "function_call_output", "call_id": first.output[2].call_id, "output": "rain"}
    items = [{"role": "user", "content": "Rain?"}, *first.output, result]
    second = client.responses.create(**asked(input=items, tools=[WEATHER]))
    assert second.output_text == "Hello world!!"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0]"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{"type": "reasoning", "content": 5}]}, "input[0]"),
        ({"input": [{"type": "reasoning", "content": [{"text": 5}]}]}, "input[0]"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"extra_body": {"n": 2}}, "n"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"extra_body": {"response_format": {"type": "json_object"}}}, "response_format"),
    ],
)
def test_an_unsupported_field_is_refused_by_name(client, options, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**asked(**options))
    assert caught.value.param == param


def test_items_become_the_messages_of_a_chat():
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    thought = {"type": "reasoning", "summary": [], "content": [{"text": "hm"}]}
    tool_call = {
        "type": "function",
        "id": "1",
        "function": {"name": "f", "arguments": "{}"},
    }
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        thought,
        {"role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        call,
        call,
        {"type": "function_call_output", "call_id": "1", "output": "rain"},
        call,
    ]
    assert messages_of(items, "Be brief.") == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "reasoning_content": "hm",
            "content": "I look.",
            "tool_calls": [tool_call, tool_call],
        },
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
        {"role": "assistant", "tool_calls": [tool_call]},
    ]
    assert messages_of("Hi", None) == [{"role": "user", "content": "Hi"}]


def test_reasoning_begins_a_message_of_the_assistant():
    first, second = ({"role": "assistant", "content": text} for text in ("A", "B"))
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    of_thought = {"role": "assistant", "reasoning_content": "hm"}
    assert messages_of([first, thought, second], None) == [first, of_thought | {"content": "B"}]
    before, after = messages_of([first, thought, call], None)
    assert before == first
    assert after.keys() == {"role", "reasoning_content", "tool_calls"}
    assert messages_of([thought, thought], None) == [of_thought, of_thought]


def test_an_error_in_mid_stream_is_a_failed_response_with_what_came_before():
    formatter = ResponsesFormatter({"id": "resp_1"}, PlainText(), None)
    text = formatter.first_events()
    text += formatter.events(Delta(index=0, text="so far", token_ids=(5,)), "")
    text += formatter.error_events(HotloopError("the device is gone"))
    events = [json.loads(event.partition("data: ")[2]) for event in text.split("\n\n") if event]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    last = events[-1]
    assert last["type"] == "response.failed"
    assert "the device is gone" in last["response"]["error"]["message"]
    (item,) = last["response"]["output"]
    assert (item["status"], item["content"][0]["text"]) == ("incomplete", "so far")


class Weather(BaseModel):
    rain: bool


def test_a_response_is_parsed_into_the_type_of_its_schema(server):
    with client_of(server) as client:
        response = client.responses.parse(
            model="tiny", input="Rain?", text_format=Weather, extra_body={"seed": 1}
        )
    assert isinstance(response.output_parsed, Weather)
    assert response.text.format.type == "json_schema"


def test_a_call_that_is_forced_has_the_arguments_of_its_schema(tmp_path):
    strict = WEATHER | {"parameters": Weather.model_json_schema()}
    with client_of_answers(tmp_path, {"A": ["I will not."]}) as client:
        response = client.responses.create(
            **asked(tools=[strict], tool_choice="required", parallel_tool_calls=False)
        )
    (call,) = response.output
    assert Weather.model_validate_json(call.arguments)
