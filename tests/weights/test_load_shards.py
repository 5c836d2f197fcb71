"""Shards joined again are the whole, bit for bit, and a rank reads its own slices only."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from thread_group import ThreadRanks
from torch import Tensor
from whole_models import (
    CONFIG,
    CPU,
    load,
    load_from,
    plan,
    write_folder,
    write_gguf_model,
)

from hotloop.errors import CheckpointError
from hotloop.kernels.linear import ChannelwiseTorch, DenseTorch, Dequantizing
from hotloop.models import names
from hotloop.models.decoder import Decoder
from hotloop.models.families import read_config
from hotloop.parallel.plan import Shard
from hotloop.quant import parse_scheme
from hotloop.weights.checkpoint import open_checkpoint
from hotloop.weights.gguf import GGUFCheckpoint
from hotloop.weights.quantize import quantize_checkpoint
from hotloop.weights.source import CheckpointSource, RandomSource, Request, read_matrix
from hotloop.weights.tensor_file import TensorFile

KEYS = {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
KEYS |= {"hidden_size": 576, "intermediate_size": 256, "attention_bias": True, "mlp_bias": True}
MODEL = CONFIG | KEYS
SCHEMES = ["none", "int8", "fp8", "int4-g32", "int4-g64-asym"]


@pytest.fixture(autouse=True)
def _rows_and_columns_stay_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels whose packed weights can be sliced as well."""
    plain = (ChannelwiseTorch, DenseTorch, Dequantizing)
    monkeypatch.setattr("hotloop.kernels.linear.KERNELS", plain)


def pieces(packed: list[Tensor], rows: range, columns: range | None, k: int) -> list[Tensor]:
    """The same slice of every tensor of a packed weight: each has all rows, and columns in step."""
    cut = [t[rows.start : rows.stop] for t in packed]
    if columns is None:
        return cut
    each = [k // t.shape[1] if t.dim() == 2 else k for t in packed]
    return [
        t if t.dim() == 1 else t[:, columns.start // e : columns.stop // e]
        for t, e in zip(cut, each, strict=True)
    ]


def assert_is_shard_of(part: Decoder, whole: Decoder, shard: Shard, *, first: bool) -> None:
    layers = read_config(MODEL).layers
    for ours, all_, layer, held in zip(
        part.blocks, whole.blocks, layers, shard.layers, strict=True
    ):
        for matrix in layer.matrices:
            linear, complete = ours.linears[matrix.name], all_.linears[matrix.name]
            expected, biases, row = [], [], 0
            for name in matrix.parts:
                rows, columns = matrix.slices(name, held)
                rows = range(name.n) if rows is None else rows
                shifted = range(row + rows.start, row + rows.stop)
                expected.append(pieces(complete.packed, shifted, columns, complete.k))
                biases.append(complete.bias[shifted.start : shifted.stop])
                row += name.n
            for packed, parts_ in zip(linear.packed, zip(*expected, strict=True), strict=True):
                assert torch.equal(packed, torch.cat(parts_))
            assert matrix.summed == (matrix.name in ("o_proj", "down_proj"))
            if matrix.summed and not first:
                assert linear.bias is None
            else:
                assert torch.equal(linear.bias, torch.cat(biases))
    rows = shard.vocabulary
    for packed, complete in zip(part.head.packed, whole.head.packed, strict=True):
        assert torch.equal(packed, complete[rows.start : rows.stop])
    assert torch.equal(part.embedding.packed[0], whole.embedding.packed[0])
    assert torch.equal(part.norm.weight, whole.norm.weight)


def kinds(tmp_path: Path, quant: str, *, tied: bool) -> dict[str, Path]:
    folder = write_folder(tmp_path / "folder", **KEYS, tie_word_embeddings=tied)
    made = {"folder": folder}
    if quant != "none":
        made["quantized"] = quantize_checkpoint(folder, tmp_path / "quantized", quant=quant)
    return made


@pytest.mark.parametrize("quant", [*SCHEMES, "int4-g32-cal"])
@pytest.mark.parametrize("tied", [False, True])
def test_shards_of_a_checkpoint_are_slices_of_the_whole(quant, tied, tmp_path):
    for kind, path in kinds(tmp_path, quant, tied=tied).items():
        options = {} if kind == "quantized" else {"quant": quant}
        whole = load(path, **options)
        for n in (2, 3, 4):
            shards = plan(read_config(MODEL), n, quant)
            parts = ThreadRanks(n).run(lambda group, o=options, p=path: load(p, group=group, **o))
            for rank, (part, shard) in enumerate(zip(parts, shards, strict=True)):
                assert_is_shard_of(part, whole, shard, first=rank == 0)


def test_an_embedding_tied_to_a_head_of_groups_is_whole_on_every_rank(tmp_path, monkeypatch):
    # As of a large vocabulary, of which most pieces have none of a rank's rows.
    monkeypatch.setattr("hotloop.weights.load.rows_at_once", lambda *_: 40)
    monkeypatch.setattr("hotloop.weights.source._VALUES_OF_PIECE", {"cpu": 80 * 576})
    path = write_folder(tmp_path / "m", **KEYS, tie_word_embeddings=True)
    options = {"quant": "int4-g32", "head": "int4-g32"}
    whole = load(path, **options)
    ids = torch.arange(MODEL["vocab_size"])
    parts = ThreadRanks(3).run(lambda group: load(path, group=group, **options))
    for part, shard in zip(parts, plan(read_config(MODEL), 3, "int4-g32"), strict=True):
        assert torch.equal(part.embedding(ids), whole.embedding(ids))
        rows = shard.vocabulary
        for packed, complete in zip(part.head.packed, whole.head.packed, strict=True):
            assert torch.equal(packed, complete[rows.start : rows.stop])


@pytest.mark.parametrize("quant", SCHEMES)
def test_random_shards_are_slices_of_the_random_whole(quant, monkeypatch):
    monkeypatch.setattr("hotloop.weights.source.BLOCK_ROWS", 100)

    def made(group=None):
        options = {} if group is None else {"group": group}
        source = RandomSource(3, torch.bfloat16, CPU)
        return load_from(None, source, read_config(MODEL), quant=quant, **options)

    whole = made()
    shards = plan(read_config(MODEL), 4, quant)
    for rank, (part, shard) in enumerate(zip(ThreadRanks(4).run(made), shards, strict=True)):
        assert_is_shard_of(part, whole, shard, first=rank == 0)


@pytest.mark.parametrize("quant", ["none", "int8", "int4-g32"])
@pytest.mark.parametrize("tied", [False, True])
def test_shards_of_a_gguf_file_are_slices_of_the_whole(quant, tied, tmp_path):
    path = write_gguf_model(tmp_path / "m.gguf", tied=tied)
    whole = load(path, quant=quant)
    for part, heads in zip(
        ThreadRanks(2).run(lambda group: load(path, group=group, quant=quant)),
        (range(2), range(2, 4)),
        strict=True,
    ):
        for ours, all_ in zip(part.layers, whole.layers, strict=True):
            q_rows = range(heads.start * 16, heads.stop * 16)
            qkv, all_qkv = ours.attention.qkv_proj, all_.attention.qkv_proj
            for packed, complete in zip(qkv.packed, all_qkv.packed, strict=True):
                assert torch.equal(packed[:32], complete[q_rows.start : q_rows.stop])
            cut = pieces(all_.attention.o_proj.packed, range(64), q_rows, 64)
            for packed, complete in zip(ours.attention.o_proj.packed, cut, strict=True):
                assert torch.equal(packed, complete)


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_a_tied_head_is_a_slice_of_the_embedding_and_no_copy(quant, tmp_path):
    path = write_folder(tmp_path / "m", tie_word_embeddings=True)
    for part in ThreadRanks(2).run(lambda group: load(path, group=group, quant=quant)):
        storage = part.embedding.packed[0].untyped_storage().data_ptr()
        assert part.head.packed[0].untyped_storage().data_ptr() == storage


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """Records the bytes of each read of every TensorFile."""
    counted: dict[int, list[int]] = {}
    read_into = TensorFile._read_into

    def counting(self, rest, offset):
        counted.setdefault(id(self), []).append(len(rest))
        read_into(self, rest, offset)

    monkeypatch.setattr(TensorFile, "_read_into", counting)
    return counted


@pytest.mark.parametrize("quant", SCHEMES)
@pytest.mark.parametrize("kind", ["folder", "quantized"])
def test_a_rank_reads_its_own_slices_of_matrices_only(
    kind, quant, tmp_path, monkeypatch, bytes_read
):
    if (path := kinds(tmp_path, quant, tied=False).get(kind)) is None:
        pytest.skip("nothing to store")
    monkeypatch.setattr("hotloop.weights.tensor_file.MIN_SKIPPED_BYTES", 1)
    config = read_config(MODEL)
    options = {} if kind == "quantized" else {"quant": quant}
    shards = plan(config, 4, quant)
    declared = {p.name: (m, p) for m in config.layers[0].matrices for p in m.parts}
    stored = load_file(path / "model.safetensors")
    bytes_read.clear()
    ThreadRanks(4).run(lambda group: load(path, group=group, **options))

    def fraction(name: str, shard: Shard) -> float:
        """The share of a stored tensor that is a rank's own."""
        if name.startswith("lm_head"):
            return len(shard.vocabulary) / config.vocab_size
        part = ".".join(name.split(".")[3:5])
        rows, columns = None, None
        if part in declared:
            rows, columns = declared[part][0].slices(declared[part][1], shard.layers[0])
        whole = names.linear_weights(config).get(f"model.layers.0.{part}")
        if rows is not None:
            return len(rows) / whole[0]
        # Biases of what is summed are everybody's, and so is the scale of a whole row.
        one_column = stored[name].dim() == 1 or stored[name].shape[1] == 1
        return 1.0 if columns is None or one_column else len(columns) / whole[1]

    for shard, reads in zip(shards, sorted_by_rank(bytes_read, shards), strict=True):
        expected = sum(t.nbytes * fraction(name, shard) for name, t in stored.items())
        assert reads == expected + header_bytes(path)


def header_bytes(path: Path) -> int:
    with (path / "model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def sorted_by_rank(counted: dict[int, list[int]], shards: tuple[Shard, ...]) -> list[int]:
    """Bytes read of each rank. Threads open their files in any order; larger shards read more."""
    totals = sorted((sum(reads) for reads in counted.values()), reverse=True)
    assert len(totals) == len(shards)
    return totals


def test_columns_of_long_rows_are_read_alone_and_short_rows_whole(tmp_path, bytes_read):
    path = write_folder(tmp_path / "m", intermediate_size=65_536, num_hidden_layers=1)
    checkpoint = open_checkpoint(path)
    for name, asked, read in (
        ("model.layers.0.mlp.down_proj.weight", (slice(2, 5), slice(100, 164)), 3 * 64 * 2),
        ("model.layers.0.self_attn.o_proj.weight", (slice(2, 5), slice(16, 32)), 3 * 64 * 2),
    ):
        bytes_read.clear()
        tensor = checkpoint.read(name, asked)
        assert torch.equal(tensor, load_file(path / "model.safetensors")[name][asked])
        assert sum(map(sum, bytes_read.values())) == read
    checkpoint.close()


@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
def test_columns_of_a_gguf_file_are_read_alone(kind, tmp_path, monkeypatch, bytes_read):
    monkeypatch.setattr("hotloop.weights.tensor_file.MIN_SKIPPED_BYTES", 1)
    checkpoint = GGUFCheckpoint(write_gguf_model(tmp_path / "m.gguf", kind, tied=False))
    name = "model.layers.0.mlp.down_proj.weight"
    whole = checkpoint.read(name)
    bytes_read.clear()
    assert torch.equal(checkpoint.read(name, (slice(1, 9), slice(64, 128))), whole[1:9, 64:128])
    assert sum(map(sum, bytes_read.values())) == 8 * (64 * 2 if kind == "BF16" else 2 * 34)
    checkpoint.close()


def test_a_value_that_is_not_finite_is_named_by_its_place_in_the_whole(tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[name][37, 150] = float("nan")

    path = write_folder(tmp_path / "m", damage)
    with pytest.raises(CheckpointError, match=r"the first at \[37, 150\]"):
        ThreadRanks(2).run(lambda group: load(path, group=group, quant="int4-g32"))


def test_statistics_of_rows_are_combined_over_ranks_and_those_of_groups_are_not(tmp_path):
    path = write_folder(tmp_path / "m", **KEYS)
    for quant, expected in (("int8", True), ("int4-g32", False), ("none", False)):
        combined = []
        checkpoint = open_checkpoint(path)
        source = CheckpointSource(
            checkpoint, CPU, reduce_max=lambda t, seen=combined: seen.append(t) or t
        )
        name, shape = "model.layers.0.mlp.down_proj", (576, 256)
        for part in ("columns", "rows"):
            asked = {"name": name, "shape": shape, "scheme": parse_scheme(quant)}
            read_matrix(source, Request(**asked, **{part: range(128, 256)}))
        assert bool(combined) == expected
        checkpoint.close()
