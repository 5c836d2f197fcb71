"""A client that sends any bytes and reads as it likes."""

import json
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from waiting import HANG_S


def request(body: Any, *, path: str = "/v1/completions", fields: str = "") -> bytes:
    """A POST request; a body that is not bytes is sent as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n{fields}\r\n"
    return head.encode() + data


@contextmanager
def connected(url: str, *, receive_bytes: int | None = None) -> Iterator[socket.socket]:
    """A connection, which ends with the block."""
    parts = urlsplit(url)
    with socket.socket() as connection:
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(HANG_S)
        connection.connect((parts.hostname, parts.port))
        yield connection


def reset_when_closed(connection: socket.socket) -> None:
    """Has the connection end by a reset, as when a client's process is killed."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def read_all(connection: socket.socket) -> bytes:
    """Reads until the server closes the connection, or resets it."""
    found = b""
    try:
        while data := connection.recv(2**16):
            found += data
    except ConnectionResetError:
        pass
    return found


def status_of(answer: bytes) -> int:
    """The status of a response."""
    return int(answer.split(b" ", 2)[1])


def error_of(answer: bytes) -> dict[str, Any]:
    """The error that a response tells in the shape of the API."""
    _, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error
