"""The integer and 4-bit float formats of compressed-tensors, as LLM Compressor writes them.

- pack-quantized: ``x.weight_packed`` int32 [N, ⌈K * bits / 32⌉] holds integers of 4 or 8 bits, plus
  half the range, lowest bits first; if asymmetric, ``x.weight_zero_point`` is packed in the same
  way along N.
- int-quantized: ``x.weight`` int8 [N, K].
- nvfp4-pack-quantized: ``x.weight_packed`` uint8 [N, K / 2], with the first of two weights in the
  low nibble, an e4m3 scale for 16 input features and a divisor of all scales,
  ``x.weight_global_scale``.
- mxfp4-pack-quantized: the same for 32 input features, with powers of two as scales.

``x.weight_scale`` is [N, G], [N, 1] or a single scale; ``weight = (q - zero point) * scale``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hotloop.kernels.linear import KernelFormat, Zero
from hotloop.quant.encodings import (
    Expected,
    Groups,
    Layout,
    StoredMatrix,
    StoredPart,
    sorted_features,
)
from hotloop.quant.encodings.bits import centered, unpack
from hotloop.quant.qtensor import QTensor

PACKED, SCALE, ZERO, G_IDX = (
    ".weight_packed",
    ".weight_scale",
    ".weight_zero_point",
    ".weight_g_idx",
)
SHAPE, GLOBAL_SCALE = ".weight_shape", ".weight_global_scale"

FP4 = tuple(
    sign * number for sign in (1.0, -1.0) for number in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
)
"""The sixteen numbers of e2m1, by their bits; the fourth bit is the sign."""


class PackQuantized:
    """Integers of 4 or 8 bits in words."""

    @staticmethod
    def expected(matrix: StoredMatrix) -> Mapping[str, Expected]:
        """Expects words and scales."""
        (n, k), bits = matrix.shape, matrix.claim.bits
        words = -(-k * bits // 32) if bits else None
        return {PACKED: Expected("I32", (n, words)), SCALE: Expected()}

    @staticmethod
    def recognize(matrix: StoredMatrix) -> Layout | None:
        """Recognizes words along the input features."""
        (n, k), stored = matrix.shape, matrix.tensors
        if PACKED not in stored or stored[PACKED].dtype != "I32" or SCALE not in stored:
            return None
        words = {bits: (n, -(-k * bits // 32)) for bits in (4, 8)}
        bits = next((b for b, shape in words.items() if stored[PACKED].shape == shape), None)
        if bits is None:
            return None
        _check_shape(matrix)
        scales = _Scales(matrix, zero_bits=bits)
        permutation_hash = matrix.permutation_hash(G_IDX, scales.groups)
        permuted = permutation_hash is not None

        def decode(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> QTensor:
            values = centered(unpack(parts[PACKED], bits)[:, : shape[1]], bits)
            features = sorted_features(parts[G_IDX]) if permuted else None
            return QTensor(
                values=values.contiguous()
                if features is None
                else values.index_select(1, features),
                scale=scales.scale(parts, shape),
                offset=scales.zero_points(parts, shape),
                kind="int4" if bits == 4 else "int8",
                permutation=features,
                permutation_hash=permutation_hash,
            )

        parts = {PACKED: StoredPart(shape=words[bits], dtype="I32", features=(1, 32 // bits))}
        parts |= scales.parts(along=not permuted)
        if permuted:  # any input feature may be in any group: all are read
            parts[G_IDX] = StoredPart(shape=(k,), dtype="I32", features=(0, 0), block=k)
        return Layout(
            parts=parts,
            decode=decode,
            format=KernelFormat(
                kind="int4" if bits == 4 else "int8",
                group_size=scales.groups.even,
                scale_dtype=scales.dtype,
                zero=scales.zero,
                permutation_hash=permutation_hash,
            ),
            k=k,
            bits=bits,
            surplus=frozenset({SHAPE, G_IDX, ZERO}),
            detail="act-order" if permuted else "",
        )


class IntQuantized:
    """Integers of 8 bits, as they are."""

    @staticmethod
    def expected(matrix: StoredMatrix) -> Mapping[str, Expected]:
        """Expects a scale beside integers."""
        return {".weight": Expected("I8", matrix.shape), SCALE: Expected()}

    @staticmethod
    def recognize(matrix: StoredMatrix) -> Layout | None:
        """Recognizes integers by their type."""
        (n, k), stored = matrix.shape, matrix.tensors
        if SCALE not in stored or ".weight" not in stored or stored[".weight"].dtype != "I8":
            return None
        scales = _Scales(matrix, zero_bits=None)

        def decode(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> QTensor:
            return QTensor(
                values=parts[".weight"],
                scale=scales.scale(parts, shape),
                offset=scales.zero_points(parts, shape),
                kind="int8",
            )

        return Layout(
            parts={".weight": StoredPart(shape=(n, k), dtype="I8")} | scales.parts(),
            decode=decode,
            format=KernelFormat(
                kind="int8",
                group_size=scales.groups.even,
                scale_dtype=scales.dtype,
                zero=scales.zero,
            ),
            k=k,
            bits=min(matrix.claim.bits or 8, 8),  # integers of fewer bits are stored in 8 bits too
            surplus=frozenset({SHAPE, ZERO}),
        )


class Nvfp4:
    """4-bit floating point with two-level scales."""

    @staticmethod
    def expected(matrix: StoredMatrix) -> Mapping[str, Expected]:
        """Expects bytes, with two-level scales."""
        return _expected_fp4(matrix, "F8_E4M3") | {GLOBAL_SCALE: Expected("F32")}

    @staticmethod
    def recognize(matrix: StoredMatrix) -> Layout | None:
        """Recognizes bytes with e4m3 scales."""
        stored = matrix.tensors
        if not _is_fp4(matrix, "F8_E4M3") or GLOBAL_SCALE not in stored:
            return None
        k = matrix.shape[1]
        _check_divisor(matrix)

        def decode(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> QTensor:
            # The inverse of the divisor is rounded to float32, once.
            factor = parts[GLOBAL_SCALE].float().reciprocal().reshape(1, 1)
            return QTensor(
                values=_nibbles(parts[PACKED]),
                scale=parts[SCALE],
                kind="lut4",
                super_scale=factor.expand(shape[0], 1).contiguous(),
                table=fp4_table(parts[PACKED].device),
            )

        return Layout(
            parts=_fp4_parts(matrix, "F8_E4M3")
            | {
                GLOBAL_SCALE: StoredPart(
                    shape=stored[GLOBAL_SCALE].shape, dtype="F32", features=(0, 0)
                )
            },
            decode=decode,
            format=KernelFormat(
                kind="lut4",
                group_size=16,
                scale_dtype=torch.float8_e4m3fn,
                super_size=k,
                super_dtype=torch.float32,
                table=FP4,
            ),
            k=k,
            bits=4,
        )


def _check_divisor(matrix: StoredMatrix) -> None:
    """Checks the divisor of all scales of a matrix: one positive, finite float32."""
    entry = matrix.tensors[GLOBAL_SCALE]
    if entry.shape not in ((), (1,)) or entry.dtype != "F32":
        raise matrix.error(
            GLOBAL_SCALE,
            f"has shape {list(entry.shape)} of {entry.dtype}: the divisor of a matrix's scales is "
            "one number, [1] of F32",
        )
    divisor = matrix.read(GLOBAL_SCALE).item()
    if not 0 < divisor < math.inf:
        raise matrix.error(
            GLOBAL_SCALE,
            f"holds {divisor:g}: the divisor of a matrix's scales is above 0 and finite",
        )


class Mxfp4:
    """4-bit floating point with a power of two for 32 input features."""

    @staticmethod
    def expected(matrix: StoredMatrix) -> Mapping[str, Expected]:
        """Expects bytes, with exponents."""
        return _expected_fp4(matrix, "U8")

    @staticmethod
    def recognize(matrix: StoredMatrix) -> Layout | None:
        """Recognizes bytes with exponents."""
        dtype = "F8_E8M0" if _is_fp4(matrix, "F8_E8M0") else "U8"
        if not _is_fp4(matrix, dtype):
            return None

        def decode(parts: Mapping[str, Tensor], _shape: tuple[int, int]) -> QTensor:
            return QTensor(
                values=_nibbles(parts[PACKED]),
                scale=parts[SCALE].view(torch.float8_e8m0fnu),
                kind="lut4",
                table=fp4_table(parts[PACKED].device),
            )

        return Layout(
            parts=_fp4_parts(matrix, dtype),
            decode=decode,
            format=KernelFormat(
                kind="lut4", group_size=32, scale_dtype=torch.float8_e8m0fnu, table=FP4
            ),
            k=matrix.shape[1],
            bits=4,
        )


def fp4_table(device: torch.device) -> Tensor:
    """Returns the sixteen numbers of e2m1, by their bits."""
    return torch.tensor(FP4, device=device)


def _nibbles(packed: Tensor) -> Tensor:
    """Unpacks uint8 [N, K / 2] to int8 [N, K], the low nibble first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).view(torch.int8)


_FP4_GROUPS = {"F8_E4M3": 16, "F8_E8M0": 32, "U8": 32}


def _is_fp4(matrix: StoredMatrix, scales: str) -> bool:
    """Returns whether a matrix is stored as bytes, with scales of a type."""
    (n, k), stored, group = matrix.shape, matrix.tensors, _FP4_GROUPS[scales]
    if PACKED not in stored or SCALE not in stored or k % group:
        return False
    packed, scale = stored[PACKED], stored[SCALE]
    return (packed.dtype, packed.shape) == ("U8", (n, k // 2)) and (scale.dtype, scale.shape) == (
        scales,
        (n, k // group),
    )


def _expected_fp4(matrix: StoredMatrix, scales: str) -> dict[str, Expected]:
    (n, k), group = matrix.shape, _FP4_GROUPS[scales]
    return {
        PACKED: Expected("U8", (n, k // 2)),
        SCALE: Expected(None if scales == "U8" else scales, (n, k // group)),
    }


def _fp4_parts(matrix: StoredMatrix, scales: str) -> dict[str, StoredPart]:
    (n, k), group = matrix.shape, _FP4_GROUPS[scales]
    return {
        PACKED: StoredPart(shape=(n, k // 2), dtype="U8", features=(1, 2)),
        SCALE: StoredPart(shape=(n, k // group), dtype=scales, features=(1, group)),
    }


class _Scales:
    """The scales and zero points of a matrix of integers.

    Args:
        matrix: The matrix.
        zero_bits: Bits of a packed zero point; None if zero points are int8.
    """

    def __init__(self, matrix: StoredMatrix, *, zero_bits: int | None) -> None:
        (n, k), stored = matrix.shape, matrix.tensors
        self._entry, self._n = stored[SCALE], n
        self.dtype = matrix.scale_dtype(SCALE)
        shape = self._entry.shape
        self._is_single = shape in ((), (1,), (1, 1))
        if not self._is_single and (len(shape) != 2 or shape[0] != n):
            raise matrix.error(SCALE, f"has shape {list(shape)} for a matrix of {[n, k]}")
        if self._is_single and n > 1:
            self.groups = Groups.of(k, k)
        else:
            self.groups = matrix.groups(SCALE, shape[1] if len(shape) == 2 else 1)
        self._zero_bits = self._bits_of_zero_points(matrix, zero_bits)
        is_symmetric = ZERO not in stored or _are_zero(matrix, self._zero_bits)
        self.zero: Zero = "none" if is_symmetric else "integer"

    def _bits_of_zero_points(self, matrix: StoredMatrix, packed_bits: int | None) -> int | None:
        """Returns the bits of packed zero points; None if they are int8."""
        if ZERO not in matrix.tensors:
            if matrix.claim.symmetric is False:
                raise matrix.error(
                    SCALE, f"has no {ZERO} beside it, though the configuration says asymmetric"
                )
            return None
        entry, g = matrix.tensors[ZERO], self.groups.n
        if packed_bits and (entry.dtype, entry.shape) == (
            "I32",
            (-(-self._n * packed_bits // 32), g),
        ):
            return packed_bits
        if (entry.dtype, entry.shape) != ("I8", self._entry.shape):
            raise matrix.error(
                ZERO,
                f"has shape {list(entry.shape)} of {entry.dtype}: zero points are packed along the "
                "output features, or I8 like the scales",
            )
        half = 1 << (packed_bits or 8) - 1
        zeros = matrix.read(ZERO)
        if int(zeros.min()) < -half or int(zeros.max()) >= half:
            raise matrix.error(
                ZERO,
                f"holds {int(zeros.min())} to {int(zeros.max())}: zero points are signed, "
                f"{-half} to {half - 1}",
            )
        return None

    def parts(self, *, along: bool = True) -> dict[str, StoredPart]:
        """Returns the tensors of the scales and zero points, by suffix.

        Args:
            along: Groups have consecutive input features, so a slice of them needs only its groups.
        """
        each = self.groups.features if along else 0
        features = (0, 0) if self._is_single else (1, each)
        entry = self._entry
        parts = {SCALE: StoredPart(shape=entry.shape, dtype=entry.dtype, features=features)}
        if self.zero == "integer":
            if bits := self._zero_bits:
                shape = (-(-self._n * bits // 32), self.groups.n)
                parts[ZERO] = StoredPart(shape=shape, dtype="I32", features=(32 // bits, each))
            else:
                parts[ZERO] = StoredPart(shape=entry.shape, dtype="I8", features=features)
        return parts

    def scale(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """Returns the scales of a slice, [N, G]."""
        return self._expand(parts[SCALE], shape)

    def zero_points(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor | None:
        """Returns the zero points of a slice, int8 [N, G]; None if they are all 0."""
        if self.zero == "none":
            return None
        zeros = parts[ZERO]
        if self._zero_bits is not None:
            bits = self._zero_bits
            zeros = centered(unpack(zeros.T, bits), bits).T[: shape[0]]
        return self._expand(zeros, shape)

    def _expand(self, per_group: Tensor, shape: tuple[int, int]) -> Tensor:
        if self._is_single:
            per_group = per_group.reshape(1, 1).expand(shape[0], 1)
        return self.groups.expand(per_group, shape[1])


def _are_zero(matrix: StoredMatrix, bits: int | None) -> bool:
    zeros = matrix.read(ZERO)
    if bits is None:
        return not bool(zeros.any())
    return not bool(centered(unpack(zeros.T, bits), bits).T[: matrix.shape[0]].any())


def _check_shape(matrix: StoredMatrix) -> None:
    """Checks the tensor that repeats the shape of the matrix."""
    if SHAPE not in matrix.tensors:
        return
    entry = matrix.tensors[SHAPE]
    if entry.shape != (2,) or matrix.read(SHAPE).tolist() != list(matrix.shape):
        raise matrix.error(SHAPE, f"does not say {list(matrix.shape)}, the shape of the matrix")
