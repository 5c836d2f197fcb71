"""Chooses the tuning of launches by shape and device.

The rules summarize trials in which every projection was tuned within whole decode steps on one
H100; the rules for fast memory come from one H200 (``docs/decisions/fused-kernels.md`` lists the
trials). A projection's number of warps, which determines the order of its sums, depends on the
weight alone, whatever the device and the number of rows; the chunks of attention depend on the
heads and the device.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hotloop.kernels.cuda.attention import MAX_TOKENS, TILE, AttentionTuning
from hotloop.kernels.cuda.launch import Limits, limits_of
from hotloop.kernels.cuda.linear import Epilogue, GemmPlan, LinearPlan, Prefetch, Tuning
from hotloop.kernels.cuda.packing import TILE_ROWS, Format
from hotloop.kernels.cuda.wide import OCTETS as WIDE_OCTETS
from hotloop.kernels.cuda.wide import WARPS as WIDE_WARPS
from hotloop.kernels.cuda.wide import WidePlan, WideTuning, can_be_direct, pairs_units

WARPS = (8, 10, 11, 12, 14, 16, 20)
"""Candidate numbers of warps of a block; the first of equally good ones is chosen."""

UNITS = (4, 3, 2, 1)
"""Candidate numbers of units of a copy."""

STAGE_BYTES = 44 * 1024
"""The most bytes of values of a stage, over all warps: with longer copies, too few are in flight.
"""

STAGES = 4
"""Copies of a warp in flight."""

INT4_STAGES = 3
"""Copies of a warp in flight for an int4 weight of which parts are prefetched into L2. More copies
gain nothing, because dequantizing takes longer than loading from L2, and would delay the loads of
other kernels."""

MIN_SHARED_BYTES = 96 * 1024
"""Shared memory of a block that every supported device has, less a few KB for x."""

MIN_RING_BYTES = 48 * 1024
"""The minimum number of bytes that a block has in flight."""

FAST_MEMORY = 30e9
"""The bandwidth per multiprocessor, in bytes per second, from which on memory counts as fast: an
H100 has 25e9, an H200 36e9. With fast memory, and a short int4 weight, a delay of x costs more than
idle memory."""

SHORT_READ_S = 20e-6
"""The longest time, at the nominal bandwidth, in which a short weight is read."""

FAST_EARLY_STAGES = 1
"""Copies that are issued before x is loaded, for a short weight in fast memory."""

FAST_STAGES = 2
"""``INT4_STAGES`` of ``gate_up``, if its weight is short and memory is fast."""

FAST_PART_BYTES = 64 * 1024
"""``Tuning.part_bytes`` in fast memory: copying x in parts is faster for eight rows of 4,096
features, and slower for eight rows of 5,120."""

RING_SHARE = 0.75
"""The largest share of a block's weights that its ring may hold. A kernel that issued all of its
loads before its input arrives would delay the loads of the kernel that computes this input."""

MIN_WIDE_ROWS = 17
"""The number of rows from which on ``wide.cu`` is faster than ``linear.cu``: on an H200, whole
steps of 32 and 64 rows are faster, and steps of 16 rows are not."""

MAX_WIDE_ACCUMULATORS = 36
"""The most accumulators of a warp of ``wide.cu`` (16 features of an octet of rows each): those of
all tiles and strands, and those of a group. With more, registers spill."""

INT4_EARLY_BYTES = 16 * 1024
"""Bytes of an int4 weight whose loads a block of ``wide.cu`` issues before it waits for x. For the
others it issues as many loads as its ring has room for, since their steps are bound by memory."""

MAX_PAIRED_OCTETS = 4
"""The most octets of rows with which a stage of ``wide.cu`` has two units: with more, too few
stages fit."""

MAX_DIRECT_SUMS = 4 * 4096
"""The most octets of rows times input features that a block of ``wide.cu`` sums itself, so that no
kernel before it need do so. With 32 rows on an H200, a step of 8b in int4 gains, where they are at
most 16,384, and one of 13b loses, where they are 18,432 or more in three of four projections."""

LOADED_BYTES = 24
"""Bytes that a multiprocessor loads in a clock cycle from L2, if all of them do. This and the
clock cycles below were fitted to trials of ``wide.cu`` on an H200."""

INT4_CYCLES, OCTET_CYCLES = 240, 220
"""Clock cycles in which each warp of ``wide.cu`` multiplies 128 input features of a tile: a fixed
number, and a number for each octet of rows. A weight without groups takes half of both."""

ITEM_CYCLES, SPLIT_CYCLES = 7000, 6000
"""Clock cycles of an item of ``wide.cu`` before its first mma and after its last, and the clock
cycles that are added if blocks share K."""

LONG_CACHE = 8192
"""The number of cache positions from which on a block of attention serves two octets of rows, so
that the history is read less often."""

FILLED = 0.85
"""The share of the multiprocessors that the chunks of a long sequence should occupy."""


Projection = Literal["qkv", "o", "gate_up", "down", "head"]
"""A matrix product of a decode step."""


@dataclass(frozen=True, kw_only=True)
class _PrefetchRule:
    """The part of a later projection's weight that a projection prefetches into L2.

    Attributes:
        beyond: Tiles per block to skip after the tiles of the later projection's first ring. If the
            ring's tiles were in L2, the ring would fill at once, and memory would be idle until the
            input arrives. None begins at the first tile.
        step: Distance between a block's tiles, in units of the grid.
        tiles: Tiles per block.
        tile_bytes: The most bytes of each tile.
        items_left: See ``Prefetch``.
    """

    beyond: int | None = 0
    step: int = 1
    tiles: int = 1
    tile_bytes: int = 42 * 1024
    items_left: int


def _prefetch_rule(by: Projection, later: LinearPlan) -> _PrefetchRule | None:
    few = later.max_two_rows
    few_int4 = few and later.form.bits == 4
    match by:
        case "qkv":
            return _PrefetchRule(beyond=5, step=3, tiles=2, items_left=1 if few else 2)
        case "o":
            return _PrefetchRule(beyond=1 if few else 2, items_left=0)
        case "gate_up":
            return _PrefetchRule(tile_bytes=(32 if few_int4 else 64) * 1024, items_left=1)
        case "down" if few_int4:
            return _PrefetchRule(beyond=None, tile_bytes=32 * 1024, items_left=0)
        case "down" | "head":
            return None


def plan_prefetch(by: Projection, later: GemmPlan, weight: Tensor) -> Prefetch | None:
    """Plans the prefetch of a weight by an earlier projection; returns None if there is none.

    ``qkv`` and ``o`` prefetch the weight of ``gate_up``, because memory is idle longest around
    attention; ``gate_up`` prefetches the weight of ``down``, and ``down`` the weight of the next
    layer's ``qkv``. Plain rows would gain nothing, since their tiles are not contiguous.
    """
    if later.form.plain_rows or not isinstance(later, LinearPlan):
        return None
    if (rule := _prefetch_rule(by, later)) is None:
        return None
    form, blocks = later.form, later.limits.n_sms
    first = 0 if rule.beyond is None else later.tiles_in_flight + rule.beyond
    if first * blocks >= form.tiles:
        return None
    return Prefetch(
        weight=weight,
        form=form,
        first=first * blocks,
        step=rule.step * blocks,
        tiles=rule.tiles,
        tile_bytes=min(rule.tile_bytes, form.units * form.unit_bytes),
        items_left=rule.items_left,
    )


def reads_plain_rows(device: torch.device) -> bool:
    """Returns whether the fused step on a device reads bfloat16 weights as plain rows.

    Prompts then need no dequantizing, and steps are as fast. It was measured only on an H200, so
    only devices with fast memory do it, and the emulation on a CPU.
    """
    if device.type != "cuda":
        return True
    limits = limits_of(device)
    return limits.boxes and _has_fast_memory(limits)


def linear_tuning(form: Format, limits: Limits, projection: Projection) -> Tuning:
    """Chooses the tuning of a matrix product: warps with even shares of K, in even copies.

    Args:
        form: The weight's format.
        limits: Limits of the device.
        projection: The projection of the weight.
    """
    warps, units = min(itertools.product(WARPS, UNITS), key=lambda choice: _cost(form, *choice))
    is_fast = form.bits == 4 and _is_read_fast(form, limits)
    if is_fast and projection == "gate_up":
        stages = FAST_STAGES
    elif form.bits == 4 and projection in ("gate_up", "down"):
        stages = INT4_STAGES
    else:
        stages = STAGES
    copies = stages * warps * units * form.unit_bytes
    share = int(RING_SHARE * form.nbytes / limits.n_sms)
    ring_bytes = max(MIN_RING_BYTES, min(copies, share))
    while units > 1 and 2 * warps * units * form.unit_bytes > ring_bytes:
        units = next(fewer for fewer in range(units - 1, 0, -1) if units % fewer == 0)
    return Tuning(
        warps=warps,
        units_per_stage=units,
        ring_bytes=ring_bytes,
        early_stages=FAST_EARLY_STAGES if is_fast else None,
        part_bytes=FAST_PART_BYTES if _has_fast_memory(limits) else 0,
    )


def _is_read_fast(form: Format, limits: Limits) -> bool:
    """Returns whether a weight is short and the device's memory fast."""
    return _has_fast_memory(limits) and form.nbytes < SHORT_READ_S * limits.bytes_per_s


def _has_fast_memory(limits: Limits) -> bool:
    return limits.bytes_per_s > FAST_MEMORY * limits.n_sms


def _cost(form: Format, warps: int, units: int) -> tuple[bool, int, int]:
    """Returns the sort key of a choice; lower is better.

    It compares whether a choice is unfit (copies that are too long or uneven, or too much shared
    memory), then idle units, then the length of copies.
    """
    units_of_warp = -(-form.units // warps)
    copied = warps * units * form.fragment_bytes
    # Two stages, partial sums, and the sums of eight rows of x over each group.
    least = (2 * form.unit_bytes + 1024) * warps + 32 * form.k // (form.group_size or form.k)
    unfit = copied > STAGE_BYTES or units_of_warp % units > 0 or least > MIN_SHARED_BYTES
    return unfit, warps * units_of_warp - form.units, -copied


def wide_tuning(
    form: Format, rows: int, parts: int, limits: Limits, *, staged: bool = False
) -> WideTuning:
    """Chooses the tuning of a matrix product by ``wide.cu`` that takes the fewest clock cycles.

    Args:
        form: The weight's format.
        rows: M.
        parts: Parts of K.
        limits: Limits of the device.
        staged: A staging kernel stores x in any case.
    """
    octets = next(c for c in WIDE_OCTETS if rows <= 8 * c)
    most = (MAX_WIDE_ACCUMULATORS - octets) // (octets * form.strands)
    tiles = [n for n in (2, 1) if n <= max(1, most)]
    choices = itertools.product(tiles, range(1, parts + 1))
    tuning = (WideTuning(tiles=tiles, splits=splits) for tiles, splits in choices)
    best = min(tuning, key=lambda wide: wide_cycles(form, rows, parts, wide, limits))
    if form.bits == 4:
        best = dataclasses.replace(best, early_bytes=INT4_EARLY_BYTES)
    pairs = octets <= MAX_PAIRED_OCTETS and pairs_units(form)
    features = form.unit_k * _block_items(form, best, limits) * _item_units(form, parts, best)
    few_sums = not form.needs_sums or octets * features <= MAX_DIRECT_SUMS
    # Where a staging kernel stores x in any case, it may as well sum it.
    staged |= form.permuted or form.k % form.unit_k > 0
    direct = not staged and few_sums and can_be_direct(form)
    return dataclasses.replace(best, pairs=pairs, direct=direct)


def _block_items(form: Format, wide: WideTuning, limits: Limits) -> int:
    """Returns the items of the block of ``wide.cu`` that has the most."""
    groups = -(-form.tiles // (WIDE_WARPS * wide.tiles))
    return -(-groups * wide.splits // limits.n_sms)


def _item_units(form: Format, parts: int, wide: WideTuning) -> int:
    """Returns the units of K of the item that has the most."""
    return -(-parts // wide.splits) * -(-form.units // parts)


def wide_cycles(form: Format, rows: int, parts: int, wide: WideTuning, limits: Limits) -> float:
    """Estimates the clock cycles of a matrix product by ``wide.cu``; see ``wide_tuning``."""
    octets = next(c for c in WIDE_OCTETS if rows <= 8 * c)
    tiles = WIDE_WARPS * wide.tiles
    items, units = _block_items(form, wide, limits), _item_units(form, parts, wide)
    loading = (tiles * form.unit_bytes + 16 * octets * form.unit_k) / LOADED_BYTES
    multiplying = wide.tiles * (INT4_CYCLES + OCTET_CYCLES * octets) * form.unit_k / 128
    if form.group_size is None:
        multiplying /= 2
    cycles = items * (units * max(loading, multiplying) + ITEM_CYCLES)
    if wide.splits > 1:
        part_bytes = 4 * TILE_ROWS * 8 * octets * tiles
        cycles += items * SPLIT_CYCLES + parts * part_bytes / LOADED_BYTES
    return cycles


def plan_rows(
    form: Format,
    rows: int,
    epilogue: Epilogue = "plain",
    *,
    norm: bool,
    tuning: Tuning,
    limits: Limits,
    staged: bool = False,
) -> list[tuple[slice, GemmPlan]]:
    """Plans any number of rows: splits them into the largest launches that fit the device.

    ``staged``: the kernel that computes x cannot store it for ``wide.cu``; see ``wide_tuning``.
    """

    def linear(n: int) -> LinearPlan:
        return LinearPlan(
            form=form, rows=n, epilogue=epilogue, norm=norm, tuning=tuning, limits=limits
        )

    def is_wide(n: int) -> bool:
        if form.permuted and n > 2 and _min_wide_rows(limits) < sys.maxsize:
            layout = linear(n).layout
            if layout is None or not layout.staged:
                return True  # gathers x once, and not for every tile
        return n >= _min_wide_rows(limits)

    def plan(n: int) -> GemmPlan:
        if not is_wide(n):
            return linear(n)
        wide = wide_tuning(form, n, tuning.warps, limits, staged=staged or n < rows)
        return WidePlan(
            form=form, rows=n, epilogue=epilogue, norm=norm, tuning=tuning, limits=limits, wide=wide
        )

    def fits(n: int) -> bool:
        return is_wide(n) or linear(n).layout is not None

    rows_per_launch = next((n for n in (64, 32, 16) if fits(min(n, rows))), 8)
    firsts = range(0, rows, rows_per_launch)
    return [(slice(i, i + rows_per_launch), plan(min(rows_per_launch, rows - i))) for i in firsts]


def _min_wide_rows(limits: Limits) -> int:
    """Returns the fewest rows for ``wide.cu``, which was measured only on an H200."""
    is_measured = limits.warpgroups and _has_fast_memory(limits)
    return MIN_WIDE_ROWS if is_measured else sys.maxsize


def attention_tuning(
    *,
    head_dim: int,
    n_kv_heads: int,
    n_positions: int,
    batch: int,
    limits: Limits,
    rows: int = 1,
) -> AttentionTuning:
    """Chooses the tuning of attention that fits the device and fills it.

    Args:
        head_dim: The model's head dimension.
        n_kv_heads: Key/value heads of the model, or of a rank's shard.
        n_positions: Positions of the cache. The bits of a result depend neither on it nor on
            ``batch``.
        batch: Sequences of a decode step.
        limits: Limits of the device.
        rows: Rows of a sequence and KV head: its new tokens times the query heads that share it.
    """
    new_tokens = 2 * (16 + 4 * MAX_TOKENS) * head_dim  # at most, beside the rings
    room = (limits.shared_bytes - new_tokens) // (4 * TILE * head_dim)
    warps, stages = next((w, s) for w, s in ((8, 2), (8, 1), (4, 1), (2, 1)) if w * s < room)
    chunks = _chunks(n_kv_heads, limits.n_sms)
    blocks_share_sms = batch * n_kv_heads * chunks > 2 * limits.n_sms
    # Two blocks of eight warps fit on a multiprocessor, or four blocks of four warps.
    blocks_wait = batch * n_kv_heads > 2 * limits.n_sms
    halves = blocks_wait and warps == 8 and rows <= 8 and head_dim <= 128
    return AttentionTuning(
        chunks=chunks,
        warps=warps,
        turns=2 if halves else 1,
        stages=1 if blocks_share_sms else stages,
        octets=2 if n_positions > LONG_CACHE else 1,
    )


def _chunks(n_kv_heads: int, n_sms: int) -> int:
    """Returns the number of chunks that fill all multiprocessors best, in one to three waves."""
    choices = [(waves, waves * n_sms // n_kv_heads) for waves in (1, 2, 3)]
    filled = {n: n * n_kv_heads / (waves * n_sms) for waves, n in choices if n > 0}
    enough = (n for n, share in filled.items() if share >= FILLED)
    return next(enough, max(filled, key=lambda n: filled[n], default=1))
