"""From a source of weights to a decoder that can run: read, quantize, slice, join, pack, assign.

One of several ranks loads its slices, and the whole embedding: looking rows up reads few bytes, and
a tied head is a slice of it.

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
from hotloop.models.rope import head_order
from hotloop.parallel.plan import Shard
from hotloop.quant import QTensor, Scheme, cut, join_rows
from hotloop.weights.source import Source


def load_weights(
    decoder: Decoder,
    config: ModelConfig,
    source: Source,
    *,
    shard: Shard,
    adds_biases: bool,
    scheme: Scheme,
    head_scheme: Scheme,
    dtype: torch.dtype,
    device: torch.device,
    fused: bool = False,
    on_layer: Callable[[int, int], None] | None = None,
) -> None:
    """Assigns every weight of ``decoder``.

    Args:
        decoder: Made without weights, in the shape of the shard.
        config: The shape of the whole model.
        source: Where weights come from.
        shard: What of it this rank holds.
        adds_biases: Whether biases of what ranks sum up are this rank's to add.
        scheme: Of the projections in blocks.
        head_scheme: Of the head; a tied embedding is the same matrix, and follows it.
        dtype: Element type of activations and unquantized weights.
        device: Where the model runs.
        fused: It runs the fused step.
        on_layer: Called with (layers done, layers in all).

    Raises:
        CheckpointError: A tensor is missing, surplus, of another shape, or not finite.
        ConfigError: A matrix whose shape a scheme does not fit.
    """
    order = head_order(config.head_dim, config.rope)

    def ordered(rows: Tensor, part: str) -> Tensor:
        """Rows of heads as our rotary embedding pairs them."""
        if order is None or part not in names.ROTATED:
            return rows
        return rows.unflatten(0, (-1, len(order)))[:, order.to(rows.device)].flatten(0, 1)

    def norm(module: RMSNorm, part: str, prefix: str) -> None:
        weight = source.tensor(f"{prefix}.weight", tuple(module.weight.shape))
        module.weight = ordered(weight, part).to(device, dtype)

    slices = names.part_slices(config, shard)

    def matrix(i: int, part: str, n: int, k: int) -> Tensor | QTensor:
        rows, columns = slices[part]
        name = names.layer(i, part)
        weight = source.matrix(name, (n, k), scheme, rows=rows, columns=columns)
        if isinstance(weight, QTensor):
            return weight.map(lambda tensor: ordered(tensor, part))
        return ordered(weight, part).to(device, dtype)

    def bias(i: int, parts: dict[str, int]) -> Tensor | None:
        full = [
            ordered(source.tensor(f"{names.layer(i, part)}.bias", (n,), rows=slices[part][0]), part)
            for part, n in parts.items()
        ]
        summed = any(slices[part][1] is not None for part in parts)
        return torch.cat(full) if adds_biases or not summed else None

    _load_embeddings(decoder, config, source, shard.vocabulary, head_scheme, dtype, device, fused)
    norm(decoder.norm, names.NORM, names.NORM)
    for i, block in enumerate(decoder.layers):
        for attribute, parts in names.LINEAR_PARTS.items():
            linear, k = getattr(block, attribute), config.linears[attribute][1]
            rows = dict(zip(parts, names.part_rows(config, attribute), strict=True))
            # Handed on at once: nothing is held while the next one is read.
            linear.assign(
                join_rows((matrix(i, part, n, k) for part, n in rows.items()), linear.n),
                bias(i, rows) if config.bias[attribute] else None,
                dtype=dtype,
                device=device,
                fused=fused,
            )
        for attribute, part in (names.NORMS | (names.HEAD_NORMS if config.qk_norm else {})).items():
            norm(getattr(block, attribute), part, names.layer(i, part))
        if on_layer:
            on_layer(i + 1, config.n_layers)
    source.finish()


def _load_embeddings(
    decoder: Decoder,
    config: ModelConfig,
    source: Source,
    rows: range,
    head_scheme: Scheme,
    dtype: torch.dtype,
    device: torch.device,
    fused: bool,
) -> None:
    shape = (config.vocab_size, config.hidden_size)
    if not config.tie_embeddings:
        head = source.matrix(names.HEAD, shape, head_scheme, rows=rows)
        decoder.head.assign(head, dtype=dtype, device=device, fused=fused)
        table = source.tensor(f"{names.EMBEDDING}.weight", shape).to(device, dtype)
        decoder.embedding.assign(table, None, dtype)
        return
    weight = source.matrix(names.EMBEDDING, shape, head_scheme)
    if not isinstance(weight, QTensor):
        weight = weight.to(device, dtype)
        decoder.embedding.assign(weight, None, dtype)
        head = weight[rows.start : rows.stop]
    elif weight.kind == "int8":
        # A kernel that keeps rows as they are shares them: one copy serves both.
        weight = weight.to(device)
        decoder.embedding.assign(weight.values, weight.scale.view(-1), dtype)
        head = weight.rows(rows.start, rows.stop)
    else:
        decoder.embedding.assign(weight.dequantize(dtype).to(device), None, dtype)
        head = cut(weight, slice(rows.start, rows.stop), None)
    decoder.head.assign(head, dtype=dtype, device=device, fused=fused)
