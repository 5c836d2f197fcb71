"""Launches of matrix products, for a weight format, number of rows and epilogue.

``GemmPlan`` is the common base of the launches of ``linear.cu`` (``LinearPlan``) and of
``wide.cu``. ``Tuning`` holds the parameters chosen for speed. Its number of warps determines the
order of sums, and so the bits of a result: it belongs to a weight, whatever the number of rows.

An *octet* is eight rows of x, the n dimension of an mma instruction.

Shape letters: M rows, N output features, K input features, G groups along K.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hotloop.kernels.cuda.compile import Kernel
from hotloop.kernels.cuda.launch import Arguments, Call, Limits
from hotloop.kernels.cuda.packing import SLICE, TILE_ROWS, Format, tile_stride
from hotloop.kernels.cuda.tensor_map import WORDS, TensorMap

Epilogue = Literal["plain", "swiglu", "logits", "part", "gated"]
EPILOGUES: dict[Epilogue, str] = {
    "plain": "kPlain",
    "swiglu": "kSwiGLU",
    "logits": "kLogits",
    "part": "kPart",
    "gated": "kGated",
}

_Input = Literal["direct", "at_once", "in_parts"]
_INPUTS: dict[_Input, str] = {
    "direct": "kDirect",
    "at_once": "kStagedAtOnce",
    "in_parts": "kStagedInParts",
}

MAX_ROWS = 64
MAX_ACCUMULATORS = 4
"""The most accumulators of a warp (16 features of an octet of rows each): registers limit them."""

DIRECT_STAGES = 3
"""The most copies in flight if x is not staged: the loads of x from L2 queue behind them."""

SOURCE_BYTES = 64 * 1024
"""The most bytes of unpermuted x that shared memory holds besides the permuted x."""

_BUFFERS = 2  # kBuffers of linear.cu


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Parameters that are chosen for speed. A layout reduces those that do not fit the device.

    Attributes:
        warps: Warps of a block that split K. Determines the order of sums.
        tiles: Tiles that a warp computes together.
        units_per_stage: The most units of one copy.
        ring_bytes: Shared memory of a block for copies of weights in flight.
        early_stages: Copies that a warp issues before it waits for x, or None for all but one.
        staged_bytes: The most bytes of x that a block keeps in shared memory.
        part_bytes: x is copied to shared memory in parts, not all at once, if it takes at most this
            many bytes with as many rows as the kernel's instance can take.
    """

    warps: int = 8
    tiles: int = 1
    units_per_stage: int = 2
    ring_bytes: int = 96 * 1024
    early_stages: int | None = None
    staged_bytes: int = 160 * 1024
    part_bytes: int = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Division of a block's shared memory.

    Attributes:
        stages: Stages of a warp's ring, which are copies in flight.
        early_stages: Stages whose copies are issued before the wait for x.
        units_per_stage: Units of a copy.
        staged: The block keeps x in shared memory.
        tiles: Tiles that a warp computes together.
        source_rows: Rows of x that are in shared memory at a time in the order of features; a
            permuted weight gathers x from them.
        pair_table: The numbers of a lookup table are looked up in pairs, in shared memory.
        shared_bytes: Total shared memory. It is so large that a multiprocessor holds only one such
            block: a block of the next kernel then starts when this one ends, which is when memory
            would be idle.
    """

    stages: int
    early_stages: int
    units_per_stage: int
    staged: bool
    tiles: int
    source_rows: int
    pair_table: bool
    shared_bytes: int


@dataclass(frozen=True, kw_only=True)
class PrescaledInput:
    """Input of a matrix product after an RMS norm; the kernel multiplies its sums by 1 / rms.

    Attributes:
        x: bfloat16 [M, K], the norm's input times its weight.
        squares: float32 [M, K / 16 rounded up], partial sums of 16 squares of the norm's input.
        eps: The norm's epsilon.
    """

    x: Tensor
    squares: Tensor
    eps: float

    @classmethod
    def empty(cls, rows: int, k: int, eps: float, device: torch.device) -> PrescaledInput:
        """Allocates uninitialized tensors."""
        return cls(
            x=torch.empty(rows, k, dtype=torch.bfloat16, device=device),
            squares=torch.empty(rows, -(-k // TILE_ROWS), dtype=torch.float32, device=device),
            eps=eps,
        )

    def rows(self, rows: slice) -> PrescaledInput:
        """Returns a slice of the rows."""
        return PrescaledInput(x=self.x[rows], squares=self.squares[rows], eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class NormEpilogue:
    """Epilogue of a kernel whose result is the input of an RMS norm.

    Attributes:
        weight: bfloat16 [N], the norm's weight.
        prescaled: Written: the input of the matrix product after the norm.
    """

    ARGUMENTS: ClassVar = ("next_norm", "next_x", "next_squares")

    weight: Tensor
    prescaled: PrescaledInput

    def arguments(self) -> dict[str, Tensor]:
        """Returns the kernel arguments named in ``ARGUMENTS``."""
        tensors = (self.weight, self.prescaled.x, self.prescaled.squares)
        return dict(zip(self.ARGUMENTS, tensors, strict=True))

    def rows(self, rows: slice) -> NormEpilogue:
        """Returns a slice of the rows."""
        return NormEpilogue(weight=self.weight, prescaled=self.prescaled.rows(rows))


@dataclass(frozen=True, kw_only=True)
class Prefetch:
    """Prefetch of a part of a later matrix product's weight into L2, while memory is nearly idle.

    Each block prefetches the same number of tiles; block b begins b tiles after block 0.

    Attributes:
        weight: As ``packing.pack`` returns it.
        form: Its format.
        first: The first tile of block 0.
        step: Tiles from one of a block's tiles to the next.
        tiles: Tiles per block.
        tile_bytes: Bytes of each tile, from its beginning; a multiple of 16.
        items_left: A block prefetches when it has this many items of work left.
    """

    ARGUMENTS: ClassVar = (
        *("prefetch_weight", "prefetch_n_tiles", "prefetch_stride", "prefetch_first"),
        *("prefetch_step", "prefetch_tiles", "prefetch_tile_bytes", "prefetch_items_left"),
    )

    weight: Tensor
    form: Format
    first: int
    step: int = 1
    tiles: int = 1
    tile_bytes: int
    items_left: int

    def arguments(self) -> dict[str, Tensor | int]:
        """Returns the kernel arguments named in ``ARGUMENTS``."""
        whole = self.form.units * self.form.unit_bytes
        assert self.weight.nbytes == self.form.nbytes, f"{self.weight.nbytes} for {self.form}"
        assert self.weight.data_ptr() % 16 == 0, "read 16 bytes at a time"
        assert 0 < self.tile_bytes <= whole, f"{self.tile_bytes} of a tile's {whole} bytes"
        assert self.tile_bytes % 16 == 0, f"{self.tile_bytes} bytes, 16 at a time"
        stride = tile_stride(self.form, self.weight)
        values = (self.weight, self.form.tiles, stride, self.first, self.step)
        how = (self.tiles, self.tile_bytes, self.items_left)
        return dict(zip(self.ARGUMENTS, (*values, *how), strict=True))


class NextOperandArguments(Arguments):
    """``NextOperand`` of ``operand.cuh``."""

    _fields_ = (
        ("bytes", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("units", "parts", "part_stages")),
        *((name, ctypes.c_int) for name in ("unit_shift", "stage_shift", "rows")),
        ("scales", ctypes.c_uint32 * 2),
    )


@dataclass(frozen=True, kw_only=True)
class NextOperand:
    """x in the layout of ``wide.cu``, stored by the kernel that computes x; see ``operand.cuh``.

    Attributes:
        operand: uint8 [parts, part_stages, lines of a stage, rows, 128], written.
        units: Units of K.
        unit_k: Input features of a unit.
        parts: Parts into which K is divided.
        part_stages: Stages of a part, at most.
        stage_units: Units of a stage.
        rows: Rows of a stage, in whole octets.
        scales: Factors of x: for the pairs 0 and 2 of eight features, and for 1 and 3; each is the
            bits of two bfloat16.
    """

    operand: Tensor
    units: int
    unit_k: int
    parts: int
    part_stages: int
    stage_units: int
    rows: int
    scales: tuple[int, int]

    @classmethod
    def arguments_of(cls, operand: NextOperand | None) -> tuple[Arguments, tuple[Tensor, ...]]:
        """Returns the struct, zeros for None, and the tensors that it points into."""
        if operand is None:
            return NextOperandArguments(), ()
        return NextOperandArguments.of(
            bytes=operand.operand,
            units=operand.units,
            parts=operand.parts,
            part_stages=operand.part_stages,
            unit_shift=operand.unit_k.bit_length() - 1,
            stage_shift=operand.stage_units.bit_length() - 1,
            rows=operand.rows,
            scales=(ctypes.c_uint32 * 2)(*operand.scales),
        )


_NO_PREFETCH = {"prefetch_weight": None, **dict.fromkeys(Prefetch.ARGUMENTS[1:], 0)}


class LinearArguments(Arguments):
    """``LinearArgs`` of ``linear.cuh``."""

    TILED = ("weight", "prefetch_weight")

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "x", "operand", "squares")),
        *((name, ctypes.c_void_p) for name in ("bias", "residual", "y", *NormEpilogue.ARGUMENTS)),
        *((name, ctypes.c_void_p) for name in ("best_value", "best_index", "partial", "counters")),
        ("prefetch_weight", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("rows", "n", "k", "n_best", "tiles", "units")),
        ("tile_stride", ctypes.c_int),
        *((name, ctypes.c_int) for name in ("parts", "splits", "part_stages")),
        *(
            (name, ctypes.c_int)
            for name in ("stages", "units_per_stage", "source_rows", "early_stages")
        ),
        *((name, ctypes.c_int) for name in Prefetch.ARGUMENTS[1:]),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("y_width", "y_first")),
        *((name, ctypes.c_void_p) for name in ("gate", "features")),
        ("next_operand", NextOperandArguments),
    )


class PlainRowsArguments(ctypes.Structure):
    """``PlainRowsArgs`` of ``linear.cuh``."""

    _fields_ = (
        ("linear", LinearArguments),
        ("padding", ctypes.c_uint8 * (-ctypes.sizeof(LinearArguments) % (8 * WORDS))),
        ("map", ctypes.c_uint64 * WORDS),
    )


@dataclass(frozen=True, kw_only=True)
class GemmPlan(ABC):
    """A matrix product for one weight format, number of rows and epilogue, on one kind of device.

    Attributes:
        form: The weight's format.
        rows: M, up to 64.
        epilogue: ``plain`` (bfloat16, plus a residual if one is given), ``swiglu`` (bfloat16, for a
            paired weight) or ``logits`` (float32, with the best candidates on request). For
            projections whose parts have different formats: ``part`` (bfloat16, some features of y)
            or ``gated`` (bfloat16, multiplied by SiLU of gates that were computed before).
        norm: x is a ``PrescaledInput``, so sums are multiplied by 1 / rms of their row.
        tuning: Parameters chosen for speed; its warps determine the order of sums.
        limits: Limits of the device.
    """

    form: Format
    rows: int
    epilogue: Epilogue = "plain"
    norm: bool = False
    tuning: Tuning = Tuning()
    limits: Limits

    def __post_init__(self) -> None:
        assert 1 <= self.rows <= MAX_ROWS, f"{self.rows} rows"
        assert self.form.paired == (self.epilogue == "swiglu"), "only swiglu takes a paired weight"

    @property
    @abstractmethod
    def kernel(self) -> Kernel:
        """The instance of the kernel."""

    @property
    @abstractmethod
    def blocks(self) -> int:
        """Blocks of the grid."""

    @property
    @abstractmethod
    def candidates(self) -> int:
        """The number of parts of the vocabulary; each has its best logit of a row."""

    @property
    @abstractmethod
    def shared_bytes(self) -> int:
        """Shared memory of a block."""

    @property
    @abstractmethod
    def box(self) -> tuple[int, int]:
        """Units and tiles of a copy of plain rows."""

    @property
    @abstractmethod
    def settings(self) -> Mapping[str, int]:
        """The kernel arguments that divide the work."""

    @property
    def n_partial(self) -> int:
        """Float32 values of workspace that ``call`` needs."""
        return 0

    @property
    def n_counters(self) -> int:
        """Counters that ``call`` needs."""
        return 0

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """All kernels that it launches."""
        return (self.kernel,)

    @property
    def stores_operand(self) -> bool:
        """Whether its result is stored as the operand of the matrix product that follows."""
        return False

    @property
    def dtype(self) -> torch.dtype:
        """Element type of y."""
        return torch.float32 if self.epilogue == "logits" else torch.bfloat16

    @property
    def width(self) -> int:
        """Output features of y."""
        return self.form.n // 2 if self.form.paired else self.form.n

    def call(
        self,
        x: Tensor | PrescaledInput,
        y: Tensor,
        weight: Tensor,
        scale_N: Tensor | None = None,
        features_K: Tensor | None = None,
        *,
        bias_N: Tensor | None = None,
        residual: Tensor | None = None,
        first: int = 0,
        gate: Tensor | None = None,
        norm_epilogue: NormEpilogue | None = None,
        best: tuple[Tensor, Tensor] | None = None,
        n_best: int | None = None,
        prefetch: Prefetch | None = None,
        partial: Tensor | None = None,
        counters: Tensor | None = None,
        operand: Tensor | None = None,
        next_operand: NextOperand | None = None,
    ) -> Call:
        """Returns the launch that computes ``y``; see ``reference.fused_linear``.

        Args:
            x: bfloat16 [M, K]; with a norm, the prescaled input.
            y: [M, width], written: float32 for ``logits``, else bfloat16. May be ``residual``. For
                ``part`` it is wider, and only the features from ``first`` on are written.
            weight: As ``packing.pack`` returns it.
            scale_N: float32 scales of an eight-bit weight.
            features_K: int32, for a permuted weight: the feature of x for each column.
            bias_N: bfloat16, in the order of the weight before packing.
            residual: bfloat16, shaped like ``y``; ``plain`` and ``swiglu`` add it.
            first: For ``part``: the first feature of ``y`` that is written.
            gate: For ``gated``: float32, shaped like ``y``.
            norm_epilogue: Epilogue of the norm whose input is ``y``; for ``plain``.
            best: For ``logits``, written: float32 and int32 [M, candidates], the largest logit of
                each part of the vocabulary and its output feature. A NaN counts as larger than any
                number.
            n_best: ``best`` is taken among the first ``n_best`` features; None for all.
            prefetch: A part of a later matrix product's weight.
            partial: Workspace of ``n_partial`` float32 values.
            counters: ``n_counters`` int32 zeros, which are zeros again afterwards.
            operand: x as ``WidePlan.staging``, or the kernel that computes x, stored it.
            next_operand: With ``stores_operand``, written: of ``swiglu`` in the place of ``y``, of
                ``plain`` in the place of the norm epilogue's prescaled input.
        """
        prescaled = x if isinstance(x, PrescaledInput) else None
        x_MK = x.x if isinstance(x, PrescaledInput) else x
        assert (prescaled is not None) == self.norm, "with a norm, x is a prescaled input"
        assert x_MK.shape == (self.rows, self.form.k), f"x is {tuple(x_MK.shape)}"
        is_part = self.epilogue == "part"
        assert len(y) == self.rows, f"y is {tuple(y.shape)}"
        assert y.shape[1] >= first + self.width if is_part else y.shape[1] == self.width, "width"
        assert x_MK.dtype == torch.bfloat16, f"x is {x_MK.dtype}"
        assert y.dtype == self.dtype, f"y is {y.dtype}"
        assert weight.nbytes == self.form.nbytes, f"{weight.nbytes} bytes for {self.form}"
        assert (scale_N is not None) == self.form.has_channel_scales, (
            "has_channel_scales decides whether there is scale_N"
        )
        assert (features_K is not None) == self.form.permuted, (
            "only permuted weights have features_K"
        )
        assert residual is None or residual.shape == y.shape, "the tensor must have the shape of y"
        assert residual is None or self.epilogue in ("plain", "swiglu"), (
            "only plain and swiglu add a residual"
        )
        assert (gate is not None) == (self.epilogue == "gated"), "only gated results have a gate"
        assert gate is None or (gate.shape, gate.dtype) == (y.shape, torch.float32), (
            "the tensor must have the shape of y"
        )
        next_norm: dict[str, Tensor | None] = dict.fromkeys(NormEpilogue.ARGUMENTS)
        if norm_epilogue is not None:
            assert self.epilogue == "plain", "only plain results have a norm epilogue"
            assert norm_epilogue.prescaled.x.shape == y.shape, "the tensor must have the shape of y"
            next_norm |= norm_epilogue.arguments()
        assert best is None or self.epilogue == "logits", "only logits have a best"
        assert self.n_partial <= (0 if partial is None else partial.numel()), (
            "the workspace is too small"
        )
        assert self.n_counters <= (0 if counters is None else counters.numel()), "too few counters"
        assert x_MK.data_ptr() % 16 == 0, "x is read 16 bytes at a time"
        assert (next_operand is not None) == self.stores_operand, (
            "stores_operand decides whether there is a next_operand"
        )
        next_args, next_tensors = NextOperand.arguments_of(next_operand)
        args, tensors = LinearArguments.of(
            weight=weight,
            scale=scale_N,
            x=x_MK,
            operand=operand,
            squares=prescaled.squares if prescaled else None,
            bias=bias_N,
            residual=residual,
            y=y,
            **next_norm,
            best_value=best[0] if best else None,
            best_index=best[1] if best else None,
            partial=partial if self.n_partial else None,
            counters=counters if self.n_counters else None,
            rows=self.rows,
            n=self.form.n,
            k=self.form.k,
            n_best=self.form.n if n_best is None else n_best,
            tiles=self.form.tiles,
            units=self.form.units,
            tile_stride=tile_stride(self.form, weight),
            parts=self.tuning.warps,
            **self.settings,
            **(prefetch.arguments() if prefetch else _NO_PREFETCH),
            eps=prescaled.eps if prescaled else 0.0,
            y_width=y.shape[1],
            y_first=first,
            gate=gate,
            features=features_K,
            next_operand=next_args,
        )
        tensors += next_tensors
        tensor_map = None
        if self.form.plain_rows:
            units, tiles = self.box
            tensor_map = TensorMap.of_plain_rows(self.form, weight, units=units, tiles=tiles)
        return Call(
            kernel=self.kernel,
            grid=(self.blocks, 1, 1),
            shared_bytes=self.shared_bytes,
            args=args if tensor_map is None else PlainRowsArguments(linear=args),
            tensors=tensors,
            tensor_map=tensor_map,
        )

    @property
    def args_struct(self) -> str:
        """The argument struct of the kernel."""
        return "PlainRowsArgs" if self.form.plain_rows else "LinearArgs"


@dataclass(frozen=True, kw_only=True)
class LinearPlan(GemmPlan):
    """A matrix product by ``linear.cu``."""

    @property
    def octets(self) -> int:
        """Octets of rows of the kernel's instance."""
        return next(c for c in (1, 2, 4, 8) if self.rows <= 8 * c)

    @property
    def max_two_rows(self) -> bool:
        """Whether the instance is for at most two rows, which takes fewer registers."""
        return self.rows <= 2

    @property
    def items(self) -> int:
        """Items of work; an item is the tiles that a warp computes together."""
        return -(-self.form.tiles // self._fitted.tiles)

    @property
    def blocks(self) -> int:
        """Blocks of the grid."""
        return min(self.items, self.limits.n_sms)

    @property
    def candidates(self) -> int:
        """Parts of the vocabulary: one for each block."""
        return self.blocks

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block; see ``Layout``."""
        return self._fitted.shared_bytes

    @property
    def settings(self) -> Mapping[str, int]:
        """The kernel arguments that divide the ring."""
        layout = self._fitted
        ring = {"stages": layout.stages, "units_per_stage": layout.units_per_stage}
        others = {"source_rows": layout.source_rows, "early_stages": layout.early_stages}
        return {"splits": 1, "part_stages": 0, **ring, **others}

    @property
    def box(self) -> tuple[int, int]:
        """Units and tiles of a stage of a warp's ring."""
        return self._fitted.units_per_stage, self._fitted.tiles

    @property
    def tiles_in_flight(self) -> int:
        """Tiles, partial ones included, whose copies a block issues before the first arrives."""
        layout = self._fitted
        units = layout.stages * layout.units_per_stage * layout.tiles * self.tuning.warps
        return -(-units // self.form.units)

    @cached_property
    def layout(self) -> Layout | None:
        """The layout by ``tuning``, reduced to fit the device; None if no layout fits.

        A layout is reduced by fewer or shorter copies, or by not staging x. With too many rows, no
        layout fits.
        """
        t = self.tuning
        for staged, tiles, units, pairs in self._divisions():
            copies = t.warps * tiles * units * self.form.unit_bytes
            source = self._source_rows if staged else 0
            rest = self._bytes_beside_ring(tiles) + 2 * self.form.k * source
            rest += self._staged_bytes if staged else 0
            rest += self.form.pair_table_bytes if pairs else 0
            # Each stage has one barrier per warp.
            room = (self.limits.shared_bytes - rest) // (copies + 8 * t.warps)
            if room >= 2:
                stages = min(room, max(2, t.ring_bytes // copies))
                if not staged and self.octets == 1:
                    stages = min(stages, DIRECT_STAGES)
                ring = stages * (copies + 8 * t.warps)
                early = stages - 1 if t.early_stages is None else t.early_stages
                return Layout(
                    stages=stages,
                    early_stages=min(early, stages - 1),
                    units_per_stage=units,
                    staged=staged,
                    tiles=tiles,
                    source_rows=source,
                    pair_table=pairs,
                    shared_bytes=max(-(-(ring + rest) // 16) * 16, self.limits.exclusive_bytes),
                )
        return None

    def _divisions(self) -> Iterator[tuple[bool, int, int, bool]]:
        """Yields ways to divide shared memory, the best one first.

        Each is (whether to stage x, tiles and units of a copy, whether to have a table of pairs).
        """
        if self.max_two_rows and self.form.pair_table_bytes:
            yield from ((*choice, True) for choice in self._without_table() if choice[0])
        yield from ((*choice, False) for choice in self._without_table())

    def _without_table(self) -> Iterator[tuple[bool, int, int]]:
        t = self.tuning
        if self._staged_bytes <= t.staged_bytes:
            yield from ((True, t.tiles, units) for units in range(t.units_per_stage, 0, -1))
        # x that is not staged is read again for every item, so fewer and larger items are better.
        share = -(-self.form.tiles // self.limits.n_sms)
        together = max(t.tiles, min(share, MAX_ACCUMULATORS // self.octets))
        for tiles in range(together, t.tiles - 1, -1):
            longest = t.units_per_stage
            if self.octets == 1:  # copies stay as short, because loads of x queue behind them
                longest = max(1, longest * t.tiles // tiles)
            yield from ((False, tiles, units) for units in range(longest, 0, -1))

    @property
    def _source_rows(self) -> int:
        if not self.form.permuted:
            return 0
        return min(self.rows, max(1, SOURCE_BYTES // (2 * self.form.k)))

    @property
    def _staged_bytes(self) -> int:
        blocks = self._units_of_warp * (self.form.unit_k // SLICE) | 1
        return self.tuning.warps * self.rows * blocks * SLICE * 2

    def _bytes_beside_ring(self, tiles: int) -> int:
        t = self.tuning
        sums = 16 * _BUFFERS * t.warps * tiles * self.octets * 32
        barriers = 8 * (2 * _BUFFERS + self.form.permuted)
        per_warp = 1 if self.form.needs_sums else 0
        if self.form.group_size:
            per_warp = self._units_of_warp * self.form.unit_k // self.form.group_size
        x_sums = 4 * t.warps * per_warp * 8 * self.octets
        factors = 4 * 8 * self.octets
        return sums + factors + barriers + 16 + x_sums

    @property
    def _units_of_warp(self) -> int:
        return -(-self.form.units // self.tuning.warps)

    @property
    def _fitted(self) -> Layout:
        assert self.layout is not None, f"{self.rows} rows do not fit {self.limits}"
        return self.layout

    @property
    def _input(self) -> _Input:
        if not self._fitted.staged:
            return "direct"
        all_bytes = 2 * 8 * self.octets * self.form.k  # of the most rows of the instance
        in_parts = not (self.max_two_rows or self.form.permuted)
        return "in_parts" if in_parts and all_bytes <= self.tuning.part_bytes else "at_once"

    @cached_property
    def kernel(self) -> Kernel:
        """The instance of ``linear.cu``."""
        form, t = self.form, self.tuning
        x, tiles = self._input, self._fitted.tiles
        few, norm = (str(flag).lower() for flag in (self.max_two_rows, self.norm))
        struct = f"PairTable<{form.struct}>" if self._fitted.pair_table else form.struct
        function = (
            f"linear<{struct}, {t.warps}, {tiles}, {self.octets}, {few}, "
            f"{EPILOGUES[self.epilogue]}, {norm}, {_INPUTS[x]}>"
        )
        octets = f"{self.octets}{'few' if self.max_two_rows else ''}"
        features = f"{'norm_' if self.norm else ''}{self.epilogue}"
        features += "" if x == "at_once" else f"_{x}"
        features += "_pairs" if self._fitted.pair_table else ""
        return Kernel(
            name=f"linear_{form.label}_{features}_w{t.warps}t{tiles}c{octets}",
            file="linear.cu",
            function=function,
            args=self.args_struct,
            threads=32 * (t.warps + 1),
        )
