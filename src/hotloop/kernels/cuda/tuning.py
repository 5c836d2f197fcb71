"""What a launch should choose for speed, from the shape alone.

The rules are what tuning every product of a step in its place, on one H100, had in common
(``benchmarks/results/h100-kernels/tune.json``). They look at the weight and never at the number of
rows, since some choices decide the order of sums.
"""

from __future__ import annotations

from hotloop.kernels.cuda.attention import MAX_TOKENS, STEP, AttentionTuning
from hotloop.kernels.cuda.launch import Limits
from hotloop.kernels.cuda.linear import Tuning
from hotloop.kernels.cuda.packing import Format

WARPS = (20, 16, 14, 12, 11, 10, 8)
"""Of a block; of equals the first is taken."""

TWO_STAGES = 136 * 1024
"""Bytes that two copies of every warp may take: longer ones come too late."""

LONG_CACHE = 8192
"""Positions from which on chunks of a history are better longer."""


def linear_tuning(form: Format) -> Tuning:
    """For products with a weight: warps with even shares of K, copied in even parts.

    A block has a multiprocessor to itself: the next kernel's begins when it ends, just when memory
    would be idle. Two at a time would take turns at that instead.
    """

    def units_of(warps: int) -> int:
        return -(-form.units // warps)

    def fits(warps: int, units: int) -> bool:
        return units_of(warps) % units == 0 and 2 * warps * units * form.unit_bytes <= TWO_STAGES

    warps = min(WARPS, key=lambda warps: units_of(warps) * warps)
    units = next(units for units in (4, 3, 2, 1) if fits(warps, units))
    return Tuning(warps=warps, units_per_stage=units, ring_bytes=64 * 1024)


def attention_tuning(head_dim: int, n_positions: int, limits: Limits) -> AttentionTuning:
    """For attention over a cache of so many positions: what fits the device."""
    new_tokens = 2 * (16 + 4 * MAX_TOKENS) * head_dim  # at most, beside what is on its way
    room = (limits.shared_bytes - new_tokens) // (4 * STEP * head_dim)
    warps, stages = next((w, s) for w, s in ((8, 2), (8, 1), (4, 1), (2, 1)) if w * s < room)
    chunk = 1024 if n_positions > LONG_CACHE else 512
    return AttentionTuning(chunk=chunk, warps=warps, stages=stages)
