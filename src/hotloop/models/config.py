"""What a decoder is configured with.

Families make it from a checkpoint's ``config.json``, which ``models.keys`` validates; a folder's
name means nothing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from hotloop.parallel.plan import Shard, plan_shards


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        theta: Base of the geometric series of wavelengths.
        scaling: How the frequencies are stretched for long contexts: ``linear`` (Chen et al.
            2023), ``dynamic`` (NTK-aware), ``yarn`` (Peng et al. 2023), ``longrope`` (Ding et al.
            2024), ``llama3`` (the Llama 3.1 report), or None.
        factor: The stretch; of ``longrope`` there is none.
        original_max_position: Context length before stretching.
        low_freq_factor: ``llama3``: wavelengths above original_max_position / this are stretched.
        high_freq_factor: ``llama3``: those below original_max_position / this are left alone.
        beta_fast: ``yarn``: frequencies that turn more often than this within
            original_max_position are left alone.
        beta_slow: ``yarn``: those that turn less often than this are stretched.
        truncate: ``yarn``: the bounds of the ramp between them are whole frequencies.
        short_factors: ``longrope``: a divisor for each frequency, up to original_max_position.
        long_factors: ``longrope``: those beyond it.
        attention_factor: ``yarn``, ``longrope``: what cosines and sines are multiplied by.
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
        """Whether sequences beyond ``original_max_position`` have other frequencies."""
        if self.scaling == "longrope":
            return self.short_factors != self.long_factors
        return self.scaling == "dynamic"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape and the switches of a decoder.

    Attributes:
        family: Registered name of the family that made this configuration.
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the feed-forward layer.
        n_layers: Blocks.
        n_heads: Query heads.
        n_kv_heads: Key/value heads; divides ``n_heads``.
        head_dim: Width of one head.
        max_position: Context length the model was made for.
        norm_eps: Epsilon of every norm.
        rope: Rotary position embedding.
        tie_embeddings: The head is the embedding.
        qkv_bias: The query, key and value projections have biases.
        o_bias: The output projection of attention has a bias.
        mlp_bias: The feed-forward projections have biases.
        qk_norm: Queries and keys are normalized per head before they are rotated.
        sliding_window: Tokens back to which attention reaches, or None for all.
        full_layers: Layers that see everything in spite of ``sliding_window``.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    full_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert self.n_heads % self.n_kv_heads == 0, f"{self.n_heads} heads, {self.n_kv_heads} pairs"
        assert self.rope.rotary_dim(self.head_dim) % 2 == 0, "elements are rotated in pairs"

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer, the tokens back to which attention reaches, or None for all."""
        return tuple(
            None if i in self.full_layers else self.sliding_window for i in range(self.n_layers)
        )

    @property
    def default_positions(self) -> int:
        """The longest context whose frequencies are those of every shorter one."""
        if self.rope.depends_on_length:
            return min(self.max_position, self.rope.original_max_position)
        return self.max_position

    def shards(self, n: int, alignment: int = 1) -> tuple[Shard, ...]:
        """What each of ``n`` ranks holds; see ``plan_shards``."""
        return plan_shards(
            n,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            alignment=alignment,
        )

    def local(self, shard: Shard) -> ModelConfig:
        """The decoder of one rank: fewer heads and features, all of the embedding's rows."""
        return dataclasses.replace(
            self,
            n_heads=len(shard.heads),
            n_kv_heads=len(shard.kv_heads),
            intermediate_size=len(shard.features),
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The projections of one block as this engine merges them: ``name -> (out, in)``."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return {
            "qkv_proj": (q + 2 * kv, self.hidden_size),
            "o_proj": (self.hidden_size, q),
            "gate_up_proj": (2 * self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }

    @property
    def bias(self) -> dict[str, bool]:
        """Which of the projections have biases."""
        return {
            "qkv_proj": self.qkv_bias,
            "o_proj": self.o_bias,
            "gate_up_proj": self.mlp_bias,
            "down_proj": self.mlp_bias,
        }

    @property
    def n_params(self) -> int:
        """Parameters, a tied embedding counted once."""
        per_layer = sum(n * k + n * self.bias[name] for name, (n, k) in self.linears.items())
        per_layer += 2 * self.hidden_size + 2 * self.head_dim * self.qk_norm
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.n_layers * per_layer + embeddings + self.hidden_size

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of cache that one token of one sequence takes."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * itemsize
