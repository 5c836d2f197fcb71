"""``hotloop serve``: serves a model through OpenAI's API."""

from __future__ import annotations

import gc
import itertools
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from hotloop.cli.engine import ConversationFormat, loaded
from hotloop.cli.interrupts import handled_after_imports
from hotloop.cli.options import (
    DEFAULT_SERVED_ENGINE,
    DEFAULT_TEMPLATE,
    DEFAULT_WEIGHTS,
    MODEL,
    SERVER,
    ServedEngineOptions,
    TemplateOptions,
    WeightOptions,
    integer,
    option,
)
from hotloop.cli.output import announce, long_step, note, print_error
from hotloop.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from hotloop.engine.llm import LLM
    from hotloop.engine.service import Service
    from hotloop.serve.lifecycle import HttpServer
    from hotloop.serve.settings import ServerSettings
    from hotloop.types import EngineConfig

app = App(
    name="serve",
    help_epilogue="""\
Examples:
  hotloop serve smollm2-135m
  hotloop serve ./my-model --quant int4-g64 --max-batch-size 16 --port 8080
  hotloop serve --config results/demo
  hotloop serve smollm2-135m --host 0.0.0.0 --api-key-file ./keys""",
)

UNWIND_S = 5.0
"""Seconds that a server may take to end after a SIGTERM while it is loading."""

API_KEY = "HOTLOOP_API_KEY"
"""The environment variable that holds an API key."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of the server: fields of ``serve.settings.ServerSettings``."""

    host: Annotated[
        str, option(SERVER, "Address to listen on; 0.0.0.0 is every address of this machine.")
    ] = "127.0.0.1"
    port: Annotated[int, integer(SERVER, "Port to listen on; 0 takes a free one.")] = 8000
    name: Annotated[
        str | None, option(SERVER, "The model's name in the API.", "the name of its folder or file")
    ] = None
    api_key_file: Annotated[
        Path | None,
        option(
            SERVER,
            "A file of API keys, one per line; a request must have one of them. The environment "
            f"variable {API_KEY} can hold another key.",
            "no keys",
        ),
    ] = None
    allowed_host: Annotated[
        tuple[str, ...],
        option(
            SERVER,
            "A host name that requests may be sent to. Can be repeated.",
            "the names of the loopback address if --host is one, else any",
        ),
    ] = ()
    cors_origin: Annotated[
        tuple[str, ...],
        option(
            SERVER,
            "An origin whose web pages may send requests, such as http://localhost:3000, or *. "
            "Can be repeated.",
            "none",
        ),
    ] = ()
    tool_parser: Annotated[
        str,
        option(
            SERVER,
            "Format of the model's tool calls: hermes (also for Qwen), llama3 or mistral. auto "
            "detects it from the chat template and the vocabulary.",
        ),
    ] = "auto"
    max_queued: Annotated[
        int,
        integer(
            SERVER, "The most answers that may wait in the queue; further requests are refused."
        ),
    ] = 64
    drain_s: Annotated[
        float, option(SERVER, "Seconds that running requests may take after the server is stopped.")
    ] = 30.0
    access_log: Annotated[
        bool,
        option(SERVER, "Print a line for each request, without any part of prompts and answers."),
    ] = False

    def settings(self, model: str, template: TemplateOptions) -> ServerSettings:
        """Returns the server's settings.

        Raises:
            ConfigError: A value cannot be used.
        """
        from hotloop.serve.settings import ServerSettings
        from hotloop.serve.tools import check_name
        from hotloop.untrusted import config_error, read_text

        check_name(self.tool_parser)
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be between 0 and 65535, not {self.port}.")
        if self.max_queued < 0:
            raise ConfigError(f"--max-queued must be 0 or more, not {self.max_queued}.")
        if not 0 <= self.drain_s <= 86400:
            raise ConfigError(f"--drain-s must be between 0 and 86400, not {self.drain_s}.")
        keys = [os.environ.get(API_KEY, "").strip()]
        if (file := self.api_key_file) is not None:
            # Some editors write a byte order mark.
            text = read_text(file, refuse=config_error).removeprefix("\ufeff")
            in_file = [line.strip() for line in text.splitlines()]
            if not any(in_file):
                raise config_error(file, "holds no API key")
            keys += in_file
        source = template.chat_template
        return ServerSettings(
            host=self.host,
            port=self.port,
            name=self.name or Path(model).name or model,
            keys=tuple(filter(None, keys)),
            allowed_hosts=self.allowed_host,
            cors_origins=tuple(map(_origin, self.cors_origin)),
            drain_s=self.drain_s,
            template=read_text(source, refuse=config_error) if source else None,
            template_variables=template.variables(),
            tool_parser=self.tool_parser,
        )


def _origin(given: str) -> str:
    """Returns an origin in the form that browsers send.

    Raises:
        ConfigError: It is not an origin.
    """
    origin = given.lower().removesuffix("/")
    if origin not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+", origin):
        raise ConfigError(
            f"--cors-origin must be * or an origin such as http://localhost:3000, not {given!r}."
        )
    return origin


DEFAULT_SERVER = ServerOptions()


@app.default
def serve(
    model: Annotated[
        str | None,
        option(MODEL, "A folder, a .gguf file, or the name of a pulled model."),
    ] = None,
    /,
    *,
    config: Annotated[
        str | None,
        option(
            MODEL,
            "RESULTS or RESULTS:CELL instead of MODEL: the configuration that a sweep's results "
            "recommend, or another of its cells, as it was measured. Other options override it.",
        ),
    ] = None,
    template: TemplateOptions = DEFAULT_TEMPLATE,
    engine: ServedEngineOptions = DEFAULT_SERVED_ENGINE,
    weights: WeightOptions = DEFAULT_WEIGHTS,
    server: ServerOptions = DEFAULT_SERVER,
) -> int:
    """Serve a model through OpenAI's API.

    Set the printed address as the base URL of clients of OpenAI's API.
    Ctrl-C, or SIGTERM, stops the server once running requests have ended.
    """
    with _ended_while_loading():
        _check_packages()
        chosen = _config(model, config, engine, weights)
        return _serve(chosen, template, server)


def _serve(chosen: EngineConfig, template: TemplateOptions, server: ServerOptions) -> int:
    from hotloop.engine.service import Service
    from hotloop.engine.setup import served_prefill_chunk

    if chosen.prefill_chunk is None:
        chosen = replace(chosen, prefill_chunk=served_prefill_chunk(chosen))
    settings = server.settings(chosen.model, template)
    ConversationFormat(template).check(chosen.model, [{"role": "user", "content": "Hello"}])
    with _http_server(settings, server) as http, _loaded(chosen) as llm:
        n = llm.config.max_batch_size
        with long_step(f"{settings.name}: preparing for {n} sequences at once"):
            service = Service(llm, loop=http.loop, max_queued=server.max_queued)
        with service, _stopped_by_signals(http):
            http.attach(service)
            gc.freeze()  # else a full garbage collection of the loaded model pauses answers
            _announce(http, service)
            works = http.wait()
            if works:
                _announce_draining(service, settings)
            else:
                print_error(str(http.served.error or "the server has ended by itself."))
            http.close()  # before the service, whose requests may end
    return 0 if works else 1


@contextmanager
def _loaded(config: EngineConfig) -> Generator[LLM]:
    """Loads an engine as ``loaded`` does, after a line that says so in a log."""
    announce(f"{config.model} as {config.name}: starting")
    with loaded(config) as llm:
        yield llm


def _http_server(settings: ServerSettings, options: ServerOptions) -> HttpServer:
    from hotloop.serve.lifecycle import HttpServer

    def write(line: str) -> None:
        note(line, fold=False)

    return HttpServer(settings, write if options.access_log else None)


def _check_packages() -> None:
    try:
        import prometheus_client
        import starlette
        import uvicorn
        import uvloop

        del prometheus_client, starlette, uvicorn, uvloop
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"hotloop serve needs the package {error.name}: pip install 'hotloop[serve]'."
        ) from error


def _config(
    model: str | None, results: str | None, engine: ServedEngineOptions, weights: WeightOptions
) -> EngineConfig:
    """Returns the configuration of a model, or of a sweep's results.

    Raises:
        ConfigError: Neither or both are given, or the results have no such configuration.
    """
    if results is None:
        if model is None and weights.shape is None:
            raise ConfigError("give MODEL, --config RESULTS, or --shape NAME.")
        config = engine.config(weights.model(model))
        if weights.weights == "random":
            config = replace(config, weights="random", seed=weights.weights_seed)
        return config
    if model is not None or weights.given():
        raise ConfigError(
            "--config: the results name the model. Leave MODEL out, and --shape and --weights."
        )
    from hotloop.cli.results import measured_config

    measured = measured_config(results)
    note(f"{measured.name} · {measured.why}")
    return replace(measured.config, **engine.overrides(measured.config))


def _announce(http: HttpServer, service: Service) -> None:
    """Prints the served model, its address, and an example request."""
    about, settings = service.description, http.served.settings
    n = about.config.max_batch_size
    name = about.name.removesuffix(f"/batch{n}")
    sequences = f"{n} {'sequence' if n == 1 else 'sequences'} of {about.max_seq_len:,} tokens"
    note(f"{settings.name} · {name} on {about.device_name} · {sequences}")
    note(f"{http.url}/v1 · {'with an API key' if settings.keys else 'no API key'} · Ctrl-C stops")
    note(f"{http.url} is a chat page for browsers")
    if http.is_open_to_all:
        note(
            f"Everyone who can reach {settings.host} can use this server: set {API_KEY} or "
            "--api-key-file."
        )
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "temperature": 0.2})
    shown = f"${API_KEY}" if os.environ.get(API_KEY) else "KEY"
    key = f' -H "Authorization: Bearer {shown}"' if settings.keys else ""
    note(f"curl {http.url}/v1/chat/completions{key} -d '{body}'", fold=False)


def _announce_draining(service: Service, settings: ServerSettings) -> None:
    state = service.state()
    if n := state.n_running + state.n_waiting:
        running = "1 answer" if n == 1 else f"{n} answers"
        note(f"Stopping: {running} may take {settings.drain_s:g} s more. Ctrl-C ends all now.")


@contextmanager
def _ended_while_loading() -> Generator[None]:
    """Makes SIGTERM end the program with exit code 0, within the block; no process is left.

    What is loading is unwound, as by Ctrl-C. If that takes longer than ``UNWIND_S``, because a
    library swallows the exception or a device hangs, or at a second signal, the process ends at
    once; ranks notice that, and end too.
    """
    timer = threading.Timer(UNWIND_S, os._exit, (0,))
    timer.daemon = True

    def terminated() -> None:
        if timer.is_alive():
            os._exit(0)
        timer.start()
        raise SystemExit(0)

    try:
        with handled_after_imports(signal.SIGTERM, terminated):
            yield
    finally:
        timer.cancel()


@contextmanager
def _stopped_by_signals(http: HttpServer) -> Generator[None]:
    """Makes SIGTERM and Ctrl-C stop the server, within the block.

    The first signal lets answers finish, the second ends them, and the third ends the process at
    once, since a device can hang.
    """
    count = itertools.count(1)

    def stopped(*_: object) -> None:
        if next(count) > 2:
            os._exit(1)
        http.stop()

    with _handled(stopped, signal.SIGTERM, signal.SIGINT):
        yield


@contextmanager
def _handled(handler: Callable[..., None], *numbers: int) -> Generator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
