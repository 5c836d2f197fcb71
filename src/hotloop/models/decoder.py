"""The one decoder: Llama's architecture with the switches that its relatives need.

Pre-norm blocks of grouped-query attention with rotary positions and a SwiGLU feed-forward. The
query, key and value projections are one product, and so are gate and up. Which arithmetic runs in
a projection is decided when its weight is assigned; how a step runs (eagerly, compiled) is decided
by the engine. This module only says what is computed.

Shape letters: B sequences, T tokens of each, D model width, H query heads, J key/value heads,
E head dimension, V vocabulary, S slots, C cache positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hotloop.kernels import pointwise
from hotloop.kernels.attention import Attention
from hotloop.models.cache import KVCache, write
from hotloop.models.config import ModelConfig
from hotloop.models.linear import Embedding, Linear
from hotloop.models.rope import rope_tables

Total = Callable[[Tensor], Tensor]
"""Of what a rank's slice of a projection gives, the sum over all ranks."""


class Run(Protocol):
    """How the decoder's parts are called: ``embed``, each ``Block.forward``, ``logits``."""

    def __call__(self, part: Callable[..., Any], /, *args: Any) -> Any:
        """What ``part(*args)`` gives."""
        ...


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight that arrives later."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.empty(width, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same."""
        return pointwise.rms_norm(x, self.weight, self.eps)


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and around a residual."""

    def __init__(
        self,
        *,
        linears: dict[str, tuple[int, int]],
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        norm_eps: float,
        qk_norm: bool,
        window: int | None,
        attention: Attention,
        total: Total,
    ) -> None:
        super().__init__()
        self.total = total
        self.heads = (n_heads, n_kv_heads, n_kv_heads)
        self.head_dim, self.window, self.attention = head_dim, window, attention
        self.qkv_proj = Linear(*linears["qkv_proj"])
        self.o_proj = Linear(*linears["o_proj"])
        self.gate_up_proj = Linear(*linears["gate_up_proj"], paired=True)
        self.down_proj = Linear(*linears["down_proj"])
        width = linears["qkv_proj"][1]
        self.input_norm = RMSNorm(width, norm_eps)
        self.post_attention_norm = RMSNorm(width, norm_eps)
        self.q_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None

    def forward(
        self,
        x_BTD: Tensor,
        cos_BTE: Tensor,
        sin_BTE: Tensor,
        positions_BT: Tensor,
        keys_SJCE: Tensor,
        values_SJCE: Tensor,
        slots_B: Tensor,
        first_slot: int,
        length: int,
    ) -> Tensor:
        """Adds what this layer has to say, and leaves its keys and values in the cache."""
        B, T, _ = x_BTD.shape
        qkv = self.qkv_proj(self.input_norm(x_BTD)).view(B, T, -1, self.head_dim)
        q, k, v = qkv.split(self.heads, dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = pointwise.apply_rope(q, cos_BTE, sin_BTE)
        k = pointwise.apply_rope(k, cos_BTE, sin_BTE)
        write(keys_SJCE, slots_B, positions_BT, k)
        write(values_SJCE, slots_B, positions_BT, v)
        here = slice(first_slot, first_slot + B)
        attended = self.attention(
            q,
            keys_SJCE[here],
            values_SJCE[here],
            positions_BT,
            length=length,
            window=self.window,
            scale=self.head_dim**-0.5,
        )
        x_BTD = x_BTD + self.total(self.o_proj(attended.reshape(B, T, -1)))
        gate_up = self.gate_up_proj(self.post_attention_norm(x_BTD))
        return x_BTD + self.total(self.down_proj(pointwise.swiglu(gate_up)))


def _itself(x: Tensor) -> Tensor:
    return x


def call(part: Callable[..., Any], /, *args: Any) -> Any:
    """A ``Run`` that does nothing else."""
    return part(*args)


class Decoder(nn.Module):
    """Token ids in, hidden states and logits out, with keys and values in a cache.

    Made without weights: ``weights.load`` assigns them one by one. One of several ranks is made
    from its own numbers of heads and features, and knows no more of the others than this.

    Args:
        config: The shape.
        n_positions: Positions that rotary tables are made for.
        attention: The kernel.
        device: Where it runs.
        n_head_rows: Rows of the head: all of the vocabulary, or this rank's.
        total: Sums over ranks; a single one's sum is itself.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        n_positions: int,
        attention: Attention,
        device: torch.device,
        n_head_rows: int | None = None,
        total: Total = _itself,
    ) -> None:
        super().__init__()
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(
                linears=config.linears,
                n_heads=config.n_heads,
                n_kv_heads=config.n_kv_heads,
                head_dim=config.head_dim,
                norm_eps=config.norm_eps,
                qk_norm=config.qk_norm,
                window=window,
                attention=attention,
                total=total,
            )
            for window in config.windows
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = Linear(n_head_rows or config.vocab_size, config.hidden_size)
        cos, sin = rope_tables(config.head_dim, n_positions, config.rope)
        self.register_buffer("cos", cos.to(device), persistent=False)
        self.register_buffer("sin", sin.to(device), persistent=False)

    def forward(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor,
        cache: KVCache,
        *,
        first_slot: int = 0,
        length: int,
        n_layers: int | None = None,
        run: Run = call,
    ) -> Tensor:
        """Hidden states [B, T, D] of new tokens, as the last layer leaves them.

        Args:
            ids_BT: Token ids.
            positions_BT: Their positions, int64; each sequence's are consecutive.
            cache: Holds everything before them, and them afterwards.
            first_slot: Sequence b is in slot ``first_slot + b``.
            length: Exceeds every position; bounds how much of the cache is read.
            n_layers: Stop after so many layers; None takes all.
            run: Calls the parts.
        """
        x_BTD, cos_BTE, sin_BTE, slots_B = run(
            Decoder.embed, self, ids_BT, positions_BT, first_slot
        )
        layers = self.layers if n_layers is None else self.layers[:n_layers]
        for i, layer in enumerate(layers):
            keys, values = cache.layer(i)
            x_BTD = run(
                Block.forward,
                layer,
                x_BTD,
                cos_BTE,
                sin_BTE,
                positions_BT,
                keys,
                values,
                slots_B,
                first_slot,
                length,
            )
        return x_BTD

    def embed(
        self, ids_BT: Tensor, positions_BT: Tensor, first_slot: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What all layers start from: hidden states, both rotary tables' rows, and slots [B]."""
        slots_B = torch.arange(first_slot, first_slot + ids_BT.shape[0], device=ids_BT.device)
        return self.embedding(ids_BT), self.cos[positions_BT], self.sin[positions_BT], slots_B

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [..., V] of hidden states [..., D]; of several ranks, this one's rows."""
        return self.head(self.norm(hidden)).float()
