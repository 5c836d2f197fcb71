"""Reading ahead keeps the order, its bound, and raises what went wrong where it was asked for."""

import threading
from typing import Any

import pytest
import torch
from waiting import wait_until
from whole_models import assert_same_weights, load, write_folder

from hotloop.weights.read_ahead import ReadAhead
from hotloop.weights.safetensors import SafetensorsCheckpoint


def test_results_come_in_order():
    ahead = ReadAhead([lambda i=i: i for i in range(100)], lambda _: 1, 3)
    assert [ahead.next() for _ in range(100)] == list(range(100))
    ahead.close()


def test_no_more_bytes_wait_than_the_limit_and_a_large_result_waits_alone():
    begun: list[int] = []
    sizes = [4, 4, 4, 100, 4]

    def job(i: int) -> int:
        begun.append(i)
        return i

    ahead = ReadAhead([lambda i=i: job(i) for i in range(5)], lambda i: sizes[i], 8)
    wait_until(ahead._is_full, "read ahead")
    assert (begun, ahead._waiting_bytes) == ([0, 1, 2], 8), "one more is read, and waits for room"
    assert [ahead.next() for _ in range(3)] == [0, 1, 2]
    wait_until(ahead._is_full, "read ahead")
    assert ahead._waiting_bytes == 100
    assert [ahead.next(), ahead.next()] == [3, 4]
    ahead.close()


def test_an_error_is_raised_at_its_place():
    def fail() -> int:
        raise ValueError("the file became shorter")

    ahead = ReadAhead([lambda: 1, fail, lambda: 3], lambda _: 1, 8)
    assert ahead.next() == 1
    with pytest.raises(ValueError, match="became shorter"):
        ahead.next()
    ahead.close()


def test_closing_ends_the_thread_that_waits_for_room():
    ahead = ReadAhead([lambda: 1] * 100, lambda _: 1, 2)
    wait_until(ahead._is_full, "read ahead")
    ahead.close()
    assert not ahead._thread.is_alive()


def test_matrices_are_read_in_another_thread_and_none_is_left(tmp_path, monkeypatch):
    folder, readers = write_folder(tmp_path / "m", tie_word_embeddings=False), {}
    expected = load(folder, quant="int8")
    read = SafetensorsCheckpoint.read

    def seen(self: SafetensorsCheckpoint, name: str, *args: Any, **options: Any) -> torch.Tensor:
        readers.setdefault(name, set()).add(threading.current_thread().name)
        return read(self, name, *args, **options)

    monkeypatch.setattr(SafetensorsCheckpoint, "read", seen)
    assert_same_weights(load(folder, quant="int8"), expected)
    of_matrices = {name: by for name, by in readers.items() if "norm" not in name}
    assert len(of_matrices) == 2 + 2 * 7, "an embedding, a head, and seven of each layer"
    assert set().union(*of_matrices.values()) == {"read-ahead"}
    assert "read-ahead" not in {thread.name for thread in threading.enumerate()}
