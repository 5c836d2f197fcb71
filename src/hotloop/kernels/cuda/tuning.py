"""What a launch should choose for speed, from the shape and the device.

The rules are what tuning every product of a step in its place, on one H100, had in common
(``tuned-anew-steps.txt``, ``looks-and-rings-anew-steps.txt``, ``rings-with-new-looks-steps.txt``
and others in ``benchmarks/results/h100-kernels/trials``). A product's number of warps, which
decides the order of its sums, is chosen by the weight alone, whatever the device and the number of
rows; the chunks of attention by the heads and the device.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hotloop.kernels.cuda.attention import MAX_TOKENS, STEP, AttentionTuning
from hotloop.kernels.cuda.launch import Limits
from hotloop.kernels.cuda.linear import Ahead, LinearPlan, Tuning
from hotloop.kernels.cuda.packing import Format

WARPS = (8, 10, 11, 12, 14, 16, 20)
"""Of a block; of equals the first is taken."""

UNITS = (4, 3, 2, 1)
"""Of a copy."""

COPIED_BYTES = 44 * 1024
"""Of all warps' copies at a time: of longer ones there are too few on their way."""

COPIES = 4
"""Of a warp, on their way."""

INT4_COPIES = 3
"""Of a warp, where the weight is int4 and parts of it come into the L2 cache ahead of time: what is
there already is not used any sooner, since it takes longer to compute with than to come, and what
other kernels read comes later."""

LEAST_RING_BYTES = 48 * 1024
"""What a block has on its way at least."""

RING_SHARE = 0.75
"""Of all that a block reads, that its ring should hold at most. A product that asks for everything
before its input is there keeps the kernel that makes this input from its own reads."""

LONG_CACHE = 8192
"""Positions from which on histories are better read by more rows at once."""

FILLED = 0.85
"""Of all multiprocessors, that a long history's chunks should occupy."""


Role = Literal["qkv", "o", "gate_up", "down", "head"]
"""A product of a step."""


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What a product has brought into the L2 cache of a later one's weight.

    Attributes:
        beyond: Tiles that a block of the later product leaves out, after those that it asks for
            before it has any: had it more at once, memory would be idle until its input is there.
            None leaves out none.
        step: From one of a block's tiles to the next.
        tiles: How many of a block's.
        tile_bytes: The most of each.
        items_left: See ``Ahead``.
    """

    beyond: int | None = 0
    step: int = 1
    tiles: int = 1
    tile_bytes: int = 42 * 1024
    items_left: int


def _look(by: Role, later: LinearPlan) -> _Look | None:
    few, few_int4 = later.few, later.few and later.form.kind == "int4"
    match by:
        case "qkv":
            return _Look(beyond=5, step=3, tiles=2, items_left=1 if few else 2)
        case "o":
            return _Look(beyond=1 if few else 2, items_left=0)
        case "gate_up":
            return _Look(tile_bytes=(32 if few_int4 else 64) * 1024, items_left=1)
        case "down" if few_int4:
            return _Look(beyond=None, tile_bytes=32 * 1024, items_left=0)
        case "down" | "head":
            return None


def look_ahead(by: Role, later: LinearPlan, weight: Tensor) -> Ahead | None:
    """What a product has brought into the L2 cache of a later one's weight, if anything.

    qkv and ``o`` look at the weight of gate and up, since memory is idle longest while there is
    attention, gate and up at down's, and down at the next layer's qkv.
    """
    look = _look(by, later)
    if look is None:
        return None
    form, blocks = later.form, later.limits.n_sms
    first = 0 if look.beyond is None else later.tiles_on_their_way + look.beyond
    if first * blocks >= form.tiles:
        return None
    return Ahead(
        weight=weight,
        form=form,
        first=first * blocks,
        step=look.step * blocks,
        tiles=look.tiles,
        tile_bytes=min(look.tile_bytes, form.units * form.unit_bytes),
        items_left=look.items_left,
    )


def linear_tuning(form: Format, limits: Limits, role: Role) -> Tuning:
    """For products with a weight: warps with even shares of K, copied in even parts.

    Args:
        form: The weight's format.
        limits: Of the device.
        role: Which product's it is.
    """
    warps, units = min(itertools.product(WARPS, UNITS), key=lambda way: _cost(form, *way))
    is_looked_at = form.kind == "int4" and role in ("gate_up", "down")
    copies = (INT4_COPIES if is_looked_at else COPIES) * warps * units * form.unit_bytes
    share = int(RING_SHARE * form.nbytes / limits.n_sms)
    ring_bytes = max(LEAST_RING_BYTES, min(copies, share))
    while units > 1 and 2 * warps * units * form.unit_bytes > ring_bytes:
        units = next(fewer for fewer in range(units - 1, 0, -1) if units % fewer == 0)
    return Tuning(warps=warps, units_per_stage=units, ring_bytes=ring_bytes)


def _cost(form: Format, warps: int, units: int) -> tuple[bool, int, int]:
    """Less is better: whether copies are too long or uneven, what is idle, how short they are."""
    units_of_warp = -(-form.units // warps)
    copied = warps * units * form.unit_bytes
    unfit = copied > COPIED_BYTES or units_of_warp % units > 0
    return unfit, warps * units_of_warp - form.units, -copied


def attention_tuning(
    *, head_dim: int, n_kv_heads: int, n_positions: int, batch: int, limits: Limits
) -> AttentionTuning:
    """What fits the device, and fills it.

    Args:
        head_dim: Of the model.
        n_kv_heads: Of the model, or of a rank's part.
        n_positions: Of the cache. A result's bits do not depend on it, nor on ``batch``.
        batch: Sequences of a step.
        limits: Of the device.
    """
    new_tokens = 2 * (16 + 4 * MAX_TOKENS) * head_dim  # at most, beside what is on its way
    room = (limits.shared_bytes - new_tokens) // (4 * STEP * head_dim)
    warps, stages = next((w, s) for w, s in ((8, 2), (8, 1), (4, 1), (2, 1)) if w * s < room)
    chunks = _chunks(n_kv_heads, limits.n_sms)
    beside_each_other = batch * n_kv_heads * chunks > 2 * limits.n_sms
    return AttentionTuning(
        chunks=chunks,
        warps=warps,
        stages=1 if beside_each_other else stages,
        columns=2 if n_positions > LONG_CACHE else 1,
    )


def _chunks(n_kv_heads: int, n_sms: int) -> int:
    """As many as fill all multiprocessors once, or twice or thrice where that fills them better."""
    ways = [(turns, turns * n_sms // n_kv_heads) for turns in (1, 2, 3)]
    filled = {n: n * n_kv_heads / (turns * n_sms) for turns, n in ways if n > 0}
    enough = (n for n, share in filled.items() if share >= FILLED)
    return next(enough, max(filled, key=lambda n: filled[n], default=1))
