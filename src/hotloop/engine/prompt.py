"""Prefill with the weights of the fused step.

Short prompts run as *eight-token passes*: decode steps with eight tokens of each sequence. Such a
pass costs little more than a step with one token, since both read the packed weights once. Several
short prompts share passes, because a row's bits do not depend on the other rows. Longer prompts run
in chunks with GEMMs (``gemm_prefill``). The decoder (``models.decoder``) specifies both.

Shape letters: B sequences, T tokens of each, D model width, N tokens of all sequences, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hotloop.engine.core import PrefillBatching, ScoreBatching, padded_rows
from hotloop.engine.fused import FusedForward, fused_forms
from hotloop.engine.gemm_prefill import GemmPrefill
from hotloop.engine.graphs import capture
from hotloop.engine.rows import to_device
from hotloop.kernels.cuda.launch import Launcher
from hotloop.kernels.cuda.packing import Format
from hotloop.models.cache import KVCache
from hotloop.models.decoder import Decoder

PASS_TOKENS = 8
"""Tokens of each sequence in an eight-token pass."""

MAX_PASS_PREFILL_TOKENS = 64
"""The longest prompt that may run as eight-token passes."""

MAX_PASS_PROMPTS = 8
"""The most prompts of a pass. They have 64 rows, the most of one launch of a matrix product."""


class Chunk(NamedTuple):
    """A chunk of a prompt.

    Attributes:
        ids: Its tokens, int64 [T].
        start: Position of the first token.
        seat: The seat that holds the earlier tokens.
    """

    ids: Tensor
    start: int
    seat: int


Spans = Sequence[tuple[int, range]]
"""Parts of several chunks: the index of a chunk, and the range of its tokens."""


def pass_prompts(n: int) -> int:
    """Returns how many of ``n`` prompts one pass prefills."""
    return min(MAX_PASS_PROMPTS, n)


def max_pass_prefill_tokens(forms: Sequence[Format]) -> int:
    """Returns the longest prompt that runs faster as eight-token passes than with GEMMs.

    It compares bytes of memory traffic. A pass reads the packed weight, and takes a tenth longer
    than a step with one token. For a GEMM, the packed weight is read and written in bfloat16 (two
    bytes per element), which the GEMM reads again. Plain rows need no dequantizing.

    Args:
        forms: The packed formats of the pieces of a typical weight.
    """
    packed_bytes = sum(form.nbytes for form in forms)
    n_dequantized = sum(form.n * form.k for form in forms if not form.plain_rows)
    gemm_bytes = packed_bytes + (2 + 2) * n_dequantized
    n_passes = max(1, int(gemm_bytes / (1.1 * packed_bytes)))
    return min(MAX_PASS_PREFILL_TOKENS, PASS_TOKENS * n_passes)


def split_tokens(ids_T: Tensor, start: int, size: int) -> Iterator[tuple[range, Tensor]]:
    """Splits tokens into chunks of ``size``; yields ranges, and positions from ``start`` on."""
    for first in range(0, len(ids_T), size):
        chunk = range(first, min(first + size, len(ids_T)))
        yield chunk, torch.arange(start + chunk.start, start + chunk.stop, device=ids_T.device)


class EightTokenPasses:
    """Prefills seats by eight-token passes: on a GPU, replays of CUDA graphs.

    Args:
        forward: The fused step.
        device: The device of the model.
        n_prompts: The most sequences of a pass.
        scratch: A seat that no sequence uses, for the unused rows of a captured pass.
    """

    def __init__(
        self, forward: FusedForward, device: torch.device, *, n_prompts: int = 1, scratch: int = 0
    ) -> None:
        self._forward, self._device = forward, device
        self._n_prompts, self._scratch = n_prompts, scratch
        # Seat, position and ids of each sequence.
        self._inputs = torch.zeros(n_prompts, 2 + PASS_TOKENS, dtype=torch.int64, device=device)
        self._captured: dict[int, tuple[Any, Tensor]] = {}

    def __call__(self, chunks: Sequence[Chunk]) -> Tensor:
        """Computes logits [B, T, V] of chunks of up to T = ``PASS_TOKENS`` tokens.

        The result is valid until the next call; logits after a shorter chunk's end are undefined.
        Padding tokens write cache positions that later tokens overwrite before any read, and never
        beyond the seat's end.
        """
        n = len(chunks)
        B = padded_rows(n, self._n_prompts) if self._captured else n
        where = [number for chunk in chunks for number in (chunk.seat, chunk.start)]
        where += [self._scratch, 0] * (B - n)
        self._inputs[:B, :2] = to_device(where, self._device).view(B, 2)
        for inputs, (ids_T, _, _) in zip(self._inputs, chunks, strict=False):
            inputs[2 : 2 + len(ids_T)] = ids_T
        if not self._captured:
            return self._run(B)
        graph, logits_BTV = self._captured[B]
        graph.replay()
        return logits_BTV[:n]

    def warm_up(self) -> None:
        """Captures the graphs; overwrites the first positions of a seat."""
        if self._device.type != "cuda":
            return
        self._inputs.zero_()
        pool = None
        captured = {}
        for n in range(self._n_prompts, 0, -1):
            if padded_rows(n, self._n_prompts) == n:
                captured[n] = capture(partial(self._run, n), self._device, pool=pool)
                pool = captured[n][0].pool()
        self._captured = captured

    def _run(self, B: int) -> Tensor:
        seats_B, starts_B = self._inputs[:B, 0].contiguous(), self._inputs[:B, 1:2]
        ids_BT = self._inputs[:B, 2:].contiguous()
        # Only the first position of a sequence is read.
        logits_BTV, _ = self._forward(ids_BT, starts_B.expand_as(ids_BT), seats_B)
        return logits_BTV


class FusedPrefill:
    """Prefills seats, with eight-token passes for short prompts and GEMMs for longer ones.

    Args:
        forward: The fused step.
        decoder: The model, or a rank's shard of it.
        cache: Its cache.
        launcher: Launches kernels.
        chunk: The most tokens of a chunk.
        sharded: The model is sharded over ranks.
        n_prompts: The most prompts that the engine prefills together.

    Attributes:
        prefill_batching: Limits of batched prefill.
        score_batching: Limits of batched scoring.
    """

    def __init__(
        self,
        forward: FusedForward,
        decoder: Decoder,
        cache: KVCache,
        launcher: Launcher,
        *,
        chunk: int,
        sharded: bool,
        n_prompts: int = 1,
    ) -> None:
        self._forward = forward
        n_prompts, scratch = pass_prompts(n_prompts), cache.n_seats - 1
        self._passes = EightTokenPasses(
            forward, decoder.device, n_prompts=n_prompts, scratch=scratch
        )
        self._gemm = GemmPrefill(decoder, cache, launcher, chunk=chunk, sharded=sharded)
        gate_up = decoder.blocks[0].feed_forward.gate_up_proj
        longest = max_pass_prefill_tokens(fused_forms(gate_up))
        self.prefill_batching = PrefillBatching(
            max_prompts=n_prompts,
            max_prompt_tokens=longest,
            max_tokens=n_prompts * longest,
            max_forward_tokens=PASS_TOKENS,
        )
        self.score_batching = ScoreBatching(
            chunk=chunk, max_windows=n_prompts, max_tokens=n_prompts * chunk
        )

    def warm_up(self) -> None:
        """Captures prefill graphs and warms up libraries; overwrites seat 0."""
        self._passes.warm_up()
        self._gemm.warm_up()

    def __call__(self, ids_T: Tensor, start: int, seat: int) -> Callable[[], Tensor]:
        """Prefills a seat with a chunk from position ``start`` on.

        Returns:
            A function that returns the last token's logits [1, V]. It must be called before the
            next prefill.
        """
        if len(ids_T) <= self.prefill_batching.max_prompt_tokens:
            *_, (_, logits_TV) = self.logits([Chunk(ids_T, start, seat)])
            return lambda: logits_TV[-1:]
        last_1D = self._gemm(ids_T, start, seat)
        return lambda: self._forward.logits(last_1D)

    def prefill_batch(self, chunks: Sequence[Chunk]) -> Tensor:
        """Prefills several seats at once, within the limits of ``prefill_batching``.

        Returns:
            The logits [B, V] of the last token of each.
        """
        lengths = [len(chunk.ids) for chunk in chunks]
        n_passes = self.prefill_batching.n_forwards(max(lengths))
        assert n_passes == self.prefill_batching.n_forwards(min(lengths)), (
            f"prompts of {lengths} tokens"
        )
        logits_BTV = None
        for first in range(0, n_passes * PASS_TOKENS, PASS_TOKENS):
            logits_BTV = self._passes(
                [
                    Chunk(ids_T[first : first + PASS_TOKENS], start + first, seat)
                    for ids_T, start, seat in chunks
                ]
            )
        assert logits_BTV is not None, "no prompt"
        last = [(n - 1) % PASS_TOKENS for n in lengths]
        return torch.stack([logits_TV[t] for logits_TV, t in zip(logits_BTV, last, strict=True)])

    def logits(self, chunks: Sequence[Chunk]) -> Iterator[tuple[Spans, Tensor]]:
        """Prefills seats by eight-token passes, with logits of every token.

        Yields:
            For each pass, the parts of chunks that it computes, and the logits [N, V] of their
            tokens, concatenated. These are valid until the next pass.
        """
        for first in range(0, max(len(chunk.ids) for chunk in chunks), PASS_TOKENS):
            parts, spans = [], []
            for i, (ids_T, start, seat) in enumerate(chunks):
                if len(part := ids_T[first : first + PASS_TOKENS]):
                    parts.append(Chunk(part, start + first, seat))
                    spans.append((i, range(first, first + len(part))))
            logits_BTV = self._passes(parts)
            each = [x[: len(part)] for x, (_, part) in zip(logits_BTV, spans, strict=True)]
            yield spans, torch.cat(each) if len(each) > 1 else each[0]
