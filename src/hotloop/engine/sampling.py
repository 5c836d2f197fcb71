"""Samples the next tokens on the device, with the options of each row.

Sampling is a pure function of seed, position and logits: each token id gets a Gumbel number hashed
from (seed, position, id), and the id with the largest sum of logit and Gumbel number is an exact
sample of the softmax (Gumbel-max; Maddison et al. 2014). There is no generator state, runs are
reproducible, and a row does not depend on the rest of the batch.

Only the ``Features`` that requests of a step need are computed.

With fused steps on one rank, one kernel samples (``kernels.cuda.sample``) in place of some sixty of
PyTorch's; the code here is its specification.

With several ranks, each has the logits of its shard of the vocabulary, and all select the same
tokens (``vocabulary``).

Shape letters: B sequences, T consecutive positions of each, D drafts, R rows, V vocabulary (this
rank's), K candidates.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hotloop.engine.core import Features
from hotloop.engine.rows import to_device
from hotloop.engine.vocabulary import VocabularyShard
from hotloop.kernels.cuda.launch import Launcher
from hotloop.kernels.cuda.sample import sample
from hotloop.parallel.collectives import Group
from hotloop.types import MAX_LOGPROBS, SamplingParams

_WORD = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The tokens of a step, and their log-probabilities if requested.

    Attributes:
        ids: int64 [B, T]; -1 where the logits are not finite.
        n_kept: int64 [B], the number of tokens of each row that are accepted; None for all.
        n_drafts: int64 [B], the number of drafts of each row; None in a step without drafts.
        logprobs: float32 [B, T], log-probabilities of ``ids``; None without the feature.
        top_logprobs: float32 [B, T, MAX_LOGPROBS], most likely first; fewer if the vocabulary is
            smaller.
        top_ids: int64, the token ids of ``top_logprobs``.
    """

    ids: Tensor
    n_kept: Tensor | None = None
    n_drafts: Tensor | None = None
    logprobs: Tensor | None = None
    top_logprobs: Tensor | None = None
    top_ids: Tensor | None = None

    @staticmethod
    def joined(steps: Sequence[Sampled]) -> Sampled:
        """Concatenates consecutive steps without drafts."""
        if len(steps) == 1:
            return steps[0]
        of_each = [vars(step) for step in steps]
        tensors = {
            name: torch.cat([step[name] for step in of_each], dim=1)
            for name, value in of_each[0].items()
            if value is not None
        }
        return Sampled(**tensors)

    def map(self, f: Callable[[Tensor], Tensor]) -> Sampled:
        """Applies ``f`` to each of the tensors."""
        tensors = {name: value for name, value in vars(self).items() if value is not None}
        return Sampled(**{name: f(tensor) for name, tensor in tensors.items()})


class Sampler:
    """Samples tokens with the options of every row, which it keeps in device tensors.

    Args:
        n_rows: Rows of the largest step.
        vocab_size: Token ids below this can be selected; further logits are padding.
        device: The device of the logits.
        vocabulary: This rank's shard of the vocabulary; None for the whole.
        launcher: Launches the CUDA kernel; None uses plain PyTorch, which several ranks need.
    """

    def __init__(
        self,
        n_rows: int,
        vocab_size: int,
        device: torch.device,
        vocabulary: VocabularyShard | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        self.vocabulary = vocabulary or VocabularyShard([range(vocab_size)], vocab_size, Group())
        self._launcher = launcher
        alone = self.vocabulary.group.size == 1
        assert alone or launcher is None, "the kernel samples from unsharded logits"

        def per_row(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((n_rows,), value, dtype=dtype, device=device)

        self.temperature = per_row(0, torch.float32)
        self.top_k = per_row(vocab_size, torch.int64)
        self.top_p = per_row(1, torch.float32)
        self.min_p = per_row(0, torch.float32)
        self.penalty = per_row(1, torch.float32)
        self.seed = per_row(0, torch.int64)
        width = max(vocab_size, self.vocabulary.ids.stop)
        self.seen_RV = torch.zeros(n_rows, width, dtype=torch.bool, device=device)
        self.vocab_size = vocab_size

    def of_whole_vocabulary(self) -> Sampler:
        """Returns a sampler that shares the rows' options, for logits that are not sharded."""
        other = copy.copy(self)
        other.vocabulary = VocabularyShard([range(self.vocab_size)], self.vocab_size, Group())
        return other

    def relevant(self, features: Features) -> Features:
        """Drops features that select no other program: the kernel handles every truncation."""
        if self._launcher is None:
            return features
        return dataclasses.replace(features, truncate=False, n_candidates=0)

    def admit(self, row: int, params: SamplingParams, seed: int, prompt_ids: Sequence[int]) -> None:
        """Sets a row's options, and the prompt tokens that its repetition penalty applies to."""
        self.temperature[row] = params.temperature
        self.top_k[row] = min(params.top_k or self.vocab_size, self.vocab_size)
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.penalty[row] = params.repetition_penalty
        self.seed[row] = seed
        if params.repetition_penalty != 1:
            self.seen_RV[row] = False
            seen = [i for i in set(prompt_ids) if i < self.vocab_size]
            self.seen_RV[row].index_fill_(0, to_device(seen, self.seen_RV.device), True)

    def move(self, source: int, target: int) -> None:
        """Copies a row's options and penalized tokens into another row."""
        for of_rows in (
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.penalty,
            self.seed,
            self.seen_RV,
        ):
            of_rows[target] = of_rows[source]

    def sample(
        self,
        logits_BTV: Tensor,
        positions_BT: Tensor | None,
        first_row: int,
        features: Features,
        drafts_BD: Tensor | None = None,
        *,
        best_BT: Tensor | None = None,
    ) -> Sampled:
        """Samples a token at every position; sequence b is in row ``first_row + b``.

        Args:
            logits_BTV: float32, the model's logits of this rank's shard.
            positions_BT: Position of each sampled token; None if every row is greedy.
            first_row: The row of the first sequence.
            features: The features that these rows need.
            drafts_BD: int64, draft tokens, negative for none. For the repetition penalty, position
                t of T is conditioned on the first t + D - T + 1 of them.
            best_BT: Argmax of the logits over ids that can be selected, -1 where that is not
                finite; None if it has not been computed.
        """
        B, T, _ = logits_BTV.shape
        here, vocabulary = slice(first_row, first_row + B), self.vocabulary
        scores_BTV = vocabulary.selectable(logits_BTV)
        if features.penalize:
            penalty_B11 = self.penalty[here, None, None]
            penalized = torch.where(
                scores_BTV > 0, scores_BTV / penalty_B11, scores_BTV * penalty_B11
            )
            scores_BTV = torch.where(self._seen(here, T, drafts_BD), penalized, scores_BTV)
        if best_BT is None or features.penalize:
            best_BT = vocabulary.finite_argmax(scores_BTV)
        ids_BT = best_BT
        if features.draw:
            assert positions_BT is not None, "sampling depends on the position"
            if self._launcher is not None:
                ids_BT = self._launch(self._launcher, scores_BTV, best_BT, positions_BT, here)
            else:
                drawn_BT = self._draw(scores_BTV, positions_BT, here, features)
                is_drawn_BT = (self.temperature[here, None] > 0) & (best_BT >= 0)
                ids_BT = torch.where(is_drawn_BT, drawn_BT, best_BT)
        if not features.logprobs:
            return Sampled(ids=ids_BT)
        # The model's own distribution, as in scoring, which includes padding.
        logprobs_BTV = vocabulary.selectable(vocabulary.log_softmax(logits_BTV))
        top, top_ids = vocabulary.topk(logprobs_BTV, min(MAX_LOGPROBS, self.vocab_size))
        chosen = vocabulary.gather_at(logprobs_BTV, ids_BT)
        return Sampled(ids=ids_BT, logprobs=chosen, top_logprobs=top, top_ids=top_ids)

    def remember(self, ids_BT: Tensor, first_row: int) -> None:
        """Adds tokens of the answer to those that the repetition penalty applies to."""
        seen_BV = self.seen_RV[first_row : first_row + len(ids_BT)]
        seen_BV.scatter_(1, ids_BT.clamp(min=0), True)  # -1: the row has failed, any id does

    def _seen(self, here: slice, T: int, drafts_BD: Tensor | None) -> Tensor:
        """Returns a mask of the tokens penalized at each position, bool [B, T, V]."""
        ids = self.vocabulary.ids
        seen_BTV = self.seen_RV[here, None].repeat(1, T, 1)
        if drafts_BD is None:
            return seen_BTV[..., ids.start : ids.stop]
        D = drafts_BD.shape[1]
        for d in range(D):
            later = seen_BTV[:, max(0, T - D + d) :]
            index = drafts_BD[:, d, None, None].clamp(min=0).expand(-1, later.shape[1], 1)
            later.scatter_(2, index, True)
        return seen_BTV[..., ids.start : ids.stop]

    def _launch(
        self,
        launcher: Launcher,
        scores_BTV: Tensor,
        best_BT: Tensor,
        positions_BT: Tensor,
        here: slice,
    ) -> Tensor:
        """Samples with the kernel, as ``_draw``; greedy or non-finite rows keep ``best_BT``."""
        ids_BT = torch.empty_like(best_BT, memory_format=torch.contiguous_format)
        call = sample(
            scores_BTV,
            best_BT.contiguous(),
            positions_BT.contiguous(),
            ids_BT,
            temperature_B=self.temperature[here],
            top_k_B=self.top_k[here],
            top_p_B=self.top_p[here],
            min_p_B=self.min_p[here],
            seed_B=self.seed[here],
        )
        launcher.prepare(call, dependent=False)()  # torch launched its predecessor
        return ids_BT

    def _draw(
        self, scores_BTV: Tensor, positions_BT: Tensor, here: slice, features: Features
    ) -> Tensor:
        """Samples in plain PyTorch, after temperature and truncation."""
        temperature_B11 = self.temperature[here, None, None]
        # Differences to the maximum cannot overflow to infinity at a low temperature.
        scaled_BTV = scores_BTV - self.vocabulary.amax(scores_BTV)
        scaled_BTV = scaled_BTV / torch.where(temperature_B11 > 0, temperature_B11, 1.0)
        if features.truncate:
            scaled_BTV = scaled_BTV.where(self._kept(scaled_BTV, here, features), -torch.inf)
        ids = self.vocabulary.ids
        gumbel_BTV = _gumbel(self.seed[here], positions_BT, len(ids), ids.start)
        return self.vocabulary.argmax(scaled_BTV + gumbel_BTV)

    def _kept(self, scaled_BTV: Tensor, here: slice, features: Features) -> Tensor:
        """Returns the mask of tokens that pass top-k, top-p and min-p, bool [B, T, V].

        ``scaled_BTV`` is 0 for the most likely token, which always passes.
        """
        kept_BTV = scaled_BTV.exp() >= self.min_p[here, None, None]
        if features.n_candidates == 0:
            return kept_BTV
        n_candidates = min(features.n_candidates or self.vocab_size, self.vocab_size)
        best_BTK, ids_BTK = self.vocabulary.topk(scaled_BTV, n_candidates)
        top_k_B11, top_p_B11 = self.top_k[here, None, None], self.top_p[here, None, None]
        # Cumulative sums from the most likely token on do not depend on the number of candidates.
        weights_BTK = best_BTK.exp()
        sums_BTK = weights_BTK.cumsum(dim=-1)
        last_BT1 = (top_k_B11.clamp(max=n_candidates) - 1).expand(*sums_BTK.shape[:2], 1)
        reached_BTK = sums_BTK - weights_BTK
        # A token passes if the sum *before* it is below top_p, as it is for the first. Rounded sums
        # can reach 1 before the last token, but top_p = 1 keeps every token.
        among_BTK = (reached_BTK < top_p_B11 * sums_BTK.gather(2, last_BT1)) | (top_p_B11 == 1)
        among_BTK &= torch.arange(n_candidates, device=best_BTK.device) < top_k_B11
        unranked_B11 = (top_k_B11 == self.vocab_size) & (top_p_B11 == 1)
        return kept_BTV & (self.vocabulary.scatter_mask(among_BTK, ids_BTK) | unranked_B11)


def _gumbel(seed_B: Tensor, positions_BT: Tensor, n: int, first: int = 0) -> Tensor:
    """Returns the Gumbel numbers of ``n`` token ids from ``first`` on, float32 [B, T, n].

    Each is a pure function of (seed, position, token id).
    """
    key_B = _mix((seed_B & _WORD) ^ 0x9E3779B9)
    key_B = _mix(key_B ^ (seed_B >> 32))
    key_BT = _mix(key_B[:, None] ^ (positions_BT & _WORD))
    ids_V = torch.arange(first, first + n, device=seed_B.device)
    words_BTV = _mix(key_BT[..., None] ^ _mix(ids_V + 1))
    # -log1p(-u) is precise at small u, which give the large Gumbel numbers that decide. Clamping
    # avoids u = 1, to which the largest words round: minus infinity could tie with a masked token.
    uniform_BTV = ((words_BTV.float() + 0.5) * 2**-32).clamp_(max=1 - 2**-24)
    return -torch.log(-torch.log1p(-uniform_BTV))


def _mix(x: Tensor) -> Tensor:
    """Hashes 32-bit words by a bijection with full avalanche (Wellons' lowbias32)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)
