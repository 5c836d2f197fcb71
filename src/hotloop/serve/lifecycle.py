"""``HttpServer``: runs the server's thread, from opening the port to the last answer.

The event loop runs in a thread of its own. So the main thread can load the model, and handle
Ctrl-C, while clients already get answers that ask them to wait.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import uvicorn
import uvloop

from hotloop.engine.service import Service
from hotloop.errors import ConfigError, UnsupportedError
from hotloop.serve.app import create_app
from hotloop.serve.gate import is_loopback
from hotloop.serve.protocol import LimitedProtocol
from hotloop.serve.served import ServedModel
from hotloop.serve.settings import ServerSettings

POLL_S = 0.1
"""Polling interval, in seconds."""

ERROR_EVENT_S = 2.0
"""Seconds that clients have to read the error event of their streams, after the drain time."""


class HttpServer:
    """Serves one model over HTTP, in a thread.

    As a context manager it listens from the beginning of the ``with`` block, and has closed all
    connections at its end.

    Args:
        settings: The server's settings.
        access_log: Called with a line about each request, in the server's thread; None logs
            nothing.

    Raises:
        ConfigError: The server cannot listen on the address.
        UnsupportedError: The system allows no event loop; raised at the beginning of the ``with``
            block.

    Attributes:
        served: The served model.
        port: Its port.
    """

    def __init__(
        self, settings: ServerSettings, access_log: Callable[[str], None] | None = None
    ) -> None:
        self._settings = settings
        self.served = ServedModel(settings)
        self._socket = _listen(settings)
        self.port: int = self._socket.getsockname()[1]
        self._stop_requested, self._drain_canceled = threading.Event(), threading.Event()
        protocol: Any = functools.partial(LimitedProtocol, settings)
        self._server = uvicorn.Server(
            uvicorn.Config(
                create_app(self.served, access_log),
                http=protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=settings.max_header_bytes,
                timeout_keep_alive=round(settings.keep_alive_s),
            )
        )
        self._thread = threading.Thread(target=self._run, name="hotloop-http", daemon=True)
        self._running = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: OSError | None = None

    @property
    def url(self) -> str:
        """The server's URL on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._settings.host, self._settings.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def is_open_to_all(self) -> bool:
        """True if other machines can use the server without a key."""
        return not (self._settings.keys or is_loopback(self._settings.host))

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop, for the ``Service`` that it will serve."""
        assert self._loop is not None, "the server has been started"
        return self._loop

    def attach(self, service: Service) -> None:
        """Serves an engine from now on; ``service`` must be made with this server's ``loop``."""
        self.served.attach(service)

    def stop(self) -> None:
        """Ends ``wait``; a second call also ends draining. Safe in a signal handler."""
        if self._stop_requested.is_set():
            self._drain_canceled.set()
        self._stop_requested.set()

    def wait(self) -> bool:
        """Waits until ``stop`` is called; returns False if engine or server failed first."""
        while not self._stop_requested.wait(POLL_S):
            if self.served.error is not None or not self._thread.is_alive():
                return False
        return True

    def close(self) -> None:
        """Refuses new requests, waits for running ones up to the drain time, and ends.

        Streams that have not ended by then get an error event.
        """
        self.served.draining = True
        self._server.should_exit = True
        deadline = time.monotonic() + self._settings.drain_s
        while self._thread.is_alive() and not self._drain_canceled.is_set():
            if time.monotonic() > deadline:
                break
            self._thread.join(POLL_S)
        if self._thread.is_alive():
            self.served.end()
            self._thread.join(ERROR_EVENT_S)
        while self._thread.is_alive():  # clients that do not read
            self.loop.call_soon_threadsafe(self._abort_connections)
            self._thread.join(POLL_S)

    def __enter__(self) -> HttpServer:
        self._thread.start()
        self._running.wait()
        if self._failure is not None:
            self._socket.close()
            reason = f"the server cannot start its event loop: {self._failure}."
            raise UnsupportedError(reason) from self._failure
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self._running.set()
            await self._server.serve([self._socket])

        # Its wake-ups take half the time of those of asyncio's own event loop.
        try:
            loop = uvloop.new_event_loop()
        except OSError as error:  # for one, if the system allows no more open files
            self._failure = error
            self._running.set()
            return
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve())

    def _abort_connections(self) -> None:
        for connection in list(self._server.server_state.connections):
            if isinstance(connection, LimitedProtocol):
                connection.abort()


def _listen(settings: ServerSettings) -> socket.socket:
    """Returns a listening socket.

    Raises:
        ConfigError: The server cannot listen on the address.
    """
    where = f"{settings.host}, port {settings.port}"
    listener = None
    try:
        found = socket.getaddrinfo(settings.host, settings.port, proto=socket.IPPROTO_TCP)
        family, kind, protocol, _, address = found[0]
        # With the protocol named, asyncio turns Nagle's algorithm off, which would hold a piece of
        # an answer back until the client acknowledges the one before: 40 ms.
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
        listener.setblocking(False)
    except (OSError, OverflowError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        problem = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot listen on {where}: {problem}. Choose another address with --host and --port."
        ) from error
    return listener
