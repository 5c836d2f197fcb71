"""fp8, weight only: e4m3 with one scale per output channel, rounded to nearest.

e4m3 has a sign, four bits of exponent, three bits of mantissa and no infinities (Micikevicius et
al. 2022, "FP8 Formats for Deep Learning"). It takes as many bytes as int8. Errors are relative to
each weight, not to the largest weight of its row: they are larger than those of int8 for evenly
spread weights, and smaller for rows with a few outliers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hotloop.errors import ConfigError
from hotloop.kernels.linear import KernelFormat
from hotloop.quant.qtensor import QTensor, ReduceMax

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0


@dataclass(frozen=True)
class Fp8:
    """Per-channel e4m3. Scales are float32: one per row adds hardly any bytes."""

    name: str = "fp8"
    alignment: int = 1

    @classmethod
    def from_options(cls, options: tuple[str, ...]) -> Fp8:
        """Takes no options."""
        if options:
            raise ConfigError(
                f"quantization scheme 'fp8' has no option {options[0]!r}: it is e4m3, with one "
                "scale per output channel."
            )
        return cls()

    def check(self, name: str, n: int, k: int) -> None:
        """Accepts every shape."""

    def quantize(self, weight: Tensor, *, reduce_max: ReduceMax | None = None) -> QTensor:
        """Scales ``max|row|`` to the largest e4m3 number, and rounds to nearest."""
        weight = weight.float()
        largest = weight.abs().amax(dim=1, keepdim=True)
        if reduce_max is not None:
            largest = reduce_max(largest)
        # Multiplied by the inverse: CUDA divides by constants a little differently.
        scale = largest * (1 / LARGEST)
        scale = torch.where(scale > 0, scale, 1.0)  # a row of zeros stays zero
        values = (weight / scale).clamp_(-LARGEST, LARGEST).to(DTYPE)
        return QTensor(values=values, scale=scale, offset=None, kind="fp8")

    def random(
        self,
        n: int,
        k: int,
        *,
        std: float,
        dtype: torch.dtype,  # noqa: ARG002
        generator: torch.Generator,
    ) -> QTensor:
        """Makes normally distributed numbers, scaled to ``std``."""
        values = torch.empty(n, k, device=generator.device).normal_(0, 64, generator=generator)
        scale = torch.full((n, 1), std / 64, device=generator.device)
        values = values.clamp_(-LARGEST, LARGEST).to(DTYPE)
        return QTensor(values=values, scale=scale, offset=None, kind="fp8")

    def format(self, k: int) -> KernelFormat:
        """Returns the format: one group per output channel."""
        return KernelFormat(kind="fp8", group_size=k, scale_dtype=torch.float32)
