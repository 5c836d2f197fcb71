"""Prompts on the weights of the fused step.

A few tokens take steps, eight at a time, which cost little more than single ones: the weights are
read as they are. Many tokens are what the vendor's products are made for: each weight is given back
as plain rows for the occasion, and kernels of our own do what is between the products. For some
hundred tokens a GPU takes less time than the host takes to launch all that, so those are captured.
The decoder (``models.decoder``) is the specification of both.

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
"""Tokens that a step of the fused kernels takes for little more than one."""

SHORT_PROMPT = 64
"""Prompts of more tokens never take steps."""

CAPTURED_TOKENS = 512
"""Of the beginning of a prompt: more keep a device busy for longer than the host takes."""

CAPTURED_STEP = 64
"""Captured beginnings are padded to a multiple of so many tokens."""

WORKSPACE_SHARE = 0.02
"""Of a device's memory, which activations of a chunk may take."""

PLANNED_TOKENS = (256, 512, 768, *range(1024, MOST_PREFILL_CHUNK + 1, 1024))
"""Beginnings attend to themselves by plans that cuDNN makes, in some 60 ms for each number of
tokens: they are padded to one of these, and all are planned beforehand."""

REHEARSED_TOKENS = (640, 1024)
"""Numbers of tokens whose matrix products' kernels are loaded beforehand."""


def most_by_steps(form: Format) -> int:
    """Tokens that steps get through sooner than a weight can be given back as rows.

    A step reads the weight as it is, and takes a tenth longer with eight tokens than with one. To
    give it back it is read too, and then rows of bfloat16 are written and read.
    """
    steps = (form.nbytes + 4 * form.n * form.k) / (1.1 * form.nbytes)
    return min(SHORT_PROMPT, STEP_TOKENS * int(steps))


def spans(ids_T: Tensor, start: int, size: int) -> Iterator[tuple[range, Tensor]]:
    """Places of a few tokens at a time, and their positions, the first of all being ``start``."""
    for first in range(0, len(ids_T), size):
        places = range(first, min(first + size, len(ids_T)))
        yield places, torch.arange(start + places.start, start + places.stop, device=ids_T.device)


def even_parts(n: int, most: int) -> list[range]:
    """Splits n places into as few parts of at most ``most`` as there can be, of even lengths."""
    bounds = [n * i // -(-n // most) for i in range(-(-n // most) + 1)]
    return [range(first, end) for first, end in pairwise(bounds)]


class PromptSteps:
    """Steps of a few tokens of one seat, whichever: on a GPU, replays of one CUDA graph.

    Args:
        forward: The model.
        device: Where it runs.
    """

    def __init__(self, forward: FusedForward, device: torch.device) -> None:
        self._forward, self._device = forward, device
        self._ids = torch.zeros(1, STEP_TOKENS, dtype=torch.int64, device=device)
        self._positions = torch.zeros(1, STEP_TOKENS, dtype=torch.int64, device=device)
        self._seats = torch.zeros(1, dtype=torch.int64, device=device)
        self._captured: tuple[Any, Tensor] | None = None

    def __call__(self, ids_T: Tensor, positions_T: Tensor, seat: int) -> Tensor:
        """Logits [T, V] after up to ``STEP_TOKENS`` tokens, which are there until the next call.

        What a shorter step has besides is at positions after its tokens', which are written again
        before anybody reads them.
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
        normed: Its norm [T, D].
        qkv: Queries, keys and values as multiplied [T, (H + 2J) * E].
        q: Query heads [T, H * E].
        k: Key heads [T, J * E].
        v: Value heads [T, J * E].
        part: What attention or the feed-forward adds to the residual stream [T, D].
        gate_up: Gates and what they let through, as multiplied [T, 2F].
        gated: Their SwiGLU [T, F].
    """

    x: Tensor
    normed: Tensor
    qkv: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    part: Tensor
    gate_up: Tensor
    gated: Tensor


class _Workspace:
    """Activations of one chunk of a prompt, at fixed addresses for any number of its rows.

    Two regions each hold what is not in use at the same time: qkv or gate_up, heads or gated.

    Args:
        layer: Any of the model's, which have the same heads and widths.
        rows: The most tokens of a chunk.
        device: Where they are.
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
        """The tensors, of T rows."""
        x, normed, part, products, heads = self._regions
        D, F = self._hidden, self._gated
        starts = [self.rows * width for width in accumulate((0, *self._heads))]
        q, k, v = (
            heads[start : start + T * width].view(T, width)
            for start, width in zip(starts, self._heads, strict=False)
        )
        return _Views(
            x=x[: T * D].view(T, D),
            normed=normed[: T * D].view(T, D),
            qkv=products[: T * sum(self._heads)].view(T, -1),
            q=q,
            k=k,
            v=v,
            part=part[: T * D].view(T, D),
            gate_up=products[: 2 * T * F].view(T, 2 * F),
            gated=heads[: T * F].view(T, F),
        )


def _widths(layer: LayerConfig) -> tuple[int, ...]:
    """Elements of a row in each region of a workspace."""
    attention, hidden_size = layer.attention, layer.attention.hidden_size
    intermediate_size = layer.feed_forward.intermediate_size
    heads = (attention.n_heads + 2 * attention.n_kv_heads) * attention.head_dim
    products = max(heads, 2 * intermediate_size)
    return (hidden_size, hidden_size, hidden_size, products, max(heads, intermediate_size))


def bytes_per_row(model: ModelConfig) -> int:
    """Bytes that a token of a chunk takes in a workspace, and in the result of attention."""
    layer = model.layers[0]
    return 2 * (sum(_widths(layer)) + layer.attention.n_heads * layer.attention.head_dim)


def prefill_chunk(model: ModelConfig, device: torch.device) -> int:
    """Tokens of one chunk: a weight is dequantized once for each.

    The more the better, as long as activations take no more than ``WORKSPACE_SHARE`` of the
    device's memory; at the most, dequantizing is a twentieth of the time.
    """
    rows = int(WORKSPACE_SHARE * device_info(device).total_bytes) // bytes_per_row(model)
    rows = 1 << max(0, rows.bit_length() - 1)
    return min(MOST_PREFILL_CHUNK, max(LEAST_PREFILL_CHUNK, rows))


@dataclass(frozen=True)
class _Layer:
    """A layer's launches, of any number of rows, and its weights once they are dequantized.

    Attributes:
        input_norm: Adds the previous layer's part to the residual stream, and normalizes that.
        rope: Applies head norms and rope to qkv, and stores keys and values in the cache.
        post_attention_norm: As ``input_norm``, of attention's part.
        swiglu: Of gate_up.
        qkv_proj: Dequantizes the weight, and gives it as [K, N].
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


class PromptRows:
    """Many tokens of one seat, a chunk at a time.

    Addresses do not depend on the number of tokens, so every launch is prepared once. On a GPU,
    beginnings of up to ``CAPTURED_TOKENS``, padded to a multiple of ``CAPTURED_STEP``, are replays
    of CUDA graphs, which ``get_ready`` captures.

    Args:
        decoder: The model.
        cache: Its cache.
        launcher: The device.
        chunk: The most tokens at a time.
        shared: Other ranks have the rest of the model. Then nothing is captured.

    Attributes:
        captures: Beginnings are captured and replayed.
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
        """Puts tokens from position ``start`` on into a seat.

        Returns:
            The residual stream [1, D] behind the last layer, of the last token.
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
        """Runs a beginning as a captured graph.

        What is behind its tokens is at positions that are written again before they are read.
        """
        size = next(size for size in sorted(self._captured) if size >= len(ids_T))
        self._ids[: len(ids_T)] = ids_T
        self._captured[size].replay()

    @torch.inference_mode()
    def get_ready(self) -> None:
        """Captures beginnings of every size, and has made beforehand what longer ones need.

        It writes to the first seat, so no seat may be in use.
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
            for size in PLANNED_TOKENS:
                self._attend_by_plan(self._blocks[0].attention, min(size, rows))
            for size in REHEARSED_TOKENS:
                self._run(self._ids.new_zeros(min(size, rows)), 0)

    def _run(self, ids_T: Tensor, start: int) -> None:
        """Runs tokens through the layers: the last one's part is still to be added."""
        T = len(ids_T)
        views = self._workspace.views(T)
        views.x.copy_(self._decoder.embedding(ids_T))
        _, kv_heads, capacity, _ = self._cache.layer(0)[0].shape
        self._row_range[1:].fill_(T)
        torch.mul(self._seat, kv_heads * capacity, out=self._key_range[:1])
        torch.add(self._key_range[:1], self._start + T, out=self._key_range[1:])
        for i, (layer, block) in enumerate(zip(self._layers, self._blocks, strict=True)):
            layer.input_norm(T)
            torch.mm(views.normed, layer.qkv_proj(), out=views.qkv)
            layer.rope(T)
            torch.mm(self._attend(i, T, start), layer.o_proj(), out=views.part)
            self._sum(block.attention.o_proj, views.part)
            layer.post_attention_norm(T)
            torch.mm(views.normed, layer.gate_up_proj(), out=views.gate_up)
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
        """The result of attention [T, H * E].

        A beginning attends to itself. What follows one, or has a window, attends to its seat, whose
        range of keys is on the device.
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
            return self._flash(layer, q, _positions(keys), _positions(values), self._key_range)
        return self._attend_by_plan(layer, T)

    def _flash(
        self,
        layer: SelfAttention,
        q_THE: Tensor,
        keys_NJE: Tensor,
        values_NJE: Tensor,
        key_range: Tensor,
    ) -> Tensor:
        """Causal flash attention [T, H * E] to a range of keys, whose last is the last query's."""
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

    def _attend_by_plan(self, layer: SelfAttention, T: int) -> Tensor:
        """As ``_attend``, of a beginning, padded to a number of tokens that has a plan."""
        padded = next((n for n in PLANNED_TOKENS if n >= T), T)
        padded = max(T, min(padded, self._workspace.rows))
        q, k, v = self._heads(padded, layer)
        v[T:].zero_()  # keys behind a token have no weight, but none times NaN is NaN
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
        """Queries [T, H, E], keys and values [T, J, E] of the workspace."""
        views = self._workspace.views(T)
        return [x.view(T, -1, layer.head_dim) for x in (views.q, views.k, views.v)]

    def _prepare(self) -> list[_Layer]:
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
            prompt.add_norm(views.x, norm.weight, norm.eps, views.normed, gemm=gemm, sum_MK=total)
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
    """All seats as one sequence [S * J * C, J, E], in which seat s begins at s * J * C.

    Positions are C apart from those of the next head, so what follows a seat's C positions up to
    the next seat is of no use.
    """
    S, J, C, E = seats_SJCE.shape
    return seats_SJCE.as_strided(((S - 1) * J * C + C, J, E), (E, C * E, 1))


class FusedPrompt:
    """Puts prompts into a cache.

    Args:
        forward: The fused step.
        decoder: The model.
        cache: Its cache.
        launcher: The device.
        chunk: The most tokens at a time.
        shared: Other ranks have the rest of the model.
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
        self._steps = PromptSteps(forward, decoder.device)
        self._rows = PromptRows(decoder, cache, launcher, chunk=chunk, shared=shared)
        gate_up = decoder.blocks[0].feed_forward.gate_up_proj
        self._most_by_steps = most_by_steps(fused_kernel(gate_up).form)

    def get_ready(self) -> None:
        """Captures and plans what prompts need, while no seat is in use."""
        self._rows.get_ready()

    def __call__(self, ids_T: Tensor, start: int, seat: int) -> Tensor:
        """Puts tokens from position ``start`` on into a seat; logits [1, V] after the last."""
        if len(ids_T) <= self._most_by_steps:
            *_, (_, logits_TV) = self.logits(ids_T, start, seat)
            return logits_TV[-1:]
        *_, last_1D = [
            self._rows(ids_T[places.start : places.stop], start + places.start, seat)
            for places in even_parts(len(ids_T), self._chunk)
        ]
        return self._forward.logits(last_1D)

    def logits(self, ids_T: Tensor, start: int, seat: int) -> Iterator[tuple[range, Tensor]]:
        """As the call, by steps.

        Yields:
            Some tokens' places, and the logits [T, V] after each.
        """
        for places, positions_T in spans(ids_T, start, STEP_TOKENS):
            yield places, self._steps(ids_T[places.start : places.stop], positions_T, seat)
