"""From a source of weights to a decoder that can run: read, quantize, join, pack, assign.

One matrix at a time, a few rows at a time: what is held on the host besides the model is the matrix
being made and its packed form. ``benchmarks/load_memory.py`` measures it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hotloop.models import names
from hotloop.models.config import ModelConfig
from hotloop.models.decoder import Decoder, RMSNorm
from hotloop.quant import QTensor, Scheme, join_rows
from hotloop.weights.source import Source


def load_weights(
    decoder: Decoder,
    config: ModelConfig,
    source: Source,
    *,
    scheme: Scheme,
    head_scheme: Scheme,
    dtype: torch.dtype,
    device: torch.device,
    on_layer: Callable[[int, int], None] | None = None,
) -> None:
    """Assigns every weight of ``decoder``.

    Args:
        decoder: Made without weights.
        config: The shape of it.
        source: Where weights come from.
        scheme: Of the projections in blocks.
        head_scheme: Of the head; a tied embedding is the same matrix, and follows it.
        dtype: Element type of activations and unquantized weights.
        device: Where the model runs.
        on_layer: Called with (layers done, layers in all).

    Raises:
        CheckpointError: A tensor is missing, surplus, of another shape, or not finite.
        ConfigError: A matrix whose shape a scheme does not fit.
    """

    def norm(module: RMSNorm, name: str) -> None:
        weight = source.tensor(f"{name}.weight", tuple(module.weight.shape))
        module.weight = weight.to(device, dtype)

    def matrix(name: str, n: int, k: int) -> Tensor | QTensor:
        weight = source.matrix(name, (n, k), scheme)
        return weight if isinstance(weight, QTensor) else weight.to(device, dtype)

    _load_embeddings(decoder, config, source, head_scheme, dtype, device)
    norm(decoder.norm, names.NORM)
    for i, block in enumerate(decoder.layers):
        for attribute, parts in names.LINEAR_PARTS.items():
            n, k = config.linears[attribute]
            rows = dict(zip(parts, names.part_rows(config, attribute), strict=True))
            bias = None
            if config.bias[attribute]:
                full = [source.tensor(f"{names.layer(i, p)}.bias", (r,)) for p, r in rows.items()]
                bias = torch.cat(full)
            # Handed on at once: nothing is held while the next one is read.
            getattr(block, attribute).assign(
                join_rows((matrix(names.layer(i, p), r, k) for p, r in rows.items()), n),
                bias,
                dtype=dtype,
                device=device,
            )
        for attribute, part in (names.NORMS | (names.HEAD_NORMS if config.qk_norm else {})).items():
            norm(getattr(block, attribute), names.layer(i, part))
        if on_layer:
            on_layer(i + 1, config.n_layers)
    source.finish()


def _load_embeddings(
    decoder: Decoder,
    config: ModelConfig,
    source: Source,
    head_scheme: Scheme,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    shape = (config.vocab_size, config.hidden_size)
    weight = source.matrix(names.head(config), shape, head_scheme)
    decoder.head.assign(weight, dtype=dtype, device=device)
    if not config.tie_embeddings:
        table = source.tensor(f"{names.EMBEDDING}.weight", shape).to(device, dtype)
        decoder.embedding.assign(table, None, dtype)
    elif not isinstance(weight, QTensor):
        decoder.embedding.assign(decoder.head.packed[0], None, dtype)
    elif weight.bits == 8:
        # Every int8 kernel keeps [N, K] integers and [N] scales: one copy serves both.
        values, scale = decoder.head.packed
        decoder.embedding.assign(values, scale, dtype)
    else:
        decoder.embedding.assign(weight.dequantize(dtype).to(device), None, dtype)
