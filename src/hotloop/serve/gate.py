"""``Gate``: access control. It refuses requests before any route sees them.

A plain ASGI application around another: Starlette's ``BaseHTTPMiddleware`` would pass every chunk
of a stream through queues.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from hotloop.errors import shorten_value
from hotloop.serve.errors import ApiError
from hotloop.serve.settings import ServerSettings

OPEN_PATHS = frozenset({"/", "/health", "/ready"})
"""Paths that need no key."""

SALT = "hotloop.salt"
"""The name, in a request's scope, of the salt of its prefix-cache keys."""

KEY_HEADERS = ("api-key", "x-api-key")
"""Headers in which clients may send a key, besides ``Authorization``."""


class Gate:
    """Refuses requests with too many or too large headers, for other hosts, or without a key.

    A server that listens only on a loopback address accepts only names of the loopback as host:
    that refuses a page of another site whose name resolves to this address (DNS rebinding).

    Args:
        app: The application.
        settings: The keys and limits.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings
        self._keys = [key.encode() for key in settings.keys]
        self._hosts = set(map(_hostname, settings.allowed_hosts))
        if self._hosts or is_loopback(settings.host):
            self._hosts |= {"localhost", "127.0.0.1", "::1", _hostname(settings.host)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] == "http":
            try:
                headers = Headers(scope=scope)
                self._check_size(scope)
                self._check_host(headers)
                self._check_key(scope, headers)
            except ApiError as error:
                scope["app"].state.served.metrics.error(error.status)
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check_size(self, scope: Scope) -> None:
        headers, most = scope["headers"], self._settings.max_headers
        n_bytes = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > most or n_bytes > self._settings.max_header_bytes:
            raise ApiError(
                431,
                f"the request has more than {most} headers, or more than "
                f"{self._settings.max_header_bytes:,} bytes of headers: send fewer.",
            )

    def _check_host(self, headers: Headers) -> None:
        if self._hosts and (host := _hostname(headers.get("host", ""))) not in self._hosts:
            raise ApiError(
                403,
                f"this server does not accept the host name {shorten_value(host)}: allow it with "
                "--allowed-host.",
                code="host_not_allowed",
            )

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        if not self._keys or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = next(filter(None, map(headers.get, KEY_HEADERS)), "")
        key = given.strip().encode("latin-1")
        # The key is compared with all keys, so that the time does not depend on which one matches.
        matches = [hmac.compare_digest(key, each) for each in self._keys]
        if not any(matches):
            raise ApiError(
                401,
                "the API key is missing or wrong: send Authorization: Bearer KEY.",
                type="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        scope[SALT] = hashlib.sha256(key).hexdigest()


def is_loopback(host: str) -> bool:
    """Returns whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _hostname(host: str) -> str:
    """Returns a name or address in lower case, without its port and the brackets of IPv6."""
    host = host.lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host if host.count(":") > 1 else host.partition(":")[0]
