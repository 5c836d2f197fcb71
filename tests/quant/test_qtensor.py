"""Slicing and joining quantized weights is exact, and commutes with quantizing them."""

import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hotloop.errors import ConfigError
from hotloop.quant import QTensor, join_rows, parse_scheme

QUANTIZED = ["int8", "fp8", "int4-g32", "int4-g64-asym", "int4-g128"]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def assert_same(a: Tensor | QTensor, b: Tensor | QTensor) -> None:
    pair = [w.tensors if isinstance(w, QTensor) else (w,) for w in (a, b)]
    for x, y in zip(*pair, strict=True):
        assert x.dtype == y.dtype
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
    with pytest.raises(AssertionError, match="cannot join"):
        join_rows([normal(2, 4), normal(2, 4).bfloat16()], 4)
    with pytest.raises(AssertionError, match="2 rows came, not 4"):
        join_rows([normal(2, 4)], 4)
    with pytest.raises(AssertionError, match="nothing to join"):
        join_rows([], 4)
