"""What a launch should choose for speed, from the shape alone.

The rules are what a sweep over five models' products on one H100 had in common
(``benchmarks/results/h100-kernels/sweep.json``). They look at the weight and never at the number of
rows, since some choices decide the order of sums.
"""

from __future__ import annotations

from hotloop.kernels.cuda.attention import AttentionTuning
from hotloop.kernels.cuda.linear import Tuning
from hotloop.kernels.cuda.packing import Format

MAX_WARPS = 16
MAX_IDLE = 0.08
"""How much of the time of a block's warps may be spent waiting for those that have a unit more."""


def linear_tuning(form: Format) -> Tuning:
    """For products with a weight: many warps, with even shares of K that come in one copy each."""

    def idle(warps: int) -> float:
        return 1 - form.units / (-(-form.units // warps) * warps)

    warps = next(w for w in range(MAX_WARPS, 0, -1) if idle(w) <= MAX_IDLE)
    return Tuning(
        warps=warps,
        units_per_stage=min(4, -(-form.units // warps)),
        ring_bytes=64 * 1024,
        staged_bytes=128 * 1024,
    )


def attention_tuning() -> AttentionTuning:
    """For attention over any cache: what fits a multiprocessor beside a block of a product."""
    return AttentionTuning()
