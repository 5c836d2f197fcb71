"""A checkpoint in several files is under ``--quant auto`` what it is in one."""

import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from stored_models import distribution, write_stored
from test_awq_gptq import AWQ, GPTQ, awq, gptq
from test_compressed_tensors import FORMATS, compressed, description, scheme_of
from test_fp8_bitsandbytes import FP8, blocks
from weights_files import write_gguf
from whole_models import (
    assert_same_weights,
    gguf_keys,
    load,
    write_folder,
    write_gguf_model,
)

from hotloop.weights.identity import hash_checkpoint
from hotloop.weights.packed_cache import _content_hash
from hotloop.weights.writer import SafetensorsWriter

PACKED = scheme_of("pack-quantized", **FORMATS["int4 in groups, asymmetric"][1])
ENCODINGS = {
    "awq": (awq(32), AWQ),
    "gptq, act-order": (gptq(32, act_order=True), GPTQ | {"desc_act": True}),
    "pack-quantized": (compressed(PACKED), description(PACKED, format_="pack-quantized")),
    "fp8 in blocks": (blocks(), FP8),
}


def split_gguf(whole: Path, n_parts: int) -> list[Path]:
    """Writes the tensors of a file as parts, as ``llama-gguf-split`` does."""
    reader = GGUFReader(whole)
    parts = [whole.with_name(f"split-{i:05d}-of-{n_parts:05d}.gguf") for i in range(1, n_parts + 1)]
    tensors = [(t.name, (t.data.copy(), t.tensor_type.name)) for t in reader.tensors]
    general = {
        key: field.contents()
        for key, field in reader.fields.items()
        if key.startswith("tokenizer.") or key == "general.sampling.temp"
    }
    for i, path in enumerate(parts):
        write_gguf(
            path,
            dict(tensors[i::n_parts]),
            keys=gguf_keys(),
            general=general if i == 0 else None,
            split=(i, n_parts, len(tensors)),
        )
    return parts


def split_safetensors(folder: Path, into: Path) -> Path:
    """Spreads tensors over many files, so that those of one matrix are in several."""
    config = json.loads((folder / "config.json").read_text())
    with SafetensorsWriter(into, max_shard_bytes=4000) as writer:
        tensors = load_file(folder / "model.safetensors")
        for name in sorted(tensors, key=lambda name: name.rpartition(".")[::-1]):
            writer.add(name, tensors[name])
        (writer.staging / "config.json").write_text(json.dumps(config))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (writer.staging / name).write_bytes((folder / name).read_bytes())
    return into


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_1", "Q8_0"])
def test_gguf(kind, tied, tmp_path):
    whole = write_gguf_model(tmp_path / "m.gguf", kind, tied=tied, kinds={"attn_v": "Q8_0"})
    parts = split_gguf(whole, 3)
    expected = load(whole, quant="auto")
    for path in parts:
        assert_same_weights(load(path, quant="auto"), expected)
    torch.testing.assert_close(distribution(parts[1]), distribution(whole), rtol=0, atol=0)


def test_parts_that_are_links_are_all_part_of_the_content(tmp_path, monkeypatch):
    monkeypatch.setattr("hotloop.weights.packed_cache.writable_cache_dir", lambda: tmp_path)
    parts = split_gguf(write_gguf_model(tmp_path / "m.gguf", "Q8_0", tied=True), 2)
    (tmp_path / "blobs").mkdir()
    for i, path in enumerate(parts):  # as the hub's cache has them
        path.rename(tmp_path / "blobs" / str(i))
        path.symlink_to(tmp_path / "blobs" / str(i))
    before = _content_hash(parts[0])
    assert before == hash_checkpoint(parts[0])
    with (tmp_path / "blobs" / "1").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert _content_hash(parts[0]) != before


@pytest.mark.parametrize("name", ENCODINGS)
def test_safetensors(name, tmp_path):
    single, _ = write_stored(tmp_path, *ENCODINGS[name])
    split = split_safetensors(single, tmp_path / "split")
    index = json.loads((split / "model.safetensors.index.json").read_text())["weight_map"]
    of_a_matrix = {file for tensor, file in index.items() if ".0.mlp.gate_proj." in tensor}
    assert len(of_a_matrix) > 1, "the tensors of a matrix are in several files"
    assert_same_weights(load(split, quant="auto"), load(single, quant="auto"))
    torch.testing.assert_close(distribution(split), distribution(single), rtol=0, atol=0)


def test_safetensors_that_are_not_quantized(tmp_path):
    single = write_folder(tmp_path / "m", dtype=torch.bfloat16)
    split = split_safetensors(single, tmp_path / "split")
    assert len(list(split.glob("*.safetensors"))) > 10
    assert_same_weights(load(split, quant="auto"), load(single, quant="auto"))
