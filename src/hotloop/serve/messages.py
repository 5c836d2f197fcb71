"""Converts messages of the API to the form that chat templates expect.

Templates expect less variety than clients send: content is one text, a call's arguments are an
object, an absent field is not null, and the only roles are system, user, assistant and tool. If a
model's template does not support tools, their definitions, calls and results are written as text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hotloop.errors import shorten_value
from hotloop.serve.errors import ApiError, invalid_value
from hotloop.serve.tool_use import Tool
from hotloop.serve.tools import ToolParser

Message = dict[str, Any]

_TEXT_PARTS = ("text", "input_text", "output_text")
_ROLES = {"developer": "system", "function": "tool"}  # other names of roles


def template_messages(
    messages: Sequence[Mapping[str, Any]],
    parser: type[ToolParser],
    *,
    tools: Sequence[Tool],
    as_text: bool,
) -> list[Message]:
    """Returns a conversation in the form that a chat template expects.

    Args:
        messages: The messages of a request.
        parser: The parser of the model's calls.
        tools: The tools that the prompt defines.
        as_text: The template does not support tools: write definitions, calls and results as text.

    Raises:
        ApiError: A message is not valid, or has content that the model cannot read.
    """
    if not messages:
        raise ApiError(
            400, "messages: the list is empty: give at least one message.", param="messages"
        )
    read = [_message(f"messages[{i}]", message, parser) for i, message in enumerate(messages)]
    if not as_text:
        return read
    read = [_as_text(message, parser) for message in read]
    return _with_definitions(read, parser, tools) if tools else read


def _message(place: str, message: Mapping[str, Any], parser: type[ToolParser]) -> Message:
    given = {key: value for key, value in message.items() if value is not None}
    role = given.get("role")
    if not isinstance(role, str):
        raise invalid_value(f"{place}.role", f"must be text, not {shorten_value(role)}.")
    given["role"] = _ROLES.get(role, role)
    given["content"] = content_text(f"{place}.content", given.get("content", ""))
    calls = given.pop("tool_calls", None)
    if calls:
        if not isinstance(calls, list):
            raise invalid_value(
                f"{place}.tool_calls", f"must be a list, not {shorten_value(calls)}."
            )
        given["tool_calls"] = [
            _call(f"{place}.tool_calls[{i}]", call, parser) for i, call in enumerate(calls)
        ]
    if isinstance(call_id := given.get("tool_call_id"), str):
        given["tool_call_id"] = parser.template_id(call_id)
    return given


def content_text(place: str, content: object) -> str:
    """Returns the text of a message's content, from all of its parts.

    Args:
        place: The place in the request, for errors.
        content: A text, or a list of parts.

    Raises:
        ApiError: It is neither, or a part is not text.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid_value(
            place, f"must be text or a list of parts, not {shorten_value(content)}."
        )
    texts = []
    for i, part in enumerate(content):
        match part:
            case str():
                texts.append(part)
            case {"type": str(kind), "text": str(text)} if kind in _TEXT_PARTS:
                texts.append(text)
            case {"type": "refusal", "refusal": str(text)}:
                texts.append(text)
            case {"type": str(kind)} if kind not in _TEXT_PARTS:
                raise invalid_value(
                    f"{place}[{i}]",
                    f"has the type {shorten_value(kind)}, but this model reads only text.",
                )
            case _:
                raise invalid_value(
                    f"{place}[{i}]", f"must be a part with a text, not {shorten_value(part)}."
                )
    return "\n".join(texts)


def _call(place: str, call: Any, parser: type[ToolParser]) -> Message:
    match call:
        case {"function": {"name": str(name)} as function}:
            arguments = function.get("arguments")
        case _:
            raise invalid_value(place, f"must be a call of a function, not {shorten_value(call)}.")
    if isinstance(arguments, str):
        arguments = _parsed(arguments)
    elif arguments is None:
        arguments = {}
    elif not isinstance(arguments, dict):
        raise invalid_value(
            f"{place}.function.arguments", f"must be JSON as text, not {shorten_value(arguments)}."
        )
    given: Message = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if isinstance(call_id := call.get("id"), str):
        given["id"] = parser.template_id(call_id)
    return given


def _parsed(arguments: str) -> Any:
    """Returns arguments as an object; unchanged if they are not JSON, as in a cut-off call."""
    try:
        value = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


# --------------------------------------------------------------------- templates without tools


def _as_text(message: Message, parser: type[ToolParser]) -> Message:
    """Writes a message's calls, or a result, as text."""
    if message["role"] == "tool":
        return {
            "role": "user",
            "content": f"<tool_response>\n{message['content']}\n</tool_response>",
        }
    calls = message.get("tool_calls")
    if not calls:
        return message
    functions = [call["function"] for call in calls]
    written = parser.format_calls([(f["name"], _as_json(f["arguments"])) for f in functions])
    content = "\n".join(filter(None, [message["content"], written]))
    return {k: v for k, v in message.items() if k != "tool_calls"} | {"content": content}


def _with_definitions(
    messages: list[Message], parser: type[ToolParser], tools: Sequence[Tool]
) -> list[Message]:
    """Writes the definitions of tools into the system message."""
    definitions = "\n".join(_as_json(tool.definition) for tool in tools)
    instructions = (
        f"These tools can be called:\n<tools>\n{definitions}\n</tools>\n"
        "To call a tool, answer with its name and its arguments in JSON, in this form:\n"
        f"{parser.format_calls([('NAME', '{…}')])}"
    )
    first, *others = messages
    if first["role"] != "system":
        return [{"role": "system", "content": instructions}, *messages]
    content = "\n\n".join(filter(None, [first["content"], instructions]))
    return [{**first, "content": content}, *others]


def _as_json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
