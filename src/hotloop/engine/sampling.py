"""Choosing the next token, on the device, for every row by its own options.

A draw is a pure function of the seed, the position and the logits: each token id gets a Gumbel
number hashed from (seed, position, id), and the largest sum of logit and Gumbel number wins, which
is an exact draw from the softmax (Gumbel-max; Maddison et al. 2014). So there is no generator to
keep, a run can be repeated, and neighbours in the batch cannot matter.

What no request of a step asked for is not computed; ``Features`` says what is.

Beside a fused step, on one rank, one kernel draws (``kernels.cuda.sample``), in place of some sixty
of PyTorch's; the code here specifies it.

Of several ranks each has the logits of some rows of the vocabulary, and all choose the same tokens:
see ``vocabulary``.

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
from hotloop.engine.vocabulary import Vocabulary
from hotloop.kernels.cuda.launch import Launcher
from hotloop.kernels.cuda.sample import sample
from hotloop.parallel.collectives import Group
from hotloop.types import MAX_LOGPROBS, SamplingParams

_WORD = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The tokens of a step, and log-probabilities where they were asked for.

    Attributes:
        ids: int64 [B, T]; -1 where logits are not finite, and no token can be chosen.
        n_kept: int64 [B]: the first so many of each row count, the others never happened; None
            where all do.
        n_drafts: int64 [B]: how many of each row's drafts there were; None in a step without.
        logprobs: float32 [B, T], of those tokens; None without the feature.
        top_logprobs: float32 [B, T, MAX_LOGPROBS], most likely first; fewer where V is smaller.
        top_ids: int64, as many.
    """

    ids: Tensor
    n_kept: Tensor | None = None
    n_drafts: Tensor | None = None
    logprobs: Tensor | None = None
    top_logprobs: Tensor | None = None
    top_ids: Tensor | None = None

    @staticmethod
    def joined(steps: Sequence[Sampled]) -> Sampled:
        """Steps without drafts, one after the other, as if they were one."""
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
        """The same of ``f`` of each of its tensors."""
        tensors = {name: value for name, value in vars(self).items() if value is not None}
        return Sampled(**{name: f(tensor) for name, tensor in tensors.items()})


class Sampler:
    """The options of every row as device tensors, and the choice itself.

    Args:
        n_rows: Rows of the largest step.
        vocab_size: Token ids that may be chosen are below this; further logits are padding.
        device: Where logits are.
        vocabulary: The part of the vocabulary whose logits this rank has; None for all.
        launcher: What the kernel that draws runs on; None draws in plain PyTorch, as logits of
            several ranks must be.
    """

    def __init__(
        self,
        n_rows: int,
        vocab_size: int,
        device: torch.device,
        vocabulary: Vocabulary | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        self.vocabulary = vocabulary or Vocabulary([range(vocab_size)], vocab_size, Group())
        self._launcher = launcher
        alone = self.vocabulary.group.size == 1
        assert alone or launcher is None, "the kernel sees one rank's logits"

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
        """The same, with the same rows, for logits that one rank has all of."""
        other = copy.copy(self)
        other.vocabulary = Vocabulary([range(self.vocab_size)], self.vocab_size, Group())
        return other

    def relevant(self, features: Features) -> Features:
        """The features on which the computation depends: the kernel has one way for all."""
        if self._launcher is None:
            return features
        return dataclasses.replace(features, truncate=False, n_best=0)

    def admit(self, row: int, params: SamplingParams, seed: int, prompt_ids: Tensor) -> None:
        """Puts a request's options, and the tokens that its penalty applies to, into a row."""
        self.temperature[row] = params.temperature
        self.top_k[row] = min(params.top_k or self.vocab_size, self.vocab_size)
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.penalty[row] = params.repetition_penalty
        self.seed[row] = seed
        if params.repetition_penalty != 1:
            self.seen_RV[row] = False
            self.seen_RV[row, prompt_ids[prompt_ids < self.vocab_size]] = True

    def move(self, source: int, target: int) -> None:
        """Copies a row's options, and the tokens that its penalty applies to, into another row."""
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
        """Chooses a token at every position; sequence b is in row ``first_row + b``.

        Args:
            logits_BTV: float32, as the model gave them: this rank's rows.
            positions_BT: The position that each chosen token will have; None if none is drawn.
            first_row: The row of the first sequence.
            features: What to compute.
            drafts_BD: int64, negative for none: tokens supposed to follow those in the history.
                The last position supposes all D of them, each one before it one less.
            best_BT: The token ids of the largest logits among those that may be chosen, or -1 where
                that is not finite; None if they are not known yet.
        """
        B, T, _ = logits_BTV.shape
        here, vocabulary = slice(first_row, first_row + B), self.vocabulary
        scores_BTV = vocabulary.choosable(logits_BTV)
        if features.penalize:
            penalty_B11 = self.penalty[here, None, None]
            penalized = torch.where(
                scores_BTV > 0, scores_BTV / penalty_B11, scores_BTV * penalty_B11
            )
            scores_BTV = torch.where(self._seen(here, T, drafts_BD), penalized, scores_BTV)
        if best_BT is None or features.penalize:
            best_BT = vocabulary.choice(scores_BTV)
        ids_BT = best_BT
        if features.draw:
            assert positions_BT is not None, "a draw depends on its position"
            if self._launcher is not None:
                ids_BT = self._launch(self._launcher, scores_BTV, best_BT, positions_BT, here)
            else:
                drawn_BT = self._draw(scores_BTV, positions_BT, here, features)
                is_drawn_BT = (self.temperature[here, None] > 0) & (best_BT >= 0)
                ids_BT = torch.where(is_drawn_BT, drawn_BT, best_BT)
        if not features.logprobs:
            return Sampled(ids=ids_BT)
        # The model's own distribution, as scoring has it: padding has its share of that.
        logprobs_BTV = vocabulary.choosable(vocabulary.log_softmax(logits_BTV))
        top, top_ids = vocabulary.best(logprobs_BTV, min(MAX_LOGPROBS, self.vocab_size))
        chosen = vocabulary.at(logprobs_BTV, ids_BT)
        return Sampled(ids=ids_BT, logprobs=chosen, top_logprobs=top, top_ids=top_ids)

    def remember(self, ids_BT: Tensor, first_row: int) -> None:
        """Has the repetition penalty apply to tokens that have become part of the answer."""
        seen_BV = self.seen_RV[first_row : first_row + len(ids_BT)]
        seen_BV.scatter_(1, ids_BT.clamp(min=0), True)  # of a row without a choice, anything

    def _seen(self, here: slice, T: int, drafts_BD: Tensor | None) -> Tensor:
        """The tokens that the penalty applies to at each position, bool [B, T, V]."""
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
        """Draws by the kernel as ``_draw`` does; ``best_BT`` of greedy rows and where it is -1."""
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
        launcher.prepare(call, dependent=False)()  # on what torch did before
        return ids_BT

    def _draw(
        self, scores_BTV: Tensor, positions_BT: Tensor, here: slice, features: Features
    ) -> Tensor:
        temperature_B11 = self.temperature[here, None, None]
        # Differences to the largest: however low the temperature, they do not overflow upwards.
        scaled_BTV = scores_BTV - self.vocabulary.amax(scores_BTV)
        scaled_BTV = scaled_BTV / torch.where(temperature_B11 > 0, temperature_B11, 1.0)
        if features.truncate:
            scaled_BTV = scaled_BTV.where(self._kept(scaled_BTV, here, features), -torch.inf)
        ids = self.vocabulary.ids
        gumbel_BTV = _gumbel(self.seed[here], positions_BT, len(ids), ids.start)
        return self.vocabulary.argmax(scaled_BTV + gumbel_BTV)

    def _kept(self, scaled_BTV: Tensor, here: slice, features: Features) -> Tensor:
        """The tokens that top-k, top-p and min-p leave, bool [B, T, V]: all of a row without any.

        ``scaled_BTV`` is 0 for the most likely token, which is always kept.
        """
        kept_BTV = scaled_BTV.exp() >= self.min_p[here, None, None]
        if features.n_best == 0:
            return kept_BTV
        n_best = min(features.n_best or self.vocab_size, self.vocab_size)
        best_BTK, ids_BTK = self.vocabulary.best(scaled_BTV, n_best)
        top_k_B11, top_p_B11 = self.top_k[here, None, None], self.top_p[here, None, None]
        # Sums of weights from the top down: how many follow changes none of them.
        weights_BTK = best_BTK.exp()
        sums_BTK = weights_BTK.cumsum(dim=-1)
        last_BT1 = (top_k_B11.clamp(max=n_best) - 1).expand(*sums_BTK.shape[:2], 1)
        reached_BTK = sums_BTK - weights_BTK
        # A token stays while the sum *before* it is short of top_p: the first always does. Rounded
        # sums can reach 1 before the end, but top_p = 1 keeps what follows, too.
        among_BTK = (reached_BTK < top_p_B11 * sums_BTK.gather(2, last_BT1)) | (top_p_B11 == 1)
        among_BTK &= torch.arange(n_best, device=best_BTK.device) < top_k_B11
        unranked_B11 = (top_k_B11 == self.vocab_size) & (top_p_B11 == 1)
        return kept_BTV & (self.vocabulary.mark(among_BTK, ids_BTK) | unranked_B11)


def _gumbel(seed_B: Tensor, positions_BT: Tensor, n: int, first: int = 0) -> Tensor:
    """Gumbel numbers of ``n`` token ids from ``first`` on, float32 [B, T, n].

    Each is a pure function of (seed, position, token id).
    """
    key_B = _mix((seed_B & _WORD) ^ 0x9E3779B9)
    key_B = _mix(key_B ^ (seed_B >> 32))
    key_BT = _mix(key_B[:, None] ^ (positions_BT & _WORD))
    ids_V = torch.arange(first, first + n, device=seed_B.device)
    words_BTV = _mix(key_BT[..., None] ^ _mix(ids_V + 1))
    # -log1p(-u) is fine-grained where it decides: at small u, which make large Gumbel numbers.
    # Never 1, which the largest words are rounded to: minus infinity could tie with what is masked.
    uniform_BTV = ((words_BTV.float() + 0.5) * 2**-32).clamp_(max=1 - 2**-24)
    return -torch.log(-torch.log1p(-uniform_BTV))


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every bit affects every other (Wellons' lowbias32)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)
