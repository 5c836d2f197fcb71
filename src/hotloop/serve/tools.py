"""Parsers of tool calls in a model's text, for the formats that models use.

The text may be divided anywhere. A parser forwards a call's arguments while they arrive, as the
model wrote them. Text that is not a call of its format remains content. Once a call's name and
the beginning of its arguments have arrived, it is a call: if the arguments turn out not to be JSON,
the client must handle that, as with OpenAI's API.

==========  ===================================================  ===================
parser      a call                                               models
==========  ===================================================  ===================
hermes      ``<tool_call>{"name": …, "arguments": {…}}           Hermes, Qwen
            </tool_call>``
llama3      ``{"name": …, "parameters": {…}}``, the whole        Llama 3.1 to 3.3
            answer, or after ``<|python_tag|>``
mistral     ``[TOOL_CALLS] [{"name": …, "arguments": {…}}]``,    Mistral
            or ``[TOOL_CALLS]name{…}`` for each call
==========  ===================================================  ===================

A call's keys come in any order. ``answer_grammar`` forces calls in these formats.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import string
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar, Literal

from hotloop.errors import UnknownNameError
from hotloop.serve.json_scan import SPACE, JsonScanner
from hotloop.serve.parts import CallArguments, CallStart, Content, Part
from hotloop.text.detokenize import final_length
from hotloop.text.tokenizer import Tokenizer

_NOTHING = "{}"  # the arguments of a call without any


class ToolParser:
    """Divides the text of an answer into content and tool calls.

    Whitespace around calls is dropped.

    Args:
        names: The names of the tools.
        parallel: An answer may have several calls; if not, calls after the first are dropped.
    """

    marker: ClassVar[str]
    """The text that begins a call."""
    closing: ClassVar[str] = ""
    """The text that ends a call, if the format has one."""
    control_tokens: ClassVar[tuple[str, ...]] = ()
    """Spellings of the format's control tokens, which the answer's text must keep."""

    def __init__(self, names: Collection[str], *, parallel: bool = True) -> None:
        self._names, self._parallel = names, parallel
        self._parts: list[Part] = []
        self._held = ""  # text that the current state cannot interpret yet
        self._space = ""  # whitespace that is dropped before a call
        self._raw = ""  # text of the open call, until it is announced
        self._n_calls = 0
        self._announced = False  # the open call's ``CallStart`` has been added
        self._call = _CallObject()
        self._arguments = JsonScanner()
        self._state: Callable[[str], int] = self._in_content

    def push(self, text: str) -> Sequence[Part]:
        """Takes more text; returns the parts that are certain now."""
        self._parts = []
        text, at = self._held + text, 0
        while at < len(text):
            state = self._state
            n = state(text[at:])
            if n == 0 and self._state == state:
                break
            at += n
        self._held = text[at:]
        return self._parts

    def end(self) -> Sequence[Part]:
        """Ends the text; returns the parts that were withheld."""
        self._parts = []
        held, self._held = self._held, ""
        if self._state == self._in_content:
            self._add_content(held)
        elif self._state == self._in_broken_arguments:
            self._add_arguments(held)
        elif self._raw:  # a call that was never announced
            self._refuse()
            self._add_content(held)
        if self._n_calls == 0 and self._space:
            self._add(Content(self._space))
        return self._parts

    @classmethod
    def is_used_by(cls, tokenizer: Tokenizer) -> bool:
        """Returns whether a model's template or vocabulary shows that it uses the format."""
        return cls.marker in tokenizer.backend.added_ids or cls.marker in _template(tokenizer)

    @classmethod
    def format_calls(cls, calls: Sequence[tuple[str, str]]) -> str:
        """Formats calls, each a name and arguments in JSON, as the model writes them."""
        raise NotImplementedError

    @classmethod
    def template_id(cls, call_id: str) -> str:
        """Returns a call's id in the form that templates of this format take."""
        return call_id

    # A state takes text and returns how many of its characters it has consumed. One that consumes
    # nothing and stays needs more text.

    def _in_content(self, text: str) -> int:
        at = text.find(self.marker)
        if at < 0:
            n = final_length(text, (self.marker,))
            self._add_content(text[:n])
            return n
        self._add_content(text[:at])
        self._raw, self._space = self._space + self.marker, ""
        self._state = self._after_marker
        return at + len(self.marker)

    def _after_marker(self, text: str) -> int:
        del text
        self._begin_object()
        return 0

    def _in_object(self, text: str) -> int:
        call = self._call
        n = call.push(text)
        if not self._announced:
            self._raw += text[:n]
            if call.name and not self._accepts(call.name):
                self._refuse()
                return n
            if call.is_call:
                self._announce(call.name)
            elif call.state != "open":
                self._refuse()
                return n
        if self._announced:
            self._add_arguments(call.take_arguments())
            if call.state == "broken":
                self._state = self._in_broken_arguments
            elif call.state == "done":
                self._state = self._after_call
        return n

    def _in_broken_arguments(self, text: str) -> int:
        ends = [one for one in (self.closing, self.marker) if one]
        found = [at for one in ends if (at := text.find(one)) >= 0]
        n = min(found, default=final_length(text, ends))
        self._add_arguments(text[:n])
        if found:
            self._state = self._after_call
        return n

    def _after_call(self, text: str) -> int:
        self._state = self._in_content
        del text
        return 0

    def _begin_object(self) -> None:
        self._call, self._announced = _CallObject(), False
        self._state = self._in_object

    def _accepts(self, name: str) -> bool:
        """Returns whether an object with this name is a call.

        By default it is, even if there is no such tool: the client can then tell the model.
        """
        del name
        return True

    def _announce(self, name: str, call_id: str = "") -> None:
        self._raw, self._announced = "", True
        self._add(CallStart(self._n_calls, call_id or self._new_id(), name))
        self._n_calls += 1

    def _refuse(self) -> None:
        """Turns the text of a failed call into content."""
        raw, self._raw = self._raw, ""
        self._add_content(raw)
        self._state = self._in_content

    def _new_id(self) -> str:
        return f"call_{secrets.token_hex(12)}"

    def _add_content(self, text: str) -> None:
        body = text.rstrip(SPACE)
        if body:
            self._add(Content(self._space + body))
            self._space = text[len(body) :]
        else:
            self._space += text

    def _add_arguments(self, text: str) -> None:
        if text:
            self._add(CallArguments(self._n_calls - 1, text))

    def _add(self, part: Part) -> None:
        """Adds a part; joins it with the last part if both belong to the same text."""
        last = self._parts[-1] if self._parts else None
        match last, part:
            case Content(), Content():
                self._parts[-1] = Content(last.text + part.text)
            case CallArguments(), CallArguments() if last.index == part.index:
                self._parts[-1] = CallArguments(last.index, last.text + part.text)
            case _, CallStart() | CallArguments() if part.index > 0 and not self._parallel:
                pass
            case _:
                self._parts.append(part)


class HermesParser(ToolParser):
    """Calls between ``<tool_call>`` and ``</tool_call>``."""

    marker = "<tool_call>"
    closing = "</tool_call>"
    control_tokens = (marker, closing)

    @classmethod
    def format_calls(cls, calls: Sequence[tuple[str, str]]) -> str:
        """See ``ToolParser``."""
        objects = [_call_json(name, "arguments", arguments) for name, arguments in calls]
        return "\n".join(f"{cls.marker}\n{one}\n{cls.closing}" for one in objects)

    def _after_call(self, text: str) -> int:
        rest = text.lstrip(SPACE)
        n_space = len(text) - len(rest)
        if rest.startswith(self.closing):
            self._state = self._in_content
            return n_space + len(self.closing)
        if not self.closing.startswith(rest):
            self._state = self._in_content
        return 0


class Llama3Parser(ToolParser):
    """Calls that are the whole answer, or follow ``<|python_tag|>``; ``;`` separates several.

    The name must be that of a tool; any other JSON object is content.
    """

    marker = "<|python_tag|>"
    control_tokens = (marker,)

    def __init__(self, names: Collection[str], *, parallel: bool = True) -> None:
        super().__init__(names, parallel=parallel)
        self._state = self._at_beginning

    @classmethod
    def format_calls(cls, calls: Sequence[tuple[str, str]]) -> str:
        """See ``ToolParser``."""
        return "; ".join(_call_json(name, "parameters", arguments) for name, arguments in calls)

    def _at_beginning(self, text: str) -> int:
        rest = text.lstrip(SPACE)
        n_space = len(text) - len(rest)
        self._space += text[:n_space]
        if rest.startswith("{"):
            self._raw, self._space = self._space, ""
            self._begin_object()
        elif rest:
            self._state = self._in_content
        return n_space

    def _after_call(self, text: str) -> int:
        match = _SEPARATOR.match(text)
        assert match is not None, "the pattern matches nothing, too"
        if match.end() == len(text):
            return 0
        if text[match.end()] != "{":
            self._state = self._in_content
            return 0
        self._raw = match[0]
        self._begin_object()
        return match.end()

    def _accepts(self, name: str) -> bool:
        return name in self._names


class MistralParser(ToolParser):
    """Calls after ``[TOOL_CALLS]``: a list, or a marker, name and object for each call."""

    marker = "[TOOL_CALLS]"
    control_tokens = (marker, "[ARGS]", "[CALL_ID]")

    def __init__(self, names: Collection[str], *, parallel: bool = True) -> None:
        super().__init__(names, parallel=parallel)
        self._in_list = False

    @classmethod
    def format_calls(cls, calls: Sequence[tuple[str, str]]) -> str:
        """See ``ToolParser``."""
        objects = [_call_json(name, "arguments", arguments) for name, arguments in calls]
        return f"{cls.marker} [{', '.join(objects)}]"

    @classmethod
    def template_id(cls, call_id: str) -> str:
        """See ``ToolParser``; templates refuse ids other than nine letters and digits."""
        if re.fullmatch("[0-9A-Za-z]{9}", call_id):
            return call_id
        return hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).hexdigest()[:9]

    def _after_marker(self, text: str) -> int:
        rest = text.lstrip(SPACE)
        if not rest:
            return 0
        self._in_list = rest.startswith("[")
        if self._in_list:
            n = len(text) - len(rest) + 1
            self._raw += text[:n]
            self._state = self._after_call
            return n
        if match := _NAMED.match(text):
            self._announce(match["name"], match["id"] or "")
            self._arguments = JsonScanner()
            self._state = self._in_arguments
            return match.end()
        if not _NAME_BEGINS.fullmatch(text):
            self._refuse()
        return 0

    def _in_arguments(self, text: str) -> int:
        n = self._arguments.push(text)
        self._add_arguments(text[:n])
        if self._arguments.state == "broken":
            self._state = self._in_broken_arguments
        elif self._arguments.state == "done":
            self._state = self._in_content
        return n

    def _after_call(self, text: str) -> int:
        """Finds the next call of a list, or its end."""
        if not self._in_list:
            self._state = self._in_content
            return 0
        rest = text.lstrip(SPACE + ",")
        n = len(text) - len(rest)
        if not rest:
            return 0
        self._raw += text[:n]
        if rest.startswith("{"):
            self._begin_object()
            return n
        if rest.startswith("]") and self.marker not in self._raw:  # not an empty list
            self._raw, self._state = "", self._in_content
            return n + 1
        self._refuse()
        return n

    def _new_id(self) -> str:
        # Mistral's templates take no other ids.
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "llama3": Llama3Parser,
    "mistral": MistralParser,
}
"""The parsers by name; ``auto`` takes the first whose format a model uses."""


def tool_parser(name: str, tokenizer: Tokenizer) -> type[ToolParser]:
    """Returns the parser of a model's calls.

    Args:
        name: Its name; ``auto`` decides by the model's template and vocabulary, and is ``hermes``
            if the template does not support tools, or uses none of these formats.
        tokenizer: The model's tokenizer.

    Raises:
        UnknownNameError: There is no parser of that name.
    """
    check_name(name)
    if name in PARSERS:
        return PARSERS[name]
    if not template_supports_tools(tokenizer):
        return HermesParser
    return next((one for one in PARSERS.values() if one.is_used_by(tokenizer)), HermesParser)


def check_name(name: str) -> None:
    """Refuses an unknown name of a parser.

    Raises:
        UnknownNameError: There is no parser of that name.
    """
    if name != "auto" and name not in PARSERS:
        raise UnknownNameError("tool parser", name, ("auto", *PARSERS))


def template_supports_tools(tokenizer: Tokenizer) -> bool:
    """Returns whether a model's chat template writes definitions of tools."""
    return re.search(r"\btools\b", _template(tokenizer)) is not None


def template_supports_several_calls(tokenizer: Tokenizer) -> bool:
    """Returns whether a model's chat template supports several calls per answer.

    Those of Llama 3.1 do not.
    """
    return "single tool-call" not in _template(tokenizer)


def _template(tokenizer: Tokenizer) -> str:
    return tokenizer.tool_template or tokenizer.chat_template or ""


def _call_json(name: str, key: str, arguments: str) -> str:
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": {arguments}}}'


_SEPARATOR = re.compile(rf"[{SPACE}]*(;[{SPACE}]*)?")
_NAME = r"\s*(?P<name>[^\s\[\]{}]{1,256})"
_NAMED = re.compile(rf"{_NAME}(\[CALL_ID\](?P<id>\w{{1,64}}))?(\[ARGS\])?\s*(?=\{{)", re.ASCII)
_NAME_BEGINS = re.compile(rf"{_NAME}(\[[\w\]\[]{{0,100}})?\s*", re.ASCII)


_ARGUMENTS = ("arguments", "parameters")
_KEYS = frozenset({"name", "id", "type", *_ARGUMENTS})


class _CallObject:
    """Scans a call that is a JSON object: a name and arguments, in any order.

    Attributes:
        state: ``open`` until it is complete (``done``), or cannot become a call (``broken``).
        name: The tool's name; empty until it is known.
    """

    def __init__(self) -> None:
        self.state: Literal["open", "done", "broken"] = "open"
        self.name = ""
        self._expected: Literal["{", "key or }", "key", ":", "value", ", or }"] = "{"
        self._value: JsonScanner | None = None  # the open key or value
        self._role: Literal["key", "name", "arguments", "arguments in a string", "other"] = "key"
        self._pieces: list[str] = []  # of its text
        self._key = ""
        self._arguments = ""  # not taken yet
        self._has_arguments = False

    @property
    def is_call(self) -> bool:
        """True once the name is known and the arguments have begun."""
        return bool(self.name) and self._has_arguments

    def push(self, text: str) -> int:
        """Takes more text; returns how many of its characters belong to the call."""
        at = 0
        while at < len(text) and self.state == "open":
            if self._value is not None:
                at += self._in_value(self._value, text[at:])
            elif text[at] in SPACE:
                at += 1
            else:
                at += self._structure(text[at])
        return at

    def take_arguments(self) -> str:
        """Returns the arguments that have arrived since the last call."""
        arguments, self._arguments = self._arguments, ""
        return arguments

    def _structure(self, character: str) -> int:
        """Takes a character between keys and values; returns 0 if it is not consumed."""
        match self._expected, character:
            case "{", "{":
                self._expected = "key or }"
            case (("key" | "key or }"), '"'):
                self._begin("key")
                return 0
            case ":", ":":
                self._expected = "value"
            case "value", _:
                self._begin_value(character)
                return 0
            case ", or }", ",":
                self._expected = "key"
            case (("key or }" | ", or }"), "}"):
                self._end()
            case ", or }", _ if self.is_call:
                self.state = "done"  # models forget the last brace
                return 0
            case _:
                self.state = "broken"
                return 0
        return 1

    def _begin(
        self, role: Literal["key", "name", "arguments", "arguments in a string", "other"]
    ) -> None:
        self._role, self._value, self._pieces = role, JsonScanner(), []

    def _begin_value(self, first: str) -> None:
        if self._key == "name" and not self.name and first == '"':
            self._begin("name")
        elif self._key not in _ARGUMENTS or self._has_arguments:
            self._begin("other")
        elif first == "{":
            self._begin("arguments")
            self._has_arguments = True
        elif first in '"n':  # some models write JSON in a string, or null
            self._begin("arguments in a string")
        else:
            self.state = "broken"

    def _in_value(self, value: JsonScanner, text: str) -> int:
        n = value.push(text)
        if self._role == "arguments":
            self._arguments += text[:n]
        elif self._role != "other":
            self._pieces.append(text[:n])
        if value.state == "broken":
            self.state = "broken"
        elif value.state == "done":
            self._value = None
            self._end_value()
        return n

    def _end_value(self) -> None:
        value: Any = json.loads("".join(self._pieces)) if self._pieces else None
        self._expected = ":" if self._role == "key" else ", or }"
        if isinstance(value, str) and not _is_encodable(value):
            self.state = "broken"
        elif self._role == "key":
            self._key = value
            if not self.name and value not in _KEYS:
                self.state = "broken"  # an object of another kind
        elif self._role == "name":
            self.name = value
            if not value:
                self.state = "broken"
        elif self._role == "arguments in a string":
            self._arguments, self._has_arguments = value or _NOTHING, True

    def _end(self) -> None:
        if not self._has_arguments:
            self._arguments, self._has_arguments = _NOTHING, True
        self.state = "done" if self.name else "broken"


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return True
