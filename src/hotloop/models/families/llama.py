"""Llama 2, 3, 3.1 and 3.2, and models built like them: SmolLM2, Asclepius, TinyLlama."""

from __future__ import annotations

from hotloop.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig
from hotloop.models.families import Family, attention_fields, common_fields, feed_forward_fields
from hotloop.models.keys import ModelKeys


class LlamaKeys(ModelKeys):
    """The keys of Llama. ``attention_bias`` gives all four projections of attention a bias."""

    attention_bias: bool = False
    mlp_bias: bool = False


def read(keys: LlamaKeys) -> ModelConfig:
    """Makes a ModelConfig."""
    layer = LayerConfig(
        attention=AttentionConfig(
            **attention_fields(keys), qkv_bias=keys.attention_bias, o_bias=keys.attention_bias
        ),
        feed_forward=FeedForwardConfig(**feed_forward_fields(keys), bias=keys.mlp_bias),
    )
    return ModelConfig(
        **common_fields(keys), family="llama", layers=(layer,) * keys.num_hidden_layers
    )


FAMILY = Family(
    name="llama",
    keys=LlamaKeys,
    read=read,
    neutral={"use_sliding_window": (False,)},
    harmless=("layer_types", "max_window_layers", "sliding_window"),
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
