"""Reads tensors from a file, a few bytes at a time.

Every checkpoint format uses it. Nothing is memory-mapped: touched pages of a mapping count as
resident memory of the process until the system reclaims them, so a checkpoint that is read
completely through a mapping counts in full at the peak. Here bytes are read into new memory that is
released with the tensor; the file stays in the system's page cache, ready for the next rank. At any
time only the returned tensor and one chunk of at most ``CHUNK_BYTES`` are in memory. Measured: two
shards of 1 GiB in tensors of 128 MiB, read from end to end, raise the peak of resident memory by
132 MiB; memory-mapped, by 1,028 MiB.

A large tensor is read by several threads, which write their parts into the same memory: copying
from the page cache is bound by one core, and a disk or a network serves several requests at once.

The modules of formats interpret the bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hotloop.errors import CheckpointError
from hotloop.untrusted import open_file

CHUNK_BYTES = 8 * 2**20
"""Bytes that are read at once of a tensor that is sliced or dequantized."""

N_THREADS = 8
"""The most threads that read one tensor, the calling thread included."""

PART_BYTES = 2 * 2**20
"""The minimum number of bytes that a thread reads of a tensor. Waking a thread takes some tens of
microseconds, in which another thread could copy a tenth of these bytes."""

MIN_SKIPPED_BYTES = 16 * 2**10
"""Within rows, reading skips unneeded bytes if they are at least this many. From the page cache,
skipping was measured to double the time for rows of 16 KiB, and to cost nothing for rows of 56 KiB;
from a disk or over a network it saves the bytes."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """The description of one tensor in a checkpoint.

    Attributes:
        name: Its Hugging Face name, such as ``model.layers.0.self_attn.q_proj.weight``.
        shape: Its shape in PyTorch: ``(out_features, in_features)`` for a linear layer.
        dtype: The stored type, by the format's own name: ``BF16``, ``I32``, ``Q4_K``.
        file: The file that stores it.
        n_bytes: Its bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    n_bytes: int


def reading_threads() -> Executor:
    """Returns the threads that read parts of tensors; they start when first needed.

    The files of a checkpoint share them. The caller shuts them down, after the last read.
    """
    return ThreadPoolExecutor(N_THREADS - 1, thread_name_prefix="read-part")


class TensorFile:
    """A file for reading at given offsets, in several threads if needed.

    Args:
        path: The file.
        threads: See ``reading_threads``; None reads in the calling thread only.

    Raises:
        CheckpointError: The file cannot be opened, or is not a regular file.
    """

    def __init__(self, path: Path, threads: Executor | None = None) -> None:
        self.path, self._threads = path, threads
        self._file = open_file(path)
        self.n_bytes = os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, n_bytes: int, *, pinned: bool = False) -> Tensor:
        """Reads bytes ``offset`` to ``offset + n_bytes`` as a new uint8 tensor ``[n_bytes]``.

        Args:
            offset: Position in the file, in bytes.
            n_bytes: Number of bytes.
            pinned: The tensor is in page-locked memory, so a GPU can copy from it asynchronously.
        """
        data = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=pinned)
        self.read_into(data, offset)
        return data

    def read_into(self, data: Tensor, offset: int) -> None:
        """Fills contiguous uint8 [bytes] on the host with the bytes from ``offset`` on."""
        whole = data.numpy().data

        def read(part: range) -> None:
            self._read_into(whole[part.start : part.stop], offset + part.start)

        self._in_parts(range(len(whole)), len(whole), read)

    def read_columns(self, offset: int, rows: range, row_bytes: int, columns: range) -> Tensor:
        """Reads bytes ``columns`` of each of ``rows``, from ``offset`` on: uint8 [rows, columns].

        The bytes between are skipped, unless they are too few to be worth it.
        """
        start = offset + rows.start * row_bytes
        if row_bytes - len(columns) < MIN_SKIPPED_BYTES:
            whole = self.read(start, len(rows) * row_bytes).view(len(rows), row_bytes)
            return whole[:, columns.start : columns.stop]
        data = torch.empty(len(rows), len(columns), dtype=torch.uint8)
        kept = data.numpy()

        def read(part: range) -> None:
            for i in part:
                self._read_into(kept[i].data, start + i * row_bytes + columns.start)

        self._in_parts(range(len(rows)), data.nbytes, read)
        return data

    def _in_parts(self, whole: range, n_bytes: int, read: Callable[[range], None]) -> None:
        """Reads parts of a range on several threads, and waits for all of them.

        Args:
            whole: The range to divide.
            n_bytes: Bytes of the whole.
            read: Reads a part. Its exceptions are raised.
        """
        n_parts = max(min(N_THREADS, n_bytes // PART_BYTES), 1) if self._threads else 1
        step = -(-len(whole) // n_parts)
        first, *others = (whole[at : at + step] for at in range(0, max(len(whole), 1), step or 1))
        parts = [self._threads.submit(read, part) for part in others] if self._threads else []
        try:
            read(first)
        finally:
            wait(parts)
        for part in parts:
            part.result()

    def _read_into(self, rest: memoryview, offset: int) -> None:
        while rest:  # one call returns at most 2 GiB on Linux
            n_read = os.preadv(self._file.fileno(), [rest], offset)
            if not n_read:
                raise CheckpointError(self.path, "the file became shorter while it was read")
            rest, offset = rest[n_read:], offset + n_read

    def close(self) -> None:
        """Closes the file; nothing can be read from it afterwards."""
        self._file.close()


def index_ranges(index: tuple[slice, ...], shape: tuple[int, ...]) -> list[range]:
    """Returns the range that ``index`` selects of each dimension; without a slice, all of it."""
    assert len(index) <= len(shape), f"{len(index)} slices into {len(shape)} dimensions"
    padded = (*index, *[slice(None)] * (len(shape) - len(index)))
    ranges = [range(*part.indices(size)) for part, size in zip(padded, shape, strict=True)]
    assert all(part.step == 1 for part in ranges), f"only steps of 1 are read, not {index}"
    return [part if part else range(part.start, part.start) for part in ranges]


def row_chunks(
    rows: range, row_bytes: int, group: int = 1, *, most: int | None = None
) -> Iterator[range]:
    """Cuts ``rows`` into pieces of about ``most`` bytes, each of whole groups of rows.

    The default of ``most`` is ``CHUNK_BYTES``.
    """
    step = max((most or CHUNK_BYTES) // max(row_bytes, 1) // group, 1) * group
    return (rows[start : start + step] for start in range(0, len(rows), step))
