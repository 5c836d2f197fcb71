"""The identity of a checkpoint, found without reading it whole."""

import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from hotloop.weights import identity
from hotloop.weights.identity import identify_checkpoint, sample_checkpoint


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    save_file({"w": torch.zeros(4_000_000)}, made / "model.safetensors")  # 16 MB
    return made


def poke(file, place):
    """Changes one byte in place; the time of change stays."""
    before = file.stat()
    with open(file, "r+b") as opened:
        opened.seek(place)
        opened.write(b"\x7f")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_byte_written_anywhere_changes_the_identity_by_its_time(folder):
    before = identify_checkpoint(folder)
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(9_999_999)
        file.write(b"\x7f")
    os.utime(folder / "model.safetensors", ns=(1, 2))
    assert identify_checkpoint(folder) != before


def test_a_header_or_a_size_or_a_configuration_changes_the_identity_at_any_time(folder):
    seen = {identify_checkpoint(folder)}
    poke(folder / "model.safetensors", 100)
    seen.add(identify_checkpoint(folder))
    (folder / "config.json").write_text('{"a": 1}')
    seen.add(identify_checkpoint(folder))
    assert len(seen) == 3


def test_a_copy_has_the_same_sample_and_another_model_of_its_shape_has_not(folder, tmp_path):
    copy, other = tmp_path / "copy", tmp_path / "other"
    shutil.copytree(folder, copy)
    os.utime(copy / "model.safetensors", ns=(1, 2))
    assert sample_checkpoint(copy) == sample_checkpoint(folder)
    shutil.copytree(folder, other)
    save_file({"w": torch.full((4_000_000,), 1e-3)}, other / "model.safetensors")
    assert sample_checkpoint(other) != sample_checkpoint(folder)


@pytest.mark.parametrize("of", [identify_checkpoint, sample_checkpoint])
def test_no_more_of_a_large_file_is_read_than_samples(tmp_path, monkeypatch, of):
    file = tmp_path / "model.gguf"
    with open(file, "wb") as made:
        made.truncate(2**40)  # a terabyte of holes
    read = 0
    opened = identity.open_file

    class Counts:
        def __init__(self, path):
            self._file = opened(path)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

        def seek(self, place):
            return self._file.seek(place)

        def read(self, n):
            nonlocal read
            data = self._file.read(n)
            read += len(data)
            return data

    monkeypatch.setattr(identity, "open_file", Counts)
    monkeypatch.setattr(identity, "model_parts", lambda path: [path])
    assert len(of(file)) == 64
    assert read < 16 * 2**20


def test_a_file_of_the_hubs_cache_is_known_by_its_etag_wherever_it_is_linked(tmp_path):
    def snapshot(name, etag):
        blobs, made = tmp_path / name / "blobs", tmp_path / name / "snapshots/1"
        blobs.mkdir(parents=True)
        made.mkdir(parents=True)
        (made / "config.json").write_text("{}")
        save_file({"w": torch.zeros(8)}, blobs / etag)
        os.utime(blobs / etag, ns=(1, len(name)))
        (made / "model.safetensors").symlink_to(blobs / etag)
        return identify_checkpoint(made)

    assert snapshot("a", "0" * 64) == snapshot("moved", "0" * 64) != snapshot("b", "1" * 64)
