"""``RequestLog``: gives each request an id, and logs one line when its response has ended.

A line has the time, the client, the route and the status; it has no part of prompts, answers,
queries or keys. It is a plain ASGI application around all others.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hotloop.errors import shorten

REQUEST_ID = "x-request-id"
"""The header of a request's id, in requests and responses."""

DIRECT_BYTES = "direct_bytes"
"""The name, in a request's state, of the bytes of its answer that did not pass through ``send``."""

_ID = re.compile(rb"[\w.:-]{1,128}", re.ASCII)


class RequestLog:
    """Gives each request an id, the client's own if it sent one, and logs it.

    Args:
        app: The application.
        write: Called with each line; None logs nothing.
    """

    def __init__(self, app: ASGIApp, write: Callable[[str], None] | None) -> None:
        self._app, self._write = app, write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request to the application, and logs its response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _given_id(scope) or secrets.token_hex(12)
        began, status, n_bytes = time.perf_counter(), "-", 0

        async def sending(message: Message) -> None:
            nonlocal status, n_bytes
            if message["type"] == "http.response.start":
                status = str(message["status"])
                header = (REQUEST_ID.encode(), request_id.encode())
                message = {**message, "headers": [*message["headers"], header]}
            else:
                n_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            if self._write is not None:
                seconds = time.perf_counter() - began
                n_bytes += scope.get("state", {}).get(DIRECT_BYTES, 0)
                self._write(_line(scope, status, seconds, n_bytes, request_id))


def _given_id(scope: Scope) -> str | None:
    """Returns the id that the client sent, if it is valid in a header and in a line of the log."""
    name = REQUEST_ID.encode()
    given = next((value for key, value in scope["headers"] if key == name), b"")
    return given.decode() if _ID.fullmatch(given) else None


def _line(scope: Scope, status: str, seconds: float, n_bytes: int, request_id: str) -> str:
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    host = scope["client"][0] if scope.get("client") else "-"
    path = shorten(scope["path"].encode("unicode_escape").decode().replace(" ", "\\x20"))
    return f"{at} {host} {scope['method']} {path} {status} {seconds:.3f}s {n_bytes}B {request_id}"
