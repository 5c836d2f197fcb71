"""How ``linear.cu`` is launched: for which weight, with how many rows, and which epilogue.

``Tuning`` is what can be chosen for speed. Some of it decides the order of sums, and with it the
bits of a result: it belongs to a weight, whatever the number of rows.

Shape letters: M rows, N output features, K input features, G groups along K.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hotloop.kernels.cuda.compile import Kernel
from hotloop.kernels.cuda.launch import Arguments, Call, Limits
from hotloop.kernels.cuda.packing import BLOCK, TILE_ROWS, Format

Epilogue = Literal["plain", "swiglu", "logits"]
_EPILOGUES: dict[Epilogue, str] = {"plain": "kPlain", "swiglu": "kSwiGLU", "logits": "kLogits"}

MAX_ROWS = 64
MAX_TOGETHER = 4
"""Tiles of eight rows that a warp has registers for."""

DIRECT_STAGES = 3
"""The most copies on their way where eight rows of x come from the L2 cache after them."""

_BUFFERS = 2  # kBuffers of linear.cu


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a launch can choose for speed; what does not fit the device is made smaller.

    Attributes:
        warps: Warps of a block that share K. Decides the order of sums.
        tiles: Tiles that a warp computes together.
        units_per_stage: The most units of one copy.
        ring_bytes: Shared memory for weights on their way, of a block.
        staged_bytes: Up to how many bytes of x a block keeps in shared memory.
    """

    warps: int = 8
    tiles: int = 1
    units_per_stage: int = 2
    ring_bytes: int = 96 * 1024
    staged_bytes: int = 160 * 1024


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a block divides its shared memory.

    Attributes:
        stages: Copies on their way, of a warp.
        units_per_stage: Units of a copy.
        staged: The block keeps x there.
        tiles: Tiles that a warp computes together.
        shared_bytes: In all. At least so many that no multiprocessor takes two such blocks: the
            next kernel's begins when one ends, just when memory would be idle.
    """

    stages: int
    units_per_stage: int
    staged: bool
    tiles: int
    shared_bytes: int


@dataclass(frozen=True, kw_only=True)
class Normed:
    """A norm's input as a product takes it; the product applies what is missing to its sums.

    Attributes:
        x: bfloat16 [M, K], the norm's input times its weight.
        squares: float32 [M, K / 16 rounded up]: what squares of the input add up to, 16 at a time.
        eps: Of the norm.
    """

    x: Tensor
    squares: Tensor
    eps: float

    @classmethod
    def empty(cls, rows: int, k: int, eps: float, device: torch.device) -> Normed:
        """Room for it."""
        return cls(
            x=torch.empty(rows, k, dtype=torch.bfloat16, device=device),
            squares=torch.empty(rows, -(-k // TILE_ROWS), dtype=torch.float32, device=device),
            eps=eps,
        )

    def rows(self, rows: slice) -> Normed:
        """Some rows of it."""
        return Normed(x=self.x[rows], squares=self.squares[rows], eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class Onward:
    """What else to make of a result that goes into a norm next.

    Attributes:
        weight: bfloat16 [N], the norm's.
        normed: Written.
    """

    ARGUMENTS: ClassVar = ("norm", "next_x", "next_squares")

    weight: Tensor
    normed: Normed

    def arguments(self) -> dict[str, Tensor]:
        """By ``ARGUMENTS``, the names of fields of arguments."""
        tensors = (self.weight, self.normed.x, self.normed.squares)
        return dict(zip(self.ARGUMENTS, tensors, strict=True))

    def rows(self, rows: slice) -> Onward:
        """Some rows of it."""
        return Onward(weight=self.weight, normed=self.normed.rows(rows))


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """What of a later product's weight comes into the L2 cache while memory has little to do.

    Every block of a grid asks for as many tiles; block b's are b further on than the first one's.

    Attributes:
        weight: As ``packing.pack`` made it.
        form: Its format.
        first: Of the first block, which tile comes first.
        step: Tiles between one of a block's and the next one.
        tiles: How many a block asks for.
        tile_bytes: Of each, from its beginning, a multiple of 16.
        items_left: When: a block has so many pieces of work left.
    """

    ARGUMENTS: ClassVar = (
        *("ahead", "ahead_n", "ahead_stride", "ahead_first", "ahead_step"),
        *("ahead_tiles", "ahead_tile_bytes", "ahead_items_left"),
    )

    weight: Tensor
    form: Format
    first: int
    step: int = 1
    tiles: int = 1
    tile_bytes: int
    items_left: int

    def arguments(self) -> dict[str, Tensor | int]:
        """By ``ARGUMENTS``, the names of fields of arguments."""
        whole = self.form.units * self.form.unit_bytes
        assert self.weight.nbytes == self.form.nbytes, f"{self.weight.nbytes} for {self.form}"
        assert self.weight.data_ptr() % 16 == 0, "read 16 bytes at a time"
        assert 0 < self.tile_bytes <= whole, f"{self.tile_bytes} of a tile's {whole} bytes"
        assert self.tile_bytes % 16 == 0, f"{self.tile_bytes} bytes, 16 at a time"
        values = (self.weight, self.form.tiles, whole, self.first, self.step)
        how = (self.tiles, self.tile_bytes, self.items_left)
        return dict(zip(self.ARGUMENTS, (*values, *how), strict=True))


_NOTHING_AHEAD = {"ahead": None, **dict.fromkeys(Ahead.ARGUMENTS[1:], 0)}


class LinearArguments(Arguments):
    """``LinearArgs`` of ``linear.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "x", "squares", "bias")),
        *((name, ctypes.c_void_p) for name in ("residual", "y", "norm", "next_x", "next_squares")),
        *((name, ctypes.c_void_p) for name in ("best_value", "best_index", "ahead")),
        *((name, ctypes.c_int) for name in ("rows", "n", "k", "n_best", "tiles", "units")),
        *((name, ctypes.c_int) for name in ("stages", "units_per_stage", *Ahead.ARGUMENTS[1:])),
        ("eps", ctypes.c_float),
    )


@dataclass(frozen=True, kw_only=True)
class LinearPlan:
    """A product for one weight format, number of rows and epilogue, on one kind of device.

    Attributes:
        form: The weight's format.
        rows: M, up to 64.
        epilogue: ``plain`` (bfloat16, with a residual where one is given), ``swiglu`` (bfloat16,
            of a paired weight) or ``logits`` (float32, with each block's best where asked for).
        norm: x comes as ``Normed``: the factor of each row is applied to the sums.
        tuning: What was chosen for speed.
        limits: Of the device.
    """

    form: Format
    rows: int
    epilogue: Epilogue = "plain"
    norm: bool = False
    tuning: Tuning = Tuning()
    limits: Limits

    def __post_init__(self) -> None:
        assert 1 <= self.rows <= MAX_ROWS, f"{self.rows} rows"
        assert self.form.paired == (self.epilogue == "swiglu"), "swiglu, and it alone, pairs"

    @property
    def columns(self) -> int:
        """Groups of eight rows that the kernel is made for."""
        return next(c for c in (1, 2, 4, 8) if self.rows <= 8 * c)

    @property
    def few(self) -> bool:
        """Whether the kernel is made for two rows at most, which takes fewer registers."""
        return self.rows <= 2

    @property
    def items(self) -> int:
        """Pieces of work: as many tiles each as a warp computes together."""
        return -(-self.form.tiles // self._fitted.tiles)

    @property
    def blocks(self) -> int:
        """Blocks of the grid."""
        return min(self.items, self.limits.n_sms)

    @property
    def tiles_on_their_way(self) -> int:
        """Of a block, that it asks for before it has any; one of which it has a part counts."""
        layout = self._fitted
        units = layout.stages * layout.units_per_stage * layout.tiles * self.tuning.warps
        return -(-units // self.form.units)

    @cached_property
    def layout(self) -> Layout | None:
        """As asked for where that fits the device: else with fewer or shorter copies, or none of x.

        None if nothing fits: the rows are too many.
        """
        t = self.tuning
        for staged, tiles, units in self._ways():
            copies = t.warps * tiles * units * self.form.unit_bytes
            rest = self._bytes_beside_ring(tiles) + (self._staged_bytes if staged else 0)
            # Each stage has a barrier per warp.
            room = (self.limits.shared_bytes - rest) // (copies + 8 * t.warps)
            if room >= 2:
                stages = min(room, max(2, t.ring_bytes // copies))
                if not staged and self.columns == 1:
                    stages = min(stages, DIRECT_STAGES)
                ring = stages * (copies + 8 * t.warps)
                return Layout(
                    stages=stages,
                    units_per_stage=units,
                    staged=staged,
                    tiles=tiles,
                    shared_bytes=max(-(-(ring + rest) // 16) * 16, self.limits.alone_bytes),
                )
        return None

    def _ways(self) -> Iterator[tuple[bool, int, int]]:
        """Whether to stage x, and tiles and units of a copy: the best first."""
        t = self.tuning
        if self._staged_bytes <= t.staged_bytes:
            yield from ((True, t.tiles, units) for units in range(t.units_per_stage, 0, -1))
        # x that is not staged is read for every item: better few of them, and all tiles together.
        share = -(-self.form.tiles // self.limits.n_sms)
        together = max(t.tiles, min(share, MAX_TOGETHER // self.columns))
        for tiles in range(together, t.tiles - 1, -1):
            longest = t.units_per_stage
            if self.columns == 1:  # copies become no longer by that, as x comes after them
                longest = max(1, longest * t.tiles // tiles)
            yield from ((False, tiles, units) for units in range(longest, 0, -1))

    @property
    def _staged_bytes(self) -> int:
        blocks = self._units_of_warp * (self.form.unit_k // BLOCK) | 1
        return self.tuning.warps * self.rows * blocks * BLOCK * 2

    def _bytes_beside_ring(self, tiles: int) -> int:
        t = self.tuning
        sums = 16 * _BUFFERS * t.warps * tiles * self.columns * 32
        barriers = 8 * 2 * _BUFFERS
        per_warp = 1 if self.form.kind == "int8" else 0
        if self.form.group_size:
            per_warp = self._units_of_warp * self.form.unit_k // self.form.group_size
        x_sums = 4 * t.warps * per_warp * 8 * self.columns
        factors = 4 * 8 * self.columns
        return sums + factors + barriers + 16 + x_sums

    @property
    def _units_of_warp(self) -> int:
        return -(-self.form.units // self.tuning.warps)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of y."""
        return torch.float32 if self.epilogue == "logits" else torch.bfloat16

    @property
    def width(self) -> int:
        """Output features of y."""
        return self.form.n // 2 if self.form.paired else self.form.n

    @property
    def _fitted(self) -> Layout:
        assert self.layout is not None, f"{self.rows} rows do not fit {self.limits}"
        return self.layout

    @cached_property
    def kernel(self) -> Kernel:
        """The instance of ``linear.cu``."""
        form, t = self.form, self.tuning
        staged, tiles = self._fitted.staged, self._fitted.tiles
        few, norm, in_shared = (str(flag).lower() for flag in (self.few, self.norm, staged))
        function = (
            f"linear<{form.struct}, {t.warps}, {tiles}, {self.columns}, {few}, "
            f"{_EPILOGUES[self.epilogue]}, {norm}, {in_shared}>"
        )
        columns = f"{self.columns}{'few' if self.few else ''}"
        features = f"{'norm_' if self.norm else ''}{self.epilogue}{'' if staged else '_direct'}"
        return Kernel(
            name=f"linear_{form.label}_{features}_w{t.warps}t{tiles}c{columns}",
            file="linear.cu",
            function=function,
            args="LinearArgs",
            threads=32 * (t.warps + 1),
        )

    def call(
        self,
        x: Tensor | Normed,
        y: Tensor,
        weight: Tensor,
        scale_N: Tensor | None = None,
        *,
        bias_N: Tensor | None = None,
        residual: Tensor | None = None,
        onward: Onward | None = None,
        best: tuple[Tensor, Tensor] | None = None,
        n_best: int | None = None,
        ahead: Ahead | None = None,
    ) -> Call:
        """The launch that computes ``y``; see ``reference.fused_linear``.

        Args:
            x: bfloat16 [M, K]; with a norm, its input on the way.
            y: [M, width]: float32 for ``logits``, else bfloat16. May be ``residual``.
            weight: As ``packing.pack`` made it.
            scale_N: float32 scales of an eight-bit weight.
            bias_N: bfloat16, in the order of the weight before packing.
            residual: bfloat16, like ``y``, which it is added to.
            onward: For ``plain``: what else to make of ``y``.
            best: For ``logits``: float32 and int32 [M, blocks], the largest logit of each block
                and where it is, among the first ``n_best``, or all. NaNs are never the largest.
            n_best: See ``best``.
            ahead: What of a later product's weight comes into the L2 cache meanwhile.
        """
        layout = self._fitted
        normed = x if isinstance(x, Normed) else None
        x_MK = x.x if isinstance(x, Normed) else x
        assert (normed is not None) == self.norm, "a norm's input comes with its squares"
        assert x_MK.shape == (self.rows, self.form.k), f"x is {tuple(x_MK.shape)}"
        assert y.shape == (self.rows, self.width), f"y is {tuple(y.shape)}"
        assert x_MK.dtype == torch.bfloat16, f"x is {x_MK.dtype}"
        assert y.dtype == self.dtype, f"y is {y.dtype}"
        assert weight.nbytes == self.form.nbytes, f"{weight.nbytes} bytes for {self.form}"
        assert (scale_N is not None) == (self.form.kind in ("fp8", "int8")), "a scale per output"
        assert residual is None or residual.shape == y.shape, "like y"
        assert residual is None or self.epilogue != "logits", "logits have no residual"
        assert onward is None or self.epilogue == "plain", "only plain results go into a norm"
        assert onward is None or onward.normed.x.shape == y.shape, "like y"
        assert best is None or self.epilogue == "logits", "logits alone have a best"
        assert x_MK.data_ptr() % 16 == 0, "x is read 16 bytes at a time"
        args, tensors = LinearArguments.of(
            weight=weight,
            scale=scale_N,
            x=x_MK,
            squares=normed.squares if normed else None,
            bias=bias_N,
            residual=residual,
            y=y,
            **(onward.arguments() if onward else dict.fromkeys(Onward.ARGUMENTS)),
            best_value=best[0] if best else None,
            best_index=best[1] if best else None,
            rows=self.rows,
            n=self.form.n,
            k=self.form.k,
            n_best=self.form.n if n_best is None else n_best,
            tiles=self.form.tiles,
            units=self.form.units,
            stages=layout.stages,
            units_per_stage=layout.units_per_stage,
            **(ahead.arguments() if ahead else _NOTHING_AHEAD),
            eps=normed.eps if normed else 0.0,
        )
        return Call(
            kernel=self.kernel,
            grid=(self.blocks, 1, 1),
            shared_bytes=layout.shared_bytes,
            args=args,
            tensors=tensors,
        )


def plan_rows(
    form: Format,
    rows: int,
    epilogue: Epilogue = "plain",
    *,
    norm: bool,
    tuning: Tuning,
    limits: Limits,
) -> list[tuple[slice, LinearPlan]]:
    """Plans for any number of rows: as many at a time as the device takes."""

    def plan(n: int) -> LinearPlan:
        return LinearPlan(
            form=form, rows=n, epilogue=epilogue, norm=norm, tuning=tuning, limits=limits
        )

    at_once = next((n for n in (64, 32, 16) if plan(min(n, rows)).layout is not None), 8)
    firsts = range(0, rows, at_once)
    return [(slice(i, i + at_once), plan(min(at_once, rows - i))) for i in firsts]
