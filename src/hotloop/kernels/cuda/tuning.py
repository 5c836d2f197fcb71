"""What a launch should choose for speed, from the shape alone.

The rules are what tuning every product of a step in its place, on one H100, had in common
(``benchmarks/results/h100-kernels/tune.json``). They look at the weight and never at the number of
rows, since some choices decide the order of sums.
"""

from __future__ import annotations

from hotloop.kernels.cuda.attention import AttentionTuning
from hotloop.kernels.cuda.linear import Tuning
from hotloop.kernels.cuda.packing import Format

WARPS = (20, 16, 14, 12, 11, 10, 8)


def linear_tuning(form: Format) -> Tuning:
    """For products with a weight: warps with even shares of K, copied in even parts.

    A block has a multiprocessor to itself: the next kernel's begins when it ends, just when memory
    would be idle. Two at a time would take turns at that instead.
    """

    def units_of(warps: int) -> int:
        return -(-form.units // warps)

    warps = min(WARPS, key=lambda warps: units_of(warps) * warps)  # of equals the first: most warps
    return Tuning(
        warps=warps,
        units_per_stage=next(u for u in (4, 3, 2, 1) if units_of(warps) % u == 0),
        ring_bytes=128 * 1024,
        resident=1,
    )


def attention_tuning() -> AttentionTuning:
    """For attention over any cache: what fits a multiprocessor beside a block of a product."""
    return AttentionTuning()
