"""AutoAWQ's GEMM layout: 4 bits, packed along the output features.

``x.qweight`` is int32 [K, N / 8], ``x.qzeros`` int32 [G, N / 8] and ``x.scales`` [G, N];
``weight = (q - zero) * scale``. The eight integers of a word are interleaved, and zero points are
stored as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hotloop.kernels.linear import KernelFormat
from hotloop.quant.encodings import Expected, Layout, StoredMatrix, StoredPart
from hotloop.quant.encodings.bits import as_bytes, centered
from hotloop.quant.qtensor import QTensor

QWEIGHT, QZEROS, SCALES = ".qweight", ".qzeros", ".scales"

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""For each of the eight integers of a word, its index among the word's nibbles, lowest first."""


class Awq:
    """AWQ's encoding."""

    @staticmethod
    def expected(matrix: StoredMatrix) -> Mapping[str, Expected]:
        """Expects words along the output features."""
        (n, k), n_groups = matrix.shape, matrix.n_groups(SCALES)
        return {
            QWEIGHT: Expected("I32", (k, n // 8)),
            QZEROS: Expected("I32", (n_groups, n // 8)),
            SCALES: Expected(shape=(n_groups, n)),
        }

    @staticmethod
    def recognize(matrix: StoredMatrix) -> Layout | None:
        """Recognizes packing along the output features, with transposed scales."""
        (n, k), stored = matrix.shape, matrix.tensors
        if not {QWEIGHT, QZEROS, SCALES} <= stored.keys() or n % 8:
            return None
        shape, scales = stored[QWEIGHT].shape, stored[SCALES].shape
        # A square matrix in the GEMV layout has the same words, but its scales are [N, G].
        if shape != (k, n // 8) or len(scales) != 2 or scales[1] != n:
            return None
        n_groups = scales[0]
        groups = matrix.groups(SCALES, n_groups)
        along = groups.features
        scale_dtype = matrix.scale_dtype(SCALES)
        symmetric = _are_half(matrix, shape=(n_groups, n // 8))

        def decode(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> QTensor:
            return QTensor(
                values=_unpack(parts[QWEIGHT]),
                scale=groups.expand(parts[SCALES].T, shape[1]),
                offset=None if symmetric else groups.expand(_unpack(parts[QZEROS]), shape[1]),
                kind="int4",
            )

        def part(*shape: int, dtype: str, features: tuple[int, int]) -> StoredPart:
            return StoredPart(shape=shape, dtype=dtype, features=features, transposed=True)

        dtype = stored[SCALES].dtype
        return Layout(
            parts={
                QWEIGHT: part(k, n // 8, dtype="I32", features=(8, 1)),
                QZEROS: part(n_groups, n // 8, dtype="I32", features=(8, along)),
                SCALES: part(n_groups, n, dtype=dtype, features=(1, along)),
            },
            decode=decode,
            format=KernelFormat(
                kind="int4",
                group_size=groups.even,
                scale_dtype=scale_dtype,
                zero="none" if symmetric else "integer",
            ),
            k=k,
            bits=4,
        )


def _are_half(matrix: StoredMatrix, shape: tuple[int, int]) -> bool:
    """Returns whether every zero point is half the range, as in a symmetric matrix."""
    entry = matrix.tensors[QZEROS]
    if (entry.shape, entry.dtype) != (shape, "I32"):
        return False  # an error names it when it is read
    return not bool(_unpack(matrix.read(QZEROS)).any())


def _unpack(words: Tensor) -> Tensor:
    """Unpacks int32 [A, N / 8] to int8 [N, A] of -8…7."""
    # The words are transposed first, since they have fewer elements; then their integers are
    # written in place.
    bytes_ = as_bytes(words.T).unflatten(1, (-1, 4))
    rows = bytes_.new_empty(len(bytes_), 8, bytes_.shape[1])
    for i, place in enumerate(_ORDER):
        rows[:, i] = bytes_[:, :, place // 2] >> 4 * (place % 2) & 15
    return centered(rows.flatten(0, 1), 4)
