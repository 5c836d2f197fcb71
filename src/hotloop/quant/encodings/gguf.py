"""The block types of GGUF with one scale: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0.

A block is 32 weights: a half-precision scale, for the types that end in 1 a half-precision minimum,
and integers of 4, 5 or 8 bits. Of 4-bit integers, the first sixteen are the low nibbles of sixteen
bytes and the others the high ones; a fifth bit of each is in a word of 32 in front. The types that
end in 0 have half their range subtracted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hotloop.kernels.linear import KernelFormat, QuantizedKind
from hotloop.quant.encodings import Layout, StoredMatrix, StoredPart
from hotloop.quant.qtensor import QTensor

BLOCKS = ".weight"
BLOCK = 32


@dataclass(frozen=True)
class Blocks:
    """A block type.

    Attributes:
        type: Its name in GGUF.
        bits: Bits of an integer.
        has_minimum: A block has a minimum, and its integers no sign.
    """

    type: str
    bits: int
    has_minimum: bool = False

    @property
    def n_bytes(self) -> int:
        """Bytes of a block."""
        return (2 + 2 * self.has_minimum) + self.bits * BLOCK // 8

    @property
    def kind(self) -> QuantizedKind:
        """The type of the integers."""
        if self.bits > 4:
            return "int8"
        return "uint4" if self.has_minimum else "int4"

    def recognize(self, matrix: StoredMatrix) -> Layout | None:
        """Recognizes the type of the blocks."""
        blocks = matrix.tensors.get(BLOCKS)
        if blocks is None or blocks.dtype != self.type:
            return None
        return Layout(
            parts={BLOCKS: StoredPart(shape=matrix.shape, dtype=self.type, block=BLOCK)},
            decode=self.decode,
            format=KernelFormat(
                kind=self.kind,
                group_size=BLOCK,
                scale_dtype=torch.float16,
                zero="offset" if self.has_minimum else "none",
            ),
            k=matrix.shape[1],
            bits=self.bits,
        )

    def decode(self, parts: Mapping[str, Tensor], _shape: tuple[int, int]) -> QTensor:
        """Decodes the bytes of whole blocks, uint8 [N, bytes]."""
        n = parts[BLOCKS].shape[0]
        blocks = parts[BLOCKS].view(n, -1, self.n_bytes)
        halves = 1 + self.has_minimum
        floats = blocks[:, :, : 2 * halves].contiguous().view(torch.float16)
        integers = blocks[:, :, 2 * halves :]
        if self.bits == 8:
            values = integers.contiguous().view(torch.int8)
        else:
            nibbles = integers[:, :, -BLOCK // 2 :]
            values = torch.cat((nibbles & 15, nibbles >> 4), dim=2).to(torch.int8)
            if self.bits == 5:
                places = torch.arange(8, dtype=torch.uint8, device=blocks.device)
                fifth = (integers[:, :, :4, None] >> places & 1).flatten(2)
                values |= (fifth << 4).to(torch.int8)
            if not self.has_minimum:
                values -= 1 << self.bits - 1
        return QTensor(
            values=values.reshape(n, -1),
            scale=floats[:, :, 0].contiguous(),
            offset=floats[:, :, 1].contiguous() if self.has_minimum else None,
            kind=self.kind,
        )


Q4_0 = Blocks("Q4_0", 4)
Q4_1 = Blocks("Q4_1", 4, has_minimum=True)
Q5_0 = Blocks("Q5_0", 5)
Q5_1 = Blocks("Q5_1", 5, has_minimum=True)
Q8_0 = Blocks("Q8_0", 8)
