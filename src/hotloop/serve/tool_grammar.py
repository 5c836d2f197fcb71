"""Grammars of answers that must call a tool (``tool_choice`` required, or a tool by name).

A pure function makes the grammar, in llguidance's notation of Lark, of the tools and of the format
that a model writes calls in. Arguments follow the schema of the tool. A model that reasons may do
so before the calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hotloop.serve.reasoning import Markers
from hotloop.serve.tool_use import Tool
from hotloop.serve.tools import HermesParser, Llama3Parser, MistralParser, ToolParser
from hotloop.text.tokenizer import Tokenizer

_ANY_ARGUMENTS = {"type": "object"}
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_Text = Callable[[str], str]
"""Writes a text in Lark."""


def tool_grammar(
    parser: type[ToolParser],
    tools: Sequence[Tool],
    tokenizer: Tokenizer,
    *,
    parallel: bool,
    reasoning: Markers | None,
    within: bool = False,
) -> str:
    """Returns the Lark grammar of an answer that calls one or more tools.

    Args:
        parser: The parser of the model's calls.
        tools: The tools, one at least; each can be called.
        tokenizer: The model's, whose control tokens the grammar names by id.
        parallel: Whether the answer may have several calls.
        reasoning: The markers of the model's reasoning; None: it does not reason.
        within: The answer begins within reasoning.
    """
    special, ids = tokenizer.backend.special_ids, tokenizer.backend.added_ids

    def text(spelled: str) -> str:
        token_id = ids.get(spelled)
        return f"<[{token_id}]>" if token_id in special else _quoted(spelled)

    rules = _FORMATS[parser](tools, ids, text, parallel)
    for i, tool in enumerate(tools):
        rules[f"arguments_{i}"] = f"%json {json.dumps(_schema(tool))}"
    start = "calls"
    if reasoning is not None:
        rules |= _reasoning_rules(reasoning, text, within)
        start = f"{'reasoning' if within else 'reasoning?'} calls"
    return "\n".join(f"{name}: {rule}" for name, rule in {"start": start, **rules}.items())


def _hermes(
    tools: Sequence[Tool], _ids: Mapping[str, int], text: _Text, parallel: bool
) -> dict[str, str]:
    begin, end = text(HermesParser.marker), text(HermesParser.closing)
    return {
        "calls": 'call ("\\n" call)*' if parallel else "call",
        "call": f'{begin} "\\n" object "\\n" {end}',
        "object": _object(tools, "arguments"),
    }


def _llama3(
    tools: Sequence[Tool], _ids: Mapping[str, int], _text: _Text, parallel: bool
) -> dict[str, str]:
    return {
        "calls": 'object ("; " object)*' if parallel else "object",
        "object": _object(tools, "parameters"),
    }


def _mistral(
    tools: Sequence[Tool], ids: Mapping[str, int], text: _Text, parallel: bool
) -> dict[str, str]:
    marker, arguments, call_id = map(text, MistralParser.control_tokens)
    if "[ARGS]" not in ids:
        others = ' (", " object)*' if parallel else ""
        return {
            "calls": f'{marker} " "? "[" object{others} "]"',
            "object": _object(tools, "arguments"),
        }
    has_id = f"{call_id} /[0-9A-Za-z]{{9}}/ " if "[CALL_ID]" in ids else ""
    calls = (
        f"{marker} {_quoted(tool.name)} {has_id}{arguments} arguments_{i}"
        for i, tool in enumerate(tools)
    )
    return {"calls": "call+" if parallel else "call", "call": " | ".join(calls)}


_FORMATS: dict[
    type[ToolParser],
    Callable[[Sequence[Tool], Mapping[str, int], _Text, bool], dict[str, str]],
] = {HermesParser: _hermes, Llama3Parser: _llama3, MistralParser: _mistral}


def _object(tools: Sequence[Tool], key: str) -> str:
    """Returns the rule of a call that is a JSON object, with the key of its arguments."""
    begins = (f'{{"name": {json.dumps(tool.name)}, "{key}": ' for tool in tools)
    return " | ".join(f'{_quoted(begin)} arguments_{i} "}}"' for i, begin in enumerate(begins))


def _reasoning_rules(markers: Markers, text: _Text, within: bool) -> dict[str, str]:
    end = text(markers.end)
    rules = {"reasoning": f"{'' if within else text(markers.begin)} thoughts /\\n{{0,2}}/"}
    if end.startswith("<["):  # a control token, which no expression matches
        rules["thoughts"] = f"/(.|\\n)*/ {end}"
    else:
        rules[f"thoughts[suffix={end}]"] = "/(.|\\n)*/"
    return rules


def _schema(tool: Tool) -> dict[str, Any]:
    """Returns the schema of a tool's arguments, as JSON without whitespace that is free."""
    schema = {**_ANY_ARGUMENTS, **tool.parameters}
    return {**schema, "x-guidance": _JSON_STYLE}


def _quoted(text: str) -> str:
    return json.dumps(text)
