"""bitsandbytes' 4-bit formats, nf4 and fp4: indices of a table, in blocks of the flattened matrix.

``x.weight`` is uint8 [N * K / 2, 1], with the first of two weights in the high nibble.
``x.weight.quant_map`` is the table, and ``x.weight.absmax`` has a scale for each block. Scales that
are quantized themselves are uint8; they become ``nested_quant_map[absmax] * nested_absmax +
nested_offset``. The bytes of ``x.weight.quant_state.bitsandbytes__nf4`` are JSON with the block
sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from hotloop.kernels.linear import KernelFormat
from hotloop.quant.encodings import Expected, Layout, StoredMatrix, StoredPart
from hotloop.quant.qtensor import QTensor
from hotloop.untrusted import StrictModel, parse_json, validated

WEIGHT, TABLE, ABSMAX = ".weight", ".weight.quant_map", ".weight.absmax"
NESTED_ABSMAX, NESTED_TABLE = ".weight.nested_absmax", ".weight.nested_quant_map"

_Block = Annotated[int, Field(ge=1, le=2**20)]


class _State(StrictModel):
    """The description of a matrix."""

    quant_type: Literal["nf4", "fp4"]
    blocksize: _Block
    dtype: Literal["float32", "float16", "bfloat16"]
    shape: Annotated[list[int], Field(min_length=2, max_length=2)]
    nested_blocksize: _Block | None = None
    nested_dtype: Literal["float32"] | None = None
    nested_offset: float = 0.0


@dataclass(frozen=True)
class FourBits:
    """The encoding with one table: nf4 or fp4.

    Attributes:
        type: Its name.
    """

    type: Literal["nf4", "fp4"]

    @property
    def _description(self) -> str:
        return f".weight.quant_state.bitsandbytes__{self.type}"

    def expected(self, _matrix: StoredMatrix) -> Mapping[str, Expected]:
        """Expects a description, indices, their table and scales."""
        return dict.fromkeys((self._description, WEIGHT, TABLE, ABSMAX), Expected())

    def recognize(self, matrix: StoredMatrix) -> Layout | None:
        """Recognizes the name of its description."""
        description = self._description
        stored = matrix.tensors
        if not {description, WEIGHT, TABLE, ABSMAX} <= stored.keys():
            return None
        entry = stored[description]
        if entry.dtype != "U8" or math.prod(entry.shape) > 2**16:
            raise matrix.error(description, "must be JSON text of a few hundred bytes")
        where = f"{entry.file}, tensor {matrix.name}{description}"
        keys = parse_json(matrix.read(description).numpy().tobytes(), where)
        state = validated(_State, {k: v for k, v in keys.items() if v is not None}, where)
        n, k = matrix.shape
        if state.shape != [n, k] or n * k % 2:
            raise matrix.error(description, f"says the shape {state.shape}, not {[n, k]}")
        numbers = stored[TABLE]
        if numbers.dtype != "F32" or numbers.shape != (16,):
            raise matrix.error(
                TABLE, f"is {numbers.dtype} {list(numbers.shape)}, not sixteen numbers of F32"
            )
        table = tuple(matrix.read(TABLE).tolist())
        if not all(map(math.isfinite, table)):
            raise matrix.error(TABLE, "holds numbers that are not finite")
        blocks, nested = -(-n * k // state.blocksize), state.nested_blocksize
        group = math.gcd(state.blocksize, k)

        def decode(parts: Mapping[str, Tensor], _shape: tuple[int, int]) -> QTensor:
            packed, scale = parts[WEIGHT].flatten(), parts[ABSMAX].flatten()
            if nested is not None:
                factor = parts[NESTED_ABSMAX].repeat_interleave(nested)[:blocks]
                scale = parts[NESTED_TABLE][scale.long()] * factor + state.nested_offset
            indices = torch.stack((packed >> 4, packed & 15), dim=-1).view(torch.int8)
            # A block may extend beyond the end of a row; groups are parts of blocks that do not.
            by_group = scale.repeat_interleave(state.blocksize // group)[: n * k // group]
            return QTensor(
                values=indices.view(n, k),
                scale=by_group.view(n, k // group),
                kind="lut4",
                table=parts[TABLE],
            )

        def part(*shape: int, dtype: str) -> StoredPart:
            return StoredPart(shape=shape, dtype=dtype, is_whole=True)

        parts = {
            WEIGHT: part(n * k // 2, 1, dtype="U8"),
            TABLE: part(16, dtype="F32"),
            ABSMAX: part(blocks, dtype="F32" if nested is None else "U8"),
        }
        if nested is not None:
            parts[NESTED_ABSMAX] = part(-(-blocks // nested), dtype="F32")
            parts[NESTED_TABLE] = part(256, dtype="F32")
        return Layout(
            parts=parts,
            decode=decode,
            format=KernelFormat(
                kind="lut4", group_size=group, scale_dtype=torch.float32, table=table
            ),
            k=k,
            bits=4,
            surplus=frozenset({description}),
        )


Nf4, Fp4 = FourBits("nf4"), FourBits("fp4")
