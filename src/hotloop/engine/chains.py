"""Makes chains of drafts, which can end early.

The probability that all drafts so far are accepted is estimated by the product of the probabilities
that the draft model gives them. Once the mean of that estimate over the rows of a step is below
``Step.min_probability``, another draft does not pay (``draft_control``), and the chain ends. The
first draft is always made. A draft position without a draft holds -1, which is never accepted,
because no sampled token equals it.

On a CPU the host decides when a chain ends, since it can read tensors at no cost. In a CUDA graph a
kernel decides (``kernels.cuda.chain``): it sets the condition of the IF node that contains the next
draft (``graphs.IfNodes``). Such a step still verifies all draft positions, and the host learns the
number of drafts together with the step's tokens. With several ranks on GPUs chains never end early:
every rank would have to end after the same draft, and graphs with IF nodes cannot contain NCCL
collectives.

Shape letters: B rows, T positions of each, D drafts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from hotloop.engine.core import Features
from hotloop.engine.graphs import capture
from hotloop.engine.rows import Rows
from hotloop.engine.sampling import Sampler
from hotloop.engine.simulated_acceptance import assumed_probability
from hotloop.errors import HotloopError
from hotloop.kernels import reference
from hotloop.kernels.cuda import step
from hotloop.kernels.cuda.chain import extend_chain
from hotloop.kernels.cuda.launch import Launcher


class Chain:
    """Drafts for the first rows of a step, sampled one after the other.

    Args:
        forward: The draft model's forward in this step: takes tokens and positions [B, T], and
            seats [B].
        rows: The rows of the target model.
        sampler: Samples from the logits of the draft model.
        tokens_BT: int64, the newest T tokens of each row.
        positions_BT: int64, their positions.
        k: The most drafts, D.
        features: The features that the sampler needs.

    Attributes:
        drafts: int64 [B, D]; -1 where no draft is made.
        n: Number of drafts so far.
        newest: int64 [B, 1], the newest token of each row, which its first draft follows.
        logits: float32 [B, 1, V], the logits of the newest draft.
        ids: int64 [B, 1], the newest draft; the newest token before there is a draft.
        positions: int64 [B, 1], its position.
    """

    logits: Tensor

    def __init__(
        self,
        forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]],
        rows: Rows,
        sampler: Sampler,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        k: int,
        features: Features,
    ) -> None:
        self.rows, self.sampler, self.n = rows, sampler, 0
        self.newest = self.ids = tokens_BT[:, -1:]
        self.positions = positions_BT[:, -1:]
        self.drafts = tokens_BT.new_full((len(tokens_BT), k), -1)
        self._forward, self._features = forward, features
        self._inputs = tokens_BT, positions_BT

    def draft(self) -> None:
        """Makes the next draft."""
        tokens_BT, positions_BT = self._inputs
        seats_B = self.rows.seats[: len(tokens_BT)]
        logits_BTV, best_BT = self._forward(tokens_BT, positions_BT, seats_B)
        self.logits = logits_BTV[:, -1:]
        self.positions = positions_BT[:, -1:] + 1
        self.ids = self.sampler.sample(
            self.logits,
            self.positions,
            0,
            self._features,
            self.drafts[:, : self.n],
            best_BT=None if best_BT is None else best_BT[:, -1:],
        ).ids
        self.drafts[:, self.n : self.n + 1] = self.ids
        self._inputs = self.ids, self.positions.clamp(max=self.rows.last)
        self.n += 1

    def run(self, end: ChainEnd | None) -> Tensor:
        """Makes drafts until ``end`` ends the chain, or all D of them; returns ``drafts``."""
        self.draft()
        while self.n < self.drafts.shape[1]:
            if end is None:
                self.draft()
            elif not end.extend(self):
                break
        return self.drafts


class ChainEnd(Protocol):
    """Ends chains of drafts."""

    def set_min_probability(self, min_probability: float) -> None:
        """Sets the probability below which the chains of later steps end; 0 ends none."""
        ...

    def extend(self, chain: Chain) -> bool:
        """Makes another draft unless the chain ends; returns False if it has ended on the host."""
        ...


class EndOnHost:
    """Ends chains where the host can read tensors at no cost.

    Every rank computes the same bits of the probabilities, so all end after the same draft.

    Args:
        assumed_acceptance: See ``EngineConfig.assume_acceptance``.
    """

    def __init__(self, assumed_acceptance: float | None = None) -> None:
        self._assumed, self._min_probability = _AssumedProbabilities(assumed_acceptance), 0.0
        self._accepted_B: Tensor | None = None

    def set_min_probability(self, min_probability: float) -> None:
        """See ``ChainEnd``."""
        self._min_probability = min_probability

    def extend(self, chain: Chain) -> bool:
        """See ``ChainEnd``."""
        if self._min_probability > 0:
            probability_B = self._assumed.of_newest_draft(chain)
            if probability_B is None:
                probability_B = chain.sampler.probability(chain.logits, chain.ids)[:, 0]
            before_B = None if chain.n == 1 else self._accepted_B
            undrafted_B = chain.rows.undrafted[: len(probability_B), 0]
            self._accepted_B, mean = reference.extend_chain(probability_B, before_B, undrafted_B)
            if mean < self._min_probability:
                return False
        chain.draft()
        return True


class Branches(Protocol):
    """Conditional work, as ``graphs.IfNodes`` does it."""

    def run(self, decide: Callable[[int | None], None], body: Callable[[], None]) -> None:
        """See ``graphs.IfNodes``."""
        ...


class EndOnDevice:
    """Ends chains in CUDA graphs, without the host.

    Args:
        branches: Makes IF nodes of the graph.
        launcher: Launches the kernel.
        n_rows: The most rows of a step.
        device: The device.
        assumed_acceptance: See ``EngineConfig.assume_acceptance``.
    """

    def __init__(
        self,
        branches: Branches,
        launcher: Launcher,
        n_rows: int,
        device: torch.device,
        assumed_acceptance: float | None = None,
    ) -> None:
        self._branches, self._launcher = branches, launcher
        self._assumed = _AssumedProbabilities(assumed_acceptance)
        self._min_probability = torch.zeros(1, dtype=torch.float32, device=device)
        self._accepted = torch.zeros(n_rows, dtype=torch.float32, device=device)
        self._state = torch.zeros(2, dtype=torch.int32, device=device)
        self._known_min_probability = 0.0  # the host's copy

    def set_min_probability(self, min_probability: float) -> None:
        """See ``ChainEnd``. Does not wait for the device."""
        if min_probability != self._known_min_probability:
            self._min_probability.fill_(min_probability)
            self._known_min_probability = min_probability

    def extend(self, chain: Chain) -> bool:
        """See ``ChainEnd``."""
        probability_B, B = self._assumed.of_newest_draft(chain), len(chain.ids)

        def decide(handle: int | None) -> None:
            call = extend_chain(
                chain.logits[:, 0],
                chain.ids[:, 0].contiguous(),
                probability_B,
                chain.rows.undrafted[:B, 0],
                self._min_probability,
                self._accepted[:B],
                self._state,
                is_first=chain.n == 1,
                handle=handle,
            )
            self._launcher.prepare(call, dependent=False)()

        self._branches.run(decide, chain.draft)
        return True


class _AssumedProbabilities:
    """The simulated probabilities of a chain's drafts (``simulated_acceptance``).

    Args:
        rate: The acceptance rate to simulate; None simulates none.
    """

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._of_chain_BD: Tensor | None = None

    def of_newest_draft(self, chain: Chain) -> Tensor | None:
        """Returns the probability of the newest draft, float32 [B]; None if none is simulated."""
        if self._rate is None:
            return None
        if chain.n == 1:  # of all drafts at once: each call launches a dozen kernels
            offsets = torch.arange(chain.drafts.shape[1], device=chain.drafts.device)
            positions_BD = chain.positions + offsets
            self._of_chain_BD = assumed_probability(positions_BD, chain.newest, self._rate)
        assert self._of_chain_BD is not None, "a chain begins with its first draft"
        return self._of_chain_BD[:, chain.n - 1].contiguous()


def unavailable_reason(end: EndOnDevice, launcher: Launcher, device: torch.device) -> str | None:
    """Returns why chains cannot end early in CUDA graphs here, or None if they can.

    It captures and replays a chain of drafts, since only that finds out: a driver that supports IF
    nodes may not support kernels that overlap in their bodies (programmatic dependent launch).
    """
    sampler = Sampler(1, 32, device)
    rows = Rows(1, 8, 2, device)
    rows.place((0,))
    logits = torch.zeros(1, 1, 32, device=device)
    best = logits[0], torch.arange(32, dtype=torch.int32, device=device)[None]

    def forward(tokens_B1: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        ids_B1 = torch.empty_like(tokens_B1)
        for dependent in (False, True):
            launcher.prepare(step.argmax(best, ids_B1[0]), dependent=dependent)()
        return logits, ids_B1

    def drafts() -> Tensor:
        inputs = rows.history[:, :1], rows.positions[:, None]
        return Chain(forward, rows, sampler, *inputs, 3, Features()).run(end)

    try:
        graph, made = capture(drafts, device)
        for min_probability, expected in ((0.0, [[0, 0, 0]]), (2.0, [[0, -1, -1]])):
            end.set_min_probability(min_probability)
            graph.replay()
            if (found := made.tolist()) != expected:
                return f"drafts in a CUDA graph were {found}, and not {expected}"
    except (HotloopError, RuntimeError) as error:
        return f"drafts in IF nodes of a CUDA graph failed: {error}"
    finally:
        end.set_min_probability(0.0)
    return None
