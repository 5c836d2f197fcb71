"""The header of a safetensors file: what it holds, in front of the data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

LENGTH_BYTES = 8
"""Bytes of the header's own length, in front of it."""


def tensor_entry(dtype: str, shape: Sequence[int], start: int, end: int) -> dict[str, Any]:
    """Returns the entry of a tensor.

    Args:
        dtype: Its element type, as safetensors names it.
        shape: Its shape.
        start: The byte at which its data begins, behind the header.
        end: The byte at which it ends.
    """
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def safetensors_header(
    entries: Mapping[str, Mapping[str, Any]],
    metadata: Mapping[str, str],
    n_bytes: int | None = None,
) -> bytes:
    """Makes what a file begins with: the header behind its length.

    Args:
        entries: The entries of all tensors by name.
        metadata: What else the file says of itself.
        n_bytes: Bytes in all, filled up with blanks; None takes as few as keep the data aligned.
    """
    header = json.dumps({"__metadata__": metadata, **entries}).encode()
    room = len(header) + -len(header) % 8 if n_bytes is None else n_bytes - LENGTH_BYTES
    assert len(header) <= room, "the header outgrew its space"
    return room.to_bytes(LENGTH_BYTES, "little") + header.ljust(room)
