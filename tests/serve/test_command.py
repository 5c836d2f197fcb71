"""``hotloop serve`` from its start to its exit code."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from serving import HELLO, events
from waiting import HANG_S, wait_until

from hotloop.cli import serve as command
from hotloop.cli.app import main
from hotloop.cli.options import TemplateOptions
from hotloop.cli.serve import ServerOptions
from hotloop.errors import ConfigError, HotloopError
from hotloop.serve.lifecycle import HttpServer
from hotloop.serve.settings import ServerSettings

ASKED = {"messages": HELLO, "max_tokens": 100, "ignore_eos": True, "stream": True}


def run(
    folder: Any,
    patch: pytest.MonkeyPatch,
    then: Callable[[HttpServer, httpx2.Client], None],
    *options: str,
) -> int:
    """Runs the command, and something in another thread once it serves; returns the exit code."""
    announce, faults = command._announce, []

    def announced(http: HttpServer, service: Any) -> None:
        announce(http, service)
        thread.start_with(http)

    class Client(threading.Thread):
        def start_with(self, http: HttpServer) -> None:
            self.http = http
            self.start()

        def run(self) -> None:
            try:
                with httpx2.Client(base_url=self.http.url, timeout=HANG_S) as client:
                    then(self.http, client)
            except BaseException as error:
                faults.append(error)
            finally:
                self.http.stop()

    thread = Client()
    patch.setattr(command, "_announce", announced)
    code = main(["serve", str(folder), "--port", "0", "--dtype", "float32", *options])
    thread.join()
    assert not faults
    return code


def test_sigterm_lets_answers_end_and_is_no_failure(folder, monkeypatch, capsys):
    found = []

    def ask_and_terminate(http: HttpServer, client: httpx2.Client) -> None:
        with client.stream("POST", "/v1/chat/completions", json=ASKED) as response:
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: http.served.draining, "the signal is obeyed")
            response.read()
            found.extend(events(response))

    assert run(folder, monkeypatch, ask_and_terminate) == 0
    assert found[-1] == "[DONE]"
    said = capsys.readouterr().err
    assert "/v1 · no API key" in said
    assert f"{folder.name} · none/eager/float32 on " in said
    assert "8 sequences of 320 tokens" in said
    loading = ("starting", "loading layers", "warming up, compiling")
    steps = [*(f"/float32/batch8: {step} …" for step in loading), "preparing for 8 sequences"]
    places = [said.find(step) for step in (*steps, "/v1 · ")]
    assert -1 not in places, said
    assert places == sorted(places), "each step is told as it begins, without a terminal"
    assert "curl http://127.0.0.1:" in said
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class Loading:
    """Stands for an engine that is told to end while it is loaded."""

    def __init__(self, *signals: signal.Signals, swallows: bool = False) -> None:
        self.signals, self.swallows, self.exits = signals, swallows, []

    def exit(self, code: int) -> None:
        """Stands for the end of the process at once."""
        self.exits.append(code)

    def __call__(self, *_: object, **__: object) -> None:
        for number in self.signals:
            try:
                os.kill(os.getpid(), number)
                time.sleep(HANG_S)
            except SystemExit:
                if not self.swallows:
                    raise
        wait_until(lambda: bool(self.exits), "the process ends at once")
        raise HotloopError("the process has ended")


def load(loading: Loading, folder: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs the command with such an engine; returns the exit code, or -1 if it was swallowed."""
    monkeypatch.setattr("hotloop.LLM", loading)
    monkeypatch.setattr(os, "_exit", loading.exit)
    try:
        code = main(["serve", str(folder), "--port", "0"])
    except SystemExit as end:
        code = end.code
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    return code


def test_sigterm_while_the_model_is_loaded_is_no_failure(folder, monkeypatch):
    loading = Loading(signal.SIGTERM)
    assert load(loading, folder, monkeypatch) == 0
    assert loading.exits == []


def test_ctrl_c_while_the_model_is_loaded_ends_as_in_all_commands(folder, monkeypatch):
    assert load(Loading(signal.SIGINT), folder, monkeypatch) == 130


def test_a_library_that_swallows_the_end_delays_it_by_seconds_at_most(folder, monkeypatch):
    monkeypatch.setattr(command, "UNWIND_S", 0.01)
    loading = Loading(signal.SIGTERM, swallows=True)
    load(loading, folder, monkeypatch)
    assert loading.exits == [0]


def test_a_second_sigterm_ends_a_loading_server_at_once(folder, monkeypatch):
    monkeypatch.setattr(command, "UNWIND_S", HANG_S)
    loading = Loading(signal.SIGTERM, signal.SIGTERM, swallows=True)
    load(loading, folder, monkeypatch)
    assert loading.exits[0] == 0


def test_an_engine_that_fails_is_a_failure(folder, monkeypatch, capsys):
    found = []

    def break_the_engine(http: HttpServer, client: httpx2.Client) -> None:
        def broken() -> None:
            raise RuntimeError("the device is gone")

        http.served.service._scheduler.iterate = broken
        found.extend(events(client.post("/v1/chat/completions", json=ASKED)))
        wait_until(lambda: http.served.draining, "the command has noticed")

    assert run(folder, monkeypatch, break_the_engine) == 1
    assert "the device is gone" in found[-1]["error"]["message"]
    assert "error: the engine has failed: RuntimeError: the device is gone" in (
        capsys.readouterr().err
    )


def test_a_key_in_the_environment_guards_the_server(folder, monkeypatch, capsys):
    monkeypatch.setenv("HOTLOOP_API_KEY", "secret")

    def ask(_: HttpServer, client: httpx2.Client) -> None:
        assert client.get("/v1/models").status_code == 401
        key = {"Authorization": "Bearer secret"}
        (model,) = client.get("/v1/models", headers=key).json()["data"]
        assert model["id"] == "other"

    assert run(folder, monkeypatch, ask, "--name", "other", "--max-batch-size", "1") == 0
    said = capsys.readouterr().err
    assert 'Authorization: Bearer $HOTLOOP_API_KEY"' in said
    assert "secret" not in said
    assert "1 sequence of" in said


@pytest.mark.parametrize("key", ["", "secret"])
def test_a_server_that_is_open_to_others_without_a_key_says_so(folder, monkeypatch, capsys, key):
    monkeypatch.setenv("HOTLOOP_API_KEY", key)

    def ask(_: HttpServer, client: httpx2.Client) -> None:
        assert client.get("/health").status_code == 200

    assert run(folder, monkeypatch, ask, "--host", "0.0.0.0", "--max-batch-size", "1") == 0
    said = capsys.readouterr().err
    assert ("Everyone who can reach 0.0.0.0 can use this server" in said) == (not key)


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(capsys):
    with HttpServer(ServerSettings(port=0)) as server:
        assert main(["serve", "nowhere", "--port", str(server.port)]) == 2
    said = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1, port {server.port}: Address already in use" in said


def test_a_template_that_cannot_be_used_is_told_before_a_model_is_loaded(folder, tmp_path, capsys):
    file = tmp_path / "template.jinja"
    file.write_text("{% for %}")
    assert main(["serve", str(folder), "--port", "0", "--chat-template", str(file)]) == 2
    assert "template.jinja: its chat template is not valid Jinja" in capsys.readouterr().err


def settings(**options: object) -> ServerSettings:
    return ServerOptions(**options).settings("tiny", TemplateOptions())


def test_keys_have_no_space_around_them(monkeypatch, tmp_path):
    file = tmp_path / "keys"
    file.write_text("\ufefffirst\r\n\n  second \n", encoding="utf-8")
    monkeypatch.setenv("HOTLOOP_API_KEY", " third\n")
    assert set(settings(api_key_file=file).keys) == {"first", "second", "third"}
    monkeypatch.setenv("HOTLOOP_API_KEY", " \n")
    assert settings().keys == ()


def test_origins_are_taken_as_browsers_send_them():
    given = ("HTTP://LocalHost:3000/", "*", "chrome-extension://abc")
    assert settings(cors_origin=given).cors_origins == (
        "http://localhost:3000",
        "*",
        "chrome-extension://abc",
    )


@pytest.mark.parametrize("origin", ["localhost:3000", "http://a/page", "http://", ""])
def test_an_invalid_origin_is_refused(origin):
    with pytest.raises(ConfigError, match="--cors-origin must be"):
        settings(cors_origin=(origin,))
