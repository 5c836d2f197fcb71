"""Answers over HTTP: from a ticket of the engine to a response, whole or streamed.

A ``Formatter`` formats answers: ``chat``, ``completions`` and ``responses`` have one each. This
module has the common parts: waiting on the event loop, clients that disconnect or are too slow,
keep-alive comments, and errors in mid-stream.

A formatter makes the events of a stream from prepared templates, since a JSON encoder for whole
chunks takes several times as long.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Protocol

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from hotloop.engine.service import Piece, Ticket
from hotloop.errors import HotloopError, ServiceClosedError
from hotloop.serve.access_log import DIRECT_BYTES
from hotloop.serve.errors import as_api_error
from hotloop.serve.metrics import Tally
from hotloop.serve.protocol import ABORT, DIRECT_BODY, DirectBody
from hotloop.serve.schemas import SamplingBody
from hotloop.serve.served import ServedModel
from hotloop.serve.settings import ServerSettings
from hotloop.types import Delta

STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # else nginx buffers events
}


LARGE_ENTRIES = 500
"""The most tokens, with their alternatives, of a response whose JSON is made in the event loop; the
JSON of a larger one is made in another thread."""


class Formatter(Protocol):
    """Formats the answers of one request as one route of the API defines."""

    def first_events(self) -> str:
        """Returns the events before all answers."""
        ...

    def events(self, delta: Delta, usage: str) -> str:
        """Returns the events of one delta of an answer.

        Args:
            delta: The delta.
            usage: The JSON of the usage so far, for every event; empty if it is not requested.
        """
        ...

    def last_events(self, usage: Mapping[str, Any], *, wanted: bool) -> str:
        """Returns the events after all answers, with the usage if the client ``wanted`` it."""
        ...

    def error_events(self, error: Exception) -> str:
        """Returns the events of an error in mid-stream."""
        ...

    def body(self, deltas: Sequence[Delta], usage: dict[str, Any]) -> dict[str, Any]:
        """Returns the whole response from all deltas of all answers."""
        ...


compact: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
"""Encodes a value as JSON without spaces; ``json.dumps`` would make an encoder for each call."""


as_string = json.encoder.encode_basestring
"""Encodes a text as JSON; it is usually the only variable part of a chunk."""


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


class ChunkFormatter:
    """Base of the formatters that stream chunks: begins and ends a stream."""

    _chunks: Chunks

    def first_events(self) -> str:
        """See ``Formatter``."""
        return ""

    def last_events(self, usage: Mapping[str, Any], *, wanted: bool) -> str:
        """See ``Formatter``."""
        return f"{self._chunks.event('', compact(usage)) if wanted else ''}data: [DONE]\n\n"

    def error_events(self, error: Exception) -> str:
        """See ``Formatter``."""
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
    served: ServedModel,
    ticket: Ticket,
    formatter: Formatter,
    request_body: SamplingBody,
    receive: Receive,
) -> Response:
    """Returns the response of a ticket: its stream, or its whole body once that is complete.

    Args:
        served: The served model.
        ticket: The request, submitted.
        formatter: The form of its answers.
        request_body: The request's body.
        receive: The ASGI function that reports a disconnected client.

    Raises:
        HotloopError: The request has failed, and is not streamed.
        ClientDisconnect: The client has disconnected.
    """
    if request_body.stream:
        return EventStream(served, ticket, formatter, request_body)
    tally, deltas = Tally(served.metrics, ticket.prompt_tokens, request_body.n), []
    async with cancelled_if_gone(served, ticket, receive):
        while not ticket.done:
            await ticket.arrived()
            for delta in ticket.take():
                deltas.append(uncancelled(delta))
                tally.add(deltas[-1])

    def whole() -> Response:
        return JSONResponse(formatter.body(deltas, usage(tally)))

    n_entries = tally.completion_tokens * (1 + (request_body.n_logprobs or 0))
    return await asyncio.to_thread(whole) if n_entries > LARGE_ENTRIES else whole()


def uncancelled(piece: Piece) -> Delta:
    """Returns the delta that a ticket has delivered, unless its answer was cancelled.

    Raises:
        ServiceClosedError: The answer was cancelled: the service ends, or the client has
            disconnected.
    """
    assert isinstance(piece, Delta), "a generating ticket has deltas, and no scores"
    if piece.generation is not None and piece.generation.finish_reason == "cancelled":
        raise ServiceClosedError
    return piece


@asynccontextmanager
async def cancelled_if_gone(
    served: ServedModel, ticket: Ticket, receive: Receive
) -> AsyncGenerator[None]:
    """Cancels a ticket when its client disconnects, or if the block ends before its answers.

    Raises:
        ClientDisconnect: The client has disconnected.
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
    """A stream of server-sent events: the deltas of a ticket's answers, as they arrive.

    Args:
        served: The served model.
        ticket: The request, submitted.
        formatter: The form of its answers.
        request_body: The request's body.
    """

    def __init__(
        self, served: ServedModel, ticket: Ticket, formatter: Formatter, request_body: SamplingBody
    ) -> None:
        self._served, self._ticket, self._formatter = served, ticket, formatter
        self._options, self._n = request_body.stream_options, request_body.n
        super().__init__(headers=STREAM_HEADERS)
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream."""
        ticket, served, formatter = self._ticket, self._served, self._formatter
        tally = Tally(served.metrics, ticket.prompt_tokens, self._n)
        wanted = bool(self._options.include_usage)
        continuous = wanted and bool(self._options.continuous_usage_stats)

        def arrived() -> str:
            text = ""
            for piece in ticket.take():
                delta = uncancelled(piece)
                tally.add(delta)
                text += formatter.events(delta, compact(usage(tally)) if continuous else "")
            return text

        body = _Body(served.settings, send, scope["state"])
        async with cancelled_if_gone(served, ticket, receive), body:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            try:
                await body.write(formatter.first_events)
                with body.written_by_service(ticket, arrived):
                    while not ticket.done:
                        await ticket.arrived()
                        await body.write(arrived)
                await body.write(
                    lambda: formatter.last_events(usage(tally), wanted=wanted), more=False
                )
            except HotloopError as error:
                text = formatter.error_events(error)
                await body.write(lambda: text, more=False)
            except Exception as error:  # a bug in hotloop, which the log shows
                text = formatter.error_events(error)
                await body.write(lambda: text, more=False)
                raise


class _Body:
    """The body of a stream.

    While no events arrive, it sends keep-alive comments. It ends a stream whose client does not
    read. Parts are written in the event loop, or directly in the service's thread: a wake-up of the
    event loop takes several times the processor time of a write. A part is made only when no other
    part is being written, so that parts are in order.

    Args:
        settings: The limits.
        send: Sends to the client.
        state: The request's state, with the functions of its connection (``protocol``).
    """

    def __init__(self, settings: ServerSettings, send: Send, state: dict[str, Any]) -> None:
        self._settings, self._send, self._state = settings, send, state
        self._lock = threading.Lock()  # held by a direct write, and while another write begins
        self._last_write_s, self._n_sending = time.monotonic(), 0
        self._direct: DirectBody | None = None
        self._fault: Exception | None = None

    async def write(self, make: Callable[[], str], *, more: bool = True) -> None:
        """Makes and sends a part of the stream; waits while the client's buffers are full.

        Raises:
            Exception: That of ``make``, here or in the service's thread.
        """

        def made() -> str:
            if self._fault is not None:
                fault, self._fault = self._fault, None
                raise fault
            return make()

        await self._write(made, more=more)

    async def _write(self, make: Callable[[], str], *, more: bool = True) -> None:
        """Makes and sends a part, while the service's thread makes none."""
        with self._lock:
            self._n_sending += 1
        try:
            if self._direct is not None:
                self._direct.flush()
            if (text := make()) or not more:
                self._last_write_s = time.monotonic()
                data = text.encode()
                await self._send({"type": "http.response.body", "body": data, "more_body": more})
        finally:
            self._n_sending -= 1

    @contextmanager
    def written_by_service(self, ticket: Ticket, make: Callable[[], str]) -> Generator[None]:
        """Lets the service's thread write deltas as they arrive, within the ``with`` block.

        Args:
            ticket: The request. If the thread cannot write at once, the event loop writes.
            make: Takes the deltas that have arrived, and makes the part of the stream.
        """
        self._direct = self._state[DIRECT_BODY]()
        ticket.set_receiver(partial(self._write_directly, make))
        try:
            yield
        finally:
            ticket.set_receiver(None)
            with self._lock:
                direct, self._direct = self._direct, None
            if direct is not None:
                direct.flush()
                direct.close()
                self._state[DIRECT_BYTES] = direct.n_bytes

    def _write_directly(self, make: Callable[[], str]) -> bool:
        """Makes and sends a part of the stream in this thread, without waiting.

        Returns:
            Whether everything was sent; if not, call ``write`` in the event loop.
        """
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if self._direct is None or self._n_sending or self._fault is not None:
                return False
            return self._direct.write(make)
        except Exception as error:
            self._fault = error
            return False
        finally:
            self._lock.release()

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    async def _run(self) -> None:
        ping_s, send_s = self._settings.ping_s, self._settings.send_s
        while True:
            await asyncio.sleep(min(ping_s, send_s) / 4)
            direct_s = self._direct.last_write_s if self._direct is not None else 0.0
            quiet_s = time.monotonic() - max(self._last_write_s, direct_s)
            if self._n_sending and quiet_s > send_s:
                self._state[ABORT]()
                return
            if not self._n_sending and quiet_s > ping_s:
                await self._write(self._ping)

    def _ping(self) -> str:
        """Returns a comment; nothing after a fault, which only the stream itself may raise."""
        return "" if self._fault is not None else ": waiting\n\n"
