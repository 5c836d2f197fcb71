"""Plans the shards of a model: the slices of its weights that each rank holds.

Attention is split by heads, the feed-forward by its features, the head by rows of the vocabulary.
Within a rank every key/value head serves the same number of query heads, as in the whole model, so
that kernels need not know of ranks. A rank holds either

- several whole groups (a key/value head with its query heads), if there are as many as ranks: 3
  key/value heads over 2 ranks are two groups and one; or
- some query heads of one group, if there are fewer key/value heads than ranks. Each of the group's
  ranks then has a copy of the key/value head.

Shards are as even as that allows. Rank 0's shard is never smaller than another's, so a model that
fits on rank 0 fits on every rank. No shard divides features that share a quantization scale, and
boundaries are multiples of as many features as possible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from hotloop.errors import UnsupportedError

Axis = Literal["heads", "kv_heads", "features"]
"""A dimension of a layer that ranks split."""

_MULTIPLES = (128, 64, 32, 16, 8, 4, 2, 1)
"""The numbers of features at whose multiples shards can begin, the most efficient first."""

_MIN_CONTIGUOUS = 32
"""The minimum number of contiguous features that kernels read efficiently. Only tiny models are
split into fewer."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """The dimensions of a layer that ranks split.

    Attributes:
        n_heads: Query heads.
        n_kv_heads: Key/value heads, which divide the query heads.
        head_dim: Width of a head.
        n_features: Features of the feed-forward.
        heads_alignment: Elements of the query heads' output that must not be divided:
            ``quant.Scheme.alignment``. It divides ``n_heads * head_dim``.
        features_alignment: Features that must not be divided. It divides ``n_features``.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_features: int
    heads_alignment: int = 1
    features_alignment: int = 1


@dataclass(frozen=True, kw_only=True)
class LayerShard:
    """The slices of a layer that one rank holds.

    Attributes:
        heads: Query heads.
        kv_heads: Key/value heads; if there are fewer heads than ranks, several ranks hold the same
            head.
        features: Features of the feed-forward.
    """

    heads: range
    kv_heads: range
    features: range

    def along(self, axis: Axis) -> range:
        """Returns the slice along an axis."""
        return getattr(self, axis)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The slices of a model that one rank holds.

    Attributes:
        layers: The slices of each layer.
        vocabulary: Rows of the head.
    """

    layers: tuple[LayerShard, ...]
    vocabulary: range


def plan_shards(
    n_ranks: int, *, layers: Sequence[LayerShape], vocab_size: int
) -> tuple[Shard, ...]:
    """Plans each rank's shard; a single rank has the whole model.

    Args:
        n_ranks: The number of ranks.
        layers: The shape of each layer.
        vocab_size: Rows of the head.

    Raises:
        UnsupportedError: The model cannot be split over this many ranks; the message names the
            numbers that work.
    """
    shapes = tuple(dict.fromkeys(layers))

    def splits(n: int) -> dict[LayerShape, list[LayerShard] | None]:
        return {shape: _split_layer(shape, n) for shape in shapes}

    vocabulary, found = _split_evenly(vocab_size, n_ranks, 1), splits(n_ranks)
    unsplit = [shape for shape, shares in found.items() if shares is None]
    if vocabulary is None or unsplit:
        shape = (unsplit or shapes)[0]
        works = [
            n
            for n in range(1, max(shape.n_heads for shape in shapes) + 1)
            if all(splits(n).values()) and _split_evenly(vocab_size, n, 1)
        ]
        alignment = max(shape.heads_alignment, shape.features_alignment)
        scaled = f" in groups of {alignment} that share a scale" if alignment > 1 else ""
        raise UnsupportedError(
            f"tensor_parallel {n_ranks} cannot split {shape.n_heads} query heads, "
            f"{shape.n_kv_heads} key/value heads and {shape.n_features} features{scaled}; "
            f"{_listed(works)}."
        )
    split = {shape: shares for shape, shares in found.items() if shares is not None}
    return tuple(
        Shard(layers=tuple(split[shape][rank] for shape in layers), vocabulary=rows)
        for rank, rows in enumerate(vocabulary)
    )


def _split_layer(shape: LayerShape, n: int) -> list[LayerShard] | None:
    """Splits a layer over ``n`` ranks; returns None if that is impossible."""
    heads = _split_heads(shape, n)
    features = _split_evenly(shape.n_features, n, shape.features_alignment)
    if heads is None or features is None:
        return None
    return [
        LayerShard(heads=q, kv_heads=kv, features=f)
        for (q, kv), f in zip(heads, features, strict=True)
    ]


def _split_heads(shape: LayerShape, n: int) -> list[tuple[range, range]] | None:
    """Splits query and key/value heads over ``n`` ranks; returns None if that is impossible."""
    group = shape.n_heads // shape.n_kv_heads
    # Consecutive query heads that must stay together, because their outputs share a scale.
    together = math.lcm(shape.heads_alignment, shape.head_dim) // shape.head_dim
    whole_groups = math.lcm(group, together)
    if n * whole_groups <= shape.n_heads:
        shares = _split(shape.n_heads, n, whole_groups)
        return [(s, range(s.start // group, s.stop // group)) for s in shares]
    if n < shape.n_kv_heads or group % together:
        return None
    # The first groups get fewer ranks, so that rank 0 has the most heads.
    ranks = [-(-(n - j) // shape.n_kv_heads) for j in reversed(range(shape.n_kv_heads))]
    if max(ranks) * together > group:
        return None
    return [
        (range(j * group + s.start, j * group + s.stop), range(j, j + 1))
        for j in range(shape.n_kv_heads)
        for s in _split(group, ranks[j], together)
    ]


def _split_evenly(n: int, n_parts: int, alignment: int) -> list[range] | None:
    """Splits ``n`` features so that the largest part is as small as possible.

    Parts begin at multiples of ``alignment``, and of as large a number of ``_MULTIPLES`` as this
    allows; below ``_MIN_CONTIGUOUS`` only if there is no other way. Returns None if there are too
    few features for ``n_parts``.
    """
    multiples = [math.lcm(multiple, alignment) for multiple in _MULTIPLES]
    possible = [multiple for multiple in multiples if -(-n // multiple) >= n_parts]
    if not possible:
        return None
    efficient = [multiple for multiple in possible if multiple >= _MIN_CONTIGUOUS] or possible
    splits = [_split(n, n_parts, multiple) for multiple in efficient]
    return min(splits, key=lambda shares: len(shares[0]))  # of equal splits the first


def _split(n: int, n_parts: int, multiple: int) -> list[range]:
    """Splits into consecutive ranges that begin at multiples of ``multiple``, larger ones first."""
    n_multiples = -(-n // multiple)
    edges = [0]
    for part in range(n_parts):
        edges.append(edges[-1] + n_multiples // n_parts + (part < n_multiples % n_parts))
    return [range(a * multiple, min(b * multiple, n)) for a, b in pairwise(edges)]


def _listed(degrees: Sequence[int]) -> str:
    """Returns the end of an error message: the numbers of ranks that work."""
    if degrees == [1]:
        return "only 1 works"
    return f"{', '.join(map(str, degrees[:-1]))} and {degrees[-1]} work"
