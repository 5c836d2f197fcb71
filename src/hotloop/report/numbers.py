"""Formats figures with their significant digits."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hotloop.bench.record import Figure

MAX_DECIMALS = 4


def uncertain(mean: float, half_width: float | None, *, signed: bool = False) -> str:
    """Formats a mean and its uncertainty, such as ``61.2 ± 0.8``.

    The uncertainty has one significant digit, or two if the first is 1; the mean has as many
    decimals, at most ``MAX_DECIMALS``. Without an uncertainty the mean has four digits.
    """
    sign = "+" if signed and mean > 0 else ""
    if not half_width:
        return sign + significant(mean, 4)
    digits = 2 if f"{half_width:e}".startswith("1") else 1
    decimals = min(MAX_DECIMALS, max(0, digits - 1 - math.floor(math.log10(half_width))))
    return f"{sign}{mean:.{decimals}f} ± {half_width:.{decimals}f}"


def significant(value: float, digits: int) -> str:
    """Formats a number with this many significant digits, and all digits before the point."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}" if decimals <= 5 else f"{value:.{digits - 1}e}"


def half_width(figure: Figure) -> float | None:
    """Returns half of the 95 % interval."""
    return None if figure.ci95 is None else (figure.ci95[1] - figure.ci95[0]) / 2


def percent(share: float, decimals: int = 0) -> str:
    """Formats a share as a percentage; a share below 1 is never shown as 100%."""
    if share == 1:
        return "100%"
    shown = round(share * 100, decimals)
    is_rounded_up = share < 1 and shown == 100
    return f"{100 - 10**-decimals if is_rounded_up else shown:.{decimals}f}%"


def memory(n_bytes: float) -> str:
    """Formats bytes in MiB, or in GiB from 10 GiB on."""
    return f"{n_bytes / 2**20:.0f} MiB" if n_bytes < 10 * 2**30 else f"{n_bytes / 2**30:.1f} GiB"


def memories(column: Sequence[float | None]) -> list[str]:
    """Formats the bytes of a table's column in one unit, chosen by the largest; None becomes ""."""
    known = [n_bytes for n_bytes in column if n_bytes is not None]
    if max(known, default=0) < 10 * 2**30:
        return ["" if n_bytes is None else memory(n_bytes) for n_bytes in column]
    places = 1 if min(known) >= 2**30 else 2
    return ["" if n is None else f"{n / 2**30:.{places}f} GiB" for n in column]


def divergence(nats: float) -> str:
    """Formats a KL divergence; as a bound, if it is below the rounding of the stored reference."""
    return significant(nats, 2) if nats >= 1e-6 else "< 1e-6"
