"""``LimitedProtocol``: uvicorn's HTTP/1.1 over h11, with limits that uvicorn does not have.

It limits the time in which a client must send its headers and its body, and the number of
connections, and drops a client that does not read its response. Refusals have the form of the API.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from hotloop.serve.access_log import REQUEST_ID
from hotloop.serve.errors import ApiError, unavailable
from hotloop.serve.settings import ServerSettings

ABORT = "abort"
"""The name, in a request's state, of the function that drops its connection at once."""

DIRECT_BODY = "direct_body"
"""The name, in a request's state, of the function that makes its ``DirectBody``."""


class DirectBody:
    """Writes parts of a chunked body to the socket, from any thread, without the event loop.

    It writes only if the event loop has nothing left to write to that connection. The caller must
    ensure that the two do not write at the same time.

    Args:
        transport: That of a connection on which a response with a chunked body has begun.

    Raises:
        OSError: The system has no more file descriptors.

    Attributes:
        n_bytes: Bytes of the body that were written.
        last_write_s: The time of its last write, by ``time.monotonic``; 0 before the first.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        # A descriptor of its own: the event loop closes its own at any time, and the number could
        # then be another client's.
        self._fd = os.dup(transport.get_extra_info("socket").fileno())
        self._rest = b""
        self.n_bytes, self.last_write_s = 0, 0.0

    def write(self, make: Callable[[], str]) -> bool:
        """Writes a part without waiting, unless that would overtake what was written before.

        Args:
            make: Makes the part, which may be empty; called only if it can be written now.

        Returns:
            Whether the part was written. If not, call ``flush`` in the event loop, and then
            ``make`` for what it has not made yet.
        """
        transport = self._transport
        if self._rest or transport.get_write_buffer_size() or transport.is_closing():
            return False
        data = make().encode()
        if not data:
            return True
        chunk = b"%x\r\n%b\r\n" % (len(data), data)
        try:
            n = os.write(self._fd, chunk)
        except OSError:  # full, or broken: the event loop will find out
            n = 0
        self._rest = chunk[n:]
        self.n_bytes += len(data)
        self.last_write_s = time.monotonic()
        return not self._rest

    def flush(self) -> None:
        """Writes the rest of the last part, in the event loop, unless the client disconnected."""
        rest, self._rest = self._rest, b""
        if rest and not self._transport.is_closing():
            self._transport.write(rest)

    def close(self) -> None:
        """Ends the writing; the connection stays open."""
        os.close(self._fd)


class LimitedProtocol(H11Protocol):
    """One connection.

    Args:
        settings: The limits.
        config: Uvicorn's configuration.
        server_state: Uvicorn's state.
        app_state: Uvicorn's state of the application.
    """

    def __init__(
        self,
        settings: ServerSettings,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        own = {ABORT: self.abort, DIRECT_BODY: self.direct_body}
        super().__init__(config, server_state, app_state | own, _loop)
        self._settings = settings
        self._expected: Literal["headers", "body"] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyrefly: ignore
        """Accepts a connection, or refuses it if there are too many."""
        is_one_too_many = len(self.connections) >= self._settings.max_connections
        super().connection_made(transport)
        self._expect("headers")
        if is_one_too_many:
            limit = self._settings.max_connections
            self._refuse(
                unavailable(f"the limit of {limit} open connections is reached: try again later.")
            )

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timer."""
        self._expect(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Takes bytes of a request."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        state = self.conn.their_state
        if state is h11.IDLE and self.conn.our_state is h11.IDLE:
            self._expect("headers")
        else:
            self._expect("body" if state is h11.SEND_BODY else None)

    def send_400_response(self, msg: str) -> None:
        """Answers bytes that are not an HTTP request, with the status that h11 suggests."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self._refuse(ApiError(status, f"{msg.rstrip('.')}: {error}."))

    def timeout_keep_alive_handler(self) -> None:
        """Ends a connection that was not used again, or whose client does not read its answer."""
        if self.transport.get_write_buffer_size():
            self.abort()
        else:
            super().timeout_keep_alive_handler()

    def _expect(self, part: Literal["headers", "body"] | None) -> None:
        """Starts the timer of the part of a request that comes next; None stops it."""
        if part == self._expected:
            return
        self._expected = part
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if part is not None:
            seconds = self._settings.headers_s if part == "headers" else self._settings.body_s
            self._timer = self.loop.call_later(seconds, self._timed_out, part, seconds)

    def _timed_out(self, part: str, seconds: float) -> None:
        self._timer = None
        begun = part == "body" or self.conn.trailing_data[0]
        if not begun:  # browsers open connections that they may need: these expect no answer
            self.transport.close()
        elif not self.transport.is_closing():
            message = f"the {part} of the request took more than {seconds:g} s."
            self._refuse(ApiError(408, message, type="timeout_error", code="request_timeout"))

    def _refuse(self, error: ApiError) -> None:
        """Sends an error, unless a response has begun, and closes the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body).encode()
            headers = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "connection": "close",
                REQUEST_ID: secrets.token_hex(12),
                **(error.headers or {}),
            }
            events = (
                h11.Response(status_code=error.status, headers=list(headers.items())),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:  # the application may still wait for the rest of the body
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def abort(self) -> None:
        """Drops the connection, with data that its client has not read."""
        self.transport.abort()

    def direct_body(self) -> DirectBody | None:
        """Returns the direct writer for the body of the response that has begun.

        None if the body is not chunked, as with HTTP/1.0, or there are no more file descriptors.
        """
        is_chunked = (self.conn.their_http_version or b"") >= b"1.1"
        if self.conn.our_state is not h11.SEND_BODY or not is_chunked:
            return None
        try:
            return DirectBody(self.transport)
        except OSError:
            return None
