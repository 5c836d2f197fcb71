"""The rows of the head that a rank has, and what they say together with the other ranks'.

Logits stay where they are computed. What crosses over between ranks is one number per token to
choose, a rank's k best candidates, or the sum of its exponentials; only a whole distribution, when
somebody asks for it, is gathered.

A value and its token id travel as one integer, whose order is that of values, and of equal ones
that of ids, the smallest first. Comparing integers is exact, and the largest of them is the same on
every rank, so all ranks take the same token whatever rounding did before.

Shape letters: V this rank's rows, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hotloop.parallel.collectives import Group

_LOW = 0xFFFFFFFF
_NEVER = torch.iinfo(torch.int64).min


class Vocabulary:
    """The vocabulary as one rank sees it.

    Args:
        shares: Of each rank, the token ids whose logits it has; rank 0 has the most.
        n_tokens: Ids that may be chosen are below this; further rows are padding.
        group: The ranks.

    Attributes:
        rows: This rank's share.
        ids: This rank's ids that may be chosen; at least one, or it could not take part.
    """

    def __init__(self, shares: Sequence[range], n_tokens: int, group: Group) -> None:
        self.shares, self.n_tokens, self.group = shares, n_tokens, group
        self.rows = rows = shares[group.rank]
        self._padding_alone = rows.start >= n_tokens
        stop = rows.start + 1 if self._padding_alone else min(rows.stop, n_tokens)
        self.ids = range(rows.start, stop)

    def choosable(self, x: Tensor) -> Tensor:
        """Of [..., rows] what belongs to ``ids``; minus infinity if that is padding alone."""
        mine = x[..., : len(self.ids)]
        return torch.full_like(mine, -torch.inf) if self._padding_alone else mine

    def amax(self, x: Tensor) -> Tensor:
        """The largest value of all ranks' [..., V], as [..., 1]."""
        return self.group.max(x.amax(dim=-1, keepdim=True))

    def argmax(self, x: Tensor) -> Tensor:
        """The token id of the largest value of all ranks' [..., V]; of equal ones, the smallest."""
        return self._largest(x)[1]

    def choice(self, logits: Tensor) -> Tensor:
        """As ``argmax``, of what is to be chosen from; -1 where the largest is not finite."""
        value, best = self._largest(logits)
        return best.where(value.abs() < torch.inf, -1)

    def _largest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value, best = x.max(dim=-1)  # NaN where anything is
        if self.group.size == 1:
            return value, best
        # As an integer, NaN can be less than any number.
        value = value.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        keys = self.group.max(_keys(value, best + self.rows.start))
        return _values(keys), _ids(keys)

    def best(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` largest values of all ranks' [..., V], and their token ids.

        In order, equal ones by their ids; ``k`` is at most the ids there are.
        """
        keys = _keys(x, torch.arange(x.shape[-1], device=x.device) + self.rows.start)
        keys = keys.topk(min(k, keys.shape[-1])).values
        if self.group.size > 1:
            missing = min(k, len(self.shares[0])) - keys.shape[-1]
            keys = torch.nn.functional.pad(keys, (0, missing), value=_NEVER)
            keys = self.group.gather(keys).movedim(0, -2).flatten(-2).topk(k).values
        return _values(keys), _ids(keys)

    def mark(self, marked: Tensor, ids: Tensor) -> Tensor:
        """Which of this rank's ids are marked, bool [..., V].

        Args:
            marked: bool [..., K].
            ids: The token ids that the marks are of, int64 [..., K]; not marked where left out.
        """
        n = len(self.ids)
        place = (ids - self.ids.start).clamp(-1, n) % (n + 1)  # others' share the place after all
        marks = marked.new_zeros(*marked.shape[:-1], n + 1).scatter_(-1, place, marked)
        return marks[..., :n]

    def log_softmax(self, x: Tensor) -> Tensor:
        """Log-probabilities of this rank's [..., V] among all ranks'."""
        if self.group.size == 1:
            return x.log_softmax(dim=-1)
        parts = self.group.gather(x.logsumexp(dim=-1))
        return x - parts.logsumexp(dim=0)[..., None]

    def at(self, x: Tensor, ids: Tensor) -> Tensor:
        """The values [...] of all ranks' [..., V] at token ids [...]."""
        place = ids - self.rows.start
        mine = (place >= 0) & (place < x.shape[-1])
        values = x.gather(-1, place.clamp(0, x.shape[-1] - 1)[..., None])[..., 0]
        return self.group.max(values.where(mine, -torch.inf))

    def whole(self, x: Tensor) -> Tensor | None:
        """All ranks' [..., rows] side by side, on rank 0 alone."""
        if self.group.size == 1:
            return x
        padded = torch.nn.functional.pad(x, (0, len(self.shares[0]) - x.shape[-1]))
        parts = self.group.gather_to_first(padded)
        if parts is None:
            return None
        wide = zip(self.shares, parts, strict=True)
        return torch.cat([part[..., : len(share)] for share, part in wide], dim=-1)


def _keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 that sort as float32 values do, equal ones by descending ids."""
    bits = (values + 0.0).view(torch.int32)  # minus zero equals zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (_LOW - ids)


def _values(keys: Tensor) -> Tensor:
    ordered = (keys >> 32).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _ids(keys: Tensor) -> Tensor:
    return _LOW - (keys & _LOW)
