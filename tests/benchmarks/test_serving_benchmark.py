"""``benchmarks/serving.py`` measures a server of its own on the wire; its tables say what came."""

import importlib.util
import json
import socket
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import wire
from waiting import HANG_S
from wire import Piece, WireError

ROOT = Path(__file__).parent.parent.parent


def script() -> ModuleType:
    """The script. By its path, since a module of the server's tests has its name."""
    spec = importlib.util.spec_from_file_location("serving_script", ROOT / "benchmarks/serving.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


benchmark = script()
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(ids: list[int]) -> bytes:
    event = b"data: " + json.dumps({"choices": [{"text": "", "token_ids": ids}]}).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(event), event)


DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def test_a_rehearsal_runs_every_part_and_writes_the_page(tmp_path, capfd):
    out, page = tmp_path / "tiny", tmp_path / "page.md"
    page.write_text("before\n<!-- tables of tiny: begin -->\n<!-- tables of tiny: end -->\nafter\n")
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--out", str(out), "--docs", str(page), "--rehearse", "--rounds", "2"])
    assert not ended.value.code, capfd.readouterr().err
    _, load, pause, alone, after = page.read_text().split("\n\n")
    assert after.split()[-1] == "after"
    assert [row.split(" | ")[2:4] for row in load.splitlines()[2:]] == [["1", "2"], ["3", "6"]]
    assert "one chunk of prefill" in pause
    assert "ratio in a round" in alone
    for part in benchmark.PARTS:
        header, *samples = map(json.loads, next(out.glob(f"{part}-*.jsonl")).open())
        assert header["job"]["part"] == part
        assert samples
        if part in ("load", "alone"):
            for sample in samples:
                assert len(sample["gaps_us"]) == 23, "a piece for each of 24 tokens"
        if part == "alone":
            assert all(len(sample["generate_gaps_us"]) == 23 for sample in samples)


def test_pieces_have_the_time_of_their_last_byte():
    bytes_ = HEAD + chunk([5]) + chunk([6, 7]) + DONE
    middle = len(HEAD + chunk([5])) + 9
    arrived = [(1.0, bytes_[:middle]), (2.0, bytes_[middle:])]
    answer = wire.streamed(0.5, arrived, 3)
    assert answer.pieces == (Piece(at_s=1.0, n_tokens=1), Piece(at_s=2.0, n_tokens=2))
    assert answer.token_ids == (5, 6, 7)
    assert (answer.ttft_s, answer.gaps_s, answer.tpot_s) == (0.5, (1.0,), 0.5)
    by_byte = [(float(i), bytes_[i : i + 1]) for i in range(len(bytes_))]
    assert wire.streamed(0, by_byte, 3).pieces[0].at_s == len(HEAD + chunk([5])) - 1


@pytest.mark.parametrize(
    ("bytes_", "problem"),
    [
        (b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nbusy", "429"),
        (HEAD + chunk([5]) + DONE, "1 tokens, not 3"),
        (HEAD + chunk([5, 6, 7]), "without"),
        (HEAD + b'16\r\ndata: {"error": "x"}\n\n\r\n', "ended with x"),
    ],
)  # fmt: skip
def test_what_is_no_whole_answer_is_an_error(bytes_, problem):
    with pytest.raises(WireError, match=problem):
        wire.streamed(0, [(0.0, bytes_)], 3)


@pytest.mark.parametrize(
    ("bytes_", "problem"),
    [
        (HEAD + chunk([5]) + chunk([6, 7]) + DONE, None),
        (b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nbusy", "429"),
        (HEAD + chunk([5]), "the connection ended"),
        (b"", "the connection ended"),
    ],
)
def test_a_lone_client_reads_to_the_end_or_tells_why_not(bytes_, problem):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(bytes_)

        server = threading.Thread(target=serve)
        server.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        connection = wire.BlockingConnection(url, HANG_S)
        if problem is None:
            assert connection.complete(url, [1, 2], 3).token_ids == (5, 6, 7)
        else:
            with pytest.raises(WireError, match=problem):
                connection.complete(url, [1, 2], 3)
        connection.close()
        server.join()


def test_total_speed_is_of_the_time_with_all_clients():
    first = {"sent_us": 0, "ttft_us": 10, "gaps_us": [10, 10], "tokens": 1}
    second = {"sent_us": 100, "ttft_us": 10, "gaps_us": [10], "tokens": [2, 2]}
    assert benchmark.tok_s([first, second]) == pytest.approx(3 / 100e-6)
    assert benchmark.tok_s([first]) == pytest.approx(3 / 30e-6)


def test_the_page_has_a_place_for_the_tables_that_the_makefile_makes():
    page = (ROOT / "docs/performance.md").read_text()
    assert all(f"<!-- tables of h200-serving: {mark} -->" in page for mark in ("begin", "end"))
    assert "serving.py --out benchmarks/results/$(GPU)-serving" in (ROOT / "Makefile").read_text()
