"""How ``attention.cu`` is launched.

Shape letters: B sequences, T new tokens of each, S slots, H query heads, J key/value heads, C cache
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

HEAD_DIMS = (64, 96, 128, 256)
MAX_TOKENS = 16
STEP = 16  # kStep of attention.cu


class AttentionArguments(Arguments):
    """``AttentionArgs`` of ``attention.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "cos", "sin", "q_norm", "k_norm")),
        *((name, ctypes.c_void_p) for name in ("positions", "slots", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("out", "partial", "counters")),
        *((name, ctypes.c_int) for name in ("tokens", "heads", "kv_heads", "capacity")),
        *((name, ctypes.c_int) for name in ("window", "chunks", "least_chunk")),
        ("scale", ctypes.c_float),
        ("eps", ctypes.c_float),
    )


@dataclass(frozen=True, kw_only=True)
class AttentionTuning:
    """What a launch can choose for speed.

    Attributes:
        chunks: Into how many a long history is divided, for as many blocks. Decides the order of
            sums.
        least_chunk: Positions of a chunk at least, a multiple of 16: a shorter history has fewer.
            Decides the order of sums.
        warps: Warps of a block. Decides the order of sums.
        stages: Steps of 16 positions that a warp has room for. With fewer there is room for more
            blocks beside each other. Changes no bits.
        columns: The most groups of eight rows of a block. With more each history is read less
            often, with fewer more blocks share the work. Changes no bits.
    """

    chunks: int = 16
    least_chunk: int = 256
    warps: int = 8
    stages: int = 2
    columns: int = 2


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
        window: Positions that a token sees, itself included, or None for all.
        tuning: What was chosen for speed.
    """

    batch: int
    tokens: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_positions: int
    window: int | None = None
    tuning: AttentionTuning = AttentionTuning()

    def __post_init__(self) -> None:
        assert 1 <= self.tokens <= MAX_TOKENS, f"{self.tokens} tokens"
        assert self.head_dim in HEAD_DIMS, f"heads of {self.head_dim}"
        assert self.n_heads % self.n_kv_heads == 0, "query heads share key/value heads evenly"
        assert self.window is None or self.window >= 1, f"a window of {self.window}"
        least = self.tuning.least_chunk
        assert least > 0, f"chunks of {least} positions"
        assert least % STEP == 0, f"chunks of {least} positions"
        assert self.tuning.chunks >= 1, f"{self.tuning.chunks} chunks"

    @property
    def columns(self) -> int:
        """Groups of eight rows of a block: as tuned, where there are rows and registers for it."""
        rows = self.tokens * self.n_heads // self.n_kv_heads
        return 1 if rows <= 8 or self.head_dim > 128 else self.tuning.columns

    @property
    def groups(self) -> int:
        """Groups of blocks that share a history and nothing else."""
        rows = self.tokens * self.n_heads // self.n_kv_heads
        return self.batch * self.n_kv_heads * -(-rows // (8 * self.columns))

    def chunk_at(self, position: int) -> int:
        """Positions of a chunk of what the token at a position sees, as in ``attention.cu``."""
        seen = position if self.window is None else min(position, self.window - 1)
        turn = STEP * self.tuning.warps
        return max(self.tuning.least_chunk, turn * (seen // (turn * self.tuning.chunks) + 1))

    @property
    def chunks(self) -> int:
        """The most chunks of a history, as far as any of the new tokens sees it."""
        most = self.tuning.chunks
        if self.window is not None:  # its ends lie in chunks that it does not fill
            inner = (self.window + self.tokens - 2) // self.chunk_at(self.n_positions)
            most = max(most, inner + 2)
        return min(most, -(-self.n_positions // self.tuning.least_chunk))

    @property
    def blocks(self) -> int:
        """The most blocks that share a history: tokens' chunks may be of two lengths."""
        lengths = {self.chunk_at(0), self.chunk_at(self.n_positions - 1)}
        return self.chunks * (2 if self.tokens > 1 and len(lengths) > 1 else 1)

    @property
    def n_partial(self) -> int:
        """Float32 values of workspace that ``partial`` must have."""
        share = 8 * self.columns * (self.head_dim + 2)
        return 0 if self.blocks == 1 else self.groups * self.blocks * share

    @property
    def n_counters(self) -> int:
        """Zeros that ``counters`` must have."""
        return 0 if self.blocks == 1 else 2 * self.groups

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block, laid out as in ``Attention``'s constructor."""
        rows, warps, stages = 8 * self.columns, self.tuning.warps, self.tuning.stages
        new = 2 * (rows + 4 * self.tokens) * self.head_dim + 8 * rows
        barriers = 8 * warps * stages + (8 if warps * stages % 2 else 16)
        rings = 4 * warps * stages * STEP * self.head_dim
        found = 4 * warps * rows * (self.head_dim + 2)
        joined = 8 * self.chunks * rows
        return new + barriers + max(rings, found, joined)

    @property
    def kernel(self) -> Kernel:
        """The instance of ``attention.cu``."""
        warps, stages = self.tuning.warps, self.tuning.stages
        return Kernel(
            name=f"attention_e{self.head_dim}_w{warps}c{self.columns}s{stages}",
            file="attention.cu",
            function=f"attention<{self.head_dim}, {warps}, {self.columns}, {stages}>",
            args="AttentionArgs",
            threads=32 * warps,
            # Few enough for a block of a product beside it, where shared memory has room as well.
            registers=120 if self.columns == 1 and self.head_dim <= 128 else None,
        )

    def call(
        self,
        qkv: Tensor,
        out: Tensor,
        keys_SJCE: Tensor,
        values_SJCE: Tensor,
        slots_B: Tensor,
        positions_B: Tensor,
        cos_CE: Tensor,
        sin_CE: Tensor,
        *,
        q_norm_E: Tensor | None = None,
        k_norm_E: Tensor | None = None,
        eps: float = 0.0,
        partial: Tensor | None = None,
        counters: Tensor | None = None,
    ) -> Call:
        """The launch that writes new keys and values, and ``out``; see ``reference``.

        Args:
            qkv: bfloat16 [B * T, (H + 2J) * E].
            out: bfloat16 [B * T, H * E].
            keys_SJCE: bfloat16, the cache.
            values_SJCE: Like ``keys_SJCE``.
            slots_B: int64, the slot of each sequence.
            positions_B: int64, of the first new token of each sequence.
            cos_CE: float32, both halves alike.
            sin_CE: Like ``cos_CE``.
            q_norm_E: bfloat16, where query heads are normalized.
            k_norm_E: bfloat16, where key heads are.
            eps: Of those norms.
            partial: float32 workspace of ``n_partial``, where histories have several chunks.
            counters: int32 workspace of ``n_counters`` zeros, which are zeros again afterwards.
        """
        rows, width = self.batch * self.tokens, self.n_heads + 2 * self.n_kv_heads
        cache = (self.n_kv_heads, self.n_positions, self.head_dim)
        assert qkv.shape == (rows, width * self.head_dim), f"qkv is {tuple(qkv.shape)}"
        assert out.shape == (rows, self.n_heads * self.head_dim), f"out is {tuple(out.shape)}"
        assert keys_SJCE.shape[1:] == cache, f"keys are {tuple(keys_SJCE.shape)}"
        assert keys_SJCE.shape == values_SJCE.shape, f"values are {tuple(values_SJCE.shape)}"
        for tensor in (positions_B, slots_B):
            assert tensor.shape == (self.batch,), f"{tuple(tensor.shape)} for each sequence"
            assert tensor.dtype == torch.int64, f"{tensor.dtype} for each sequence"
        assert cos_CE.shape[0] >= self.n_positions, "a rotation for each position"
        assert self.n_partial <= (0 if partial is None else partial.numel()), "too small"
        assert self.n_counters <= (0 if counters is None else counters.numel()), "too small"
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
            slots=slots_B,
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
            least_chunk=self.tuning.least_chunk,
            scale=self.head_dim**-0.5 * math.log2(math.e),
            eps=eps,
        )
        return Call(
            kernel=self.kernel,
            grid=(self.groups // self.batch, self.batch, self.blocks),
            shared_bytes=self.shared_bytes,
            args=args,
            tensors=tensors,
        )
