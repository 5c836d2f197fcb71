"""Launches of ``attention.cu``, decode attention over the cache.

A *row* is a query head of a new token; rows that share a key/value head read the same keys. An
*octet* is eight rows. A *block* is a thread block.

Shape letters: B sequences, T new tokens of each, S seats, H query heads, J key/value heads, C cache
positions, E head dimension.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hotloop.kernels.cuda.compile import Kernel
from hotloop.kernels.cuda.launch import Arguments, Call
from hotloop.kernels.cuda.linear import NextOperand, NextOperandArguments

HEAD_DIMS = (64, 96, 128, 256)
MAX_TOKENS = 16
TILE = 16  # kTile of attention.cu


class AttentionArguments(Arguments):
    """``AttentionArgs`` of ``attention.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "cos", "sin", "q_norm", "k_norm")),
        *((name, ctypes.c_void_p) for name in ("positions", "seats", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("out", "partial", "counters")),
        *((name, ctypes.c_int) for name in ("tokens", "heads", "kv_heads", "capacity")),
        *((name, ctypes.c_int) for name in ("window", "chunks", "min_chunk")),
        ("scale", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("next_operand", NextOperandArguments),
    )


@dataclass(frozen=True, kw_only=True)
class AttentionTuning:
    """Parameters that are chosen for speed.

    Attributes:
        chunks: The number of chunks of a long sequence; each chunk has a block of its own.
            Determines the order of sums.
        min_chunk: The fewest positions of a chunk, a multiple of 16: a short sequence has fewer
            chunks. Determines the order of sums.
        warps: The number of chains of sums of a chunk (``kChains``), which take tiles of 16
            positions in turn. If ``turns`` is 1, each chain has a warp of the block. Determines the
            order of sums.
        turns: The number of chains that a warp computes, one after the other. With two, a block has
            half as many warps, and more blocks fit on a multiprocessor. Does not change results.
        stages: Tiles of 16 positions in a warp's ring. With fewer stages, more blocks fit on a
            multiprocessor. Does not change results.
        octets: The most octets of rows that a block serves. With more octets, the history is read
            less often; with fewer, more blocks share the work. Does not change results.
    """

    chunks: int = 16
    min_chunk: int = 256
    warps: int = 8
    turns: int = 1
    stages: int = 2
    octets: int = 2


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """Attention for given shapes.

    Attributes:
        batch: B.
        tokens: T, up to 16.
        n_heads: H.
        n_kv_heads: J.
        head_dim: E: 64, 96, 128 or 256.
        n_positions: C.
        scale: The factor of a query's product with a key; None is the inverse square root of E.
        window: The number of positions that a token sees, itself included, or None for all.
        tuning: Parameters chosen for speed.
        stores_operand: The result is stored as the operand of the next matrix product.
    """

    batch: int
    tokens: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_positions: int
    scale: float | None = None
    window: int | None = None
    tuning: AttentionTuning = AttentionTuning()
    stores_operand: bool = False

    def __post_init__(self) -> None:
        assert 1 <= self.tokens <= MAX_TOKENS, f"{self.tokens} tokens"
        assert self.head_dim in HEAD_DIMS, f"heads of {self.head_dim}"
        assert self.n_heads % self.n_kv_heads == 0, "query heads share key/value heads evenly"
        assert self.window is None or self.window >= 1, f"a window of {self.window}"
        least = self.tuning.min_chunk
        assert least > 0, f"chunks of {least} positions"
        assert least % TILE == 0, f"chunks of {least} positions"
        assert self.tuning.chunks >= 1, f"{self.tuning.chunks} chunks"
        assert self.tuning.warps % self.tuning.turns == 0, f"{self.tuning.turns} turns"

    @property
    def octets(self) -> int:
        """Octets of rows of a block, if there are enough rows and registers."""
        rows = self.tokens * self.n_heads // self.n_kv_heads
        return 1 if rows <= 8 or self.head_dim > 128 else self.tuning.octets

    @property
    def groups(self) -> int:
        """Groups of blocks; the blocks of a group serve the same rows."""
        rows = self.tokens * self.n_heads // self.n_kv_heads
        return self.batch * self.n_kv_heads * -(-rows // (8 * self.octets))

    def chunk_at(self, position: int) -> int:
        """Returns the positions per chunk for a token at a position, as ``attention.cu`` does."""
        seen = position if self.window is None else min(position, self.window - 1)
        block_tile = TILE * self.tuning.warps
        length = block_tile * (seen // (block_tile * self.tuning.chunks) + 1)
        return max(self.tuning.min_chunk, length)

    @property
    def chunks(self) -> int:
        """The most chunks of the positions that the new tokens see."""
        most = self.tuning.chunks
        if self.window is not None:  # a window fills its first and last chunk only partly
            inner = (self.window + self.tokens - 2) // self.chunk_at(self.n_positions)
            most = max(most, inner + 2)
        return min(most, -(-self.n_positions // self.tuning.min_chunk))

    @property
    def blocks(self) -> int:
        """The most blocks of a group: the new tokens may have chunks of two lengths."""
        lengths = {self.chunk_at(0), self.chunk_at(self.n_positions - 1)}
        return self.chunks * (2 if self.tokens > 1 and len(lengths) > 1 else 1)

    @property
    def n_partial(self) -> int:
        """The size of the workspace ``partial``, in float32 values."""
        per_block = 8 * self.octets * (self.head_dim + 2)
        return 0 if self.blocks == 1 else self.groups * self.blocks * per_block

    @property
    def n_counters(self) -> int:
        """The size of the workspace ``counters``."""
        return 0 if self.blocks == 1 else 2 * self.groups

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block, laid out as in ``Attention``'s constructor."""
        rows, chains, stages = 8 * self.octets, self.tuning.warps, self.tuning.stages
        warps = chains // self.tuning.turns
        new = 2 * (rows + 4 * self.tokens) * self.head_dim + 8 * rows
        barriers = 8 * warps * stages + (8 if warps * stages % 2 else 16)
        rings = 4 * warps * stages * TILE * self.head_dim
        of_sequence = self.tokens * self.n_heads // self.n_kv_heads
        partial_rows = rows if self.tuning.turns == 1 else min(rows, of_sequence)
        partial = 4 * chains * partial_rows * (self.head_dim + 2)
        results = max(partial, 8 * self.chunks * rows)  # of the chains, or of the chunks
        return new + barriers + (max(rings, results) if self.tuning.turns == 1 else rings + results)

    @property
    def kernel(self) -> Kernel:
        """The instance of ``attention.cu``."""
        chains, turns, stages = self.tuning.warps, self.tuning.turns, self.tuning.stages
        warps = f"w{chains}" if turns == 1 else f"w{chains // turns}r{turns}"
        following = "_next" if self.stores_operand else ""
        numbers = f"{self.head_dim}, {chains}, {turns}, {self.octets}, {stages}"
        return Kernel(
            name=f"attention_e{self.head_dim}_{warps}c{self.octets}s{stages}{following}",
            file="attention.cu",
            function=f"attention<{numbers}, {str(self.stores_operand).lower()}>",
            args="AttentionArgs",
            threads=32 * chains // turns,
            registers=self._registers,
        )

    @property
    def _registers(self) -> int | None:
        """The most registers of a thread, so that other blocks fit on the multiprocessor."""
        if self.octets > 1 or self.head_dim > 128:
            return None
        # With 120, a block of linear.cu fits beside it if there is shared memory for one. With two
        # turns, a block has half as many threads, and with 128 four of these blocks fit.
        return 120 if self.tuning.turns == 1 else 128

    def call(
        self,
        qkv: Tensor,
        out: Tensor,
        keys_SJCE: Tensor,
        values_SJCE: Tensor,
        seats_B: Tensor,
        positions_B: Tensor,
        cos_CE: Tensor,
        sin_CE: Tensor,
        *,
        q_norm_E: Tensor | None = None,
        k_norm_E: Tensor | None = None,
        eps: float = 0.0,
        partial: Tensor | None = None,
        counters: Tensor | None = None,
        next_operand: NextOperand | None = None,
    ) -> Call:
        """Returns the launch that writes new keys, new values and ``out``.

        It is specified by ``reference.fused_attention``.

        Args:
            qkv: bfloat16 [B * T, (H + 2J) * E].
            out: bfloat16 [B * T, H * E], written.
            keys_SJCE: bfloat16, the cache.
            values_SJCE: Like ``keys_SJCE``.
            seats_B: int64, the seat of each sequence.
            positions_B: int64, the position of the first new token of each sequence.
            cos_CE: float32 cosines of rope, both halves alike.
            sin_CE: float32 sines of rope, both halves alike.
            q_norm_E: bfloat16, weight of the norm of query heads, or None.
            k_norm_E: bfloat16, weight of the norm of key heads, or None.
            eps: Epsilon of those norms.
            partial: float32 workspace of ``n_partial``, if that is not 0.
            counters: int32 workspace of ``n_counters`` zeros, which are zeros again afterwards.
            next_operand: With ``stores_operand``, written in place of ``out``.
        """
        assert (next_operand is not None) == self.stores_operand, (
            "stores_operand decides whether there is a next_operand"
        )
        next_args, next_tensors = NextOperand.arguments_of(next_operand)
        rows, width = self.batch * self.tokens, self.n_heads + 2 * self.n_kv_heads
        cache = (self.n_kv_heads, self.n_positions, self.head_dim)
        assert qkv.shape == (rows, width * self.head_dim), f"qkv is {tuple(qkv.shape)}"
        assert out.shape == (rows, self.n_heads * self.head_dim), f"out is {tuple(out.shape)}"
        assert keys_SJCE.shape[1:] == cache, f"keys are {tuple(keys_SJCE.shape)}"
        assert keys_SJCE.shape == values_SJCE.shape, f"values are {tuple(values_SJCE.shape)}"
        for tensor in (positions_B, seats_B):
            assert tensor.shape == (self.batch,), f"{tuple(tensor.shape)} for each sequence"
            assert tensor.dtype == torch.int64, f"{tensor.dtype} for each sequence"
        assert cos_CE.shape[0] >= self.n_positions, "cosines must cover every position"
        assert self.n_partial <= (0 if partial is None else partial.numel()), (
            "the workspace is too small"
        )
        assert self.n_counters <= (0 if counters is None else counters.numel()), (
            "the workspace is too small"
        )
        for tensor in (qkv, out, keys_SJCE, values_SJCE):
            assert tensor.dtype == torch.bfloat16, f"{tensor.dtype}"
            assert tensor.data_ptr() % 16 == 0, "tensors are read 16 bytes at a time"
        args, tensors = AttentionArguments.of(
            qkv=qkv,
            cos=cos_CE,
            sin=sin_CE,
            q_norm=q_norm_E,
            k_norm=k_norm_E,
            positions=positions_B,
            seats=seats_B,
            keys=keys_SJCE,
            values=values_SJCE,
            out=out,
            partial=partial,
            counters=counters,
            tokens=self.tokens,
            heads=self.n_heads,
            kv_heads=self.n_kv_heads,
            capacity=self.n_positions,
            window=self.window or 0,
            chunks=self.tuning.chunks,
            min_chunk=self.tuning.min_chunk,
            scale=(self.head_dim**-0.5 if self.scale is None else self.scale) * math.log2(math.e),
            eps=eps,
            next_operand=next_args,
        )
        return Call(
            kernel=self.kernel,
            grid=(self.groups // self.batch, self.batch, self.blocks),
            shared_bytes=self.shared_bytes,
            args=args,
            tensors=(*tensors, *next_tensors),
        )
