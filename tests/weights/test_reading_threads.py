"""Several threads read parts of a tensor: the same bytes, every error, and no thread is left."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from stored_models import write_stored
from test_awq_gptq import AWQ, awq
from whole_models import assert_same_weights, load, write_folder, write_gguf_model

from hotloop.errors import CheckpointError
from hotloop.weights import tensor_file
from hotloop.weights.checkpoint import open_checkpoint
from hotloop.weights.tensor_file import N_THREADS, TensorFile, reading_threads


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Has several threads read what is tiny, and returns the names of those that did."""
    monkeypatch.setattr(tensor_file, "PART_BYTES", 16)
    monkeypatch.setattr(tensor_file, "MIN_SKIPPED_BYTES", 8)
    names, read = set(), TensorFile._read_into

    def seen(file: TensorFile, rest: memoryview, offset: int) -> None:
        names.add(threading.current_thread().name)
        read(file, rest, offset)

    monkeypatch.setattr(TensorFile, "_read_into", seen)
    return names


@pytest.fixture(autouse=True)
def _none_is_left() -> Iterator[None]:
    yield
    left = [t.name for t in threading.enumerate() if t.name.startswith("read-")]
    assert not left, "a thread that reads outlives its checkpoint"


@pytest.mark.parametrize("n_bytes", [0, 1, 31, 32, 33, 1000, 4096])
def test_parts_are_the_whole(n_bytes, tmp_path, readers):
    data = torch.randint(0, 256, (n_bytes + 7,), dtype=torch.uint8)
    (tmp_path / "file").write_bytes(data.numpy().tobytes())
    with reading_threads() as threads:
        file = TensorFile(tmp_path / "file", threads)
        assert torch.equal(file.read(5, n_bytes), data[5 : 5 + n_bytes])
        into = torch.zeros(n_bytes, dtype=torch.uint8)
        file.read_into(into, 2)
        assert torch.equal(into, data[2 : 2 + n_bytes])
        file.close()
    assert len(readers) <= N_THREADS
    several = any(name.startswith("read-part") for name in readers)
    assert several == (n_bytes >= 32), "what is less than two parts is read by the caller"


@pytest.mark.parametrize("columns", [slice(0, 64), slice(16, 48), slice(7, 8)])
def test_slices_of_rows_and_columns_are_those_of_the_tensor(columns, tmp_path, readers):
    tensor = torch.randn(50, 64)
    save_file({"t": tensor}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    for rows in (slice(0, 50), slice(3, 41), slice(9, 10)):
        assert torch.equal(checkpoint.read("t", (rows, columns)), tensor[rows, columns])
    checkpoint.close()
    assert any(name.startswith("read-part") for name in readers)


@pytest.mark.parametrize("stored", ["plain", "awq", "Q4_K", "BF16"])
def test_a_model_that_several_threads_read_is_the_same(stored, tmp_path, readers, monkeypatch):
    if stored == "plain":
        path, quant = write_folder(tmp_path / "m"), "int8"
    elif stored == "awq":
        path, quant = write_stored(tmp_path, awq(32), AWQ)[0], "auto"
    else:
        keys = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
        path, quant = write_gguf_model(tmp_path / "m.gguf", stored, tied=False, **keys), "auto"
    ours = load(path, quant=quant)
    assert any(name.startswith("read-part") for name in readers)
    monkeypatch.setattr(tensor_file, "PART_BYTES", 2**40)
    readers.clear()
    assert_same_weights(ours, load(path, quant=quant))
    assert not any(name.startswith("read-part") for name in readers)


@pytest.mark.parametrize("kept", [0, 500, 990])
def test_a_file_that_shrinks_is_an_error_whichever_thread_notices(kept, tmp_path, readers):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    with reading_threads() as threads:
        file = TensorFile(path, threads)
        with path.open("r+b") as shrinking:
            shrinking.truncate(kept)
        with pytest.raises(CheckpointError, match="became shorter while it was read"):
            file.read(0, 1000)
        file.close()
    assert readers


def test_an_error_while_loading_ends_the_threads(tmp_path, readers):
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan

    with pytest.raises(CheckpointError, match="NaN"):
        load(write_folder(tmp_path / "m", damage))
    assert any(name.startswith("read-part") for name in readers)


def test_an_interrupt_while_loading_ends_the_threads(tmp_path, readers):
    def interrupt(done: int, of: int) -> None:
        assert done < of
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(write_folder(tmp_path / "m"), on_layer=interrupt)
    assert any(name.startswith("read-part") for name in readers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("stored", ["plain", "Q4_K", "BF16"])
def test_what_is_read_for_a_gpu_is_in_pinned_memory(stored: str, tmp_path: Path, readers):
    if stored == "plain":
        path = write_folder(tmp_path / "m")
    else:
        keys = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
        path = write_gguf_model(tmp_path / "m.gguf", stored, tied=False, **keys)
    checkpoint = open_checkpoint(path)
    for part in ("self_attn.q_proj", "mlp.down_proj"):
        name = f"model.layers.0.{part}.weight"
        for index in ((), (slice(0, 64), slice(0, 256))):
            pinned = checkpoint.read(name, index, encoded=True, pinned=True)
            assert pinned.is_pinned()
            assert torch.equal(pinned, checkpoint.read(name, index, encoded=True))
    checkpoint.close()
    assert readers
