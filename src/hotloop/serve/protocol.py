"""``LimitedProtocol``: uvicorn's HTTP/1.1 over h11, with limits that uvicorn does not have.

A client has a time to send its headers and one to send its body; there is a number of connections;
and a client that does not read what it was sent is dropped. What it refuses it answers in the shape
of the API.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
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


class LimitedProtocol(H11Protocol):
    """One connection.

    Args:
        settings: The limits.
        config: As uvicorn's, and likewise the other arguments.
        server_state: Uvicorn's.
        app_state: Uvicorn's.
    """

    def __init__(
        self,
        settings: ServerSettings,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state | {ABORT: self.abort}, _loop)
        self._settings = settings
        self._waiting_for: Literal["headers", "body"] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyrefly: ignore
        """Takes a connection, or refuses it as one too many."""
        is_one_too_many = len(self.connections) >= self._settings.max_connections
        super().connection_made(transport)
        self._wait_for("headers")
        if is_one_too_many:
            limit = self._settings.max_connections
            self._refuse(unavailable(f"{limit} connections are open, and no more may."))

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends with the connection."""
        self._wait_for(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Takes bytes of a request."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        state = self.conn.their_state
        if state is h11.IDLE and self.conn.our_state is h11.IDLE:
            self._wait_for("headers")
        else:
            self._wait_for("body" if state is h11.SEND_BODY else None)

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP request, with the status that h11 suggests."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self._refuse(ApiError(status, f"{msg.rstrip('.')}: {error}."))

    def timeout_keep_alive_handler(self) -> None:
        """Ends a connection that was not used again, or whose client does not read its answer."""
        if self.transport.get_write_buffer_size():
            self.abort()
        else:
            super().timeout_keep_alive_handler()

    def _wait_for(self, part: Literal["headers", "body"] | None) -> None:
        """Limits the time of a part of a request, from now on; None: it is complete."""
        if part == self._waiting_for:
            return
        self._waiting_for = part
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
        """Answers an error, unless an answer has begun, and ends the connection."""
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
        if self.cycle is not None:  # of a request whose body broke off: it has its answer
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def abort(self) -> None:
        """Drops the connection, and what its client has not read."""
        self.transport.abort()
