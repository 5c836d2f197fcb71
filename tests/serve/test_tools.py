"""Calls of tools in a model's text, however it is divided."""

import json
import random
from collections.abc import Iterable
from typing import Any

import pytest
from text_divisions import divided

from hotloop.serve.json_scan import JsonScanner
from hotloop.serve.parts import CallArguments, CallStart, Content, Parser
from hotloop.serve.tools import PARSERS, MistralParser, ToolParser

NAMES = ("weather", "time")

WEATHER = ("weather", '{"city": "Köln", "days": [1, 2]}')
TIME = ("time", "{}")


def read(parser: Parser, pieces: Iterable[str]) -> tuple[str, list[tuple[str, str]]]:
    """The content and the calls of an answer that comes in pieces; calls have to be in order."""
    content, names, arguments, ids = "", [], [], []
    parts = [part for piece in pieces for part in parser.push(piece)]
    for part in [*parts, *parser.end()]:
        match part:
            case Content(text):
                assert text
                content += text
            case CallStart(index, call_id, name):
                assert index == len(names)
                ids.append(call_id)
                names.append(name)
                arguments.append("")
            case CallArguments(index, text):
                assert text
                assert index == len(names) - 1
                arguments[index] += text
            case _:
                raise AssertionError(part)
    assert len(set(ids)) == len(ids)
    return content, list(zip(names, arguments, strict=True))


CASES: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    # Hermes and Qwen
    (
        "hermes",
        (
            'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", '
            '"days": [1, 2]}}\n</tool_call>\n<tool_call>\n{"name": "time", '
            '"arguments": {}}\n</tool_call>'
        ),
        "I look.",
        [WEATHER, TIME],
    ),
    ("hermes", '<tool_call>{"arguments": {}, "name": "time"}</tool_call>', "", [TIME]),
    ("hermes", '<tool_call>{"name": "time"}</tool_call> Done.\n', " Done.", [TIME]),
    ("hermes", '<tool_call>{"name": "time", "arguments": null}</tool_call>', "", [TIME]),
    ("hermes", '<tool_call>{"name":"time","arguments":"{\\"a\\":1}"}', "", [("time", '{"a":1}')]),
    ("hermes", '<tool_call>{"id": 7, "name": "unknown"}', "", [("unknown", "{}")]),
    ("hermes", '<tool_call>{"name": "time", "arguments": {}\n</tool_call>', "", [TIME]),
    (
        "hermes",
        '<tool_call>{"name": "time", "arguments": {"a": "</tool_call>\\"}{"}}</tool_call>',
        "",
        [("time", '{"a": "</tool_call>\\"}{"}')],
    ),
    ("hermes", "a < b <tool b\n\n", "a < b <tool b\n\n", []),
    ("hermes", "no call \n<tool_call>\n at all", "no call \n<tool_call>\n at all", []),
    ("hermes", "<tool_call>{'name': 'time'}</tool_call>", None, []),
    ("hermes", '<tool_call>["time"]</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": "time", "arguments": [1]}</tool_call>', None, []),
    ("hermes", '<tool_call>{"color": "red"}</tool_call> is one', None, []),
    (
        "hermes",
        '<tool_call><tool_call>{"name": "time"}</tool_call>',
        "<tool_call>",
        [TIME],
    ),
    # cut off: before it is a call it stays text, then it is a call that is cut off
    ("hermes", 'Now <tool_call>\n{"name": "ti', None, []),
    ("hermes", 'Now <tool_call>{"name": "time", "arguments": {"a', "Now", [("time", '{"a')]),
    ("hermes", '<tool_call>{"name": "time", "arguments": {}}</tool_', "", [TIME]),
    # arguments that are not JSON are passed on up to the end of the call
    (
        "hermes",
        '<tool_call>{"name": "time", "arguments": {a: 1}}</tool_call>x',
        "x",
        [("time", "{a: 1}}")],
    ),
    # Llama 3
    (
        "llama3",
        (
            '<|python_tag|>{"type": "function", "name": "weather", '
            '"parameters": {"city": "Köln", "days": [1, 2]}}; {"name": "time", "parameters": {}}'
        ),
        "",
        [WEATHER, TIME],
    ),
    ("llama3", '\n{"name": "time", "parameters": {}}\n', "", [TIME]),
    ("llama3", 'So: <|python_tag|>{"name": "time"}', "So:", [TIME]),
    ("llama3", 'So: {"name": "time", "parameters": {}}', None, []),
    ("llama3", '{"name": "Bob", "parameters": {}}', None, []),
    ("llama3", '{"answer": {"name": "time"}}', None, []),
    ("llama3", '<|python_tag|>print("hello")', None, []),
    ("llama3", '{"name": "time", "parameters": {"a": 1', "", [("time", '{"a": 1')]),
    ("llama3", '{"name": "time"} and more', " and more", [TIME]),
    ("llama3", '{"name": "time"};', "", [TIME]),
    ("llama3", '{"name": "time"}; {"name": "Bob"}', '; {"name": "Bob"}', [TIME]),
    # Mistral
    (
        "mistral",
        (
            '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Köln", "days": [1, 2]}}, '
            '{"name": "time", "arguments": {}, "id": "abcdefghi"}]'
        ),
        "",
        [WEATHER, TIME],
    ),
    ("mistral", 'So[TOOL_CALLS][{"name":"time","arguments":{}}', "So", [TIME]),
    ("mistral", '[TOOL_CALLS][{"name":"time"},', "", [TIME]),
    ("mistral", "[TOOL_CALLS] [", None, []),
    ("mistral", "[TOOL_CALLS] [1, 2]", None, []),
    ("mistral", "[TOOL_CALLS] I would rather", None, []),
    ("mistral", "[TOOL_CALLS]weather", None, []),
    (
        "mistral",
        '[TOOL_CALLS]weather{"city": "Köln", "days": [1, 2]}[TOOL_CALLS]time{}',
        "",
        [WEATHER, TIME],
    ),
    (
        "mistral",
        (
            'So[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{"city": "Köln", "days": [1, 2]}'
            "[TOOL_CALLS]time[CALL_ID]abcdefghj[ARGS]{}"
        ),
        "So",
        [WEATHER, TIME],
    ),
    ("mistral", "[TOOL_CALLS]time[ARGS]{}", "", [TIME]),
    ("mistral", '[TOOL_CALLS]time{"a', "", [("time", '{"a')]),
    ("mistral", "[TOOL_CALLS]time{a}[TOOL_CALLS]time{}", "", [("time", "{a}"), TIME]),
]


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES, ids=[c[1] for c in CASES])
def test_calls_are_found_wherever_the_pieces_end(
    name: str, text: str, content: str | None, calls: list
) -> None:
    expected = (text if content is None else content, calls)
    for pieces in divided(text):
        assert read(PARSERS[name](NAMES), pieces) == expected, pieces


@pytest.mark.parametrize("name", PARSERS)
def test_nothing_is_lost_of_text_that_is_like_calls(name: str) -> None:
    """Whatever a model writes, calls and content hold its text, but for whitespace and frames."""
    marker = PARSERS[name].marker
    words = [marker, PARSERS[name].closing, '{"name": "time"', ', "arguments": {"a": ', "1", "}"]
    words += ["x", " ", "\n", "[", "]", ",", ";", '"', "weather", "{", "\\", marker[:4]]
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choices(words, k=rng.randint(1, 12)))
        whole = read(PARSERS[name](NAMES), [text])
        assert read(PARSERS[name](NAMES), list(text)) == whole, text
        if not whole[1]:
            assert whole[0] == text


@pytest.mark.parametrize("name", PARSERS)
def test_arguments_arrive_as_the_model_writes_them(name: str) -> None:
    key = "parameters" if name == "llama3" else "arguments"
    parser = PARSERS[name](NAMES)
    begin = {"mistral": "[TOOL_CALLS] [", "hermes": "<tool_call>", "llama3": ""}[name]
    start, first = parser.push(f'{begin}{{"name": "time", "{key}": {{"a": "x')
    assert isinstance(start, CallStart)
    assert first == CallArguments(0, '{"a": "x')
    assert list(parser.push("yz")) == [CallArguments(0, "yz")]
    assert list(parser.push('"}')) == [CallArguments(0, '"}')]


def test_a_second_call_is_dropped_where_calls_are_not_parallel() -> None:
    text = '<tool_call>{"name": "time"}</tool_call>' * 3 + "x"
    content, calls = read(PARSERS["hermes"](NAMES, parallel=False), list(text))
    assert (content, calls) == ("x", [TIME])


def test_ids_of_mistral_are_those_that_its_templates_take() -> None:
    start, *_ = MistralParser(NAMES).push("[TOOL_CALLS]time{}")
    assert isinstance(start, CallStart)
    assert len(start.id) == 9
    assert start.id.isalnum()
    start, *_ = MistralParser(NAMES).push("[TOOL_CALLS]time[CALL_ID]abcdefghi[ARGS]{}")
    assert isinstance(start, CallStart)
    assert start.id == "abcdefghi"


@pytest.mark.parametrize("parser", PARSERS.values(), ids=PARSERS)
def test_a_long_answer_takes_time_in_proportion_to_its_length(parser: type[ToolParser]) -> None:
    """Counted, not timed: the characters that are looked at."""
    seen = 0

    class Counted(parser):
        def _in_content(self, text: str) -> int:
            nonlocal seen
            seen += len(text)
            return super()._in_content(text)

        def _in_object(self, text: str) -> int:
            nonlocal seen
            seen += len(text)
            return super()._in_object(text)

    text = (parser.marker + '[{"name": "time", "arguments": [') * 2000
    reading = Counted(NAMES)
    for at in range(0, len(text), 4):
        reading.push(text[at : at + 4])
    reading.end()
    assert seen < 20 * len(text)


VALUES = (
    '{"a": [1, 2.5e-3, {"b": "x\\n\\u00e9\\"}"}], "c": true, "d": null , "e":{} , "f":[ ]}',
    "[[], {}, -0]",
    '"a\\\\"',
    " {}",
)


@pytest.mark.parametrize("value", VALUES)
def test_end_of_a_json_value_is_found_wherever_the_pieces_end(value: str) -> None:
    for cut in range(len(value) + 1):
        scanner = JsonScanner()
        n = scanner.push(value[:cut])
        assert n == cut
        n += scanner.push(f"{value[cut:]}xyz")
        assert (n, scanner.state) == (len(value), "done")


def test_scanner_takes_the_json_that_python_takes_and_no_other() -> None:
    rng = random.Random(0)
    signs = '{}[]",:\\0aue1.- \n'
    n_valid = 0
    for _ in range(20_000):
        text = rng.choice(VALUES)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice(["", *signs]) + text[at + rng.randint(0, 1) :]
        scanner = JsonScanner()
        n = scanner.push(f"{text} ")  # a number ends at the character after it
        valid = decoded(text)
        assert (scanner.state == "done") == (valid is not None), text
        if valid is not None:
            assert n == valid
            n_valid += 1
    assert n_valid > 1000


def decoded(text: str) -> int | None:
    """The end of the JSON value that begins a text; None without one."""
    space = len(text) - len(text.lstrip(" \t\n\r"))
    value: Any
    try:
        value, end = json.JSONDecoder().raw_decode(text[space:])
    except json.JSONDecodeError:
        return None
    if isinstance(value, float | int) and text[space + end :][:1] not in ("", *' \t\n\r{}[]",:\\'):
        return None  # as in 0a, of which the decoder takes the 0
    return space + end
