"""Slicing and joining quantized weights is exact, and commutes with quantizing them."""

import math
import weakref
from collections.abc import Iterator

import pytest
import torch
from number_formats import NAMES, exactly, random_weight
from torch import Tensor

from hotloop.errors import ConfigError
from hotloop.quant import QTensor, join_alike, join_rows, parse_scheme
from hotloop.quant.qtensor import expand_blocks

QUANTIZED = ["int8", "fp8", "int4-g32", "int4-g64-asym", "int4-g128"]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def assert_same(a: Tensor | QTensor, b: Tensor | QTensor) -> None:
    pair = [w.tensors if isinstance(w, QTensor) else (w,) for w in (a, b)]
    for x, y in zip(*pair, strict=True):
        assert x.dtype == y.dtype
        if x.dtype.itemsize == 1:  # torch cannot compare eight-bit floats
            x, y = x.view(torch.uint8), y.view(torch.uint8)
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["none", *QUANTIZED])
def test_row_shards_of_a_quantized_weight_are_quantized_row_shards(name):
    weight, scheme = normal(12, 256), parse_scheme(name)
    whole = scheme.quantize(weight)
    shards = [scheme.quantize(weight[a:b]) for a, b in ((0, 5), (5, 6), (6, 12))]
    assert_same(join_rows(shards, 12), whole)
    if isinstance(whole, QTensor):
        assert_same(whole.rows(5, 12), scheme.quantize(weight[5:12]))


@pytest.mark.parametrize("name", QUANTIZED)
def test_column_shards_of_a_quantized_weight_join_to_the_whole(name):
    weight, scheme = normal(6, 512), parse_scheme(name)
    whole = scheme.quantize(weight)
    shards = [whole.columns(a, a + 128) for a in range(0, 512, 128)]
    assert torch.equal(torch.cat([s.dequantize() for s in shards], dim=1), whole.dequantize())
    assert all(s.shape == (6, 128) for s in shards)
    if whole.kind == "int4":  # a group's scale is its own, so the order does not matter either
        assert_same(shards[1], scheme.quantize(weight[:, 128:256]))


def test_column_shard_of_a_shard_keeps_the_weights():
    whole = parse_scheme("int4-g32-asym").quantize(normal(8, 256))
    expected = whole.dequantize()[2:6, 64:160]
    assert torch.equal(whole.rows(2, 6).columns(64, 160).dequantize(), expected)
    assert torch.equal(whole.columns(64, 160).rows(2, 6).dequantize(), expected)


@pytest.mark.parametrize(("start", "stop"), [(0, 32), (32, 128), (64, 100)])
def test_shards_that_cut_a_group_apart_are_refused(start, stop):
    whole = parse_scheme("int4-g64").quantize(normal(4, 256))
    with pytest.raises(ConfigError, match=f"{start} to {stop} cut a quantization group of 64"):
        whole.columns(start, stop)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_scale_per_channel_serves_any_columns(name):
    whole = parse_scheme(name).quantize(normal(4, 100))
    assert torch.equal(whole.columns(13, 40).dequantize(), whole.dequantize()[:, 13:40])


@pytest.mark.parametrize("name", QUANTIZED)
def test_dequantizing_rounds_once_from_float32(name):
    q = parse_scheme(name).quantize(normal(4, 128))
    assert torch.equal(q.dequantize(torch.bfloat16), q.dequantize().bfloat16())


def test_joining_asks_for_one_part_at_a_time():
    alive: list[int] = []

    def parts() -> Iterator[Tensor]:
        for i in range(3):
            assert not alive, "the part before is still held"
            part = torch.full((2, 4), float(i))
            alive.append(i)
            weakref.finalize(part, alive.remove, i)
            yield part
            del part

    joined = join_rows(parts(), 6)
    assert isinstance(joined, Tensor)
    assert joined[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_part_that_is_the_whole_is_not_copied():
    weight = normal(4, 4)
    assert join_rows(iter([weight]), 4) is weight


def test_parts_of_unlike_types_or_too_few_rows_are_our_own_mistakes():
    with pytest.raises(AssertionError, match="cannot be joined"):
        join_rows([normal(2, 4), normal(2, 4).bfloat16()], 4)
    with pytest.raises(AssertionError, match="2 rows came, not 4"):
        join_rows([normal(2, 4)], 4)
    with pytest.raises(AssertionError, match="nothing to join"):
        join_rows([], 4)


# Every number format.


@pytest.mark.parametrize("name", NAMES)
def test_dequantizing_gives_what_the_format_defines_within_float32(name):
    weight = random_weight(name, 6, 512)
    torch.testing.assert_close(weight.dequantize().double(), exactly(weight), rtol=3e-7, atol=3e-7)
    rounded = weight.dequantize(torch.bfloat16)
    assert torch.equal(rounded, weight.dequantize().bfloat16())


@pytest.mark.parametrize("name", NAMES)
def test_slices_of_a_weight_dequantize_to_slices_of_it(name):
    weight = random_weight(name, 6, 768)
    dense = weight.dequantize()
    assert torch.equal(weight.rows(1, 5).dequantize(), dense[1:5])
    assert_same(weight.columns(0, 768), weight)
    if weight.permutation is not None:
        with pytest.raises(
            ConfigError, match="0 to 384 of 768 cannot be sliced: they are permuted"
        ):
            weight.columns(0, 384)
        return
    for start, stop in ((0, 256), (256, 768), (128, 384), (384, 768)):
        part = weight.rows(1, 5).columns(start, stop)
        assert part.shape == (4, stop - start)
        assert torch.equal(part.dequantize(), dense[1:5, start:stop])
        again = part.columns(0, 128).map(Tensor.clone)
        assert torch.equal(again.dequantize(), dense[1:5, start : start + 128])
        assert part.format == weight.columns(start, stop).format


@pytest.mark.parametrize("name", NAMES)
def test_joined_slices_are_the_weight(name):
    weight = random_weight(name, 6, 512)
    assert_same(join_rows((weight.rows(a, b) for a, b in ((0, 1), (1, 4), (4, 6))), 6), weight)


@pytest.mark.parametrize("name", NAMES)
def test_mapped_weight_keeps_its_format(name):
    weight = random_weight(name, 6, 512)
    assert_same(weight.to("cpu").map(Tensor.clone), weight)
    reversed_rows = weight.map_rows(lambda t: t[torch.arange(5, -1, -1)])
    assert torch.equal(reversed_rows.dequantize(), weight.dequantize().flip(0))
    assert reversed_rows.format == weight.format


def test_two_level_weight_keeps_super_blocks_as_large_as_a_slice_allows():
    weight = random_weight("Q4_K", 4, 1024)
    assert weight.columns(256, 768).format == weight.format
    assert weight.columns(128, 640).format.super_size == 128
    assert weight.columns(96, 640).format.super_size == 32
    finer = weight.with_super_blocks(64)
    assert finer.format.super_size == 64
    assert torch.equal(finer.dequantize(), weight.dequantize())
    assert random_weight("nvfp4", 4, 512).columns(128, 256).format.super_size == 128


@pytest.mark.parametrize(("k", "degrees"), [(512, "2, 4"), (384, "3"), (640, "5")])
def test_refused_slice_names_the_degrees_that_work(k, degrees):
    weight = random_weight("int4-g128", 4, k)
    with pytest.raises(ConfigError, match=f"group of 128 .*degree of {degrees}[.]"):
        weight.columns(0, 64)


def test_parts_of_several_formats_stay_apart():
    q, k, v = (random_weight(name, n, 512) for name, n in (("Q4_K", 6), ("Q4_K", 2), ("Q6_K", 2)))
    joined = join_alike((part for part in (q, k, v)), 10)
    assert [weight.shape for weight in joined] == [(8, 512), (2, 512)]
    assert torch.equal(dequantized(joined), dequantized([q, k, v]))
    joined = join_alike([v, k, normal(2, 512), normal(3, 512), q], 15)
    assert [len(dequantized([w])) for w in joined] == [2, 2, 5, 6]
    assert len(join_alike([normal(2, 4), normal(2, 4).bfloat16()], 4)) == 2


@pytest.mark.parametrize("name", ["gptq-act-order", "nf4"])
def test_parts_with_permutations_or_tables_of_their_own_stay_apart(name):
    a, b = (random_weight(name, 4, 256, seed=seed) for seed in (0, 1))
    assert [weight.shape for weight in join_alike([a, a.rows(1, 3), b], 10)] == [(6, 256), (4, 256)]


@pytest.mark.parametrize(("n", "k"), [(256, 512), (200, 576), (130, 128), (64, 96)])
def test_scales_of_blocks_are_expanded_to_rows_and_groups(n, k):
    blocks = torch.rand(-(-n // 128), -(-k // 128))
    values = torch.randn(n, k).to(torch.float8_e4m3fn)
    scale = expand_blocks(blocks, rows=128, columns=128, group_size=math.gcd(128, k), shape=(n, k))
    weight = QTensor(values=values, scale=scale, kind="fp8")
    rows, columns = torch.arange(n) // 128, torch.arange(k) // 128
    expected = values.float() * blocks[rows[:, None], columns]
    assert torch.equal(weight.dequantize(), expected)


def dequantized(weights: list[Tensor | QTensor]) -> Tensor:
    dense = [weight.dequantize() if isinstance(weight, QTensor) else weight for weight in weights]
    return torch.cat(dense)
