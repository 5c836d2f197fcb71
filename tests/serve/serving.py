"""A server of a tiny model, on a port of its own, in this process."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

from hotloop import LLM
from hotloop.engine.service import Service
from hotloop.serve.lifecycle import HttpServer
from hotloop.serve.settings import ServerSettings

TEMPLATE = """{%- for message in messages -%}
{%- if message['role'] == 'nobody' -%}{{ raise_exception('nobody cannot speak') }}{%- endif -%}
<begin>{{ message['role'] }}: {{ message['content'] }}
{% endfor -%}
{%- if add_generation_prompt -%}<begin>assistant: {% endif -%}"""
"""A chat template: a line for each message."""

HELLO = [{"role": "user", "content": "Hello"}]


@contextmanager
def serving(llm: LLM, *, max_queued: int = 64, **settings: Any) -> Iterator[HttpServer]:
    """Serves an engine in this process, as the model "tiny"."""
    options = {"port": 0, "name": "tiny", "drain_s": 5.0} | settings
    with (
        HttpServer(ServerSettings(**options)) as server,
        Service(llm, loop=server.loop, max_queued=max_queued) as service,
    ):
        server.attach(service)
        try:
            yield server
        finally:
            server.close()


def events(response: httpx2.Response) -> list[Any]:
    """The events of a stream that has ended: JSON values, and "[DONE]"."""
    found = []
    for line in response.text.split("\n\n"):
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
        else:
            assert line == "" or line.startswith(":")
    return found
