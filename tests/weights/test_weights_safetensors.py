import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from weights_files import entry, write_safetensors

from hotloop.errors import CheckpointError, HotloopError, UnsupportedError
from hotloop.weights.checkpoint import check_finite, open_checkpoint
from hotloop.weights.identity import identify_checkpoint
from hotloop.weights.safetensors import DTYPES
from hotloop.weights.tensor_file import TensorFile

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path / "model"


def save_shards(folder: Path, *shards: dict[str, torch.Tensor], **weight_map: str) -> None:
    """Shards a.safetensors and b.safetensors with their index, to which entries are added."""
    true_map = {}
    for letter, tensors in zip("ab", shards, strict=False):
        save_file(tensors, folder / f"{letter}.safetensors")
        true_map |= dict.fromkeys(tensors, f"{letter}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": true_map | weight_map}))


def refusal(folder: Path, kind: type[HotloopError] = CheckpointError) -> Any:
    with pytest.raises(kind) as caught:
        open_checkpoint(folder)
    return caught.value


def test_every_element_type_is_read_as_it_is_stored(folder):
    torch.manual_seed(0)
    tensors = {
        name: torch.randint(0, 2, (3, 8)).to(dtype)
        if not dtype.is_floating_point
        else torch.randn(3, 8).to(dtype)
        for name, dtype in DTYPES.items()
    }
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.empty(0, 4)
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        info, read = checkpoint.tensors[name], checkpoint.read(name)
        assert info.shape == tuple(tensor.shape)
        assert info.file == folder / "model.safetensors"
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape
        assert bytes(read.reshape(-1).view(torch.uint8)) == bytes(
            tensor.reshape(-1).view(torch.uint8)
        )
    assert checkpoint.tensors["BF16"].dtype == "BF16"


@pytest.mark.parametrize(
    "index",
    [
        (slice(2, 5),),
        (slice(0, 7), slice(3, 9)),
        (slice(None), slice(8, None)),
        (slice(3, 3),),
        (slice(5, 2), slice(0, 1)),
        (slice(-2, None), slice(-3, -1), slice(1, 2)),
    ],
)
def test_a_slice_is_what_slicing_the_whole_gives(folder, index, monkeypatch):
    # Chunks of two rows, so that a slice spans several.
    monkeypatch.setattr("hotloop.weights.tensor_file.CHUNK_BYTES", 2 * 12 * 3 * 2)
    tensor = torch.randn(7, 12, 3).bfloat16()
    save_file({"before": torch.ones(5), "t": tensor}, folder / "model.safetensors")
    torch.testing.assert_close(open_checkpoint(folder).read("t", index), tensor[index])


def test_row_slices_read_no_other_bytes(folder, monkeypatch):
    save_file({"t": torch.arange(32.0).view(8, 4)}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    asked = []
    read = TensorFile.read
    monkeypatch.setattr(
        "hotloop.weights.tensor_file.TensorFile.read",
        lambda file, at, n, **options: asked.append(n) or read(file, at, n, **options),
    )
    checkpoint.read("t", (slice(2, 4),))
    assert asked == [2 * 4 * 4]


def test_shards_are_read_as_one_and_a_file_stands_for_its_folder(folder):
    save_shards(folder, {"x": torch.ones(2)}, {"y": torch.zeros(3), "z": torch.full((1,), 2.0)})
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    for path in (folder, folder / "b.safetensors"):
        checkpoint = open_checkpoint(path)
        assert checkpoint.path == folder
        assert {n: i.file.name for n, i in checkpoint.tensors.items()} == {
            "x": "a.safetensors",
            "y": "b.safetensors",
            "z": "b.safetensors",
        }
        assert checkpoint.read("z").tolist() == [2.0]
        checkpoint.close()


def test_reading_end_to_end_holds_one_tensor_at_a_time(folder):
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        pytest.skip("resident memory is watched through /proc, which only Linux has")

    def kib(field: str) -> int:
        line = next(text for text in status.read_text().splitlines() if text.startswith(field))
        return int(line.split()[1])

    tensor_kib, count = 16 * 1024, 12
    save_file(
        {f"t{i}": torch.full((tensor_kib * 512,), i, dtype=torch.bfloat16) for i in range(count)},
        folder / "model.safetensors",
    )
    checkpoint = open_checkpoint(folder)
    clear.write_text("5")  # the peak begins anew
    before = kib("VmRSS")
    for name in checkpoint.tensors:
        check_finite(checkpoint.read(name), checkpoint.tensors[name])
    # One or two of the twelve, and what the allocator keeps of the one before.
    assert kib("VmHWM") - before < 4 * tensor_kib


# What a header can say that is not so.


@pytest.mark.parametrize(
    ("header", "data", "tensor", "says"),
    [
        ({"t": entry("F32", [2], 0, 8)}, b"1234", "t", "truncated"),
        ({"t": entry("F32", [3], 0, 8)}, b"12345678", "t", "needs 12"),
        ({"t": entry("F32", [2], 8, 0)}, b"12345678", "t", "needs 8"),
        ({"t": entry("F32", [-1, -2], 0, 8)}, b"12345678", "t", "shape"),
        ({"t": {"dtype": "F32", "shape": [2]}}, b"12345678", "t", "malformed"),
        ({"t": 3}, b"", "t", "malformed"),
        ({"a": entry("U8", [4], 0, 4), "t": entry("U8", [4], 2, 6)}, b"123456", "t", "overlaps"),
        ({"a": entry("U8", [2], 0, 2), "t": entry("U8", [2], 4, 6)}, b"123456", "t", "gap"),
        ({"t": entry("U8", [2], 0, 2)}, b"123", None, "1 bytes follow"),
    ],
)
def test_a_damaged_header_is_refused_naming_file_and_tensor(folder, header, data, tensor, says):
    write_safetensors(folder / "model.safetensors", header, data)
    error = refusal(folder)
    assert error.file == folder / "model.safetensors"
    assert error.tensor == tensor
    assert says in str(error)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "truncated"),
        (b"\x10\0\0\0\0\0\0\0{}", "truncated"),
        (b"\xff" * 16, "damaged"),
        (b"\x02\0\0\0\0\0\0\0[]", "not a JSON object"),
        (b"\x03\0\0\0\0\0\0\0{x}", "not valid JSON"),
        (b"\x0f\0\0\0\0\0\0\0" + b'{"t":1,"t":  2}', "'t' appears twice"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(folder, content, says):
    (folder / "model.safetensors").write_bytes(content)
    assert says in str(refusal(folder))


def test_an_element_type_that_is_not_known_is_refused_by_name(folder):
    write_safetensors(folder / "model.safetensors", {"t": entry("F4", [2], 0, 1)}, b"1")
    with pytest.raises(UnsupportedError, match=r"tensor 't'.*F4"):
        open_checkpoint(folder)


def test_a_file_that_shrinks_after_opening_is_refused(folder):
    save_file({"t": torch.ones(100)}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(200)
    with pytest.raises(CheckpointError, match="shorter"):
        checkpoint.read("t")


# What an index can say that is not so.


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "b/../../a.safetensors"])
def test_an_index_cannot_lead_out_of_the_folder(folder, name):
    save_file({"t": torch.ones(1)}, folder.parent / "a.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"t": name}}))
    error = refusal(folder)
    assert error.tensor == "t"
    assert f"puts it in {name!r}, which is not the name of a *.safetensors file" in str(error)


@pytest.mark.parametrize("name", ["sub/z.safetensors", "z.weights"])
def test_an_index_cannot_name_a_file_that_the_hash_of_the_checkpoint_leaves_out(folder, name):
    save_shards(folder, {"x": torch.ones(2)}, z=name)
    before = identify_checkpoint(folder)
    (folder / "sub").mkdir()
    save_file({"z": torch.ones(1)}, folder / name)
    assert identify_checkpoint(folder) == before
    assert f"{INDEX}, tensor 'z': puts it in {name!r}" in str(refusal(folder))


def test_links_of_the_hugging_face_cache_are_followed(tmp_path, folder):
    save_shards(folder, {"x": torch.ones(2)}, {"y": torch.zeros(3)})
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    shutil.copytree(folder, blobs)
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    assert open_checkpoint(snapshot).tensors.keys() == {"x", "y"}


def test_shards_that_are_links_are_followed_wherever_they_lead(tmp_path, folder):
    save_shards(folder, {"x": torch.ones(2)}, {"y": torch.zeros(3)})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for shard in list(folder.glob("*.safetensors")):
        shard.rename(elsewhere / shard.name)
        shard.symlink_to(elsewhere / shard.name)
    assert open_checkpoint(folder).tensors.keys() == {"x", "y"}


def test_an_index_may_list_a_tied_head_that_is_not_stored(folder):
    save_shards(folder, {"x": torch.ones(2)}, **{"lm_head.weight": "a.safetensors"})
    assert refusal(folder).tensor == "lm_head.weight"
    (folder / "config.json").write_text('{"tie_word_embeddings": true}')
    assert open_checkpoint(folder).tensors.keys() == {"x"}


def test_a_shard_that_is_missing_is_refused(folder):
    save_shards(folder, {"x": torch.ones(2)}, y="gone.safetensors")
    error = refusal(folder)
    assert error.tensor == "y"
    assert "'gone.safetensors', which is missing" in str(error)


def test_a_tensor_that_its_shard_lacks_is_refused(folder):
    save_shards(folder, {"x": torch.ones(2)}, y="a.safetensors")
    error = refusal(folder)
    assert (error.file.name, error.tensor) == ("a.safetensors", "y")


def test_a_tensor_in_two_shards_is_refused(folder):
    x = torch.ones(2)
    save_shards(folder, {"w": torch.ones(1), "x": x}, {"x": x, "y": torch.ones(1)})
    error = refusal(folder)
    assert (error.file.name, error.tensor) == ("a.safetensors", "x")


@pytest.mark.parametrize("text", ['{"weight_map": {}}', "{}", '{"weight_map": [1]}'])
def test_an_index_without_a_map_is_refused(folder, text):
    (folder / INDEX).write_text(text)
    assert "weight_map" in str(refusal(folder))


# Folders.


def test_pickles_are_never_loaded_and_the_refusal_says_how_to_convert(folder):
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedError, match=r"never loaded.*save_pretrained"):
        open_checkpoint(folder)
    with pytest.raises(UnsupportedError, match="never loaded"):
        open_checkpoint(folder / "pytorch_model.bin")


def test_folders_without_what_a_model_needs_are_refused(folder):
    assert "neither model.safetensors" in str(refusal(folder))
    (folder / "b.gguf").write_bytes(b"")
    assert "give the path of one: b.gguf" in str(refusal(folder))
    save_file({"t": torch.ones(1)}, folder / "x.safetensors")
    assert open_checkpoint(folder).tensors.keys() == {"t"}
    save_file({"t": torch.ones(1)}, folder / "y.safetensors")
    assert "x.safetensors, y.safetensors but no model.safetensors.index.json" in str(
        refusal(folder)
    )
    (folder / "config.json").write_text("{")
    assert "config.json: is not valid JSON" in str(refusal(folder))
    (folder / "config.json").unlink()
    assert "give the path of one: b.gguf" in str(refusal(folder))
    (folder / "b.gguf").unlink()
    assert "config.json: is missing" in str(refusal(folder))
    assert "no such file or folder" in str(refusal(folder / "nowhere"))


def test_what_is_there_in_place_of_a_model_is_named(folder):
    weights = folder / "consolidated.safetensors"
    (folder / "config.json").unlink()
    (folder / "params.json").write_text("{}")
    save_file({"t": torch.ones(1)}, weights)
    assert "their makers' own layout (params.json" in str(refusal(folder, UnsupportedError))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    (folder / "config.json").write_text("{}")
    for name in ("consolidated.safetensors", "m.gguf"):
        (folder / name).write_bytes(pointer)
        path = folder / name if name.endswith("gguf") else folder
        assert f"{name}: is a git-lfs pointer" in str(refusal(path))


# Values.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_with_their_place(folder, dtype, bad):
    tensor = torch.randn(4, 5, dtype=dtype)
    save_file({"t": tensor}, folder / "model.safetensors")
    info = open_checkpoint(folder).tensors["t"]
    check_finite(tensor, info)
    tensor[2, 3] = bad
    with pytest.raises(CheckpointError, match=r"1 of 20 elements .* first at \[2, 3\]") as caught:
        check_finite(tensor, info)
    assert (caught.value.file, caught.value.tensor) == (folder / "model.safetensors", "t")


def test_finiteness_of_eight_bit_and_integer_types_is_decided_too(folder):
    save_file({"t": torch.ones(1)}, folder / "model.safetensors")
    info = open_checkpoint(folder).tensors["t"]
    check_finite(torch.full((3,), 7), info)
    check_finite(torch.empty(0), info)
    eight = torch.tensor([1.0, 448.0]).to(torch.float8_e4m3fn)
    check_finite(eight, info)
    with pytest.raises(CheckpointError):
        check_finite(torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn), info)


def test_of_a_folder_of_ggufs_only_files_are_offered(folder):
    (folder / "model.gguf").write_bytes(b"")
    os.mkfifo(folder / "pipe.gguf")
    (folder / "folder.gguf").mkdir()
    assert str(refusal(folder)).endswith("give the path of one: model.gguf")
