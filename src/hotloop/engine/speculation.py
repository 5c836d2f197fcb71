"""Drafters of speculative decoding. ``draft_control`` chooses the number of drafts.

Verification is a comparison. Sampling is a pure function of seed, position and logits
(``sampling``), so the model samples its own token at every draft position, and a draft is accepted
if it equals that token. The tokens are exactly those of plain decoding: they depend neither on the
drafter nor on the number of drafts, which may change in every step. Drafters sample with the same
random numbers as the model, so that similar distributions give the same tokens (coupled sampling;
Daliri et al. 2024, "Coupling without Communication and Drafter-Invariant Speculative Decoding").
The usual rejection sampling (Leviathan et al. 2023) has a slightly higher acceptance rate with a
sampling drafter and the same with a deterministic one, but its answers depend on the drafts, so a
seed would not reproduce them.

Shape letters: B rows, C positions of a row's history, D drafts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hotloop.engine.chains import Chain, ChainEnd
from hotloop.engine.core import Features, Step
from hotloop.engine.forward import Forward
from hotloop.engine.rows import Rows
from hotloop.engine.sampling import Sampler
from hotloop.kernels import reference
from hotloop.kernels.cuda.launch import Launcher
from hotloop.kernels.cuda.step import ngram_draft
from hotloop.parallel.collectives import Group


class Drafter(ABC):
    """Drafts the next tokens of every row, from the tokens so far."""

    @abstractmethod
    def propose(
        self,
        n: int,
        k: int,
        *,
        first_seat: int | None,
        length: int,
        features: Features,
        end: ChainEnd | None = None,
    ) -> Tensor:
        """Drafts tokens for the first ``n`` rows, int64 [n, k]; negative where there is no draft.

        It must not synchronize with the host unless ``end`` does, since it is captured in a CUDA
        graph.

        Args:
            n: Rows.
            k: The most drafts for each row.
            first_seat: See ``Forward``.
            length: See ``Forward``.
            features: The features that the sampler needs.
            end: Ends chains of drafts early; None never does.
        """

    def admit(self, seat: int, n_cached: int) -> None:  # noqa: B027 (most have no state)
        """Records that a seat has a new sequence.

        Args:
            seat: The seat.
            n_cached: The number of its first tokens that the seat already held (prefix reuse).
        """

    def copy(self, source: int, target: int, n: int) -> None:  # noqa: B027
        """Records that the first ``n`` positions of a seat were copied into another."""

    def skip(self, seats: Sequence[int]) -> None:  # noqa: B027
        """Records that a step of the sequences in these seats had no drafts."""

    def catch_up(self, step: Step) -> None:  # noqa: B027
        """Prefills the tokens of steps without drafts, before ``propose``.

        Args:
            step: The next step; ``known_positions`` and ``slack`` bound its rows' positions.
        """


class NgramDrafter(Drafter):
    """Prompt lookup (Saxena 2023): drafts the tokens after an earlier, equal n-gram.

    See ``reference.ngram_draft``.

    Args:
        rows: The rows of the target model.
        launcher: Launches the CUDA kernel; None uses plain PyTorch.
    """

    def __init__(self, rows: Rows, *, launcher: Launcher | None = None) -> None:
        self.rows, self.launcher = rows, launcher

    def propose(self, n: int, k: int, *, length: int, **_: object) -> Tensor:
        """See ``Drafter``."""
        if self.launcher is not None:
            drafts_BD = self.rows.history.new_empty(n, k)
            call = ngram_draft(self.rows.history, self.rows.positions, drafts_BD)
            self.launcher.prepare(call, dependent=False)()  # torch launched its predecessor
            return drafts_BD
        return reference.ngram_draft(self.rows.history, self.rows.positions, n, k, length=length)


class SelfDrafter(Drafter):
    """Drafts with the target model itself: its first layers, or all of it in fewer bits.

    It has no cache of its own. The keys and values of drafted positions are written into the
    target's cache, and verification, which computes the same positions, overwrites them: the target
    attends only to its own keys and values. This is self-speculative decoding (Zhang et al. 2023,
    "Draft & Verify"); Zhao et al. 2024 ("QSpec") share a cache with drafts of another quantization.

    Args:
        forward: The first layers of the target model and its head, or a copy of it under another
            scheme, or the high planes of its weights.
        rows: The rows of the target model.
        sampler: The sampler of the target model.
    """

    def __init__(self, forward: Forward, rows: Rows, sampler: Sampler) -> None:
        self.forward, self.rows, self.sampler = forward, rows, sampler

    def propose(
        self,
        n: int,
        k: int,
        *,
        first_seat: int | None,
        length: int,
        features: Features,
        end: ChainEnd | None = None,
    ) -> Tensor:
        """See ``Drafter``."""
        newest_B1 = self.rows.positions[:n, None]
        forward = partial(self.forward, first_seat=first_seat, length=length)
        newest = (self.rows.tokens(newest_B1), newest_B1)
        return Chain(forward, self.rows, self.sampler, *newest, k, features).run(end)


class ModelDrafter(Drafter):
    """Drafts with a smaller model of the same vocabulary, which has a cache of its own.

    The first forward of a step takes the newest two tokens: the older one is not in the draft
    model's cache if the previous step accepted every draft.

    Args:
        forward: The draft model.
        prefill: Prefills tokens [T] into a seat of the draft model's cache, from a position on.
        rows: The rows of the target model.
        sampler: The sampler of the target model; the draft model's logits are not sharded.
        chunk: The most tokens of one prefill.
    """

    def __init__(
        self,
        forward: Forward,
        prefill: Callable[[Tensor, int, int], object],
        rows: Rows,
        sampler: Sampler,
        *,
        chunk: int,
    ) -> None:
        self.forward, self.prefill, self.rows = forward, prefill, rows
        self.sampler, self._chunk = sampler.of_whole_vocabulary(), chunk
        # By seat: the draft model's cache holds all positions before this one.
        self._cached_until: dict[int, int] = {}
        self._lagging: set[int] = set()  # seats with tokens to prefill before the newest two

    def propose(
        self,
        n: int,
        k: int,
        *,
        first_seat: int | None,
        length: int,
        features: Features,
        end: ChainEnd | None = None,
    ) -> Tensor:
        """See ``Drafter``."""
        newest_B1 = self.rows.positions[:n, None]
        positions_BT = torch.cat((newest_B1 - 1, newest_B1), dim=1).clamp(min=0)
        tokens_BT = self.rows.tokens(positions_BT)
        forward = partial(self.forward, first_seat=first_seat, length=length)
        inputs = tokens_BT, positions_BT
        return Chain(forward, self.rows, self.sampler, *inputs, k, features).run(end)

    def admit(self, seat: int, n_cached: int) -> None:
        """See ``Drafter``."""
        self._cached_until[seat] = min(self._cached_until.get(seat, 0), n_cached)
        self._lagging.add(seat)

    def copy(self, source: int, target: int, n: int) -> None:
        """See ``Drafter``."""
        self._cached_until[target] = min(self._cached_until.get(source, 0), n)

    def skip(self, seats: Sequence[int]) -> None:
        """See ``Drafter``."""
        self._lagging.update(seats)

    def catch_up(self, step: Step) -> None:
        """See ``Drafter``.

        A step prefills at most one chunk, which bounds the delay of the other rows. Until a
        sequence has caught up, its drafts are accepted less often. The host does not know the
        tokens of steps in flight, so it prefills up to the last position that they can reach; what
        is written beyond the newest token is overwritten later.
        """
        room = self._chunk
        for row, position in step.known_positions.items():
            seat = step.seats[row]
            if seat in self._lagging:
                start = self._cached_until[seat]
                end = min(position + step.slack, self.rows.last + 1)
                stop = min(end, start + room)
                if start < stop:
                    self.prefill(self.rows.history[row, start:stop], start, seat)
                    room -= stop - start
                if stop < end:
                    self._cached_until[seat] = min(stop, position)
                    continue
                self._lagging.remove(seat)
            self._cached_until[seat] = position


class BroadcastDrafter(Drafter):
    """Sends the drafts of a drafter on rank 0 to all ranks.

    It does so by an all-reduce of the maximum, to which the other ranks contribute -1.

    Args:
        drafter: The drafter, on rank 0; None on the other ranks.
        group: The ranks.
        device: The device of the drafts.
    """

    def __init__(self, drafter: Drafter | None, group: Group, device: torch.device) -> None:
        self.drafter, self.group, self.device = drafter, group, device

    def propose(self, n: int, k: int, **how: Any) -> Tensor:
        """See ``Drafter``."""
        if self.drafter is not None:
            return self.group.max(self.drafter.propose(n, k, **how))
        return self.group.max(torch.full((n, k), -1, device=self.device))

    def admit(self, seat: int, n_cached: int) -> None:
        """See ``Drafter``."""
        if self.drafter is not None:
            self.drafter.admit(seat, n_cached)

    def copy(self, source: int, target: int, n: int) -> None:
        """See ``Drafter``."""
        if self.drafter is not None:
            self.drafter.copy(source, target, n)

    def skip(self, seats: Sequence[int]) -> None:
        """See ``Drafter``."""
        if self.drafter is not None:
            self.drafter.skip(seats)

    def catch_up(self, step: Step) -> None:
        """See ``Drafter``."""
        if self.drafter is not None:
            self.drafter.catch_up(step)
