"""Loads a decoder from a source of weights: reads, quantizes, slices, joins, packs and assigns.

It loads the weights that the layers' configurations declare. With several ranks, each loads its
slices and the whole embedding: looking up rows reads few bytes, and a tied head is a slice of the
embedding.

Weights are streamed: a few rows of a matrix are read, decoded or quantized, and packed, while the
next rows are being read. Besides the model, only these rows, rows that were read ahead, and parts
of a projection that must be packed together are in memory. ``benchmarks/load_memory.py`` measures
the peak.

A drafter that is the model under another scheme (``SelfDraft``) is loaded in the same pass: the
rows of a matrix are read once, and the model's quantized rows are quantized again for the drafter,
which should predict the quantized model. Packing alternates between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor

from hotloop.kernels.cpu.huge_pages import in_huge_pages
from hotloop.kernels.linear import DENSE, KernelFormat, LinearSpec, choose_linear
from hotloop.kernels.pack import rows_at_once
from hotloop.models import names
from hotloop.models.config import Matrix, ModelConfig, Part
from hotloop.models.decoder import Block, Decoder
from hotloop.models.linear import Linear
from hotloop.models.rope import head_order
from hotloop.parallel.plan import Shard
from hotloop.quant import QTensor, ReduceMax, Scheme, join_alike, slice_weight
from hotloop.quant.none import NoScheme
from hotloop.quant.rows import RowStream, interleave, unzip
from hotloop.weights.source import Importance, Request, Source, quantize_rows

OnLayer = Callable[[int, int], None]
"""Called with (layers done, layers in all)."""


@dataclass(frozen=True, kw_only=True)
class SelfDraft:
    """A drafter that is the model under another scheme, to load beside the model.

    Attributes:
        decoder: Its decoder, without weights. Biases are not loaded: it shares those of the model.
        schemes: The scheme of every matrix of which it has a copy, by name: all projections, and
            the head if it does not share the model's.
        reduce_max: See ``CheckpointSource``.
        importance: See ``CheckpointSource``.
    """

    decoder: Decoder
    schemes: Mapping[str, Scheme]
    reduce_max: ReduceMax
    importance: Importance | None = None


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
    draft: SelfDraft | None = None,
    on_layer: OnLayer | None = None,
) -> None:
    """Assigns every weight of ``decoder``.

    Args:
        decoder: The decoder without weights, in the shape of the shard.
        config: The shape of the whole model.
        source: The source of weights.
        shard: The part of the model that this rank holds.
        adds_biases: Whether this rank adds the biases of row-parallel projections, whose results
            are summed over ranks.
        schemes: The scheme of every matrix by its name in the checkpoint.
        dtype: Element type of activations and unquantized weights.
        device: The device of the model.
        fused: The model runs the fused step.
        draft: A drafter to load in the same pass.
        on_layer: Called with (layers done, layers in all).

    Raises:
        CheckpointError: A tensor is missing, unexpected, not finite, or has another shape.
        ConfigError: A scheme does not fit the shape of a matrix.
        PackingError: A packed weight differs from the weight that was read.
    """
    loader = _Loader(config, shard, source, schemes, adds_biases, dtype, device, fused, draft)
    with source.read_ahead(loader.requests):
        loader.load_embeddings(decoder)
        decoder.norm.weight = loader.tensor(f"{names.NORM}.weight", config.hidden_size)
        for i, block in enumerate(decoder.blocks):
            loader.load_layer(block, None if draft is None else draft.decoder.blocks[i], i)
            if on_layer:
                on_layer(i + 1, config.n_layers)
    source.finish()
    for name, linear in loader.packed:
        linear.verify(name)


@dataclass(frozen=True)
class _Loader:
    """Reads from a source and assigns; see ``load_weights`` for its attributes.

    ``packed`` are the packed projections, by the names of their tensors: they are verified later,
    when that need not wait for the device.
    """

    config: ModelConfig
    shard: Shard
    source: Source
    schemes: Mapping[str, Scheme]
    adds_biases: bool
    dtype: torch.dtype
    device: torch.device
    fused: bool
    draft: SelfDraft | None
    packed: list[tuple[str, Linear]] = field(default_factory=list)

    @property
    def requests(self) -> list[Request]:
        """The matrices that are read, in order."""
        table = [] if self.config.tie_embeddings else [self._table_request]
        return [self._head_request, *table] + [
            self._request(i, matrix, part)
            for i in range(self.config.n_layers)
            for matrix in self.config.layers[i].matrices
            for part in matrix.parts
        ]

    @property
    def _table_request(self) -> Request:
        """The embedding of a model whose head is another matrix."""
        shape = (self.config.vocab_size, self.config.hidden_size)
        return Request(name=names.EMBEDDING, shape=shape, scheme=NoScheme(), plain=True)

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

    def load_layer(self, block: Block, draft: Block | None, i: int) -> None:
        """Assigns what the configuration of layer ``i`` declares, and the drafter's matrices."""
        layer, held = self.config.layers[i], self.shard.layers[i]
        order = head_order(layer.attention.head_dim, layer.attention.rope)

        def ordered(rows: Tensor) -> Tensor:
            """Reorders rows of whole heads as ``models.rope`` pairs them."""
            if order is None:
                return rows
            return rows.unflatten(0, (-1, len(order)))[:, order.to(rows.device)].flatten(0, 1)

        def streams(matrix: Matrix, part: Part) -> list[RowStream]:
            """Returns the rows of a part, and the drafter's rows."""
            rows = self._streams(self._request(i, matrix, part))
            return [arranged(each) for each in rows] if part.rotated else rows

        def arranged(rows: RowStream) -> RowStream:
            if order is None:
                return rows
            heads = (
                chunk.map_rows(ordered) if isinstance(chunk, QTensor) else ordered(chunk)
                for chunk in rows.chunks(len(order))
            )
            return RowStream(heads, rows.n, rows.format)

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
                parts, *drafts = zip(*(streams(matrix, p) for p in matrix.parts), strict=True)
                name = ", ".join(names.layer(i, part.name) for part in matrix.parts)
                linear = getattr(module, matrix.name)
                packing = [self._packing(linear, parts, bias(matrix), name)]
                for of_draft in drafts:
                    assert draft is not None, "rows for a drafter, and there is no drafter"
                    draft_linear, draft_name = draft.linears[matrix.name], f"{name} of the drafter"
                    packing.append(self._packing(draft_linear, of_draft, None, draft_name))
                interleave(*packing)
            for norm in declared.norms:
                weight = self.tensor(f"{names.layer(i, norm.part)}.weight", norm.n)
                getattr(module, norm.name).weight = ordered(weight) if norm.rotated else weight

    def _streams(self, request: Request) -> list[RowStream]:
        """Returns the rows of a matrix, and the drafter's rows if it has a copy."""
        pieces = map(self._typed, self.source.pieces(request))
        if self.draft is None or request.name not in self.draft.schemes:
            return [RowStream(pieces, request.n, request.format)]
        of_draft = replace(request, scheme=self.draft.schemes[request.name])
        reduce_max = None if request.columns is None else self.draft.reduce_max
        importance = self.draft.importance

        def requantized(rows: Tensor | QTensor) -> Tensor | QTensor:
            dense = rows.dequantize() if isinstance(rows, QTensor) else rows
            return quantize_rows(of_draft, dense, reduce_max=reduce_max, importance=importance)

        # The drafter's rows are made together with the model's: every rank then all-reduces the
        # maxima of both in the same order.
        mine, drafts = unzip((rows, requantized(rows)) for rows in pieces)
        both = zip((mine, drafts), (request, of_draft), strict=True)
        return [RowStream(rows, each.n, each.format) for rows, each in both]

    def _assign_head(self, linear: Linear, weight: Tensor | QTensor | RowStream) -> None:
        """Packs the head."""
        linear.assign(
            [weight],
            dtype=self.dtype,
            device=self.device,
            fused=self.fused,
            name=names.head(self.config),
        )

    def _packing(
        self, linear: Linear, parts: Sequence[RowStream], bias: Tensor | None, name: str
    ) -> Iterator[int]:
        """Packs the parts of a projection; see ``Linear.packing``."""
        weight: Sequence[Tensor | QTensor | RowStream]
        alike = [list(group) for _, group in groupby(parts, key=lambda part: part.format)]
        if linear.paired and self.fused and len(alike) == 1:  # pairs are packed together
            weight = join_alike((part.take(part.n) for part in parts), linear.n)
        else:
            weight = [RowStream.chain(group) for group in alike]
        yield from linear.packing(
            weight, bias, dtype=self.dtype, device=self.device, fused=self.fused
        )
        self.packed.append((name, linear))

    def _typed(self, rows: Tensor | QTensor) -> Tensor | QTensor:
        """Converts floating-point rows to the model's type, on its device."""
        return rows if isinstance(rows, QTensor) else rows.to(self.device, self.dtype)

    def load_embeddings(self, decoder: Decoder) -> None:
        """Assigns the embedding, and this rank's rows of the head."""
        rows = self.shard.vocabulary
        stream, *drafts = self._streams(self._head_request)
        self._load_embeddings(decoder, stream)
        for of_draft in drafts:
            assert self.draft is not None, "rows for a drafter, and there is no drafter"
            head = of_draft.take(of_draft.n)
            if self.config.tie_embeddings:  # the stream has all rows
                head = slice_weight(head, slice(rows.start, rows.stop), None)
            self._assign_head(self.draft.decoder.head, head)

    def _load_embeddings(self, decoder: Decoder, stream: RowStream) -> None:
        """Assigns the embedding, and this rank's rows of the head, from the rows of ``stream``."""
        config, rows, dtype = self.config, self.shard.vocabulary, self.dtype
        request = self._head_request
        head: Tensor | QTensor | RowStream
        if not config.tie_embeddings:
            self._assign_head(decoder.head, stream)
            self._embed(decoder, self._table())
            return
        spec = self._spec(request.format)
        is_int8 = request.format.kind == "int8" and request.format.is_per_channel(spec.k)
        kernel, _ = choose_linear(spec)
        if request.format == DENSE or is_int8:
            # A kernel that does not change rows shares them: one copy serves both.
            weight = stream.take(request.n).to(self.device)
            self._embed(decoder, weight)
            if isinstance(weight, QTensor):
                head = weight.rows(rows.start, rows.stop)
            else:
                head = weight[rows.start : rows.stop]
        elif kernel.embeds and len(rows) == spec.n:
            self._assign_head(decoder.head, stream)
            decoder.embedding.assign(spec, decoder.head.packed)
            return
        else:
            table = in_huge_pages(torch.empty(request.shape, dtype=dtype, device=self.device))
            chunks = stream.chunks(rows_at_once(spec.k, 1, self.device))
            kept = _dequantized_into(table, chunks, rows)
            head = RowStream(kept, len(rows), request.format)
            self._assign_head(decoder.head, head)
            surplus = list(kept)  # also fills the rows of the table after this rank's
            assert not surplus, "more rows than this rank's"
            self._embed(decoder, table)
            return
        self._assign_head(decoder.head, head)

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
        request, row = self._table_request, 0
        table = torch.empty(request.shape, dtype=self.dtype, device=self.device)
        in_huge_pages(table)
        for rows in self.source.pieces(request):
            assert isinstance(rows, Tensor), "a table is not quantized"
            table[row : row + len(rows)] = rows
            row += len(rows)
        return table


def _dequantized_into(
    table: Tensor, pieces: Iterable[Tensor | QTensor], kept: range
) -> Iterator[QTensor]:
    """Fills a table with the dequantized rows of a weight; yields the rows within ``kept``."""
    first = 0
    for piece in pieces:
        assert isinstance(piece, QTensor), "the weight must be quantized"
        last = first + piece.shape[0]
        table[first:last] = piece.dequantize(table.dtype)
        start, stop = max(kept.start, first), min(kept.stop, last)
        if start < stop:
            kept_rows = slice_weight(piece, slice(start - first, stop - first), None)
            assert isinstance(kept_rows, QTensor), "the weight must be quantized"
            yield kept_rows
        first = last
