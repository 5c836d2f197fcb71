"""Llama 2, 3, 3.1 and 3.2, and what is built like them: SmolLM2, Asclepius, TinyLlama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hotloop.models.config import ModelConfig, read_rope
from hotloop.models.families import Family, common_fields


def read(config: Mapping[str, Any]) -> ModelConfig:
    """``attention_bias`` gives all four projections of attention a bias."""
    bias = bool(config.get("attention_bias", False))
    return ModelConfig(
        **common_fields(config),
        family="llama",
        rope=read_rope(config),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


FAMILY = Family(
    name="llama",
    read=read,
    tiny={
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
)
