"""Speculative decoding: the drafters. ``draft_control`` chooses how many drafts to make.

Verification needs no rule of acceptance of its own. A draw here is a pure function of seed,
position and logits (``sampling``), so at every position the model simply chooses, greedily or by
its draw, and a draft counts if it is that choice. The tokens are those of plain decoding, one for
one: they do not depend on the drafter, on how many drafts there are, nor on when drafting is
switched off. Drafters draw with the same random numbers as the model, so that where the two
distributions are alike, so are the tokens (coupled draws; Daliri et al. 2024, "Coupling without
Communication and Drafter-Invariant Speculative Decoding"). The usual rejection sampling (Leviathan
et al. 2023) accepts a little more often from a drafter that draws, as often from one that does not,
and makes an answer depend on the drafts: a seed would not reproduce it.

Shape letters: B rows, C positions of a row's history, D drafts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hotloop.engine.core import Features, Step
from hotloop.engine.forward import Forward
from hotloop.engine.rows import Rows
from hotloop.engine.sampling import Sampler
from hotloop.kernels.cuda.launch import Launcher
from hotloop.kernels.cuda.step import ngram_draft
from hotloop.parallel.collectives import Group


class Drafter(ABC):
    """Guesses the next tokens of every row, from the tokens so far."""

    @abstractmethod
    def propose(
        self, n: int, k: int, *, first_seat: int | None, length: int, features: Features
    ) -> Tensor:
        """Guesses for the first ``n`` rows, int64 [n, k]; negative where there are none.

        It runs on the device only, since it is captured in a CUDA graph.

        Args:
            n: Rows.
            k: Drafts for each.
            first_seat: See ``Forward``.
            length: See ``Forward``.
            features: What the sampler must do.
        """

    def admit(self, row: int) -> None:  # noqa: B027 (most have nothing to do)
        """Forgets what it knew of a row, which has another sequence now."""

    def move(self, source: int, target: int) -> None:  # noqa: B027
        """Moves what it knows of a row to another row."""

    def skip(self, n: int) -> None:  # noqa: B027
        """Notes that a step of the first ``n`` rows had no drafts."""

    def catch_up(self, step: Step) -> None:  # noqa: B027
        """Reads the tokens that steps without drafts have brought, before it proposes.

        Args:
            step: The step to come; ``known`` and ``slack`` say how far its rows are.
        """


class NgramDrafter(Drafter):
    """Looks up what followed the newest tokens where they stood before (Saxena 2023).

    The last three tokens, or else the last two; of several places the latest. Where less than k
    tokens followed, the text since then is taken to go round.

    Args:
        rows: The model's.
        launcher: What the kernel that does so runs on; None does so in plain PyTorch.
    """

    def __init__(self, rows: Rows, *, launcher: Launcher | None = None) -> None:
        self.rows, self.launcher = rows, launcher

    def propose(self, n: int, k: int, *, length: int, **_: object) -> Tensor:
        """See ``Drafter``."""
        if self.launcher is not None:
            drafts_BD = self.rows.history.new_empty(n, k)
            call = ngram_draft(self.rows.history, self.rows.positions, drafts_BD)
            self.launcher.prepare(call, dependent=False)()  # on what torch did before
            return drafts_BD
        history_BC = self.rows.history[:n, :length]
        newest_B1 = self.rows.positions[:n, None]
        at_C = torch.arange(length, device=history_BC.device)
        # matching[c]: how many of the newest tokens, up to three, stand just before and at c.
        matching_BC = torch.zeros_like(history_BC)
        unbroken_BC = at_C < newest_B1
        for back in range(3):
            token_B1 = history_BC.gather(1, (newest_B1 - back).clamp(min=0))
            unbroken_BC = unbroken_BC & (history_BC.roll(back, dims=1) == token_B1) & (at_C >= back)
            matching_BC += unbroken_BC
        place_B1 = (matching_BC * length + at_C).argmax(dim=1, keepdim=True)
        found_B1 = matching_BC.gather(1, place_B1) >= 2
        ahead_D = torch.arange(k, device=history_BC.device)
        source_BD = place_B1 + 1 + ahead_D % (newest_B1 - place_B1).clamp(min=1)
        return self.rows.tokens(source_BD).where(found_B1, -1)


class ExitDrafter(Drafter):
    """The model's own first layers, and its head: no weights and no cache of its own.

    What its steps leave in the model's cache is what the model itself puts there.

    Args:
        forward: The model, cut short.
        rows: The model's.
        sampler: The model's.
    """

    def __init__(self, forward: Forward, rows: Rows, sampler: Sampler) -> None:
        self.forward, self.rows, self.sampler = forward, rows, sampler

    def propose(
        self, n: int, k: int, *, first_seat: int | None, length: int, features: Features
    ) -> Tensor:
        """See ``Drafter``."""
        newest_B1 = self.rows.upcoming(n, 1)
        forward = partial(self.forward, first_seat=first_seat, length=length)
        newest = (self.rows.tokens(newest_B1), newest_B1)
        return _draw(forward, self.rows, self.sampler, *newest, k, features)


class ModelDrafter(Drafter):
    """A smaller model with the same vocabulary, with a cache of its own.

    Each step first gives it the newest two tokens: the older one is new to it if the step before
    kept every draft.

    Args:
        forward: The draft model.
        prefill: Puts tokens [T], from a position on, into a seat of the draft model's cache.
        rows: The model's.
        sampler: The model's; of its vocabulary the draft model has all logits.
    """

    def __init__(
        self,
        forward: Forward,
        prefill: Callable[[Tensor, int, int], object],
        rows: Rows,
        sampler: Sampler,
    ) -> None:
        self.forward, self.prefill, self.rows = forward, prefill, rows
        self.sampler = sampler.of_whole_vocabulary()
        self._read: dict[int, int] = {}  # by row: every position before this one is in the cache
        self._behind: set[int] = set()  # rows in which there is more to read than the newest two

    def propose(
        self, n: int, k: int, *, first_seat: int | None, length: int, features: Features
    ) -> Tensor:
        """See ``Drafter``."""
        newest_B1 = self.rows.positions[:n, None]
        positions_BT = torch.cat((newest_B1 - 1, newest_B1), dim=1).clamp(min=0)
        tokens_BT = self.rows.tokens(positions_BT)
        forward = partial(self.forward, first_seat=first_seat, length=length)
        return _draw(forward, self.rows, self.sampler, tokens_BT, positions_BT, k, features)

    def admit(self, row: int) -> None:
        """See ``Drafter``."""
        self._read[row] = 0
        self._behind.add(row)

    def move(self, source: int, target: int) -> None:
        """See ``Drafter``."""
        self._read[target] = self._read[source]
        self._behind.discard(target)
        if source in self._behind:
            self._behind.add(target)

    def skip(self, n: int) -> None:
        """See ``Drafter``."""
        self._behind.update(range(n))

    def catch_up(self, step: Step) -> None:
        """See ``Drafter``. Positions that have no token yet do no harm: they are read again."""
        for row, position in step.known.items():
            if row in self._behind:
                start, stop = self._read[row], min(position + step.slack, self.rows.last + 1)
                if start < stop:
                    self.prefill(self.rows.history[row, start:stop], start, step.seats[row])
                self._behind.remove(row)
            self._read[row] = position


class SharedDrafter(Drafter):
    """A drafter on rank 0, which sends its drafts to all ranks.

    Args:
        drafter: The drafter, on rank 0; None on the others.
        group: The ranks.
        device: Where drafts are.
    """

    def __init__(self, drafter: Drafter | None, group: Group, device: torch.device) -> None:
        self.drafter, self.group, self.device = drafter, group, device

    def propose(self, n: int, k: int, **how: Any) -> Tensor:
        """See ``Drafter``."""
        if self.drafter is not None:
            return self.group.max(self.drafter.propose(n, k, **how))
        return self.group.max(torch.full((n, k), -1, device=self.device))

    def admit(self, row: int) -> None:
        """See ``Drafter``."""
        if self.drafter is not None:
            self.drafter.admit(row)

    def move(self, source: int, target: int) -> None:
        """See ``Drafter``."""
        if self.drafter is not None:
            self.drafter.move(source, target)

    def skip(self, n: int) -> None:
        """See ``Drafter``."""
        if self.drafter is not None:
            self.drafter.skip(n)

    def catch_up(self, step: Step) -> None:
        """See ``Drafter``."""
        if self.drafter is not None:
            self.drafter.catch_up(step)


def _draw(
    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]],
    rows: Rows,
    sampler: Sampler,
    tokens_BT: Tensor,
    positions_BT: Tensor,
    k: int,
    features: Features,
) -> Tensor:
    """The k tokens [B, k] that follow ``tokens_BT``, one by one, drawn as the model draws."""
    drafts_BD, seats_B = tokens_BT[:, :0], rows.seats[: len(tokens_BT)]
    for _ in range(k):
        logits_BTV, best_BT = forward(tokens_BT, positions_BT, seats_B)
        following_B1 = positions_BT[:, -1:] + 1
        sampled = sampler.sample(
            logits_BTV[:, -1:],
            following_B1,
            0,
            features,
            drafts_BD,
            best_BT=None if best_BT is None else best_BT[:, -1:],
        )
        tokens_BT, positions_BT = sampled.ids, following_B1.clamp(max=rows.last)
        drafts_BD = torch.cat((drafts_BD, tokens_BT), dim=1)
    return drafts_BD
