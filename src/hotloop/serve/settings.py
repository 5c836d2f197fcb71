"""``ServerSettings``: the settings of a server, and its limits; without the web framework."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KIB, MIB = 2**10, 2**20


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of a server, and its limits.

    Attributes:
        host: The address to listen on.
        port: The port; 0 takes a free one.
        name: The model's name in the API.
        keys: The API keys, of which a request must have one; if empty, no request needs a key.
        cors_origins: Origins whose pages may send requests; ``*`` allows all.
        allowed_hosts: Host names that are accepted besides the server's own. If empty, a server on
            a loopback address accepts names of the loopback, and others accept any.
        drain_s: Seconds that running requests have to finish, once the server is stopped.
        template: A chat template instead of the model's own.
        template_variables: Variables of the chat template; a request can override them.
        max_connections: The most connections at once.
        max_headers: The most headers of a request.
        max_header_bytes: The most bytes of all headers of a request.
        tool_parser: The parser of tool calls, see ``tools.PARSERS``; ``auto`` detects it.
        max_body_bytes: The most bytes of the body of a request.
        headers_s: Seconds that a client has to send its headers.
        body_s: Seconds that it has to send its body.
        keep_alive_s: Seconds that a connection may be idle.
        ping_s: Seconds of silence in a stream after which a comment is sent.
        send_s: Seconds that a client may leave a stream unread, once its buffers are full.
        max_depth: The deepest nesting of JSON.
        max_stops: The most stop strings of a request.
        max_choices: The most answers of a request: prompts times ``n``.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = "model"
    keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    drain_s: float = 30.0
    template: str | None = None
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    max_connections: int = 128
    max_headers: int = 100
    max_header_bytes: int = 16 * KIB
    tool_parser: str = "auto"
    max_body_bytes: int = 8 * MIB
    headers_s: float = 10.0
    body_s: float = 30.0
    keep_alive_s: float = 60.0
    ping_s: float = 12.0
    send_s: float = 60.0
    max_depth: int = 64
    max_stops: int = 16
    max_choices: int = 1024
