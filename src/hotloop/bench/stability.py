"""Decides whether repeats of a timed run agree, and names the likely cause if they do not.

The cause is guessed from the pattern of the samples and from the load of the machine meanwhile. It
tells a user where to look; no sample is corrected or dropped.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MAX_VARIATION = 0.05
"""Repeats whose coefficient of variation (standard deviation / mean) is above this are unstable."""

MIN_REPEATS_FOR_A_CAUSE = 4
"""The fewest repeats for which a cause is named: with fewer, any pattern can be found."""

_DRIFT_CORRELATION = 0.9
_BUSY_CPU = 0.1
_MIN_CPU_SECONDS = 0.5
_CLOCK_CHANGE = 0.05


@dataclass(frozen=True, kw_only=True)
class CpuTimes:
    """CPU seconds since boot, summed over all CPUs: total, busy, and of this process tree.

    Children that ended and were waited for are part of the tree.
    """

    total: float
    busy: float
    own: float

    def others_since(self, before: CpuTimes) -> float | None:
        """Returns the share of CPU time of other processes and the hypervisor since ``before``.

        The result is None if too little time has passed: the kernel counts in hundredths of a
        second.
        """
        total = self.total - before.total
        others = (self.busy - before.busy) - (self.own - before.own)
        return max(0.0, others / total) if total >= _MIN_CPU_SECONDS else None


def cpu_times() -> CpuTimes:
    """Returns the current CPU times."""
    import psutil

    spent = psutil.cpu_times()._asdict()
    for counted_in_user in ("guest", "guest_nice"):
        spent.pop(counted_in_user, None)
    total = sum(spent.values())
    own = 0.0
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # ended since it was listed
            times = process.cpu_times()
            own += times.user + times.system + times.children_user + times.children_system
    return CpuTimes(total=total, busy=total - spent["idle"] - spent.get("iowait", 0.0), own=own)


def explain_instability(
    seconds: Sequence[float],
    *,
    others_cpu: Sequence[float | None] = (),
    sm_clock_mhz: Sequence[float | None] = (),
    tokens_per_step: Sequence[float] = (),
    acceptance_assumed: bool = False,
) -> str | None:
    """Explains in a sentence or two why repeats are unstable; None if they are not.

    Args:
        seconds: The time of each repeat, in order.
        others_cpu: The share of CPU time that other processes took during each repeat, if known.
        sm_clock_mhz: The GPU's clock right after each repeat, if known.
        tokens_per_step: Tokens per step in each repeat, with drafts: they depend on the text, which
            differs between repeats.
        acceptance_assumed: Whether drafts were accepted with a given probability, whatever the
            text.
    """
    variation = _variation(seconds)
    if variation <= MAX_VARIATION:
        return None
    if _variation(tokens_per_step) > MAX_VARIATION:
        low, high = min(tokens_per_step), max(tokens_per_step)
        cause = (
            "drafts are accepted at random" if acceptance_assumed else "acceptance varies by text"
        )
        pattern = f"{cause}, from {low:.2f} to {high:.2f} tokens per step"
    else:
        pattern = _pattern(seconds)
    reason = (
        f"time per token varies by {_beyond_limit(variation)} between repeats "
        f"(coefficient of variation, limit {MAX_VARIATION:.0%}): {pattern}"
    )
    busy = max((share for share in others_cpu if share is not None), default=0.0)
    if busy >= _BUSY_CPU:
        reason += f"; other processes took up to {busy:.0%} of the CPU meanwhile"
    clocks = [clock for clock in sm_clock_mhz if clock is not None]
    if clocks and min(clocks) < (1 - _CLOCK_CHANGE) * max(clocks):
        reason += f"; the GPU's clock varied between {min(clocks):.0f} and {max(clocks):.0f} MHz"
    return reason


def _pattern(seconds: Sequence[float]) -> str:
    """Describes how times of repeats differ (drift, an outlier, noise), and what could cause it."""
    n = len(seconds)
    if n < MIN_REPEATS_FOR_A_CAUSE:
        return f"{n} repeats are too few to tell why"
    drift = statistics.correlation(range(n), seconds)
    rises = [after > before for before, after in itertools.pairwise(seconds)]
    monotone = len(set(rises)) == 1 and len(set(seconds)) == n
    if monotone or abs(drift) >= _DRIFT_CORRELATION:
        change = abs(seconds[-1] / seconds[0] - 1)
        if drift > 0:
            return (
                f"it grew steadily, by {change:.0%} from first to last, as when heat or a power "
                "limit lowers the clocks or memory runs short"
            )
        return f"it fell steadily, by {change:.0%} from first to last, as in a warm-up"
    median = statistics.median(seconds)
    outlier = max(range(n), key=lambda i: abs(seconds[i] - median))
    others = [*seconds[:outlier], *seconds[outlier + 1 :]]
    if _variation(others) > MAX_VARIATION:
        return "with no pattern, as on a shared machine or with changing clocks"
    change = seconds[outlier] / statistics.fmean(others) - 1
    took = f"repeat {outlier + 1} took {abs(change):.0%} {'longer' if change > 0 else 'less'}"
    if outlier == 0 and change > 0:
        return f"{took} than the others, as when the warm-up was too short"
    if change < 0:
        return f"{took} than the others, as when another process slowed the others"
    return f"{took} than the others, as when another process interferes"


def _beyond_limit(variation: float) -> str:
    """Formats a variation above the limit, with enough digits to distinguish it from the limit."""
    digits = 0
    while f"{variation:.{digits}%}" == f"{MAX_VARIATION:.{digits}%}":  # ends, since the two differ
        digits += 1
    return f"{variation:.{digits}%}"


def _variation(seconds: Sequence[float]) -> float:
    """Returns the coefficient of variation: standard deviation / mean; 0 for a single value."""
    if len(seconds) < 2:
        return 0.0
    return statistics.stdev(seconds) / statistics.fmean(seconds)
