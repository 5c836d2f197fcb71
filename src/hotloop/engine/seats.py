"""Seats of the KV cache on the host: what each holds, and which one a request gets.

A seat outlives its request: its tokens stay valid until another request needs the seat, and a
prompt that begins with the same tokens reuses their keys and values (*prefix reuse*). A prompt is
placed in the seat that already holds its beginning if that covers most of what the seat holds.
Otherwise the common prefix is copied into an empty seat, or the least recently used one, so that a
short match, such as a system message, does not destroy a long conversation.

Tokens are compared, never a hash of them, and only between requests with the same *salt*, so that
one client cannot measure what another's prompt was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hotloop.types import PrefixReuse

LEAST_COPIED = 32
"""The shortest common prefix worth copying: prefill of fewer tokens takes no longer than one."""


@dataclass
class Seat:
    """The content of a seat.

    Attributes:
        index: The seat in the cache.
        occupied: A request is using it.
        ids: Tokens at its first positions whose keys and values are valid and may be reused.
        salt: The salt of the request that wrote them.
        last_used: Number of the placement that used it last.
    """

    index: int
    occupied: bool = False
    ids: list[int] = field(default_factory=list)
    salt: str = ""
    last_used: int = 0


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a prompt is prefilled.

    Attributes:
        seat: Its seat.
        n_cached: Tokens of the prompt that need no prefill.
        source: The seat to copy these from; None if they are in ``seat``.
    """

    seat: Seat
    n_cached: int = 0
    source: Seat | None = None


class Seats:
    """The seats of a cache.

    Args:
        n: Number of seats.
        reuse: The unit of reuse; see ``EngineConfig.prefix_cache``.
        chunk: Tokens of a chunk of prefill; chunks begin at multiples of it.
    """

    def __init__(self, n: int, *, reuse: PrefixReuse, chunk: int) -> None:
        self._seats = [Seat(i) for i in range(n)]
        self._reuse, self._chunk, self._n_placed = reuse, chunk, 0

    @property
    def any_free(self) -> bool:
        """Whether a request can be placed."""
        return not all(seat.occupied for seat in self._seats)

    def place(self, ids: Sequence[int], salt: str = "") -> Placement:
        """Occupies a free seat for a prompt. The seat then holds its cached tokens."""
        free = [seat for seat in self._seats if not seat.occupied]
        assert free, "no seat is free"
        common = {seat.index: self._n_common(seat, ids, salt) for seat in self._seats}
        best = max(self._seats, key=lambda seat: (common[seat.index], not seat.occupied))
        n = common[best.index]
        oldest = min(free, key=lambda seat: (bool(seat.ids), seat.last_used, seat.index))
        if not best.occupied and (2 * n >= len(best.ids) > 0 or len(free) == 1):
            placement = Placement(seat=best, n_cached=n)
        elif oldest is not best and n >= max(LEAST_COPIED, common[oldest.index] + 1):
            placement = Placement(seat=oldest, n_cached=n, source=best)
        else:
            placement = Placement(seat=oldest, n_cached=common[oldest.index])
        if self._reuse != "none":  # else the first free seat is the one to take
            self._n_placed += 1
            for used in filter(None, (placement.seat, placement.source)):
                used.last_used = self._n_placed
        seat = placement.seat
        seat.occupied, seat.salt, seat.ids = True, salt, list(ids[: placement.n_cached])
        return placement

    def hold(self, seat: Seat, prompt_ids: Sequence[int], n: int) -> None:
        """Records that a seat holds the first ``n`` tokens of its prompt."""
        if self._reuse == "none":
            return
        if self._reuse == "chunks":  # a shorter chunk can differ from a whole one in its last bits
            n -= n % self._chunk
        seat.ids = list(prompt_ids[:n])

    def release(self, seat: Seat, answer_ids: Sequence[int] = ()) -> None:
        """Frees a seat, which keeps its tokens, and those of an answer that follow them."""
        if self._reuse == "tokens":
            seat.ids += answer_ids
        seat.occupied = False

    def forget(self) -> None:
        """Forgets the tokens of all free seats."""
        for seat in self._seats:
            if not seat.occupied:
                self.clear(seat)

    def clear(self, seat: Seat) -> None:
        """Forgets a seat's tokens."""
        seat.ids = []

    def _n_common(self, seat: Seat, ids: Sequence[int], salt: str) -> int:
        """Counts the first tokens of a prompt that a seat holds, without the prompt's last."""
        if self._reuse == "none" or seat.salt != salt:
            return 0
        n = common_prefix(seat.ids, ids[:-1])
        return n - n % self._chunk if self._reuse == "chunks" else n


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the length of the longest common prefix, by comparisons of slices."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:  # the first ``low`` are equal; the first ``high + 1`` are not
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
