"""Chat templates: Jinja programs that turn messages into a prompt.

A template comes with the model and is not trusted: it runs in a process of its own
(``template_process``), in Jinja's sandbox and under limits of time, memory and output. The process
starts with the first prompt, in about a tenth of a second, and serves all later prompts.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hotloop.child_process import signal_name
from hotloop.errors import (
    CheckpointError,
    HotloopError,
    RequestError,
    UnsupportedError,
    shorten_value,
)

CPU_LIMIT_S = 5.0
"""Processor time for one prompt. Templates in use take a few milliseconds."""

HANG_LIMIT_S = 120.0
"""Wall-clock time for one prompt: long, so that a busy machine does not exceed it."""

MEMORY_LIMIT_BYTES = 512 * 2**20
OUTPUT_LIMIT_CHARS = 16 * 2**20
"""The longest output of a template: several million tokens."""

_PROGRAM = Path(__file__).with_name("template_process.py")  # never imported: that needs Jinja
_LENGTH = struct.Struct("<Q")
RESERVED_VARIABLES = ("messages", "add_generation_prompt", "continue_final_message")
"""Names that are arguments of a prompt, and not variables of its template."""


def as_messages(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies messages to a list of dicts.

    Raises:
        RequestError: ``messages`` is not a list, or one of them is not an object.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise RequestError(
            f"messages must be a list of objects with role and content, not "
            f"{shorten_value(messages)}."
        )
    listed = list(messages)
    for message in listed:
        if not isinstance(message, Mapping):
            raise RequestError(
                f"a message must be an object with role and content, not {shorten_value(message)}."
            )
    return [dict(message) for message in listed]


class ChatTemplate:
    """A chat template. Safe to share between threads.

    Args:
        source: The template.
        file: Its file, for error messages.
    """

    def __init__(self, source: str, file: Path) -> None:
        self._source, self._file = source, file
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end = lambda: None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        mark: str = "",
    ) -> str:
        """Renders ``messages`` to a prompt.

        Args:
            messages: JSON values, each an object.
            add_generation_prompt: End with the beginning of the assistant's answer.
            variables: Further variables of the template.
            mark: A character of the messages that the template must not escape.

        Raises:
            CheckpointError: The template is not valid Jinja.
            RequestError: The template refuses the messages, fails on them, or exceeds a limit.
            UnsupportedError: No process can be started.
        """
        for name in RESERVED_VARIABLES:
            if name in variables:
                raise RequestError(
                    f"the template variable {name!r} is set by hotloop: leave it out."
                )
        given = {"tools": None, "documents": None, **variables}
        given["add_generation_prompt"] = add_generation_prompt
        listed = as_messages(messages)
        try:
            request = _frame({"messages": listed, "variables": given, "mark": mark})
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(
                f"messages and template variables must be JSON values: {error}"
            ) from error
        with self._lock:
            reply = self._ask(request)
        if "text" in reply:
            return reply["text"]
        raise self._error(reply["kind"], reply["problem"])

    def _ask(self, request: bytes) -> dict[str, Any]:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start()
            request = self._first_request() + request
        try:
            assert process.stdin is not None
            process.stdin.write(request)
            process.stdin.flush()
            data = _receive(process, time.monotonic() + HANG_LIMIT_S)
        except BaseException as error:  # also a Ctrl-C: the reply would answer the next request
            self._end()
            if isinstance(error, TimeoutError):
                raise self._error("limit", f"more than {HANG_LIMIT_S:.0f} s") from error
            if isinstance(error, OSError | EOFError):
                raise self._ended(process.returncode) from error
            raise
        return json.loads(data)

    def _first_request(self) -> bytes:
        return _frame(
            {
                "template": self._source,
                "memory_bytes": MEMORY_LIMIT_BYTES,
                "cpu_s": CPU_LIMIT_S,
                "output_chars": OUTPUT_LIMIT_CHARS,
            }
        )

    def _start(self) -> subprocess.Popen[bytes]:
        self._end()
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", str(_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                process_group=0,  # so that Ctrl-C reaches only this process
            )
        except OSError as error:
            raise UnsupportedError(
                f"the chat template of {self._file} needs a process of its own, which cannot be "
                f"started: {error}"
            ) from error
        self._process = process
        self._end = weakref.finalize(self, _end, process)
        return process

    def _ended(self, code: int | None) -> HotloopError:
        if code == -signal.SIGPROF:
            return self._error("limit", f"more than {CPU_LIMIT_S:g} s of processor time")
        how = f"exit code {code}" if code is None or code >= 0 else signal_name(code)
        return self._error("failed", f"its process ended ({how})")

    def _error(self, kind: str, problem: str) -> HotloopError:
        if kind == "syntax":
            return CheckpointError(self._file, f"its chat template is not valid Jinja: {problem}")
        verb = {
            "refused": "refuses these messages:",
            "failed": "fails on these messages:",
            "limit": "needs",
        }[kind]
        return RequestError(f"the chat template of {self._file} {verb} {problem}")


def _frame(value: dict[str, Any]) -> bytes:
    data = json.dumps(value).encode()
    return _LENGTH.pack(len(data)) + data


def _receive(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """Reads a reply.

    Raises:
        TimeoutError: There is no reply before ``deadline``, a time of ``time.monotonic``.
        EOFError: The process ended.
    """
    assert process.stdout is not None
    data, replies = bytearray(), select.poll()
    replies.register(process.stdout, select.POLLIN)
    while len(data) < _LENGTH.size or len(data) < _LENGTH.size + _LENGTH.unpack_from(data)[0]:
        if not replies.poll(1e3 * max(0.0, deadline - time.monotonic())):
            raise TimeoutError
        piece = os.read(process.stdout.fileno(), 2**20)
        if not piece:
            raise EOFError
        data += piece
    return bytes(data[_LENGTH.size :])


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # unread data is dropped
                stream.close()
