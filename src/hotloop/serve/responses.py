"""``/v1/responses``: answers items with items; nothing is stored.

An answer consists of items: reasoning, messages and calls. A stream has events for the beginning,
the content and the end of each item; a whole response is made from the same parts.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hotloop.errors import shorten_value
from hotloop.serve.answers import as_string, compact, respond
from hotloop.serve.bodies import read
from hotloop.serve.errors import ApiError, as_api_error, invalid_value
from hotloop.serve.logprobs import chat_logprobs
from hotloop.serve.messages import Message, content_text
from hotloop.serve.parts import CallArguments, CallStart, Content, Parser, Part, Reasoning
from hotloop.serve.schemas import Conversation, ResponsesBody
from hotloop.serve.served import ServedModel
from hotloop.serve.submit import submit_turn
from hotloop.serve.tool_use import ToolUse, read_tool_use
from hotloop.text.tokenizer import Tokenizer
from hotloop.types import Delta, FinishReason, SamplingParams, TokenLogprob

Item = dict[str, Any]


async def responses(request: Request) -> Response:
    """Answers items with items."""
    served: ServedModel = request.app.state.served
    request_body = await read(request, ResponsesBody, served.settings)
    served.check_name(request_body.model)
    _check_stateless(request_body)
    model = served.model
    params = request_body.params(model.sampling, served.settings)
    use = read_tool_use(
        request_body.tools, request_body.tool_choice, parallel=request_body.parallel_tool_calls
    )
    conversation = Conversation(
        messages=messages_of(request_body.input, request_body.instructions),
        chat_template_kwargs=request_body.chat_template_kwargs,
    )
    turn, ticket = await submit_turn(
        request, model, lambda: model.required_conversations.turn(conversation, use, params)
    )
    about = _about(served, request_body, use, turn.params)
    formatter = ResponsesFormatter(about, turn.parser(), model.tokenizer)
    return await respond(served, ticket, formatter, request_body, request.receive)


def _check_stateless(request_body: ResponsesBody) -> None:
    """Refuses fields that need stored responses, or several answers.

    Raises:
        ApiError: A field is not supported; ``param`` names it.
    """
    for name, fix in (
        ("previous_response_id", "send the items of earlier responses in input"),
        ("conversation", "send the items of earlier responses in input"),
        ("background", "leave it out"),
    ):
        if getattr(request_body, name):
            raise ApiError(400, f"{name}: this server stores no responses: {fix}.", param=name)
    if request_body.n not in (None, 1):
        raise ApiError(400, f"n: a response has one answer, not {request_body.n}.", param="n")


def _about(
    served: ServedModel, request_body: ResponsesBody, use: ToolUse, params: SamplingParams
) -> dict[str, Any]:
    """Returns the fields of a response that are known before its answer."""
    return {
        "id": _new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "model": served.settings.name,
        "instructions": request_body.instructions,
        "max_output_tokens": request_body.max_output_tokens,
        "metadata": request_body.metadata,
        "parallel_tool_calls": request_body.parallel_tool_calls,
        "previous_response_id": None,
        "store": False,
        "temperature": params.temperature,
        "text": {"format": request_body.text.format},
        "tool_choice": request_body.tool_choice or "auto",
        "tools": [{"type": "function", **t.definition["function"]} for t in use.tools],
        "top_logprobs": request_body.top_logprobs,
        "top_p": params.top_p,
        "truncation": "disabled",
    }


# ----------------------------------------------------------------------------------------- input


def messages_of(
    items: str | Sequence[Mapping[str, Any]], instructions: str | None
) -> list[Message]:
    """Returns the items of a request as the messages of a chat.

    Consecutive items of the assistant become one message, which can have reasoning, content and
    calls. Another message begins with reasoning, which is the first part of an answer, and with
    content after content or a call.
    Instructions come first, together with a system message that follows.

    Args:
        items: The field ``input``.
        instructions: The field ``instructions``.

    Raises:
        ApiError: An item is not valid, or its kind is not supported.
    """
    if not items:
        raise ApiError(400, "input: it is empty: give a text, or at least one item.", param="input")
    messages: list[Message] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    for i, item in enumerate(items):
        _add_item(messages, f"input[{i}]", {k: v for k, v in item.items() if v is not None})
    if instructions is not None and len(messages) > 1 and messages[1]["role"] == "system":
        first, second, *others = messages
        content = f"{first['content']}\n\n{second['content']}"
        return [{"role": "system", "content": content}, *others]
    return messages


def _add_item(messages: list[Message], place: str, item: Item) -> None:
    match item:
        case {"role": str(role)} if item.get("type", "message") == "message":
            role = "system" if role == "developer" else role
            content = content_text(f"{place}.content", item.get("content", ""))
            if role == "assistant":
                message = _assistant_message(messages, without=("content", "tool_calls"))
                message["content"] = content
            else:
                messages.append({"role": role, "content": content})
        case {"type": "reasoning"}:
            thoughts = item.get("content") or item.get("summary") or []
            text = _thoughts(place, thoughts)
            messages.append({"role": "assistant", "reasoning_content": text})
        case {"type": "function_call", "name": str(name), "arguments": str(arguments)}:
            call = {"type": "function", "function": {"name": name, "arguments": arguments}}
            if isinstance(call_id := item.get("call_id"), str):
                call["id"] = call_id
            _assistant_message(messages).setdefault("tool_calls", []).append(call)
        case {"type": "function_call_output", "call_id": str(call_id)}:
            content = content_text(f"{place}.output", item.get("output", ""))
            messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
        case {"type": "item_reference"}:
            raise invalid_value(place, "this server stores no items: send the item itself.")
        case _:
            raise invalid_value(
                place,
                "must be a message, a reasoning, a function_call or a function_call_output, with "
                f"their fields, not {shorten_value(item)}.",
            )


def _thoughts(place: str, parts: Any) -> str:
    """Returns the text of a reasoning item, from all of its parts."""
    match parts:
        case [*_] if all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
            return "\n".join(part["text"] for part in parts)
        case _:
            raise invalid_value(place, f"must have parts with a text, not {shorten_value(parts)}.")


def _assistant_message(messages: list[Message], *, without: Sequence[str] = ()) -> Message:
    """Returns the message of the assistant to which an item belongs: the last one, or a new one.

    Args:
        messages: The messages so far; a new one is appended.
        without: Fields that the message must not have yet.
    """
    last = messages[-1] if messages else None
    if last is None or last["role"] != "assistant" or any(field in last for field in without):
        messages.append({"role": "assistant"})
    return messages[-1]


# ---------------------------------------------------------------------------------------- output


class ResponsesFormatter:
    """Formats the answer as a response with items.

    Args:
        about: The fields that are known before the answer.
        parser: The parser of the answer.
        tokenizer: The model's tokenizer.
    """

    def __init__(
        self, about: Mapping[str, Any], parser: Parser, tokenizer: Tokenizer | None
    ) -> None:
        self._about, self._parser, self._tokenizer = about, parser, tokenizer
        self._n_events = 0
        self._items: list[Item] = []  # the last one can be open
        self._text: list[str] = []  # of the open item
        self._delta = ""  # the common fields of the open item's delta events; empty if none is open
        self._logprobs: list[TokenLogprob] = []  # of tokens whose text has not been sent
        self._n_reasoning_tokens = 0
        self._finish_reason: FinishReason | None = None

    # ------------------------------------------------------------------------------ streamed

    def first_events(self) -> str:
        """See ``Formatter``."""
        response = {"response": self._response("in_progress")}
        return self._event("response.created", response) + self._event(
            "response.in_progress", response
        )

    def events(self, delta: Delta, usage: str) -> str:
        """See ``Formatter``."""
        del usage  # it is in the last event
        return "".join(self._take(delta))

    def last_events(self, usage: Mapping[str, Any], *, wanted: bool) -> str:
        """See ``Formatter``."""
        del wanted
        status = self._status()
        return self._event(f"response.{status}", {"response": self._response(status, usage=usage)})

    def error_events(self, error: Exception) -> str:
        """See ``Formatter``."""
        events = self._end_item("incomplete") if self._delta else []
        failed = {"response": self._response("failed", error=error)}
        return "".join([*events, self._event("response.failed", failed)])

    # ------------------------------------------------------------------------------ whole

    def body(self, deltas: Sequence[Delta], usage: dict[str, Any]) -> dict[str, Any]:
        """See ``Formatter``."""
        for delta in deltas:
            self._take(delta)
        return self._response(self._status(), usage=usage)

    # ------------------------------------------------------------------------------ both

    def _take(self, delta: Delta) -> list[str]:
        """Takes a delta of the answer; returns its events."""
        self._logprobs += delta.logprobs or ()
        parts: list[Part] = list(self._parser.push(delta.text)) if delta.text else []
        if delta.generation is not None:
            self._finish_reason = delta.generation.finish_reason
            parts += self._parser.end()
        events = [event for part in parts for event in self._part_events(part)]
        if self._is_open("reasoning"):
            self._n_reasoning_tokens += len(delta.token_ids)
        if delta.generation is not None:
            if not self._items:
                events += self._begin(_message())  # an answer of no text
            events += self._end_item(self._status())
        return events

    def _part_events(self, part: Part) -> list[str]:
        match part:
            case Content(text):
                return self._append_text("message", text, _message)
            case Reasoning(text):
                return self._append_text("reasoning", text, _reasoning)
            case CallArguments(_, text):
                return self._append_text("function_call", text)
            case CallStart(_, call_id, name):
                return self._begin(_call(call_id, name))

    def _append_text(
        self, kind: str, text: str, new: Callable[[], Item] | None = None
    ) -> list[str]:
        """Adds text to the open item; begins a new item if that has another type.

        Args:
            kind: The type of the item.
            text: The text.
            new: Makes a new item; None if an item of the type must be open.
        """
        events: list[str] = []
        if not self._is_open(kind):
            assert new is not None, f"the text belongs to an open {kind}"
            events = self._begin(new())
        self._text.append(text)
        logprobs = self._pop_logprobs(kind)
        more = f',"logprobs":{compact(logprobs)}' if kind == "message" else ""
        data = f'{self._delta}"delta":{as_string(text)}{more}'
        return [*events, self._numbered_event(_DELTA_EVENTS[kind], data)]

    def _is_open(self, kind: str) -> bool:
        return bool(self._items) and self._items[-1]["type"] == kind and bool(self._delta)

    def _pop_logprobs(self, kind: str) -> list[dict[str, Any]]:
        """Returns the log-probabilities that are due, and adds them to the open message.

        Those of tokens outside messages are dropped.
        """
        logprobs, self._logprobs = self._logprobs, []
        if kind != "message" or not logprobs or self._tokenizer is None:
            return []
        content = chat_logprobs(self._tokenizer, logprobs)["content"]
        self._items[-1]["content"][0]["logprobs"] += content
        return content

    def _begin(self, item: Item) -> list[str]:
        """Begins an item, and ends the previous one."""
        events = self._end_item("completed") if self._delta else []
        index = len(self._items)
        self._items.append(item)
        self._text = []
        place = {"item_id": item["id"], "output_index": index}
        parts = item.get("content")
        begun = {**item, "content": []} if parts is not None else item
        events.append(
            self._event("response.output_item.added", {"output_index": index, "item": begun})
        )
        if parts is not None:
            place["content_index"] = 0
            events.append(self._event("response.content_part.added", {**place, "part": parts[0]}))
        self._delta = f"{compact(place)[1:-1]},"
        return events

    def _end_item(self, status: str) -> list[str]:
        """Ends the open item."""
        item, index, text = self._items[-1], len(self._items) - 1, "".join(self._text)
        place: dict[str, Any] = {"item_id": item["id"], "output_index": index}
        item["status"] = status
        self._delta = ""
        if item["type"] == "function_call":
            item["arguments"] = text
            done = {**place, "name": item["name"], "arguments": text}
            events = [self._event("response.function_call_arguments.done", done)]
        else:
            place["content_index"] = 0
            (part,) = item["content"]
            part["text"] = text
            done = {**place, "text": text}
            if item["type"] == "message":
                done["logprobs"] = part["logprobs"]
            events = [
                self._event(_DELTA_EVENTS[item["type"]].replace(".delta", ".done"), done),
                self._event("response.content_part.done", {**place, "part": part}),
            ]
        ended = {"output_index": index, "item": item}
        return [*events, self._event("response.output_item.done", ended)]

    def _status(self) -> str:
        return "incomplete" if self._finish_reason == "length" else "completed"

    def _response(
        self,
        status: str,
        *,
        usage: Mapping[str, Any] | None = None,
        error: Exception | None = None,
    ) -> dict[str, Any]:
        failure = None
        if error is not None:
            failure = {"code": "server_error", "message": as_api_error(error).message}
        return {
            **self._about,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": failure,
            "incomplete_details": (
                {"reason": "max_output_tokens"} if status == "incomplete" else None
            ),
            "output": self._items,
            "usage": None if usage is None else _usage(usage, self._n_reasoning_tokens),
        }

    def _event(self, kind: str, fields: Mapping[str, Any]) -> str:
        return self._numbered_event(kind, compact(fields)[1:-1])

    def _numbered_event(self, kind: str, fields: str) -> str:
        """Returns an event, numbered in the order of the stream."""
        number, self._n_events = self._n_events, self._n_events + 1
        return f'event: {kind}\ndata: {{"type":"{kind}","sequence_number":{number},{fields}}}\n\n'


_DELTA_EVENTS = {
    "message": "response.output_text.delta",
    "reasoning": "response.reasoning_text.delta",
    "function_call": "response.function_call_arguments.delta",
}
"""The delta event of each type of item."""


def _message() -> Item:
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {
        "id": _new_id("msg"),
        "type": "message",
        "status": "in_progress",
        "role": "assistant",
        "content": [part],
    }


def _reasoning() -> Item:
    return {
        "id": _new_id("rs"),
        "type": "reasoning",
        "status": "in_progress",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": ""}],
    }


def _call(call_id: str, name: str) -> Item:
    return {
        "id": _new_id("fc"),
        "type": "function_call",
        "status": "in_progress",
        "call_id": call_id,
        "name": name,
        "arguments": "",
    }


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(16)}"


def _usage(usage: Mapping[str, Any], n_reasoning_tokens: int) -> dict[str, Any]:
    """Returns the usage with the names of this API instead of those of chat completions."""
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "cache_write_tokens": 0,
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": n_reasoning_tokens},
        "total_tokens": usage["total_tokens"],
    }
