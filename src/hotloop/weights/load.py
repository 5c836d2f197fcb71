"""Loads a decoder from a source of weights: reads, quantizes, slices, joins, packs and assigns.

It loads the weights that the layers' configurations declare. One of several ranks loads its slices,
and the whole embedding: looking rows up reads few bytes, and a tied head is a slice of it.

One matrix at a time, a few rows at a time: what is held on the host besides the model is the matrix
being made and its packed form. ``benchmarks/load_memory.py`` measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hotloop.models import names
from hotloop.models.config import LayerConfig, Matrix, ModelConfig, Part
from hotloop.models.decoder import Decoder
from hotloop.models.rope import head_order
from hotloop.parallel.plan import LayerShard, Shard
from hotloop.quant import QTensor, Scheme, cut
from hotloop.quant.qtensor import join_alike
from hotloop.weights.source import Source


def load_weights(
    decoder: Decoder,
    config: ModelConfig,
    source: Source,
    *,
    shard: Shard,
    adds_biases: bool,
    schemes: Mapping[str, Scheme],
    dtype: torch.dtype,
    device: torch.device,
    fused: bool = False,
    on_layer: Callable[[int, int], None] | None = None,
) -> None:
    """Assigns every weight of ``decoder``.

    Args:
        decoder: The decoder without weights, in the shape of the shard.
        config: The shape of the whole model.
        source: The source of weights.
        shard: The part of it that this rank holds.
        adds_biases: Whether this rank adds the biases of row-parallel projections, whose results
            are summed over ranks.
        schemes: The scheme of every matrix by its name in the checkpoint.
        dtype: Element type of activations and unquantized weights.
        device: The device of the model.
        fused: It runs the fused step.
        on_layer: Called with (layers done, layers in all).

    Raises:
        CheckpointError: A tensor is missing, surplus, of another shape, or not finite.
        ConfigError: A matrix whose shape a scheme does not fit.
    """
    loader = _Loader(source, schemes, adds_biases, dtype, device, fused)
    loader.load_embeddings(decoder, config, shard.vocabulary)
    decoder.norm.weight = source.tensor(f"{names.NORM}.weight", (config.hidden_size,)).to(
        device, dtype
    )
    for i, (block, layer, held) in enumerate(
        zip(decoder.layers, config.layers, shard.layers, strict=True)
    ):
        loader.load_layer(block, i, layer, held)
        if on_layer:
            on_layer(i + 1, config.n_layers)
    source.finish()


@dataclass(frozen=True)
class _Loader:
    """Reads from a source and assigns; see ``load_weights`` for its attributes."""

    source: Source
    schemes: Mapping[str, Scheme]
    adds_biases: bool
    dtype: torch.dtype
    device: torch.device
    fused: bool

    def load_layer(
        self, block: torch.nn.Module, i: int, layer: LayerConfig, held: LayerShard
    ) -> None:
        """Assigns what the configuration of layer ``i`` declares."""
        order = head_order(layer.attention.head_dim, layer.attention.rope)

        def ordered(rows: Tensor, rotated: bool) -> Tensor:
            """Orders rows of heads as our rope pairs them."""
            if order is None or not rotated:
                return rows
            return rows.unflatten(0, (-1, len(order)))[:, order.to(rows.device)].flatten(0, 1)

        def part_of(matrix: Matrix, part: Part) -> Tensor | QTensor:
            name, (rows, columns) = names.layer(i, part.name), matrix.slices(part, held)
            weight = self.source.matrix(
                name, (part.n, matrix.k), self.schemes[name], rows=rows, columns=columns
            )
            if isinstance(weight, QTensor):
                return weight.map_rows(lambda tensor: ordered(tensor, part.rotated))
            return ordered(weight, part.rotated).to(self.device, self.dtype)

        def bias(matrix: Matrix) -> Tensor | None:
            if not matrix.bias:
                return None
            biases = []
            for part in matrix.parts:
                name, (rows, _) = names.layer(i, part.name), matrix.slices(part, held)
                bias = self.source.tensor(f"{name}.bias", (part.n,), rows=rows)
                biases.append(ordered(bias, part.rotated))
            return torch.cat(biases) if self.adds_biases or not matrix.summed else None

        for attribute, declared in layer.modules.items():
            module = getattr(block, attribute)
            for matrix in declared.matrices:
                linear = getattr(module, matrix.name)
                # Handed on at once: nothing is held while the next one is read.
                linear.assign(
                    join_alike((part_of(matrix, part) for part in matrix.parts), linear.n),
                    bias(matrix),
                    dtype=self.dtype,
                    device=self.device,
                    fused=self.fused,
                )
            for norm in declared.norms:
                weight = self.source.tensor(f"{names.layer(i, norm.part)}.weight", (norm.n,))
                weight = ordered(weight, norm.rotated).to(self.device, self.dtype)
                getattr(module, norm.name).weight = weight

    def load_embeddings(self, decoder: Decoder, config: ModelConfig, rows: range) -> None:
        """Assigns the embedding, and these rows of the head."""
        shape, scheme = (config.vocab_size, config.hidden_size), self.schemes[names.head(config)]
        dtype, device = self.dtype, self.device
        if not config.tie_embeddings:
            head = self.source.matrix(names.HEAD, shape, scheme, rows=rows)
            decoder.head.assign(head, dtype=dtype, device=device, fused=self.fused)
            table = self.source.tensor(f"{names.EMBEDDING}.weight", shape).to(device, dtype)
            decoder.embedding.assign(table, None, dtype)
            return
        weight = self.source.matrix(names.EMBEDDING, shape, scheme)
        if not isinstance(weight, QTensor):
            weight = weight.to(device, dtype)
            decoder.embedding.assign(weight, None, dtype)
            head = weight[rows.start : rows.stop]
        elif weight.kind == "int8" and weight.format.is_per_channel(config.hidden_size):
            # A kernel that keeps rows as they are shares them: one copy serves both.
            weight = weight.to(device)
            decoder.embedding.assign(weight.values, weight.scale.view(-1), dtype)
            head = weight.rows(rows.start, rows.stop)
        else:
            decoder.embedding.assign(weight.dequantize(dtype).to(device), None, dtype)
            head = cut(weight, slice(rows.start, rows.stop), None)
        decoder.head.assign(head, dtype=dtype, device=device, fused=self.fused)
