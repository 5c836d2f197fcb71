"""Packed weights of every kernel layout are restored from an entry of the cache."""

import shutil

import pytest
from every_encoding import ENCODINGS
from whole_models import CONFIG, CPU, assert_same_weights, load, write_folder, write_gguf_model

from hotloop.kernels.attention import torch_attention
from hotloop.models.decoder import Decoder
from hotloop.models.families import read_config
from hotloop.models.linear import Linear
from hotloop.weights.packed_cache import load_packed, store_packed

SIZES = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("hotloop.weights.packed_cache.cache_dir", lambda: tmp_path)
    monkeypatch.setattr("hotloop.weights.packed_cache.writable_cache_dir", lambda: tmp_path)
    return tmp_path


def assert_restored(whole: Decoder, **keys: object) -> None:
    empty = Decoder(
        read_config(CONFIG | keys),
        n_positions=8,
        attention=torch_attention,
        device=CPU,
        n_head_rows=whole.head.n,
    )
    assert store_packed("key", whole, dict(empty.named_buffers())) is None
    assert load_packed("key", empty, CPU)
    assert_same_weights(empty, whole)
    linears = {name: m for name, m in whole.named_modules() if isinstance(m, Linear)}
    for name, ours in empty.named_modules():
        if isinstance(ours, Linear):
            assert ours.layout == linears[name].layout
            assert ours.kernel.name == linears[name].kernel.name
            assert ours.notes == linears[name].notes


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("quant", ["none", "int8", "fp8", "int4-g32", "int4-g32-asym"])
def test_schemes(quant, fused, tmp_path):
    assert_restored(load(write_folder(tmp_path / "m"), quant=quant, fused=fused))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings(encoding, cache, tmp_path):
    (folder := tmp_path / "m").mkdir()
    model = ENCODINGS[encoding](folder, **SIZES)
    for fused in (False, True):
        assert_restored(load(model, quant="auto", fused=fused), **SIZES)
        shutil.rmtree(cache / "packed")


@pytest.mark.parametrize("fused", [False, True])
def test_projections_of_several_formats(fused, tmp_path):
    kinds = {"attn_v": "Q8_0", "ffn_up": "Q5_0"}
    model = write_gguf_model(tmp_path / "m.gguf", "Q4_0", tied=True, kinds=kinds)
    assert_restored(load(model, quant="auto", fused=fused), tie_word_embeddings=True)


def test_there_is_no_entry(tmp_path):
    decoder = load(write_folder(tmp_path / "m"))
    assert load_packed("another", decoder, CPU) is None
