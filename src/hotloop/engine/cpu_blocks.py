"""Runs a block of the decoder as two operators, in eager steps on a CPU.

A step of a small model is hundreds of operators of some microseconds each, and calling one takes as
long. Attention and feed-forward, the two *sublayers* of a block, are therefore one operator each
(``kernels.cpu``), from its norm to before its all-reduce. Their results equal those of
``Block.forward`` bit for bit.

Shape letters: B sequences, T tokens of each, D model width, J key/value heads, E head dimension, S
seats, C cache positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hotloop.kernels.attention import cpu_attention
from hotloop.kernels.linear import LinearKernel, Stacked
from hotloop.models.decoder import Block, Decoder, FeedForward, Run, SelfAttention, call
from hotloop.models.linear import Linear

Weight = tuple[list[Tensor], Tensor | None]
"""The packed tensors of a matrix, piece after piece, and its bias."""


def eager_run(decoder: Decoder) -> Run:
    """Chooses how eager steps call the decoder's parts.

    Returns:
        ``CpuBlocks`` where CPU kernels serve every matrix of every block, otherwise ``call``.
    """
    return CpuBlocks(decoder.blocks) if all(map(_on_cpu_kernels, decoder.blocks)) else call


class CpuBlocks:
    """A ``Run`` that computes a block by two operators."""

    def __init__(self, blocks: list[Block]) -> None:
        self._sublayers = {
            block: (_attention(block.attention), _feed_forward(block.feed_forward))
            for block in blocks
        }

    def __call__(self, part: Callable[..., Any], /, *args: Any) -> Any:
        """See ``Run``."""
        if part is not Block.forward:
            return part(*args)
        block, x, cos, sin, positions, keys, values, seats, *_ = args
        attention, feed_forward = self._sublayers[block]
        x = x + block.all_reduce(attention(x, cos, sin, keys, values, seats, positions)).view_as(x)
        return x + block.all_reduce(feed_forward(x)).view_as(x)


def _attention(module: SelfAttention) -> Callable[..., Tensor]:
    """Returns the operator of a block's attention, with its weights bound."""
    operator = torch.ops.hotloop_cpu.attention_sublayer.default
    norm, eps = module.norm.weight, module.norm.eps
    qkv, o = _weight(module.qkv_proj), _weight(module.o_proj)
    norms = (module.q_norm, module.k_norm)
    head_norms = [None if n is None else n.weight for n in norms]
    window, scale = module.window or 0, module.scale

    def attention(
        x_BTD: Tensor,
        cos_BTE: Tensor,
        sin_BTE: Tensor,
        keys_SJCE: Tensor,
        values_SJCE: Tensor,
        seats_B: Tensor,
        positions_BT: Tensor,
    ) -> Tensor:
        tables, caches = (cos_BTE, sin_BTE), (keys_SJCE, values_SJCE)
        rest = (seats_B, positions_BT, window, scale)
        return operator(x_BTD, norm, eps, *qkv, *head_norms, *tables, *caches, *rest, *o)

    return attention


def _feed_forward(module: FeedForward) -> Callable[[Tensor], Tensor]:
    """Returns the operator of a block's feed-forward, with its weights bound."""
    operator = torch.ops.hotloop_cpu.feed_forward_sublayer.default
    norm, eps = module.norm.weight, module.norm.eps
    gate_up, down = _weight(module.gate_up_proj), _weight(module.down_proj)
    return lambda x_BTD: operator(x_BTD, norm, eps, *gate_up, *down)


def _weight(linear: Linear) -> Weight:
    return linear.packed, linear.bias


def _on_cpu_kernels(block: Block) -> bool:
    """Returns whether the operators support a block: CPU kernels for all of it, and SwiGLU."""
    ours = all(map(_is_ours, (linear.kernel for linear in block.linears.values())))
    is_swiglu = block.config.feed_forward.activation == "silu"
    return ours and is_swiglu and block.attention.kernel is cpu_attention


def _is_ours(kernel: LinearKernel | Stacked | None) -> bool:
    if isinstance(kernel, Stacked):
        return all(map(_is_ours, kernel.kernels))
    return kernel is not None and kernel.name.endswith("/cpu")
