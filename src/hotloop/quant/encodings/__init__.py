"""Encodings: how tools store quantized matrices.

An encoding decodes the tensors that a matrix is stored as into a ``QTensor``, without loss. If that
has the number format of the scheme that the matrix is to have, it is used as it is; otherwise it is
dequantized to float32 and quantized anew (``weights.source``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hotloop.kernels.linear import KernelFormat
from hotloop.quant.qtensor import QTensor
from hotloop.registry import resolve

ENCODINGS = {
    "hotloop": "hotloop.quant.encodings.hotloop:Hotloop",
    "gguf-q4_0": "hotloop.quant.encodings.gguf:Q4_0",
    "gguf-q4_1": "hotloop.quant.encodings.gguf:Q4_1",
    "gguf-q5_0": "hotloop.quant.encodings.gguf:Q5_0",
    "gguf-q5_1": "hotloop.quant.encodings.gguf:Q5_1",
    "gguf-q8_0": "hotloop.quant.encodings.gguf:Q8_0",
}
"""Every encoding: ``name -> "module:attribute"``."""


@dataclass(frozen=True, kw_only=True)
class StoredPart:
    """A tensor that a matrix [N, K] is stored as, one row for each output feature.

    Attributes:
        shape: [N, columns]: each column covers K / columns input features.
        dtype: Its element type, as the checkpoint's format names it.
        block: Columns that are stored in one piece, as whole bytes.
        margin: The largest factor that decoding applies to an element: the element times it must
            be finite.
    """

    shape: tuple[int, int]
    dtype: str
    block: int = 1
    margin: float = 1.0

    def unit(self, k: int) -> int:
        """Returns the number of input features that can only be read together, of K in all."""
        return 1 if self.shape[1] == 1 else k // self.shape[1] * self.block

    def columns(self, features: range, k: int) -> range:
        """Returns the columns of some of the K input features, which are whole units."""
        if self.shape[1] == 1:
            return range(1)
        each = k // self.shape[1]
        return range(features.start // each, features.stop // each)


class Encoding(Protocol):
    """One way of storing a quantized matrix."""

    def parts(
        self, shape: tuple[int, int], stored: Mapping[str, str], wanted: KernelFormat
    ) -> dict[str, StoredPart] | None:
        """Returns the tensors that must store a matrix; None if it is not in this encoding.

        Names are what follows the name of the matrix, such as ``.weight.scale``.

        Args:
            shape: Of the matrix.
            stored: The element types of the tensors of the matrix in the checkpoint, by name.
            wanted: The number format that the matrix is to have.
        """
        ...

    def decode(self, parts: Mapping[str, Tensor]) -> QTensor:
        """Decodes a matrix, or some of its rows and columns.

        Args:
            parts: By name, the same slice of each; blocks are bytes.
        """
        ...


def load_encodings() -> tuple[Encoding, ...]:
    """Loads every registered encoding, in the order of the registry."""
    return tuple(resolve("encoding", ENCODINGS, name) for name in ENCODINGS)
