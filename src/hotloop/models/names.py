"""The Hugging Face names of a model's weights in a checkpoint.

The names within a layer are declared by its configuration (``models.config``).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Container, Iterator
from functools import cache

from hotloop.models.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    Matrix,
    ModelConfig,
    Norm,
    Part,
    RopeConfig,
)

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
NORM = "model.norm"
GGUF_NAMES = {"token_embd": EMBEDDING, "output_norm": NORM, "output": HEAD}
"""The names of tensors outside of layers, in GGUF files and in a checkpoint."""

_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
_UNUSED = re.compile(
    r"\.rotary_emb\.\w+|\.self_attn\.(?:\w+\.)?[kv]_scale"
    r"|_proj\.(?:input_scale|input_global_scale|activation_scale)"
)


def layer(index: int | str, part: str) -> str:
    """Returns the full name of a part of one layer, without ``.weight``."""
    return f"model.layers.{index}.{part}"


def layer_index(name: str) -> int | None:
    """Returns the layer of a tensor, by its name; None for tensors outside of layers."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def head(config: ModelConfig) -> str:
    """Returns the name of the head's weight."""
    return EMBEDDING if config.tie_embeddings else HEAD


def linear_weights(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns every weight matrix of a layer in a checkpoint.

    Returns:
        ``name -> (out, in)``, names without ``.weight``, in the order of layers.
    """
    return {
        layer(i, part.name): (part.n, matrix.k)
        for i, kind in enumerate(config.layers)
        for matrix, part in _parts(kind)
    }


def is_redundant(config: ModelConfig, name: str) -> bool:
    """Returns whether a tensor that the model does not have may be ignored.

    These may be: a tied head, which repeats the embedding; tables of rotary embedding, which are
    computed; scales of a quantized cache or of quantized activations, for other engines; and layers
    beyond the last one, which transformers ignores too.
    """
    if name == f"{HEAD}.weight":
        return config.tie_embeddings
    index = layer_index(name)
    beyond = index is not None and index >= config.n_layers
    return beyond or bool(_UNUSED.search(name))


def tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns every tensor of an unquantized checkpoint: full name to shape, in layer order."""
    width = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {f"{EMBEDDING}.weight": (config.vocab_size, width)}
    for i, kind in enumerate(config.layers):
        for matrix, part in _parts(kind):
            shapes[f"{layer(i, part.name)}.weight"] = (part.n, matrix.k)
            if matrix.bias:
                shapes[f"{layer(i, part.name)}.bias"] = (part.n,)
        shapes |= {f"{layer(i, norm.part)}.weight": (norm.n,) for norm in kind.norms}
    shapes[f"{NORM}.weight"] = (width,)
    if not config.tie_embeddings:
        shapes[f"{HEAD}.weight"] = (config.vocab_size, width)
    return shapes


@cache
def gguf_names() -> dict[str, Part | Norm]:
    """Returns parts and norms of layers by their names in GGUF files; ignore their sizes."""
    attention = AttentionConfig(
        hidden_size=2,
        n_heads=1,
        n_kv_heads=1,
        head_dim=2,
        rope=RopeConfig(),
        scale=1.0,
        norm_eps=0.0,
        qk_norm=True,
    )
    feed_forward = FeedForwardConfig(hidden_size=2, intermediate_size=2, norm_eps=0.0)
    layer = LayerConfig(attention=attention, feed_forward=feed_forward)
    parts = [part for _, part in _parts(layer)]
    return {declared.gguf: declared for declared in (*parts, *layer.norms)}


def without_absent_biases(
    config: ModelConfig, found: Container[str]
) -> tuple[ModelConfig, str | None]:
    """Removes the biases of output projections if a checkpoint has only biases of queries.

    Args:
        config: The configuration, which says that attention has biases.
        found: The names of the checkpoint's tensors.

    Returns:
        The configuration, and the name of the projection if its biases were removed.
    """
    attention = config.layers[0].attention
    (query, *_), (output,) = (matrix.parts for matrix in attention.matrices)
    has_query, has_output = (f"{layer(0, p.name)}.bias" in found for p in (query, output))
    if not attention.o_bias or not has_query or has_output:
        return config, None
    layers = tuple(
        dataclasses.replace(each, attention=dataclasses.replace(each.attention, o_bias=False))
        for each in config.layers
    )
    return dataclasses.replace(config, layers=layers), output.name


def _parts(kind: LayerConfig) -> Iterator[tuple[Matrix, Part]]:
    return ((matrix, part) for matrix in kind.matrices for part in matrix.parts)
