"""Samples the next tokens on the device, with the options of each row.

Sampling is a pure function of seed, position and logits: each token id gets a Gumbel number hashed
from (seed, position, id), and the id with the largest sum of logit and Gumbel number is an exact
sample of the softmax (Gumbel-max; Maddison et al. 2014). There is no generator state, runs are
reproducible, and a row does not depend on the rest of the batch.

Only the ``Features`` that requests of a step need are computed.

With fused steps on one rank, one kernel (``kernels.cuda.sample``) replaces some sixty kernels of
PyTorch; the code here is its specification.

With several ranks, each has the logits of its shard of the vocabulary, and all select the same
tokens (``vocabulary``).

Shape letters: B sequences, T consecutive positions of each, D drafts, R rows, V vocabulary (this
rank's), K candidates.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
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

_MIN_TOP_P = torch.finfo(torch.float32).tiny
"""The smallest top-p. Rows hold top-p in float32: if a smaller value were rounded to 0, no token
would pass, not even the most likely one."""


FEW_CANDIDATES = (256, 4096)
"""Numbers of most likely tokens to which top-p is applied on a CPU, one after the other, before it
is applied to the whole vocabulary."""


SPARSE_DIVISOR = 8
"""If at most one token in this many passes top-k, top-p and min-p, a CPU computes the Gumbel
numbers of these tokens only."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The tokens of a step, and their log-probabilities if requested.

    Attributes:
        ids: int64 [B, T]; -1 where the logits are not finite.
        n_kept: int64 [B], the number of accepted tokens of each row; None for all. For several
            steps with drafts, [B, steps]: every step has an equal share of the T tokens.
        n_drafts: The number of drafts of each row, shaped like ``n_kept``; None without drafts.
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
        """Concatenates consecutive steps that have the same number of drafts."""
        if len(steps) == 1:
            return steps[0]
        of_each = [vars(step) for step in steps]
        tensors = {
            name: (torch.stack if value.dim() == 1 else torch.cat)(
                [step[name] for step in of_each], dim=1
            )
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

        # The options of a row are a column of each tensor, so that one copy sets them.
        numbers, counts = (0, 1, 0, 1, 0, 0), (vocab_size, 0, 0)
        self._numbers = torch.tensor(numbers, dtype=torch.float32)[:, None].repeat(1, n_rows)
        self._counts = torch.tensor(counts)[:, None].repeat(1, n_rows)
        self._numbers, self._counts = self._numbers.to(device), self._counts.to(device)
        (
            self.temperature,
            self.top_p,
            self.min_p,
            self.penalty,
            self.presence,
            self.frequency,
        ) = self._numbers
        # first_end: the first position at which ``min_new_tokens`` allows an end-of-sequence token.
        self.top_k, self.seed, self.first_end = self._counts
        # Mask words are read as bytes, lowest first: bit i of byte j is for token id 8 j + i.
        self._bits_of_byte = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8).to(device)
        width = max(vocab_size, self.vocabulary.ids.stop)

        def per_token(dtype: torch.dtype) -> Tensor:
            return torch.zeros(n_rows, width, dtype=dtype, device=device)

        # Tokens of the prompt and the answer so far; how often the answer has each; the bias of
        # each; and the end-of-sequence tokens, for ``min_new_tokens``.
        self.seen_RV, self.counts_RV = per_token(torch.bool), per_token(torch.int32)
        self.bias_RV, self.ends_RV = per_token(torch.float32), per_token(torch.bool)
        # Rows whose biases or end tokens may have been set. The rest of a row's state has no effect
        # as long as its penalties are neutral.
        self._adjusting: set[int] = set()
        self.vocab_size = vocab_size

    @property
    def penalty_state(self) -> tuple[Tensor, ...]:
        """The tensors that ``update_penalties`` changes."""
        return self.seen_RV, self.counts_RV

    def of_whole_vocabulary(self) -> Sampler:
        """Returns a sampler that shares the rows' options, for logits that are not sharded."""
        other = copy.copy(self)
        other.vocabulary = VocabularyShard([range(self.vocab_size)], self.vocab_size, Group())
        return other

    def relevant(self, features: Features) -> Features:
        """Drops features that need no program of their own: the kernel handles every truncation."""
        if self._launcher is None:
            return features
        return dataclasses.replace(features, truncate=False, n_candidates=0)

    def admit(
        self,
        row: int,
        params: SamplingParams,
        seed: int,
        prompt_ids: Sequence[int],
        eos_ids: Collection[int] = (),
    ) -> None:
        """Sets a row's options, and the tokens to which they apply.

        Args:
            row: The row.
            params: Its options.
            seed: Its seed.
            prompt_ids: The prompt, to whose tokens the repetition penalty applies.
            eos_ids: Tokens that cannot be selected before ``min_new_tokens``.
        """
        numbers = (
            params.temperature,
            max(params.top_p, _MIN_TOP_P),
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        top_k = min(params.top_k or self.vocab_size, self.vocab_size)
        counts = (top_k, seed, len(prompt_ids) + params.min_new_tokens)
        # Not ``tensor[row] = number``, which waits until the device is idle.
        self._numbers[:, row] = to_device(numbers, self._numbers.device, torch.float32)
        self._counts[:, row] = to_device(counts, self._counts.device)
        if row in self._adjusting or params.adjusts_logits:
            for tensor_RV in self._token_tensors:
                tensor_RV[row].zero_()
        self._adjusting.discard(row)
        if not params.adjusts_logits:
            return
        self._adjusting.add(row)
        if params.repetition_penalty != 1:
            self.seen_RV[row].index_fill_(0, self._ids(set(prompt_ids)), True)
        if params.min_new_tokens:
            self.ends_RV[row].index_fill_(0, self._ids(eos_ids), True)
        if params.logit_bias:
            biases = {i: bias for i, bias in params.logit_bias if i < self.vocab_size}
            values = to_device(list(biases.values()), self.bias_RV.device, torch.float32)
            self.bias_RV[row].index_copy_(0, self._ids(biases), values)

    def move(self, source: int, target: int) -> None:
        """Copies a row's options, and the tokens to which they apply, into another row."""
        for options in (self._numbers, self._counts):
            options[:, target] = options[:, source]
        if self._adjusting & {source, target}:
            for tensor_RV in self._token_tensors:
                tensor_RV[target] = tensor_RV[source]
        self._adjusting.discard(target)
        if source in self._adjusting:
            self._adjusting.add(target)

    @property
    def _token_tensors(self) -> tuple[Tensor, ...]:
        """The tensors with an entry for each token id of each row."""
        return self.seen_RV, self.counts_RV, self.bias_RV, self.ends_RV

    def _ids(self, ids: Iterable[int]) -> Tensor:
        """Copies token ids to the device, without those that cannot be selected."""
        return to_device([i for i in ids if i < self.vocab_size], self.seen_RV.device)

    def sample(
        self,
        logits_BTV: Tensor,
        positions_BT: Tensor | None,
        first_row: int,
        features: Features,
        drafts_BD: Tensor | None = None,
        *,
        best_BT: Tensor | None = None,
        masks_BTW: Tensor | None = None,
    ) -> Sampled:
        """Samples a token at every position, greedily in rows whose temperature is 0.

        Sequence b is in row ``first_row + b``.

        Args:
            logits_BTV: float32, the model's logits of this rank's shard.
            positions_BT: Position of each sampled token; None if no feature depends on it.
            first_row: The row of the first sequence.
            features: The features that these rows need.
            drafts_BD: int64, draft tokens, negative for none. Penalties at position t of T count
                the first t + D - T + 1 drafts as tokens of the answer.
            best_BT: Argmax of the logits over ids that can be selected, -1 where the maximum is not
                finite; None if it has not been computed.
            masks_BTW: int32, bit masks of the tokens that grammars allow, of the whole vocabulary:
                bit i of word w is for id 32 w + i. None allows all.
        """
        here = slice(first_row, first_row + len(logits_BTV))
        vocabulary = self.vocabulary
        scores_BTV = vocabulary.selectable(logits_BTV)
        if masks_BTW is not None:
            bits = masks_BTW.view(torch.uint8)[..., None] & self._bits_of_byte
            scores_BTV = vocabulary.masked(scores_BTV, bits.flatten(-2))
        if features.adjust:
            assert positions_BT is not None, "min_new_tokens depends on the position"
            scores_BTV = self._adjusted(scores_BTV, positions_BT, here, drafts_BD)
        if best_BT is None or features.adjust or masks_BTW is not None:
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

    def probability(self, logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
        """Returns the probability of tokens by the model's own distribution, float32 [B, T].

        An id of -1 (the logits are not finite) has probability 0. Every rank gets the same bits.
        """
        logprobs_BT = self.vocabulary.gather_at(self.vocabulary.log_softmax(logits_BTV), ids_BT)
        return logprobs_BT.exp().where(ids_BT >= 0, 0.0)

    def update_penalties(
        self, ids_BT: Tensor, first_row: int, n_kept_B: Tensor | None = None
    ) -> None:
        """Adds tokens of the answer to the tokens to which penalties apply.

        Args:
            ids_BT: int64, the tokens; -1 where the logits were not finite.
            first_row: The row of the first sequence.
            n_kept_B: int64, the number of tokens of each row that are accepted; None for all.
        """
        ids_BT = ids_BT.clamp(min=0)  # -1: the row has failed, any id does
        kept_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        if n_kept_B is not None:
            kept_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < n_kept_B[:, None]
        here = slice(first_row, first_row + len(ids_BT))
        self.seen_RV[here].scatter_(1, ids_BT.where(kept_BT, ids_BT[:, :1]), True)
        self.counts_RV[here].scatter_add_(1, ids_BT, kept_BT.int())

    def _adjusted(
        self, scores_BTV: Tensor, positions_BT: Tensor, here: slice, drafts_BD: Tensor | None
    ) -> Tensor:
        """Applies biases, penalties and ``min_new_tokens``; other rows keep their bits."""
        T, ids = scores_BTV.shape[1], self.vocabulary.ids
        mine = slice(ids.start, ids.stop)
        seen_BTV, counts_BTV = self._seen(here, T, drafts_BD)
        scores_BTV = scores_BTV + self.bias_RV[here, None, mine]
        penalty_B11 = self.penalty[here, None, None]
        penalized = torch.where(scores_BTV > 0, scores_BTV / penalty_B11, scores_BTV * penalty_B11)
        scores_BTV = torch.where(seen_BTV[..., mine], penalized, scores_BTV)
        counts_BTV = counts_BTV[..., mine]
        scores_BTV = scores_BTV - self.frequency[here, None, None] * counts_BTV
        scores_BTV = scores_BTV - self.presence[here, None, None] * (counts_BTV > 0)
        early_BT = positions_BT < self.first_end[here, None]
        return scores_BTV.masked_fill(
            early_BT[..., None] & self.ends_RV[here, None, mine], -torch.inf
        )

    def _seen(self, here: slice, T: int, drafts_BD: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the tokens so far at each position, and their counts in the answer, [B, T, V]."""
        seen_BTV, counts_BTV = (
            tensor_RV[here, None].repeat(1, T, 1) for tensor_RV in (self.seen_RV, self.counts_RV)
        )
        if drafts_BD is not None:
            D = drafts_BD.shape[1]
            for d in range(D):
                later = slice(max(0, T - D + d), T)
                shape = -1, later.stop - later.start, 1
                index = drafts_BD[:, d, None, None].clamp(min=0).expand(shape)
                seen_BTV[:, later].scatter_(2, index, True)
                counts_BTV[:, later].scatter_add_(2, index, torch.ones_like(index).int())
        return seen_BTV, counts_BTV

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
        seed_B, ids = self.seed[here], self.vocabulary.ids
        if features.truncate:
            kept_BTV = self._kept(scaled_BTV, here, features)
            scaled_BTV = scaled_BTV.where(kept_BTV, -torch.inf)
            if self._reads_candidates:
                at = kept_BTV.nonzero(as_tuple=True)
                if len(at[0]) <= kept_BTV.numel() // SPARSE_DIVISOR:
                    values = scaled_BTV[at] + _gumbel_of(_keys(seed_B, positions_BT)[at[:2]], at[2])
                    return self.vocabulary.argmax(scaled_BTV.index_put(at, values))
        gumbel_BTV = _gumbel(seed_B, positions_BT, len(ids), ids.start)
        return self.vocabulary.argmax(scaled_BTV + gumbel_BTV)

    def _kept(self, scaled_BTV: Tensor, here: slice, features: Features) -> Tensor:
        """Returns the mask of tokens that pass top-k, top-p and min-p, bool [B, T, V].

        ``scaled_BTV`` is 0 for the most likely token, which always passes.
        """
        weights_BTV = scaled_BTV.exp()
        kept_BTV = weights_BTV >= self.min_p[here, None, None]
        if features.n_candidates == 0:
            return kept_BTV
        top_k_B11, top_p_B11 = self.top_k[here, None, None], self.top_p[here, None, None]
        is_whole_B11 = top_k_B11 == self.vocab_size
        unranked_B11 = is_whole_B11 & (top_p_B11 == 1)
        ignored_B11 = unranked_B11 | (self.temperature[here, None, None] == 0)
        *fewer, most = self._numbers_of_candidates(features)
        # In the order of ids, so that it does not depend on the number of candidates.
        whole_BT1 = weights_BTV.cumsum(dim=-1)[..., -1:] if fewer else None

        def passing(n: int) -> tuple[Tensor, Tensor | None]:
            """Returns which of the n most likely tokens pass, and whether all others fail.

            The second is a bool tensor; None for the largest n, where there is nothing to decide.
            """
            best_BTK, ids_BTK = self.vocabulary.topk(scaled_BTV, n)
            # Sums from the most likely token on do not depend on the number of candidates either.
            sums_BTK = best_BTK.exp().cumsum(dim=-1)
            last_BT1 = (top_k_B11.clamp(max=n) - 1).expand(*sums_BTK.shape[:2], 1)
            limit_BT1 = top_p_B11 * sums_BTK.gather(2, last_BT1)
            if whole_BT1 is not None:
                limit_BT1 = limit_BT1.where(~is_whole_B11, top_p_B11 * whole_BT1)
            # A token passes if the sum before it is below top_p, which always holds for the first
            # token. Rounded sums can reach 1 before the last token, but top_p = 1 keeps every
            # token.
            before_BTK = torch.nn.functional.pad(sums_BTK[..., :-1], (1, 0))
            among_BTK = (before_BTK < limit_BT1) | (top_p_B11 == 1)
            among_BTK &= torch.arange(n, device=best_BTK.device) < top_k_B11
            among_BTV = self.vocabulary.scatter_mask(among_BTK, ids_BTK)
            if n == most:
                return among_BTV, None
            reached_BT1 = is_whole_B11 & (sums_BTK[..., -1:] >= limit_BT1)
            return among_BTV, (reached_BT1 | (top_k_B11 <= n) | ignored_B11).all()

        for n in fewer:
            among_BTV, suffices = passing(n)
            if suffices:
                break
        else:
            among_BTV, _ = passing(most)
        return kept_BTV & (among_BTV | unranked_B11)

    @property
    def _reads_candidates(self) -> bool:
        """Whether the host can read which tokens pass, at no cost and alike on all ranks."""
        return not self.top_p.is_cuda and self.vocabulary.group.size == 1

    def _numbers_of_candidates(self, features: Features) -> list[int]:
        """Returns how many of the most likely tokens to examine, ascending; the last suffices.

        Sorting a whole vocabulary for top-p takes a third of a small model's step on a CPU, and few
        tokens are nearly always enough. CUDA graphs and several ranks have a single, fixed number.
        """
        most = min(features.n_candidates or self.vocab_size, self.vocab_size)
        if not self._reads_candidates:
            return [most]
        return [*(n for n in FEW_CANDIDATES if n < most), most]


def _gumbel(seed_B: Tensor, positions_BT: Tensor, n: int, first: int = 0) -> Tensor:
    """Returns the Gumbel numbers of ``n`` token ids from ``first`` on, float32 [B, T, n].

    Each is a pure function of (seed, position, token id).
    """
    ids_V = torch.arange(first, first + n, device=seed_B.device)
    return _gumbel_of(_keys(seed_B, positions_BT)[..., None], ids_V)


def _keys(seed_B: Tensor, positions_BT: Tensor) -> Tensor:
    """Hashes seeds and positions to 32-bit words, int64 [B, T]."""
    key_B = _mix((seed_B & _WORD) ^ 0x9E3779B9)
    key_B = _mix(key_B ^ (seed_B >> 32))
    return _mix(key_B[:, None] ^ (positions_BT & _WORD))


def _gumbel_of(keys: Tensor, ids: Tensor) -> Tensor:
    """Returns the Gumbel numbers of token ids by the keys of their positions, broadcast."""
    words = _mix(keys ^ _mix(ids + 1))
    # -log1p(-u) is precise at small u, which give the large Gumbel numbers that decide. The largest
    # words round to u = 1, whose Gumbel number is minus infinity, as a masked token's score.
    # Clamping avoids that tie.
    uniform = ((words.float() + 0.5) * 2**-32).clamp_(max=1 - 2**-24)
    return -torch.log(-torch.log1p(-uniform))


def _mix(x: Tensor) -> Tensor:
    """Hashes 32-bit words by a bijection with full avalanche (Wellons' lowbias32)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)
