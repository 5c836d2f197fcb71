"""Mistral: Llama with, in v0.1, attention that reaches back a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hotloop.models.config import ModelConfig, integer, read_rope
from hotloop.models.families import Family, common_fields


def read(config: Mapping[str, Any]) -> ModelConfig:
    """``sliding_window`` is honoured: 4096 where it is left out; later versions set it to null."""
    config = {"sliding_window": 4096} | dict(config)
    window = config["sliding_window"]
    return ModelConfig(
        **common_fields(config),
        family="mistral",
        rope=read_rope(config),
        sliding_window=None if window is None else integer(config, "sliding_window"),
    )


FAMILY = Family(
    name="mistral",
    read=read,
    tiny={
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": 7,
        "tie_word_embeddings": False,
    },
)
