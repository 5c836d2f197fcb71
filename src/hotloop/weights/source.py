"""Reads or makes the weights of a model, one matrix at a time.

Three sources, one interface: a checkpoint whose matrices are quantized as they are read, a few
rows at a time, a checkpoint that ``hotloop quantize`` wrote, and random weights for which only the
shape is needed. Of a matrix of which a rank holds a slice, only the slice is read and made; it is
bit for bit what it would be in the whole.

A matrix that is stored in an encoding (``quant.encodings``) is used as it is stored if its scheme
has the same number format; otherwise it is dequantized and quantized anew.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hotloop.errors import CheckpointError
from hotloop.kernels.linear import DENSE
from hotloop.models import names
from hotloop.models.config import ModelConfig
from hotloop.quant import Combine, QTensor, Scheme, cut, join_rows
from hotloop.quant.auto import Auto
from hotloop.quant.encodings import Layout
from hotloop.quant.none import NoScheme
from hotloop.weights.checkpoint import Checkpoint, TensorInfo, check_finite, wrong_shape
from hotloop.weights.recognition import FLOATS, Recognized, StoredMatrices
from hotloop.weights.safetensors import DTYPES
from hotloop.weights.tensor_file import row_chunks

INITIAL_STD = 0.02
"""Standard deviation of random weights: what transformers are commonly initialized with."""


BLOCK_ROWS = 1024
"""Rows of a random matrix that are made at once."""


_MOST_BIAS_BYTES = 2**24

_FLOAT32_BYTES = 4  # schemes quantize in float32

_NO_WEIGHTS = frozenset(DTYPES) - FLOATS
"""Element types of safetensors that hold no weights by themselves."""

_QUANTIZED_MARGIN = 4.0
"""Factor below the largest number of a type that quantized weights must keep: a group's
range is twice its largest value, and rounded scales and offsets exceed what they stand for."""


class Source(Protocol):
    """Reads or makes weights by their Hugging Face names, without ``.weight``."""

    def matrix(
        self,
        name: str,
        shape: tuple[int, int],
        scheme: Scheme,
        *,
        rows: range | None = None,
        columns: range | None = None,
    ) -> Tensor | QTensor:
        """Returns a weight matrix under ``scheme``, checked for its shape and for finite values.

        Args:
            name: Its name.
            shape: Of the whole matrix.
            scheme: How it is quantized.
            rows: Output features to take; None for all.
            columns: Input features, along multiples of the scheme's alignment; None for all. All
                ranks then ask for a slice of the same matrix, each for its own.
        """
        ...

    def tensor(self, name: str, shape: tuple[int, ...], *, rows: range | None = None) -> Tensor:
        """Returns an unquantized tensor of this shape by its full name, or some of its rows."""
        ...

    def finish(self) -> None:
        """Refuses a checkpoint with tensors left over, once the model is whole."""
        ...


def schemes_by_name(
    model: ModelConfig,
    scheme: Scheme,
    head: Scheme,
    stored: Mapping[str, Recognized] | None = None,
) -> dict[str, Scheme]:
    """Returns the scheme of every matrix of a model by its name in a checkpoint.

    Args:
        model: The model.
        scheme: Of the matrices of all layers.
        head: Of the head; a tied embedding is the same matrix, and follows it.
        stored: The matrices that are stored in an encoding, for the scheme ``auto``.

    Raises:
        ConfigError: A matrix whose shape its scheme does not fit.
    """
    matrices = names.linear_weights(model)
    schemes = dict.fromkeys(matrices, scheme)
    matrices[names.head(model)] = (model.vocab_size, model.hidden_size)
    schemes[names.head(model)] = head
    for name, (n, k) in matrices.items():
        if schemes[name].name == "auto" and stored is not None and name in stored:
            schemes[name] = Auto(stored=stored[name].layout.format, k=k)
        schemes[name].check(name, n, k)
    return schemes


def requantization_notes(
    stored: Mapping[str, Recognized], schemes: Mapping[str, Scheme]
) -> tuple[str, ...]:
    """Says which encodings are dequantized, and what becomes of their matrices."""
    changed = Counter(
        (each.encoding, schemes[name].name)
        for name, each in stored.items()
        if schemes[name].name != "auto"
        and schemes[name].format(each.layout.k) != each.layout.format
    )
    return tuple(
        f"{n} {'matrix' if n == 1 else 'matrices'} stored as {encoding} "
        f"{'is' if n == 1 else 'are'} dequantized"
        + ("." if scheme == "none" else f", and quantized again as {scheme}.")
        for (encoding, scheme), n in changed.items()
    )


class CheckpointSource:
    """Reads a checkpoint, quantizing what is not quantized yet.

    Args:
        checkpoint: The open checkpoint.
        device: The device that quantizes: a GPU is faster than the host.
        model: Of whose tensors the checkpoint may hold redundant ones; None allows none.
        dtype: Element type of the model's arithmetic, in which every weight must be finite.
        combine: All-reduces statistics of the columns that this rank reads: their maximum.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        *,
        model: ModelConfig | None = None,
        dtype: torch.dtype = torch.float32,
        combine: Combine | None = None,
    ) -> None:
        self.checkpoint, self.device, self.model = checkpoint, device, model
        self.dtype, self.combine = dtype, combine
        self.used: set[str] = set()
        self._matrices = StoredMatrices(checkpoint)

    def matrix(
        self,
        name: str,
        shape: tuple[int, int],
        scheme: Scheme,
        *,
        rows: range | None = None,
        columns: range | None = None,
    ) -> Tensor | QTensor:
        """Reads ``name.weight``, or its quantized parts where those are stored."""
        scheme.check(name, *shape)
        n, k = shape
        rows = range(n) if rows is None else rows
        combine = self.combine if columns is not None else None
        encoded = self._encoded(name, shape, scheme)
        # As many pieces on every rank, whatever the width of its columns: they are combined.
        pieces = row_chunks(rows, k * _FLOAT32_BYTES, 1 if encoded is None else encoded.units[0])
        if encoded is None:
            info = self._expect(f"{name}.weight", shape)
            margin = 1.0 if scheme.format(k) == DENSE else _QUANTIZED_MARGIN
            made = (
                scheme.quantize(self._read(info, piece, columns, margin), combine=combine)
                for piece in pieces
            )
            return join_rows(made, len(rows))
        columns = range(k) if columns is None else columns
        decoded = self._decoder(encoded, rows, columns)
        wanted = scheme.format(len(columns))

        def quantized(piece: range) -> Tensor | QTensor:
            weight, skipped = decoded(piece)
            first = columns.start - skipped
            kept = weight.try_columns(first, first + len(columns))
            if kept is not None and kept.format == wanted:
                return kept
            assert scheme.name != "auto", f"{name} is {weight.format}, not {wanted}"
            dense = weight.dequantize()[:, first : first + len(columns)]
            check_finite(
                dense,
                encoded.info,
                dtype=self.dtype,
                margin=1.0 if wanted == DENSE else _QUANTIZED_MARGIN,
                first=(piece.start, columns.start),
            )
            return scheme.quantize(dense, combine=combine)

        return join_rows(map(quantized, pieces), len(rows))

    def tensor(self, name: str, shape: tuple[int, ...], *, rows: range | None = None) -> Tensor:
        """Reads a tensor in the type it is stored in."""
        info = self._expect(name, shape)
        rows = range(shape[0]) if rows is None else rows
        tensor = self.checkpoint.read(name, (slice(rows.start, rows.stop),))
        check_finite(tensor, info, dtype=self.dtype, first=(rows.start,))
        return tensor

    def finish(self) -> None:
        """Refuses a checkpoint with tensors that the model does not have."""
        unused = self.checkpoint.tensors.keys() - self.used
        surplus = sorted(name for name in unused if not self._is_redundant(name))
        if surplus:
            first = surplus[0]
            raise CheckpointError(
                self.checkpoint.tensors[first].file,
                f"not a part of the model that config.json describes ({len(surplus)} such "
                "tensors in all): the checkpoint is of another architecture",
                tensor=first,
            )

    def _is_redundant(self, name: str) -> bool:
        """Tells whether a tensor changes nothing: by its name, or as a bias of zeros."""
        if self.model is not None and names.is_redundant(self.model, name):
            return True
        info = self.checkpoint.tensors[name]
        if not name.endswith(".bias") or len(info.shape) != 1 or info.n_bytes > _MOST_BIAS_BYTES:
            return False
        return not self.checkpoint.read(name).any()

    def _expect(self, name: str, shape: tuple[int, ...], dtype: str | None = None) -> TensorInfo:
        info = self.checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(
                self.checkpoint.path,
                "missing from the checkpoint, though the model's configuration calls for it",
                tensor=name,
            )
        if dtype is None and info.dtype in _NO_WEIGHTS:
            raise CheckpointError(
                info.file,
                f"holds {info.dtype}: weights are F32, F16 or BF16, or in an encoding that hotloop "
                "reads",
                tensor=name,
            )
        if info.shape != shape or dtype not in (None, info.dtype):
            raise wrong_shape(info, shape, dtype)
        self.used.add(name)
        return info

    def _read(self, info: TensorInfo, rows: range, columns: range | None, margin: float) -> Tensor:
        columns = range(info.shape[1]) if columns is None else columns
        index = (slice(rows.start, rows.stop), slice(columns.start, columns.stop))
        tensor = self.checkpoint.read(info.name, index)
        check_finite(
            tensor,
            info,
            dtype=self.dtype,
            margin=margin,
            first=(rows.start, columns.start),
        )
        return tensor.to(self.device)

    def _encoded(self, name: str, shape: tuple[int, int], scheme: Scheme) -> _EncodedMatrix | None:
        """Returns the tensors of a matrix that is stored in an encoding; None for a plain one."""
        wanted = None if scheme.name == "auto" else scheme.format(shape[1])
        recognized = self._matrices.recognize(name, shape, wanted)
        if recognized is None:
            return None
        layout = recognized.layout
        infos = {
            part: self._expect(f"{name}{part}", expected.shape, expected.dtype)
            for part, expected in layout.parts.items()
        }
        surplus = (f"{name}{part}" for part in layout.surplus)
        self.used.update(self.checkpoint.tensors.keys() & surplus)
        return _EncodedMatrix(name, shape, layout, infos)

    def _check_bound(self, matrix: _EncodedMatrix, bound: float) -> None:
        """Refuses scales that are finite, and whose products with values need not be."""
        name, limits = str(self.dtype).removeprefix("torch."), torch.finfo(self.dtype)
        if bound <= limits.max:
            return
        is_damaged = bound > torch.finfo(torch.float32).max
        raise CheckpointError(
            matrix.info.file,
            f"its scales multiply to weights of up to {bound:.4g}, which is too large for {name}: "
            + ("the checkpoint is damaged" if is_damaged else "choose another dtype"),
            tensor=matrix.name,
        )

    def _decoder(
        self, matrix: _EncodedMatrix, rows: range, columns: range
    ) -> Callable[[range], tuple[QTensor, int]]:
        """Returns a function that decodes some of ``rows``.

        It returns them with all ``columns`` and those that can only be read together with them, and
        the first of these columns.
        """
        n, k = matrix.shape
        row_unit, column_unit = matrix.units
        wide = _whole_units(columns, column_unit, k)

        def read(rows: range) -> dict[str, Tensor]:
            read = {}
            for name, part in matrix.layout.parts.items():
                info, index = matrix.infos[name], part.index(rows, wide)
                tensor = self.checkpoint.read(info.name, index, encoded=True)
                first = tuple(cut.start or 0 for cut in index)
                check_finite(tensor, info, first=first)
                read[name] = tensor.to(self.device)
            return read

        # Where rows of the matrix are not rows of the file, it is read once, packed as it is.
        held = _whole_units(rows, row_unit, n)
        parts = read(held) if matrix.is_gathered else None

        def decoded(piece: range) -> tuple[QTensor, int]:
            tall = _whole_units(piece, row_unit, n)
            if parts is None:
                slices = read(tall)
            else:
                inner = range(tall.start - held.start, tall.stop - held.start)
                slices = {
                    name: parts[name][part.index(inner, range(len(wide)))]
                    for name, part in matrix.layout.parts.items()
                }
            weight = matrix.layout.decode(slices, (len(tall), len(wide)))
            for scales in weight.tensors[1:]:
                check_finite(scales, matrix.info)
            self._check_bound(matrix, weight.bound())
            return weight.rows(piece.start - tall.start, piece.stop - tall.start), wide.start

        return decoded


def _whole_units(features: range, unit: int, n: int) -> range:
    """Extends a range of ``n`` features to whole units; the last may have fewer."""
    return range(features.start // unit * unit, min(-(-features.stop // unit) * unit, n))


@dataclass(frozen=True)
class _EncodedMatrix:
    """A matrix in an encoding, and the entries of its tensors in a checkpoint."""

    name: str
    shape: tuple[int, int]
    layout: Layout
    infos: Mapping[str, TensorInfo]

    @property
    def info(self) -> TensorInfo:
        """The entry of its first tensor, for errors."""
        return next(iter(self.infos.values()))

    @property
    def units(self) -> tuple[int, int]:
        """The output features and input features that can only be read together."""
        units = [part.units(self.shape) for part in self.layout.parts.values()]
        n, k = (math.lcm(*axis) for axis in zip(*units, strict=True))
        return n, k

    @property
    def is_gathered(self) -> bool:
        """Whether some rows of the matrix are spread over all rows of a tensor."""
        return any(part.transposed for part in self.layout.parts.values())


class RandomSource:
    """Makes random weights on the device, directly in quantized form.

    Norms are ones and biases zeros, so that activations keep their size through the layers. A
    matrix is made of blocks of rows, each from a generator of its own, so that a slice of it is the
    same whichever rank makes it, and little else is made for it.
    """

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.seed, self.dtype = seed, dtype
        self.generator = torch.Generator(device)

    def matrix(
        self,
        name: str,
        shape: tuple[int, int],
        scheme: Scheme,
        *,
        rows: range | None = None,
        columns: range | None = None,
    ) -> Tensor | QTensor:
        """Makes random integers or floating-point numbers of about the usual size."""
        scheme.check(name, *shape)
        n, k = shape
        rows = range(n) if rows is None else rows

        def slices() -> Iterator[Tensor | QTensor]:
            for first in range(rows.start // BLOCK_ROWS * BLOCK_ROWS, rows.stop, BLOCK_ROWS):
                self.generator.manual_seed(_block_seed(self.seed, name, first))
                block = scheme.random(
                    min(BLOCK_ROWS, n - first),
                    k,
                    std=INITIAL_STD,
                    dtype=self.dtype,
                    generator=self.generator,
                )
                start, stop = max(rows.start - first, 0), rows.stop - first
                yield cut(block, slice(start, stop), columns)

        return join_rows(slices(), len(rows))

    def tensor(self, name: str, shape: tuple[int, ...], *, rows: range | None = None) -> Tensor:
        """Makes random numbers for a table, ones for a norm, zeros for a bias."""
        if len(shape) == 2:
            table = self.matrix(name, (shape[0], shape[1]), NoScheme(), rows=rows)
            assert isinstance(table, Tensor), "a table is not quantized"
            return table
        n = shape[0] if rows is None else len(rows)
        value = 0.0 if name.endswith(".bias") else 1.0
        return torch.full((n,), value, dtype=self.dtype, device=self.generator.device)

    def finish(self) -> None:
        """Does nothing: no weights can be left over."""


def _block_seed(seed: int, name: str, first_row: int) -> int:
    digest = hashlib.sha256(f"{seed} {name} {first_row}".encode()).digest()
    return int.from_bytes(digest[:7])
