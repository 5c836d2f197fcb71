"""Prompts on the weights of the fused step.

A few tokens take steps, eight at a time, which cost little more than single ones: the weights are
read as they are. Many tokens are what the vendor's products are made for: each weight is given back
as plain rows for the occasion, and kernels of our own do what is between the products. The decoder
(``models.decoder``) is the specification of both.

Shape letters: T tokens of one sequence, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hotloop.engine.execution import capture
from hotloop.engine.fused import FusedForward, blocks_of
from hotloop.kernels.cuda import prompt
from hotloop.kernels.cuda.launch import Call, Launcher
from hotloop.kernels.cuda.packing import Format
from hotloop.kernels.cuda.prompt import Product
from hotloop.kernels.linear import Fused
from hotloop.models.cache import KVCache
from hotloop.models.decoder import Decoder, RMSNorm
from hotloop.models.linear import Linear

STEP_TOKENS = 8
"""Tokens that a step of the fused kernels takes for little more than one."""

SHORT_PROMPT = 64
"""Prompts of more tokens never take steps."""


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
        self._forward, self._decoder, self._cache = forward, decoder, cache
        self._launcher, self._chunk, self._shared = launcher, chunk, shared
        self._layers = blocks_of(decoder)
        self._steps = PromptSteps(forward, decoder.cos.device)
        launcher.load(prompt.kernels(self._layers[0].head_dim))
        largest = self._layers[0].gate_up_proj.kernel
        assert isinstance(largest, Fused), "a weight was not assigned for this"
        self._most_by_steps = most_by_steps(largest.form)

    def __call__(self, ids_T: Tensor, start: int, slot: int) -> Tensor:
        """Puts tokens from position ``start`` on into a slot; logits [1, V] after the last."""
        if len(ids_T) <= self._most_by_steps:
            *_, (_, logits_TV) = self.logits(ids_T, start, slot)
            return logits_TV[-1:]
        *_, last_1D = [
            self._many(ids_T[places.start : places.stop], start + places.start, slot)
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

    def _many(self, ids_T: Tensor, start: int, slot: int) -> Tensor:
        """The residual stream [1, D] behind the last layer, of the last token."""
        product, x_TD = None, self._decoder.embedding(ids_T)
        positions_BT = torch.arange(start, start + len(ids_T), device=ids_T.device)[None]
        for i, layer in enumerate(self._layers):
            normed = self._add_norm(x_TD, product, layer.input_norm)
            q_TD = self._rotate(i, self._product(layer.qkv_proj, normed), start, slot)
            attended = self._attend(i, q_TD, positions_BT, start, slot)
            product = self._sum(layer.o_proj, attended)
            normed = self._add_norm(x_TD, product, layer.post_attention_norm)
            gated = self._swiglu(self._product(layer.gate_up_proj, normed))
            product = self._sum(layer.down_proj, gated)
        assert product is not None, "a model has layers"
        return x_TD[-1:] + replace(product, y=product.y[-1:]).finished()

    def _product(self, linear: Linear, x_TK: Tensor) -> Product:
        assert isinstance(linear.kernel, Fused), "a weight was not assigned for this"
        return replace(linear.kernel.product(x_TK, *linear.packed), bias=linear.bias)

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

    def _rotate(self, i: int, product: Product, start: int, slot: int) -> Tensor:
        """Queries; keys and values go into the cache."""
        decoder, layer = self._decoder, self._layers[i]
        n_heads, _, _ = layer.heads
        keys, values = (slots[slot] for slots in self._cache.layer(i))
        q_TD = product.y.new_empty(len(product.y), n_heads * layer.head_dim)
        norms, eps = {}, 0.0
        if layer.q_norm is not None and layer.k_norm is not None:
            norms = {"q_norm_E": layer.q_norm.weight, "k_norm_E": layer.k_norm.weight}
            eps = layer.q_norm.eps
        call = prompt.rotate(
            product, q_TD, keys, values, start, decoder.cos, decoder.sin, **norms, eps=eps
        )
        self._launch(call)
        return q_TD

    def _attend(self, i: int, q_TD: Tensor, positions_BT: Tensor, start: int, slot: int) -> Tensor:
        layer, T = self._layers[i], len(q_TD)
        q_BTHE = q_TD.view(1, T, -1, layer.head_dim)
        keys, values = (slots[slot : slot + 1] for slots in self._cache.layer(i))
        scale = layer.head_dim**-0.5
        if start == 0 and (layer.window is None or layer.window >= T):
            out = F.scaled_dot_product_attention(
                q_BTHE.transpose(1, 2),
                keys[:, :, :T],
                values[:, :, :T],
                is_causal=True,
                scale=scale,
                enable_gqa=True,
            ).transpose(1, 2)
        else:
            out = layer.attention(
                q_BTHE,
                keys,
                values,
                positions_BT,
                length=start + T,
                window=layer.window,
                scale=scale,
            )
        return out.reshape(T, -1)

    def _swiglu(self, product: Product) -> Tensor:
        rows, width = product.y.shape
        gated = product.y.new_empty(rows, width // 2)
        self._launch(prompt.swiglu(product, gated))
        return gated

    def _launch(self, call: Call) -> None:
        self._launcher.prepare(call, dependent=False)()
