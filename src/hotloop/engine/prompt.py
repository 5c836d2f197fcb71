"""Prefill with the weights of the fused step.

Short prompts run as decode steps of eight tokens, which cost little more than steps of one, since
both read the packed weights once. Longer prompts run by chunks with GEMMs (``gemm_prefill``). The
decoder (``models.decoder``) is the specification of both ways.

Shape letters: T tokens of one sequence, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hotloop.engine.fused import FusedForward, fused_forms
from hotloop.engine.gemm_prefill import GemmPrefill
from hotloop.engine.graphs import capture
from hotloop.kernels.cuda.launch import Launcher
from hotloop.kernels.cuda.packing import Format
from hotloop.models.cache import KVCache
from hotloop.models.decoder import Decoder

STEP_TOKENS = 8
"""Tokens of a fused step, which costs little more than a step of one token."""

SHORT_PROMPT = 64
"""The longest prompt that may run as decode steps."""


def max_step_prefill_tokens(forms: Sequence[Format]) -> int:
    """Returns the longest prompt that runs faster as decode steps than with GEMMs.

    A step reads the packed weight, and takes a tenth longer with eight tokens than with one.
    Dequantizing reads the packed weight too, and writes bfloat16, which the GEMM reads; plain rows
    it reads as they are.
    """
    nbytes = sum(form.nbytes for form in forms)
    dequantized = sum(form.n * form.k for form in forms if not form.plain_rows)
    read = nbytes + 4 * dequantized if dequantized else nbytes
    return min(SHORT_PROMPT, STEP_TOKENS * max(1, int(read / (1.1 * nbytes))))


def spans(ids_T: Tensor, start: int, size: int) -> Iterator[tuple[range, Tensor]]:
    """Splits tokens into chunks of ``size``; yields ranges, and positions from ``start`` on."""
    for first in range(0, len(ids_T), size):
        chunk = range(first, min(first + size, len(ids_T)))
        yield chunk, torch.arange(start + chunk.start, start + chunk.stop, device=ids_T.device)


class StepPrefill:
    """Prefills one seat by decode steps of a few tokens: on a GPU, replays of one CUDA graph.

    Args:
        forward: The fused step.
        device: The device of the model.
    """

    def __init__(self, forward: FusedForward, device: torch.device) -> None:
        self._forward, self._device = forward, device
        self._ids = torch.zeros(1, STEP_TOKENS, dtype=torch.int64, device=device)
        self._positions = torch.zeros(1, STEP_TOKENS, dtype=torch.int64, device=device)
        self._seats = torch.zeros(1, dtype=torch.int64, device=device)
        self._captured: tuple[Any, Tensor] | None = None

    def __call__(self, ids_T: Tensor, positions_T: Tensor, seat: int) -> Tensor:
        """Computes logits [T, V] of up to ``STEP_TOKENS`` tokens, valid until the next call.

        Padding tokens write cache positions that later tokens overwrite before any read, and none
        beyond the seat's end: the others follow the first position.
        """
        n = len(ids_T)
        self._ids[0, :n] = ids_T
        self._positions[0, :n] = positions_T
        self._seats.fill_(seat)
        if self._captured is None:
            return self._run()[:n]
        graph, logits_TV = self._captured
        graph.replay()
        return logits_TV[:n]

    def warm_up(self) -> None:
        """Captures the graph; overwrites the first positions of the seat used last."""
        if self._device.type == "cuda":
            self._captured = capture(self._run, self._device)

    def _run(self) -> Tensor:
        logits_BTV, _ = self._forward(self._ids, self._positions, self._seats)
        return logits_BTV[0]


class FusedPrefill:
    """Prefills seats, with decode steps for short prompts and GEMMs for longer ones.

    Args:
        forward: The fused step.
        decoder: The model, or a rank's shard of it.
        cache: Its cache.
        launcher: Launches kernels.
        chunk: The most tokens of a chunk.
        shared: The model is sharded over ranks.
    """

    def __init__(
        self,
        forward: FusedForward,
        decoder: Decoder,
        cache: KVCache,
        launcher: Launcher,
        *,
        chunk: int,
        shared: bool,
    ) -> None:
        self._forward = forward
        self._steps = StepPrefill(forward, decoder.device)
        self._gemm = GemmPrefill(decoder, cache, launcher, chunk=chunk, shared=shared)
        gate_up = decoder.blocks[0].feed_forward.gate_up_proj
        self._max_step_tokens = max_step_prefill_tokens(fused_forms(gate_up))

    def warm_up(self) -> None:
        """Captures prefill graphs and warms up libraries; overwrites seat 0."""
        self._steps.warm_up()
        self._gemm.warm_up()

    def __call__(self, ids_T: Tensor, start: int, seat: int) -> Callable[[], Tensor]:
        """Prefills a seat with a chunk from position ``start`` on.

        Returns:
            Computes the last token's logits [1, V], before the next prefill.
        """
        if len(ids_T) <= self._max_step_tokens:
            *_, (_, logits_TV) = self.logits(ids_T, start, seat)
            return lambda: logits_TV[-1:]
        last_1D = self._gemm(ids_T, start, seat)
        return lambda: self._forward.logits(last_1D)

    def logits(self, ids_T: Tensor, start: int, seat: int) -> Iterator[tuple[range, Tensor]]:
        """Prefills a seat by decode steps, with logits of every token.

        Yields:
            For each step, the range of its tokens in ``ids_T`` and their logits [T, V].
        """
        for chunk, positions_T in spans(ids_T, start, STEP_TOKENS):
            yield chunk, self._steps(ids_T[chunk.start : chunk.stop], positions_T, seat)
