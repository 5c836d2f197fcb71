"""``cache_packed``: a second start reads packed weights, bit for bit those of the first."""

import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import write_random
from torch import Tensor

from hotloop import LLM
from hotloop.errors import ConfigError
from hotloop.weights import packed_cache
from hotloop.weights.packed_cache import LIMIT_VARIABLE
from hotloop.weights.quantize import quantize_checkpoint

IDS = list(range(5, 40))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, with the kernels that are built already."""
    folder = tmp_path / "cache"
    folder.mkdir()
    from hotloop.cache import cache_dir

    kernels = cache_dir() / "kernels"
    if kernels.is_dir():
        (folder / "kernels").symlink_to(kernels)
    monkeypatch.setenv("HOTLOOP_CACHE", str(folder))
    return folder / "packed"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that no test changes."""
    return settled(write_random(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another, with biases of attention."""
    return settled(write_random(tmp_path_factory.mktemp("biased"), attention_bias=True))


def settled(folder: Path) -> Path:
    """Waits until the files are old enough for their hash to be remembered."""
    newest = max(path.stat().st_ctime for path in folder.iterdir())
    time.sleep(max(0.0, newest + packed_cache._SETTLED_S + 0.01 - time.time()))
    return folder


def start(model: Path, **options: object) -> LLM:
    fixed = {"device": "cpu", "max_seq_len": 48, "cache_packed": True}
    return LLM(str(model), **(fixed | options))


def weights(llm: LLM) -> dict[str, Tensor]:
    return dict(llm._runner._model.decoder.named_buffers(remove_duplicate=False))


def logits(llm: LLM) -> Tensor:
    (score,) = llm.score([IDS], full=True)
    assert score.log_probs is not None
    return score.log_probs


def header_bytes(model: Path) -> int:
    with (model / "model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def rope_bytes(llm: LLM) -> int:
    return sum(t.nbytes for name, t in weights(llm).items() if name in ("cos0", "sin0"))


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.packed"))


def assert_same(ours: LLM, theirs: LLM) -> None:
    a, b = weights(ours), weights(theirs)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert tensor.stride() == b[name].stride(), name
        assert torch.equal(tensor, b[name]), name
    assert torch.equal(logits(ours), logits(theirs))
    first, second = ours.describe(), theirs.describe()
    assert first.kernels == second.kernels
    assert first.weight_bytes_per_step == second.weight_bytes_per_step
    assert first.notes == second.notes


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Fails where a weight of the source is read, within ``with monkeypatch.context()``."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a weight of the source was read")

    with monkeypatch.context() as patch:
        patch.refuse = lambda: patch.setattr("hotloop.engine.packed.CheckpointSource", refuse)
        yield patch


@pytest.mark.parametrize("quant", ["none", "int8", "fp8", "int4-g32", "int4-g32-asym"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_second_start_has_the_same_bits_and_reads_no_weight_of_the_source(
    model, quant, dtype, unread, cache
):
    plain = start(model, quant=quant, dtype=dtype, cache_packed=False)
    assert entries(cache) == []
    first = start(model, quant=quant, dtype=dtype)
    assert len(entries(cache)) == 1
    unread.refuse()
    second = start(model, quant=quant, dtype=dtype)
    assert_same(first, plain)
    assert_same(second, plain)
    source, packed = plain.describe(), second.describe()
    assert source.read_bytes == (model / "model.safetensors").stat().st_size - header_bytes(model)
    assert packed.read_bytes == packed.weight_bytes - rope_bytes(second)
    assert source.load_gb_s > 0
    assert source.read_s < source.load_s


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_a_self_draft_has_an_entry_of_its_own_beside_the_models(quant, biased, unread, cache):
    model = biased
    start(model, quant=quant)
    (of_model,) = entries(cache)
    written = of_model.stat().st_ino
    plain = start(model, quant=quant, draft="self-int4-g32", cache_packed=False)
    first = start(model, quant=quant, draft="self-int4-g32")
    assert len(entries(cache)) == 2
    assert of_model.stat().st_ino == written, "the same with drafts"
    unread.refuse()
    second = start(model, quant=quant, draft="self-int4-g32")
    assert_same(first, plain)
    assert_same(second, plain)
    for other in (first, second):
        a, b = (dict(llm._runner._model.draft_decoder.named_buffers()) for llm in (plain, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
        model_, draft = other._runner._model.decoder, other._runner._model.draft_decoder
        assert draft.blocks[0].attention.qkv_proj.bias is model_.blocks[0].attention.qkv_proj.bias


def test_high_halves_draft_from_the_entry_of_their_model(model, unread, cache):
    plain = start(model, quant="int8-g32", draft="self", cache_packed=False)
    start(model, quant="int8-g32")
    (of_model,) = entries(cache)
    unread.refuse()
    drafting = start(model, quant="int8-g32", draft="self")
    assert entries(cache) == [of_model]
    assert_same(drafting, plain)
    assert drafting.describe().read_bytes == plain.describe().weight_bytes - rope_bytes(plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("execution", ["fused", "eager"])
@pytest.mark.parametrize("quant", ["none", "int8", "int4-g64"])
def test_a_second_start_on_a_gpu_has_the_same_bits(quant, execution, tmp_path, unread):
    (tmp_path / "m").mkdir()
    model = write_random(tmp_path / "m", hidden_size=128, intermediate_size=256, head_dim=64)
    settled(model)
    options = {"device": "cuda", "quant": quant, "execution": execution}
    plain = start(model, cache_packed=False, **options)
    start(model, **options).close()
    unread.refuse()
    assert_same(start(model, **options), plain)


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_embedding_is_stored_once(tied, tmp_path, cache):
    (tmp_path / "m").mkdir()
    model = write_random(tmp_path / "m", tie_word_embeddings=tied)
    for quant in ("none", "int8"):
        first = start(model, quant=quant)
        size = entries(cache)[0].stat().st_size
        assert size < 1.05 * first.describe().weight_bytes + 200_000
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hotloop.engine.packed.CheckpointSource", None)
            second = start(model, quant=quant)
        assert_same(second, first)
        storages = {t.untyped_storage().data_ptr() for t in weights(second).values()}
        expected = {t.untyped_storage().data_ptr() for t in weights(first).values()}
        assert len(storages) == len(expected)
        entries(cache)[0].unlink()


def test_each_rank_has_an_entry_of_its_own(model, cache):
    options = {"tensor_parallel": 2, "dtype": "float32", "quant": "int8"}
    with start(model, **options) as first:
        expected = logits(first)
    assert len(entries(cache)) == 2
    times = [path.stat().st_mtime_ns for path in entries(cache)]
    with start(model, **options) as second:
        assert torch.equal(logits(second), expected)
    assert all(path.stat().st_mtime_ns > t for path, t in zip(entries(cache), times, strict=True))
    entries(cache)[0].unlink()  # a rank alone cannot read the source: ranks combine statistics
    with start(model, **options) as third:
        assert torch.equal(logits(third), expected)
    assert len(entries(cache)) == 2


def test_other_schemes_types_and_sources_have_other_entries(model, tmp_path, cache):
    start(model, quant="int8")
    start(model, quant="int4-g32")
    start(model, quant="int4-g32", dtype="float32")
    assert len(entries(cache)) == 3
    start(quantize_checkpoint(model, tmp_path / "q", quant="int4-g32"))
    assert len(entries(cache)) == 4


@pytest.mark.parametrize("settle", [False, True])
def test_a_changed_source_is_noticed(settle, tmp_path, cache):
    (tmp_path / "m").mkdir()
    model = write_random(tmp_path / "m")
    if settle:
        settled(model)
    before = logits(start(model))
    file = model / "model.safetensors"
    found, data = file.stat(), bytearray(file.read_bytes())
    data[-2000:-1000] = bytes(1000)
    file.write_bytes(data)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))  # as old as before, and as long
    after = start(model)
    assert not torch.equal(logits(after), before)
    assert_same(after, start(model, cache_packed=False))
    assert len(entries(cache)) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:0],
        lambda data: data[:-60] + bytes([data[-60] ^ 1]) + data[-59:],
        lambda data: data[:8192] + bytes(len(data) - 8192),
        lambda data: bytes([data[0] ^ 64]) + data[1:],  # where the first weight is
    ],
    ids=["half", "a byte less", "empty", "a bit of the index", "zeros", "a bit of a weight"],
)
def test_a_damaged_entry_is_noticed_and_made_anew(damage, model, cache):
    expected = start(model, quant="int4-g32")
    (entry,) = entries(cache)
    sound = entry.read_bytes()
    entry.write_bytes(damage(sound))
    assert_same(start(model, quant="int4-g32"), expected)
    assert [path.read_bytes() == sound for path in entries(cache)] == [True]


def test_entries_used_longest_ago_are_removed_first(model, monkeypatch, cache):
    start(model, quant="int8")
    (int8,) = entries(cache)
    start(model, quant="int4-g32")
    (int4,) = set(entries(cache)) - {int8}
    start(model, quant="int8")  # used again
    size = sum(path.stat().st_size for path in entries(cache))
    monkeypatch.setenv(LIMIT_VARIABLE, str(1.2 * size / 1e9))
    start(model, quant="fp8")
    assert int8 in entries(cache)
    assert int4 not in entries(cache)
    assert len(entries(cache)) == 2
    assert sum(path.stat().st_size for path in entries(cache)) <= 1.2 * size


def test_what_exceeds_the_limit_is_not_kept_and_a_note_says_so(model, monkeypatch, cache):
    monkeypatch.setenv(LIMIT_VARIABLE, "0.0001")
    (note,) = (n for n in start(model).describe().notes if "packed weights" in n)
    assert "HOTLOOP_PACKED_GB allows 0.0001 GB" in note
    assert entries(cache) == []
    monkeypatch.setenv(LIMIT_VARIABLE, "ten")
    with pytest.raises(ConfigError, match=r"HOTLOOP_PACKED_GB is 'ten': give a number of GB"):
        start(model)


def _start_and_report(model: str, barrier: object, results: object) -> None:
    torch.set_num_threads(1)
    barrier.wait()
    results.put(logits(start(Path(model), quant="int8", dtype="float32")).tolist())


def test_two_processes_at_once_get_the_same(model, cache):
    expected = logits(start(model, quant="int8", dtype="float32", cache_packed=False))
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(2), spawn.Queue()
    both = [
        spawn.Process(target=_start_and_report, args=(str(model), barrier, results))
        for _ in range(2)
    ]
    for process in both:
        process.start()
    found = [torch.tensor(results.get(timeout=900)) for _ in both]
    for process in both:
        process.join()
    assert all(torch.equal(each, expected) for each in found)
    assert len(entries(cache)) == 1
    assert list(cache.glob(".*.partial")) == []
    assert torch.equal(logits(start(model, quant="int8", dtype="float32")), expected)


def test_the_content_of_files_that_did_not_change_is_hashed_once(model, monkeypatch):
    start(model)
    monkeypatch.setattr("hotloop.weights.packed_cache.hash_checkpoint", None)
    start(model)


def test_the_lever_is_an_option_of_every_command_and_a_key_of_recipes(tmp_path):
    from hotloop.cli.options import MatrixOptions
    from hotloop.sweep.recipe import load_recipe

    assert MatrixOptions(cache_packed="true").defaults() == {"cache_packed": True}
    assert MatrixOptions(cache_packed="true,false").matrix()["cache_packed"] == [True, False]
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"model": "m", "defaults": {"cache_packed": True}}))
    assert load_recipe(recipe).defaults.cache_packed is True
