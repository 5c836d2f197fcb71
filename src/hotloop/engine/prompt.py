"""Prompts on the weights of the fused step.

A few tokens take steps, eight at a time, which cost little more than single ones: the weights are
read as they are. Many tokens are what the vendor's products are made for: each weight is given back
as plain rows for the occasion, and kernels of our own do what is between the products. For some
hundred tokens a GPU takes less time than the host takes to launch all that, so those are captured.
The decoder (``models.decoder``) is the specification of both.

Shape letters: T tokens of one sequence, D model width, K input features of a product, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hotloop.engine.execution import capture
from hotloop.engine.fused import FusedForward, blocks_of, fused_kernel
from hotloop.kernels.cuda import prompt
from hotloop.kernels.cuda.launch import Call, Launcher
from hotloop.kernels.cuda.packing import Format
from hotloop.kernels.cuda.prompt import Heads, Product
from hotloop.models import names
from hotloop.models.cache import KVCache
from hotloop.models.decoder import Decoder, RMSNorm
from hotloop.models.linear import Linear

STEP_TOKENS = 8
"""Tokens that a step of the fused kernels takes for little more than one."""

SHORT_PROMPT = 64
"""Prompts of more tokens never take steps."""

CAPTURED_TOKENS = 512
"""Of the beginning of a prompt: more keep a device busy for longer than the host takes."""

CAPTURED_STEP = 64
"""Beginnings are filled up to a multiple of so many tokens."""


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


class PromptSteps:
    """Steps of a few tokens of one slot, whichever: on a GPU, replays of one CUDA graph.

    Args:
        forward: The model.
        device: Where it runs.
    """

    def __init__(self, forward: FusedForward, device: torch.device) -> None:
        self._forward, self._device = forward, device
        self._ids = torch.zeros(1, STEP_TOKENS, dtype=torch.int64, device=device)
        self._positions = torch.zeros(1, STEP_TOKENS, dtype=torch.int64, device=device)
        self._slots = torch.zeros(1, dtype=torch.int64, device=device)
        self._captured: tuple[Any, Tensor] | None = None

    def __call__(self, ids_T: Tensor, positions_T: Tensor, slot: int) -> Tensor:
        """Logits [T, V] after up to ``STEP_TOKENS`` tokens, which are there until the next call.

        What a shorter step has besides is at positions after its tokens', which are written again
        before anybody reads them.
        """
        n = len(ids_T)
        self._ids[0, :n] = ids_T
        self._positions[0, :n] = positions_T
        self._slots.fill_(slot)
        if self._device.type != "cuda":
            return self._run()[:n]
        if self._captured is None:
            self._captured = capture(self._run, self._device)
        graph, logits_TV = self._captured
        graph.replay()
        return logits_TV[:n]

    def _run(self) -> Tensor:
        logits_BTV, _ = self._forward(self._ids, self._positions, 0, slots_B=self._slots)
        return logits_BTV[0]


_Attend = Callable[[int, Heads], Tensor]
"""What tokens see [T, H * E], of a layer and their heads."""

_Behind = tuple[Tensor, Product]
"""The residual stream [T, D] behind the last layer, and what is still to be added to it."""


class PromptRows:
    """Many tokens of one slot.

    On a GPU, beginnings of up to ``CAPTURED_TOKENS``, filled up to a multiple of ``CAPTURED_STEP``,
    are replays of CUDA graphs, each captured when one of its size first comes.

    Args:
        decoder: The model.
        cache: Its cache.
        launcher: The device.
        shared: Other ranks have the rest of the model. Then nothing is filled up and captured.
    """

    def __init__(
        self, decoder: Decoder, cache: KVCache, launcher: Launcher, *, shared: bool
    ) -> None:
        self._decoder, self._cache, self._launcher = decoder, cache, launcher
        self._shared, self._layers, self._device = shared, blocks_of(decoder), decoder.cos.device
        layer, *_ = self._layers
        launcher.load(prompt.kernels(layer.head_dim))
        forms = [fused_kernel(getattr(layer, name)).form for name in names.LINEAR_PARTS]
        largest = max(form.n * form.k for form in forms)
        self._room = torch.empty(largest, dtype=torch.bfloat16, device=self._device)
        self._ids = torch.zeros(CAPTURED_TOKENS, dtype=torch.int64, device=self._device)
        self._slot = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, _Behind]] = {}

    def __call__(self, ids_T: Tensor, start: int, slot: int) -> Tensor:
        """Puts tokens from position ``start`` on into a slot.

        Returns:
            The residual stream [1, D] behind the last layer, of the last token.
        """
        T, window = len(ids_T), self._layers[0].window
        self._slot.fill_(slot)
        if start > 0 or (window is not None and window < T):
            positions_BT = torch.arange(start, start + T, device=self._device)[None]
            attend = partial(self._attend_to_slot, positions_BT, start + T, slot)
            x_TD, product = self._through(ids_T, start, attend)
        elif T <= CAPTURED_TOKENS and not self._shared:
            x_TD, product = self._beginning(ids_T)
        else:
            x_TD, product = self._through(ids_T, 0, self._attend_to_themselves)
        last = slice(T - 1, T)
        return x_TD[last] + replace(product, y=product.y[last]).finished()

    def _beginning(self, ids_T: Tensor) -> _Behind:
        """As ``_through``, of more tokens than there are; it is there until the next call.

        What is behind them is at positions that are written again before anybody reads them.
        """
        size = min(-(-len(ids_T) // CAPTURED_STEP) * CAPTURED_STEP, self._cache.n_positions)
        ids = self._ids[:size]
        ids[: len(ids_T)] = ids_T
        if size in self._captured:
            graph, behind = self._captured[size]
            graph.replay()
            return behind
        run = partial(self._through, ids, 0, self._attend_to_themselves)
        behind = run()
        if self._device.type == "cuda":
            pool = next((graph.pool() for graph, _ in self._captured.values()), None)
            self._captured[size] = capture(run, self._device, runs_before=0, pool=pool)
        return behind

    def _through(self, ids_T: Tensor, start: int, attend: _Attend) -> _Behind:
        product, x_TD = None, self._decoder.embedding(ids_T)
        for i, layer in enumerate(self._layers):
            normed = self._add_norm(x_TD, product, layer.input_norm)
            heads = self._rotate(i, self._product(layer.qkv_proj, normed), start)
            product = self._sum(layer.o_proj, attend(i, heads))
            normed = self._add_norm(x_TD, product, layer.post_attention_norm)
            gated = self._swiglu(self._product(layer.gate_up_proj, normed))
            product = self._sum(layer.down_proj, gated)
        assert product is not None, "a model has layers"
        return x_TD, product

    def _product(self, linear: Linear, x_TK: Tensor) -> Product:
        product = fused_kernel(linear).product(x_TK, *linear.packed, room=self._room)
        return replace(product, bias=linear.bias)

    def _sum(self, linear: Linear, x_TK: Tensor) -> Product:
        """A product that is of all ranks."""
        product = self._product(linear, x_TK)
        return Product(y=self._layers[0].total(product.finished())) if self._shared else product

    def _add_norm(self, x_TD: Tensor, product: Product | None, norm: RMSNorm) -> Tensor:
        """The norm of the residual stream, to which a product is added in its place."""
        normed, total = torch.empty_like(x_TD), None if product is None else x_TD
        call = prompt.add_norm(x_TD, norm.weight, norm.eps, normed, product=product, sum_MK=total)
        self._launch(call)
        return normed

    def _rotate(self, i: int, product: Product, start: int) -> Heads:
        """Heads; keys and values go into the cache as well."""
        decoder, layer = self._decoder, self._layers[i]
        n_heads, n_kv_heads, _ = layer.heads
        heads = Heads.empty(product, n_heads, n_kv_heads, layer.head_dim)
        norms, eps = {}, 0.0
        if layer.q_norm is not None and layer.k_norm is not None:
            norms = {"q_norm_E": layer.q_norm.weight, "k_norm_E": layer.k_norm.weight}
            eps = layer.q_norm.eps
        caches, rotation = self._cache.layer(i), (decoder.cos, decoder.sin)
        call = prompt.rotate(
            product, heads, *caches, self._slot, start, *rotation, **norms, eps=eps
        )
        self._launch(call)
        return heads

    def _attend_to_themselves(self, i: int, heads: Heads) -> Tensor:
        """Tokens to one another, all that are before them."""
        layer, T = self._layers[i], len(heads.q)
        q, k, v = (
            x.view(1, T, -1, layer.head_dim).transpose(1, 2) for x in (heads.q, heads.k, heads.v)
        )
        out_BHTE = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=layer.head_dim**-0.5, enable_gqa=True
        )
        return out_BHTE.transpose(1, 2).reshape(T, -1)

    def _attend_to_slot(
        self, positions_BT: Tensor, length: int, slot: int, i: int, heads: Heads
    ) -> Tensor:
        """Tokens to what is in the slot, up to so many positions."""
        layer, T = self._layers[i], len(heads.q)
        keys, values = (slots[slot : slot + 1] for slots in self._cache.layer(i))
        out_BTHE = layer.attention(
            heads.q.view(1, T, -1, layer.head_dim),
            keys,
            values,
            positions_BT,
            length=length,
            window=layer.window,
            scale=layer.head_dim**-0.5,
        )
        return out_BTHE.reshape(T, -1)

    def _swiglu(self, product: Product) -> Tensor:
        rows, width = product.y.shape
        gated = product.y.new_empty(rows, width // 2)
        self._launch(prompt.swiglu(product, gated))
        return gated

    def _launch(self, call: Call) -> None:
        self._launcher.prepare(call, dependent=False)()


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
        self._steps = PromptSteps(forward, decoder.cos.device)
        self._rows = PromptRows(decoder, cache, launcher, shared=shared)
        layer, *_ = blocks_of(decoder)
        self._most_by_steps = most_by_steps(fused_kernel(layer.gate_up_proj).form)

    def __call__(self, ids_T: Tensor, start: int, slot: int) -> Tensor:
        """Puts tokens from position ``start`` on into a slot; logits [1, V] after the last."""
        if len(ids_T) <= self._most_by_steps:
            *_, (_, logits_TV) = self.logits(ids_T, start, slot)
            return logits_TV[-1:]
        *_, last_1D = [
            self._rows(ids_T[places.start : places.stop], start + places.start, slot)
            for places, _ in spans(ids_T, start, self._chunk)
        ]
        return self._forward.logits(last_1D)

    def logits(self, ids_T: Tensor, start: int, slot: int) -> Iterator[tuple[range, Tensor]]:
        """As the call, by steps.

        Yields:
            Some tokens' places, and the logits [T, V] after each.
        """
        for places, positions_T in spans(ids_T, start, STEP_TOKENS):
            yield places, self._steps(ids_T[places.start : places.stop], positions_T, slot)
