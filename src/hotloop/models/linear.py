"""Linear layers and the embedding, whose weights are assigned later and packed for a kernel."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hotloop.errors import PackingError
from hotloop.kernels.cuda import tuning
from hotloop.kernels.linear import DENSE, LinearKernel, LinearSpec, Stacked, choose_linear
from hotloop.kernels.pack import pack_in_chunks, rows_at_once
from hotloop.models.config import Matrix
from hotloop.quant import QTensor
from hotloop.quant.packing_check import PackingCheck
from hotloop.quant.rows import RowStream, paired_chunks, row_chunks_of


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Adjacent output features of a projection whose weights have one format.

    Attributes:
        kernel: The kernel that serves them.
        rows: The output features.
        packed: Their weight in the kernel's layout.
        bias: The bias of these features, or None.
    """

    kernel: LinearKernel
    rows: slice
    packed: Sequence[Tensor]
    bias: Tensor | None


class Linear(nn.Module):
    """``x @ weight.T + bias`` for a weight [n, k], which ``assign`` sets.

    Args:
        n: Output features.
        k: Input features.
        paired: The rows are gate features followed by up features.
    """

    def __init__(self, n: int, k: int, *, paired: bool = False) -> None:
        super().__init__()
        self.n, self.k, self.paired = n, k, paired
        self.kernel: LinearKernel | Stacked | None = None
        self.notes: list[str] = []
        self.n_packed = 0
        self._pieces: list[tuple[LinearKernel, LinearSpec, int]] = []
        self._unverified: list[tuple[LinearKernel, LinearSpec, Tensor]] = []
        self.bias: Tensor | None
        self.register_buffer("bias", None)

    @classmethod
    def declared(cls, matrix: Matrix) -> Linear:
        """Returns the module of a matrix that a layer's configuration declares."""
        return cls(matrix.n, matrix.k, paired=matrix.paired)

    def assign(
        self,
        weight: Tensor | QTensor | Sequence[Tensor | QTensor | RowStream],
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        fused: bool = False,
        name: str = "a weight",
    ) -> None:
        """Packs a weight for the kernel that serves it best, on ``device``.

        Args:
            weight: [n, k], floating point or quantized; or a list of row pieces of different
                formats (``join_alike``). Streamed rows are packed as they arrive.
            bias: [n], or None.
            dtype: Element type of activations.
            device: The device of the packed weight.
            fused: The weight is for the fused step.
            name: The weight's name, for errors.

        Raises:
            PackingError: See ``verify``.
        """
        for _ in self.packing(weight, bias, dtype=dtype, device=device, fused=fused):
            pass
        self.verify(name)

    def packing(
        self,
        weight: Tensor | QTensor | Sequence[Tensor | QTensor | RowStream],
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        fused: bool = False,
    ) -> Iterator[int]:
        """Packs and assigns a weight without verifying it; yields the number of rows of each chunk.

        The arguments are those of ``assign``.
        """
        weights = (weight,) if isinstance(weight, Tensor | QTensor) else weight
        specs = [
            LinearSpec(
                format=DENSE if isinstance(piece, Tensor) else piece.format,
                n=piece.n if isinstance(piece, RowStream) else piece.shape[0],
                k=self.k,
                dtype=dtype,
                device=device.type,
                fused=fused,
                plain_rows=fused and tuning.reads_plain_rows(device),
                paired=self.paired and len(weights) == 1,
            )
            for piece in weights
        ]
        self._clear()
        for spec, piece in zip(specs, weights, strict=True):
            kernel, notes = choose_linear(spec)
            packed = yield from self._pack(kernel, piece, spec, device)
            self._add(spec, kernel, notes, packed)
        self._set_kernel()
        if bias is not None:
            self.bias = bias.to(device, dtype)

    def verify(self, name: str) -> None:
        """Checks, once, that the packed weight equals the assigned weight.

        It is separate from ``packing``, since it waits for the device.

        Args:
            name: The weight's name, for errors.

        Raises:
            PackingError: They differ.
        """
        for kernel, spec, equal in self._unverified:
            if not equal:
                raise PackingError(name, kernel.name, spec.format.describe(spec.k))
        self._unverified = []

    def restore(self, packed: Sequence[tuple[LinearSpec, Sequence[Tensor]]]) -> None:
        """Takes a weight that was packed before (``layout``), on its device."""
        self._clear()
        for spec, tensors in packed:
            self._add(spec, *choose_linear(spec), tensors)
        self._set_kernel()

    def share_high_plane(self, of: Linear) -> None:
        """Uses the high plane of a nested weight in place, without a copy."""
        self._clear()
        for (kernel, spec, _), piece in zip(of._pieces, of.pieces, strict=True):
            high, packed = kernel.high_plane(piece.packed)
            self._add(spec.high, high, [], packed)
        self._set_kernel()

    @property
    def layout(self) -> list[tuple[LinearSpec, int]]:
        """The pieces of the weight, each with its number of packed tensors."""
        return [(spec, n_packed) for _, spec, n_packed in self._pieces]

    def _clear(self) -> None:
        self.notes, self.n_packed, self._pieces, self._unverified = [], 0, [], []

    def _add(
        self, spec: LinearSpec, kernel: LinearKernel, notes: list[str], packed: Sequence[Tensor]
    ) -> None:
        for tensor in packed:
            self.register_buffer(f"packed{self.n_packed}", tensor)
            self.n_packed += 1
        self._pieces.append((kernel, spec, len(packed)))
        self.notes += [note for note in notes if note not in self.notes]

    def _set_kernel(self) -> None:
        n = sum(spec.n for _, spec, _ in self._pieces)
        assert n == self.n, f"{n} rows for {self.n, self.k}"
        stacked = [(kernel, n_packed) for kernel, _, n_packed in self._pieces]
        self.kernel = stacked[0][0] if len(stacked) == 1 else Stacked(stacked)

    def _pack(
        self,
        kernel: LinearKernel,
        weight: Tensor | QTensor | RowStream,
        spec: LinearSpec,
        device: torch.device,
    ) -> Generator[int, None, list[Tensor]]:
        """Packs some rows at a time, so that little memory is used besides the packed weight."""
        paired = spec.paired and spec.fused  # alternately eight gate and eight up features
        check = PackingCheck(kernel, spec.n, paired=paired)

        def on_device(rows: Tensor | QTensor) -> Tensor | QTensor:
            assert rows.shape[1] == self.k, f"{rows.shape} for {self.n, self.k}"
            return check.record(
                rows.to(device) if isinstance(rows, QTensor) else rows.to(device, spec.dtype)
            )

        step = rows_at_once(self.k, kernel.row_alignment, device)
        if kernel.keeps_rows and not isinstance(weight, RowStream):
            chunks = [weight]  # an embedding may share it
        elif isinstance(weight, RowStream):
            assert not paired, "a stream has one half after the other"
            chunks = weight.chunks(step)
        else:
            chunks = (paired_chunks if paired else row_chunks_of)(weight, step)
        packed = yield from pack_in_chunks(kernel, map(on_device, chunks), spec.n, paired=paired)
        self._unverified.append((kernel, spec, check.compare(packed)))
        return packed

    @property
    def packed(self) -> list[Tensor]:
        """The weight in the kernel's layout."""
        return [getattr(self, f"packed{i}") for i in range(self.n_packed)]

    @property
    def pieces(self) -> list[Piece]:
        """The weight by pieces of one format; most weights have one piece."""
        found, packed, row, at = [], self.packed, 0, 0
        for kernel, spec, n_packed in self._pieces:
            rows = slice(row, row + spec.n)
            bias = None if self.bias is None else self.bias[rows]
            found.append(
                Piece(kernel=kernel, rows=rows, packed=packed[at : at + n_packed], bias=bias)
            )
            row, at = row + spec.n, at + n_packed
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight and the bias."""
        tensors = [*self.packed, *([] if self.bias is None else [self.bias])]
        return sum(t.nbytes for t in tensors)

    def forward(self, x: Tensor) -> Tensor:
        """Computes [..., n] of [..., k]."""
        assert self.kernel is not None, "no weight was assigned"
        y = self.kernel(x.reshape(-1, self.k), *self.packed).view(*x.shape[:-1], self.n)
        return y if self.bias is None else y + self.bias


class Embedding(nn.Module):
    """An embedding: looks up rows of a weight [n, k] by token id, and reads only those rows."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.n, self.k = n, k
        self.kernel: LinearKernel | None = None
        self._spec: LinearSpec | None = None
        self.n_packed = 0

    def assign(self, spec: LinearSpec, packed: Sequence[Tensor]) -> None:
        """Takes a weight on its device, as the kernel of ``spec`` packed it."""
        kernel, _ = choose_linear(spec)
        assert kernel.embeds, f"{kernel.name} looks up no rows"
        self.kernel, self._spec, self.n_packed = kernel, spec, len(packed)
        for i, tensor in enumerate(packed):
            self.register_buffer(f"packed{i}", tensor)

    def restore(self, packed: Sequence[tuple[LinearSpec, Sequence[Tensor]]]) -> None:
        """Takes a weight that was packed before (``layout``), on its device."""
        ((spec, tensors),) = packed
        self.assign(spec, tensors)

    @property
    def layout(self) -> list[tuple[LinearSpec, int]]:
        """The weight's only piece, with its number of packed tensors."""
        assert self._spec is not None, "no weight was assigned"
        return [(self._spec, self.n_packed)]

    @property
    def packed(self) -> list[Tensor]:
        """The weight in the kernel's layout."""
        return [getattr(self, f"packed{i}") for i in range(self.n_packed)]

    def forward(self, ids: Tensor) -> Tensor:
        """Looks up token ids [...] as rows [..., k]; invalid ids are clamped to valid ones."""
        assert self.kernel is not None, "no weight was assigned"
        return self.kernel.embed(ids, *self.packed)
