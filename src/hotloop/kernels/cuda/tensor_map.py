"""Describes tensors from which kernels copy boxes to shared memory (``cp.async.bulk.tensor``).

This is the Tensor Memory Accelerator (TMA) of Hopper and later GPUs. One instruction copies a box
of up to five dimensions, whose rows need not be adjacent in memory.
The driver encodes the description in 128 bytes, which are an argument of the kernel.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hotloop.errors import HotloopError
from hotloop.kernels.cuda.packing import SLICE, TILE_ROWS, Format

WORDS = 16
"""Words of eight bytes of an encoded map."""

_HALF = TILE_ROWS // 2


class TensorMapError(HotloopError):
    """The driver refused to encode a map."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorMap:
    """A bfloat16 tensor, and the shape of its boxes. Dimensions are listed from the innermost on.

    Attributes:
        tensor: The tensor.
        sizes: Elements along each dimension; beyond them, a box contains zeros.
        strides: Bytes from one element to the next, of all dimensions but the first.
        box: Elements of a box along each dimension. A box is contiguous in shared memory.
    """

    tensor: Tensor
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.tensor.dtype == torch.bfloat16, f"{self.tensor.dtype}"
        assert len(self.sizes) == len(self.strides) + 1 == len(self.box), "a stride between each"
        assert self.tensor.data_ptr() % 16 == 0, "boxes are copied 16 bytes at a time"
        assert all(stride % 16 == 0 for stride in self.strides), f"{self.strides} bytes"
        assert self.box[0] * 2 % 16 == 0, f"{self.box[0]} elements of a row"
        assert all(0 < n <= 256 for n in self.box), f"a box of {self.box}"

    @classmethod
    def of_plain_rows(cls, form: Format, weight_NK: Tensor, *, units: int, tiles: int) -> TensorMap:
        """Describes a weight's plain rows, in boxes of ``units`` units of ``tiles`` tiles.

        A box holds tile after tile; a tile is the eight rows of its first half, then those of its
        second.
        """
        assert form.plain_rows, f"{form} is packed"
        row = 2 * form.k
        tile, half = (_HALF, form.n // 2) if form.paired else (TILE_ROWS, _HALF)
        return cls(
            tensor=weight_NK,
            sizes=(form.k, _HALF, 2, form.tiles),
            strides=(row, half * row, tile * row),
            box=(units * SLICE, _HALF, 2, tiles),
        )

    def encoded(self) -> list[int]:
        """Returns the driver's encoding.

        Raises:
            TensorMapError: The driver refused.
        """
        driver: Any = importlib.import_module("cuda.bindings.driver")
        status, encoded = driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            len(self.sizes),
            self.tensor.data_ptr(),
            [driver.cuuint64_t(n) for n in self.sizes],
            [driver.cuuint64_t(n) for n in self.strides],
            [driver.cuuint32_t(n) for n in self.box],
            [driver.cuuint32_t(1)] * len(self.sizes),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_NONE,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        if status.value != 0:
            raise TensorMapError(
                f"the CUDA driver refused to describe a tensor of {self.sizes} in boxes of "
                f"{self.box}: {status.name}."
            )
        return [int(word) for word in encoded.opaque]
