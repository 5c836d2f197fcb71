"""``/v1/chat/completions``: answers a list of messages with a message.

An answer has three forms in turn: the engine's ``Delta``, the ``Part`` that a parser makes from its
text (``parts``), and the JSON of a chunk or of the whole message (``ChatFormatter``).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hotloop.serve.answers import ChunkFormatter, Chunks, as_string, compact, respond
from hotloop.serve.bodies import read
from hotloop.serve.logprobs import chat_logprobs
from hotloop.serve.parts import CallArguments, CallStart, Content, Parser, Reasoning
from hotloop.serve.schemas import ChatBody, FinishReason
from hotloop.serve.served import ServedModel
from hotloop.serve.submit import submit_turn
from hotloop.serve.tool_use import read_tool_use
from hotloop.text.tokenizer import Tokenizer
from hotloop.types import Delta, Generation


async def chat_completions(request: Request) -> Response:
    """Answers a conversation."""
    served: ServedModel = request.app.state.served
    request_body = await read(request, ChatBody, served.settings)
    served.check_name(request_body.model)
    model = served.model
    params = request_body.params(model.sampling, served.settings)
    use = read_tool_use(
        request_body.tools, request_body.tool_choice, parallel=request_body.parallel_tool_calls
    )
    turn, ticket = await submit_turn(
        request, model, lambda: model.required_conversations.turn(request_body, use, params)
    )
    formatter = ChatFormatter(
        served,
        model.tokenizer,
        turn.parser,
        named=use.choice == "named",
        details=bool(request_body.hotloop.details),
    )
    return await respond(served, ticket, formatter, request_body, request.receive)


class ChatFormatter(ChunkFormatter):
    """Formats answers as chat completions.

    Args:
        served: The served model.
        tokenizer: The model's tokenizer.
        parser: Makes the parser of each answer.
        named: The request names the tool that an answer calls.
        details: In a stream, drafted text has chunks of its own, which are marked.
    """

    def __init__(
        self,
        served: ServedModel,
        tokenizer: Tokenizer | None,
        parser: Callable[[], Parser],
        *,
        named: bool = False,
        details: bool = False,
    ) -> None:
        self._about = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": served.settings.name,
        }
        self._tokenizer, self._parser = tokenizer, parser
        self._named, self._details = named, details
        self._choices: dict[int, _Choice] = {}
        self._chunks = Chunks(self._about | {"object": "chat.completion.chunk"})

    # ------------------------------------------------------------------------------ streamed

    def events(self, delta: Delta, usage: str) -> str:
        """See ``Formatter``."""
        choice = self._choice(delta.index)
        if not (self._details and delta.n_accepted):
            return self._events(choice, delta, usage)
        accepted, rest = _divided(delta)
        details = f'{{"accepted":{delta.n_accepted}}}'
        return self._events(choice, accepted, usage, details) + self._events(choice, rest, usage)

    def _events(self, choice: _Choice, delta: Delta, usage: str, details: str = "") -> str:
        generation = delta.generation
        logprobs = self._logprobs(delta)
        text = ""
        for part in choice.parts(delta) or [Content("")] * bool(details):
            text += self._event(choice, _DELTAS[type(part)](part), usage, logprobs, details=details)
            logprobs = "null"
            details = details and '{"accepted":0}'  # the tokens have been counted
        if logprobs != "null":  # of tokens whose text is withheld
            text += self._event(choice, '"content":""', usage, logprobs)
        if generation is not None:
            text += self._event(choice, "", usage, finish=f'"{choice.finish(generation)}"')
        return text

    def _event(
        self,
        choice: _Choice,
        fields: str,
        usage: str,
        logprobs: str = "null",
        finish: str = "null",
        details: str = "",
    ) -> str:
        if not choice.begun:  # never in a chunk of its own, which clients would count as a token
            choice.begun = True
            fields = f'"role":"assistant"{"," if fields else ""}{fields}'
        return self._chunks.event(
            f'{{"index":{choice.index},"delta":{{{fields}}},'
            f'"logprobs":{logprobs},"finish_reason":{finish}}}',
            usage,
            details,
        )

    def _logprobs(self, delta: Delta) -> str:
        if not delta.logprobs or self._tokenizer is None:
            return "null"
        return compact(chat_logprobs(self._tokenizer, delta.logprobs))

    # ------------------------------------------------------------------------------ whole

    def body(self, deltas: Sequence[Delta], usage: dict[str, Any]) -> dict[str, Any]:
        """See ``Formatter``."""
        for delta in deltas:
            choice = self._choice(delta.index)
            for part in choice.parts(delta):
                choice.message.add(part)
            if delta.generation is not None:
                choice.generation = delta.generation
        choices = [self._choices[i].body(self._tokenizer) for i in sorted(self._choices)]
        return {**self._about, "choices": choices, "usage": usage}

    def _choice(self, index: int) -> _Choice:
        if index not in self._choices:
            self._choices[index] = _Choice(index, self._parser(), named=self._named)
        return self._choices[index]


_DELTAS: dict[type, Callable[[Any], str]] = {
    Content: lambda part: f'"content":{as_string(part.text)}',
    Reasoning: lambda part: f'"reasoning_content":{as_string(part.text)}',
    CallStart: lambda part: (
        f'"tool_calls":[{{"index":{part.index},"id":{as_string(part.id)},"type":"function",'
        f'"function":{{"name":{as_string(part.name)},"arguments":""}}}}]'
    ),
    CallArguments: lambda part: (
        f'"tool_calls":[{{"index":{part.index},"function":{{"arguments":{as_string(part.text)}}}}}]'
    ),
}
"""The fields of a chunk's delta, by the type of part."""


def _divided(delta: Delta) -> tuple[Delta, Delta]:
    """Divides a delta into its drafted part and the rest."""
    n, n_chars = delta.n_accepted, delta.n_accepted_chars
    logprobs = delta.logprobs
    accepted = Delta(
        index=delta.index,
        text=delta.text[:n_chars],
        token_ids=delta.token_ids[:n],
        logprobs=logprobs and logprobs[:n],
    )
    rest = replace(
        delta,
        text=delta.text[n_chars:],
        token_ids=delta.token_ids[n:],
        logprobs=logprobs and logprobs[n:],
    )
    return accepted, rest


class _Choice:
    """One answer of a request."""

    def __init__(self, index: int, parser: Parser, *, named: bool) -> None:
        self.index, self._parser, self._named = index, parser, named
        self.begun = self._calls = False
        self.message = _Message()
        self.generation: Generation | None = None

    def parts(self, delta: Delta) -> list[Content | Reasoning | CallStart | CallArguments]:
        """Returns the parts of a delta."""
        parts = list(self._parser.push(delta.text)) if delta.text else []
        if delta.generation is not None:
            parts += self._parser.end()
        self._calls = self._calls or any(isinstance(part, CallStart) for part in parts)
        return parts

    def finish(self, generation: Generation) -> FinishReason:
        """Returns why the answer ended, by the API's names."""
        if generation.finish_reason == "length":
            return "length"
        return "tool_calls" if self._calls and not self._named else "stop"

    def body(self, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """Returns the choice of a whole response."""
        generation = self.generation
        assert generation is not None, "the answer has ended"
        logprobs = None
        if generation.logprobs is not None and tokenizer is not None:
            logprobs = chat_logprobs(tokenizer, generation.logprobs)
        return {
            "index": self.index,
            "message": self.message.body(),
            "logprobs": logprobs,
            "finish_reason": self.finish(generation),
        }


class _Message:
    """A whole message, collected from parts."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def add(self, part: Content | Reasoning | CallStart | CallArguments) -> None:
        match part:
            case Content(text):
                self._content.append(text)
            case Reasoning(text):
                self._reasoning.append(text)
            case CallStart(_, call_id, name):
                function = {"name": name, "arguments": ""}
                self._calls.append({"id": call_id, "type": "function", "function": function})
            case CallArguments(index, text):
                self._calls[index]["function"]["arguments"] += text

    def body(self) -> dict[str, Any]:
        content = "".join(self._content)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message |= {"content": content or None, "tool_calls": self._calls}
        return message
