"""The process that renders a chat template: a script that uses Jinja and the standard library.

A template is a program that came with a model, and is not trusted. Jinja's immutable sandbox denies
it access to Python's internals, and changes of its arguments. The operating system limits time and
memory, which the sandbox does not. A template that exceeds a limit only ends this process, and the
parent reports it. The process cannot open files.

Requests and replies are JSON in UTF-8, each after its length in eight bytes. The first request is
``{template, memory_bytes, cpu_s, output_chars}``, every later request is ``{messages, variables,
mark}``. A reply has ``text``, or ``problem`` and its ``kind``: ``syntax``, ``refused`` (by the
template or the sandbox), ``failed`` or ``limit``.

Templates have the same environment (functions, filters, whitespace rules) as in Hugging Face's
transformers.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import struct
import sys
import time
from datetime import datetime
from typing import Any, BinaryIO, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_LENGTH = struct.Struct("<Q")
_MESSAGE_CHARS = 500


class _TooLongError(Exception):
    """The output is too long."""


class _GenerationBlock(Extension):
    """Accepts ``{% generation %}``, which marks the assistant's text for training."""

    tags = {"generation"}  # noqa: RUF012 (the name and type are Jinja's)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _refuse_file(name: str) -> NoReturn:
    raise jinja2.TemplateSyntaxError(
        f"it reads another template, {name!r}; a chat template must be one file", 1
    )


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


class _Template:
    def __init__(self, source: str, output_chars: int) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, loopcontrols],
            loader=jinja2.FunctionLoader(_refuse_file),
        )
        environment.filters["tojson"] = self._to_json
        functions = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self._template = environment.from_string(source, globals=functions)
        self._output_chars = output_chars
        self._mark = ""

    def render(self, request: dict[str, Any]) -> str:
        self._mark = request["mark"]
        pieces: list[str] = []
        n_chars = 0
        for piece in self._template.generate(**request["variables"], messages=request["messages"]):
            n_chars += len(piece)
            if n_chars > self._output_chars:
                raise _TooLongError
            pieces.append(piece)
        return "".join(pieces)

    def _to_json(self, value: Any, *, ensure_ascii: bool = False, **options: Any) -> str:
        """Dumps a value as JSON; Jinja's own filter would escape HTML."""
        text = json.dumps(value, ensure_ascii=ensure_ascii, **options)
        return text.replace(json.dumps(self._mark)[1:-1], self._mark) if self._mark else text


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answers requests until the input ends."""
    start = _receive(requests)
    if start is None:
        return
    memory_bytes, cpu_s, output_chars = start["memory_bytes"], start["cpu_s"], start["output_chars"]
    _load_everything()
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    template: _Template | None = None
    while (request := _receive(requests)) is not None:
        # The signal's default action ends the process, even within one operation on huge numbers.
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        try:
            if template is None:
                template = _Template(start["template"], output_chars)
            reply = {"text": template.render(request)}
        except jinja2.TemplateSyntaxError as error:
            reply = {"kind": "syntax", "problem": f"line {error.lineno}: {error.message}"}
        except jinja2.TemplateError as error:
            reply = {"kind": "refused", "problem": str(error)}
        except MemoryError:
            reply = {"kind": "limit", "problem": f"more than {memory_bytes >> 20} MiB of memory"}
        except _TooLongError:
            reply = {"kind": "limit", "problem": f"more than {output_chars:,} characters of output"}
        except Exception as error:  # every failure of a template is reported to the parent
            reply = {"kind": "failed", "problem": f"{type(error).__name__}: {error}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        if len(reply.get("problem", "")) > _MESSAGE_CHARS:
            reply["problem"] = reply["problem"][:_MESSAGE_CHARS] + "…"
        _send(replies, reply)


def _load_everything() -> None:
    """Loads modules that Python and Jinja import lazily, because later no file can be opened."""
    time.tzset()
    _Template(r"{{ '\n' | tojson | urlencode | pprint }}{{ lipsum(1) }}", 10_000).render(
        {"variables": {}, "messages": [], "mark": ""}
    )
    for faulty in ("{% for %}", "{{ missing.attribute }}"):
        with contextlib.suppress(jinja2.TemplateError):
            _Template(faulty, 1).render({"variables": {}, "messages": [], "mark": ""})


def _send(stream: BinaryIO, value: dict[str, Any]) -> None:
    data = json.dumps(value).encode()
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def _receive(stream: BinaryIO) -> dict[str, Any] | None:
    """Reads a request; returns None at the end of the stream."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    return json.loads(stream.read(_LENGTH.unpack(head)[0]))


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
