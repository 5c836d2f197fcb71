"""Translates the metadata of a GGUF file to the keys of a Hugging Face ``config.json``.

Defaults are llama.cpp's. Every key of the file's architecture is validated and translated here, or
is known not to affect the arithmetic, or is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from hotloop.checked import Count
from hotloop.errors import UnsupportedError, shorten, shorten_value
from hotloop.untrusted import StrictModel, validated

ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""GGUF architectures, and their names at Hugging Face."""

_HARMLESS_KEYS = {
    "attention.layer_norm_epsilon",  # these models have RMS norms, whose epsilon is another key
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "vocab_size",
}
"""Keys that do not affect the arithmetic, or that repeat facts of the tensors."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}
"""Keys with which other models change the arithmetic, and the values that do not change it."""

_Positive = Annotated[float, Field(gt=0, le=1e6)]


class _Keys(StrictModel):
    """The architecture's own keys, without the prefix of its name."""

    embedding_length: Count
    feed_forward_length: Count
    block_count: Annotated[int, Field(ge=1, le=10_000)]
    context_length: Count
    n_heads: Count = Field(alias="attention.head_count")
    n_kv_heads: Count | None = Field(None, alias="attention.head_count_kv")
    key_length: Count | None = Field(None, alias="attention.key_length")
    value_length: Count | None = Field(None, alias="attention.value_length")
    window: Annotated[int, Field(ge=0, le=2**31)] = Field(0, alias="attention.sliding_window")
    norm_eps: Annotated[float, Field(ge=0, lt=1)] = Field(alias="attention.layer_norm_rms_epsilon")
    rope_theta: Annotated[float, Field(gt=1, le=1e18)] = Field(1e4, alias="rope.freq_base")
    rotary_dim: Count | None = Field(None, alias="rope.dimension_count")
    scaling: Literal["none", "linear", "yarn", "longrope"] = Field(
        "linear", alias="rope.scaling.type"
    )
    factor: Annotated[float, Field(ge=0, le=1e6)] = Field(0.0, alias="rope.scaling.factor")
    older_factor: Annotated[float, Field(ge=0, le=1e6)] = Field(0.0, alias="rope.scale_linear")
    original_context: Count | None = Field(None, alias="rope.scaling.original_context_length")
    attention_factor: _Positive = Field(1.0, alias="rope.scaling.attn_factor")
    yarn_attention_factor: _Positive = Field(1.0, alias="rope.scaling.yarn_attn_factor")
    beta_fast: _Positive = Field(32.0, alias="rope.scaling.yarn_beta_fast")
    beta_slow: _Positive = Field(1.0, alias="rope.scaling.yarn_beta_slow")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.key_length or self.embedding_length // self.n_heads

    @property
    def scaling_factor(self) -> float:
        """The rope scaling factor; 0 and a missing key mean 1."""
        return self.factor or self.older_factor or 1.0

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.n_heads % (self.n_kv_heads or self.n_heads):
            raise ValueError(
                f"attention.head_count {self.n_heads} is not a multiple of "
                f"attention.head_count_kv {self.n_kv_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"attention.key_length, or embedding_length / attention.head_count, is "
                f"{self.head_dim}; it must be even"
            )
        if self.value_length not in (None, self.head_dim):
            raise ValueError(
                f"attention.value_length is {self.value_length}, and only the width of a head, "
                f"{self.head_dim}, is supported"
            )
        rotated = self.rotary_dim or self.head_dim
        if rotated % 2 or rotated > self.head_dim:
            raise ValueError(
                f"rope.dimension_count is {rotated}; it must be even and at most the width of a "
                f"head, {self.head_dim}"
            )
        if self.scaling in ("yarn", "longrope") and self.original_context is None:
            raise ValueError(
                f"rope.scaling.type {self.scaling!r} needs rope.scaling.original_context_length"
            )
        return self


def config_from_metadata(metadata: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Returns the keys of ``config.json`` from the metadata; the other keys come from the tensors.

    Raises:
        CheckpointError: A required key of the architecture is missing or invalid.
        UnsupportedError: An architecture, a key or a value is not implemented.
    """
    file = shorten(str(path))
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"{file}: GGUF architecture {shorten_value(architecture)} is not supported. "
            f"Supported are {', '.join(ARCHITECTURES)}."
        )
    prefix = f"{architecture}."
    own_keys = {
        key.removeprefix(prefix): value
        for key, value in metadata.items()
        if key.startswith(prefix) and key.removeprefix(prefix) not in _HARMLESS_KEYS
    }
    _refuse_others(own_keys, file, prefix)
    keys = validated(_Keys, own_keys, path, prefix=prefix)
    config = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "hidden_act": "silu",
        "hidden_size": keys.embedding_length,
        "intermediate_size": keys.feed_forward_length,
        "num_hidden_layers": keys.block_count,
        "num_attention_heads": keys.n_heads,
        "num_key_value_heads": keys.n_kv_heads or keys.n_heads,
        "head_dim": keys.head_dim,
        "rms_norm_eps": _shortest(keys.norm_eps),
        "max_position_embeddings": keys.context_length,
        "rope_theta": _shortest(keys.rope_theta),
        "rope_scaling": _rope_scaling(keys, file, prefix),
        "bos_token_id": _token_id(metadata, "bos"),
        "eos_token_id": _eos_token_id(metadata),
    }
    if keys.rotary_dim and keys.rotary_dim != keys.head_dim:
        config["partial_rotary_factor"] = keys.rotary_dim / keys.head_dim
    if keys.window:
        if architecture != "llama":
            raise UnsupportedError(
                f"{file}: metadata key {prefix}attention.sliding_window is {keys.window}, and "
                f"sliding windows of {architecture} are not supported in GGUF files."
            )
        # A Llama with a sliding window is what Hugging Face calls a Mistral.
        config["architectures"], config["model_type"] = ["MistralForCausalLM"], "mistral"
        config["sliding_window"] = keys.window
    return config


def _refuse_others(keys: dict[str, Any], file: str, prefix: str) -> None:
    """Removes the keys of ``_NEUTRAL`` with neutral values, and refuses other unknown keys."""
    for key, values in _NEUTRAL.items():
        if keys.get(key) in values:
            del keys[key]
    known = {field.alias or name for name, field in _Keys.model_fields.items()}
    for key in sorted(keys.keys() - known):
        raise UnsupportedError(
            f"{file}: metadata key {shorten(prefix + key)} (here {shorten_value(keys[key])}) is "
            "not implemented, and may change what the model computes."
        )


def _rope_scaling(keys: _Keys, file: str, prefix: str) -> dict[str, Any] | None:
    if keys.scaling not in ("yarn", "longrope"):
        for name in ("attention_factor", "yarn_attention_factor"):
            if (value := getattr(keys, name)) != 1.0:
                raise UnsupportedError(
                    f"{file}: metadata key {prefix}{_Keys.model_fields[name].alias} is {value:g}, "
                    f"but with rope.scaling.type {keys.scaling!r} only 1 is supported."
                )
    factor = _shortest(keys.scaling_factor)
    attention_factor = keys.attention_factor * keys.yarn_attention_factor
    match keys.scaling:
        case "linear" if factor != 1.0:
            return {"rope_type": "linear", "factor": factor}
        case "yarn":
            scaling: dict[str, Any] = {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": keys.original_context,
            }
            scaling |= {
                key: _shortest(getattr(keys, key))
                for key in ("beta_fast", "beta_slow")
                if key in keys.model_fields_set
            }
            if attention_factor != 1.0:  # llama.cpp multiplies the paper's by those of the file
                scale = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
                scaling["attention_factor"] = attention_factor * scale
            return scaling
        case "longrope":  # whose factors are tensors
            return {
                "rope_type": "longrope",
                "original_max_position_embeddings": keys.original_context,
                "attention_factor": attention_factor,
            }
    return None


def _token_id(metadata: Mapping[str, Any], name: str) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return value if type(value) is int else None


def _eos_token_id(metadata: Mapping[str, Any]) -> int | list[int] | None:
    """Returns the tokens at the end of a text, a turn and a message: each ends an answer."""
    ids = [_token_id(metadata, end) for end in ("eos", "eot", "eom")]
    known = list(dict.fromkeys(end for end in ids if end is not None))
    return known[0] if len(known) == 1 else known or None


def _shortest(value: float) -> float:
    """Returns the shortest decimal with the same float32 value: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))
