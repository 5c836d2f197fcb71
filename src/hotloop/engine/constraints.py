"""Applies the grammars of rows to their steps: masks of the tokens that may come next.

A step with a grammar is two programs, *forward* and *choose* (``steps``). While the device runs the
forward, the host reads the tokens of the previous step, each grammar's matcher computes masks from
them, and the host copies the masks to the device for *choose*. So the host is not one step ahead of
the device, and the device waits for the host only if a mask takes longer than a forward.

A draft that the grammar does not allow is rejected like any other, since the masked choice cannot
equal it. Where the grammar allows only one continuation, its tokens (jump-forward tokens) replace
the drafts.

Every rank has its own matchers. They get the same tokens, so their masks and drafts are the same.

Shape letters: B rows of a step, T positions of each, D drafts, W words of 32 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hotloop.engine.grammar import Grammars, Matcher
from hotloop.engine.rows import to_device
from hotloop.types import Grammar

Drafts = Sequence[Sequence[int]]
"""Drafts of each row, on the host; negative for none."""


class PendingTokens(Protocol):
    """A step whose tokens are being copied to the host."""

    def tokens(self) -> Sequence[Sequence[int]]:
        """Waits for the accepted tokens of each row."""
        ...


class Constraints:
    """The grammars of every row.

    Args:
        grammars: Compiles grammars.
        n_rows: Rows of the largest step.
        max_drafts: The most drafts of a row in a step.
        device: The device of the logits.
    """

    def __init__(
        self, grammars: Grammars, *, n_rows: int, max_drafts: int, device: torch.device
    ) -> None:
        self._grammars, self._device = grammars, device
        self._rows: list[Matcher | None] = [None] * n_rows
        self._unread: list[tuple[PendingTokens, dict[int, Matcher]]] = []
        self.n_words = -(-grammars.n_tokens // 32)
        # Programs read the masks of a step in the first elements.
        self._masks = torch.full(
            (n_rows * (1 + max_drafts) * self.n_words,), -1, dtype=torch.int32, device=device
        )

    def masks(self, n: int, T: int) -> Tensor:
        """Returns the masks of a step of ``n`` rows, int32 [n, T, W], which ``fill`` writes."""
        return self._masks[: n * T * self.n_words].view(n, T, self.n_words)

    def admit(self, row: int, grammars: Sequence[Grammar | None]) -> Tensor | None:
        """Sets the grammars of rows.

        Args:
            row: The first row.
            grammars: The grammar of each row; None for no grammar.

        Returns:
            The masks of their first tokens, int32 [B, 1, W]; None if there is no grammar.
        """
        masks = None
        for i, grammar in enumerate(grammars):
            matcher = None if grammar is None else self._grammars.matcher(grammar)
            self._rows[row + i] = matcher
            if matcher is not None:
                masks = self._new_masks(len(grammars), 1) if masks is None else masks
                matcher.fill(masks[i])
        return None if masks is None else masks.to(self._device, non_blocking=True)

    def move(self, source: int, target: int) -> None:
        """Moves the grammar of a row into another row."""
        self._rows[target], self._rows[source] = self._rows[source], None

    def expect(self, step: PendingTokens, rows: Sequence[int]) -> None:
        """Records that the next tokens of ``rows`` are those of ``step``, in the same order.

        The matchers of these rows consume them before the next mask is computed.
        """
        matchers = {i: m for i, row in enumerate(rows) if (m := self._rows[row]) is not None}
        if matchers:
            self._unread.append((step, matchers))

    def redraft(self, drafts_BD: Tensor, rows: Sequence[int]) -> tuple[Drafts, list[int]]:
        """Replaces drafts by jump-forward tokens, where a grammar has any.

        Args:
            drafts_BD: int64, changed in place; negative for none.
            rows: The rows to draft for.

        Returns:
            The drafts of each row; and the rows whose drafts were replaced.
        """
        self._read()
        drafts: list[list[int]] = drafts_BD.tolist()
        replaced = []
        for row in rows:
            matcher = self._rows[row]
            tokens = [] if matcher is None else matcher.jump_forward()[: drafts_BD.shape[1]]
            if tokens and drafts[row][: len(tokens)] != tokens:
                drafts[row] = tokens + [-1] * (drafts_BD.shape[1] - len(tokens))
                replaced.append(row)
        if replaced:
            self._write(drafts_BD, drafts)
        return drafts, replaced

    def fill(self, n: int, masks_BTW: Tensor, drafts: Drafts, drafts_BD: Tensor) -> dict[int, str]:
        """Fills the masks of a step, after the tokens of the previous steps have arrived.

        Args:
            n: Rows in use, from the first.
            masks_BTW: Masks from ``masks``. Rows without a grammar get all ones.
            drafts: The drafts of each row, from ``redraft``; empty without drafts.
            drafts_BD: The same drafts on the device. Drafts that a grammar cannot verify within its
                limits are removed: they become negative.

        Returns:
            Why grammars have failed, by row.
        """
        self._grammars.prepare()  # in a server, by a step before it is ready
        self._read()
        host_BTW = self._new_masks(*masks_BTW.shape[:2])
        failures, withdrawn = {}, False
        kept = [list(row) for row in drafts]
        for row, matcher in enumerate(self._rows[:n]):
            if matcher is None:
                continue
            given = kept[row] if kept else []
            n_verified = matcher.fill(host_BTW[row], given)
            if n_verified < len(given):
                given[n_verified:] = [-1] * (len(given) - n_verified)
                withdrawn = True
            if matcher.failure is not None:
                failures[row] = matcher.failure
        if withdrawn:
            self._write(drafts_BD, kept)
        masks_BTW.copy_(host_BTW, non_blocking=True)
        return failures

    def _write(self, drafts_BD: Tensor, drafts: Drafts) -> None:
        flat = [token for row in drafts for token in row]
        drafts_BD.copy_(to_device(flat, self._device).view_as(drafts_BD))

    def _new_masks(self, B: int, T: int) -> Tensor:
        """Makes masks of all ones on the host. Copies to the device may still read the old ones."""
        pinned = self._device.type == "cuda"
        return torch.full((B, T, self.n_words), -1, dtype=torch.int32, pin_memory=pinned)

    def _read(self) -> None:
        """Waits for the tokens of earlier steps, and has the matchers consume them."""
        for step, matchers in self._unread:
            tokens = step.tokens()
            for i, matcher in matchers.items():
                matcher.consume(tokens[i])
        self._unread.clear()
