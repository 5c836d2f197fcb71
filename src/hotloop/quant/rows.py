"""Streams of a weight's rows, a few at a time, so that the whole weight need not be in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TypeVar

from torch import Tensor

from hotloop.kernels.linear import KernelFormat
from hotloop.quant.qtensor import QTensor, join_rows

Value = TypeVar("Value")


class RowStream:
    """A weight of one number format as a stream of row pieces, which are cut and joined on demand.

    Args:
        pieces: The rows, in order.
        n: Output features in all.
        format: The number format of every piece.
    """

    def __init__(self, pieces: Iterable[Tensor | QTensor], n: int, format: KernelFormat) -> None:  # noqa: A002
        self.n, self.format = n, format
        self._pieces = iter(pieces)
        self._rest: Tensor | QTensor | None = None
        self._left = n

    @classmethod
    def chain(cls, streams: Sequence[RowStream]) -> RowStream:
        """Concatenates streams of one format."""
        n = sum(stream.n for stream in streams)
        return cls(chain.from_iterable(map(_pieces, streams)), n, streams[0].format)

    def take(self, n: int) -> Tensor | QTensor:
        """Returns the next ``n`` rows."""
        assert n <= self._left, f"{n} of {self._left} rows"
        self._left -= n
        return join_rows(self._next(n), n)

    def chunks(self, n: int) -> Iterator[Tensor | QTensor]:
        """Returns the remaining rows, ``n`` at a time."""
        while self._left:
            yield self.take(min(n, self._left))

    def _next(self, n: int) -> Iterator[Tensor | QTensor]:
        while n:
            piece = next(self._pieces) if self._rest is None else self._rest
            self._rest = None
            if piece.shape[0] > n:
                self._rest = _rows(piece, n, piece.shape[0])
                piece = _rows(piece, 0, n)
            n -= piece.shape[0]
            yield piece


def _pieces(stream: RowStream) -> Iterator[Tensor | QTensor]:
    return stream._pieces


def unzip(pairs: Iterable[tuple[Value, Value]]) -> tuple[Iterator[Value], Iterator[Value]]:
    """Returns iterators of the first and of the second values of pairs; each pair is made once.

    Values that one iterator has not yet taken are kept in memory. With consumers that
    ``interleave`` advances, these are few.
    """
    source, waiting = iter(pairs), (deque[Value](), deque[Value]())

    def values(mine: deque[Value]) -> Iterator[Value]:
        while mine or _append(next(source, None), waiting):
            yield mine.popleft()

    return values(waiting[0]), values(waiting[1])


def _append(pair: tuple[Value, Value] | None, waiting: Sequence[deque[Value]]) -> bool:
    for queue, value in zip(waiting, pair or (), strict=pair is not None):
        queue.append(value)
    return pair is not None


def interleave(*runs: Iterator[int]) -> None:
    """Runs iterators of row counts to their ends, always the one that has processed fewest rows."""
    totals = dict.fromkeys(runs, 0)
    while totals:
        run = min(totals, key=lambda each: totals[each])
        value = next(run, None)
        if value is None:
            del totals[run]
        else:
            totals[run] += value


def row_chunks_of(weight: Tensor | QTensor, n: int) -> Iterator[Tensor | QTensor]:
    """Returns a weight ``n`` rows at a time, without copying them."""
    for start in range(0, weight.shape[0], n):
        yield _rows(weight, start, min(start + n, weight.shape[0]))


def paired_chunks(weight: Tensor | QTensor, n: int) -> Iterator[Tensor | QTensor]:
    """Returns a weight of two halves ``n`` rows at a time, with equally many of each half."""
    half = weight.shape[0] // 2
    for start in range(0, half, n // 2):
        stop = min(start + n // 2, half)
        parts = (_rows(weight, start, stop), _rows(weight, half + start, half + stop))
        yield join_rows(parts, 2 * (stop - start))


def _rows(weight: Tensor | QTensor, start: int, stop: int) -> Tensor | QTensor:
    return weight.rows(start, stop) if isinstance(weight, QTensor) else weight[start:stop]
