"""Choosing the next token, on the device, for every slot by its own options.

A draw is a pure function of the seed, the position and the logits: each token id gets a Gumbel
number hashed from (seed, position, id), and the largest sum of logit and Gumbel number wins, which
is an exact draw from the softmax (Gumbel-max; Maddison et al. 2014). So there is no generator to
keep, a run can be repeated, and neighbours in the batch cannot matter.

What nobody in the batch asked for is not computed; ``Features`` says what somebody did.

Shape letters: B rows sampled, S slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hotloop.types import MAX_LOGPROBS, SamplingParams

_WORD = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Features:
    """What the sampler must be able to do for the requests at hand.

    Attributes:
        draw: Somebody does not decode greedily.
        truncate: Somebody uses top-k, top-p or min-p.
        penalize: Somebody uses a repetition penalty.
        logprobs: Somebody wants log-probabilities.
    """

    draw: bool = False
    truncate: bool = False
    penalize: bool = False
    logprobs: bool = False

    @classmethod
    def of(cls, requests: Iterable[SamplingParams]) -> Features:
        """The features that these requests need together."""
        requests = list(requests)
        drawn = [p for p in requests if not p.greedy]
        return cls(
            draw=bool(drawn),
            truncate=any(p.top_k or p.top_p < 1 or p.min_p for p in drawn),
            penalize=any(p.repetition_penalty != 1 for p in requests),
            logprobs=any(p.logprobs is not None for p in requests),
        )


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What a step gives: tokens, and log-probabilities where they were asked for.

    Attributes:
        ids: int64 [B].
        logprobs: float32 [B], of those tokens; None without the feature.
        top_logprobs: float32 [B, MAX_LOGPROBS], most likely first; fewer where V is smaller.
        top_ids: int64, as many.
    """

    ids: Tensor
    logprobs: Tensor | None = None
    top_logprobs: Tensor | None = None
    top_ids: Tensor | None = None


class Sampler:
    """The options of every slot as device tensors, and the choice itself.

    Args:
        n_slots: Slots of the cache.
        vocab_size: Token ids that may be chosen are below this; further logits are padding.
        device: Where logits are.
    """

    def __init__(self, n_slots: int, vocab_size: int, device: torch.device) -> None:
        def per_slot(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((n_slots,), value, dtype=dtype, device=device)

        self.temperature = per_slot(0, torch.float32)
        self.top_k = per_slot(vocab_size, torch.int64)
        self.top_p = per_slot(1, torch.float32)
        self.min_p = per_slot(0, torch.float32)
        self.penalty = per_slot(1, torch.float32)
        self.seed = per_slot(0, torch.int64)
        self.seen_SV = torch.zeros(n_slots, vocab_size, dtype=torch.bool, device=device)
        self.vocab_size = vocab_size

    def admit(self, slot: int, params: SamplingParams, seed: int, prompt_ids: Tensor) -> None:
        """Puts a request's options, and the tokens its penalty is about, into a slot."""
        self.temperature[slot] = params.temperature
        self.top_k[slot] = min(params.top_k or self.vocab_size, self.vocab_size)
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.penalty[slot] = params.repetition_penalty
        self.seed[slot] = seed
        if params.repetition_penalty != 1:
            self.seen_SV[slot] = False
            self.seen_SV[slot, prompt_ids[prompt_ids < self.vocab_size]] = True

    def sample(
        self, logits_BV: Tensor, positions_B: Tensor, first_slot: int, features: Features
    ) -> Sampled:
        """Chooses a token per row; row b belongs to slot ``first_slot + b``.

        Args:
            logits_BV: float32, as the model gave them.
            positions_B: The position that each chosen token will have.
            first_slot: The slot of the first row.
            features: What to compute.
        """
        here = slice(first_slot, first_slot + logits_BV.shape[0])
        scores_BV = logits_BV[:, : self.vocab_size]
        if features.penalize:
            penalty_B1 = self.penalty[here, None]
            penalized = torch.where(scores_BV > 0, scores_BV / penalty_B1, scores_BV * penalty_B1)
            scores_BV = torch.where(self.seen_SV[here], penalized, scores_BV)
        ids_B = scores_BV.argmax(dim=-1)
        if features.draw:
            drawn_B = self._draw(scores_BV, positions_B, here, features)
            ids_B = torch.where(self.temperature[here] > 0, drawn_B, ids_B)
        if features.penalize:
            self.seen_SV[here].scatter_(1, ids_B[:, None], True)
        if not features.logprobs:
            return Sampled(ids=ids_B)
        # The model's own distribution, as scoring has it: padding has its share of that.
        logprobs_BV = logits_BV.log_softmax(dim=-1)[:, : self.vocab_size]
        top, top_ids = logprobs_BV.topk(min(MAX_LOGPROBS, self.vocab_size), dim=-1)
        chosen = logprobs_BV.gather(1, ids_B[:, None])[:, 0]
        return Sampled(ids=ids_B, logprobs=chosen, top_logprobs=top, top_ids=top_ids)

    def _draw(
        self, scores_BV: Tensor, positions_B: Tensor, here: slice, features: Features
    ) -> Tensor:
        temperature_B1 = self.temperature[here, None]
        # Differences to the largest: however low the temperature, they do not overflow upwards.
        scaled_BV = scores_BV - scores_BV.amax(dim=-1, keepdim=True)
        scaled_BV = scaled_BV / torch.where(temperature_B1 > 0, temperature_B1, 1.0)
        if features.truncate:
            scaled_BV = scaled_BV.where(self._kept(scaled_BV, here), -torch.inf)
        return (scaled_BV + _gumbel(self.seed[here], positions_B, self.vocab_size)).argmax(dim=-1)

    def _kept(self, scaled_BV: Tensor, here: slice) -> Tensor:
        """Which tokens top-k, top-p and min-p leave, bool [B, V]: all of a row without any."""
        sorted_BV, order_BV = scaled_BV.sort(dim=-1, descending=True, stable=True)
        rank_V = torch.arange(self.vocab_size, device=scaled_BV.device)
        kept_BV = rank_V < self.top_k[here, None]
        probabilities_BV = sorted_BV.where(kept_BV, -torch.inf).softmax(dim=-1)
        # A token stays while the sum *before* it is short of top_p: the first always does. Rounded
        # sums can reach 1 before the end, but top_p = 1 keeps what follows, too.
        before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
        top_p_B1 = self.top_p[here, None]
        kept_BV = kept_BV & ((before_BV < top_p_B1) | (top_p_B1 == 1))
        kept_BV = kept_BV & (probabilities_BV >= self.min_p[here, None] * probabilities_BV[:, :1])
        kept_BV = kept_BV | (rank_V == 0)
        return torch.empty_like(kept_BV).scatter_(1, order_BV, kept_BV)


def _gumbel(seed_B: Tensor, positions_B: Tensor, vocab_size: int) -> Tensor:
    """Gumbel numbers, float32 [B, V], a pure function of (seed, position, token id)."""
    key_B = _mix((seed_B & _WORD) ^ 0x9E3779B9)
    key_B = _mix(key_B ^ (seed_B >> 32))
    key_B = _mix(key_B ^ (positions_B & _WORD))
    ids_V = torch.arange(vocab_size, device=seed_B.device)
    words_BV = _mix(key_B[:, None] ^ _mix(ids_V + 1))
    # -log1p(-u) is fine-grained where it decides: at small u, which make large Gumbel numbers.
    # Never 1, which the largest words are rounded to: minus infinity could tie with what is masked.
    uniform_BV = ((words_BV.float() + 0.5) * 2**-32).clamp_(max=1 - 2**-24)
    return -torch.log(-torch.log1p(-uniform_BV))


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every bit affects every other (Wellons' lowbias32)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)
