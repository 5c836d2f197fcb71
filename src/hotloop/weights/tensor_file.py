"""Reading tensors out of a file, a few bytes at a time.

What every checkpoint format here is built on. Nothing is memory-mapped: pages of a mapping that
have been touched count as resident memory of the process until the system takes them back, so
that a checkpoint read from end to end through one shows up in full at the peak. Here bytes are
read into fresh memory that goes when the tensor goes, and the file stays where it belongs, in the
system's page cache, ready for the next rank. What is held at a time is the tensor returned and
one chunk of at most ``CHUNK_BYTES``. Measured: two shards of 1 GiB in tensors of 128 MiB, read
from end to end, raise the peak of resident memory by 132 MiB; memory-mapped, by 1,028 MiB.

The meaning of the bytes is the formats' business.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hotloop.errors import CheckpointError

CHUNK_BYTES = 8 * 2**20
"""What is read at once of a tensor that is sliced or dequantized on its way."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What a checkpoint says of one tensor.

    Attributes:
        name: Its Hugging Face name, such as ``model.layers.0.self_attn.q_proj.weight``.
        shape: As PyTorch has it: ``(out_features, in_features)`` for a linear layer.
        dtype: The stored type, in its format's own word: ``BF16``, ``I32``, ``Q4_K``.
        file: Where it is stored.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path


class TensorFile:
    """A file open for reading at given places, by several threads if need be.

    Raises:
        CheckpointError: The file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(path, f"cannot be opened: {error.strerror}") from error
        self.n_bytes = path.stat().st_size
        self._lock = threading.Lock()

    def read(self, offset: int, n_bytes: int) -> Tensor:
        """Bytes ``offset`` to ``offset + n_bytes`` as a new uint8 tensor ``[n_bytes]``."""
        data = torch.empty(n_bytes, dtype=torch.uint8)
        rest = data.numpy().data
        with self._lock:
            self._file.seek(offset)
            while rest:  # one call returns at most 2 GiB on Linux
                n_read = self._file.readinto(rest)
                if not n_read:
                    raise CheckpointError(self.path, "the file became shorter while it was read")
                rest = rest[n_read:]
        return data

    def close(self) -> None:
        """Closes the file; nothing can be read from it afterwards."""
        self._file.close()


def index_ranges(index: tuple[slice, ...], shape: tuple[int, ...]) -> list[range]:
    """What ``index`` selects of each dimension of ``shape``; dimensions it leaves out are whole."""
    assert len(index) <= len(shape), f"{len(index)} slices into {len(shape)} dimensions"
    padded = (*index, *[slice(None)] * (len(shape) - len(index)))
    ranges = [range(*part.indices(size)) for part, size in zip(padded, shape, strict=True)]
    assert all(part.step == 1 for part in ranges), f"only steps of 1 are read, not {index}"
    return [part if part else range(part.start, part.start) for part in ranges]


def row_chunks(rows: range, row_bytes: int, group: int = 1) -> Iterator[range]:
    """Cuts ``rows`` into pieces of about ``CHUNK_BYTES``, each of whole groups of rows."""
    step = max(CHUNK_BYTES // max(row_bytes, 1) // group, 1) * group
    return (rows[start : start + step] for start in range(0, len(rows), step))
