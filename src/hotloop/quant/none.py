"""No quantization: weights stay in the engine's floating-point type."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hotloop.errors import ConfigError
from hotloop.kernels.linear import DENSE, KernelFormat
from hotloop.quant.qtensor import ReduceMax


@dataclass(frozen=True)
class NoScheme:
    """The scheme that does not quantize."""

    name: str = "none"
    alignment: int = 1

    @classmethod
    def from_options(cls, options: tuple[str, ...]) -> NoScheme:
        """Takes no options."""
        if options:
            raise ConfigError(f"quantization scheme 'none' has no option {options[0]!r}.")
        return cls()

    def check(self, name: str, n: int, k: int) -> None:
        """Accepts every shape."""

    def quantize(self, weight: Tensor, *, reduce_max: ReduceMax | None = None) -> Tensor:  # noqa: ARG002
        """Returns the weight itself."""
        return weight

    def random(
        self, n: int, k: int, *, std: float, dtype: torch.dtype, generator: torch.Generator
    ) -> Tensor:
        """Makes normally distributed weights [n, k]."""
        weight = torch.empty(n, k, dtype=dtype, device=generator.device)
        return weight.normal_(0, std, generator=generator)

    def format(self, k: int) -> KernelFormat:  # noqa: ARG002
        """Returns the format: floating point."""
        return DENSE
