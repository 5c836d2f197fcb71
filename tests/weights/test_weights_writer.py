import json

import pytest
import torch
from safetensors.torch import load_file

from hotloop.errors import ConfigError
from hotloop.weights import writer as writer_module
from hotloop.weights.checkpoint import open_checkpoint
from hotloop.weights.safetensors import DTYPES
from hotloop.weights.writer import SafetensorsWriter


def write(folder, tensors, **options):
    with SafetensorsWriter(folder, **options) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        (writer.staging / "config.json").write_text("{}")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    def as_bytes(tensor):
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(as_bytes(a), as_bytes(b))


def test_every_element_type_survives_and_the_safetensors_package_agrees(tmp_path):
    torch.manual_seed(0)
    tensors = {name: torch.randint(0, 2, (3, 5)).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "transposed": torch.randn(4, 6).T,
        "trained": torch.nn.Parameter(torch.randn(3)),
        'a "quoted" näme': torch.ones(1),
    }
    write(tmp_path / "out", tensors)
    theirs, ours = (
        load_file(tmp_path / "out" / "model.safetensors"),
        open_checkpoint(tmp_path / "out"),
    )
    assert theirs.keys() == ours.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same(theirs[name], tensor)
        assert same(ours.read(name), tensor)


def test_shards_are_cut_at_the_limit_and_indexed(tmp_path):
    tensors = {
        f"t{i}": torch.full((size,), i, dtype=torch.uint8)
        for i, size in enumerate((60, 40, 10, 150, 30))
    }
    write(tmp_path / "out", tensors, max_shard_bytes=100)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 290}
    assert index["weight_map"] == {
        name: f"model-0000{shard}-of-00004.safetensors"
        for name, shard in zip(tensors, (1, 1, 2, 3, 4), strict=True)
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors.index.json",
        *index["weight_map"].values(),
    }
    checkpoint = open_checkpoint(tmp_path / "out")
    assert all(same(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_a_header_that_is_full_begins_the_next_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "HEADER_BYTES", 1024)
    tensors = {f"{'n' * 60}{i}": torch.ones(1) for i in range(40)}
    write(tmp_path / "out", tensors)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert open_checkpoint(tmp_path / "out").tensors.keys() == tensors.keys()


def test_nothing_has_the_name_before_everything_is_there(tmp_path):
    with SafetensorsWriter(tmp_path / "out", max_shard_bytes=4) as writer:
        writer.add("a", torch.ones(1))
        writer.add("b", torch.ones(1))
        assert not (tmp_path / "out").exists()
        assert not list(writer.staging.glob("*.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_nothing(tmp_path, interruption):
    def interrupted():
        with SafetensorsWriter(tmp_path / "out", max_shard_bytes=4) as writer:
            writer.add("a", torch.ones(1))
            writer.add("b", torch.ones(1))
            raise interruption

    with pytest.raises(interruption):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_only_an_empty_folder_is_written_to(tmp_path):
    write(tmp_path, {"a": torch.ones(1)})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="not an empty folder"):
        SafetensorsWriter(tmp_path)
    with pytest.raises(ConfigError, match="not an empty folder"):
        SafetensorsWriter(tmp_path / "config.json")
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_folder_filled_in_the_meantime_is_left_alone(tmp_path):
    out = tmp_path / "out"

    def overtaken():
        with SafetensorsWriter(out) as writer:
            writer.add("a", torch.ones(1))
            out.mkdir()
            (out / "other").write_text("mine")

    with pytest.raises(ConfigError, match="not an empty folder"):
        overtaken()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "other"]
