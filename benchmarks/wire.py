"""A client of streamed completions that reads the clock as bytes arrive, and does little else.

It sends prompts as token ids over a keep-alive connection, and stores the bytes that arrive with
their times. It finds events and parses JSON only after the last byte, so that its own work is in
no figure. It runs in another process than the server.

It implements only the HTTP that hotloop's streamed answers use, so it is no client for other
servers.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

CONNECT_S = 10.0

END = b"\r\n0\r\n\r\n"
"""The last bytes of a chunked body."""


class WireError(Exception):
    """An answer is an error, ends too early, or is not a streamed completion."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """An event with tokens: the time of its arrival (``time.perf_counter``), and their number."""

    at_s: float
    n_tokens: int


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """A streamed answer.

    Attributes:
        sent_s: The time at which the request was written to the socket (``time.perf_counter``).
        pieces: Its events with tokens, in order.
        token_ids: Its tokens.
    """

    sent_s: float
    pieces: tuple[Piece, ...]
    token_ids: tuple[int, ...]

    @property
    def ttft_s(self) -> float:
        """Seconds from sending to the first event."""
        return self.pieces[0].at_s - self.sent_s

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Seconds between consecutive events."""
        return tuple(b.at_s - a.at_s for a, b in itertools.pairwise(self.pieces))

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first event.

        All tokens of the first event count as arrived with it.
        """
        after = len(self.token_ids) - self.pieces[0].n_tokens
        return (self.pieces[-1].at_s - self.pieces[0].at_s) / after


class Connection(asyncio.Protocol):
    """A connection to a server, for one request after the other."""

    def __init__(self) -> None:
        self._arrived: list[tuple[float, bytes]] = []
        self._complete: asyncio.Future[None] | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._tail = b""

    @classmethod
    async def open(cls, url: str) -> Connection:
        """Connects to the host and port of a URL."""
        parts = urlsplit(url)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_S):
            _, connection = await loop.create_connection(cls, parts.hostname, parts.port)
        return connection

    def close(self) -> None:
        """Closes the connection; the server cancels what it was answering."""
        if self._transport is not None:
            self._transport.close()

    async def post(self, url: str, body: Mapping[str, Any]) -> tuple[float, Sequence]:
        """Sends a request, and waits for the last byte of its answer.

        Returns:
            The time of sending, and the bytes that arrived, as pairs of time and bytes.

        Raises:
            WireError: The connection ended before the answer did.
        """
        assert self._transport is not None, "open() connects"
        self._arrived, self._tail = [], b""
        self._complete = asyncio.get_running_loop().create_future()
        sent = request_bytes(url, body)
        sent_s = time.perf_counter()
        self._transport.write(sent)
        await self._complete
        return sent_s, self._arrived

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's has no such base class

    def data_received(self, data: bytes) -> None:
        self._arrived.append((time.perf_counter(), data))
        self._tail = (self._tail + data)[-len(END) :]
        if self._complete is None or self._complete.done():
            return
        if self._tail == END or (len(self._arrived) == 1 and is_whole(data)):
            self._complete.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self._complete is not None and not self._complete.done():
            received = b"".join(data for _, data in self._arrived)[-300:].decode(errors="replace")
            self._complete.set_exception(
                WireError(f"the connection ended ({error}) after: {received!r}")
            )


def request_bytes(url: str, body: Mapping[str, Any]) -> bytes:
    """Returns the bytes of a POST request."""
    parts, content = urlsplit(url), json.dumps(body).encode()
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def is_whole(data: bytes) -> bool:
    """Returns whether the data are a complete answer that is not streamed, such as an error."""
    head, _, body = data.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
    length = fields.get(b"content-length", b"").strip()
    return length.isdigit() and len(body) >= int(length)


class BlockingConnection:
    """A connection whose requests block the thread in the socket's own calls.

    If the model uses all processors of a machine, the client's work for a piece delays the next
    one. Blocking is less work than an event loop.

    Args:
        url: The URL of the server.
        limit_s: Seconds that a piece may take; then requests raise ``BlockingIOError``.
    """

    def __init__(self, url: str, limit_s: float) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None, "the URL of a server"
        assert parts.port is not None, "the URL of a server"
        self._socket = socket.create_connection((parts.hostname, parts.port), CONNECT_S)
        # A timeout in the kernel: one of Python would cost a system call more for each piece.
        self._socket.settimeout(None)
        self._socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", round(limit_s), 0)
        )
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()

    def post(self, url: str, body: Mapping[str, Any]) -> tuple[float, Sequence]:
        """See ``Connection.post``."""
        receive, clock = self._socket.recv, time.perf_counter
        arrived: list[tuple[float, bytes]] = []
        sent, tail = request_bytes(url, body), b""
        sent_s = clock()
        self._socket.sendall(sent)
        while True:
            data = receive(4096)
            arrived.append((clock(), data))
            tail = (tail + data)[-len(END) :]
            if tail == END or (len(arrived) == 1 and is_whole(data)):
                return sent_s, arrived
            if not data:
                raise WireError(f"the connection ended after: {tail!r}")

    def complete(self, base_url: str, prompt: Sequence[int], n: int) -> Streamed:
        """See ``complete``."""
        return streamed(*self.post(f"{base_url}/completions", completion_body(prompt, n)), n)


async def complete(
    connection: Connection, base_url: str, prompt: Sequence[int], n: int, **fields: Any
) -> Streamed:
    """Requests a streamed greedy answer of exactly ``n`` tokens; end-of-sequence is ignored.

    Args:
        connection: An open connection.
        base_url: Such as ``http://127.0.0.1:8000/v1``.
        prompt: Token ids.
        n: New tokens.
        **fields: More fields of the request.

    Raises:
        WireError: The answer is an error, or has another number of tokens.
    """
    body = completion_body(prompt, n) | fields
    return streamed(*await connection.post(f"{base_url}/completions", body), n)


def completion_body(prompt: Sequence[int], n: int) -> dict[str, Any]:
    """Returns the body of a request for ``n`` tokens, streamed."""
    return {
        "prompt": list(prompt),
        "max_tokens": n,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }


def streamed(sent_s: float, arrived: Sequence[tuple[float, bytes]], n: int) -> Streamed:
    """Reads a streamed completion of ``n`` tokens from what arrived."""
    pieces, ids = [], list[int]()
    for at_s, event in events(arrived):
        if event == b"[DONE]":
            break
        chunk = json.loads(event)
        if "error" in chunk:
            raise WireError(f"the answer ended with {chunk['error']}")
        for choice in chunk["choices"]:
            if new := choice.get("token_ids"):
                pieces.append(Piece(at_s=at_s, n_tokens=len(new)))
                ids += new
    else:
        raise WireError("the answer ended without [DONE]")
    if len(ids) != n:
        raise WireError(f"the answer has {len(ids)} tokens, not {n}")
    return Streamed(sent_s=sent_s, pieces=tuple(pieces), token_ids=tuple(ids))


def events(arrived: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Yields the data of each event of a streamed answer, and when its last byte arrived."""
    rest = b""
    for at_s, data in body_of(arrived):
        *whole, rest = (rest + data).split(b"\n\n")
        for event in whole:
            name, _, value = event.partition(b":")
            if name == b"data":
                yield at_s, value.strip()


def body_of(arrived: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Yields the parts of a chunked body, each with the time at which it was complete."""
    rest, in_body = b"", False
    for at_s, data in arrived:
        rest += data
        if not in_body:
            head, found, after = rest.partition(b"\r\n\r\n")
            if not found:
                continue
            if b" 200 " not in head.split(b"\r\n")[0] or b"chunked" not in head.lower():
                raise WireError(f"no streamed answer: {rest[:1000].decode(errors='replace')}")
            rest, in_body = after, True
        while b"\r\n" in rest:
            size, _, after = rest.partition(b"\r\n")
            n = int(size, 16)
            if len(after) < n + 2:
                break
            yield at_s, after[:n]
            rest = after[n + 2 :]
