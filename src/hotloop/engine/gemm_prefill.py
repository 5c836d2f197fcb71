"""Prefill by GEMMs in bfloat16; other weights are dequantized for each chunk.

cuBLAS computes the GEMMs; our own kernels compute everything between them. Chunks of up to 512
tokens are captured in CUDA graphs: the host takes longer to launch their kernels than the GPU to
run them, which would delay the decode steps of other requests. The decoder (``models.decoder``) is
the specification.

Shape letters: T tokens of one sequence, D model width, K input and N output features of a GEMM, H
query heads, J key/value heads, E head dimension, S seats, C cache positions of a seat, P positions
in all seats (see ``_positions``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hotloop.engine.fused import fused_forms, fused_kernels
from hotloop.engine.graphs import PaddedGraphs
from hotloop.engine.prefill_workspace import Views, Workspace
from hotloop.kernels.cuda import prompt
from hotloop.kernels.cuda.dequantize import dequantize_call, dequantize_kernel
from hotloop.kernels.cuda.launch import Call, Launcher, PreparedLaunch
from hotloop.kernels.cuda.prompt import GemmOutput, Heads
from hotloop.models.cache import KVCache
from hotloop.models.decoder import Decoder, RMSNorm, SelfAttention
from hotloop.models.linear import Linear
from hotloop.types import MAX_PREFILL_CHUNK

MAX_CAPTURED_TOKENS = 512
"""The longest chunk that is captured. The GPU takes longer to run a longer chunk than the host to
launch it."""

CAPTURE_MULTIPLE = 64
"""Captured chunks are padded to a multiple of this many tokens."""

LAST_ROWS = CAPTURE_MULTIPLE
"""The number of last rows of a chunk that the last layer computes, except for keys and values. The
last token is one of them, since a chunk has less padding than that."""

CUDNN_LENGTHS = (256, 512, 768, *range(1024, MAX_PREFILL_CHUNK + 1, 1024))
"""Token counts of first chunks that cuDNN attention is planned for. A plan takes some 60 ms, so
first chunks are padded to one of these, and all are planned at warm-up."""

WARMUP_TOKENS = (640, 1024)
"""Token counts that are run at warm-up, to load cuBLAS's kernels."""


@dataclass(frozen=True)
class _Layer:
    """A layer's kernel launches, for any number of rows, and functions that return its weights.

    Attributes:
        input_norm: Adds the previous layer's output to the residual stream, and normalizes it.
        rope: Applies head norms and rope to qkv, and stores keys and values in the cache.
        post_attention_norm: Adds attention's output to the residual stream, and normalizes it.
        swiglu: Applies SwiGLU to gate_up.
        qkv_proj: Returns the weight as [K, N], dequantized for this call or in plain rows.
        o_proj: Like ``qkv_proj``.
        gate_up_proj: Like ``qkv_proj``.
        down_proj: Like ``qkv_proj``.
    """

    input_norm: PreparedLaunch
    rope: PreparedLaunch
    post_attention_norm: PreparedLaunch
    swiglu: PreparedLaunch
    qkv_proj: Callable[[], Tensor]
    o_proj: Callable[[], Tensor]
    gate_up_proj: Callable[[], Tensor]
    down_proj: Callable[[], Tensor]


class GemmPrefill:
    """Prefills one seat with GEMMs, one chunk a call.

    Addresses do not depend on the number of tokens, so every launch is prepared once. On a GPU,
    chunks of up to ``MAX_CAPTURED_TOKENS``, padded to a multiple of ``CAPTURE_MULTIPLE``, are
    replays of CUDA graphs, which ``warm_up`` captures: one set for the first chunk of a prompt, and
    another for later chunks, which begin at the position that a device scalar holds. A later chunk
    whose padding would exceed the seat is launched kernel by kernel.

    Args:
        decoder: The model, or a rank's shard of it.
        cache: Its cache.
        launcher: Launches kernels.
        chunk: The most tokens of a call.
        sharded: The model is sharded over ranks; then nothing is captured.

    Attributes:
        captures: Chunks are captured and replayed.
    """

    def __init__(
        self, decoder: Decoder, cache: KVCache, launcher: Launcher, *, chunk: int, sharded: bool
    ) -> None:
        self._decoder, self._cache, self._launcher = decoder, cache, launcher
        self._sharded, self._blocks, self._device = sharded, decoder.blocks, decoder.device
        first, *_ = self._blocks
        linears = [linear for block in self._blocks for linear in block.linears.values()]
        forms = dict.fromkeys(form for linear in linears for form in fused_forms(linear))
        packed = [form for form in forms if not form.plain_rows]
        launcher.load((*prompt.kernels(first.attention.head_dim), *map(dequantize_kernel, packed)))
        sizes = [linear.n * linear.k for linear in linears if not _has_plain_rows(linear)]
        largest = max(sizes, default=0)
        self._weight = torch.empty(largest, dtype=torch.bfloat16, device=self._device)
        self._workspace = Workspace(first.config, min(chunk, cache.n_positions), self._device)
        self._seat, self._start = torch.zeros(2, 1, dtype=torch.int64, device=self._device)
        self._row_range, self._key_range = torch.zeros(2, 2, dtype=torch.int32, device=self._device)
        self._layers = self._prepare()
        most = min(MAX_CAPTURED_TOKENS, self._workspace.rows)
        sizes = range(CAPTURE_MULTIPLE, most + CAPTURE_MULTIPLE, CAPTURE_MULTIPLE)
        sizes = {min(n, most) for n in sizes}
        self._captured, self._captured_later = (PaddedGraphs(sizes, self._device) for _ in range(2))
        self.captures = self._device.type == "cuda" and not sharded

    def __call__(self, ids_T: Tensor, start: int, seat: int) -> Tensor:
        """Prefills a seat with one chunk, from position ``start`` on.

        Returns:
            The residual stream [1, D] of the last token after the last layer.
        """
        T = len(ids_T)
        assert start + T <= self._cache.n_positions, f"{T} tokens from {start} on do not fit"
        self._seat.fill_(seat)
        self._start.fill_(start)
        graphs = self._captured_later if start else self._captured
        rows = T
        if graphs and self.captures and start + graphs.padded(T) <= self._cache.n_positions:
            graphs.replay(ids_T)  # later tokens overwrite padding's positions in the cache
            rows = int(graphs.padded(T))
        else:
            self._run(ids_T, start)
        # The last layer has moved the last rows to the beginning of the workspace.
        views, at = self._workspace.views(T), T - 1 - (rows - _last_rows(rows))
        last = slice(at, at + 1)
        down = self._reduced(self._blocks[-1].feed_forward.down_proj, views.part[last])
        return views.x[last] + down.with_scale_and_bias()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Captures chunks of every size, and warms up cuDNN plans and cuBLAS kernels.

        It overwrites seat 0, so no seat may be in use.
        """
        rows = self._workspace.rows
        if self.captures:
            pool = self._captured.capture(partial(self._run, start=0))
            if rows < self._cache.n_positions:  # else every prompt is one chunk
                self._captured_later.capture(partial(self._run, start=1), pool)
        if self._device.type == "cuda":
            for size in CUDNN_LENGTHS:
                self._attend_cudnn(self._blocks[0].attention, min(size, rows))
            for size in WARMUP_TOKENS:
                ids_T = torch.zeros(min(size, rows), dtype=torch.int64, device=self._device)
                self._run(ids_T, 0)

    def _run(self, ids_T: Tensor, start: int) -> None:
        """Runs tokens through the layers; the last layer's output remains to be added.

        Of the last layer only the cache and the last token are used. So it computes ``_last_rows``
        of the tokens, which become the first rows of the workspace.
        """
        T = rows = len(ids_T)
        views = self._workspace.views(T)
        views.x.copy_(self._decoder.embedding(ids_T))
        _, kv_heads, capacity, _ = self._cache.layer(0)[0].shape
        self._row_range[1:].fill_(T)
        torch.mul(self._seat, kv_heads * capacity, out=self._key_range[:1])
        torch.add(self._key_range[:1], self._start + T, out=self._key_range[1:])
        for i, (layer, block) in enumerate(zip(self._layers, self._blocks, strict=True)):
            layer.input_norm(T)
            torch.mm(views.normalized, layer.qkv_proj(), out=views.qkv)
            layer.rope(T)
            if block is self._blocks[-1] and _last_rows(T) < T:
                rows = _last_rows(T)
                last_x, views = views.x[-rows:], self._workspace.views(rows)
                views.x.copy_(last_x)
                self._row_range[1:].fill_(rows)
            torch.mm(self._attend(i, T, start, rows), layer.o_proj(), out=views.part)
            self._sum(block.attention.o_proj, views.part)
            layer.post_attention_norm(rows)
            torch.mm(views.normalized, layer.gate_up_proj(), out=views.gate_up)
            layer.swiglu(rows)
            torch.mm(views.gated, layer.down_proj(), out=views.part)
            self._sum(block.feed_forward.down_proj, views.part)

    def _sum(self, linear: Linear, part_TD: Tensor) -> None:
        """Applies scale and bias to a GEMM's output, and sums it over ranks, in place.

        With a single rank it does nothing: the next kernel applies them (see ``_reduced``).
        """
        if self._sharded:
            y_TD = _gemm_output(linear, part_TD).with_scale_and_bias()
            part_TD.copy_(self._blocks[0].all_reduce(y_TD))

    def _reduced(self, linear: Linear, y: Tensor) -> GemmOutput:
        """Returns a GEMM's output after ``_sum``, with the scale and bias still to be applied."""
        return GemmOutput(y=y) if self._sharded else _gemm_output(linear, y)

    def _attend(self, i: int, T: int, start: int, rows: int) -> Tensor:
        """Computes attention [rows, H * E] of the last ``rows`` of a chunk's T tokens.

        All rows of a first chunk attend to its own keys. Later chunks, fewer rows, and layers with
        a window attend to the seat in the cache, whose range of keys is read from the device.
        """
        layer, (keys, values) = self._blocks[i].attention, self._cache.layer(i)
        q = self._heads(T, layer)[0][T - rows :]
        if self._device.type != "cuda":
            first = int(self._start)
            out_BTHE = layer.kernel(
                q[None],
                keys,
                values,
                self._seat,
                torch.arange(first + T - rows, first + T)[None],
                first_seat=int(self._seat),
                length=first + T,
                window=layer.window,
                scale=layer.scale,
            )
            return out_BTHE.reshape(rows, -1)
        if start > 0 or rows < T or (layer.window is not None and layer.window < T):
            return self._attend_flash(
                layer, q, _positions(keys), _positions(values), self._key_range
            )
        return self._attend_cudnn(layer, T)

    def _attend_flash(
        self,
        layer: SelfAttention,
        q_THE: Tensor,
        keys_PJE: Tensor,
        values_PJE: Tensor,
        key_range: Tensor,
    ) -> Tensor:
        """Computes causal flash attention [T, H * E]; the last query is at the last key.

        Args:
            layer: The layer.
            q_THE: Queries.
            keys_PJE: Keys of all seats as one sequence; see ``_positions``.
            values_PJE: Values, in the same way.
            key_range: int32 [2], the range of keys to attend to, on the device.
        """
        out_THE, *_ = torch.ops.aten._flash_attention_forward(
            q_THE,
            keys_PJE,
            values_PJE,
            self._row_range,
            key_range,
            len(q_THE),
            self._cache.n_positions,
            dropout_p=0.0,
            is_causal=True,
            return_debug_mask=False,
            scale=layer.scale,
            window_size_left=-1 if layer.window is None else layer.window - 1,
            window_size_right=0,
        )
        return out_THE.view(len(q_THE), -1)

    def _attend_cudnn(self, layer: SelfAttention, T: int) -> Tensor:
        """Computes attention of a first chunk with cuDNN, padded to a length that has a plan."""
        padded = next((n for n in CUDNN_LENGTHS if n >= T), T)
        padded = max(T, min(padded, self._workspace.rows))
        q, k, v = self._heads(padded, layer)
        v[T:].zero_()  # padding has weight 0, but 0 times NaN is NaN
        out_HTE = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            is_causal=True,
            scale=layer.scale,
            enable_gqa=True,
        )
        return out_HTE[0].transpose(0, 1)[:T].reshape(T, -1)

    def _heads(self, T: int, layer: SelfAttention) -> list[Tensor]:
        """Returns queries [T, H, E], keys and values [T, J, E] of the workspace."""
        views = self._workspace.views(T)
        return [x.view(T, -1, layer.head_dim) for x in (views.q, views.k, views.v)]

    def _prepare(self) -> list[_Layer]:
        """Prepares the launches of every layer."""
        views, last = self._workspace.views(self._workspace.rows), None
        layers = []
        for i, block in enumerate(self._blocks):
            attention, feed_forward = block.attention, block.feed_forward
            added = None if last is None else self._reduced(last.down_proj, views.part)
            attended = self._reduced(attention.o_proj, views.part)
            gate_up = _gemm_output(feed_forward.gate_up_proj, views.gate_up)
            layers.append(
                _Layer(
                    self._add_norm(views, added, attention.norm),
                    self._rope(i, views),
                    self._add_norm(views, attended, feed_forward.norm),
                    self._prepared(prompt.swiglu(gate_up, views.gated)),
                    *map(self._weight_of, block.linears.values()),
                )
            )
            last = feed_forward
        return layers

    def _add_norm(self, views: Views, gemm: GemmOutput | None, norm: RMSNorm) -> PreparedLaunch:
        total = None if gemm is None else views.x
        return self._prepared(
            prompt.add_norm(
                views.x, norm.weight, norm.eps, views.normalized, gemm=gemm, sum_MK=total
            )
        )

    def _rope(self, i: int, views: Views) -> PreparedLaunch:
        layer = self._blocks[i].attention
        norms, eps = {}, 0.0
        if layer.q_norm is not None and layer.k_norm is not None:
            norms = {"q_norm_E": layer.q_norm.weight, "k_norm_E": layer.k_norm.weight}
            eps = layer.q_norm.eps
        return self._prepared(
            prompt.rope(
                _gemm_output(layer.qkv_proj, views.qkv),
                Heads(q=views.q, k=views.k, v=views.v),
                *self._cache.layer(i),
                self._seat,
                self._start,
                *self._decoder.rope(i),
                **norms,
                eps=eps,
            )
        )

    def _weight_of(self, linear: Linear) -> Callable[[], Tensor]:
        """Returns a function that returns the weight as [K, N], valid until the next such call."""
        if _has_plain_rows(linear):
            return lambda: linear.packed[0].T
        weight_NK = self._weight[: linear.n * linear.k].view(linear.n, linear.k)
        launches: list[Callable[[], object]] = []
        for kernel, piece in zip(fused_kernels(linear), linear.pieces, strict=True):
            weight, _, features_K = kernel.named(piece.packed)
            rows_NK = weight_NK[piece.rows]
            if kernel.form.plain_rows:
                launches.append(partial(rows_NK.copy_, weight))
            else:
                call = dequantize_call(kernel.form, weight, rows_NK, features_K)
                launches.append(self._prepared(call))

        def dequantized() -> Tensor:
            for launch in launches:
                launch()
            return weight_NK.T

        return dequantized

    def _prepared(self, call: Call) -> PreparedLaunch:
        return self._launcher.prepare(call, dependent=False)


def _last_rows(rows: int) -> int:
    """Returns how many last rows of a chunk of ``rows`` the last layer computes.

    It is all of them unless the chunk is twice as long: they are moved to the first rows of the
    workspace, which they must not overlap.
    """
    return LAST_ROWS if rows >= 2 * LAST_ROWS else rows


def _has_plain_rows(linear: Linear) -> bool:
    """Returns whether a weight consists of plain rows only."""
    return [form.plain_rows for form in fused_forms(linear)] == [True]


def _gemm_output(linear: Linear, y: Tensor) -> GemmOutput:
    """Returns a GEMM's output with the weight's scale and bias, which are still to be applied."""
    kernels = zip(fused_kernels(linear), linear.pieces, strict=True)
    scales = [kernel.named(piece.packed).scale for kernel, piece in kernels]
    scale_N, *more = scales
    if more and any(scale is not None for scale in scales):
        scale_N = torch.ones(linear.n, dtype=torch.float32, device=y.device)
        for piece, scale in zip(linear.pieces, scales, strict=True):
            if scale is not None:
                scale_N[piece.rows] = scale
    return GemmOutput(y=y, scale=scale_N, bias=linear.bias)


def _positions(seats_SJCE: Tensor) -> Tensor:
    """Views all seats as one sequence [P, J, E], in which seat s begins at s * J * C.

    Heads are C positions apart, so only the first C of a seat's J * C positions are valid.
    """
    S, J, C, E = seats_SJCE.shape
    return seats_SJCE.as_strided(((S - 1) * J * C + C, J, E), (E, C * E, 1))
