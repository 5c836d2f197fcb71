"""Answers over HTTP: from a ticket of the engine to a response, whole or streamed.

What an answer looks like is its ``Shape``'s business: ``chat`` and ``completions`` have one each.
Here are what all of them share: waiting on the event loop, a client that goes away or is too slow,
comments while nothing comes, and errors in mid-stream.

A stream's events are text that the shape makes of prepared templates, since a JSON encoder for
whole chunks takes several times as long.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from hotloop.engine.service import Piece, Service, Ticket
from hotloop.errors import HotloopError, ServiceClosedError
from hotloop.serve.errors import as_api_error
from hotloop.serve.protocol import ABORT
from hotloop.serve.schemas import SamplingBody
from hotloop.serve.settings import ServerSettings
from hotloop.types import Delta

STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # of nginx, which would hold events back
}


class Shape(Protocol):
    """What answers look like in one of the API's forms. It lives as long as its request."""

    def events(self, delta: Delta, usage: str) -> str:
        """Returns the events of a piece of an answer; ``usage`` ends each, see ``Chunks``."""
        ...

    def usage_event(self, usage: str) -> str:
        """Returns the event that tells the usage, after all answers."""
        ...

    def body(self, deltas: Sequence[Delta], usage: dict[str, Any]) -> dict[str, Any]:
        """Returns the whole response of all pieces of all answers."""
        ...


def compact(data: Any) -> str:
    """Returns JSON without spaces."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


as_string = json.encoder.encode_basestring
"""Returns a text as JSON. For chunks, whose only variable part it mostly is."""


class Chunks:
    """Makes the events of a stream from the template that its chunks share.

    Args:
        about: The fields that all chunks have.
    """

    def __init__(self, about: Mapping[str, Any]) -> None:
        self._about = compact(about)[:-1]

    def event(self, choice: str, usage: str = "") -> str:
        """Returns the event of a chunk.

        Args:
            choice: The JSON of its choice; empty for none.
            usage: The JSON of the usage so far, or empty for none.
        """
        counted = f',"usage":{usage}' if usage else ""
        return f'data: {self._about},"choices":[{choice}]{counted}}}\n\n'


def error_event(error: Exception) -> str:
    """Returns the event that tells an error in mid-stream."""
    return f"data: {compact(as_api_error(error).body)}\n\n"


class Usage:
    """Counts the tokens of a request.

    Args:
        prompt_tokens: Tokens of its prompts.
        n: Answers to each prompt.
    """

    def __init__(self, prompt_tokens: int, n: int | None = None) -> None:
        self._n = n or 1
        self.prompt_tokens, self.completion_tokens, self.cached_tokens = prompt_tokens, 0, 0

    def add(self, delta: Delta) -> None:
        """Counts a piece of an answer."""
        self.completion_tokens += len(delta.token_ids)
        if delta.generation is not None and delta.index % self._n == 0:
            self.cached_tokens += delta.generation.cached_tokens

    @property
    def body(self) -> dict[str, Any]:
        """The usage as JSON."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    @property
    def json(self) -> str:
        """The usage as the JSON of a chunk."""
        return compact(self.body)


async def respond(
    service: Service,
    ticket: Ticket,
    shape: Shape,
    asked: SamplingBody,
    receive: Receive,
    settings: ServerSettings,
) -> Response:
    """Returns the response of a ticket: its stream, or its whole body once that is there.

    Args:
        service: The engine.
        ticket: The request, submitted.
        shape: What its answers look like.
        asked: The request's body.
        receive: Tells when the client has gone.
        settings: The limits.

    Raises:
        HotloopError: What ended the request, if it is not streamed.
    """
    if asked.stream:
        return EventStream(service, ticket, shape, asked, settings)
    usage, deltas = Usage(ticket.prompt_tokens, asked.n), []
    async with cancelled_if_gone(service, ticket, receive):
        while not ticket.done:
            await ticket.arrived()
            for delta in ticket.take():
                deltas.append(checked(delta))
                usage.add(deltas[-1])
    return JSONResponse(shape.body(deltas, usage.body))


def checked(piece: Piece) -> Delta:
    """Returns a piece of an answer.

    Raises:
        ServiceClosedError: The answer was cancelled: the service ends, or the client has gone, and
            nobody sees the error.
    """
    assert isinstance(piece, Delta), "a prompt's pieces are of its answers"
    if piece.generation is not None and piece.generation.finish_reason == "cancelled":
        raise ServiceClosedError
    return piece


@asynccontextmanager
async def cancelled_if_gone(
    service: Service, ticket: Ticket, receive: Receive
) -> AsyncGenerator[None]:
    """Cancels a ticket as soon as its client has gone, or the block ends before the ticket."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        service.cancel(ticket)

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        if not ticket.done:
            service.cancel(ticket)


class EventStream(Response):
    """A stream of server-sent events: the pieces of a ticket's answers, as they come.

    Args:
        service: The engine.
        ticket: The request, submitted.
        shape: What its answers look like.
        asked: The request's body.
        settings: The limits.
    """

    def __init__(
        self,
        service: Service,
        ticket: Ticket,
        shape: Shape,
        asked: SamplingBody,
        settings: ServerSettings,
    ) -> None:
        self._service, self._ticket, self._shape = service, ticket, shape
        self._options, self._n, self._settings = asked.stream_options, asked.n, settings
        super().__init__(headers=STREAM_HEADERS)
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream."""
        ticket, usage = self._ticket, Usage(self._ticket.prompt_tokens, self._n)
        wanted = bool(self._options.include_usage)
        continuous = wanted and bool(self._options.continuous_usage_stats)

        async def write(text: str, *, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": text.encode(), "more_body": more}
            async with asyncio.timeout(self._settings.send_s):
                await send(message)

        async with cancelled_if_gone(self._service, ticket, receive):
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            try:
                while not ticket.done:
                    if not await self._arrived():
                        await write(": waiting\n\n")
                        continue
                    text = ""
                    for piece in ticket.take():
                        usage.add(delta := checked(piece))
                        text += self._shape.events(delta, usage.json if continuous else "")
                    if text:
                        await write(text)
                counted = self._shape.usage_event(usage.json) if wanted else ""
                await write(f"{counted}data: [DONE]\n\n", more=False)
            except HotloopError as error:
                await write(error_event(error), more=False)
            except TimeoutError:  # the client does not read
                scope["state"][ABORT]()

    async def _arrived(self) -> bool:
        """Waits for a piece; False after a time of silence."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.ping_s):
                await self._ticket.arrived()
                return True
        return False
