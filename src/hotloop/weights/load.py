"""Loads a decoder from a source of weights: reads, quantizes, slices, joins, packs and assigns.

It loads the weights that the layers' configurations declare. One of several ranks loads its slices,
and the whole embedding: looking rows up reads few bytes, and a tied head is a slice of it.

Weights are streamed: a few rows of a matrix are read, decoded or quantized, and packed, while the
next are being read. What is held besides the model are these rows, those that were read ahead, and
parts of a projection that can only be packed together. ``benchmarks/load_memory.py`` measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from hotloop.kernels.linear import DENSE, KernelFormat, LinearSpec, choose_linear
from hotloop.models import names
from hotloop.models.config import Matrix, ModelConfig, Part
from hotloop.models.decoder import Decoder
from hotloop.models.linear import Linear
from hotloop.models.rope import head_order
from hotloop.parallel.plan import Shard
from hotloop.quant import QTensor, Scheme, cut, join_alike, join_rows
from hotloop.quant.rows import RowStream
from hotloop.weights.source import Request, Source
from hotloop.weights.tensor_file import row_chunks

OnLayer = Callable[[int, int], None]
"""Called with (layers done, layers in all)."""


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
    on_layer: OnLayer | None = None,
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
    loader = _Loader(config, shard, source, schemes, adds_biases, dtype, device, fused)
    with source.read_ahead(loader.requests):
        loader.load_embeddings(decoder)
        decoder.norm.weight = loader.tensor(f"{names.NORM}.weight", config.hidden_size)
        for i, block in enumerate(decoder.layers):
            loader.load_layer(block, i)
            if on_layer:
                on_layer(i + 1, config.n_layers)
    source.finish()


@dataclass(frozen=True)
class _Loader:
    """Reads from a source and assigns; see ``load_weights`` for its attributes."""

    config: ModelConfig
    shard: Shard
    source: Source
    schemes: Mapping[str, Scheme]
    adds_biases: bool
    dtype: torch.dtype
    device: torch.device
    fused: bool

    @property
    def requests(self) -> list[Request]:
        """The matrices that are read, in order."""
        layers = range(self.config.n_layers)
        return [self._head_request] + [
            self._request(i, matrix, part)
            for i in layers
            for matrix in self.config.layers[i].matrices
            for part in matrix.parts
        ]

    @property
    def _head_request(self) -> Request:
        name, tied = names.head(self.config), self.config.tie_embeddings
        return Request(
            name=name,
            shape=(self.config.vocab_size, self.config.hidden_size),
            scheme=self.schemes[name],
            rows=None if tied else self.shard.vocabulary,
        )

    def _request(self, i: int, matrix: Matrix, part: Part) -> Request:
        name = names.layer(i, part.name)
        rows, columns = matrix.slices(part, self.shard.layers[i])
        return Request(
            name=name,
            shape=(part.n, matrix.k),
            scheme=self.schemes[name],
            rows=rows,
            columns=columns,
        )

    def tensor(self, name: str, n: int, rows: range | None = None) -> Tensor:
        """Reads a vector."""
        return self.source.tensor(name, (n,), rows=rows).to(self.device, self.dtype)

    def load_layer(self, block: torch.nn.Module, i: int) -> None:
        """Assigns what the configuration of layer ``i`` declares."""
        layer, held = self.config.layers[i], self.shard.layers[i]
        order = head_order(layer.attention.head_dim, layer.attention.rope)

        def ordered(rows: Tensor) -> Tensor:
            """Orders rows of whole heads as our rope pairs them."""
            if order is None:
                return rows
            return rows.unflatten(0, (-1, len(order)))[:, order.to(rows.device)].flatten(0, 1)

        def stream(matrix: Matrix, part: Part) -> RowStream:
            request = self._request(i, matrix, part)
            rows = RowStream(
                map(self._typed, self.source.pieces(request)), request.n, request.format
            )
            if order is None or not part.rotated:
                return rows
            heads = (
                chunk.map_rows(ordered) if isinstance(chunk, QTensor) else ordered(chunk)
                for chunk in rows.chunks(len(order))
            )
            return RowStream(heads, request.n, request.format)

        def bias(matrix: Matrix) -> Tensor | None:
            if not matrix.bias:
                return None
            biases = []
            for part in matrix.parts:
                name, (rows, _) = names.layer(i, part.name), matrix.slices(part, held)
                bias = self.tensor(f"{name}.bias", part.n, rows)
                biases.append(ordered(bias) if part.rotated else bias)
            return torch.cat(biases) if self.adds_biases or not matrix.summed else None

        for attribute, declared in layer.modules.items():
            module = getattr(block, attribute)
            for matrix in declared.matrices:
                linear = getattr(module, matrix.name)
                parts = (stream(matrix, part) for part in matrix.parts)
                self._assign(linear, list(parts), bias(matrix))
            for norm in declared.norms:
                weight = self.tensor(f"{names.layer(i, norm.part)}.weight", norm.n)
                getattr(module, norm.name).weight = ordered(weight) if norm.rotated else weight

    def _assign(self, linear: Linear, parts: list[RowStream], bias: Tensor | None) -> None:
        """Packs the parts of a projection."""
        weight: Sequence[Tensor | QTensor | RowStream]
        alike = [list(group) for _, group in groupby(parts, key=lambda part: part.format)]
        # Rows tell whether permutations are the same, and pairs are packed together: these are
        # joined first.
        paired = linear.paired and self.fused and len(alike) == 1
        if paired or any(part.format.permuted for part in parts):
            weight = join_alike((part.take(part.n) for part in parts), linear.n)
        else:
            weight = [RowStream.chain(group) for group in alike]
        linear.assign(weight, bias, dtype=self.dtype, device=self.device, fused=self.fused)

    def _typed(self, rows: Tensor | QTensor) -> Tensor | QTensor:
        """Converts floating-point rows to the model's type, on its device."""
        return rows if isinstance(rows, QTensor) else rows.to(self.device, self.dtype)

    def load_embeddings(self, decoder: Decoder) -> None:
        """Assigns the embedding, and this rank's rows of the head."""
        config, rows, dtype = self.config, self.shard.vocabulary, self.dtype
        request = self._head_request
        pieces = map(self._typed, self.source.pieces(request))
        head: Tensor | QTensor | RowStream
        if not config.tie_embeddings:
            head = RowStream(pieces, request.n, request.format)
            self._assign(decoder.head, [head], None)
            self._embed(decoder, self._table())
            return
        spec = self._spec(request.format)
        is_int8 = request.format.kind == "int8" and request.format.is_per_channel(spec.k)
        kernel, _ = choose_linear(spec)
        if request.format == DENSE or is_int8:
            # A kernel that keeps rows as they are shares them: one copy serves both.
            weight = join_rows(pieces, request.n).to(self.device)
            self._embed(decoder, weight)
            if isinstance(weight, QTensor):
                head = weight.rows(rows.start, rows.stop)
            else:
                head = weight[rows.start : rows.stop]
        elif kernel.embeds and len(rows) == spec.n:
            self._assign(decoder.head, [RowStream(pieces, request.n, request.format)], None)
            decoder.embedding.assign(spec, decoder.head.packed)
            return
        else:
            table = torch.empty(request.shape, dtype=dtype, device=self.device)
            head = RowStream(_dequantized_into(table, pieces, rows), len(rows), request.format)
            self._embed(decoder, table)
        decoder.head.assign([head], dtype=dtype, device=self.device, fused=self.fused)

    def _spec(self, form: KernelFormat, *, fused: bool | None = None) -> LinearSpec:
        """Returns the ``LinearSpec`` of a matrix of the whole vocabulary."""
        return LinearSpec(
            format=form,
            n=self.config.vocab_size,
            k=self.config.hidden_size,
            dtype=self.dtype,
            device=self.device.type,
            fused=self.fused if fused is None else fused,
        )

    def _embed(self, decoder: Decoder, weight: Tensor | QTensor) -> None:
        """Assigns an embedding that is dense, or int8 with a scale per row."""
        form = weight.format if isinstance(weight, QTensor) else DENSE
        spec = self._spec(form, fused=False)
        kernel, _ = choose_linear(spec)
        decoder.embedding.assign(spec, kernel.pack(weight))

    def _table(self) -> Tensor:
        """Reads the embedding of a model whose head is another matrix, a few rows at a time."""
        name = f"{names.EMBEDDING}.weight"
        n, k = self.config.vocab_size, self.config.hidden_size
        table = torch.empty(n, k, dtype=self.dtype, device=self.device)
        for rows in row_chunks(range(n), k * self.dtype.itemsize):
            table[rows.start : rows.stop] = self.source.tensor(name, (n, k), rows=rows)
        return table


def _dequantized_into(
    table: Tensor, pieces: Iterable[Tensor | QTensor], kept: range
) -> Iterator[QTensor]:
    """Fills a table with the rows of a weight, and returns those within ``kept``."""
    first = 0
    for piece in pieces:
        assert isinstance(piece, QTensor), "a quantized weight"
        last = first + piece.shape[0]
        table[first:last] = piece.dequantize(table.dtype)
        start, stop = max(kept.start, first), min(kept.stop, last)
        if start < stop:
            kept_rows = cut(piece, slice(start - first, stop - first), None)
            assert isinstance(kept_rows, QTensor), "a quantized weight"
            yield kept_rows
        first = last
