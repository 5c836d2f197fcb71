"""``hotloop serve``: a model behind OpenAI's API."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App

from hotloop.cli.engine import loaded
from hotloop.cli.options import (
    DEFAULT_ENGINE,
    DEFAULT_TEMPLATE,
    SERVER,
    EngineOptions,
    Model,
    TemplateOptions,
    integer,
    option,
)
from hotloop.cli.output import note, print_error
from hotloop.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from hotloop.serve.lifecycle import HttpServer
    from hotloop.serve.settings import ServerSettings

app = App(
    name="serve",
    help_epilogue="""\
Examples:
  hotloop serve smollm2-135m
  hotloop serve ./my-model --quant int4-g64 --max-batch-size 16 --port 8080
  hotloop serve smollm2-135m --draft ngram --host 0.0.0.0""",
)

API_KEY = "HOTLOOP_API_KEY"
"""The environment variable that holds the API key."""

PREFILL_CHUNK = 512
"""Prompt tokens of one forward pass by default: the others' decoding waits for it."""


@app.default
def serve(
    model: Model,
    /,
    *,
    host: Annotated[str, option(SERVER, "Address to listen on; 0.0.0.0 is all of them.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, integer(SERVER, "Port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, option(SERVER, "The model's name in the API.", "its name or file name")
    ] = None,
    drain_s: Annotated[
        float, option(SERVER, "Seconds that requests have to end, once the server is stopped.")
    ] = 30.0,
    template: TemplateOptions = DEFAULT_TEMPLATE,
    engine: EngineOptions = DEFAULT_ENGINE,
) -> int:
    """Serve a model behind OpenAI's API.

    Clients of OpenAI's API take http://HOST:PORT/v1 as their base URL.
    HOTLOOP_API_KEY in the environment is the key that requests must have.
    """
    try:
        from hotloop.serve.lifecycle import HttpServer
        from hotloop.serve.settings import ServerSettings
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"hotloop serve needs the package {error.name}: pip install 'hotloop[serve]'."
        ) from error
    from hotloop.engine.service import Service
    from hotloop.outside import config_error, read_text

    config = engine.config(model)
    if config.prefix_cache == "auto":
        config = replace(config, prefix_cache="chunks")
    if config.prefill_chunk is None:
        config = replace(config, prefill_chunk=PREFILL_CHUNK)
    if drain_s < 0:
        raise ConfigError(f"--drain-s must be 0 or more, not {drain_s}.")
    settings = ServerSettings(
        host=host,
        port=port,
        name=name or Path(model).name,
        keys=tuple(filter(None, [os.environ.get(API_KEY)])),
        drain_s=drain_s,
        template=(
            read_text(template.chat_template, refuse=config_error)
            if template.chat_template
            else None
        ),
        template_variables=template.variables(),
    )
    with (
        HttpServer(settings) as server,
        loaded(config) as llm,
        Service(llm, loop=server.loop) as service,
    ):
        server.attach(service)
        _announce(server, settings)
        with _stopped_by_signals(server):
            running = server.wait()
        if not running:
            print_error(str(service.state().error))
        server.close()  # before the service, whose requests may end
    return 0 if running else 1


def _announce(server: HttpServer, settings: ServerSettings) -> None:
    """Says where the model is served, and how to ask it."""
    note(f"{settings.name} is served at {server.url}/v1 · Ctrl-C stops it")


@contextmanager
def _stopped_by_signals(server: HttpServer) -> Generator[None]:
    """Stops the server on SIGTERM and Ctrl-C, within the block."""
    handlers = {
        number: signal.signal(number, lambda *_: server.stop())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
