"""``HttpServer``: the server's thread, from the open port to the last answer.

The event loop runs in a thread of its own, so that the main thread can load the model, with its
Ctrl-C, while clients are already told to wait.
"""

from __future__ import annotations

import asyncio
import socket
import threading

import uvicorn

from hotloop.engine.service import Service
from hotloop.errors import ConfigError
from hotloop.serve.app import create_app
from hotloop.serve.served import Served
from hotloop.serve.settings import ServerSettings

WATCH_S = 0.2
"""Seconds between two looks at the engine's state."""


class HttpServer:
    """Serves one model over HTTP, in a thread.

    As a context manager it listens from the beginning of the ``with`` block, and has closed all
    connections at its end.

    Args:
        settings: The server's settings.

    Raises:
        ConfigError: The address cannot be listened on.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.served = Served(settings)
        self._socket = _listen(settings)
        self.port: int = self._socket.getsockname()[1]
        self._stop = threading.Event()
        self._started: threading.Event = threading.Event()
        self._server = uvicorn.Server(
            uvicorn.Config(
                create_app(self.served),
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=max(1, round(settings.drain_s)),
            )
        )
        self._thread = threading.Thread(target=self._run, name="hotloop-http", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        host = self.served.settings.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Its event loop, for the ``Service`` that it will serve."""
        assert self._loop is not None, "the server has been started"
        return self._loop

    def attach(self, service: Service) -> None:
        """Serves an engine from now on; ``service`` must be made with this server's ``loop``."""
        self.served.attach(service)

    def stop(self) -> None:
        """Ends ``wait``. Safe in a signal handler."""
        self._stop.set()

    def wait(self) -> bool:
        """Waits until ``stop`` is called, or the engine fails; False if it has failed."""
        while not self._stop.wait(WATCH_S):
            if self.served.error is not None:
                return False
        return True

    def close(self) -> None:
        """Takes no more connections, waits until requests have ended, and ends the thread."""
        self.served.draining = True
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()  # again does no harm

    def __enter__(self) -> HttpServer:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self._started.set()
            await self._server.serve([self._socket])

        asyncio.run(serve())


def _listen(settings: ServerSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {settings.host}, port {settings.port}: {error}. Choose others with "
            "--host and --port."
        ) from error
    listener.setblocking(False)
    return listener
