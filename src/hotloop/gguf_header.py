"""Reads the header of a GGUF file: its metadata, and the offsets of its tensors.

The tokenizer (which is part of the metadata), the weights and ``hotloop info`` all need it. It is
read in one pass of buffered reads, with only the standard library. ``gguf.GGUFReader`` makes a
numpy array for every element of every list, which takes 6 s for the 49,152 tokens of a 135M model
(this module takes 0.2 s), and keeps the whole file memory-mapped.

No tensor data is read here, and keys are not interpreted.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hotloop.errors import CheckpointError, UnsupportedError, shorten_value
from hotloop.untrusted import open_file

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_MAX_HEADER_BYTES = 64 * 2**20  # vocabularies of 260,000 tokens with their merges take 12 MiB
_MAX_ITEMS = 2**22
_MIN_BYTES = {"metadata keys": 13, "tensors": 24}  # the fewest bytes of one of them

_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)

# The value types of the GGUF specification; scalars by their struct code.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """The entry of a tensor.

    Attributes:
        name: Its GGUF name, such as ``blk.0.attn_q.weight``.
        shape: Outermost dimension first, as in PyTorch; the file has the innermost first.
        type_id: Number of its ggml type.
        offset: Bytes from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class GGUFHeader:
    """The header of a file. ``metadata`` has numbers, strings and lists."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]


class _Cursor:
    """Reads little-endian values in sequence, and raises an error if the file ends early."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        size = os.fstat(file.fileno()).st_size
        self.left = min(size, _MAX_HEADER_BYTES)
        self.is_larger = size > _MAX_HEADER_BYTES

    def take(self, n_bytes: int) -> bytes:
        # Checked first, so that a damaged length allocates no memory.
        data = self.file.read(n_bytes) if n_bytes <= self.left else b""
        if len(data) < n_bytes:
            if self.is_larger:
                limit = _MAX_HEADER_BYTES >> 20
                problem = f"its header is larger than {limit} MiB: it is damaged"
            else:
                problem = "the file ends within its header: it is truncated or damaged"
            raise CheckpointError(self.path, problem)
        self.left -= n_bytes
        return data

    def count(self, what: str) -> int:
        """Reads the number of entries of some kind that follow."""
        n = self.number("Q")
        if n * _MIN_BYTES[what] > self.left:
            raise CheckpointError(self.path, f"claims {n} {what}, more than its size allows")
        return n

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        data = self.take(self.number("Q"))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(self.path, f"a text is not UTF-8: {data[:40]!r}") from error

    def value(self, type_id: int) -> Any:
        if type_id == _STRING:
            return self.string()
        if type_id in _SCALARS:
            return self.number(_SCALARS[type_id])
        if type_id != _ARRAY:
            raise CheckpointError(self.path, f"unknown metadata value type {type_id}")
        item_type, n_items = self.number("I"), self.number("Q")
        if n_items > _MAX_ITEMS:
            raise CheckpointError(self.path, f"claims a metadata list of {n_items} values")
        if item_type == _STRING:
            return [self.string() for _ in range(n_items)]
        if item_type not in _SCALARS:
            raise CheckpointError(self.path, f"unknown type {item_type} of a metadata list")
        code = _SCALARS[item_type]
        return list(
            struct.unpack(f"<{n_items}{code}", self.take(n_items * struct.calcsize(f"<{code}")))
        )


def is_gguf(path: Path) -> bool:
    """Tells whether a file is GGUF, by its first bytes or by the suffix of its name.

    Raises:
        CheckpointError: It cannot be read.
    """
    with open_file(path) as file:
        return file.read(len(_MAGIC)) == _MAGIC or path.suffix == ".gguf"


def model_parts(path: Path) -> list[Path]:
    """Lists the files of the model to which a file belongs, in order; most models are one file.

    ``path`` may be any part of a model in parts (``NAME-00001-of-00003.gguf``); the first one holds
    the metadata. Whether the other parts exist is not checked.
    """
    name = _PART_NAME.fullmatch(path.name)
    if not name or not 1 <= int(name["number"]) <= int(name["count"]):
        return [path]
    return [
        path.with_name(f"{name['stem']}-{number:05d}-of-{name['count']}.gguf")
        for number in range(1, int(name["count"]) + 1)
    ]


def read_gguf_header(path: Path) -> GGUFHeader:
    """Reads the header of a GGUF file (version 2 or 3, little-endian).

    Raises:
        CheckpointError: It is not a GGUF file, or its header is truncated or damaged.
        UnsupportedError: Its version or byte order is not supported.
    """
    with open_file(path) as file:
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
        n_tensors, n_metadata = cursor.count("tensors"), cursor.count("metadata keys")

        metadata: dict[str, Any] = {}
        for _ in range(n_metadata):
            key = cursor.string()
            if key in metadata:
                raise CheckpointError(path, f"metadata key {shorten_value(key)} appears twice")
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
    if type(alignment) is not int or not 1 <= alignment <= 2**20:
        raise CheckpointError(path, f"general.alignment is {shorten_value(alignment)}")
    data_start = -(-header_bytes // alignment) * alignment
    return GGUFHeader(
        path=path,
        metadata=metadata,
        tensors=tuple(
            GGUFTensor(name=name, shape=shape, type_id=type_id, offset=data_start + offset)
            for name, (shape, type_id, offset) in entries.items()
        ),
    )
