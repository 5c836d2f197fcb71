"""Prefill with the weights of the fused step.

Short prompts run as decode steps of eight tokens, which cost little more than steps of one, since
both read the packed weights once. Longer prompts run by chunks with cuBLAS GEMMs on weights that
are dequantized to bfloat16 for each chunk, and our own kernels in between. First chunks of up to
512 tokens are captured in CUDA graphs, since launching their kernels takes the host longer than
running them takes the GPU. The decoder (``models.decoder``) is the specification of both ways.

Shape letters: T tokens of one sequence, D model width, K input features of a GEMM, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hotloop.engine.fused import FusedForward, fused_kernel
from hotloop.engine.graphs import capture
from hotloop.hardware import device_info
from hotloop.kernels.cuda import prompt
from hotloop.kernels.cuda.dequantize import dequantize_call, dequantize_kernel
from hotloop.kernels.cuda.launch import Call, Launcher, PreparedLaunch
from hotloop.kernels.cuda.packing import Format
from hotloop.kernels.cuda.prompt import GemmOutput, Heads
from hotloop.models.cache import KVCache
from hotloop.models.config import LayerConfig, ModelConfig
from hotloop.models.decoder import Decoder, RMSNorm, SelfAttention
from hotloop.models.linear import Linear
from hotloop.types import LEAST_PREFILL_CHUNK, MOST_PREFILL_CHUNK

STEP_TOKENS = 8
"""Tokens of a fused step, which costs little more than a step of one token."""

SHORT_PROMPT = 64
"""The longest prompt that may run as decode steps."""

CAPTURED_TOKENS = 512
"""The longest first chunk that is captured: longer ones take the GPU longer than the host."""

CAPTURED_STEP = 64
"""Captured first chunks are padded to a multiple of this many tokens."""

WORKSPACE_SHARE = 0.02
"""Share of the device's memory that activations of a chunk may take."""

CUDNN_LENGTHS = (256, 512, 768, *range(1024, MOST_PREFILL_CHUNK + 1, 1024))
"""Token counts of first chunks that cuDNN attention is planned for. A plan takes some 60 ms, so
first chunks are padded to one of these, and all are planned at warm-up."""

WARMUP_TOKENS = (640, 1024)
"""Token counts that are run at warm-up, to load cuBLAS's kernels."""


def max_step_prefill_tokens(form: Format) -> int:
    """Returns the longest prompt that runs faster as decode steps than with GEMMs.

    A step reads the packed weight, and takes a tenth longer with eight tokens than with one.
    Dequantizing reads the packed weight too, and writes bfloat16, which the GEMM reads.
    """
    steps = (form.nbytes + 4 * form.n * form.k) / (1.1 * form.nbytes)
    return min(SHORT_PROMPT, STEP_TOKENS * int(steps))


def spans(ids_T: Tensor, start: int, size: int) -> Iterator[tuple[range, Tensor]]:
    """Splits tokens into chunks of ``size``; yields ranges, and positions from ``start`` on."""
    for first in range(0, len(ids_T), size):
        chunk = range(first, min(first + size, len(ids_T)))
        yield chunk, torch.arange(start + chunk.start, start + chunk.stop, device=ids_T.device)


def even_chunks(n: int, most: int) -> list[range]:
    """Splits n tokens into the fewest chunks of at most ``most``, of even lengths."""
    bounds = [n * i // -(-n // most) for i in range(-(-n // most) + 1)]
    return [range(first, end) for first, end in pairwise(bounds)]


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

        Padding tokens write cache positions that later tokens overwrite before any read.
        """
        n = len(ids_T)
        self._ids[0, :n] = ids_T
        self._positions[0, :n] = positions_T
        self._seats.fill_(seat)
        if self._device.type != "cuda":
            return self._run()[:n]
        if self._captured is None:
            self._captured = capture(self._run, self._device)
        graph, logits_TV = self._captured
        graph.replay()
        return logits_TV[:n]

    def _run(self) -> Tensor:
        logits_BTV, _ = self._forward(self._ids, self._positions, self._seats)
        return logits_BTV[0]


@dataclass(frozen=True)
class _Views:
    """The first T rows of a workspace's tensors.

    Attributes:
        x: The residual stream [T, D].
        normalized: The normalized residual stream [T, D].
        qkv: GEMM output of queries, keys and values [T, (H + 2J) * E].
        q: Query heads [T, H * E].
        k: Key heads [T, J * E].
        v: Value heads [T, J * E].
        part: GEMM output of attention or feed-forward, for the residual stream [T, D].
        gate_up: GEMM output of gates and up projection [T, 2F].
        gated: Their SwiGLU [T, F].
    """

    x: Tensor
    normalized: Tensor
    qkv: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    part: Tensor
    gate_up: Tensor
    gated: Tensor


class _Workspace:
    """Activations of one chunk of a prompt, at fixed addresses for any number of tokens.

    Two regions are shared by tensors that are not in use at the same time: qkv and gate_up, heads
    and gated.

    Args:
        layer: Any layer of the model: all have the same heads and widths.
        rows: The most tokens of a chunk.
        device: The device of the model.
    """

    def __init__(self, layer: LayerConfig, rows: int, device: torch.device) -> None:
        attention = layer.attention
        heads = attention.n_heads, attention.n_kv_heads, attention.n_kv_heads
        self._heads = tuple(n * attention.head_dim for n in heads)
        self._hidden, self._gated = attention.hidden_size, layer.feed_forward.intermediate_size
        self.rows = rows
        self._regions = [
            torch.empty(rows * width, dtype=torch.bfloat16, device=device)
            for width in _widths(layer)
        ]

    def views(self, T: int) -> _Views:
        """Returns the tensors with T rows."""
        x, normalized, part, gemm_out, heads = self._regions
        D, F = self._hidden, self._gated
        starts = [self.rows * width for width in accumulate((0, *self._heads))]
        q, k, v = (
            heads[start : start + T * width].view(T, width)
            for start, width in zip(starts, self._heads, strict=False)
        )
        return _Views(
            x=x[: T * D].view(T, D),
            normalized=normalized[: T * D].view(T, D),
            qkv=gemm_out[: T * sum(self._heads)].view(T, -1),
            q=q,
            k=k,
            v=v,
            part=part[: T * D].view(T, D),
            gate_up=gemm_out[: 2 * T * F].view(T, 2 * F),
            gated=heads[: T * F].view(T, F),
        )


def _widths(layer: LayerConfig) -> tuple[int, ...]:
    """Returns the elements of a row in each region of a workspace."""
    attention, hidden_size = layer.attention, layer.attention.hidden_size
    intermediate_size = layer.feed_forward.intermediate_size
    heads = (attention.n_heads + 2 * attention.n_kv_heads) * attention.head_dim
    gemm_out = max(heads, 2 * intermediate_size)
    return (hidden_size, hidden_size, hidden_size, gemm_out, max(heads, intermediate_size))


def bytes_per_row(model: ModelConfig) -> int:
    """Counts the bytes that a token of a chunk takes in a workspace and in attention's output."""
    layer = model.layers[0]
    return 2 * (sum(_widths(layer)) + layer.attention.n_heads * layer.attention.head_dim)


def prefill_chunk(model: ModelConfig, device: torch.device) -> int:
    """Chooses the most tokens of a chunk.

    Weights are dequantized once per chunk, so larger chunks are faster; activations take at most
    ``WORKSPACE_SHARE`` of the device's memory. With the largest chunk, dequantizing is a twentieth
    of the time.
    """
    rows = int(WORKSPACE_SHARE * device_info(device).total_bytes) // bytes_per_row(model)
    rows = 1 << max(0, rows.bit_length() - 1)
    return min(MOST_PREFILL_CHUNK, max(LEAST_PREFILL_CHUNK, rows))


@dataclass(frozen=True)
class _Layer:
    """A layer's kernel launches, for any number of rows, and functions that dequantize its weights.

    Attributes:
        input_norm: Adds the previous layer's output to the residual stream, and normalizes it.
        rope: Applies head norms and rope to qkv, and stores keys and values in the cache.
        post_attention_norm: Adds attention's output likewise, and normalizes the stream.
        swiglu: Applies SwiGLU to gate_up.
        qkv_proj: Dequantizes the weight, and returns it as [K, N].
        o_proj: Likewise.
        gate_up_proj: Likewise.
        down_proj: Likewise.
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
    """Prefills one seat with GEMMs on dequantized weights, one chunk a call.

    Addresses do not depend on the number of tokens, so every launch is prepared once. On a GPU,
    first chunks of up to ``CAPTURED_TOKENS``, padded to a multiple of ``CAPTURED_STEP``, are
    replays of CUDA graphs, which ``warm_up`` captures.

    Args:
        decoder: The model, or a rank's shard of it.
        cache: Its cache.
        launcher: Launches kernels.
        chunk: The most tokens of a call.
        shared: The model is sharded over ranks; then nothing is captured.

    Attributes:
        captures: First chunks are captured and replayed.
    """

    def __init__(
        self, decoder: Decoder, cache: KVCache, launcher: Launcher, *, chunk: int, shared: bool
    ) -> None:
        self._decoder, self._cache, self._launcher = decoder, cache, launcher
        self._shared, self._blocks, self._device = shared, decoder.blocks, decoder.device
        first, *_ = self._blocks
        linears = [linear for block in self._blocks for linear in block.linears.values()]
        forms = list(dict.fromkeys(fused_kernel(linear).form for linear in linears))
        launcher.load((*prompt.kernels(first.attention.head_dim), *map(dequantize_kernel, forms)))
        largest = max(form.n * form.k for form in forms)
        self._weight = torch.empty(largest, dtype=torch.bfloat16, device=self._device)
        self._workspace = _Workspace(first.config, min(chunk, cache.n_positions), self._device)
        self._ids = torch.zeros(CAPTURED_TOKENS, dtype=torch.int64, device=self._device)
        self._seat, self._start = torch.zeros(2, 1, dtype=torch.int64, device=self._device)
        self._row_range, self._key_range = torch.zeros(2, 2, dtype=torch.int32, device=self._device)
        self._layers = self._prepare()
        self._captured: dict[int, torch.cuda.CUDAGraph] = {}
        self.captures = self._device.type == "cuda" and not shared

    def __call__(self, ids_T: Tensor, start: int, seat: int) -> Tensor:
        """Prefills a seat with one chunk, from position ``start`` on.

        Returns:
            The residual stream [1, D] of the last token after the last layer.
        """
        T = len(ids_T)
        assert start + T <= self._cache.n_positions, f"{T} tokens from {start} on do not fit"
        self._seat.fill_(seat)
        self._start.fill_(start)
        if self._captured and self.captures and start == 0 and T <= CAPTURED_TOKENS:
            self._replay(ids_T)
        else:
            self._run(ids_T, start)
        views, last = self._workspace.views(T), slice(T - 1, T)
        down = self._reduced(self._blocks[-1].feed_forward.down_proj, views.part[last])
        return views.x[last] + down.with_scale_and_bias()

    def _replay(self, ids_T: Tensor) -> None:
        """Runs a first chunk by replaying a captured graph.

        Padding tokens write cache positions that later tokens overwrite before any read.
        """
        size = next(size for size in sorted(self._captured) if size >= len(ids_T))
        self._ids[: len(ids_T)] = ids_T
        self._captured[size].replay()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Captures first chunks of every size, and warms up cuDNN plans and cuBLAS kernels.

        It overwrites seat 0, so no seat may be in use.
        """
        rows, pool = self._workspace.rows, None
        if self.captures:
            most = min(CAPTURED_TOKENS, rows)
            sizes = range(CAPTURED_STEP, most + CAPTURED_STEP, CAPTURED_STEP)
            for size in sorted({min(n, most) for n in sizes}, reverse=True):
                run = partial(self._run, self._ids[:size], 0)
                graph, _ = capture(run, self._device, runs_before=1, pool=pool)
                pool = graph.pool()
                self._captured[size] = graph
        if self._device.type == "cuda":
            for size in CUDNN_LENGTHS:
                self._attend_cudnn(self._blocks[0].attention, min(size, rows))
            for size in WARMUP_TOKENS:
                self._run(self._ids.new_zeros(min(size, rows)), 0)

    def _run(self, ids_T: Tensor, start: int) -> None:
        """Runs tokens through the layers; the last layer's output remains to be added."""
        T = len(ids_T)
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
            torch.mm(self._attend(i, T, start), layer.o_proj(), out=views.part)
            self._sum(block.attention.o_proj, views.part)
            layer.post_attention_norm(T)
            torch.mm(views.normalized, layer.gate_up_proj(), out=views.gate_up)
            layer.swiglu(T)
            torch.mm(views.gated, layer.down_proj(), out=views.part)
            self._sum(block.feed_forward.down_proj, views.part)

    def _sum(self, linear: Linear, part_TD: Tensor) -> None:
        """Sums a GEMM's output over ranks, where there are several, in place."""
        if self._shared:
            y_TD = _gemm_output(linear, part_TD).with_scale_and_bias()
            part_TD.copy_(self._blocks[0].total(y_TD))

    def _reduced(self, linear: Linear, y: Tensor) -> GemmOutput:
        """Returns the output that ``_sum`` left: over several ranks it includes scale and bias."""
        return GemmOutput(y=y) if self._shared else _gemm_output(linear, y)

    def _attend(self, i: int, T: int, start: int) -> Tensor:
        """Computes attention [T, H * E].

        A first chunk attends to its own keys. Later chunks, and layers with a window, attend to the
        seat in the cache, whose range of keys is read from the device.
        """
        layer, (keys, values) = self._blocks[i].attention, self._cache.layer(i)
        q, *_ = self._heads(T, layer)
        if self._device.type != "cuda":
            out_BTHE = layer.kernel(
                q[None],
                keys,
                values,
                self._seat,
                torch.arange(start, start + T)[None],
                first_seat=int(self._seat),
                length=start + T,
                window=layer.window,
                scale=layer.scale,
            )
            return out_BTHE.reshape(T, -1)
        if start > 0 or (layer.window is not None and layer.window < T):
            return self._attend_flash(
                layer, q, _positions(keys), _positions(values), self._key_range
            )
        return self._attend_cudnn(layer, T)

    def _attend_flash(
        self,
        layer: SelfAttention,
        q_THE: Tensor,
        keys_NJE: Tensor,
        values_NJE: Tensor,
        key_range: Tensor,
    ) -> Tensor:
        """Computes causal flash attention [T, H * E]; the last key is that of the last query."""
        out_THE, *_ = torch.ops.aten._flash_attention_forward(
            q_THE,
            keys_NJE,
            values_NJE,
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
                    *map(self._dequantize, block.linears.values()),
                )
            )
            last = feed_forward
        return layers

    def _add_norm(self, views: _Views, gemm: GemmOutput | None, norm: RMSNorm) -> PreparedLaunch:
        total = None if gemm is None else views.x
        return self._prepared(
            prompt.add_norm(
                views.x, norm.weight, norm.eps, views.normalized, gemm=gemm, sum_MK=total
            )
        )

    def _rope(self, i: int, views: _Views) -> PreparedLaunch:
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

    def _dequantize(self, linear: Linear) -> Callable[[], Tensor]:
        weight_NK = self._weight[: linear.n * linear.k].view(linear.n, linear.k)
        form = fused_kernel(linear).form
        launch = self._prepared(dequantize_call(form, linear.packed[0], weight_NK))

        def dequantized() -> Tensor:
            launch()
            return weight_NK.T

        return dequantized

    def _prepared(self, call: Call) -> PreparedLaunch:
        return self._launcher.prepare(call, dependent=False)


def _gemm_output(linear: Linear, y: Tensor) -> GemmOutput:
    """Returns a GEMM's output with the weight's scale and bias, which remain to be applied."""
    _, *scale_N = linear.packed
    return GemmOutput(y=y, scale=scale_N[0] if scale_N else None, bias=linear.bias)


def _positions(seats_SJCE: Tensor) -> Tensor:
    """Views all seats as one sequence [S * J * C, J, E], in which seat s begins at s * J * C.

    Heads are C positions apart, so only the first C of a seat's J * C positions are valid.
    """
    S, J, C, E = seats_SJCE.shape
    return seats_SJCE.as_strided(((S - 1) * J * C + C, J, E), (E, C * E, 1))


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
        self._forward, self._chunk = forward, chunk
        self._steps = StepPrefill(forward, decoder.device)
        self._gemm = GemmPrefill(decoder, cache, launcher, chunk=chunk, shared=shared)
        gate_up = decoder.blocks[0].feed_forward.gate_up_proj
        self._max_step_tokens = max_step_prefill_tokens(fused_kernel(gate_up).form)

    def warm_up(self) -> None:
        """Captures prefill graphs and warms up libraries; overwrites seat 0."""
        self._gemm.warm_up()

    def __call__(self, ids_T: Tensor, start: int, seat: int) -> Tensor:
        """Prefills a seat from position ``start`` on; returns the last token's logits [1, V]."""
        if len(ids_T) <= self._max_step_tokens:
            *_, (_, logits_TV) = self.logits(ids_T, start, seat)
            return logits_TV[-1:]
        *_, last_1D = [
            self._gemm(ids_T[part.start : part.stop], start + part.start, seat)
            for part in even_chunks(len(ids_T), self._chunk)
        ]
        return self._forward.logits(last_1D)

    def logits(self, ids_T: Tensor, start: int, seat: int) -> Iterator[tuple[range, Tensor]]:
        """Prefills a seat by decode steps, with logits of every token.

        Yields:
            For each step, the range of its tokens in ``ids_T`` and their logits [T, V].
        """
        for chunk, positions_T in spans(ids_T, start, STEP_TOKENS):
            yield chunk, self._steps(ids_T[chunk.start : chunk.stop], positions_T, seat)
