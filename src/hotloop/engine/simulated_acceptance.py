"""Simulates an acceptance rate, to time speculative decoding with random weights.

With random weights the model would accept almost no draft. So the step replaces its sampled tokens:
by the draft where the draft is to be accepted, and by another token where it is not. Each draft is
assumed to have one of two acceptance probabilities, a high one or a low one, since those of a real
drafter differ from draft to draft. A hash of the draft's position and of the newest token decides
which of them, and another hash decides by that probability whether the draft is accepted. So all
ranks decide alike, and chains of drafts end early where the probabilities are low (``chains``).

Shape letters: B rows, T positions of each, D drafts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assumed_probability(positions_BD: Tensor, newest_B1: Tensor, rate: float) -> Tensor:
    """Returns assumed probabilities of drafts, float32 [B, D], whose mean is ``rate``.

    A draft has the probability (3 + rate) / 4 with probability ``rate``, and otherwise rate / 4.

    Args:
        positions_BD: int64, the drafts' positions.
        newest_B1: int64, the newest token of each row, which the first draft follows.
        rate: The acceptance rate to simulate, from 0 to 1.
    """
    is_likely_BD = _uniform(positions_BD, newest_B1, 0x27D4EB2F) < rate
    return torch.where(is_likely_BD, (3 + rate) / 4, rate / 4).float()


def simulate_acceptance(
    ids_BT: Tensor, drafts_BD: Tensor, input_BT: Tensor, positions_BT: Tensor, rate: float
) -> Tensor:
    """Replaces sampled tokens so that each draft is accepted with its assumed probability.

    Args:
        ids_BT: int64, the sampled tokens.
        drafts_BD: int64, negative for none.
        input_BT: int64, the input of the step: the newest token and the drafts of each row.
        positions_BT: int64, the positions of ``input_BT``.
        rate: The acceptance rate to simulate, from 0 to 1.

    Returns:
        The tokens to keep instead of ``ids_BT``, int64 [B, T].
    """
    hashed = positions_BT[:, 1:], input_BT[:, :1]
    kept_BD = _uniform(*hashed) < assumed_probability(*hashed, rate)
    sampled_BD = ids_BT[:, :-1]
    other_BD = torch.where(sampled_BD == drafts_BD, (drafts_BD - 1).abs(), sampled_BD)
    kept_BD = kept_BD & (drafts_BD >= 0) & (sampled_BD >= 0)
    return torch.cat((torch.where(kept_BD, drafts_BD, other_BD), ids_BT[:, -1:]), dim=1)


def _uniform(positions_BD: Tensor, newest_B1: Tensor, key: int = 0) -> Tensor:
    """Hashes positions and tokens to numbers in [0, 1), float64 [B, D]."""
    mixed_BD = positions_BD * 0x9E3779B1 + newest_B1 * 0x85EBCA77 + key
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the finalizer of MurmurHash3
        mixed_BD = mixed_BD & 0xFFFFFFFF
        mixed_BD = (mixed_BD ^ (mixed_BD >> shift)) * factor
    mixed_BD = mixed_BD & 0xFFFFFFFF
    return (mixed_BD ^ (mixed_BD >> 16)).double() * 2**-32
