"""Reads or makes the weights of a model, one matrix at a time.

There are three sources with one interface: a checkpoint whose matrices are quantized as they are
read, a few rows at a time; a checkpoint that ``hotloop quantize`` wrote; and random weights, which
need only the shape. If a rank holds a slice of a matrix, only the slice is read or made; its bits
are the same as in the whole matrix.

A matrix that is stored in an encoding (``quant.encodings``) is used as it is stored if its scheme
has the same number format; otherwise it is dequantized and quantized again.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from hotloop.errors import CheckpointError
from hotloop.kernels.linear import DENSE, NESTED_RANGE, KernelFormat
from hotloop.models import names
from hotloop.models.config import ModelConfig
from hotloop.quant import QTensor, ReduceMax, Scheme, join_rows, slice_weight
from hotloop.quant.auto import Auto
from hotloop.quant.encodings import Layout
from hotloop.quant.int4 import Int4
from hotloop.quant.int8 import Int8
from hotloop.weights.checkpoint import Checkpoint, TensorInfo, check_finite, wrong_shape
from hotloop.weights.read_ahead import ReadAhead
from hotloop.weights.recognition import FLOATS, Recognized, StoredMatrices
from hotloop.weights.safetensors import DTYPES
from hotloop.weights.tensor_file import row_chunks

MAX_BYTES_AHEAD = 64 * 2**20
"""The most bytes that are read ahead."""

INITIAL_STD = 0.02
"""Standard deviation of random weights: the usual one for initializing transformers."""


BLOCK_ROWS = 1024
"""Rows of a random matrix that are made at once."""


Importance = Mapping[str, Tensor]
"""The weights of squared errors, by name of the matrix: the mean square of each input feature, [K].
``weights.calibration`` collects them for calibrated schemes."""

_MAX_BIAS_BYTES = 2**24

_VALUES_OF_PIECE = {"cpu": 2**20, "cuda": 2**24}
"""Values of a matrix that are made at once: on a CPU few enough for caches, on a GPU enough to fill
it. Decoding and quantizing take several times the memory of as many float32 numbers."""

_NO_WEIGHTS = frozenset(DTYPES) - FLOATS
"""Element types of safetensors that are not weights by themselves."""

_QUANTIZED_MARGIN = 4.0
"""The margin by which quantized weights must stay below the largest number of a type: a group's
range is twice its largest value, and rounded scales and offsets can exceed the exact ones."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A weight matrix, or a slice of it.

    Attributes:
        name: Its Hugging Face name, without ``.weight``.
        shape: The shape of the whole matrix.
        scheme: Its scheme.
        rows: The output features to take; None for all.
        columns: The input features to take, between multiples of the scheme's alignment; None for
            all. If they are given, every rank requests its slice of the same matrix at the same
            time.
        plain: It is read as floating point, whatever its encoding: an embedding table, which is
            only looked up, and which descriptions of quantized checkpoints leave out.
    """

    name: str
    shape: tuple[int, int]
    scheme: Scheme
    rows: range | None = None
    columns: range | None = None
    plain: bool = False

    @property
    def n(self) -> int:
        """The number of requested output features."""
        return self.shape[0] if self.rows is None else len(self.rows)

    @property
    def format(self) -> KernelFormat:
        """The number format of the result."""
        return self.scheme.format(self.shape[1] if self.columns is None else len(self.columns))


class Source(Protocol):
    """Reads or makes weights."""

    def pieces(self, request: Request) -> Iterator[Tensor | QTensor]:
        """Returns a matrix a few rows at a time, checked for its shape and for finite values."""
        ...

    def read_ahead(self, requests: Sequence[Request]) -> AbstractContextManager[None]:
        """Reads matrices in the background while earlier ones are used, in this order."""
        ...

    def tensor(self, name: str, shape: tuple[int, ...], *, rows: range | None = None) -> Tensor:
        """Returns a vector by its full name, or some of its elements."""
        ...

    def finish(self) -> None:
        """Refuses a checkpoint with unused tensors, after the model is complete."""
        ...


def read_matrix(source: Source, request: Request) -> Tensor | QTensor:
    """Returns a whole matrix."""
    return join_rows(source.pieces(request), request.n)


def schemes_by_name(
    model: ModelConfig,
    scheme: Scheme,
    head: Scheme,
    stored: Mapping[str, Recognized] | None = None,
) -> dict[str, Scheme]:
    """Returns the scheme of every matrix of a model by its name in a checkpoint.

    Args:
        model: The model.
        scheme: The scheme of the matrices of all layers.
        head: The scheme of the head, and of a tied embedding.
        stored: The matrices that are stored in an encoding, for the scheme ``auto``.

    Raises:
        ConfigError: A scheme does not fit the shape of a matrix.
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


def is_calibrated(scheme: Scheme) -> bool:
    """Returns whether a scheme weights errors with the activations of the model."""
    return isinstance(scheme, Int4) and scheme.calibrated


def quantize_rows(
    request: Request, rows: Tensor, *, reduce_max: ReduceMax | None, importance: Importance | None
) -> Tensor | QTensor:
    """Quantizes rows of a request.

    Args:
        request: The request.
        rows: Floating-point rows, with the requested input features.
        reduce_max: See ``Scheme.quantize``.
        importance: See ``Importance``; None for random weights, which have no activations.
    """
    scheme = request.scheme
    if importance is None or not isinstance(scheme, Int4) or not scheme.calibrated:
        return scheme.quantize(rows, reduce_max=reduce_max)
    weights = importance[request.name]
    if request.columns is not None:
        weights = weights[request.columns.start : request.columns.stop]
    return scheme.quantize(rows, reduce_max=reduce_max, importance=weights)


def requantization_notes(
    stored: Mapping[str, Recognized], schemes: Mapping[str, Scheme]
) -> tuple[str, ...]:
    """Returns a note per scheme: which encodings are dequantized, and what they become."""
    changed: dict[str, Counter[str]] = {}
    for name, each in stored.items():
        scheme = schemes[name]
        if scheme.name != "auto" and scheme.format(each.layout.k) != each.layout.format:
            changed.setdefault(scheme.name, Counter())[each.encoding] += 1
    return tuple(_requantized(by_encoding, scheme) for scheme, by_encoding in changed.items())


def _requantized(by_encoding: Counter[str], scheme: str) -> str:
    (encoding, n), *others = by_encoding.most_common()
    named = [f"{n} {'matrix' if n == 1 else 'matrices'} stored as {encoding}"]
    named += [f"{n} as {encoding}" for encoding, n in others]
    listed = " and ".join(filter(None, (", ".join(named[:-1]), named[-1])))
    verb = "is" if by_encoding.total() == 1 else "are"
    again = "" if scheme == "none" else f", and quantized again as {scheme}"
    return f"{listed} {verb} dequantized{again}."


class CheckpointSource:
    """Reads a checkpoint, and quantizes matrices that are not quantized yet.

    Args:
        checkpoint: The open checkpoint.
        device: The device that quantizes: a GPU is faster than the host.
        model: The model. The checkpoint may have tensors that are redundant for it; None allows no
            redundant tensor.
        dtype: Element type of the model's arithmetic, in which every weight must be finite.
        reduce_max: All-reduces maxima over ranks that read different columns; see
            ``Scheme.quantize``.
        importance: See ``Importance``; None if no scheme is calibrated.

    Attributes:
        read_bytes: Bytes that were read so far.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        *,
        model: ModelConfig | None = None,
        dtype: torch.dtype = torch.float32,
        reduce_max: ReduceMax | None = None,
        importance: Importance | None = None,
    ) -> None:
        self.checkpoint, self.device, self.model = checkpoint, device, model
        self.dtype, self.reduce_max, self.importance = dtype, reduce_max, importance
        self.used: set[str] = set()
        self.read_bytes = 0
        self._matrices = StoredMatrices(checkpoint)
        self._ahead: ReadAhead[_Read] | None = None
        self._announced: deque[Request] = deque()

    def pieces(self, request: Request) -> Iterator[Tensor | QTensor]:
        """See ``Source``. All ranks have equally many pieces, since statistics are combined."""
        request.scheme.check(request.name, *request.shape)
        for read in self._reads_of(request):
            self.read_bytes += read.stored_bytes
            parts = {name: self.place(part) for name, part in read.parts.items()}
            for piece in read.pieces:
                yield read.plan.make(piece, parts)

    @contextmanager
    def read_ahead(self, requests: Sequence[Request]) -> Generator[None]:
        """See ``Source``: reads and checks in a thread, up to half the bytes of a large tensor."""

        def jobs() -> Iterator[Callable[[], _Read]]:
            for request in requests:
                yield from self._plan(request).jobs()

        largest = max((info.n_bytes for info in self.checkpoint.tensors.values()), default=0)
        self._announced = deque(requests)
        limit = min(largest // 2, MAX_BYTES_AHEAD)
        self._ahead = ReadAhead(jobs(), lambda read: read.n_bytes, limit)
        try:
            yield
        finally:
            self._ahead.close()
            self._ahead = None
            self._announced.clear()

    def _reads_of(self, request: Request) -> Iterator[_Read]:
        if self._ahead is None:
            for job in self._plan(request).jobs():
                yield job()
            return
        announced = self._announced.popleft()
        assert announced == request, f"{request.name} is not the next requested matrix"
        while True:
            read = self._ahead.next()
            yield read
            if read.is_last:
                return

    def _plan(self, request: Request) -> _Plan:
        """Plans how a matrix is read."""
        name, (n, k), scheme = request.name, request.shape, request.scheme
        rows = range(n) if request.rows is None else request.rows
        reduce_max = self.reduce_max if request.columns is not None else None
        encoded = None if request.plain else self._encoded(name, request.shape, scheme)
        group = 1 if encoded is None else encoded.granularity[0]
        pieces = list(row_chunks(rows, k, group, most=_VALUES_OF_PIECE[self.device.type]))
        if encoded is None:
            info = self._expect(f"{name}.weight", request.shape)
            return _PlainPlan(self, request, pieces, reduce_max, info)
        return _EncodedPlan(self, request, pieces, reduce_max, encoded, rows)

    def tensor(self, name: str, shape: tuple[int, ...], *, rows: range | None = None) -> Tensor:
        """Reads an unquantized tensor in the type it is stored in."""
        info = self._expect(name, shape)
        rows = range(shape[0]) if rows is None else rows
        tensor = self.checkpoint.read(name, (slice(rows.start, rows.stop),))
        self.read_bytes += info.n_bytes * len(rows) // shape[0]
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
        """Returns whether a tensor has no effect: by its name, or because it is a bias of zeros."""
        if self.model is not None and names.is_redundant(self.model, name):
            return True
        info = self.checkpoint.tensors[name]
        if not name.endswith(".bias") or len(info.shape) != 1 or info.n_bytes > _MAX_BIAS_BYTES:
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

    def place(self, tensor: Tensor) -> Tensor:
        """Copies a tensor to the device that quantizes, asynchronously from page-locked memory."""
        return tensor.to(self.device, non_blocking=True)

    def read(self, name: str, index: tuple[slice, ...], *, encoded: bool = False) -> Tensor:
        """Reads a tensor; into page-locked memory if the device is a GPU."""
        pinned = self.device.type == "cuda"
        return self.checkpoint.read(name, index, encoded=encoded, pinned=pinned)

    def _encoded(self, name: str, shape: tuple[int, int], scheme: Scheme) -> _EncodedMatrix | None:
        """Returns the tensors of a matrix that is stored in an encoding; None if it is plain."""
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


def _aligned(features: range, step: int, n: int) -> range:
    """Extends a range of ``n`` features to multiples of ``step``, or to the end."""
    return range(features.start // step * step, min(-(-features.stop // step) * step, n))


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
    def granularity(self) -> tuple[int, int]:
        """The numbers of output and input features that must be read together."""
        of_parts = [part.granularity(self.shape) for part in self.layout.parts.values()]
        n, k = (math.lcm(*axis) for axis in zip(*of_parts, strict=True))
        return n, k

    @property
    def is_transposed(self) -> bool:
        """Whether a row of the matrix is a column of a tensor, and so spread over all its rows."""
        return any(part.transposed for part in self.layout.parts.values())


@dataclass(frozen=True)
class _Read:
    """Result of one job's reads: tensors from which some pieces of a matrix are made."""

    plan: _Plan
    pieces: Sequence[range]
    parts: Mapping[str, Tensor]
    is_last: bool

    @property
    def n_bytes(self) -> int:
        """Bytes that it holds."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes that its tensors take in the file."""
        return self.plan.stored_bytes(self.parts)


@dataclass(frozen=True)
class _Plan:
    """Reads a matrix in any thread, and makes pieces of it in the caller's thread."""

    source: CheckpointSource
    request: Request
    pieces: Sequence[range]
    reduce_max: ReduceMax | None

    def jobs(self) -> Iterator[Callable[[], _Read]]:
        """Returns the jobs that read the matrix: by default one for each piece."""
        for piece in self.pieces:
            last = piece is self.pieces[-1]
            yield lambda piece=piece, last=last: _Read(self, (piece,), self.read(piece), last)

    def read(self, piece: range) -> Mapping[str, Tensor]:
        """Reads the tensors from which some rows are made, and checks that they are finite."""
        raise NotImplementedError

    def stored_bytes(self, parts: Mapping[str, Tensor]) -> int:
        """Counts the bytes that tensors as ``read`` returns them take in the file."""
        return sum(part.nbytes for part in parts.values())

    def make(self, piece: range, parts: Mapping[str, Tensor]) -> Tensor | QTensor:
        """Makes rows of the matrix from tensors on the device that quantizes."""
        raise NotImplementedError

    def quantize(self, rows: Tensor) -> Tensor | QTensor:
        """Quantizes rows of the matrix, with the requested input features."""
        importance = self.source.importance
        return quantize_rows(self.request, rows, reduce_max=self.reduce_max, importance=importance)


@dataclass(frozen=True)
class _PlainPlan(_Plan):
    """Reads a matrix that is not quantized."""

    info: TensorInfo

    def read(self, piece: range) -> Mapping[str, Tensor]:
        k = self.info.shape[1]
        columns = range(k) if self.request.columns is None else self.request.columns
        index = (slice(piece.start, piece.stop), slice(columns.start, columns.stop))
        tensor = self.source.read(self.info.name, index)
        check_finite(
            tensor,
            self.info,
            dtype=self.source.dtype,
            margin=_margin(self.request.format),
            first=(piece.start, columns.start),
        )
        return {"": tensor}

    def stored_bytes(self, parts: Mapping[str, Tensor]) -> int:
        # A GGUF file may store as blocks what is read as floating point.
        return self.info.n_bytes * parts[""].numel() // math.prod(self.info.shape)

    def make(self, piece: range, parts: Mapping[str, Tensor]) -> Tensor | QTensor:  # noqa: ARG002
        return self.quantize(parts[""])


@dataclass(frozen=True)
class _EncodedPlan(_Plan):
    """Reads and decodes a matrix in an encoding, extended to its granularity."""

    matrix: _EncodedMatrix
    rows: range

    @property
    def columns(self) -> range:
        """The requested input features."""
        k = self.matrix.shape[1]
        return range(k) if self.request.columns is None else self.request.columns

    @property
    def columns_read(self) -> range:
        """The input features that must be read for the requested ones."""
        return _aligned(self.columns, self.matrix.granularity[1], self.matrix.shape[1])

    def rows_read(self, rows: range) -> range:
        """Returns the output features that must be read for ``rows``."""
        return _aligned(rows, self.matrix.granularity[0], self.matrix.shape[0])

    def jobs(self) -> Iterator[Callable[[], _Read]]:
        if not self.matrix.is_transposed:
            yield from super().jobs()
            return
        # Rows of the matrix are not rows of the file, so it is read once, in its stored packing.
        yield lambda: _Read(self, self.pieces, self.read(self.rows), is_last=True)

    def read(self, piece: range) -> Mapping[str, Tensor]:
        parts, rows, columns = {}, self.rows_read(piece), self.columns_read
        for name, part in self.matrix.layout.parts.items():
            info, index = self.matrix.infos[name], part.index(rows, columns)
            parts[name] = self.source.read(info.name, index, encoded=True)
            check_finite(parts[name], info, first=tuple(axis.start or 0 for axis in index))
        return parts

    def make(self, piece: range, parts: Mapping[str, Tensor]) -> Tensor | QTensor:
        rows, read, columns = self.rows_read(piece), self.columns_read, self.columns
        if self.matrix.is_transposed:
            first = self.rows_read(self.rows).start
            inner = range(rows.start - first, rows.stop - first)
            parts = {
                name: parts[name][part.index(inner, range(len(read)))]
                for name, part in self.matrix.layout.parts.items()
            }
        whole = self.matrix.layout.decode(parts, (len(rows), len(read)))
        for scales in whole.tensors[1:]:
            check_finite(scales, self.matrix.info)
        self._check_bound(whole.bound())
        self._check_range(whole)
        weight = whole.rows(piece.start - rows.start, piece.stop - rows.start)
        start = columns.start - read.start
        scheme, wanted = self.request.scheme, self.request.format
        kept = weight.try_columns(start, start + len(columns))
        if kept is not None and scheme.name == "auto" and wanted.super_size is not None:
            kept = kept.with_super_blocks(wanted.super_size)
        if kept is not None and kept.format == wanted:
            return kept
        int8 = replace(wanted, kind="int8") if wanted.kind == "nested" else None
        if isinstance(scheme, Int8) and kept is not None and kept.format == int8:
            return scheme.nest(kept)
        assert scheme.name != "auto", f"{self.matrix.name} is {weight.format}, not {wanted}"
        dense = weight.dequantize()[:, start : start + len(columns)]
        check_finite(
            dense,
            self.matrix.info,
            dtype=self.source.dtype,
            margin=_margin(wanted),
            first=(piece.start, columns.start),
        )
        return self.quantize(dense)

    def _check_bound(self, bound: float) -> None:
        """Refuses finite scales whose products with values may not be finite."""
        dtype = self.source.dtype
        name, limits = str(dtype).removeprefix("torch."), torch.finfo(dtype)
        if bound <= limits.max:
            return
        is_damaged = bound > torch.finfo(torch.float32).max
        raise CheckpointError(
            self.matrix.info.file,
            f"its scales multiply to weights of up to {bound:.4g}, which is too large for {name}: "
            + ("the checkpoint is damaged" if is_damaged else "choose another dtype"),
            tensor=self.matrix.name,
        )

    def _check_range(self, weight: QTensor) -> None:
        """Refuses integers beyond the range of nested weights, which use a part of eight bits."""
        if weight.kind != "nested" or (largest := int(weight.values.max())) <= NESTED_RANGE[1]:
            return
        raise CheckpointError(
            self.matrix.info.file,
            f"int8 in groups has integers of at most {NESTED_RANGE[1]}, and one here is {largest}: "
            "the checkpoint is damaged; quantize the model again",
            tensor=self.matrix.name,
        )


def _margin(form: KernelFormat) -> float:
    return 1.0 if form == DENSE else _QUANTIZED_MARGIN


class RandomSource:
    """Makes random weights on the device, directly in quantized form.

    Norms are ones and biases zeros, so that activations keep their size through the layers. A
    matrix is made in blocks of rows, each with its own generator, so that a slice is the same on
    every rank, and little beyond the slice is made.
    """

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.seed, self.dtype = seed, dtype
        self.generator = torch.Generator(device)

    def pieces(self, request: Request) -> Iterator[Tensor | QTensor]:
        """Makes random integers or floating-point numbers of about the usual size."""
        name, (n, k), scheme = request.name, request.shape, request.scheme
        scheme.check(name, n, k)
        rows = range(n) if request.rows is None else request.rows
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
            yield slice_weight(block, slice(start, stop), request.columns)

    def read_ahead(self, requests: Sequence[Request]) -> AbstractContextManager[None]:  # noqa: ARG002
        """Does nothing: nothing is read."""
        return nullcontext()

    def tensor(self, name: str, shape: tuple[int, ...], *, rows: range | None = None) -> Tensor:
        """Makes ones for a norm, zeros for a bias."""
        n = shape[0] if rows is None else len(rows)
        value = 0.0 if name.endswith(".bias") else 1.0
        return torch.full((n,), value, dtype=self.dtype, device=self.generator.device)

    def finish(self) -> None:
        """Does nothing: no weights can be left over."""


def _block_seed(seed: int, name: str, first_row: int) -> int:
    digest = hashlib.sha256(f"{seed} {name} {first_row}".encode()).digest()
    return int.from_bytes(digest[:7])
