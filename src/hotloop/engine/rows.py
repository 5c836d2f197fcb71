"""Holds the rows of a step on the device: history, position and seat of each sequence.

Rows in use are dense, from 0. A row has the history of its sequence, the position of the newest
token, and the seat of the sequence in the KV cache. Rows are not seats: when a sequence ends, the
last row moves into its row, but keeps its seat, so the cache is not moved.

Shape letters: R rows, B rows of a step, T positions of each, D drafts, C cache positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hotloop.kernels import reference
from hotloop.kernels.cuda.launch import Call, Launcher
from hotloop.kernels.cuda.step import accept, next_tokens


def to_device(
    values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Copies numbers to a device, without waiting for its earlier work."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


class Rows:
    """The state of every row, in tensors that CUDA graphs read at replay.

    Args:
        n_rows: The number of rows, R.
        n_positions: Positions of a seat, C.
        max_drafts: The most drafts in a step, for which the history has further positions.
        device: The device of the model.
        scratch: The seat of unused rows that a captured step computes.
        launcher: Launches the CUDA kernels; None uses plain PyTorch.

    Attributes:
        history: int64 [R, more than C]: the token at each position up to the newest; undefined
            beyond.
        positions: int64 [R]: the position of the newest token, which is not in the cache yet.
        seats: int64 [R]: the seat of each row in the cache.
        undrafted: bool [R, 1]: whether a row gets no drafts; true for rows that are not in use.
        last: The last position of the cache.
    """

    def __init__(
        self,
        n_rows: int,
        n_positions: int,
        max_drafts: int,
        device: torch.device,
        *,
        scratch: int = 0,
        launcher: Launcher | None = None,
    ) -> None:
        self._launcher = launcher
        width = n_positions + max_drafts + 1  # a finished row may run one more step
        self.history = torch.zeros(n_rows, width, dtype=torch.int64, device=device)
        self.positions = torch.zeros(n_rows, dtype=torch.int64, device=device)
        self._scratch = scratch
        self._seats: tuple[int, ...] = ()  # the host's copy, of the rows in use
        self.seats = torch.full((n_rows,), scratch, device=device)
        self._undrafted: frozenset[int] = frozenset(range(n_rows))
        self.undrafted = torch.ones(n_rows, 1, dtype=torch.bool, device=device)
        self.last = n_positions - 1

    def admit(self, row: int, prompts: Sequence[Tensor], first_ids_B: Tensor) -> None:
        """Sets rows to prompts and the first tokens of their answers.

        Args:
            row: The row of the first prompt; the other prompts get the next rows.
            prompts: The tokens of each, int64.
            first_ids_B: int64, the first token of each answer.
        """
        lengths = to_device(list(map(len, prompts)), self.positions.device)
        for history, prompt in zip(self.history[row:], prompts, strict=False):
            history[: len(prompt)] = prompt
        here = slice(row, row + len(prompts))
        self.history[here].scatter_(1, lengths[:, None], first_ids_B[:, None])
        self.positions[here] = lengths

    def move(self, source: int, target: int) -> None:
        """Copies a row's history and position into another row."""
        self.history[target] = self.history[source]
        self.positions[target] = self.positions[source]

    def place(self, seats: tuple[int, ...], undrafted: frozenset[int] = frozenset()) -> None:
        """Sets the seats of the first rows, for the steps that follow; the others are unused.

        When seats change, unused rows go to position 0 of the scratch seat, where attention has
        little to read. From there each step that computes them advances them.

        Args:
            seats: The seat of each row in use.
            undrafted: The rows that get no drafts.
        """
        n, n_rows = len(seats), len(self.seats)
        undrafted = undrafted.union(range(n, n_rows))
        if undrafted != self._undrafted:
            rows = [row in undrafted for row in range(n_rows)]
            self.undrafted.copy_(to_device(rows, self.seats.device, torch.bool)[:, None])
            self._undrafted = undrafted
        if seats == self._seats:
            return
        every = (*seats, *(self._scratch for _ in range(n_rows - n)))
        self.seats.copy_(to_device(every, self.seats.device))
        self.positions[n:].zero_()
        self._seats = seats

    def tokens(self, positions_BT: Tensor) -> Tensor:
        """Gathers the tokens at positions of the first B rows."""
        return self.history[: len(positions_BT)].gather(1, positions_BT)

    def next_tokens(self, n: int, drafts_BD: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the input of a step of the first ``n`` rows.

        Args:
            n: The number of rows, B.
            drafts_BD: int64, negative for none; or None.

        Returns:
            int64 [B, T], the newest token of each row and its drafts (0 for none), where
            T = D + 1; and int64 [B, T], their positions.
        """
        if self._launcher is not None:
            T = 1 if drafts_BD is None else drafts_BD.shape[1] + 1
            ids_BT, positions_BT = (self.positions.new_empty(n, T) for _ in range(2))
            state, given = (self.history, self.positions), (drafts_BD, ids_BT, positions_BT)
            self._launch(next_tokens(*state, *given, last_position=self.last))
            return ids_BT, positions_BT
        return reference.next_tokens(
            self.history, self.positions, drafts_BD, n, last_position=self.last
        )

    def accept(
        self, ids_BT: Tensor, drafts_BD: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Appends the tokens sampled after ``next_tokens``, up to the first rejected draft.

        Args:
            ids_BT: int64, the sampled tokens.
            drafts_BD: As for ``next_tokens``.

        Returns:
            int64 [B], the number of accepted tokens: the tokens up to and including the first that
            differs from its draft; and int64 [B], the number of drafts. (None, None) without
            drafts: all tokens are accepted.
        """
        state = (self.history, self.positions)
        if self._launcher is None:
            return reference.accept(ids_BT, drafts_BD, *state, last_position=self.last)
        n_kept_B = n_drafts_B = None
        if drafts_BD is not None:
            n_kept_B, n_drafts_B = (self.positions.new_empty(len(ids_BT)) for _ in range(2))
        counts = {"n_kept_B": n_kept_B, "n_drafts_B": n_drafts_B}
        self._launch(
            accept(ids_BT.contiguous(), drafts_BD, *state, **counts, last_position=self.last)
        )
        return n_kept_B, n_drafts_B

    def _launch(self, call: Call) -> None:
        assert self._launcher is not None, "there is no launcher"
        self._launcher.prepare(call, dependent=False)()  # torch launched its predecessor
