"""Holds the rows of a step on the device: history, position and seat of each sequence.

Rows in use are dense, from 0. A row has the history of its sequence, the position of the newest
token, and the seat of the sequence in the KV cache. Rows are not seats: when a sequence ends, the
last row moves into its row, but keeps its seat, so the cache is not moved.

Shape letters: R rows, B rows of a step, T positions of each, D drafts, C cache positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hotloop.kernels import reference
from hotloop.kernels.cuda.launch import Call, Launcher
from hotloop.kernels.cuda.step import accept, next_tokens


class Rows:
    """The state of every row, in tensors that CUDA graphs read at replay.

    Args:
        n_rows: R.
        n_positions: C.
        spare: The most drafts in a step.
        device: The device of the model.
        launcher: Launches the CUDA kernels; None uses plain PyTorch.

    Attributes:
        history: int64 [R, more than C]: the token at each position up to the newest; undefined
            beyond.
        positions: int64 [R]: the position of the newest token, which is not in the cache yet.
        seats: int64 [R]: the seat of each row in the cache.
    """

    def __init__(
        self,
        n_rows: int,
        n_positions: int,
        spare: int,
        device: torch.device,
        *,
        launcher: Launcher | None = None,
    ) -> None:
        self._launcher = launcher
        width = n_positions + spare + 1  # a finished row may run one more step
        self.history = torch.zeros(n_rows, width, dtype=torch.int64, device=device)
        self.positions = torch.zeros(n_rows, dtype=torch.int64, device=device)
        self._seats = tuple(range(n_rows))  # the host's copy
        self.seats = torch.tensor(self._seats, device=device)
        self.last = n_positions - 1

    def admit(self, row: int, prompt_ids: Tensor, first_id: Tensor) -> None:
        """Sets a row to a prompt and the first token of its answer [1]."""
        n = len(prompt_ids)
        self.history[row, :n] = prompt_ids
        self.history[row, n : n + 1] = first_id
        self.positions[row] = n

    def move(self, source: int, target: int) -> None:
        """Copies a row's history and position into another row."""
        self.history[target] = self.history[source]
        self.positions[target] = self.positions[source]

    def place(self, seats: tuple[int, ...]) -> None:
        """Sets the seat of every row, for the steps that follow."""
        if seats != self._seats:
            pinned = torch.tensor(seats, pin_memory=self.seats.is_cuda)
            self.seats.copy_(pinned, non_blocking=True)
            self._seats = seats

    def tokens(self, positions_BT: Tensor) -> Tensor:
        """Gathers the tokens at positions of the first B rows."""
        return self.history[: len(positions_BT)].gather(1, positions_BT)

    def next_tokens(self, n: int, drafts_BD: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the input of a step of the first ``n`` rows.

        Args:
            n: B.
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
            int64 [B], the number of tokens accepted: those up to the first that differs from its
            draft; and int64 [B], the number of drafts. (None, None) without drafts: all tokens are
            accepted.
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
