"""Vocabulary-parallel logits: argmax, top-k and log-softmax over ranks without gathering logits.

Each rank keeps the logits of its rows of the head. Ranks exchange one key per token for an argmax,
the k largest keys for top-k, or a logsumexp; only scoring that needs whole distributions gathers
log-probabilities.

A key is a value and its token id in one integer. Keys are ordered by value, and equal values by id,
the smallest first. Comparing integers is exact and the largest key is the same on every rank, so
all ranks select the same token.

Shape letters: V this rank's rows, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hotloop.parallel.collectives import Group

_LOW_WORD = 0xFFFFFFFF
_SMALLEST = torch.iinfo(torch.int64).min


class VocabularyShard:
    """A rank's shard of the vocabulary, and collectives on logits over all shards.

    Every method but ``selectable``, ``masked`` and ``scatter_mask`` is called by all ranks at the
    same time.

    Args:
        shards: Token ids of each rank's shard; that of rank 0 is the largest.
        n_tokens: Ids below this can be selected; further rows are padding.
        group: The ranks.

    Attributes:
        rows: Token ids of this rank's shard.
        ids: The rank's token ids that can be selected; at least one, so that the rank has an
            argmax.
    """

    def __init__(self, shards: Sequence[range], n_tokens: int, group: Group) -> None:
        self.shards, self.n_tokens, self.group = shards, n_tokens, group
        self.rows = rows = shards[group.rank]
        self._is_padding_only = rows.start >= n_tokens
        stop = rows.start + 1 if self._is_padding_only else min(rows.stop, n_tokens)
        self.ids = range(rows.start, stop)

    def selectable(self, x: Tensor) -> Tensor:
        """Selects ``ids`` of logits [..., rows]; minus infinity if the shard has only padding."""
        mine = x[..., : len(self.ids)]
        return torch.full_like(mine, -torch.inf) if self._is_padding_only else mine

    def masked(self, x: Tensor, bits: Tensor) -> Tensor:
        """Sets ids whose bit is zero to minus infinity.

        Args:
            x: Values of ``ids``, [..., V].
            bits: For each id of the whole vocabulary, and perhaps more, [..., at least n_tokens].
        """
        if self._is_padding_only:
            return x
        return x.masked_fill(bits[..., self.ids.start : self.ids.stop] == 0, -torch.inf)

    def amax(self, x: Tensor) -> Tensor:
        """Returns the maximum over all ranks' values [..., V], as [..., 1]."""
        return self.group.max(x.amax(dim=-1, keepdim=True))

    def argmax(self, x: Tensor) -> Tensor:
        """Returns the id of the maximum over all ranks' values [..., V], int64 [...].

        Of equal maxima it is the smallest id.
        """
        return self._largest(x)[1]

    def finite_argmax(self, logits: Tensor) -> Tensor:
        """Returns ``argmax``, or -1 where the maximum is not finite."""
        value, best = self._largest(logits)
        return best.where(value.abs() < torch.inf, -1)

    def _largest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the maximum over all ranks' values [..., V], and its smallest id, each [...]."""
        value, best = x.max(dim=-1)  # NaN if any value is NaN
        if self.group.size == 1:
            return value, best
        # The integer key of a NaN can be below that of any number.
        value = value.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        keys = self.group.max(_keys(value, best + self.rows.start))
        return _values(keys), _ids(keys)

    def topk(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Returns the ``k`` largest of all ranks' values [..., V], and their token ids.

        They are in descending order, ties by id; ``k`` is at most the number of ids.
        """
        keys = _keys(x, torch.arange(x.shape[-1], device=x.device) + self.rows.start)
        keys = keys.topk(min(k, keys.shape[-1])).values
        if self.group.size > 1:
            missing = min(k, len(self.shards[0])) - keys.shape[-1]
            keys = torch.nn.functional.pad(keys, (0, missing), value=_SMALLEST)
            keys = self.group.all_gather(keys).movedim(0, -2).flatten(-2).topk(k).values
        return _values(keys), _ids(keys)

    def scatter_mask(self, mask: Tensor, ids: Tensor) -> Tensor:
        """Scatters a mask of candidates to this rank's ids, bool [..., V]; False elsewhere.

        Args:
            mask: bool [..., K].
            ids: Token ids of the candidates, int64 [..., K].
        """
        n = len(self.ids)
        index = (ids - self.ids.start).clamp(-1, n) % (n + 1)  # n, dropped, for ids of other ranks
        scattered = mask.new_zeros(*mask.shape[:-1], n + 1).scatter_(-1, index, mask)
        return scattered[..., :n]

    def log_softmax(self, x: Tensor) -> Tensor:
        """Returns this rank's [..., V] of the log-softmax over all ranks' logits."""
        if self.group.size == 1:
            return x.log_softmax(dim=-1)
        parts = self.group.all_gather(x.logsumexp(dim=-1))
        return x - parts.logsumexp(dim=0)[..., None]

    def gather_at(self, x: Tensor, ids: Tensor) -> Tensor:
        """Gathers the values [...] of all ranks' [..., V] at token ids [...]."""
        index = ids - self.rows.start
        mine = (index >= 0) & (index < x.shape[-1])
        values = x.gather(-1, index.clamp(0, x.shape[-1] - 1)[..., None])[..., 0]
        return self.group.max(values.where(mine, -torch.inf))

    def gather_to_first(self, x: Tensor) -> Tensor | None:
        """Gathers all ranks' values [..., rows] on rank 0, concatenated; None on other ranks."""
        if self.group.size == 1:
            return x
        padded = torch.nn.functional.pad(x, (0, len(self.shards[0]) - x.shape[-1]))
        parts = self.group.gather_to_first(padded)
        if parts is None:
            return None
        pairs = zip(self.shards, parts, strict=True)
        return torch.cat([part[..., : len(shard)] for shard, part in pairs], dim=-1)


def _keys(values: Tensor, ids: Tensor) -> Tensor:
    """Returns int64 keys, ordered by float32 value, and equal values by descending id."""
    bits = (values + 0.0).view(torch.int32)  # minus zero equals zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (_LOW_WORD - ids)


def _values(keys: Tensor) -> Tensor:
    """Returns the float32 values of keys."""
    ordered = (keys >> 32).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _ids(keys: Tensor) -> Tensor:
    """Returns the token ids of keys."""
    return _LOW_WORD - (keys & _LOW_WORD)
