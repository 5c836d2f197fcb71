"""Shards cover the model once, keep its groups together, and are as even as that allows."""

import itertools
import random
from contextlib import suppress
from dataclasses import dataclass

import pytest

from hotloop.errors import UnsupportedError
from hotloop.models.config import ModelConfig
from hotloop.models.families import read_config
from hotloop.models.shapes import SHAPES
from hotloop.parallel.plan import LayerShape, plan_shards

SMOLLM2 = {
    "n_heads": 9,
    "n_kv_heads": 3,
    "head_dim": 64,
    "n_features": 1536,
    "vocab_size": 49152,
}


def sizes(model: ModelConfig) -> dict[str, int]:
    (shape,) = {layer.shape(lambda _part: 1) for layer in model.layers}
    said = {name: getattr(shape, name) for name in SMOLLM2 if name != "vocab_size"}
    return said | {"vocab_size": model.vocab_size}


@dataclass(frozen=True)
class Share:
    """A rank's part of a model of equal layers."""

    heads: range
    kv_heads: range
    features: range
    vocabulary: range


def split(n: int, *, vocab_size: int, alignment: int, **sizes: int) -> tuple[Share, ...]:
    """Returns what each rank holds of a model of two equal layers."""
    layer = LayerShape(**sizes, heads_alignment=alignment, features_alignment=alignment)
    shards = plan_shards(n, layers=[layer, layer], vocab_size=vocab_size)
    assert all(shard.layers[0] == shard.layers[1] for shard in shards)
    return tuple(Share(**vars(s.layers[0]), vocabulary=s.vocabulary) for s in shards)


def joined(ranges: list[range]) -> list[int]:
    return list(itertools.chain(*ranges))


def assert_sound(shards: tuple[Share, ...], alignment: int, **model: int) -> None:
    group = model["n_heads"] // model["n_kv_heads"]
    for part, n in (
        ("heads", model["n_heads"]),
        ("features", model["n_features"]),
        ("vocabulary", model["vocab_size"]),
    ):
        shares = [getattr(shard, part) for shard in shards]
        assert joined(shares) == list(range(n)), "everything once, in order"
        assert all(shares), "nobody idle"
        assert len(shares[0]) == max(map(len, shares)), "rank 0 has no less than any other"
    for shard in shards:
        # Query head i is served by key/value head i // group: so it must be within the rank, too.
        local = len(shard.heads) // len(shard.kv_heads)
        assert len(shard.heads) % len(shard.kv_heads) == 0
        for i, head in enumerate(shard.heads):
            assert shard.kv_heads[i // local] == head // group
        for edge in (shard.heads.start, shard.heads.stop):
            assert edge * model["head_dim"] % alignment == 0
        for edge in (shard.features.start, shard.features.stop):
            assert edge % alignment == 0


def degrees_that_work(model: dict[str, int], alignment: int) -> list[int]:
    """Every degree that is not refused."""
    works = []
    for n in range(1, model["n_heads"] + 1):
        with suppress(UnsupportedError):
            split(n, **model, alignment=alignment)
            works.append(n)
    return works


def test_one_rank_holds_the_whole_model():
    (shard,) = split(1, **SMOLLM2, alignment=64)
    assert shard == Share(
        heads=range(9), kv_heads=range(3), features=range(1536), vocabulary=range(49152)
    )


@pytest.mark.parametrize(
    ("n", "heads", "kv_heads"),
    [
        (2, [6, 3], [2, 1]),  # groups of three query heads: two, and one
        (3, [3, 3, 3], [1, 1, 1]),
        (4, [3, 3, 2, 1], [1, 1, 1, 1]),  # the last group is two ranks'
        (9, [1] * 9, [1] * 9),
    ],
)
@pytest.mark.parametrize("alignment", [1, 32, 64])
def test_nine_query_and_three_key_value_heads(n, heads, kv_heads, alignment):
    shards = split(n, **SMOLLM2, alignment=alignment)
    assert [len(shard.heads) for shard in shards] == heads
    assert [len(shard.kv_heads) for shard in shards] == kv_heads
    assert_sound(shards, alignment, **SMOLLM2)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("alignment", [1, 128])
def test_built_in_shapes_are_split_evenly_at_round_boundaries(name, n, alignment):
    model = sizes(read_config(SHAPES[name]))
    shards = split(n, **model, alignment=alignment)
    assert_sound(shards, alignment, **model)
    assert len({len(shard.heads) for shard in shards}) == 1
    widths = [len(shard.features) for shard in shards]
    assert max(widths) - min(widths) <= alignment
    for shard in shards:
        assert len(shard.features) % 32 == 0
        assert len(shard.vocabulary) % 8 == 0


def test_any_model_is_split_correctly_or_refused_with_degrees_that_work():
    dice = random.Random(0)
    refused = 0
    for _ in range(400):
        n_kv = dice.randint(1, 8)
        alignment = dice.choice([1, 32, 64, 128])
        model = {
            "n_kv_heads": n_kv,
            "n_heads": n_kv * dice.randint(1, 8),
            "head_dim": dice.choice([16, 32, 64, 96, 128]),
            "n_features": alignment * dice.randint(4, 40),
            "vocab_size": dice.randint(30, 4000),
        }
        if model["n_heads"] * model["head_dim"] % alignment:
            continue  # the scheme itself refuses
        n = dice.randint(1, 8)
        degrees = degrees_that_work(model, alignment)
        assert 1 in degrees
        if n in degrees:
            assert_sound(split(n, **model, alignment=alignment), alignment, **model)
            continue
        refused += 1
        with pytest.raises(UnsupportedError) as caught:
            split(n, **model, alignment=alignment)
        numbers = str(caught.value).rpartition("; ")[2].replace(",", " ").split()
        assert [int(word) for word in numbers if word.isdigit()] == degrees
    assert 20 < refused < 200


def test_a_refusal_names_the_problem_and_the_degrees_that_work():
    tiny = SMOLLM2 | {"n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "n_features": 128}
    with pytest.raises(UnsupportedError) as caught:
        split(4, **tiny, alignment=32)
    assert str(caught.value) == (
        "tensor_parallel 4 cannot split 4 query heads, 2 key/value heads and 128 features in "
        "groups of 32 that share a scale; 1 and 2 work."
    )
    with pytest.raises(UnsupportedError, match=r"tensor_parallel 10 .*; 1, 2, .* and 9 work\."):
        split(10, **SMOLLM2, alignment=1)


def test_layers_of_different_shapes_are_split_each_by_its_own_heads_and_features():
    wide = LayerShape(n_heads=8, n_kv_heads=2, head_dim=16, n_features=256)
    narrow = LayerShape(n_heads=4, n_kv_heads=4, head_dim=32, n_features=96, features_alignment=32)
    shards = plan_shards(2, layers=[wide, narrow, wide], vocab_size=64)
    assert [[len(layer.heads) for layer in shard.layers] for shard in shards] == [[4, 2, 4]] * 2
    assert [[len(layer.kv_heads) for layer in shard.layers] for shard in shards] == [[1, 2, 1]] * 2
    assert [len(shard.layers[1].features) for shard in shards] == [64, 32]
    with pytest.raises(UnsupportedError, match=r"4 query heads.*; 1, 2 and 3 work\."):
        plan_shards(4, layers=[wide, narrow, wide], vocab_size=64)
