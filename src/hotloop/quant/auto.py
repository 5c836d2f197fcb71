"""Keeps weights as a checkpoint stores them: as integers with scales, or in floating point."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hotloop.errors import ConfigError
from hotloop.kernels.linear import DENSE, KernelFormat
from hotloop.quant.none import NoScheme
from hotloop.quant.qtensor import ReduceMax


@dataclass(frozen=True, kw_only=True)
class Auto:
    """The scheme of a matrix that stays as it is stored.

    Attributes:
        stored: Its number format in the checkpoint; dense if it is not quantized, and for random
            weights.
        k: Its input features.
        super_size: Input features that share a factor in a rank's slice, if ranks divide
            super-blocks (``with_smaller_super_blocks``); None if slices keep super-blocks whole.
    """

    stored: KernelFormat = DENSE
    k: int = 0
    super_size: int | None = None
    name: str = "auto"

    @classmethod
    def from_options(cls, options: tuple[str, ...]) -> Auto:
        """Takes no options."""
        if options:
            raise ConfigError(f"quantization scheme 'auto' has no option {options[0]!r}.")
        return cls()

    @property
    def alignment(self) -> int:
        """The size of a group or super-block; 1 with one scale per row, which every slice keeps."""
        if self.stored.permuted:
            return self.k
        sizes = (self.stored.group_size, self.super_size or self.stored.super_size)
        return math.lcm(*(size for size in sizes if size is not None and size != self.k))

    def with_smaller_super_blocks(self) -> Auto:
        """Returns the scheme with super-blocks half as large in slices; itself if impossible."""
        group, size = self.stored.group_size, self.super_size or self.stored.super_size
        if group is None or size is None or size == self.k or size % (2 * group):
            return self
        return replace(self, super_size=size // 2)

    def check(self, name: str, n: int, k: int) -> None:
        """Accepts every shape."""

    def quantize(self, weight: Tensor, *, reduce_max: ReduceMax | None = None) -> Tensor:
        """Returns the weight itself."""
        return NoScheme().quantize(weight, reduce_max=reduce_max)

    def random(
        self, n: int, k: int, *, std: float, dtype: torch.dtype, generator: torch.Generator
    ) -> Tensor:
        """Makes normally distributed floating-point weights."""
        return NoScheme().random(n, k, std=std, dtype=dtype, generator=generator)

    def format(self, k: int) -> KernelFormat:
        """Returns the stored format for ``k`` of the input features."""
        group, super_block = (
            k if size == self.k else size
            for size in (self.stored.group_size, self.stored.super_size)
        )
        if k != self.k:
            super_block = self.super_size or super_block
        return replace(self.stored, group_size=group, super_size=super_block)
