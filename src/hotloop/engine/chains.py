"""Makes chains of drafts, which can end early.

The product of a draft model's own probabilities of its drafts is taken for the probability that all
drafts so far are accepted. Once its mean over the rows of a step is below ``Step.least``, another
draft does not pay (``draft_control``), and the chain ends; the first draft is always made. What is
not drafted is -1, which is the token of no finite logits, so that nothing of it is accepted.

On a CPU the host decides, from tensors that it can read at no cost. In a CUDA graph a kernel does
(``kernels.cuda.chain``), and sets the condition of an IF node that has the next draft
(``graphs.IfNodes``). The host learns how many were made with the tokens of the step, which verifies
as many positions as ever. With several ranks all drafts are made there: every rank would have to
end with the same draft, and graphs with IF nodes cannot have collectives of NCCL.

Shape letters: B rows, T positions of each, D drafts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from hotloop.engine.assumption import assumed_probability
from hotloop.engine.core import Features
from hotloop.engine.graphs import capture
from hotloop.engine.rows import Rows
from hotloop.engine.sampling import Sampler
from hotloop.errors import HotloopError
from hotloop.kernels import reference
from hotloop.kernels.cuda import step
from hotloop.kernels.cuda.chain import extend_chain
from hotloop.kernels.cuda.launch import Launcher


class Chain:
    """Drafts for the first rows of a step, one after the other, as the model samples.

    Args:
        forward: The forward of a draft model in this step, of tokens and positions [B, T] in seats.
        rows: The rows of the target model.
        sampler: Samples from the logits of the draft model.
        tokens_BT: int64, the newest tokens.
        positions_BT: int64, their positions.
        k: D, the most drafts.
        features: The features that the sampler needs.

    Attributes:
        drafts: int64 [B, D], -1 for those that are not made.
        n: The drafts so far.
        after: int64 [B, 1], the newest tokens, after which they come.
        logits: float32 [B, 1, V], those of the newest draft.
        ids: int64 [B, 1], the newest draft.
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
        self.after = self.ids = tokens_BT[:, -1:]
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
        """Makes drafts until the chain ends, and returns them; all of them without ``end``."""
        self.draft()
        while self.n < self.drafts.shape[1]:
            if end is None:
                self.draft()
            elif not end.extend(self):
                break
        return self.drafts


class ChainEnd(Protocol):
    """Ends chains of drafts."""

    def set_least(self, least: float) -> None:
        """Sets the probability below which chains end, of steps from now on; 0 ends none."""
        ...

    def extend(self, chain: Chain) -> bool:
        """Makes another draft, unless the chain ends; returns False if the host knows that."""
        ...


class EndOnHost:
    """Ends chains where the host can read tensors at no cost.

    Every rank gets the same bits of the probabilities, and so ends with the same draft.

    Args:
        assumed_acceptance: See ``EngineConfig.assume_acceptance``.
    """

    def __init__(self, assumed_acceptance: float | None = None) -> None:
        self._assumed, self._least = _Assumed(assumed_acceptance), 0.0
        self._accepted_B: Tensor | None = None

    def set_least(self, least: float) -> None:
        """See ``ChainEnd``."""
        self._least = least

    def extend(self, chain: Chain) -> bool:
        """See ``ChainEnd``."""
        if self._least > 0:
            own_B = self._assumed.newest(chain)
            if own_B is None:
                own_B = chain.sampler.probability(chain.logits, chain.ids)[:, 0]
            before_B = None if chain.n == 1 else self._accepted_B
            undrafted_B = chain.rows.undrafted[: len(own_B), 0]
            self._accepted_B, mean = reference.extend_chain(own_B, before_B, undrafted_B)
            if mean < self._least:
                return False
        chain.draft()
        return True


class Branches(Protocol):
    """See ``graphs.IfNodes``."""

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
        self._assumed = _Assumed(assumed_acceptance)
        self._least = torch.zeros(1, dtype=torch.float32, device=device)
        self._accepted = torch.zeros(n_rows, dtype=torch.float32, device=device)
        self._state = torch.zeros(2, dtype=torch.int32, device=device)
        self._known_least = 0.0  # the host's copy

    def set_least(self, least: float) -> None:
        """See ``ChainEnd``. Does not wait for the device."""
        if least != self._known_least:
            self._least.fill_(least)
            self._known_least = least

    def extend(self, chain: Chain) -> bool:
        """See ``ChainEnd``."""
        own_B, B = self._assumed.newest(chain), len(chain.ids)

        def decide(handle: int | None) -> None:
            call = extend_chain(
                chain.logits[:, 0],
                chain.ids[:, 0].contiguous(),
                own_B,
                chain.rows.undrafted[:B, 0],
                self._least,
                self._accepted[:B],
                self._state,
                is_first=chain.n == 1,
                handle=handle,
            )
            self._launcher.prepare(call, dependent=False)()

        self._branches.run(decide, chain.draft)
        return True


class _Assumed:
    """The assumed probabilities of a chain's drafts; see ``EngineConfig.assume_acceptance``."""

    def __init__(self, share: float | None) -> None:
        self._share = share
        self._of_chain: Tensor | None = None

    def newest(self, chain: Chain) -> Tensor | None:
        """Returns that of the newest draft, [B]; None without an assumption."""
        if self._share is None:
            return None
        if chain.n == 1:  # of all drafts at once, since that is a dozen of kernels
            after = torch.arange(chain.drafts.shape[1], device=chain.drafts.device)
            self._of_chain = assumed_probability(chain.positions + after, chain.after, self._share)
        assert self._of_chain is not None, "a chain begins with its first draft"
        return self._of_chain[:, chain.n - 1].contiguous()


def refusal(end: EndOnDevice, launcher: Launcher, device: torch.device) -> str | None:
    """Returns why chains cannot end early in CUDA graphs here, or None if they can.

    Nothing but a trial tells: a driver may know the nodes, and still not the kernels that overlap
    in their bodies (programmatic dependent launch).
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
        for least, expected in ((0.0, [[0, 0, 0]]), (2.0, [[0, -1, -1]])):
            end.set_least(least)
            graph.replay()
            if (found := made.tolist()) != expected:
                return f"drafts in a CUDA graph were {found}, and not {expected}"
    except (HotloopError, RuntimeError) as error:
        return f"drafts in IF nodes of a CUDA graph failed: {error}"
    finally:
        end.set_least(0.0)
    return None
