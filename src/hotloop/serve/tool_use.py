"""Reads a request's tools: their definitions, and the tools that the answer may call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hotloop.errors import shorten_value
from hotloop.serve.errors import ApiError, invalid_value

MAX_NAME_CHARS = 256
MAX_TOOLS = 1024

_CHOICES = ("none", "auto", "required")


@dataclass(frozen=True)
class Tool:
    """A tool that an answer may call.

    Attributes:
        name: Its name.
        definition: Its definition, in the form that chat templates expect.
        parameters: The JSON schema of its arguments.
    """

    name: str
    definition: Mapping[str, Any]
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class ToolUse:
    """The tools of a request.

    Attributes:
        tools: The tools that the prompt defines.
        choice: ``auto``: an answer may call tools; ``required``: it must; ``named``: it must call
            the tool ``name``.
        name: The name of that tool.
        parallel: An answer may have several calls; with a named tool it has one.
    """

    tools: tuple[Tool, ...] = ()
    choice: Literal["auto", "required", "named"] = "auto"
    name: str = ""
    parallel: bool = True

    @property
    def forced(self) -> tuple[Tool, ...]:
        """The tools of which the answer must call one; empty if it need not."""
        if self.choice == "auto":
            return ()
        return tuple(t for t in self.tools if self.choice == "required" or t.name == self.name)


def read_tool_use(
    tools: Sequence[Mapping[str, Any]] | None, choice: object, *, parallel: bool = True
) -> ToolUse:
    """Reads the fields ``tools`` and ``tool_choice`` of a request.

    It accepts definitions and choices of both of OpenAI's APIs: with an object ``function``, or
    with its fields beside the type. With the choice ``none``, the prompt defines no tools.

    Args:
        tools: The definitions.
        choice: The choice; None means ``auto``.
        parallel: An answer may have several calls.

    Raises:
        ApiError: A definition or the choice is not valid.
    """
    given = [_tool(i, tool) for i, tool in enumerate(tools or ())]
    if len(given) > MAX_TOOLS:
        raise ApiError(400, f"there are more than {MAX_TOOLS} tools.", param="tools")
    names = [tool.name for tool in given]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise invalid_value(f"tools[{i}]", f"the name {shorten_value(name)} appears twice.")
    kind, name = _choice(choice)
    if kind in ("required", "named") and not given:
        raise invalid_value("tool_choice", f"{kind} needs tools, and there are none.")
    if kind == "named" and name not in names:
        raise invalid_value("tool_choice", f"there is no tool {shorten_value(name)}.")
    if kind == "none":
        return ToolUse()
    return ToolUse(tuple(given), kind, name, parallel and kind != "named")


def _choice(choice: Any) -> tuple[Literal["none", "auto", "required", "named"], str]:
    match choice:
        case None | "auto":
            return "auto", ""
        case "none":
            return "none", ""
        case "required" | "any":
            return "required", ""
        case {"type": "function", "function": {"name": str(name)}}:
            return "named", name
        case {"type": "function", "name": str(name)}:
            return "named", name
        case _:
            raise invalid_value(
                "tool_choice",
                f"must be one of {', '.join(_CHOICES)}, or an object with the type function and a "
                f"name, not {shorten_value(choice)}.",
            )


def _tool(index: int, given: Mapping[str, Any]) -> Tool:
    place = f"tools[{index}]"
    kind = given.get("type")
    if kind != "function":
        raise invalid_value(
            place,
            f"must have the type function, the only supported one, not {shorten_value(kind)}.",
        )
    if "function" in given:
        function, place = given["function"], f"{place}.function"
    else:
        function = {key: value for key, value in given.items() if key != "type"}
    if not isinstance(function, Mapping):
        raise invalid_value(place, f"must be an object, not {shorten_value(function)}.")
    function = {key: value for key, value in function.items() if value is not None}
    name, parameters = function.get("name"), function.get("parameters", {})
    if not isinstance(name, str) or not name or len(name) > MAX_NAME_CHARS:
        raise invalid_value(
            f"{place}.name",
            f"must be text of 1 to {MAX_NAME_CHARS} characters, not {shorten_value(name)}.",
        )
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise invalid_value(
            f"{place}.parameters",
            f"must be the JSON schema of an object, not {shorten_value(parameters)}.",
        )
    return Tool(name, {"type": "function", "function": function}, parameters)
