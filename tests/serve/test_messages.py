"""Messages and definitions of tools, as clients send them and as templates take them."""

import json
from typing import Any

import pytest

from hotloop.serve.errors import ApiError
from hotloop.serve.messages import template_messages
from hotloop.serve.tool_use import ToolUse, read_tool_use
from hotloop.serve.tools import PARSERS, HermesParser, MistralParser

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
TIME = {"type": "function", "function": {"name": "time", "strict": None}}
TOOLS = read_tool_use([WEATHER, TIME], "auto").tools


def messages(*given: dict, parser: Any = HermesParser, as_text: bool = False) -> list[dict]:
    return template_messages(given, parser, tools=TOOLS, as_text=as_text)


CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Köln"}'},
}


def test_all_text_parts_of_every_role_are_kept() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    for role in ("system", "user", "assistant", "tool"):
        assert messages({"role": role, "content": parts}) == [{"role": role, "content": "one\ntwo"}]
    refused = [{"type": "refusal", "refusal": "no"}, {"type": "input_text", "text": "x"}, "y"]
    assert messages({"role": "user", "content": refused})[0]["content"] == "no\nx\ny"


def test_null_is_an_absent_field_and_content_is_always_text() -> None:
    given = {"role": "assistant", "content": None, "tool_calls": None, "name": None}
    assert messages(given) == [{"role": "assistant", "content": ""}]
    assert messages({"role": "user"}) == [{"role": "user", "content": ""}]
    assert "tool_calls" not in messages({"role": "assistant", "tool_calls": []})[0]


def test_the_role_developer_is_the_system() -> None:
    assert messages({"role": "developer", "content": "x"}) == [{"role": "system", "content": "x"}]


def test_arguments_of_calls_reach_templates_as_objects() -> None:
    (message,) = messages({"role": "assistant", "content": None, "tool_calls": [CALL]})
    function = {"name": "weather", "arguments": {"city": "Köln"}}
    assert message["tool_calls"] == [{"id": "call_1", "type": "function", "function": function}]


@pytest.mark.parametrize(
    ("arguments", "taken"),
    [
        ("", {}),
        (None, {}),
        ({"a": 1}, {"a": 1}),
        ('{"city": "Kö', '{"city": "Kö'),  # cut off
        ("[1]", "[1]"),
        ("[" * 100_000, "[" * 100_000),
        ("9" * 10_000, "9" * 10_000),
    ],
    ids=lambda value: str(value)[:20],
)
def test_arguments_that_are_no_object_are_kept_as_text(arguments: Any, taken: Any) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    (message,) = messages({"role": "assistant", "tool_calls": [call]})
    assert message["tool_calls"][0]["function"]["arguments"] == taken


def test_ids_of_a_call_and_its_result_are_those_that_mistrals_templates_take() -> None:
    call, result = messages(
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        parser=MistralParser,
    )
    call_id = call["tool_calls"][0]["id"]
    assert call_id == result["tool_call_id"]
    assert len(call_id) == 9
    assert call_id.isalnum()


@pytest.mark.parametrize(
    ("message", "place", "problem"),
    [
        ({"content": "x"}, "messages[0].role", "must be text"),
        ({"role": "user", "content": 5}, "messages[0].content", "a list of parts"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0]",
            "type 'image_url', but this model reads only text",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0]", "with a text"),
        ({"role": "assistant", "tool_calls": "x"}, "messages[0].tool_calls", "a list"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[0].tool_calls[0]", "a call"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]},
            "messages[0].tool_calls[0].function.arguments",
            "JSON as text",
        ),
    ],
)
def test_invalid_messages_are_refused(message: dict, place: str, problem: str) -> None:
    with pytest.raises(ApiError) as caught:
        messages(message)
    assert (caught.value.status, caught.value.param) == (400, place)
    assert problem in caught.value.message


@pytest.mark.parametrize("parser", PARSERS.values(), ids=PARSERS)
def test_a_template_without_tools_gets_them_as_text_in_the_form_that_is_parsed(parser: Any) -> None:
    system, user, call, result = messages(
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "yes"},
        parser=parser,
        as_text=True,
    )
    assert system["content"].startswith("Be brief.\n\n")
    for definition in (WEATHER, {"type": "function", "function": {"name": "time"}}):
        assert json.dumps(definition) in system["content"]
    assert parser.format_calls([("NAME", "{…}")]) in system["content"]
    assert user == {"role": "user", "content": "Rain?"}
    assert call.keys() == {"role", "content"}
    reading = parser(["weather"])
    parts = [*reading.push(call["content"]), *reading.end()]
    assert [part.name for part in parts if hasattr(part, "name")] == ["weather"] * 2
    assert [part.text for part in parts if hasattr(part, "text")] == ['{"city": "Köln"}'] * 2
    assert result == {"role": "user", "content": "<tool_response>\nyes\n</tool_response>"}


def test_definitions_are_a_system_message_where_there_is_none() -> None:
    system, user = messages({"role": "user", "content": "Rain?"}, as_text=True)
    assert system["role"] == "system"
    assert user["role"] == "user"


def test_definitions_and_choices_of_both_apis_are_taken() -> None:
    flat = {"type": "function", **WEATHER["function"]}
    assert read_tool_use([flat], None) == read_tool_use([WEATHER], "auto")
    for choice in (
        {"type": "function", "function": {"name": "time"}},
        {"type": "function", "name": "time"},
    ):
        use = read_tool_use([WEATHER, TIME], choice)
        assert (use.choice, [tool.name for tool in use.forced]) == ("named", ["time"])
        assert len(use.tools) == 2, "the model is told of the others, too"
    assert len(read_tool_use([WEATHER, TIME], "required").forced) == 2
    assert read_tool_use([WEATHER, TIME], "auto").forced == ()
    assert read_tool_use([WEATHER], "none") == read_tool_use(None, None) == ToolUse()


def test_nulls_of_a_definition_are_left_out() -> None:
    assert TOOLS[1].definition == {"type": "function", "function": {"name": "time"}}


@pytest.mark.parametrize(
    ("tools", "choice", "place", "problem"),
    [
        ([{"type": "web_search"}], None, "tools[0]", "must have the type function"),
        ([{"type": "function"}], None, "tools[0].name", "must be text"),
        ([{"type": "function", "name": ""}], None, "tools[0].name", "1 to 256 characters"),
        ([{"type": "function", "function": 5}], None, "tools[0].function", "an object"),
        (
            [{"type": "function", "function": {"name": "f", "parameters": 5}}],
            None,
            "tools[0].function.parameters",
            "the JSON schema of an object",
        ),
        ([TIME, TIME], None, "tools[1]", "appears twice"),
        (None, "required", "tool_choice", "there are none"),
        ([TIME], "sometimes", "tool_choice", "must be one of"),
        ([TIME], {"type": "function", "name": "weather"}, "tool_choice", "no tool 'weather'"),
        ([TIME], {"type": "function"}, "tool_choice", "must be one of"),
    ],
)
def test_tools_that_are_none_are_refused(tools: Any, choice: Any, place: str, problem: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_tool_use(tools, choice)
    assert (caught.value.status, caught.value.param) == (400, place)
    assert problem in caught.value.message
