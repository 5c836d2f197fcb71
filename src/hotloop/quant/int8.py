"""int8, weight only: round to nearest, symmetric, one scale per output channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hotloop.errors import ConfigError
from hotloop.kernels.linear import KernelFormat
from hotloop.quant.qtensor import Combine, QTensor

QMAX = 127  # -128 is left unused, so that the grid is symmetric


@dataclass(frozen=True)
class Int8:
    """Per-channel symmetric int8; the scale is float32, which costs nothing here."""

    name: str = "int8"
    alignment: int = 1

    @classmethod
    def from_options(cls, options: tuple[str, ...]) -> Int8:
        """Takes no options."""
        if options:
            raise ConfigError(
                f"quantization scheme 'int8' has no option {options[0]!r}: it is symmetric, with "
                "one scale per output channel."
            )
        return cls()

    def check(self, name: str, n: int, k: int) -> None:
        """Accepts every shape."""

    def quantize(self, weight: Tensor, *, combine: Combine | None = None) -> QTensor:
        """Rounds to the nearest of 255 steps of ``max|row| / 127``."""
        weight = weight.float()
        largest = weight.abs().amax(dim=1, keepdim=True)
        if combine is not None:
            largest = combine(largest)
        # Not divided: CUDA divides by constants a little differently.
        scale = largest * (1 / QMAX)
        scale = torch.where(scale > 0, scale, 1.0)  # a row of zeros stays zero
        values = (weight / scale).round_().clamp_(-QMAX, QMAX).to(torch.int8)
        return QTensor(values=values, scale=scale, offset=None, kind="int8")

    def random(
        self,
        n: int,
        k: int,
        *,
        std: float,
        dtype: torch.dtype,  # noqa: ARG002
        generator: torch.Generator,
    ) -> QTensor:
        """Makes uniform integers, scaled to ``std``."""
        values = torch.empty(n, k, dtype=torch.int8, device=generator.device)
        values.random_(-QMAX, QMAX + 1, generator=generator)
        scale = torch.full((n, 1), std / (QMAX / 3**0.5), device=generator.device)
        return QTensor(values=values, scale=scale, offset=None, kind="int8")

    def format(self, k: int) -> KernelFormat:
        """Returns the format: one group per output channel."""
        return KernelFormat(kind="int8", group_size=k, scale_dtype=torch.float32)
