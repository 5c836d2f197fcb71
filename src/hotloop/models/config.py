"""What a decoder is configured with, read from a checkpoint's ``config.json``.

``config.json`` is the only source: a folder's name means nothing. Every key that would change the
arithmetic is either understood or refused by name; the rest is ignored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hotloop.errors import ConfigError, UnsupportedError
from hotloop.parallel.plan import Shard, plan_shards


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        theta: Base of the geometric series of wavelengths.
        scaling: How the frequencies are stretched for long contexts: ``linear`` (Chen et al.
            2023), ``llama3`` (the Llama 3.1 report), ``factors`` (one divisor per frequency), or
            None.
        factor: The stretch, for ``linear`` and ``llama3``.
        low_freq_factor: ``llama3``: wavelengths above original_max_position / this are stretched.
        high_freq_factor: ``llama3``: those below original_max_position / this are left alone.
        original_max_position: ``llama3``: context length before stretching.
        factors: ``factors``: the divisors, head_dim / 2 of them.
    """

    theta: float = 10_000.0
    scaling: str | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    factors: tuple[float, ...] = ()


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

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"num_attention_heads {self.n_heads} is not a multiple of num_key_value_heads "
                f"{self.n_kv_heads}."
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary embedding, not {self.head_dim}.")

    def shards(self, n_ranks: int, *, alignment: int) -> tuple[Shard, ...]:
        """What each of ``n_ranks`` holds; see ``parallel.plan``."""
        return plan_shards(
            n_ranks,
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


def integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A key that holds a positive integer; ConfigError where it does not, or is not there."""
    value = _value(config, key, default)
    if type(value) is not int or value < 1:
        raise ConfigError(f"config.json sets {key} = {value!r:.80}; it must be an integer above 0.")
    return value


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A key that holds a number; ConfigError where it does not, or is not there."""
    value = _value(config, key, default)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ConfigError(f"config.json sets {key} = {value!r:.80}; it must be a number.")
    return float(value)


def _value(config: Mapping[str, Any], key: str, default: Any) -> Any:
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise ConfigError(f"config.json has no {key!r}, which this model needs.")
    return value


def refuse_unless(config: Mapping[str, Any], expected: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuses values that would change the arithmetic and are not implemented.

    Args:
        config: The keys of config.json.
        expected: For each key the values that are implemented; an absent key is fine.
    """
    for key, values in expected.items():
        if key in config and config[key] not in values:
            raise UnsupportedError(
                f"config.json sets {key} = {config[key]!r}, which would change the arithmetic and "
                f"is not implemented; supported: {', '.join(map(repr, values))}."
            )


def read_rope(config: Mapping[str, Any]) -> RopeConfig:
    """Rotary settings in either spelling.

    Those are ``rope_parameters``, or ``rope_theta`` beside ``rope_scaling``, whose kind was once
    called ``type``.

    Raises:
        UnsupportedError: A kind of scaling, or an argument of one, that is not implemented.
    """
    given: dict[str, Any] = {"rope_theta": config.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        given |= {k: v for k, v in (config.get(key) or {}).items() if v is not None}
    partial = given.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UnsupportedError(f"partial_rotary_factor = {partial} is not implemented.")
    rope = RopeConfig(theta=number(given, "rope_theta", RopeConfig.theta))
    kind = given.get("rope_type", given.get("type", "default"))
    settings = given.keys() - {"rope_theta", "rope_type", "type"}
    match kind:
        case "default":
            return rope
        case "linear":
            used = {"factor"}
            rope = dataclasses.replace(rope, scaling=kind, factor=number(given, "factor"))
        case "llama3":
            used = {"factor", "low_freq_factor", "high_freq_factor"}
            rope = dataclasses.replace(
                rope,
                scaling=kind,
                factor=number(given, "factor"),
                low_freq_factor=number(given, "low_freq_factor"),
                high_freq_factor=number(given, "high_freq_factor"),
                original_max_position=integer(given, "original_max_position_embeddings"),
            )
        case "gguf_factors":  # from a GGUF file's own tensor
            used = {"factors"}
            rope = dataclasses.replace(rope, scaling="factors", factors=tuple(given["factors"]))
        case _:
            raise UnsupportedError(
                f"rope_scaling type {kind!r} is not implemented; supported: 'default', 'linear', "
                "'llama3'."
            )
    if unknown := settings - used - {"original_max_position_embeddings"}:
        raise UnsupportedError(
            f"rope_scaling of type {kind!r} has {min(unknown)!r}, which is not implemented."
        )
    return rope
