"""Shapes of well-known models, to measure speed and memory without a checkpoint.

The figures are those of each model's published ``config.json``. A shape has no weights, no
tokenizer and no quality.
"""

from __future__ import annotations

from typing import Any

from hotloop.errors import UnknownNameError


def _llama(**keys: Any) -> dict[str, Any]:
    base = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return base | keys


_LLAMA_2 = {"vocab_size": 32000, "max_position_embeddings": 4096, "rope_theta": 10000.0}
_LLAMA_3_1 = {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": _llama(
        **_LLAMA_2,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "llama-2-13b": _llama(
        **_LLAMA_2,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
    ),
    "llama-2-70b": _llama(
        **_LLAMA_2,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
    "llama-3.1-8b": _llama(
        **_LLAMA_3_1,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "llama-3.1-70b": _llama(
        **_LLAMA_3_1,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}
"""``name -> config.json``."""


def shape(name: str) -> dict[str, Any]:
    """Returns the ``config.json`` of a built-in shape; raises UnknownNameError otherwise."""
    if name not in SHAPES:
        raise UnknownNameError("model shape", name, SHAPES)
    return SHAPES[name]
