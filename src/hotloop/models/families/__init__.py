"""Model families, which translate a ``config.json`` into the configuration of the decoder.

A new family takes a module here and a line in ``FAMILIES``. The parity test against Hugging Face
transformers is parametrized over the registry, and uses the family's own tiny configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hotloop.errors import UnknownNameError, shorten_value
from hotloop.models.config import LayerConfig, ModelConfig, RopeConfig
from hotloop.models.keys import ModelKeys, WindowKeys, read_keys
from hotloop.registry import resolve
from hotloop.untrusted import config_error

FAMILIES = {
    "LlamaForCausalLM": "hotloop.models.families.llama:FAMILY",
    "MistralForCausalLM": "hotloop.models.families.mistral:FAMILY",
    "Qwen2ForCausalLM": "hotloop.models.families.qwen2:FAMILY",
    "Qwen3ForCausalLM": "hotloop.models.families.qwen3:FAMILY",
}
"""Every model family, by the architecture its ``config.json`` names."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A group of models that one reader of ``config.json`` serves.

    Attributes:
        name: Short name, for records.
        keys: The model of the keys of ``config.json``.
        read: Makes a ModelConfig from these keys.
        tiny: Keys of a ``config.json`` for a tiny model with every switch of the family in use;
            the parity test builds both implementations from it.
        neutral: Keys that the family accepts with these values only.
        harmless: Keys that the family ignores, as transformers does.
        nullable: Keys whose meaning with null differs from that of a missing key.
    """

    name: str
    keys: type[ModelKeys]
    read: Callable[[Any], ModelConfig]
    tiny: Mapping[str, Any]
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    harmless: tuple[str, ...] = ()
    nullable: tuple[str, ...] = ()


def read_config(config: Mapping[str, Any], file: Path | str = "config.json") -> ModelConfig:
    """Returns the ModelConfig of a ``config.json``.

    Args:
        config: Its keys.
        file: Their file, for errors.

    Raises:
        UnknownNameError: The architecture is not implemented; the message names the nearest.
        UnsupportedError: A key that may change the arithmetic is not implemented.
        ConfigError: A key that the family needs is missing or invalid.
    """
    family = family_of(config, file)
    keys = read_keys(
        family.keys,
        config,
        file,
        neutral=family.neutral,
        harmless=family.harmless,
        nullable=family.nullable,
    )
    return family.read(keys)


def family_of(config: Mapping[str, Any], file: Path | str = "config.json") -> Family:
    """Returns the family of a ``config.json``, by its architecture, or else by its model type."""
    architectures = config.get("architectures")
    if architectures in (None, []) and (model_type := config.get("model_type")) is not None:
        by_type = {name.removesuffix("ForCausalLM").lower(): name for name in FAMILIES}
        if not isinstance(model_type, str) or model_type not in by_type:
            raise UnknownNameError("model_type", str(model_type), by_type)
        return resolve("model architecture", FAMILIES, by_type[model_type])
    match architectures:
        case [str(architecture)]:
            return resolve("model architecture", FAMILIES, architecture)
        case _:
            raise config_error(
                file, f"architectures must name one, not {shorten_value(architectures)}"
            )


def common_fields(keys: ModelKeys) -> dict[str, Any]:
    """Returns the ModelConfig fields whose keys are the same in every family."""
    rope = _read_rope(keys)
    max_position = keys.max_position_embeddings
    if rope.scaling in ("dynamic", "yarn"):
        max_position = max(max_position, int(rope.original_max_position * rope.factor))
    return {
        "vocab_size": keys.vocab_size,
        "hidden_size": keys.hidden_size,
        "max_position": max_position,
        "norm_eps": keys.rms_norm_eps,
        "tie_embeddings": keys.tie_word_embeddings,
    }


def attention_fields(keys: ModelKeys) -> dict[str, Any]:
    """Returns the AttentionConfig fields whose keys are the same in every family."""
    return {
        "hidden_size": keys.hidden_size,
        "n_heads": keys.num_attention_heads,
        "n_kv_heads": keys.n_kv_heads,
        "head_dim": keys.width_of_head,
        "rope": _read_rope(keys),
        "scale": keys.width_of_head**-0.5,
        "norm_eps": keys.rms_norm_eps,
    }


def feed_forward_fields(keys: ModelKeys) -> dict[str, Any]:
    """Returns the FeedForwardConfig fields whose keys are the same in every family."""
    return {
        "hidden_size": keys.hidden_size,
        "intermediate_size": keys.intermediate_size,
        "norm_eps": keys.rms_norm_eps,
    }


def windowed_layers(keys: WindowKeys, layer: LayerConfig) -> tuple[LayerConfig, ...]:
    """Returns the layers of a model that differ only in the window of attention."""
    kinds = {
        window: replace(layer, attention=replace(layer.attention, window=window))
        for window in set(keys.windows)
    }
    return tuple(kinds[window] for window in keys.windows)


def _read_rope(keys: ModelKeys) -> RopeConfig:
    rope = keys.rope
    original = rope.original_max_position_embeddings or keys.max_position_embeddings
    if rope.rope_type == "dynamic":  # transformers scales from the context in the file
        original = keys.max_position_embeddings
    factor = rope.factor or keys.max_position_embeddings / original
    attention_factor = rope.attention_factor
    if attention_factor is None and rope.rope_type == "yarn":
        attention_factor = _yarn_scale(factor)
        if rope.mscale and rope.mscale_all_dim:
            attention_factor = _yarn_scale(factor, rope.mscale) / _yarn_scale(
                factor, rope.mscale_all_dim
            )
    elif attention_factor is None and rope.rope_type == "longrope" and factor > 1:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
    default = rope.rope_type == "default"
    if default or rope.rope_type == "linear":  # whose frequencies do not depend on it
        original = RopeConfig.original_max_position
    return RopeConfig(
        theta=rope.rope_theta,
        scaling=None if default else rope.rope_type,
        factor=1.0 if default or rope.rope_type == "longrope" else factor,
        original_max_position=original,
        low_freq_factor=rope.low_freq_factor or RopeConfig.low_freq_factor,
        high_freq_factor=rope.high_freq_factor or RopeConfig.high_freq_factor,
        beta_fast=rope.beta_fast,
        beta_slow=rope.beta_slow,
        truncate=rope.truncate,
        short_factors=tuple(rope.short_factor or ()),
        long_factors=tuple(rope.long_factor or ()),
        attention_factor=1.0 if attention_factor is None else attention_factor,
        partial=rope.partial_rotary_factor,
    )


def _yarn_scale(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
