"""A server for the chat page that plays answers and faults as a test scripts them.

It speaks as much of OpenAI's API as the page does, listens on a port of its own in a thread, and
can be stopped and started again in mid-answer.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from waiting import HANG_S, wait_until

from hotloop.serve.page import FOLDER, chat_page

MODEL = "scripted-model"
CONTEXT = 2048


@dataclass(kw_only=True)
class Script:
    """One answer, or one refusal.

    Attributes:
        pieces: Texts of the chunks.
        thoughts: Texts of reasoning, before them.
        drafted: Indices of the pieces that are accepted drafts.
        cached_tokens: Tokens of the prompt that were in the cache.
        finish: The finish reason.
        delay_s: Time before each piece.
        hangs: Sends nothing after the pieces, until the client has gone.
        drops: Drops the connection after the pieces.
        error: Is sent as an event after the pieces.
        status: Is answered instead of 200, without pieces.
        headers: Headers of the response.
    """

    pieces: tuple[str, ...] = ("Hello", " there", ".")
    thoughts: tuple[str, ...] = ()
    drafted: frozenset[int] = frozenset()
    cached_tokens: int = 0
    finish: str = "stop"
    delay_s: float = 0.0
    hangs: bool = False
    drops: bool = False
    error: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class ScriptedServer:
    """The server; a context manager.

    Attributes:
        scripts: Of the next answers; when there is none, the default is played.
        key: The key that it asks for; None asks for none.
        asked: The bodies of requests, in order.
        n_left: Clients that left in mid-answer.
    """

    def __init__(self) -> None:
        self.scripts: deque[Script] = deque()
        self.key: str | None = None
        self.asked: list[dict[str, Any]] = []
        self.n_left = 0
        self.port = 0
        self._app = Starlette(
            routes=[
                Route("/", chat_page),
                Route("/modules/{name}", _module),
                Route("/blank", lambda _: Response("<!DOCTYPE html>", media_type="text/html")),
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ]
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> ScriptedServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listens, after a stop on the same port."""
        listener = socket.create_server(("127.0.0.1", self.port))  # sets SO_REUSEADDR
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(self._app, log_level="error", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Drops all connections at once, as a server that is killed."""
        for connection in list(self._server.server_state.connections):
            connection.loop.call_soon_threadsafe(connection.transport.abort)
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()

    def wait_until_left(self, n: int) -> None:
        """Waits until this many clients have left in mid-answer."""
        wait_until(lambda: self.n_left >= n, f"{n} clients left")

    def _refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return _error(401, "A key is needed: Authorization: Bearer KEY.")

    async def _models(self, request: Request) -> Response:
        model = {"id": MODEL, "object": "model", "max_model_len": CONTEXT}
        return self._refused(request) or JSONResponse({"object": "list", "data": [model]})

    async def _chat(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        body = await request.json()
        self.asked.append(body)
        script = self.scripts.popleft() if self.scripts else Script()
        if script.status != 200:
            return _error(script.status, script.error or "Refused.", script.headers)
        return StreamingResponse(self._play(script, body), media_type="text/event-stream")

    async def _play(self, script: Script, body: dict[str, Any]) -> AsyncIterator[str]:
        usage = {
            "prompt_tokens": sum(len(m["content"].split()) + 4 for m in body["messages"]),
            "completion_tokens": 0,
            "prompt_tokens_details": {"cached_tokens": script.cached_tokens},
        }

        def chunk(delta: dict[str, str], finish: str | None = None, **more: Any) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            return f"data: {json.dumps({'choices': [choice], 'usage': usage, **more})}\n\n"

        parts = [{"reasoning_content": text} for text in script.thoughts]
        parts += [{"content": text} for text in script.pieces]
        try:
            yield ": hello\n\n"
            for i, part in enumerate(parts, start=-len(script.thoughts)):
                await asyncio.sleep(script.delay_s)
                usage["completion_tokens"] += 1
                yield chunk(part, **({"hotloop": {"accepted": 1}} if i in script.drafted else {}))
            if script.hangs:
                await asyncio.sleep(HANG_S)
        except asyncio.CancelledError:
            self.n_left += 1
            raise
        if script.drops:
            for connection in list(self._server.server_state.connections):
                connection.transport.abort()
            await asyncio.sleep(HANG_S)
        if script.error:
            yield f"data: {json.dumps({'error': {'message': script.error}})}\n\n"
            return
        yield chunk({}, script.finish)
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"


async def _module(request: Request) -> Response:
    return FileResponse(FOLDER / request.path_params["name"], media_type="text/javascript")


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    error = {"message": message, "type": "error", "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)
