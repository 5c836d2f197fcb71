"""Keeps what a checkpoint stores: its own integers and scales, or floating-point weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hotloop.errors import ConfigError
from hotloop.kernels.linear import DENSE, KernelFormat
from hotloop.quant.none import NoScheme
from hotloop.quant.qtensor import Combine


@dataclass(frozen=True, kw_only=True)
class Auto:
    """The scheme of a matrix that stays as it is stored.

    Attributes:
        stored: Its number format in the checkpoint; dense where it is not quantized, and for random
            weights.
        k: Its input features.
    """

    stored: KernelFormat = DENSE
    k: int = 0
    name: str = "auto"

    @classmethod
    def from_options(cls, options: tuple[str, ...]) -> Auto:
        """Takes no options."""
        if options:
            raise ConfigError(f"quantization scheme 'auto' has no option {options[0]!r}.")
        return cls()

    @property
    def alignment(self) -> int:
        """A group, or a super-block; 1 where a scale is of a whole row, as slices keep it."""
        if self.stored.permuted:
            return self.k
        sizes = (self.stored.group_size or self.k, self.stored.super_size or self.k)
        return math.lcm(*(size for size in sizes if size != self.k))

    def check(self, name: str, n: int, k: int) -> None:
        """Accepts every shape."""

    def quantize(self, weight: Tensor, *, combine: Combine | None = None) -> Tensor:
        """Returns the weight itself."""
        return NoScheme().quantize(weight, combine=combine)

    def random(
        self, n: int, k: int, *, std: float, dtype: torch.dtype, generator: torch.Generator
    ) -> Tensor:
        """Makes normally distributed floating-point weights."""
        return NoScheme().random(n, k, std=std, dtype=dtype, generator=generator)

    def format(self, k: int) -> KernelFormat:
        """Returns the stored format, of ``k`` of the input features."""
        group, super_block = (
            k if size == self.k else size
            for size in (self.stored.group_size, self.stored.super_size)
        )
        return replace(self.stored, group_size=group, super_size=super_block)
