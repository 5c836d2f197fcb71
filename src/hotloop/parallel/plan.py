"""Plans the shards of a model: the slices of its weights that each rank holds.

Attention is split by heads, the feed-forward by its features, the head by rows of the vocabulary.
Within a rank every key/value head serves the same number of query heads, as in the whole model, so
that kernels need not know of ranks. A rank holds either

- several whole groups (a key/value head with its query heads), if there are as many as ranks: 3
  key/value heads over 2 ranks are two groups and one; or
- some query heads of one group, if there are fewer key/value heads than ranks. Each of the group's
  ranks then has a copy of the key/value head.

Shards are as even as that allows, and rank 0's are never smaller than another's: a model that fits
on rank 0 fits on all. No shard divides features that share a quantization scale, and boundaries are
multiples of as many features as possible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hotloop.errors import UnsupportedError

_UNITS = (128, 64, 32, 16, 8, 4, 2, 1)
_FRIENDLY = 32
"""The fewest contiguous features that kernels read well; only tiny models are split finer."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The slices of a model that one rank holds.

    Attributes:
        heads: Query heads.
        kv_heads: Key/value heads; if there are fewer than ranks, several ranks hold the same ones.
        features: Features of the feed-forward layer.
        vocabulary: Rows of the head.
    """

    heads: range
    kv_heads: range
    features: range
    vocabulary: range


def plan_shards(
    n_ranks: int,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    intermediate_size: int,
    vocab_size: int,
    alignment: int,
) -> tuple[Shard, ...]:
    """Plans each rank's shard; a single rank's is the whole model.

    Args:
        n_ranks: The number of ranks.
        n_heads: Query heads of the model.
        n_kv_heads: Its key/value heads, which divide the query heads.
        head_dim: Width of a head.
        intermediate_size: Features of its feed-forward layer.
        vocab_size: Rows of its head.
        alignment: Input features that must not be divided: ``quant.Scheme.alignment``. It divides
            ``n_heads * head_dim`` and ``intermediate_size``.

    Raises:
        UnsupportedError: The model cannot be split so; the message names the degrees that work.
    """
    group = n_heads // n_kv_heads
    # Heads of attention's output that must not be divided.
    unit = math.lcm(alignment, head_dim) // head_dim

    def heads(n: int) -> list[tuple[range, range]] | None:
        """Splits query and key/value heads over ``n`` ranks."""
        whole = math.lcm(group, unit)
        if n * whole <= n_heads:
            shares = _split(n_heads, n, whole)
            return [(s, range(s.start // group, s.stop // group)) for s in shares]
        if n < n_kv_heads or group % unit:
            return None
        # The first groups get fewer ranks, so that rank 0 has the most heads.
        ranks = [-(-(n - j) // n_kv_heads) for j in reversed(range(n_kv_heads))]
        if max(ranks) * unit > group:
            return None
        return [
            (range(j * group + s.start, j * group + s.stop), range(j, j + 1))
            for j in range(n_kv_heads)
            for s in _split(group, ranks[j], unit)
        ]

    def features(n: int) -> list[range] | None:
        return _split_finely(intermediate_size, n, alignment)

    def vocabulary(n: int) -> list[range] | None:
        return _split_finely(vocab_size, n, 1)

    of_heads, of_features, of_vocabulary = heads(n_ranks), features(n_ranks), vocabulary(n_ranks)
    if of_heads is None or of_features is None or of_vocabulary is None:
        works = [n for n in range(1, n_heads + 1) if heads(n) and features(n) and vocabulary(n)]
        scaled = f" and {alignment} features that share a scale" if alignment > 1 else ""
        raise UnsupportedError(
            f"tensor_parallel {n_ranks} cannot split {n_heads} query heads, {n_kv_heads} key/value "
            f"heads and {intermediate_size} features{scaled}; {_listed(works)}."
        )
    return tuple(
        Shard(heads=q, kv_heads=kv, features=f, vocabulary=v)
        for (q, kv), f, v in zip(of_heads, of_features, of_vocabulary, strict=True)
    )


def _split_finely(n: int, n_parts: int, alignment: int) -> list[range] | None:
    """Splits as evenly as possible, at multiples of as large a unit as that allows."""
    units = [math.lcm(unit, alignment) for unit in _UNITS]
    possible = [unit for unit in units if -(-n // unit) >= n_parts]
    if not possible:
        return None
    round_ones = [unit for unit in possible if unit >= _FRIENDLY] or possible
    splits = {unit: _split(n, n_parts, unit) for unit in round_ones}
    return min(splits.values(), key=lambda shares: len(shares[0]))  # the first, largest unit wins


def _split(n: int, n_parts: int, unit: int) -> list[range]:
    """Splits into consecutive ranges of whole units, larger ones first; the last may be cut."""
    n_units = -(-n // unit)
    edges = [0]
    for part in range(n_parts):
        edges.append(edges[-1] + n_units // n_parts + (part < n_units % n_parts))
    return [range(a * unit, min(b * unit, n)) for a, b in pairwise(edges)]


def _listed(degrees: Sequence[int]) -> str:
    if degrees == [1]:
        return "only 1 works"
    return f"{', '.join(map(str, degrees[:-1]))} and {degrees[-1]} work"
