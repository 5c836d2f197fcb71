"""Qwen2 and Qwen2.5: Llama with biases on the query, key and value projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hotloop.models.config import ModelConfig, read_rope, refuse_unless
from hotloop.models.families import Family, common_fields


def read(config: Mapping[str, Any]) -> ModelConfig:
    """Sliding windows in some layers and not in others are refused; checkpoints leave them off."""
    refuse_unless(config, {"use_sliding_window": (None, False)})
    return ModelConfig(
        **common_fields(config), family="qwen2", rope=read_rope(config), qkv_bias=True
    )


FAMILY = Family(
    name="qwen2",
    read=read,
    tiny={
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
)
