"""Where a decoder's weights are in a checkpoint: our modules by their Hugging Face names.

Merged projections name their parts in the order in which they are joined.
"""

from __future__ import annotations

import re

from hotloop.models.config import ModelConfig
from hotloop.parallel.plan import Shard

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
NORM = "model.norm"

LINEAR_PARTS = {
    "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}
NORMS = {"input_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
ROTATED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.q_norm", "self_attn.k_norm")
HEAD_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}

_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
_WITHOUT_USE = re.compile(r"\.rotary_emb\.\w+|\.self_attn\.(?:\w+\.)?[kv]_scale")


def layer(index: int, part: str) -> str:
    """The full name of a part of one block, without ``.weight``."""
    return f"model.layers.{index}.{part}"


def layer_index(name: str) -> int | None:
    """The block that a tensor belongs to, by its name; None for those of no block."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def part_rows(config: ModelConfig, linear: str) -> tuple[int, ...]:
    """Output features of each part of a merged projection."""
    if linear == "qkv_proj":
        kv = config.n_kv_heads * config.head_dim
        return (config.n_heads * config.head_dim, kv, kv)
    if linear == "gate_up_proj":
        return (config.intermediate_size, config.intermediate_size)
    return (config.linears[linear][0],)


def part_slices(config: ModelConfig, shard: Shard) -> dict[str, tuple[range | None, range | None]]:
    """Which rows and columns of each part of a block a rank holds; None for all.

    What takes the residual stream in is cut along its output, what gives to it along its input.
    """

    def wide(heads: range) -> range:
        return range(heads.start * config.head_dim, heads.stop * config.head_dim)

    q, kv, features = wide(shard.heads), wide(shard.kv_heads), shard.features
    return {
        "self_attn.q_proj": (q, None),
        "self_attn.k_proj": (kv, None),
        "self_attn.v_proj": (kv, None),
        "self_attn.o_proj": (None, q),
        "mlp.gate_proj": (features, None),
        "mlp.up_proj": (features, None),
        "mlp.down_proj": (None, features),
    }


def head(config: ModelConfig) -> str:
    """The name of the weight that the head multiplies with."""
    return EMBEDDING if config.tie_embeddings else HEAD


def linear_weights(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every weight matrix in a checkpoint that is quantized as a block's projection.

    Returns:
        ``name -> (out, in)``, names without ``.weight``, in the order of layers.
    """
    return {
        layer(i, part): (rows, config.linears[linear][1])
        for i in range(config.n_layers)
        for linear, parts in LINEAR_PARTS.items()
        for part, rows in zip(parts, part_rows(config, linear), strict=True)
    }


def is_redundant(config: ModelConfig, name: str) -> bool:
    """Whether a checkpoint may hold a tensor that the model does not have.

    Those are a tied head, which repeats the embedding; tables of rotary embedding, which are
    computed; scales of a quantized cache, which another engine would keep; and layers beyond the
    last one, which transformers ignores too.
    """
    if name == f"{HEAD}.weight":
        return config.tie_embeddings
    index = layer_index(name)
    beyond = index is not None and index >= config.n_layers
    return beyond or bool(_WITHOUT_USE.search(name))


def tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of an unquantized checkpoint: full name to shape, in the order of layers."""
    width = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {f"{EMBEDDING}.weight": (config.vocab_size, width)}
    for i in range(config.n_layers):
        for linear, parts in LINEAR_PARTS.items():
            for part, rows in zip(parts, part_rows(config, linear), strict=True):
                shapes[f"{layer(i, part)}.weight"] = (rows, config.linears[linear][1])
                if config.bias[linear]:
                    shapes[f"{layer(i, part)}.bias"] = (rows,)
        shapes |= {f"{layer(i, part)}.weight": (width,) for part in NORMS.values()}
        if config.qk_norm:
            shapes |= {
                f"{layer(i, part)}.weight": (config.head_dim,) for part in HEAD_NORMS.values()
            }
    shapes[f"{NORM}.weight"] = (width,)
    if not config.tie_embeddings:
        shapes[f"{HEAD}.weight"] = (config.vocab_size, width)
    return shapes
