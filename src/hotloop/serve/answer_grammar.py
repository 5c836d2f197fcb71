"""Grammars of whole answers: reasoning, followed by tool calls or the client's grammar.

Pure functions that translate a request into llguidance's Lark notation. They are needed if the
client's grammar does not describe the whole answer: the answer must call a tool (``tool_choice``
required, or a tool by name); it may either call a tool or follow a schema; or the model reasons
first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hotloop.errors import RequestError
from hotloop.serve.reasoning import Markers
from hotloop.serve.structured_output import quoted
from hotloop.serve.tool_use import Tool, ToolUse
from hotloop.serve.tools import HermesParser, Llama3Parser, MistralParser, ToolParser
from hotloop.text.tokenizer import Tokenizer
from hotloop.types import Grammar
from hotloop.untrusted import parse_json

_JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}

_PLAIN_KEYS = frozenset(
    {"type", "properties", "required", "$defs", "title", "description", "$schema"}
)
"""The only keywords of a schema that ``_parameters`` closes to further properties: others, such as
``allOf`` or ``patternProperties``, could declare some."""

_Rules = dict[str, str]
_Quote = Callable[[str], str]
"""A function that writes a text in Lark's notation: a control token by its id, else a string."""


def answer_grammar(
    grammar: Grammar | None,
    use: ToolUse,
    parser: type[ToolParser],
    tokenizer: Tokenizer,
    *,
    reasoning: Markers | None,
    in_reasoning: bool,
) -> Grammar | None:
    """Returns the grammar of an answer; None if the answer is not constrained.

    Args:
        grammar: The client's grammar of the answer's content.
        use: The tools.
        parser: The parser of the model's calls.
        tokenizer: The model's tokenizer; the grammar names control tokens by id.
        reasoning: The markers of the model's reasoning; None if it does not reason.
        in_reasoning: The answer begins within reasoning.

    Raises:
        RequestError: The client's grammar must be JSON, and is not.
    """
    if not use.forced and (grammar is None or not (use.tools or reasoning)):
        return grammar
    if grammar is not None and grammar.kind == "lark" and not use.forced:
        return grammar  # it describes the whole answer: its start rule cannot be part of another

    special, ids = tokenizer.backend.special_ids, tokenizer.backend.added_ids

    def quote(text: str) -> str:
        token_id = ids.get(text)
        return f"<[{token_id}]>" if token_id in special else quoted(text)

    rules: _Rules = {}
    bodies = []
    if tools := use.forced or use.tools:
        bodies.append("calls")
        rules |= _FORMATS[parser](tools, ids, quote, use.parallel)
        rules |= {f"arguments_{i}": _json(_parameters(tool)) for i, tool in enumerate(tools)}
    if grammar is not None and not use.forced:
        bodies.append("content")
        rules["content"] = _content(grammar)
    start = f"({' | '.join(bodies)})"
    if reasoning is not None:
        rules |= _reasoning(reasoning, quote, in_reasoning)
        start = f"{'reasoning' if in_reasoning else 'reasoning?'} {start}"
    lines = (f"{name}: {rule}" for name, rule in {"start": start, **rules}.items())
    return Grammar(kind="lark", source="\n".join(lines))


def _hermes(
    tools: Sequence[Tool], _ids: Mapping[str, int], quote: _Quote, parallel: bool
) -> _Rules:
    begin, end = quote(HermesParser.marker), quote(HermesParser.closing)
    return {
        "calls": 'call ("\\n" call)*' if parallel else "call",
        "call": f'{begin} "\\n" object "\\n" {end}',
        "object": _object(tools, "arguments"),
    }


def _llama3(
    tools: Sequence[Tool], _ids: Mapping[str, int], _quote: _Quote, parallel: bool
) -> _Rules:
    return {
        "calls": 'object ("; " object)*' if parallel else "object",
        "object": _object(tools, "parameters"),
    }


def _mistral(
    tools: Sequence[Tool], ids: Mapping[str, int], quote: _Quote, parallel: bool
) -> _Rules:
    marker, arguments, call_id = map(quote, MistralParser.control_tokens)
    if "[ARGS]" not in ids:
        others = ' (", " object)*' if parallel else ""
        return {
            "calls": f'{marker} " "? "[" object{others} "]"',
            "object": _object(tools, "arguments"),
        }
    has_id = f"{call_id} /[0-9A-Za-z]{{9}}/ " if "[CALL_ID]" in ids else ""
    calls = (
        f"{marker} {quoted(tool.name)} {has_id}{arguments} arguments_{i}"
        for i, tool in enumerate(tools)
    )
    return {"calls": "call+" if parallel else "call", "call": " | ".join(calls)}


_FORMATS: dict[
    type[ToolParser], Callable[[Sequence[Tool], Mapping[str, int], _Quote, bool], _Rules]
] = {HermesParser: _hermes, Llama3Parser: _llama3, MistralParser: _mistral}


def _object(tools: Sequence[Tool], key: str) -> str:
    """Returns the rule of a call that is a JSON object, with the key of its arguments."""
    begins = (f'{{"name": {json.dumps(tool.name)}, "{key}": ' for tool in tools)
    return " | ".join(f'{quoted(begin)} arguments_{i} "}}"' for i, begin in enumerate(begins))


def arguments_grammar(tool: Tool) -> Grammar:
    """Returns the grammar of the arguments of a tool's calls, by themselves."""
    return Grammar(kind="json_schema", source=json.dumps(_parameters(tool)))


def _parameters(tool: Tool) -> dict[str, Any]:
    """Returns the schema of a call's arguments.

    If the tool's schema does not say whether further arguments are allowed, they are not: a model
    that is forced to call could otherwise add arguments without end.
    """
    schema = {"type": "object", "properties": {}, **tool.parameters}
    listed, required = schema["properties"], schema.get("required", [])
    is_plain = isinstance(listed, dict) and isinstance(required, list)
    if (
        is_plain
        and _PLAIN_KEYS.issuperset(schema)
        and all(name in listed for name in map(str, required))
    ):
        schema["additionalProperties"] = False
    return schema


def _content(grammar: Grammar) -> str:
    """Returns the rule of a client's grammar."""
    if grammar.kind == "regex":
        return "/" + _ESCAPE_OR_SLASH.sub(_escaped_slash, grammar.source) + "/"
    source = grammar.source or '{"type": "object"}'
    return _json(parse_json(source, "the JSON schema", refuse=_refuse))


def _refuse(name: object, problem: str) -> RequestError:
    return RequestError(f"{name} {problem}.")


def _json(schema: Mapping[str, Any]) -> str:
    """Returns the rule of JSON without free whitespace, which small models repeat without end."""
    return f"%json {json.dumps({**schema, 'x-guidance': _JSON_STYLE})}"


def _reasoning(markers: Markers, quote: _Quote, in_reasoning: bool) -> _Rules:
    begin, end = quote(markers.begin), quote(markers.end)
    rules = {"reasoning": f"{'' if in_reasoning else f'{begin} '}thoughts /\\n{{0,2}}/"}
    if end.startswith("<["):  # a control token, which no expression matches
        rules["thoughts"] = f"/(.|\\n)*/ {end}"
    else:
        rules[f"thoughts[suffix={end}]"] = "/(.|\\n)*/"
    return rules


_ESCAPE_OR_SLASH = re.compile(r"\\.|/|\n", re.DOTALL)


def _escaped_slash(found: re.Match[str]) -> str:
    """Escapes slashes, which would end an expression between slashes; keeps escape sequences."""
    return {"/": "\\/", "\n": "\\n"}.get(found[0], found[0])
