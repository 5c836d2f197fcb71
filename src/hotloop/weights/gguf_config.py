"""From the metadata of a GGUF file to the keys of a Hugging Face ``config.json``.

Defaults are llama.cpp's. Every key of the file's architecture is either translated here, known to
say nothing of the arithmetic, or refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hotloop.errors import CheckpointError, UnsupportedError

ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""GGUF architectures, and what Hugging Face calls them."""

# Keys that say nothing of the arithmetic, or what the tensors say themselves.
_IDLE_KEYS = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}


class _Keys:
    """The architecture's own keys; each is taken once, and what is left is refused."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self.path = path
        self.architecture = str(metadata.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise UnsupportedError(
                f"{path}: GGUF architecture {self.architecture!r} is not supported. "
                f"Supported are {', '.join(ARCHITECTURES)}."
            )
        prefix = f"{self.architecture}."
        self.left = {
            key.removeprefix(prefix): value
            for key, value in metadata.items()
            if key.startswith(prefix)
        }

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of a key; without a default it must be there."""
        value = self.left.pop(key, default)
        if value is None:
            raise CheckpointError(
                self.path, f"has no metadata key {self.architecture}.{key}, which it needs"
            )
        if not isinstance(value, kind):
            raise UnsupportedError(
                f"{self.path}: metadata key {self.architecture}.{key} is {value!r:.80}; only one "
                f"value of type {kind.__name__}, for all layers, is supported."
            )
        return value

    def refuse_the_rest(self) -> None:
        for key in sorted(self.left.keys() - _IDLE_KEYS):
            raise UnsupportedError(
                f"{self.path}: metadata key {self.architecture}.{key} (here "
                f"{self.left[key]!r:.80}) is not implemented, and may change what the model "
                "computes."
            )


def config_from_metadata(metadata: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The keys of ``config.json`` that the metadata tells; the tensors tell the others.

    Raises:
        CheckpointError: A key that every model of its architecture has is missing.
        UnsupportedError: An architecture, a key or a value that is not implemented.
    """
    keys = _Keys(metadata, path)
    hidden_size = keys.take("embedding_length", int)
    n_heads = keys.take("attention.head_count", int)
    head_dim = keys.take("attention.key_length", int, hidden_size // max(n_heads, 1))
    config = {
        "architectures": [ARCHITECTURES[keys.architecture]],
        "model_type": keys.architecture,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": keys.take("feed_forward_length", int),
        "num_hidden_layers": keys.take("block_count", int),
        "num_attention_heads": n_heads,
        "num_key_value_heads": keys.take("attention.head_count_kv", int, n_heads),
        "head_dim": head_dim,
        "rms_norm_eps": _shortest(keys.take("attention.layer_norm_rms_epsilon", float)),
        "max_position_embeddings": keys.take("context_length", int),
        "rope_theta": _shortest(keys.take("rope.freq_base", float, 10000.0)),
        "rope_scaling": _rope_scaling(keys),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos_token_id(metadata),
    }
    for key in ("attention.value_length", "rope.dimension_count"):
        if (width := keys.take(key, int, head_dim)) != head_dim:
            raise UnsupportedError(
                f"{path}: {keys.architecture}.{key} is {width}, and only the width of a head, "
                f"{head_dim}, is supported."
            )
    if keys.architecture == "llama" and "attention.sliding_window" in keys.left:
        # A Llama with a sliding window is what Hugging Face calls a Mistral.
        config["architectures"], config["model_type"] = ["MistralForCausalLM"], "mistral"
        config["sliding_window"] = keys.take("attention.sliding_window", int)
    keys.refuse_the_rest()
    return config


def _rope_scaling(keys: _Keys) -> dict[str, Any] | None:
    kind = keys.take("rope.scaling.type", str, "linear")
    factor = keys.take("rope.scaling.factor", float, 1.0) or 1.0
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UnsupportedError(
            f"{keys.path}: {keys.architecture}.rope.scaling.type {kind!r} is not supported. "
            "Supported are none, linear and yarn."
        )
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.take("rope.scaling.original_context_length", int),
    }
    for key in ("beta_fast", "beta_slow"):
        if f"rope.scaling.yarn_{key}" in keys.left:
            scaling[key] = keys.take(f"rope.scaling.yarn_{key}", float)
    return scaling


def _eos_token_id(metadata: Mapping[str, Any]) -> int | list[int] | None:
    """The ends of a text, of a turn and of a message: each of them ends an answer."""
    ids = [metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")]
    known = list(dict.fromkeys(end for end in ids if end is not None))
    return known[0] if len(known) == 1 else known or None


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))
