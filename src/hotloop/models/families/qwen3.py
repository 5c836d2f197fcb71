"""Qwen3, the dense ones: queries and keys are normalized per head, and head_dim is explicit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hotloop.models.config import ModelConfig, read_rope, refuse_unless
from hotloop.models.families import Family, common_fields


def read(config: Mapping[str, Any]) -> ModelConfig:
    """``attention_bias`` gives all four projections of attention a bias."""
    refuse_unless(config, {"use_sliding_window": (None, False)})
    bias = bool(config.get("attention_bias", False))
    return ModelConfig(
        **common_fields({"head_dim": 128} | dict(config)),
        family="qwen3",
        rope=read_rope(config),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
    )


FAMILY = Family(
    name="qwen3",
    read=read,
    tiny={
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
)
