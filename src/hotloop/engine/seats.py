"""The host's view of the KV cache's seats: the tokens of each, and the seat for a new request.

A seat outlives its request: its tokens stay valid until another request needs the seat, and a
prompt that begins with the same tokens reuses their keys and values (*prefix reuse*). A prompt is
placed in the seat that already holds its beginning if that covers most of what the seat holds.
Otherwise the common prefix is copied into an empty seat, or the least recently used one, so that a
short match, such as a system message, does not destroy a long conversation.

Tokens are compared, never a hash of them, and only between requests with the same *salt*, so that
one client cannot measure what another's prompt was.

Windows to score share prefixes in the same way, whether or not prompts do, but only within one
call: its salt is a unique object (``Scoring.group``).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hotloop.types import PrefixReuse

if TYPE_CHECKING:
    from hotloop.engine.request import Scoring

MIN_COPIED_TOKENS = 32
"""The shortest common prefix of a prompt that is copied: prefilling fewer tokens takes no longer
than prefilling one."""

MIN_SHARED_TOKENS = 8
"""The shortest common prefix of a window that is copied. It is shorter, since several windows are
scored together, and then the time of a forward grows with every token."""


@dataclass
class Seat:
    """The content of a seat.

    Attributes:
        index: The seat in the cache.
        occupied: A request is using it.
        ids: The tokens at its first positions, whose keys and values are valid and may be reused.
        salt: The salt of the request that wrote them.
        window: The window whose first tokens these are; None if a request wrote them.
        last_used: Number of the placement that last used it.
    """

    index: int
    occupied: bool = False
    ids: list[int] = field(default_factory=list)
    salt: Hashable = ""
    window: Scoring | None = None
    last_used: int = 0


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a prompt is prefilled.

    Attributes:
        seat: Its seat.
        n_cached: Tokens of the prompt that need no prefill.
        source: The seat to copy these from; None if they are in ``seat``.
        window: The earlier window whose prefix these are; None if a request wrote them.
    """

    seat: Seat
    n_cached: int = 0
    source: Seat | None = None
    window: Scoring | None = None


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
        self._forget_windows()
        return self._place(ids, salt, self._reuse, MIN_COPIED_TOKENS)

    def place_window(self, window: Scoring) -> Placement:
        """Occupies a free seat for a window to score.

        The window's last token is only predicted, and the one before it is always computed: neither
        counts in ``n_cached``.
        """
        self._forget_windows(window.group)
        reuse: PrefixReuse = "none" if window.group is None else "tokens"
        return self._place(window.ids[:-1], window.group, reuse, MIN_SHARED_TOKENS)

    def n_cached(self, window: Scoring) -> int:
        """Counts the tokens of a window that ``place_window`` would find, in any seat."""
        return max(
            self._n_common(seat, window.ids[:-1], window.group, "tokens") for seat in self._seats
        )

    def _place(
        self, ids: Sequence[int], salt: Hashable, reuse: PrefixReuse, least: int
    ) -> Placement:
        free = [seat for seat in self._seats if not seat.occupied]
        assert free, "no seat is free"
        common = {seat.index: self._n_common(seat, ids, salt, reuse) for seat in self._seats}
        best = max(self._seats, key=lambda seat: (common[seat.index], not seat.occupied))
        n = common[best.index]
        oldest = min(free, key=lambda seat: (bool(seat.ids), seat.last_used, seat.index))
        if not best.occupied and (2 * n >= len(best.ids) > 0 or len(free) == 1):
            placement = Placement(seat=best, n_cached=n, window=best.window)
        elif oldest is not best and n >= max(least, common[oldest.index] + 1):
            placement = Placement(seat=oldest, n_cached=n, source=best, window=best.window)
        else:
            n = common[oldest.index]
            placement = Placement(seat=oldest, n_cached=n, window=oldest.window)
        if reuse != "none":  # else the first free seat is the one to take
            self._n_placed += 1
            for used in filter(None, (placement.seat, placement.source)):
                used.last_used = self._n_placed
        seat = placement.seat
        seat.occupied, seat.salt, seat.window = True, salt, placement.window
        seat.ids = list(ids[: placement.n_cached])
        return placement

    def hold(self, seat: Seat, prompt_ids: Sequence[int], n: int) -> None:
        """Records that a seat holds the first ``n`` tokens of its prompt."""
        if self._reuse == "none":
            return
        if self._reuse == "chunks":  # a shorter chunk can differ from a whole one in its last bits
            n -= n % self._chunk
        seat.ids = list(prompt_ids[:n])

    def hold_window(self, seat: Seat, window: Scoring, n: int) -> None:
        """Records that a seat holds the first ``n`` tokens of a window, for others of its group."""
        if window.group is not None:
            seat.ids, seat.window = window.ids[:n], window

    def release(self, seat: Seat, answer_ids: Sequence[int] = ()) -> None:
        """Frees a seat, which keeps the tokens of its prompt and of the answer."""
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
        seat.ids, seat.window, seat.last_used = [], None, 0

    def _forget_windows(self, group: object | None = None) -> None:
        """Forgets the windows of other groups in free seats."""
        for seat in self._seats:
            if seat.window is not None and seat.window.group is not group and not seat.occupied:
                self.clear(seat)

    def _n_common(self, seat: Seat, ids: Sequence[int], salt: Hashable, reuse: PrefixReuse) -> int:
        """Counts the first tokens of a prompt that a seat holds, without the prompt's last."""
        if reuse == "none" or seat.salt != salt:
            return 0
        n = common_prefix(seat.ids, ids[:-1])
        return n - n % self._chunk if reuse == "chunks" else n


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the length of the longest common prefix, by comparisons of slices."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:  # the first ``low`` are equal, and the prefix has at most ``high``
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
