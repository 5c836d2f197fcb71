"""Qwen3, dense models: queries and keys are normalized per head, and head_dim is explicit."""

from __future__ import annotations

from hotloop.checked import Count
from hotloop.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig
from hotloop.models.families import (
    Family,
    attention_fields,
    common_fields,
    feed_forward_fields,
    windowed_layers,
)
from hotloop.models.families.qwen2 import QwenKeys


class Qwen3Keys(QwenKeys):
    """The keys of Qwen3. ``attention_bias`` gives all four projections of attention a bias."""

    head_dim: Count | None = 128
    attention_bias: bool = False


def read(keys: Qwen3Keys) -> ModelConfig:
    """Makes a ModelConfig."""
    layer = LayerConfig(
        attention=AttentionConfig(
            **attention_fields(keys),
            qkv_bias=keys.attention_bias,
            o_bias=keys.attention_bias,
            qk_norm=True,
        ),
        feed_forward=FeedForwardConfig(**feed_forward_fields(keys)),
    )
    return ModelConfig(**common_fields(keys), family="qwen3", layers=windowed_layers(keys, layer))


FAMILY = Family(
    name="qwen3",
    keys=Qwen3Keys,
    read=read,
    neutral={"mlp_bias": (False,)},
    nullable=("sliding_window",),
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
