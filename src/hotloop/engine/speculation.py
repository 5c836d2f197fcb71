"""Speculative decoding: who makes drafts, and how many are worth making.

Verification needs no rule of acceptance of its own. A draw here is a pure function of seed,
position and logits (``sampling``), so at every position the model simply chooses, greedily or by
its draw, and a draft counts if it is that choice. The tokens are those of plain decoding, one for
one: they do not depend on who drafts, on how many drafts there are, nor on when drafting is
switched off. Drafters draw with the same random numbers as the model, so that where the two
distributions are alike, so are the tokens (coupled draws; Daliri et al. 2024, "Coupling without
Communication and Drafter-Invariant Speculative Decoding"). The usual rejection sampling (Leviathan
et al. 2023) accepts a little more often from a drafter that draws, as often from one that does not,
and makes an answer depend on the drafts: a seed would not reproduce it.

Shape letters: S slots, B rows, C positions of a slot's history, D drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hotloop.engine.core import Features, StepTimes
from hotloop.engine.execution import Drafter, Forward, Slots
from hotloop.engine.sampling import Sampler
from hotloop.kernels.cuda.launch import Launcher
from hotloop.kernels.cuda.step import ngram_draft
from hotloop.parallel.collectives import Group


class NgramDrafter(Drafter):
    """Looks up what followed the newest tokens where they stood before (Saxena 2023).

    The last three tokens, or else the last two; of several places the latest. Where less than k
    tokens followed, the text since then is taken to go round.

    Args:
        slots: The model's.
        launcher: What the kernel that does so runs on; None does so in plain PyTorch.
    """

    def __init__(self, slots: Slots, *, launcher: Launcher | None = None) -> None:
        self.slots, self.launcher = slots, launcher

    def propose(self, n: int, k: int, length: int, features: Features) -> Tensor:  # noqa: ARG002
        """See ``Drafter``."""
        if self.launcher is not None:
            drafts_BD = self.slots.history.new_empty(n, k)
            call = ngram_draft(self.slots.history, self.slots.positions, drafts_BD)
            self.launcher.prepare(call, dependent=False)()  # on what torch did before
            return drafts_BD
        history_BC = self.slots.history[:n, :length]
        newest_B1 = self.slots.positions[:n, None]
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
        return self.slots.tokens(source_BD).where(found_B1, -1)


class ExitDrafter(Drafter):
    """The model's own first layers, and its head: no weights and no cache of its own.

    What its steps leave in the model's cache is what the model itself puts there.

    Args:
        forward: The model, cut short.
        slots: The model's.
        sampler: The model's.
    """

    def __init__(self, forward: Forward, slots: Slots, sampler: Sampler) -> None:
        self.forward, self.slots, self.sampler = forward, slots, sampler

    def propose(self, n: int, k: int, length: int, features: Features) -> Tensor:
        """See ``Drafter``."""
        newest_B1 = self.slots.upcoming(n, 1)
        return _draw(self, self.slots.tokens(newest_B1), newest_B1, k, length, features)


class ModelDrafter(Drafter):
    """A smaller model with the same vocabulary, with a cache of its own.

    Each step first gives it the newest two tokens: the older one is new to it if the step before
    kept every draft.

    Args:
        forward: The draft model.
        prefill: Puts tokens [T] of a slot, from a position on, into the draft model's cache.
        slots: The model's.
        sampler: The model's; of its vocabulary the draft model has all logits.
    """

    def __init__(
        self,
        forward: Forward,
        prefill: Callable[[Tensor, int, int], object],
        slots: Slots,
        sampler: Sampler,
    ) -> None:
        self.forward, self.prefill, self.slots = forward, prefill, slots
        self.sampler = sampler.of_whole_vocabulary()
        self._learnt: dict[int, int] = {}  # by slot: everything before this position
        self._missed: set[int] = set()  # slots in which there is more to learn than the newest two

    def propose(self, n: int, k: int, length: int, features: Features) -> Tensor:
        """See ``Drafter``."""
        newest_B1 = self.slots.positions[:n, None]
        positions_BT = torch.cat((newest_B1 - 1, newest_B1), dim=1).clamp(min=0)
        tokens_BT = self.slots.tokens(positions_BT)
        return _draw(self, tokens_BT, positions_BT, k, length, features)

    def admit(self, slot: int) -> None:
        """See ``Drafter``."""
        self._learnt[slot] = 0
        self._missed.add(slot)

    def skip(self, n: int) -> None:
        """See ``Drafter``."""
        self._missed.update(range(n))

    def catch_up(self, known: Mapping[int, int], slack: int) -> None:
        """See ``Drafter``. Positions that have no token yet do no harm: they are learnt again."""
        for slot, position in known.items():
            if slot in self._missed:
                start, stop = self._learnt[slot], min(position + slack, self.slots.last + 1)
                if start < stop:
                    self.prefill(self.slots.history[slot, start:stop], start, slot)
                self._missed.remove(slot)
            self._learnt[slot] = position


class SharedDrafter(Drafter):
    """A drafter on rank 0, whose drafts all ranks take.

    Args:
        drafter: It, on rank 0; None on the others.
        group: The ranks.
        device: Where drafts are.
    """

    def __init__(self, drafter: Drafter | None, group: Group, device: torch.device) -> None:
        self.drafter, self.group, self.device = drafter, group, device

    def propose(self, n: int, k: int, length: int, features: Features) -> Tensor:
        """See ``Drafter``."""
        if self.drafter is not None:
            return self.group.max(self.drafter.propose(n, k, length, features))
        return self.group.max(torch.full((n, k), -1, device=self.device))

    def admit(self, slot: int) -> None:
        """See ``Drafter``."""
        if self.drafter is not None:
            self.drafter.admit(slot)

    def skip(self, n: int) -> None:
        """See ``Drafter``."""
        if self.drafter is not None:
            self.drafter.skip(n)

    def catch_up(self, known: Mapping[int, int], slack: int) -> None:
        """See ``Drafter``."""
        if self.drafter is not None:
            self.drafter.catch_up(known, slack)


def _draw(
    drafter: ExitDrafter | ModelDrafter,
    tokens_BT: Tensor,
    positions_BT: Tensor,
    k: int,
    length: int,
    features: Features,
) -> Tensor:
    """The k tokens [B, k] that follow ``tokens_BT``, one by one, drawn as the model draws."""
    drafts_BD = tokens_BT[:, :0]
    for _ in range(k):
        logits_BTV, best_BT = drafter.forward(tokens_BT, positions_BT, length)
        following_B1 = positions_BT[:, -1:] + 1
        sampled = drafter.sampler.sample(
            logits_BTV[:, -1:],
            following_B1,
            0,
            features,
            drafts_BD,
            best_BT=None if best_BT is None else best_BT[:, -1:],
        )
        tokens_BT, positions_BT = sampled.ids, following_B1.clamp(max=drafter.slots.last)
        drafts_BD = torch.cat((drafts_BD, tokens_BT), dim=1)
    return drafts_BD


# ------------------------------------------------------------------------------ how many


def sizes_up_to(most: int) -> tuple[int, ...]:
    """Numbers of drafts that are captured: 0, the powers of two, and the most."""
    sizes = {0, most} | {1 << i for i in range(most.bit_length()) if 1 << i <= most}
    return tuple(sorted(sizes))


@dataclass
class _Average:
    """A mean that forgets: what came last counts most."""

    total: float = 0.0
    weight: float = 0.0

    def fade(self, share: float) -> None:
        """Lets all that was added count less."""
        self.total, self.weight = self.total * share, self.weight * share

    def add(self, value: float) -> None:
        self.total, self.weight = self.total + value, self.weight + 1

    def mean(self, prior: float, weight: float = 1.0) -> float:
        """The mean, with what was expected counting as ``weight`` further values."""
        return (self.total + prior * weight) / (self.weight + weight)


class DraftController:
    """Chooses how many tokens to draft in the next step, so that drafting pays or stays away.

    With a_i the chance that the i-th draft is right if those before it are, a step with k drafts
    gives 1 + a_1 + a_1 a_2 + … tokens, and takes as long as such steps took lately. The k with the
    most tokens per second is taken; 0 is one of them. Of drafts further ahead than were made lately
    it is expected that they are as good as the one before. Where 0 is best, chances can be learnt
    only at a loss: the next best k is tried now and then, as often as makes the time so lost at
    most ``TRIAL_SHARE`` of all time.

    Args:
        sizes: Numbers of drafts to choose from, ascending, 0 among them.
        always: Do not choose: as many as there may be.
    """

    TRIAL_SHARE = 0.01
    INITIAL_TRIALS = 2.0
    """Steps' worth of time that may be lost before anything was learnt."""

    CHANCE = 0.6
    """What is expected of a draft before any was seen."""

    MEMORY = 0.9
    """How much less each step counts than the one after it."""

    REFRESH = 64
    """A plain step is taken at least this often, to know how long one takes by now."""

    def __init__(self, sizes: Sequence[int], *, always: bool = False) -> None:
        self._sizes, self._always = tuple(sizes), always
        self._chances = [_Average() for _ in range(max(sizes))]
        self._costs: dict[tuple[int, int], _Average] = {}
        self._credit_s: float | None = None
        self._since_plain = 0

    def choose(self, n: int, limit: int) -> int:
        """Drafts for each of ``n`` rows in the next step; at most ``limit``."""
        sizes = [k for k in self._sizes if k <= max(0, limit)]
        if self._always:
            return sizes[-1]
        if unknown := [k for k in sizes if self._cost_s(n, k) is None]:
            return unknown[0]
        if len(sizes) == 1 or self._since_plain >= self.REFRESH:
            return 0
        best, *others = sorted(sizes, key=lambda k: self._tokens_per_s(n, k), reverse=True)
        if best == 0 and self._credit_s is not None and self._loss_s(n, others[0]) < self._credit_s:
            return others[0]
        return best

    def observe(
        self,
        n: int,
        k: int,
        *,
        times: StepTimes | None,
        kept: Sequence[int],
        steps: int = 1,
    ) -> None:
        """Learns from a step, or from several plain ones in a row.

        Args:
            n: Rows.
            k: Drafts that it was made for; 0 if nobody had any.
            times: How long it took, or all of them; None for the first of its size.
            kept: Tokens that it gave each request.
            steps: How many they were.
        """
        self._since_plain = 0 if k == 0 else self._since_plain + 1
        if k:
            for chance in self._chances:
                chance.fade(self.MEMORY)
        for tokens in kept:
            for place in range(min(tokens, k)):
                self._chances[place].add(float(tokens > place + 1))
        if times is None:
            return
        seconds, known_s = (times.draft_s + times.model_s) / steps, self._cost_s(n, k)
        cost = self._costs.setdefault((n, k), _Average())
        cost.fade(self.MEMORY)
        # A single slow step, which another process got in the way of, says little.
        cost.add(seconds if known_s is None else min(seconds, 2 * known_s))
        plain_s = self._cost_s(n, 0)
        if plain_s is None:
            return
        most_s = self.INITIAL_TRIALS * plain_s
        credit_s = most_s if self._credit_s is None else self._credit_s
        if k and kept:
            plainly_s = plain_s * sum(kept) / len(kept)
            credit_s += plainly_s - seconds - times.catch_up_s
        self._credit_s = min(most_s, credit_s + self.TRIAL_SHARE * seconds * steps)

    def _cost_s(self, n: int, k: int) -> float | None:
        cost = self._costs.get((n, k))
        return None if cost is None else cost.mean(0.0, 0.0)

    def _tokens(self, k: int) -> float:
        total, all_right, expected = 1.0, 1.0, self.CHANCE
        for chance in self._chances[:k]:
            expected = chance.mean(expected)
            all_right *= expected
            total += all_right
        return total

    def _tokens_per_s(self, n: int, k: int) -> float:
        cost_s = self._cost_s(n, k)
        assert cost_s is not None, "every size was tried"
        return self._tokens(k) / cost_s

    def _loss_s(self, n: int, k: int) -> float:
        """What a step with k drafts costs beyond a plain one, should none be right."""
        cost_s, plain_s = self._cost_s(n, k), self._cost_s(n, 0)
        assert cost_s is not None
        assert plain_s is not None
        return cost_s - plain_s
