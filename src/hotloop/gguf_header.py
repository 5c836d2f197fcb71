"""The header of a GGUF file: its metadata, and where its tensors lie.

One pass of buffered reads over the header, with the standard library alone: the tokenizer (which
lives in the metadata), the weights and ``hotloop info`` all start here. ``gguf.GGUFReader`` does
the same with a numpy array for every element of every list, which takes 6 s for the 49,152 tokens
of a 135M model where this takes 0.2 s, and keeps the whole file memory-mapped.

No tensor data is read here and no key is given a meaning.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hotloop.errors import CheckpointError, UnsupportedError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4

# The value types of the GGUF specification; scalars by their struct code.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """One tensor's entry.

    Attributes:
        name: Its GGUF name, such as ``blk.0.attn_q.weight``.
        shape: Outermost dimension first, as PyTorch has it; the file holds them innermost first.
        type_id: The ggml type's number.
        offset: Bytes from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class GGUFHeader:
    """All of one file but its tensor data. ``metadata`` holds numbers, strings and lists."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]


class _Cursor:
    """Reads little-endian values one after the other, and says so where the file ends early."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.left = path.stat().st_size

    def take(self, n_bytes: int) -> bytes:
        # Checked first, so that a damaged length asks for no memory.
        if n_bytes > self.left:
            raise CheckpointError(
                self.path, "the file ends within its header: it is truncated or damaged"
            )
        self.left -= n_bytes
        return self.file.read(n_bytes)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        data = self.take(self.number("Q"))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(self.path, f"a string is not UTF-8: {data[:40]!r}") from error

    def value(self, type_id: int) -> Any:
        if type_id == _STRING:
            return self.string()
        if type_id in _SCALARS:
            return self.number(_SCALARS[type_id])
        if type_id != _ARRAY:
            raise CheckpointError(self.path, f"unknown metadata value type {type_id}")
        item_type, n_items = self.number("I"), self.number("Q")
        if item_type == _STRING:
            return [self.string() for _ in range(n_items)]
        if item_type not in _SCALARS:
            raise CheckpointError(self.path, f"unknown type {item_type} of a metadata list")
        code = _SCALARS[item_type]
        return list(
            struct.unpack(f"<{n_items}{code}", self.take(n_items * struct.calcsize(f"<{code}")))
        )


def read_gguf_header(path: Path) -> GGUFHeader:
    """Reads the header of a GGUF file (version 2 or 3, little-endian).

    Raises:
        CheckpointError: No GGUF file, or a truncated or damaged header.
        UnsupportedError: A version or byte order that is not read.
    """
    with path.open("rb") as file:
        cursor = _Cursor(file, path)
        if cursor.left < len(_MAGIC) or cursor.take(len(_MAGIC)) != _MAGIC:
            raise CheckpointError(path, "not a GGUF file: it does not begin with 'GGUF'")
        version = cursor.number("I")
        if version not in _VERSIONS:
            order = " (big-endian)" if version & 0xFFFF == 0 else ""
            raise UnsupportedError(
                f"{path}: GGUF version {version}{order} is not supported, only little-endian 2 "
                "and 3. Convert the model again with a current llama.cpp."
            )
        n_tensors, n_metadata = cursor.number("Q"), cursor.number("Q")

        metadata: dict[str, Any] = {}
        for _ in range(n_metadata):
            key = cursor.string()
            if key in metadata:
                raise CheckpointError(path, f"metadata key {key!r} appears twice")
            metadata[key] = cursor.value(cursor.number("I"))

        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(n_tensors):
            name, n_dims = cursor.string(), cursor.number("I")
            if name in entries:
                raise CheckpointError(path, "appears twice", tensor=name)
            if n_dims > _MAX_DIMS:
                raise CheckpointError(path, f"has {n_dims} dimensions", tensor=name)
            shape = tuple(cursor.number("Q") for _ in range(n_dims))[::-1]
            entries[name] = (shape, cursor.number("I"), cursor.number("Q"))
        header_bytes = file.tell()

    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise CheckpointError(path, f"general.alignment is {alignment!r}")
    data_start = -(-header_bytes // alignment) * alignment
    return GGUFHeader(
        path=path,
        metadata=metadata,
        tensors=tuple(
            GGUFTensor(name=name, shape=shape, type_id=type_id, offset=data_start + offset)
            for name, (shape, type_id, offset) in entries.items()
        ),
    )
