"""A fake completions server, in this process, that imitates the behavior of several servers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Habits:
    """The habits of a server.

    Attributes:
        models: The models that it lists.
        role_first: It sends an event without text first.
        pings: It sends comments and named events between events, and ends lines with CR LF.
        per_piece: Tokens in an event.
        usage: It reports the number of generated tokens.
        sends_ids: It sends token ids if they are requested.
        refuses: Fields that it answers with status 400.
        takes_ids: It takes token ids as a prompt.
        busy: The number of requests that it first refuses with status 429.
        retry_after: The value of its ``Retry-After`` header.
        fails_with: Status of every answer.
        error_within: It ends a stream with an error.
        stalls: It sends one token and nothing more.
        ends_early: The most tokens that it generates.
        pause_s: Seconds before each event.
        cold_s: Seconds before the first event of the answer to a new prompt.
        words: The words that it repeats.
        raw: Bytes that it sends instead of an answer.
        has_logprobs: It returns log-probabilities of prompts.
    """

    models: tuple[str, ...] = ("m",)
    role_first: bool = False
    pings: bool = False
    per_piece: int = 1
    usage: bool = True
    sends_ids: bool = False
    refuses: tuple[str, ...] = ()
    takes_ids: bool = True
    busy: int = 0
    retry_after: str | None = "0"
    fails_with: int = 200
    error_within: bool = False
    stalls: bool = False
    ends_early: int = 10**9
    pause_s: float = 0.0
    cold_s: float = 0.0
    words: tuple[str, ...] = ("one", "two", "three")
    raw: bytes | None = None
    has_logprobs: bool = True
    asked: list[dict[str, Any]] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    keys: set[str | None] = field(default_factory=set)


@contextmanager
def serve(habits: Habits) -> Iterator[str]:
    """Runs the server; yields its base URL."""

    class Handler(_Handler):
        pass

    Handler.habits = habits
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    habits: Habits

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def version_string(self) -> str:
        return "played/1.0"

    def do_GET(self) -> None:
        self._answer(200, {"object": "list", "data": [{"id": m} for m in self.habits.models]})

    def do_POST(self) -> None:
        """Answers as the habits say: with a refusal, log-probabilities, or a stream."""
        habits = self.habits
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        habits.asked.append(body)
        habits.keys.add(self.headers["authorization"])
        named = [name for name in habits.refuses if name in body]
        if habits.fails_with != 200:
            self._answer(habits.fails_with, {"error": {"message": "a fault"}})
        elif habits.busy > 0:
            habits.busy -= 1
            self._answer(429, {"error": "busy"}, retry_after=habits.retry_after)
        elif named:
            self._answer(400, {"error": {"message": f"unexpected field {named[0]}"}})
        elif not habits.takes_ids and not isinstance(body["prompt"], str):
            self._answer(422, {"detail": "prompt: must be text"})
        elif body.get("stream"):
            self._stream(body)
        else:
            self._answer(200, self._scored(body))

    def _answer(self, status: int, value: Any, retry_after: str | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        if retry_after is not None:
            self.send_header("retry-after", retry_after)
        self.end_headers()
        self.wfile.write(data)

    def _scored(self, body: dict[str, Any]) -> dict[str, Any]:
        """Gives each token of the prompt, and the ``k`` tokens 0 to k - 1, made-up figures."""
        if not self.habits.has_logprobs:
            return {"choices": [{"text": "x"}]}
        entries: list[Any] = [None]
        for token in body["prompt"][1:]:
            top = {i: -1.0 - i for i in range(body["prompt_logprobs"])}
            top.setdefault(token, -9.0)
            entries.append({str(i): {"logprob": value, "rank": 1} for i, value in top.items()})
        return {"choices": [{"text": "x", "prompt_logprobs": entries}]}

    def _stream(self, body: dict[str, Any]) -> None:
        habits = self.habits
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        if habits.raw is not None:
            self._send(habits.raw)
            self._send(b"")
            return
        if habits.role_first:
            self._event({"choices": [{"text": "", "delta": {"role": "assistant"}}]})
        n = min(body["max_tokens"], habits.ends_early)
        prompt = json.dumps(body["prompt"])
        if prompt not in habits.seen:
            habits.seen.add(prompt)
            time.sleep(habits.cold_s)
        for start in range(0, n, habits.per_piece):
            time.sleep(habits.pause_s)
            made = range(start, min(start + habits.per_piece, n))
            choice: dict[str, Any] = {
                "text": "".join(f" {habits.words[i % len(habits.words)]}" for i in made)
            }
            if habits.sends_ids and body.get("return_token_ids"):
                choice["token_ids"] = [100 + i for i in made]
            self._event({"choices": [choice]})
            if habits.stalls:
                time.sleep(30)
            if habits.error_within:
                self._event({"error": {"message": "the engine died"}})
        self._event({"choices": [{"text": "", "finish_reason": "length"}]})
        if habits.usage and "stream_options" in body:
            n_prompt = len(body["prompt"])
            self._event(
                {"choices": [], "usage": {"prompt_tokens": n_prompt, "completion_tokens": n}}
            )
        self._send(b"data: [DONE]\n\n")
        self._send(b"")

    def _event(self, value: Any) -> None:
        data = b"data: " + json.dumps(value).encode()
        if self.habits.pings:
            self._send(b": ping\r\n\r\n")
            self._send(b"event: completion\r\n" + data[:9])  # a line in two packets
            self._send(data[9:] + b"\r\n\r\n")
        else:
            self._send(data + b"\n\n")

    def _send(self, data: bytes) -> None:
        try:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()
        except OSError:  # the client has left
            self.close_connection = True
