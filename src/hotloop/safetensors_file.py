"""Writes a safetensors file whose tensors become known one at a time, in any order.

The format begins with a header that lists every tensor. So a fixed space is reserved for it at the
beginning of the file (the format allows trailing blanks in a header), and it is written last.
"""

from __future__ import annotations

import json
from collections.abc import KeysView, Mapping, Sequence
from typing import Any, BinaryIO

_LENGTH_BYTES = 8
"""Bytes of the header's length, which precedes the header."""


class SafetensorsFile:
    """Places tensors in a safetensors file, and writes its header.

    Args:
        file: Empty, open for writing.
        metadata: Text in the header, beside the tensors.
        header_bytes: The space for the header, a multiple of 8.

    Attributes:
        file: The file; the caller writes the data of each tensor at its position.
        names: The tensors so far.
        n_bytes: Bytes of their data.
    """

    def __init__(self, file: BinaryIO, metadata: Mapping[str, str], *, header_bytes: int) -> None:
        self.file, self.n_bytes = file, 0
        self._metadata, self._space = metadata, header_bytes - _LENGTH_BYTES
        self._entries: dict[str, Any] = {}
        self._used = len(self._header())

    @property
    def names(self) -> KeysView[str]:
        """The tensors so far."""
        return self._entries.keys()

    def has_room(self, name: str, dtype: str, shape: Sequence[int]) -> bool:
        """Tells whether the header can list another tensor."""
        return self._used + _entry_bytes(name, dtype, shape) <= self._space

    def place(self, name: str, dtype: str, shape: Sequence[int], n_bytes: int) -> int:
        """Adds a tensor after the last one; returns the position of its data in the file.

        Args:
            name: Its name.
            dtype: Its element type, as safetensors names it.
            shape: Its shape.
            n_bytes: Bytes of its data.
        """
        assert name not in self._entries, f"{name} is added twice"
        assert self.has_room(name, dtype, shape), f"the header has no room for {name}"
        start, self.n_bytes = self.n_bytes, self.n_bytes + n_bytes
        self._entries[name] = _entry(dtype, shape, start, self.n_bytes)
        self._used += _entry_bytes(name, dtype, shape)
        return _LENGTH_BYTES + self._space + start

    def finish(self) -> None:
        """Writes the header, after all data."""
        self.file.seek(0)
        self.file.write(self._space.to_bytes(_LENGTH_BYTES, "little"))
        self.file.write(self._header().ljust(self._space))

    def _header(self) -> bytes:
        return json.dumps({"__metadata__": self._metadata, **self._entries}).encode()


def _entry(dtype: str, shape: Sequence[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def _entry_bytes(name: str, dtype: str, shape: Sequence[int]) -> int:
    """Returns an upper bound on the bytes of an entry; its offsets have at most 19 digits."""
    return len(json.dumps({name: _entry(dtype, shape, 2**63, 2**63)}))
