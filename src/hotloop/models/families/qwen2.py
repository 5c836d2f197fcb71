"""Qwen2 and Qwen2.5: Llama with biases on the query, key and value projections."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hotloop.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig
from hotloop.models.families import (
    Family,
    attention_fields,
    common_fields,
    feed_forward_fields,
    windowed_layers,
)
from hotloop.models.keys import WindowKeys


class QwenKeys(WindowKeys):
    """The keys of Qwen2 and Qwen3.

    ``use_sliding_window`` gives the layers from ``max_window_layers`` on a window. A missing window
    is 4096; null means no window.
    """

    use_sliding_window: bool = False
    max_window_layers: Annotated[int, Field(ge=0, le=10_000)] = 28

    def windowed(self) -> tuple[bool, ...]:
        """Returns whether each layer has a window."""
        if not self.use_sliding_window:
            return (False,) * self.num_hidden_layers
        if self.layer_types is not None:
            return super().windowed()
        first = self.num_hidden_layers if self.sliding_window is None else self.max_window_layers
        return tuple(i >= first for i in range(self.num_hidden_layers))


def read(keys: QwenKeys) -> ModelConfig:
    """Makes a ModelConfig."""
    layer = LayerConfig(
        attention=AttentionConfig(**attention_fields(keys), qkv_bias=True),
        feed_forward=FeedForwardConfig(**feed_forward_fields(keys)),
    )
    return ModelConfig(**common_fields(keys), family="qwen2", layers=windowed_layers(keys, layer))


FAMILY = Family(
    name="qwen2",
    keys=QwenKeys,
    read=read,
    neutral={"mlp_bias": (False,)},
    harmless=("attention_bias",),
    nullable=("sliding_window",),
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
