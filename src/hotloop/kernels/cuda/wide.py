"""Launches of ``wide.cu``, the matrix product with up to 64 rows.

A result has the bits that ``linear.cu`` gives: ``Tuning.warps`` of the weight is the number of
parts into which K is divided. ``WideTuning`` affects only speed.

Shape letters: M rows, N output features, K input features.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hotloop.kernels.cuda.compile import Kernel
from hotloop.kernels.cuda.launch import Arguments, Call
from hotloop.kernels.cuda.linear import EPILOGUES, GemmPlan, NextOperand, PrescaledInput
from hotloop.kernels.cuda.packing import HALF_SLICE, TILE_ROWS, Format, Kind

WARPS = 8  # kWarps of wide.cu
OCTETS = (2, 4, 8)  # of its instances
_LOADERS = 4  # kLoaders
_BOX_TILES = 2  # kBoxTiles
_LINE = 64  # kLineK

_ONES = 0x3F803F80
_INPUT_SCALES: dict[Kind, tuple[int, int]] = {
    "bf16": (_ONES, _ONES),
    "lut4": (_ONES, _ONES),
    "fp8": (0x5D805D80, 0x5D805D80),
    "int8": (0x60806080, 0x60806080),
    "nested": (0x60806080, 0x60806080),
    "int4": (0x60806080, 0x5E805E80),
    "uint4": (0x60806080, 0x5E805E80),
}
_E2M1_SCALE = 0x5F005F00  # of a table that is e2m1


class StagingArguments(Arguments):
    """``StagingArgs`` of ``wide.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "squares", "operand")),
        *((name, ctypes.c_int) for name in ("rows", "k", "units", "parts", "part_stages")),
        ("eps", ctypes.c_float),
        ("features", ctypes.c_void_p),
    )


@dataclass(frozen=True, kw_only=True)
class WideTuning:
    """Parameters that are chosen for speed.

    Attributes:
        tiles: Tiles of each warp, 1 or 2.
        splits: Blocks that share K; at most as many as it has parts.
        ring_bytes: The most shared memory of a block for copies in flight.
        early_bytes: Bytes of weights that a block issues before it waits for x, in whole stages.
        pairs: A stage has two units of a tile: of a weight with groups whose units lie together.
        direct: The kernel computes sums of x and the factors of a norm itself, so that the kernel
            that computes x can store it; see ``wide.cu``. Plain rows require it.
    """

    tiles: int = 1
    splits: int = 1
    ring_bytes: int = 1 << 20
    early_bytes: int = 1 << 20
    pairs: bool = False
    direct: bool = False


@dataclass(frozen=True, kw_only=True)
class WidePlan(GemmPlan):
    """A matrix product by ``wide.cu``, which needs a device with ``Limits.warpgroups``.

    Attributes:
        wide: Parameters chosen for speed.
        has_next: The result is stored as the operand of the next matrix product: the result of
            ``swiglu``, or with ``plain`` the prescaled input of the norm epilogue.
    """

    wide: WideTuning = WideTuning()
    has_next: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        assert not self.has_next or self.epilogue in ("plain", "swiglu"), f"{self.epilogue}"
        assert 1 <= self.wide.splits <= self.tuning.warps, "each split has a part of K"
        assert not self.wide.pairs or pairs_units(self.form), f"pairs of {self.form}"
        assert not self.wide.direct or can_be_direct(self.form), f"{self.form} needs staged sums"

    @property
    def octets(self) -> int:
        """Octets of rows of the kernel's instance."""
        return next(c for c in OCTETS if self.rows <= 8 * c)

    @property
    def groups(self) -> int:
        """Groups of tiles; a block computes a group together."""
        return -(-self.form.tiles // (WARPS * self.wide.tiles))

    @property
    def blocks(self) -> int:
        """Blocks of the grid."""
        return min(self.groups * self.wide.splits, self.limits.n_sms)

    @property
    def candidates(self) -> int:
        """The number of warps that multiply, over all blocks."""
        return self.blocks * WARPS

    @property
    def n_partial(self) -> int:
        """Workspace for the sums of all parts, if blocks share K; in float32 values."""
        sums = self.form.tiles * self.tuning.warps * TILE_ROWS * 8 * self.octets
        return sums if self.wide.splits > 1 else 0

    @property
    def n_counters(self) -> int:
        """Counters: one for each group and warp, if blocks share K."""
        return self.groups * WARPS if self.wide.splits > 1 else 0

    @property
    def stages(self) -> int:
        """Stages of the ring: as many as fit, at least two."""
        rest = self._bytes_beside_ring
        each = self._stage_bytes + self._barrier_bytes
        stages = min(self.limits.shared_bytes - rest, max(self.wide.ring_bytes, 2 * each)) // each
        assert stages >= 2, f"{self} does not fit"
        return stages

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: enough that a multiprocessor holds only one; see ``Layout``."""
        used = self._bytes_beside_ring + self.stages * (self._stage_bytes + self._barrier_bytes)
        return max(used, self.limits.exclusive_bytes)

    @property
    def box(self) -> tuple[int, int]:
        """The units of a stage, and tiles."""
        return self._stage_units, _BOX_TILES

    @property
    def settings(self) -> Mapping[str, int]:
        """The kernel arguments that divide the ring, and K among blocks."""
        ring = {"stages": self.stages, "units_per_stage": self._stage_units}
        split = {"splits": self.wide.splits, "part_stages": self.part_stages}
        early = max(1, min(self.stages, self.wide.early_bytes // self._weight_bytes))
        return {**split, **ring, "source_rows": 0, "early_stages": early}

    @property
    def part_stages(self) -> int:
        """Stages of a part of K, at most."""
        units = -(-self.form.units // self.tuning.warps)
        return -(-units // self._stage_units)

    @property
    def operand_bytes(self) -> int:
        """Bytes of x, and of a norm's factors if ``staging`` stores them."""
        factors = self._factor_bytes if self._stages_factors else 0
        return self.tuning.warps * self.part_stages * self._x_bytes + factors

    @property
    def is_direct(self) -> bool:
        """``kDirect`` of ``wide.cu``."""
        return self.wide.direct or self.form.plain_rows

    @property
    def _stages_factors(self) -> bool:
        return self.norm and not self.is_direct

    @property
    def stores_operand(self) -> bool:
        """See ``GemmPlan``."""
        return self.has_next

    @property
    def is_staged_before(self) -> bool:
        """Whether the kernel that computes x stores it as the operand, instead of ``staging``.

        That kernel gathers no columns. It cannot store the zeros of padding, or those that fill the
        incomplete stages of a weight without groups.
        """
        form, parts, step = self.form, self.tuning.warps, self._stage_units
        if not self.is_direct or form.permuted or form.k != form.units * form.unit_k:
            return False
        firsts = (form.units * part // parts for part in range(parts + 1))
        return form.group_size is not None or all(unit % step == 0 for unit in firsts)

    def next_operand(self, operand: Tensor) -> NextOperand:
        """Returns the description of ``operand`` for the kernel that computes x.

        Args:
            operand: ``operand_bytes`` bytes, to be written.
        """
        assert self.is_staged_before, f"the staging kernel stores x for {self}"
        assert operand.nbytes >= self.operand_bytes, f"{operand.nbytes} bytes"
        return NextOperand(
            operand=operand,
            units=self.form.units,
            unit_k=self.form.unit_k,
            parts=self.tuning.warps,
            part_stages=self.part_stages,
            stage_units=self._stage_units,
            rows=8 * self.octets,
            scales=_input_scales(self.form),
        )

    def staging(
        self, x: Tensor | PrescaledInput, operand: Tensor, features_K: Tensor | None = None
    ) -> Call:
        """Returns the launch that stores x for ``call``.

        Args:
            x: bfloat16 [M, K]; with a norm, the prescaled input.
            operand: Written: ``operand_bytes``.
            features_K: See ``call``.
        """
        prescaled = x if isinstance(x, PrescaledInput) else None
        assert (prescaled is not None) == self.norm, "with a norm, x is a prescaled input"
        assert operand.nbytes >= self.operand_bytes, f"{operand.nbytes} bytes"
        args, tensors = StagingArguments.of(
            x=x.x if isinstance(x, PrescaledInput) else x,
            squares=prescaled.squares if prescaled and self._stages_factors else None,
            operand=operand,
            rows=self.rows,
            k=self.form.k,
            units=self.form.units,
            parts=self.tuning.warps,
            part_stages=self.part_stages,
            eps=prescaled.eps if prescaled else 0.0,
            features=features_K,
        )
        one_sum = self.form.needs_sums and self.form.group_size is None  # of a whole part
        pieces = 1 if one_sum else self.part_stages * (2 if self.wide.pairs else 1)
        kernel = self.staging_kernel
        return Call(
            kernel=kernel,
            grid=(
                pieces + self._stages_factors,
                self.tuning.warps,
                32 * self.octets // kernel.threads,
            ),
            shared_bytes=0,
            args=args,
            tensors=tensors,
        )

    @property
    def staging_kernel(self) -> Kernel:
        """The kernel of ``staging``."""
        return Kernel(
            name=f"stage_x_{self.form.label}{_label(self._layout)}_c{self.octets}",
            file="wide.cu",
            function=f"stage_x<{self.form.struct}, {self.octets}, {_switches(self._layout)}>",
            args="StagingArgs",
            threads=32 * min(self.octets, 4),
        )

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The kernels of ``staging`` and of ``call``."""
        return self.staging_kernel, self.kernel

    @property
    def _stage_units(self) -> int:
        """Units of a tile in a stage, ``kUnits`` of ``wide.cu``."""
        return 2 if self.wide.pairs else max(1, _LINE // self.form.unit_k)

    @property
    def _x_bytes(self) -> int:
        """``StageOf::kBytes`` of ``wide.cu``: x and sums of x in a stage."""
        form, rows, k = self.form, 8 * self.octets, self._stage_units * self.form.unit_k
        groups = k // form.group_size if form.group_size else 1
        return 2 * rows * k + (4 * rows * groups if form.needs_sums and not self.is_direct else 0)

    @property
    def _stage_bytes(self) -> int:
        """``kStageBytes`` of ``wide.cu``: x and weights."""
        return -(-(self._x_bytes + self._weight_bytes) // 1024) * 1024

    @property
    def _weight_bytes(self) -> int:
        """Bytes of weights in a stage."""
        return WARPS * self.wide.tiles * self._stage_units * self.form.unit_bytes

    @property
    def _barrier_bytes(self) -> int:
        """The two barriers of a stage."""
        return 8 * 2

    @property
    def _bytes_beside_ring(self) -> int:
        rows, tiles = 8 * self.octets, WARPS * self.wide.tiles
        totals = 4 * tiles * TILE_ROWS * rows if self.wide.splits == 1 else 0
        best = 8 * WARPS * rows if self.epilogue == "logits" else 0
        computes_factors = self.norm and self.is_direct
        factors = self._factor_bytes + 8 if computes_factors else 0  # and their barrier
        words = self.tuning.warps + self.wide.splits + 2
        return totals + best + factors + -(-4 * words // 8) * 8

    @property
    def _factor_bytes(self) -> int:
        return 4 * 8 * self.octets

    @property
    def _layout(self) -> Mapping[str, bool]:
        """The template parameters that decide the layout of x in a stage."""
        return {"pairs": self.wide.pairs, "direct": self.is_direct}

    @property
    def kernel(self) -> Kernel:
        """The instance of ``wide.cu``."""
        form, tiles, octets = self.form, self.wide.tiles, self.octets
        flags = {"norm": self.norm, "next": self.has_next, "shared": self.wide.splits > 1}
        flags |= self._layout
        epilogue = EPILOGUES[self.epilogue]
        return Kernel(
            name=f"wide_{form.label}_{self.epilogue}{_label(flags)}_t{tiles}c{octets}",
            file="wide.cu",
            function=f"wide<{form.struct}, {tiles}, {octets}, {epilogue}, {_switches(flags)}>",
            args=self.args_struct,
            threads=32 * (WARPS + _LOADERS),
        )


def _label(flags: Mapping[str, bool]) -> str:
    return "".join(f"_{name}" for name, flag in flags.items() if flag)


def _switches(flags: Mapping[str, bool]) -> str:
    return ", ".join(str(flag).lower() for flag in flags.values())


def _input_scales(form: Format) -> tuple[int, int]:
    """Returns ``input_scale`` of ``weights.cuh``, as the bits of two bfloat16 each."""
    return (_E2M1_SCALE, _E2M1_SCALE) if form.is_e2m1 else _INPUT_SCALES[form.kind]


def pairs_units(form: Format) -> bool:
    """Tells whether a stage can have two units of a weight: short ones of groups."""
    return form.group_size is not None and form.kind != "nested" and form.unit_bytes < 1536


def can_be_direct(form: Format) -> bool:
    """Tells whether ``WideTuning.direct`` is possible: sums of x are over groups within slices."""
    return form.group_size != HALF_SLICE and (form.group_size is not None or not form.needs_sums)


def max_counters(form: Format) -> int:
    """Returns the most ``n_counters`` of a plan for a weight."""
    return form.tiles + WARPS
