"""Model families: how each one's ``config.json`` configures the decoder.

Adding one is a module here and a line in ``FAMILIES``; the parity test against Hugging Face
transformers is parametrized over the registry, and uses the family's own tiny configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hotloop.errors import ConfigError, UnsupportedError
from hotloop.models.config import ModelConfig, integer, number, refuse_unless
from hotloop.registry import resolve

FAMILIES = {
    "LlamaForCausalLM": "hotloop.models.families.llama:FAMILY",
    "MistralForCausalLM": "hotloop.models.families.mistral:FAMILY",
    "Qwen2ForCausalLM": "hotloop.models.families.qwen2:FAMILY",
    "Qwen3ForCausalLM": "hotloop.models.families.qwen3:FAMILY",
}
"""Every model family, by the architecture its ``config.json`` names."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A group of models that one reader of ``config.json`` serves.

    Attributes:
        name: Short name, for records.
        read: Makes a ModelConfig of the keys of ``config.json``.
        tiny: Keys of a ``config.json`` for a tiny model with every switch of the family in use;
            the parity test builds both implementations from it.
    """

    name: str
    read: Callable[[Mapping[str, Any]], ModelConfig]
    tiny: Mapping[str, Any]


# Keys that other models use to change the arithmetic; none of them is implemented.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "final_logit_softcapping": (None,),
    "hidden_act": ("silu", "swish"),
    "is_causal": (None, True),
    "logits_scaling": (None, 1, 1.0),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "position_embedding_type": (None, "rope"),
    "quantization_config": (None,),
    "residual_multiplier": (None, 1, 1.0),
}


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a ``config.json``.

    Raises:
        UnknownNameError: An architecture that is not implemented; the nearest is named.
        UnsupportedError: A key that would change the arithmetic and is not implemented.
        ConfigError: A key that the family needs is missing or wrong.
    """
    return family_of(config).read(config)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that serves a ``config.json``."""
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ConfigError(f"config.json must name one architecture, not {architectures!r:.80}.")
    family = resolve("model architecture", FAMILIES, str(architectures[0]))
    refuse_unless(config, _REFUSED)
    if kinds := set(config.get("layer_types") or ()) - {"full_attention"}:
        raise UnsupportedError(f"config.json has layers of type {min(kinds)!r}: not implemented.")
    return family


def common_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ModelConfig fields that every family spells alike."""
    hidden, n_heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    return {
        "vocab_size": integer(config, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": integer(config, "intermediate_size"),
        "n_layers": integer(config, "num_hidden_layers"),
        "n_heads": n_heads,
        "n_kv_heads": integer(config, "num_key_value_heads", n_heads),
        "head_dim": integer(config, "head_dim", hidden // n_heads),
        "max_position": integer(config, "max_position_embeddings", 2048),
        "norm_eps": number(config, "rms_norm_eps"),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }
