"""``Gate``: who may ask. It refuses requests before any route sees them.

A plain ASGI application around another: Starlette's ``BaseHTTPMiddleware`` would pass every chunk
of a stream through queues.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from hotloop.serve.errors import ApiError

OPEN_PATHS = frozenset({"/", "/health", "/ready"})
"""Paths that need no key."""


class Gate:
    """Asks every request for one of the keys.

    Args:
        app: The application.
        keys: The keys; none: everybody may ask.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] == "http":
            try:
                self._check(scope)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        if not self._keys or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        headers = Headers(scope=scope)
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("api-key", "")
        key = given.strip().encode("latin-1")
        matches = [hmac.compare_digest(key, each) for each in self._keys]
        if not any(matches):
            raise ApiError(
                401,
                "the API key is missing or wrong: send Authorization: Bearer KEY.",
                type="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        scope["hotloop.salt"] = hashlib.sha256(key).hexdigest()
