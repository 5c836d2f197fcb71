"""The configuration of a decoder, and the weights that follow from it.

A model is a tuple of layer configurations, which may differ. A layer is attention and a
feed-forward; each declares its matrices and norms. All code that handles weights (names in a
checkpoint, shards, loading, memory) iterates over these declarations.

A family makes a configuration from a checkpoint's ``config.json``, which ``models.keys`` validates;
the folder's name has no influence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from hotloop.parallel.plan import Axis, LayerShape, LayerShard, Shard, plan_shards

Activation = Literal["silu", "gelu_tanh"]
"""The function of the gate in a feed-forward."""


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """The settings of rotary position embedding.

    Attributes:
        theta: Base of the geometric series of wavelengths.
        scaling: How the frequencies are scaled for long contexts: ``linear`` (Chen et al.
            2023), ``dynamic`` (NTK-aware), ``yarn`` (Peng et al. 2023), ``longrope`` (Ding et al.
            2024), ``llama3`` (the Llama 3.1 report), or None.
        factor: The scaling factor; ``longrope`` has none.
        original_max_position: Context length before scaling.
        low_freq_factor: ``llama3``: wavelengths above original_max_position / this are scaled.
        high_freq_factor: ``llama3``: wavelengths below original_max_position / this are kept.
        beta_fast: ``yarn``: frequencies with more rotations than this within
            original_max_position are kept.
        beta_slow: ``yarn``: frequencies with fewer rotations than this are scaled.
        truncate: ``yarn``: the bounds of the ramp between kept and scaled frequencies are rounded
            to whole indices.
        short_factors: ``longrope``: a divisor for each frequency, up to original_max_position.
        long_factors: ``longrope``: the divisors beyond original_max_position.
        attention_factor: ``yarn``, ``longrope``: the factor of cosines and sines.
        partial: The part of a head that is rotated, its first elements.
    """

    theta: float = 10_000.0
    scaling: str | None = None
    factor: float = 1.0
    original_max_position: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    partial: float = 1.0

    def rotary_dim(self, head_dim: int) -> int:
        """Elements of a head that are rotated."""
        return round(head_dim * self.partial)

    @property
    def depends_on_length(self) -> bool:
        """Whether frequencies change for sequences beyond ``original_max_position``."""
        if self.scaling == "longrope":
            return self.short_factors != self.long_factors
        return self.scaling == "dynamic"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A matrix of a checkpoint, of which a decoder's matrix has one or several.

    Attributes:
        name: Its name in the checkpoint, within its layer, such as ``self_attn.q_proj``.
        gguf: Its name in GGUF files, within its layer, such as ``attn_q``.
        n: Output features.
        axis: The dimension that tensor parallelism shards.
        width: Features for each element of that axis: the width of a head, or 1.
        rotated: Rope rotates its outputs, which are heads.
    """

    name: str
    gguf: str
    n: int
    axis: Axis
    width: int = 1
    rotated: bool = False


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A weight matrix of a decoder: parts of a checkpoint, concatenated along the output features.

    Attributes:
        name: The attribute of the module that holds it.
        parts: The matrices of the checkpoint, in the order of concatenation.
        k: Input features.
        summed: Row-parallel: each rank has some of the input features, and the results are summed
            over ranks. Otherwise column-parallel: each rank has some of the output features.
        bias: The parts have biases.
        paired: The parts are gate and up of SwiGLU.
        norm: The attribute of the norm before it, if there is one.
    """

    name: str
    parts: tuple[Part, ...]
    k: int
    summed: bool = False
    bias: bool = False
    paired: bool = False
    norm: str | None = None

    @property
    def n(self) -> int:
        """Output features."""
        return sum(part.n for part in self.parts)

    def slices(self, part: Part, shard: LayerShard) -> tuple[range | None, range | None]:
        """Returns the rows and the columns of a part that a rank holds; None for all."""
        share = shard.along(part.axis)
        held = range(share.start * part.width, share.stop * part.width)
        return (None, held) if self.summed else (held, None)


@dataclass(frozen=True, kw_only=True)
class Norm:
    """The weight of a norm.

    Attributes:
        name: The attribute of the module that holds it.
        part: Its name in the checkpoint, within its layer.
        gguf: Its name in GGUF files, within its layer.
        n: Elements.
        rotated: It normalizes heads that rope rotates.
    """

    name: str
    part: str
    gguf: str
    n: int
    rotated: bool = False


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """The configuration of a layer's attention.

    Attributes:
        hidden_size: Width of the residual stream.
        n_heads: Query heads.
        n_kv_heads: Key/value heads; divides ``n_heads``.
        head_dim: Width of one head.
        rope: Rotary position embedding.
        scale: Factor of a query's product with a key.
        norm_eps: Epsilon of the norms.
        window: The number of newest tokens to which a token attends, itself included; None for all.
        qkv_bias: The query, key and value projections have biases.
        o_bias: The output projection has a bias.
        qk_norm: Queries and keys are normalized per head before they are rotated.
    """

    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: RopeConfig
    scale: float
    norm_eps: float
    window: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        assert self.n_heads % self.n_kv_heads == 0, (
            f"{self.n_heads} query heads for {self.n_kv_heads} key/value heads"
        )
        assert self.rope.rotary_dim(self.head_dim) % 2 == 0, "elements are rotated in pairs"

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Query, key and value projections as one matrix; then the output projection."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        width, name = self.head_dim, "self_attn.{}_proj".format
        qkv = (
            Part(name=name("q"), gguf="attn_q", n=q, axis="heads", width=width, rotated=True),
            Part(name=name("k"), gguf="attn_k", n=kv, axis="kv_heads", width=width, rotated=True),
            Part(name=name("v"), gguf="attn_v", n=kv, axis="kv_heads", width=width),
        )
        o = Part(name=name("o"), gguf="attn_output", n=self.hidden_size, axis="heads", width=width)
        return (
            Matrix(name="qkv_proj", parts=qkv, k=self.hidden_size, bias=self.qkv_bias, norm="norm"),
            Matrix(name="o_proj", parts=(o,), k=q, bias=self.o_bias, summed=True),
        )

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The norm before attention, and the norms of heads."""
        norms = [Norm(name="norm", part="input_layernorm", gguf="attn_norm", n=self.hidden_size)]
        if self.qk_norm:
            norms += [
                Norm(
                    name=name,
                    part=f"self_attn.{name}",
                    gguf=f"attn_{name}",
                    n=self.head_dim,
                    rotated=True,
                )
                for name in ("q_norm", "k_norm")
            ]
        return tuple(norms)


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """The configuration of a layer's gated feed-forward.

    Attributes:
        hidden_size: Width of the residual stream.
        intermediate_size: Features between the projections.
        norm_eps: Epsilon of the norm.
        activation: The function of the gate.
        bias: The projections have biases.
    """

    hidden_size: int
    intermediate_size: int
    norm_eps: float
    activation: Activation = "silu"
    bias: bool = False

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Gate and up projections as one matrix; then the down projection."""
        gate, up = (
            Part(
                name=f"mlp.{name}_proj",
                gguf=f"ffn_{name}",
                n=self.intermediate_size,
                axis="features",
            )
            for name in ("gate", "up")
        )
        down = Part(name="mlp.down_proj", gguf="ffn_down", n=self.hidden_size, axis="features")
        return (
            Matrix(
                name="gate_up_proj",
                parts=(gate, up),
                k=self.hidden_size,
                bias=self.bias,
                paired=True,
                norm="norm",
            ),
            Matrix(
                name="down_proj",
                parts=(down,),
                k=self.intermediate_size,
                bias=self.bias,
                summed=True,
            ),
        )

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The norm before the feed-forward."""
        return (
            Norm(name="norm", part="post_attention_layernorm", gguf="ffn_norm", n=self.hidden_size),
        )


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """The configuration of one layer.

    Attributes:
        attention: The configuration of its attention.
        feed_forward: The configuration of its feed-forward.
    """

    attention: AttentionConfig
    feed_forward: FeedForwardConfig

    @property
    def modules(self) -> dict[str, AttentionConfig | FeedForwardConfig]:
        """The configurations of a block's modules, by the block's attributes."""
        return {"attention": self.attention, "feed_forward": self.feed_forward}

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Every matrix of the layer, in the order of the computation."""
        return (*self.attention.matrices, *self.feed_forward.matrices)

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Every norm of the layer: the norms before its modules, then the norms of heads."""
        norms = (*self.attention.norms, *self.feed_forward.norms)
        return tuple(sorted(norms, key=lambda norm: norm.rotated))

    def shape(self, alignment: Callable[[Part], int]) -> LayerShape:
        """Returns the numbers of heads and features that ranks divide among themselves.

        Args:
            alignment: The number of input features of a part that must stay together.
        """

        def together(axis: Axis) -> int:
            summed = (part for m in self.matrices if m.summed for part in m.parts)
            return math.lcm(1, *(alignment(part) for part in summed if part.axis == axis))

        return LayerShape(
            n_heads=self.attention.n_heads,
            n_kv_heads=self.attention.n_kv_heads,
            head_dim=self.attention.head_dim,
            n_features=self.feed_forward.intermediate_size,
            heads_alignment=together("heads"),
            features_alignment=together("features"),
        )

    def local(self, shard: LayerShard) -> LayerConfig:
        """Returns a rank's shard of the layer, with fewer heads and features."""
        return LayerConfig(
            attention=dataclasses.replace(
                self.attention, n_heads=len(shard.heads), n_kv_heads=len(shard.kv_heads)
            ),
            feed_forward=dataclasses.replace(
                self.feed_forward, intermediate_size=len(shard.features)
            ),
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The configuration of a decoder: its layers, embedding and head.

    Attributes:
        family: Registered name of the family that made this configuration.
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        max_position: Context length for which the model was made.
        norm_eps: Epsilon of the last norm.
        layers: The configuration of each layer, in order.
        tie_embeddings: The head is the embedding.
    """

    family: str
    vocab_size: int
    hidden_size: int
    max_position: int
    norm_eps: float
    layers: tuple[LayerConfig, ...]
    tie_embeddings: bool = False

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        return len(self.layers)

    @property
    def kinds(self) -> dict[LayerConfig, int]:
        """The distinct layer configurations in order, each with the number of its layers."""
        return {kind: self.layers.count(kind) for kind in dict.fromkeys(self.layers)}

    @property
    def tables(self) -> tuple[tuple[int, RopeConfig], ...]:
        """The distinct rope tables that layers need, as (width of a head, settings)."""
        needed = ((layer.attention.head_dim, layer.attention.rope) for layer in self.kinds)
        return tuple(dict.fromkeys(needed))

    @property
    def default_positions(self) -> int:
        """The longest context that has the same frequencies as every shorter context."""
        lengths = (r.original_max_position for _, r in self.tables if r.depends_on_length)
        return min([self.max_position, *lengths])

    def shards(
        self, n: int, alignment: Callable[[int, Part], int] = lambda _i, _part: 1
    ) -> tuple[Shard, ...]:
        """Returns the shard of each of ``n`` ranks; see ``plan_shards``.

        Args:
            n: Ranks.
            alignment: The number of input features of a part of a layer that must stay together.
        """
        layers = [layer.shape(partial(alignment, i)) for i, layer in enumerate(self.layers)]
        return plan_shards(n, layers=layers, vocab_size=self.vocab_size)

    def local(self, shard: Shard) -> ModelConfig:
        """Returns the decoder of one rank: its shard of each layer, and the whole embedding."""
        parts = zip(self.layers, shard.layers, strict=True)
        return dataclasses.replace(self, layers=tuple(layer.local(part) for layer, part in parts))

    @property
    def n_params(self) -> int:
        """Parameters, a tied embedding counted once."""
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * self.hidden_size
        layers = sum(
            count
            * (
                sum(m.n * (m.k + m.bias) for m in kind.matrices)
                + sum(norm.n for norm in kind.norms)
            )
            for kind, count in self.kinds.items()
        )
        return layers + embeddings + self.hidden_size

    @property
    def kv_heads(self) -> list[tuple[int, int]]:
        """The number of key/value heads of each layer, and their width."""
        return [(each.attention.n_kv_heads, each.attention.head_dim) for each in self.layers]

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Counts the bytes of cache that one token of one sequence takes."""
        return 2 * sum(n * width for n, width in self.kv_heads) * itemsize
