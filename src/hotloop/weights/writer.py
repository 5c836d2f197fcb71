"""Writing safetensors as a stream: one tensor at a time, none of them kept.

The format wants its header, which lists every tensor, before the data. So a fixed space is left at
the front of each file (trailing blanks in a header are part of the format), tensors are appended
behind it as they come, and the header is put in its place when the file is full. A shard that has
no room left for entries in its header is full too, so the space can be small.

Files are written into a hidden folder beside the destination, which gets its name when everything
is on disk: what has the name is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from hotloop.errors import ConfigError
from hotloop.safetensors_header import safetensors_header, tensor_entry
from hotloop.weights.identity import SINGLE_FILE
from hotloop.weights.safetensors import DTYPES, INDEX_FILE
from hotloop.writing import errors_named

HEADER_BYTES = 256 * 2**10
"""Offset of the data in each file: room for about two thousand tensors."""

_METADATA = {"format": "pt"}
_TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(kw_only=True)
class _Shard:
    """A file being written; ``header_bytes`` is what its header takes so far."""

    path: Path
    file: BinaryIO
    entries: dict[str, Any] = field(default_factory=dict)
    n_bytes: int = 0
    header_bytes: int = len(safetensors_header({}, _METADATA))


class SafetensorsWriter:
    """Writes a folder of safetensors: ``model.safetensors``, or shards with their index.

    >>> with SafetensorsWriter(folder) as writer:
    ...     writer.add("model.norm.weight", weight)
    ...     (writer.staging / "config.json").write_text(config)

    The folder appears when the block ends, with everything in it. If the block raises, nothing
    is left.

    Args:
        folder: The folder to make. It may exist if it is empty.
        max_shard_bytes: Tensor bytes after which the next file begins; a larger tensor gets one
            of its own.

    Attributes:
        staging: Where files to go beside the weights are to be put, within the block.

    Raises:
        ConfigError: The folder holds something already.
    """

    def __init__(self, folder: Path, *, max_shard_bytes: int = 4 * 2**30) -> None:
        self.folder, self.max_shard_bytes = folder.resolve(), max_shard_bytes
        refuse_occupied(self.folder)
        self.staging = self.folder.parent / f".{self.folder.name}.{uuid.uuid4().hex[:8]}.partial"
        self._shards: list[_Shard] = []

    def __enter__(self) -> Self:
        with errors_named(self.folder):
            self.staging.mkdir(parents=True)
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends a tensor, from any device. It is not needed any more afterwards."""
        assert all(name not in shard.entries for shard in self._shards), f"{name} is added twice"
        # A tensor without dimensions has no bytes to be viewed as.
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        dtype = _TYPE_NAMES[tensor.dtype]
        # The longest offsets there are stand in for the real ones.
        entry_bytes = len(json.dumps({name: tensor_entry(dtype, tensor.shape, 2**63, 2**63)}))
        shard = self._shard_for(data.numel(), entry_bytes)
        end = shard.n_bytes + data.numel()
        shard.file.write(data.numpy().data)
        shard.entries[name] = tensor_entry(dtype, tensor.shape, shard.n_bytes, end)
        shard.n_bytes, shard.header_bytes = end, shard.header_bytes + entry_bytes

    def _shard_for(self, n_bytes: int, entry_bytes: int) -> _Shard:
        if self._shards:
            last = self._shards[-1]
            fits = last.n_bytes + n_bytes <= self.max_shard_bytes
            if fits and last.header_bytes + entry_bytes <= HEADER_BYTES:
                return last
            _finish(last)
        path = self.staging / f"{len(self._shards)}.partial"
        shard = _Shard(path=path, file=path.open("xb"))
        self._shards.append(shard)
        assert shard.header_bytes + entry_bytes <= HEADER_BYTES, "no header holds such a name"
        shard.file.seek(HEADER_BYTES)
        return shard

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._publish()
        finally:
            for shard in self._shards:
                shard.file.close()
            shutil.rmtree(self.staging, ignore_errors=True)

    def _publish(self) -> None:
        assert self._shards, "nothing was added"
        _finish(self._shards[-1])
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards, start=1):
            name = SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            shard.path.rename(self.staging / name)
            weight_map |= dict.fromkeys(shard.entries, name)
        if count > 1:
            total_size = sum(shard.n_bytes for shard in self._shards)
            index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
            (self.staging / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
        refuse_occupied(self.folder)
        if self.folder.exists():
            self.folder.rmdir()
        self.staging.rename(self.folder)


def refuse_occupied(folder: Path) -> None:
    """Refuses to write where something is already.

    Raises:
        ConfigError: It is neither missing nor an empty folder.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(
            f"{folder} exists and is not an empty folder: give another, or remove it first."
        )


def _finish(shard: _Shard) -> None:
    """Puts the header in its place and the whole file on disk."""
    shard.file.seek(0)
    shard.file.write(safetensors_header(shard.entries, _METADATA, HEADER_BYTES))
    shard.file.flush()
    os.fsync(shard.file.fileno())
    shard.file.close()
