"""GPTQ's layout, versions 1 and 2: 4 or 8 bits, packed along the input features.

``x.qweight`` is int32 [K * bits / 32, N], ``x.qzeros`` int32 [G, N * bits / 32], ``x.scales``
[G, N] and ``x.g_idx`` int32 [K], the group of each input feature;
``weight = (q - zero) * scale``.

Version 2 stores zero points as they are. Version 1 stores each zero point minus 1. Its writers
subtract from whole words, so that a zero point of 0 borrows from its neighbor; adding the same
number to the word is the exact inverse. Labels do not distinguish the versions reliably, because
writers confuse them. The zero points of a symmetric matrix distinguish them: all are half the
range, or all are one less.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hotloop.kernels.linear import KernelFormat
from hotloop.quant.encodings import Expected, Layout, StoredMatrix, StoredPart, sorted_features
from hotloop.quant.encodings.awq import QWEIGHT, QZEROS, SCALES
from hotloop.quant.encodings.bits import centered, unpack
from hotloop.quant.qtensor import QTensor

G_IDX = ".g_idx"

_ONES = {4: 0x11111111, 8: 0x01010101}
"""For each number of bits, a word whose integers are all 1."""


_ASSUMPTION = (
    "read as GPTQ's version 1, the default: zero points do not determine the version, and the "
    "checkpoint's configuration has no checkpoint_format (gptq is version 1, gptq_v2 version 2)"
)


class Gptq:
    """GPTQ's encoding."""

    @staticmethod
    def expected(matrix: StoredMatrix) -> Mapping[str, Expected]:
        """Expects words along the input features."""
        (n, k), bits, n_groups = matrix.shape, matrix.claim.bits, matrix.n_groups(SCALES)
        return {
            QWEIGHT: Expected("I32", (k * bits // 32 if bits else None, n)),
            QZEROS: Expected("I32", (n_groups, n * bits // 32 if bits else None)),
            SCALES: Expected(shape=(n_groups, n)),
        }

    @staticmethod
    def recognize(matrix: StoredMatrix) -> Layout | None:
        """Recognizes packing along the input features, and the version by the zero points."""
        (n, k), stored = matrix.shape, matrix.tensors
        if not {QWEIGHT, QZEROS, SCALES} <= stored.keys():
            return None
        shape, scales = stored[QWEIGHT].shape, stored[SCALES].shape
        if len(shape) != 2 or len(scales) != 2 or not shape[1] == scales[1] == n:
            return None
        rows = shape[0]
        if rows * 32 % k:
            return None
        bits, n_groups = rows * 32 // k, scales[0]
        if bits not in _ONES:
            raise matrix.error(QWEIGHT, f"is GPTQ of {bits} bits; 4 and 8 are supported")
        if n * bits % 32:
            return None
        if stored[QZEROS].shape != (n_groups, n * bits // 32) or stored[QZEROS].dtype != "I32":
            return None
        groups = matrix.groups(SCALES, n_groups)
        permutation_hash = matrix.permutation_hash(G_IDX, groups)
        permuted = permutation_hash is not None
        along = 0 if permuted else groups.features
        version, symmetric = _version(matrix, bits)
        scale_dtype = matrix.scale_dtype(SCALES)

        def decode(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> QTensor:
            values = centered(unpack(parts[QWEIGHT].T, bits), bits)
            features = sorted_features(parts[G_IDX]) if permuted else None

            def grouped(per_group: Tensor) -> Tensor:
                return groups.expand(per_group.T, shape[1])

            zero = None if symmetric else grouped(_zero_points(parts[QZEROS], bits, version))
            return QTensor(
                values=values if features is None else values.index_select(1, features),
                scale=grouped(parts[SCALES]),
                offset=zero,
                kind="int4" if bits == 4 else "int8",
                permutation=features,
                permutation_hash=permutation_hash,
            )

        per_word = 32 // bits
        parts = {
            QWEIGHT: StoredPart(
                shape=(rows, n), dtype="I32", features=(1, per_word), transposed=True
            ),
            QZEROS: StoredPart(
                shape=(n_groups, n // per_word),
                dtype="I32",
                features=(per_word, along),
                transposed=True,
            ),
            SCALES: StoredPart(
                shape=(n_groups, n),
                dtype=stored[SCALES].dtype,
                features=(1, along),
                transposed=True,
            ),
        }
        if permuted:  # any input feature may be in any group: all are read
            parts[G_IDX] = StoredPart(
                shape=(k,), dtype="I32", features=(0, 0), transposed=True, block=k
            )
        return Layout(
            parts=parts,
            decode=decode,
            format=KernelFormat(
                kind="int4" if bits == 4 else "int8",
                group_size=groups.even,
                scale_dtype=scale_dtype,
                zero="none" if symmetric else "integer",
                permutation_hash=permutation_hash,
            ),
            k=k,
            bits=bits,
            surplus=frozenset({G_IDX}),
            detail=f"version {version}{', act-order' if permuted else ''}",
            assumption="" if symmetric or matrix.claim.version_is_stated else _ASSUMPTION,
        )


def _version(matrix: StoredMatrix, bits: int) -> tuple[int, bool]:
    """Returns the version, and whether every zero point is half the range."""
    zeros, half = unpack(matrix.read(QZEROS), bits), 1 << bits - 1
    first = int(zeros.view(-1)[0])
    if first in (half - 1, half) and bool((zeros == first).all()):
        return 1 + (first == half), True
    if matrix.claim.version is None:
        raise matrix.error(
            QZEROS,
            "holds zero points of GPTQ's version 1 or 2, and the checkpoint's configuration does "
            "not say which (checkpoint_format: gptq or gptq_v2)",
        )
    return matrix.claim.version, False


def _zero_points(words: Tensor, bits: int, version: int) -> Tensor:
    """Unpacks zero points to int8 [G, N], minus half the range."""
    if version == 1:
        words = (words.long() + _ONES[bits]).to(torch.int32)  # the carry leaves the word
    return centered(unpack(words, bits), bits)
