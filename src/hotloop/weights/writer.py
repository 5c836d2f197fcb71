"""Writes a folder of safetensors as a stream, one tensor at a time.

A file is full when its header has no room left, so the space for the header can be small. Files are
written into a hidden folder beside the destination. It gets the destination's name when everything
is on disk, so a folder with that name is complete.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from hotloop.errors import ConfigError
from hotloop.safetensors_file import SafetensorsFile
from hotloop.weights.identity import SINGLE_FILE
from hotloop.weights.safetensors import DTYPES, INDEX_FILE
from hotloop.writing import errors_named, write_json

HEADER_BYTES = 256 * 2**10
"""Space for the header of each file: room for about two thousand tensors."""

_METADATA = {"format": "pt"}
_TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsWriter:
    """Writes a folder of safetensors: ``model.safetensors``, or shards with their index.

    >>> with SafetensorsWriter(folder) as writer:
    ...     writer.add("model.norm.weight", weight)
    ...     (writer.staging / "config.json").write_text(config)

    The folder appears, complete, when the block ends. If the block raises, nothing is left.

    Args:
        folder: The folder to make. It may exist if it is empty.
        max_shard_bytes: Tensor bytes after which the next file begins; a larger tensor gets its own
            file.

    Attributes:
        staging: The folder for files beside the weights, within the block.

    Raises:
        ConfigError: The folder is not empty.
    """

    def __init__(self, folder: Path, *, max_shard_bytes: int = 4 * 2**30) -> None:
        self.folder, self.max_shard_bytes = folder.resolve(), max_shard_bytes
        refuse_occupied(self.folder)
        self.staging = self.folder.parent / f".{self.folder.name}.{uuid.uuid4().hex[:8]}.partial"
        self._shards: list[SafetensorsFile] = []

    def __enter__(self) -> Self:
        with errors_named(self.folder):
            self.staging.mkdir(parents=True)
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends a tensor, from any device. The tensor is not kept."""
        assert all(name not in shard.names for shard in self._shards), f"{name} is added twice"
        # A tensor without dimensions has no bytes to be viewed as.
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        dtype, shape = _TYPE_NAMES[tensor.dtype], tuple(tensor.shape)
        last = self._shards[-1] if self._shards else None
        if (
            last is None
            or last.n_bytes + data.numel() > self.max_shard_bytes
            or not last.has_room(name, dtype, shape)
        ):
            last = self._next_shard()
        last.file.seek(last.place(name, dtype, shape, data.numel()))
        last.file.write(data.numpy().data)

    def _next_shard(self) -> SafetensorsFile:
        if self._shards:
            _finish(self._shards[-1])
        file = self._path(len(self._shards)).open("xb")
        self._shards.append(SafetensorsFile(file, _METADATA, header_bytes=HEADER_BYTES))
        return self._shards[-1]

    def _path(self, index: int) -> Path:
        return self.staging / f"{index}.partial"

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
        for index, shard in enumerate(self._shards):
            name = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            name = SINGLE_FILE if count == 1 else name
            self._path(index).rename(self.staging / name)
            weight_map |= dict.fromkeys(shard.names, name)
        if count > 1:
            total_size = sum(shard.n_bytes for shard in self._shards)
            contents = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
            write_json(self.staging / INDEX_FILE, contents)
        refuse_occupied(self.folder)
        if self.folder.exists():
            self.folder.rmdir()
        self.staging.rename(self.folder)


def refuse_occupied(folder: Path) -> None:
    """Refuses a destination that exists and is not an empty folder.

    Raises:
        ConfigError: It is neither missing nor an empty folder.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(
            f"{folder} exists and is not an empty folder: give another, or remove it first."
        )


def _finish(shard: SafetensorsFile) -> None:
    """Writes the header, flushes the file to disk, and closes it."""
    shard.finish()
    shard.file.flush()
    os.fsync(shard.file.fileno())
    shard.file.close()
