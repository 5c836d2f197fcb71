"""e4m3 weights with scales, as Hugging Face, DeepSeek, Qwen and compressed-tensors store them.

``x.weight`` is float8_e4m3fn [N, K]. Weights are multiplied by the scale, even if its name is
``x.weight_scale_inv``. There is a single scale, one per output feature, or one per block of 128 by
128 (smaller at the edges), in float32, float16 or bfloat16, or as a power of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hotloop.kernels.linear import KernelFormat
from hotloop.quant.encodings import Expected, Groups, Layout, StoredMatrix, StoredPart
from hotloop.quant.encodings.compressed_tensors import ZERO
from hotloop.quant.qtensor import QTensor, expand_blocks

WEIGHT = ".weight"
BLOCK = (128, 128)
_POWERS = ("F8_E8M0", "U8")
"""Element types of scales that are powers of two."""


@dataclass(frozen=True)
class Fp8:
    """The encoding of e4m3 weights, for one name of the scale.

    Attributes:
        scale: The suffix of the scale's name.
    """

    scale: str

    def expected(self, _matrix: StoredMatrix) -> Mapping[str, Expected]:
        """Expects a scale beside e4m3 weights."""
        return {WEIGHT: Expected("F8_E4M3"), self.scale: Expected()}

    def recognize(self, matrix: StoredMatrix) -> Layout | None:
        """Recognizes e4m3 weights with a scale of this name."""
        (n, k), stored = matrix.shape, matrix.tensors
        if WEIGHT not in stored or stored[WEIGHT].dtype != "F8_E4M3" or self.scale not in stored:
            return None
        if ZERO in stored and bool(matrix.read(ZERO).float().any()):
            raise matrix.error(ZERO, "holds zero points, which e4m3 weights do not have")
        entry = stored[self.scale]
        powers = entry.dtype in _POWERS
        scale_dtype = torch.float8_e8m0fnu if powers else matrix.scale_dtype(self.scale)
        rows, groups = self._blocks(matrix)

        def decode(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> QTensor:
            scale = parts[self.scale]
            if powers:  # few PyTorch operators support their type
                scale = scale.view(torch.uint8)
            scale = scale.view(-1, 1 if groups.n == 1 else -(-shape[1] // groups.size))
            if rows == 0:
                scale = scale.expand(shape[0], -1)
            scale = expand_blocks(
                scale,
                rows=max(rows, 1),
                columns=groups.size,
                group_size=groups.even,
                shape=shape,
            )
            return QTensor(
                values=parts[WEIGHT],
                scale=scale.view(scale_dtype) if powers else scale,
                kind="fp8",
            )

        return Layout(
            parts={
                WEIGHT: StoredPart(shape=(n, k), dtype="F8_E4M3"),
                self.scale: StoredPart(
                    shape=entry.shape,
                    dtype=entry.dtype,
                    features=(rows, groups.features),
                ),
            },
            decode=decode,
            format=KernelFormat(kind="fp8", group_size=groups.even, scale_dtype=scale_dtype),
            k=k,
            bits=8,
            surplus=frozenset({ZERO}),
        )

    def _blocks(self, matrix: StoredMatrix) -> tuple[int, Groups]:
        """Returns the output features that share a scale, 0 for all, and the groups along K."""
        (n, k), shape = matrix.shape, matrix.tensors[self.scale].shape
        whole_row = Groups.of(k, k)
        block = matrix.claim.block
        if block is None:
            if shape in ((), (1,), (1, 1)):
                return 0, whole_row
            if shape in ((n,), (n, 1)):
                return 1, whole_row
            if len(shape) == 2 and shape[0] == n and matrix.claim.group_size is not None:
                return 1, matrix.groups(self.scale, shape[1])
        rows, columns = block or BLOCK
        if shape != (-(-n // rows), -(-k // columns)):
            raise matrix.error(
                self.scale,
                f"has shape {list(shape)}: a matrix of {[n, k]} has one scale, one for each row, "
                f"or one for each block of {rows} x {columns}",
            )
        return rows, Groups.of(k, columns)


ScaleInverse = Fp8(".weight_scale_inv")
"""The encoding of Hugging Face, DeepSeek and Qwen."""

FloatQuantized = Fp8(".weight_scale")
"""The encoding of compressed-tensors and vLLM."""
