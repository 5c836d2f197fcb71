"""The encoding in which ``hotloop quantize`` stores a matrix.

``x.weight`` is stored as ``x.weight.values`` (int8 or float8_e4m3fn [N, K]; int4: uint8 [N, K/2],
even columns in the low nibble, each plus 8), ``x.weight.scale`` (bfloat16 for groups, float32 for
rows) and, if the scheme has them, ``x.weight.offset`` [N, G]: offsets of the scales' type, or int8
zero points.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hotloop.kernels.linear import QuantizedKind
from hotloop.quant.encodings import Expected, Layout, StoredMatrix, StoredPart
from hotloop.quant.qtensor import QTensor

VALUES, SCALE, OFFSET = ".weight.values", ".weight.scale", ".weight.offset"


class Hotloop:
    """hotloop's encoding; the checkpoint's description names the scheme of a matrix."""

    @staticmethod
    def expected(_matrix: StoredMatrix) -> Mapping[str, Expected]:
        """Expects nothing: an error names a missing tensor when it is read."""
        return {}

    @staticmethod
    def recognize(matrix: StoredMatrix) -> Layout | None:
        """Recognizes ``.weight.values``, and expects the tensors of the wanted format."""
        wanted = matrix.wanted
        if wanted is None or wanted.group_size is None or VALUES not in matrix.tensors:
            return None
        (n, k), is_int4 = matrix.shape, wanted.kind == "int4"
        values = {"int8": "I8", "nested": "I8", "fp8": "F8_E4M3", "int4": "U8"}[wanted.kind]
        grouped = wanted.scale_dtype == torch.bfloat16
        groups, scale = (n, k // wanted.group_size), "BF16" if grouped else "F32"
        along = 0 if groups[1] == 1 else wanted.group_size
        parts = {
            VALUES: StoredPart(
                shape=(n, k // 2 if is_int4 else k), dtype=values, features=(1, 1 + is_int4)
            ),
            SCALE: StoredPart(shape=groups, dtype=scale, features=(1, along)),
        }
        if wanted.zero != "none":
            offset = "I8" if wanted.zero == "integer" else scale
            parts[OFFSET] = StoredPart(shape=groups, dtype=offset, features=(1, along))
        bits = 4 if is_int4 else 8
        return Layout(parts=parts, decode=Hotloop.decode, format=wanted, k=k, bits=bits)

    @staticmethod
    def decode(parts: Mapping[str, Tensor], _shape: tuple[int, int]) -> QTensor:
        """Unpacks nibbles; everything else is stored as it is."""
        values = parts[VALUES]
        kind: QuantizedKind = "fp8" if values.dtype == torch.float8_e4m3fn else "int8"
        if values.dtype == torch.int8 and parts[SCALE].dtype == torch.bfloat16:
            kind = "nested"
        if values.dtype == torch.uint8:
            nibbles = torch.stack((values & 15, values >> 4), dim=-1)
            values, kind = nibbles.flatten(1).to(torch.int8) - 8, "int4"
        return QTensor(values=values, scale=parts[SCALE], offset=parts.get(OFFSET), kind=kind)

    @staticmethod
    def encode(weight: QTensor) -> dict[str, Tensor]:
        """Returns the inverse of ``decode``."""
        values = weight.values
        if weight.kind == "int4":
            nibbles = (values + 8).to(torch.uint8)
            values = nibbles[:, ::2] | (nibbles[:, 1::2] << 4)
        parts = {VALUES: values, SCALE: weight.scale}
        return parts if weight.offset is None else parts | {OFFSET: weight.offset}
