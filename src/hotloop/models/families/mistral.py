"""Mistral: the architecture of Llama; v0.1 has sliding-window attention."""

from __future__ import annotations

from hotloop.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig
from hotloop.models.families import (
    Family,
    attention_fields,
    common_fields,
    feed_forward_fields,
    windowed_layers,
)
from hotloop.models.keys import WindowKeys


def read(keys: WindowKeys) -> ModelConfig:
    """Makes a ModelConfig. A missing window is 4096; later versions set it to null."""
    layer = LayerConfig(
        attention=AttentionConfig(**attention_fields(keys)),
        feed_forward=FeedForwardConfig(**feed_forward_fields(keys)),
    )
    return ModelConfig(**common_fields(keys), family="mistral", layers=windowed_layers(keys, layer))


FAMILY = Family(
    name="mistral",
    keys=WindowKeys,
    read=read,
    neutral={"attention_bias": (False,), "mlp_bias": (False,)},
    nullable=("sliding_window",),
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
