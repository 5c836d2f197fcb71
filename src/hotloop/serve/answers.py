"""Answers over HTTP: from a ticket of the engine to a response, whole or streamed.

What an answer looks like is its ``Shape``'s business: ``chat`` and ``completions`` have one each.
Here are what all of them share: waiting on the event loop, a client that goes away or is too slow,
comments while nothing comes, and errors in mid-stream.

A stream's events are text that the shape makes of prepared templates, since a JSON encoder for
whole chunks takes several times as long.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from hotloop.engine.service import Piece, Ticket
from hotloop.errors import HotloopError, ServiceClosedError
from hotloop.serve.errors import as_api_error
from hotloop.serve.metrics import Tally
from hotloop.serve.protocol import ABORT
from hotloop.serve.schemas import SamplingBody
from hotloop.serve.served import Served
from hotloop.serve.settings import ServerSettings
from hotloop.types import Delta

STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # of nginx, which would hold events back
}


LARGE_ENTRIES = 500
"""More tokens and alternatives than this become JSON off the event loop."""


class Shape(Protocol):
    """Writes answers in one of the API's forms. It lives as long as its request."""

    def first_events(self) -> str:
        """Returns the events before all answers."""
        ...

    def events(self, delta: Delta, usage: str) -> str:
        """Returns the events of a piece of an answer; ``usage`` ends each, see ``Chunks``."""
        ...

    def last_events(self, usage: Mapping[str, Any], *, wanted: bool) -> str:
        """Returns the events after all answers; the usage is ``wanted`` in chunks, or is not."""
        ...

    def error_events(self, error: Exception) -> str:
        """Returns the events that tell an error in mid-stream."""
        ...

    def body(self, deltas: Sequence[Delta], usage: dict[str, Any]) -> dict[str, Any]:
        """Returns the whole response of all pieces of all answers."""
        ...


compact: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
"""Returns JSON without spaces. ``json.dumps`` would make an encoder for each call."""


as_string = json.encoder.encode_basestring
"""Returns a text as JSON. For chunks, whose only variable part it mostly is."""


class Chunks:
    """Makes the events of a stream from the template that its chunks share.

    Args:
        about: The fields that all chunks have.
    """

    def __init__(self, about: Mapping[str, Any]) -> None:
        self._about = compact(about)[:-1]

    def event(self, choice: str, usage: str = "", details: str = "") -> str:
        """Returns the event of a chunk.

        Args:
            choice: The JSON of its choice; empty for none.
            usage: The JSON of the usage so far, or empty for none.
            details: The JSON of hotloop's own field, or empty for none.
        """
        more = f',"usage":{usage}' if usage else ""
        if details:
            more += f',"hotloop":{details}'
        return f'data: {self._about},"choices":[{choice}]{more}}}\n\n'


class ChunkShape:
    """Base of the shapes that stream chunks: begins and ends a stream."""

    _chunks: Chunks

    def first_events(self) -> str:
        """See ``Shape``."""
        return ""

    def last_events(self, usage: Mapping[str, Any], *, wanted: bool) -> str:
        """See ``Shape``."""
        return f"{self._chunks.event('', compact(usage)) if wanted else ''}data: [DONE]\n\n"

    def error_events(self, error: Exception) -> str:
        """See ``Shape``."""
        return f"data: {compact(as_api_error(error).body)}\n\n"


def usage(tally: Tally) -> dict[str, Any]:
    """Returns the usage of a request as JSON."""
    return {
        "prompt_tokens": tally.prompt_tokens,
        "completion_tokens": tally.completion_tokens,
        "total_tokens": tally.prompt_tokens + tally.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": tally.cached_tokens},
    }


async def respond(
    served: Served, ticket: Ticket, shape: Shape, asked: SamplingBody, receive: Receive
) -> Response:
    """Returns the response of a ticket: its stream, or its whole body once that is there.

    Args:
        served: The model.
        ticket: The request, submitted.
        shape: What its answers look like.
        asked: The request's body.
        receive: Tells when the client has gone.

    Raises:
        HotloopError: What ended the request, if it is not streamed.
        ClientDisconnect: The client has gone.
    """
    if asked.stream:
        return EventStream(served, ticket, shape, asked)
    tally, deltas = Tally(served.metrics, ticket.prompt_tokens, asked.n), []
    async with cancelled_if_gone(served, ticket, receive):
        while not ticket.done:
            await ticket.arrived()
            for delta in ticket.take():
                deltas.append(checked(delta))
                tally.add(deltas[-1])

    def whole() -> Response:
        return JSONResponse(shape.body(deltas, usage(tally)))

    n_entries = tally.completion_tokens * (1 + (asked.n_logprobs or 0))
    return await asyncio.to_thread(whole) if n_entries > LARGE_ENTRIES else whole()


def checked(piece: Piece) -> Delta:
    """Returns a piece of an answer.

    Raises:
        ServiceClosedError: The answer was cancelled: the service ends, or the client has gone.
    """
    assert isinstance(piece, Delta), "a prompt's pieces are of its answers"
    if piece.generation is not None and piece.generation.finish_reason == "cancelled":
        raise ServiceClosedError
    return piece


@asynccontextmanager
async def cancelled_if_gone(
    served: Served, ticket: Ticket, receive: Receive
) -> AsyncGenerator[None]:
    """Cancels a ticket as soon as its client has gone, or the block ends before the ticket.

    Raises:
        ClientDisconnect: The client has gone.
    """
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        served.metrics.cancelled.inc()
        served.service.cancel(ticket)

    watcher = asyncio.create_task(watch())
    try:
        yield
    except ServiceClosedError:
        if gone:
            raise ClientDisconnect from None
        raise
    finally:
        watcher.cancel()
        if not ticket.done:
            served.service.cancel(ticket)


class EventStream(Response):
    """A stream of server-sent events: the pieces of a ticket's answers, as they come.

    Args:
        served: The model.
        ticket: The request, submitted.
        shape: What its answers look like.
        asked: The request's body.
    """

    def __init__(self, served: Served, ticket: Ticket, shape: Shape, asked: SamplingBody) -> None:
        self._served, self._ticket, self._shape = served, ticket, shape
        self._options, self._n = asked.stream_options, asked.n
        super().__init__(headers=STREAM_HEADERS)
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream."""
        ticket, served = self._ticket, self._served
        tally = Tally(served.metrics, ticket.prompt_tokens, self._n)
        wanted = bool(self._options.include_usage)
        continuous = wanted and bool(self._options.continuous_usage_stats)

        pulse = _Pulse(served.settings, send, scope["state"][ABORT])
        write = pulse.write

        def counted() -> str:
            return compact(usage(tally))

        async with cancelled_if_gone(served, ticket, receive), pulse:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            try:
                if first := self._shape.first_events():
                    await write(first)
                while not ticket.done:
                    await ticket.arrived()
                    text = ""
                    for piece in ticket.take():
                        tally.add(delta := checked(piece))
                        text += self._shape.events(delta, counted() if continuous else "")
                    if text:
                        await write(text)
                await write(self._shape.last_events(usage(tally), wanted=wanted), more=False)
            except HotloopError as error:
                await write(self._shape.error_events(error), more=False)
            except Exception as error:  # a fault of ours, which the log shows
                await write(self._shape.error_events(error), more=False)
                raise


class _Pulse:
    """Looks after a stream: comments while nothing comes, an end for who does not read.

    A timer for each wait would take several times as long as making a chunk.

    Args:
        settings: The limits.
        send: Sends to the client.
        abort: Drops the connection.
    """

    def __init__(self, settings: ServerSettings, send: Send, abort: Callable[[], None]) -> None:
        self._settings, self._send, self._abort = settings, send, abort
        self._loop = asyncio.get_running_loop()
        self._since, self._is_sending = self._loop.time(), False

    async def write(self, text: str, *, more: bool = True) -> None:
        """Sends a part of the stream; waits while the client's buffers are full."""
        self._since, self._is_sending = self._loop.time(), True
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": more})
        self._is_sending = False

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    async def _run(self) -> None:
        ping_s, send_s = self._settings.ping_s, self._settings.send_s
        while True:
            await asyncio.sleep(min(ping_s, send_s) / 4)
            quiet_s = self._loop.time() - self._since
            if self._is_sending and quiet_s > send_s:
                self._abort()
                return
            if not self._is_sending and quiet_s > ping_s:
                await self.write(": waiting\n\n")
