"""``hotloop serve`` as a process: what it does on SIGTERM, and when one of its ranks is killed."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from raw import connected, read_all, request
from serving import events
from waiting import HANG_S, alive, wait_until

BODY = {"prompt": [5, 6, 7], "max_tokens": 200, "temperature": 0, "ignore_eos": True}
STREAM = BODY | {"stream": True, "return_token_ids": True}
POST = "POST", "/v1/completions"


class Command:
    """A running command and where it serves."""

    def __init__(self, process: subprocess.Popen[bytes], said: Path) -> None:
        self.process, self._said = process, said

    @property
    def url(self) -> str:
        """Its URL, once it has said it."""
        found: list[str] = []

        def is_said() -> bool:
            assert self.process.poll() is None, self._said.read_text()
            found[:] = re.findall(r"(http://127\.0\.0\.1:\d+)/v1 ", self._said.read_text())
            return bool(found)

        wait_until(is_said, "it serves")
        return found[0]

    @property
    def said(self) -> str:
        """Returns its output so far."""
        return self._said.read_text()

    def children(self) -> list[psutil.Process]:
        """The processes that it has started, and theirs."""
        return psutil.Process(self.process.pid).children(recursive=True)


@contextmanager
def served(folder: Path, said: Path, *options: str) -> Iterator[Command]:
    """Runs the command; in the end it has ended, with all its processes."""
    arguments = [str(folder), "--port", "0", "--dtype", "float32", *options]
    command = [sys.executable, "-m", "hotloop", "serve", *arguments]
    with said.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file)
    running = Command(process, said)
    try:
        yield running
    finally:
        process.kill()
        process.wait()


def ids_of(answer: Any) -> list[int]:
    *chunks, done = events(answer)
    assert done == "[DONE]"
    return [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", ())]


@pytest.mark.slow
def test_sigterm_under_load_lets_every_request_end_and_takes_no_more(folder, tmp_path):
    with served(folder, tmp_path / "said", "--max-batch-size", "3", "--drain-s", "900") as command:
        url = command.url
        children = command.children()
        with httpx2.Client(base_url=url, timeout=HANG_S) as client, ThreadPoolExecutor(8) as pool:
            expected = ids_of(client.post("/v1/completions", json=STREAM))
            assert len(expected) == 200
            opened = [
                client.send(
                    client.build_request("POST", "/v1/completions", json=STREAM), stream=True
                )
                for _ in range(8)
            ]  # each has its headers: 3 run, 5 wait
            command.process.send_signal(signal.SIGTERM)
            list(pool.map(lambda response: response.read(), opened))
        assert [ids_of(response) for response in opened] == [expected] * 8
        assert command.process.wait(HANG_S) == 0
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{url}/health", timeout=HANG_S)
        wait_until(lambda: not any(alive(child.pid) for child in children), "all have ended")


@pytest.mark.slow
@pytest.mark.parametrize("step", ["starting", "loading layers", "warming up", "preparing for"])
def test_sigterm_while_it_is_loaded_ends_it_and_its_ranks_with_0(folder, tmp_path, step):
    with served(folder, tmp_path / "said", "--tp", "2") as command:
        wait_until(lambda: step in command.said, f"it is {step}")
        children = command.children()
        command.process.send_signal(signal.SIGTERM)
        assert command.process.wait(HANG_S) == 0, command.said
        assert "Traceback" not in command.said
        wait_until(lambda: not any(alive(child.pid) for child in children), "all have ended")


@pytest.mark.slow
def test_a_killed_rank_ends_every_stream_with_its_error_and_the_server(folder, tmp_path):
    with served(folder, tmp_path / "said", "--tp", "2", "--max-batch-size", "2") as command:
        url = command.url
        children = command.children()
        rank = [each for each in children if "hotloop.parallel.program" in each.cmdline()][-1]
        with connected(url) as one, connected(url) as two:
            rank.send_signal(signal.SIGSTOP)  # so that no answer ends before
            for connection in (one, two):
                connection.sendall(request(STREAM, fields="Connection: close\r\n"))
                assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
            rank.kill()
            for connection in (one, two):
                told = read_all(connection)
                assert b"was killed by SIGKILL" in told
                assert b"[DONE]" not in told
        assert command.process.wait(HANG_S) == 1
        assert "was killed by SIGKILL" in command.said
        wait_until(lambda: not any(alive(child.pid) for child in children), "all have ended")
