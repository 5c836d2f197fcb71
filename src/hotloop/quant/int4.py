"""int4, weight only: round to nearest in groups along the input features.

Symmetric (``int4-g64``): the value of largest magnitude stands at -8, so the scale carries its
sign and all 16 steps are used (as in GGUF's Q4_0).
Asymmetric (``int4-g64-asym``): 16 steps from the group's minimum to its maximum, with a
floating-point offset, so that any group that already lies on such a grid is kept.
With zero points (``int4-g64-zp``): 16 steps from the group's minimum to its maximum, of which an
integer stands for 0, as in AWQ and compressed-tensors; a range without 0 is extended to it.

Scales and offsets are rounded to bfloat16 *before* the values are chosen, so the values make up
for that rounding, and so that every kernel on every device computes with the same numbers. For
the same reason constants are multiplied with: CUDA divides by them a little differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hotloop.errors import ConfigError
from hotloop.kernels.linear import KernelFormat, Zero
from hotloop.quant.qtensor import Combine, QTensor

GROUP_SIZES = (32, 64, 128)
SCALE_DTYPE = torch.bfloat16
_ZEROS: Mapping[str, Zero] = {"sym": "none", "asym": "offset", "zp": "integer"}


@dataclass(frozen=True)
class Int4:
    """Groupwise int4.

    Attributes:
        group_size: Input features that share a scale.
        zero: Symmetric, or with zero points or offsets.
    """

    group_size: int = 128
    zero: Zero = "none"

    @property
    def name(self) -> str:
        """Such as ``int4-g64`` or ``int4-g32-asym``."""
        suffix = {"none": "", "offset": "-asym", "integer": "-zp"}[self.zero]
        return f"int4-g{self.group_size}{suffix}"

    @classmethod
    def from_options(cls, options: tuple[str, ...]) -> Int4:
        """Takes ``gN`` with N in 32, 64, 128; ``sym``, ``asym`` or ``zp``."""
        meanings: dict[str, tuple[str, Any]]
        meanings = {f"g{size}": ("group_size", size) for size in GROUP_SIZES}
        meanings |= {option: ("zero", zero) for option, zero in _ZEROS.items()}
        fields: dict[str, Any] = {}
        for option in options:
            if option not in meanings:
                raise ConfigError(
                    f"quantization scheme 'int4' has no option {option!r}. Choose from: "
                    f"{', '.join(meanings)}."
                )
            field, value = meanings[option]
            if fields.setdefault(field, value) != value:
                raise ConfigError(
                    f"quantization scheme 'int4-{'-'.join(options)}' has two values of {field}: "
                    "give one."
                )
        return cls(**fields)

    def check(self, name: str, n: int, k: int) -> None:  # noqa: ARG002
        """Refuses groups that do not divide the input features, and names those that do."""
        if k % self.group_size:
            fits = [replace(self, group_size=g).name for g in GROUP_SIZES if k % g == 0]
            raise ConfigError(
                f"{name} has {k} input features, which groups of {self.group_size} do not divide. "
                f"Use {' or '.join(fits) or 'int8'} instead."
            )

    @property
    def alignment(self) -> int:
        """A group: its scale does not depend on the rest of the row."""
        return self.group_size

    def quantize(self, weight: Tensor, *, combine: Combine | None = None) -> QTensor:  # noqa: ARG002
        """Rounds to the nearest of 16 steps per group."""
        n, k = weight.shape
        self.check("weight", n, k)
        groups = weight.float().view(n, k // self.group_size, self.group_size)
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        if self.zero == "none":
            scale = (torch.where(high > -low, high, low) * (-1 / 8)).to(SCALE_DTYPE)
        else:
            if self.zero == "integer":
                low, high = low.clamp(max=0), high.clamp(min=0)
            scale = ((high - low) * (1 / 15)).to(SCALE_DTYPE)
        offset = None
        if self.zero == "offset":
            # -8 stands for the minimum, 7 for the maximum: 0 is half a step above their middle.
            offset = ((low + high + scale.float()) * 0.5).to(SCALE_DTYPE)
        scale = torch.where(scale != 0, scale, 1.0)  # one value throughout: the offset, or zero
        step = scale.float()[:, :, None]
        if self.zero == "integer":
            offset = (-8 - low / scale.float()).round_().clamp_(-8, 7).to(torch.int8)
            steps = groups / step + offset[:, :, None]
        else:
            steps = (groups if offset is None else groups - offset.float()[:, :, None]) / step
        values = steps.round_().clamp_(-8, 7).to(torch.int8)
        return QTensor(values=values.view(n, k), scale=scale, offset=offset, kind="int4")

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
        self.check("weight", n, k)
        values = torch.empty(n, k, dtype=torch.int8, device=generator.device)
        values.random_(-7, 8, generator=generator)
        step = std / ((15**2 - 1) / 12) ** 0.5
        scale = values.new_full((n, k // self.group_size), step, dtype=SCALE_DTYPE)
        offset = None
        if self.zero != "none":
            offset = torch.zeros_like(
                scale, dtype=torch.int8 if self.zero == "integer" else SCALE_DTYPE
            )
        return QTensor(values=values, scale=scale, offset=offset, kind="int4")

    def format(self, k: int) -> KernelFormat:  # noqa: ARG002
        """Returns the format: four bits in groups."""
        return KernelFormat(
            kind="int4",
            group_size=self.group_size,
            scale_dtype=SCALE_DTYPE,
            zero=self.zero,
        )
