"""int4, weight only: round to nearest in groups along the input features.

Symmetric (``int4-g64``): the value of largest magnitude stands at -8, so the scale carries its
sign and all 16 steps are used (as in GGUF's Q4_0).
Asymmetric (``int4-g64-asym``): 16 steps from the group's minimum to its maximum, with a
floating-point offset, so that any group that already lies on such a grid is kept.

Scales and offsets are rounded to bfloat16 *before* the values are chosen, so the values make up
for that rounding, and so that every kernel on every device computes with the same numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from hotloop.errors import ConfigError
from hotloop.kernels.linear import WeightFormat
from hotloop.quant.qtensor import QTensor

GROUP_SIZES = (32, 64, 128)
SCALE_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Int4:
    """Groupwise int4.

    Attributes:
        group_size: Input features that share a scale.
        symmetric: Without an offset, or with one.
    """

    group_size: int = 128
    symmetric: bool = True

    @property
    def name(self) -> str:
        """Such as ``int4-g64`` or ``int4-g32-asym``."""
        return f"int4-g{self.group_size}{'' if self.symmetric else '-asym'}"

    @classmethod
    def from_options(cls, options: tuple[str, ...]) -> Int4:
        """``gN`` with N in 32, 64, 128; ``sym`` or ``asym``."""
        group_size, symmetric = cls.group_size, cls.symmetric
        for option in options:
            if option in ("sym", "asym"):
                symmetric = option == "sym"
            elif re.fullmatch(r"g\d+", option) and int(option[1:]) in GROUP_SIZES:
                group_size = int(option[1:])
            else:
                raise ConfigError(
                    f"quantization scheme 'int4' has no option {option!r}. Choose from: "
                    f"{', '.join(f'g{g}' for g in GROUP_SIZES)}, sym, asym."
                )
        return cls(group_size, symmetric)

    def check(self, name: str, n: int, k: int) -> None:  # noqa: ARG002
        """Groups must divide the input features; those that do are named."""
        if k % self.group_size:
            fits = [g for g in GROUP_SIZES if k % g == 0]
            raise ConfigError(
                f"{name} has {k} input features, which groups of {self.group_size} do not divide. "
                + (f"Groups of {' or '.join(map(str, fits))} do." if fits else "Use int8 instead.")
            )

    def quantize(self, weight: Tensor) -> QTensor:
        """Rounds to the nearest of 16 steps per group."""
        n, k = weight.shape
        self.check("weight", n, k)
        groups = weight.float().view(n, k // self.group_size, self.group_size)
        if self.symmetric:
            largest = groups.abs().argmax(dim=2, keepdim=True)
            scale, offset = groups.gather(2, largest).squeeze(2) / -8, None
        else:
            low, high = groups.aminmax(dim=2)
            scale = (high - low) / 15
            # The value -8 stands for the minimum: minimum = -8 * scale + offset.
            offset = (low + 8 * scale).to(SCALE_DTYPE)
        scale = torch.where(scale != 0, scale, 1.0).to(SCALE_DTYPE)
        centred = groups if offset is None else groups - offset.float()[:, :, None]
        values = (centred / scale.float()[:, :, None]).round_().clamp_(-8, 7).to(torch.int8)
        return QTensor(values=values.view(n, k), scale=scale, offset=offset, bits=4)

    def random(self, n: int, k: int, *, std: float, like: Tensor) -> QTensor:
        """Uniform integers, scaled to ``std``."""
        self.check("weight", n, k)
        values = torch.empty(n, k, dtype=torch.int8, device=like.device).random_(-7, 8)
        shape = (n, k // self.group_size)
        scale = torch.full(shape, std / ((15**2 - 1) / 12) ** 0.5, device=like.device)
        offset = None if self.symmetric else torch.zeros_like(scale, dtype=SCALE_DTYPE)
        return QTensor(values=values, scale=scale.to(SCALE_DTYPE), offset=offset, bits=4)

    def format(self, n: int, k: int, *, dtype: torch.dtype, device: str) -> WeightFormat:
        """Four bits in groups."""
        return WeightFormat(
            bits=4,
            group_size=self.group_size,
            symmetric=self.symmetric,
            n=n,
            k=k,
            dtype=dtype,
            device=device,
        )
