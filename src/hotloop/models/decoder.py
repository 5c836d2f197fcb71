"""The one decoder: Llama's architecture with the switches that its relatives need.

It has pre-norm blocks of grouped-query attention with rotary positions and a SwiGLU feed-forward.
The query, key and value projections are one matrix product, and so are gate and up. The kernel of a
projection is chosen when its weight is assigned; the engine chooses the execution mode. This module
only defines the computation.

Shape letters: B sequences, T tokens of each, D model width, H query heads, J key/value heads,
E head dimension, V vocabulary, S seats, C cache positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from hotloop.kernels import pointwise, reference
from hotloop.kernels.attention import Attention
from hotloop.models.cache import KVCache, write
from hotloop.models.config import (
    Activation,
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
)
from hotloop.models.linear import Embedding, Linear
from hotloop.models.rope import rope_tables


class Run(Protocol):
    """Calls the decoder's parts (``Decoder.embed``, each ``Block.forward``, ``Decoder.logits``).

    An execution mode passes its own to run them compiled.
    """

    def __call__(self, part: Callable[..., Any], /, *args: Any) -> Any:
        """Calls ``part(*args)`` and returns its result."""
        ...


class RMSNorm(nn.Module):
    """Root-mean-square norm whose weight is assigned later."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.empty(width, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes [..., width]."""
        return pointwise.rms_norm(x, self.weight, self.eps)


class SelfAttention(nn.Module):
    """Grouped-query attention, with the norm before it and the output projection.

    Args:
        config: Its configuration.
        kernel: The implementation of attention itself.
    """

    def __init__(self, config: AttentionConfig, kernel: Attention) -> None:
        super().__init__()
        self.kernel, self.head_dim = kernel, config.head_dim
        self.window, self.scale = config.window, config.scale
        self.heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        self.qkv_proj, self.o_proj = map(Linear.declared, config.matrices)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        x_BTD: Tensor,
        cos_BTE: Tensor,
        sin_BTE: Tensor,
        positions_BT: Tensor,
        keys_SJCE: Tensor,
        values_SJCE: Tensor,
        seats_B: Tensor,
        first_seat: int | None,
        length: int,
    ) -> Tensor:
        """Writes the tokens' keys and values into the cache, and attends to it."""
        B, T, _ = x_BTD.shape
        qkv = self.qkv_proj(self.norm(x_BTD)).view(B, T, -1, self.head_dim)
        q, k, v = qkv.split(self.heads, dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = pointwise.apply_rope(q, cos_BTE, sin_BTE)
        k = pointwise.apply_rope(k, cos_BTE, sin_BTE)
        write(keys_SJCE, seats_B, positions_BT, k)
        write(values_SJCE, seats_B, positions_BT, v)
        attended = self.kernel(
            q,
            keys_SJCE,
            values_SJCE,
            seats_B,
            positions_BT,
            first_seat=first_seat,
            length=length,
            window=self.window,
            scale=self.scale,
        )
        return self.o_proj(attended.reshape(B, T, -1))


_GATES: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": pointwise.swiglu,
    "gelu_tanh": reference.geglu_tanh,
}


class FeedForward(nn.Module):
    """A gated feed-forward, with the norm before it."""

    def __init__(self, config: FeedForwardConfig) -> None:
        super().__init__()
        self.gated = _GATES[config.activation]
        self.gate_up_proj, self.down_proj = map(Linear.declared, config.matrices)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Computes the feed-forward of [..., D]."""
        return self.down_proj(self.gated(self.gate_up_proj(self.norm(x_BTD))))


class Block(nn.Module):
    """One layer: attention and feed-forward, each added to the residual stream.

    Args:
        config: The layer's configuration, or the configuration of a rank's shard of it.
        attention: The implementation of attention.
        all_reduce: Sums the result of a row-parallel projection over ranks.
    """

    def __init__(
        self, config: LayerConfig, *, attention: Attention, all_reduce: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.config, self.all_reduce = config, all_reduce
        self.attention = SelfAttention(config.attention, attention)
        self.feed_forward = FeedForward(config.feed_forward)

    @property
    def linears(self) -> dict[str, Linear]:
        """Every matrix of the layer by the name that its configuration declares."""
        return {
            matrix.name: getattr(getattr(self, name), matrix.name)
            for name, declared in self.config.modules.items()
            for matrix in declared.matrices
        }

    def share_norms(self, other: Block) -> None:
        """Replaces the norms by those of another block of the same configuration."""
        for name in self.config.modules:
            mine, theirs = getattr(self, name), getattr(other, name)
            for child, module in theirs.named_children():
                if isinstance(module, RMSNorm):
                    setattr(mine, child, module)

    def forward(
        self,
        x_BTD: Tensor,
        cos_BTE: Tensor,
        sin_BTE: Tensor,
        positions_BT: Tensor,
        keys_SJCE: Tensor,
        values_SJCE: Tensor,
        seats_B: Tensor,
        first_seat: int | None,
        length: int,
    ) -> Tensor:
        """Returns the hidden states [B, T, D] after this layer; caches its keys and values."""
        attended = self.attention(
            x_BTD,
            cos_BTE,
            sin_BTE,
            positions_BT,
            keys_SJCE,
            values_SJCE,
            seats_B,
            first_seat,
            length,
        )
        x_BTD = x_BTD + self.all_reduce(attended)
        return x_BTD + self.all_reduce(self.feed_forward(x_BTD))


def _unchanged(x: Tensor) -> Tensor:
    return x


def call(part: Callable[..., Any], /, *args: Any) -> Any:
    """Calls ``part(*args)`` directly: the default ``Run``."""
    return part(*args)


class Decoder(nn.Module):
    """A decoder that computes hidden states and logits from token ids, with a key/value cache.

    It is made without weights: ``weights.load`` assigns them one by one. A rank's shard is made
    from a configuration with that rank's numbers of heads and features.

    Args:
        config: The configuration of the model, or of a rank's shard of it.
        n_positions: Number of positions in the rotary tables.
        attention: The implementation of attention.
        device: The device of the rotary tables.
        n_head_rows: Rows of the head: the whole vocabulary, or this rank's share of it.
        all_reduce: Sums the result of a row-parallel projection over ranks; a single rank returns
            it as it is.
        target: If this is the decoder of a drafter, the decoder of the model that it drafts for. It
            has the same shape, and this decoder uses its embedding, norms and rope tables.
        shares_head: This decoder uses the target's head as well.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        n_positions: int,
        attention: Attention,
        device: torch.device,
        n_head_rows: int | None = None,
        all_reduce: Callable[[Tensor], Tensor] = _unchanged,
        target: Decoder | None = None,
        shares_head: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Block(layer, attention=attention, all_reduce=all_reduce) for layer in config.layers
        )
        if target is None:
            self.embedding = Embedding(config.vocab_size, config.hidden_size)
            self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        else:
            self.embedding, self.norm = target.embedding, target.norm
            for block, theirs in zip(self.blocks, target.blocks, strict=True):
                block.share_norms(theirs)
        if target is not None and shares_head:
            self.head = target.head
        else:
            self.head = Linear(n_head_rows or config.vocab_size, config.hidden_size)
        self.device = device
        for i, (head_dim, rope) in enumerate(config.tables):
            tables = rope_tables(head_dim, n_positions, rope) if target is None else target.table(i)
            for name, table in zip(("cos", "sin"), tables, strict=True):
                self.register_buffer(f"{name}{i}", table.to(device), persistent=False)
        self._table_of = [
            config.tables.index((layer.attention.head_dim, layer.attention.rope))
            for layer in config.layers
        ]
        self._n_tables = len(config.tables)

    @property
    def blocks(self) -> list[Block]:
        """The layers, by their type."""
        return cast(list[Block], list(self.layers))

    def rope(self, layer: int) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines of a layer's rope, float32 [positions, E]."""
        return self.table(self._table_of[layer])

    def table(self, i: int) -> tuple[Tensor, Tensor]:
        """Returns the i-th of the model's rope tables, as ``rope`` does."""
        return getattr(self, f"cos{i}"), getattr(self, f"sin{i}")

    def share_high_planes(self, target: Decoder) -> None:
        """Uses the high planes of the target's nested matrices, once these have been assigned."""
        for block, theirs in zip(self.blocks, target.blocks, strict=True):
            for name, linear in block.linears.items():
                linear.share_high_plane(theirs.linears[name])

    def share_biases(self, target: Decoder) -> None:
        """Uses the biases of the target. Both decoders must have their weights."""
        for block, theirs in zip(self.blocks, target.blocks, strict=True):
            for name, linear in block.linears.items():
                linear.bias = theirs.linears[name].bias

    def forward(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor,
        cache: KVCache,
        *,
        seats_B: Tensor,
        first_seat: int | None = None,
        length: int,
        n_layers: int | None = None,
        run: Run = call,
    ) -> Tensor:
        """Returns the hidden states [B, T, D] of new tokens after the last layer.

        Args:
            ids_BT: Token ids.
            positions_BT: Their positions, int64; consecutive in each sequence.
            cache: Contains the earlier tokens; the new tokens are written into it.
            seats_B: int64, the seat of each sequence in the cache.
            first_seat: The first sequence's seat, if the seats of the other sequences follow it in
                order: some kernels then need no copy. None if they do not, or if it is not known.
            length: A number above every position, which limits the part of the cache that is read.
            n_layers: Number of layers to run; None runs all.
            run: Calls the parts; the default calls them directly.
        """
        x_BTD, ropes = run(Decoder.embed, self, ids_BT, positions_BT)
        layers = self.layers if n_layers is None else self.layers[:n_layers]
        for i, layer in enumerate(layers):
            keys, values = cache.layer(i)
            cos_BTE, sin_BTE = ropes[self._table_of[i]]
            x_BTD = run(
                Block.forward,
                layer,
                x_BTD,
                cos_BTE,
                sin_BTE,
                positions_BT,
                keys,
                values,
                seats_B,
                first_seat,
                length,
            )
        return x_BTD

    def embed(
        self, ids_BT: Tensor, positions_BT: Tensor
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Looks up the inputs of the layers.

        Returns:
            Hidden states [B, T, D]; and for each of the model's rope tables, the cosines and sines
            of the positions, float32 [B, T, E] each.
        """
        ropes = [
            (getattr(self, f"cos{i}")[positions_BT], getattr(self, f"sin{i}")[positions_BT])
            for i in range(self._n_tables)
        ]
        return self.embedding(ids_BT), ropes

    def logits(self, hidden: Tensor) -> Tensor:
        """Computes float32 logits [..., V] of hidden states [..., D]; this rank's rows."""
        return self.head(self.norm(hidden)).float()
