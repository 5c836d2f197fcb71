"""int8, weight only: round to nearest, with a scale per output channel or for groups.

Per channel (``int8``) it is symmetric, -127…127, and the scale is float32: one per row adds hardly
any bytes.

In groups along the input features (``int8-g128``) it is *nested*: integers are -128…119, each 16 h
+ l with h and l in -8…7. The integers h alone are an int4 weight with the same groups and 16 times
the scale, which drafts for the model (``--draft self``). The scale can have either sign, so that
the value of largest magnitude can become -128. It is rounded to bfloat16 before the values are
chosen, as for int4. docs/decisions/nested-weights.md has the measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hotloop.errors import ConfigError
from hotloop.kernels.linear import NESTED_RANGE, KernelFormat
from hotloop.quant.int4 import GROUP_SIZES, SCALE_DTYPE, GroupSizeError
from hotloop.quant.qtensor import QTensor, ReduceMax

QMAX = 127  # -128 is left unused, so that the grid is symmetric


@dataclass(frozen=True)
class Int8:
    """The scheme int8, per output channel or in groups.

    Attributes:
        group_size: Input features that share a scale; None for a scale per output channel.
    """

    group_size: int | None = None

    @property
    def name(self) -> str:
        """The name, such as ``int8`` or ``int8-g128``."""
        return "int8" if self.group_size is None else f"int8-g{self.group_size}"

    @classmethod
    def from_options(cls, options: tuple[str, ...]) -> Int8:
        """Takes ``gN`` with N in 32, 64, 128."""
        sizes = {f"g{size}": size for size in GROUP_SIZES}
        for option in options:
            if option not in sizes:
                raise ConfigError(
                    f"quantization scheme 'int8' has no option {option!r}: it is symmetric, with "
                    f"one scale per output channel, or for groups: {', '.join(sizes)}."
                )
        if len(set(options)) > 1:
            raise ConfigError(
                f"quantization scheme 'int8-{'-'.join(options)}' has two values of group_size: "
                "give one."
            )
        return cls(sizes[options[0]] if options else None)

    @property
    def alignment(self) -> int:
        """The group size; 1 with a scale per output channel, which covers the whole row."""
        return self.group_size or 1

    def check(self, name: str, n: int, k: int) -> None:  # noqa: ARG002
        """Refuses groups that do not divide the input features, and names those that do."""
        if self.group_size is not None and k % self.group_size:
            fits = [Int8(size).name for size in GROUP_SIZES if k % size == 0]
            raise GroupSizeError(name, k, self.group_size, fits)

    def quantize(self, weight: Tensor, *, reduce_max: ReduceMax | None = None) -> QTensor:
        """Rounds to the nearest multiple of ``max|row| / 127``, or of 248 levels per group."""
        weight = weight.float()
        if self.group_size is not None:
            return self._quantize_groups(weight, self.group_size)
        largest = weight.abs().amax(dim=1, keepdim=True)
        if reduce_max is not None:
            largest = reduce_max(largest)
        # Multiplied by the inverse: CUDA divides by constants a little differently.
        scale = largest * (1 / QMAX)
        scale = torch.where(scale > 0, scale, 1.0)  # a row of zeros stays zero
        values = (weight / scale).round_().clamp_(-QMAX, QMAX).to(torch.int8)
        return QTensor(values=values, scale=scale, offset=None, kind="int8")

    def _quantize_groups(self, weight: Tensor, size: int) -> QTensor:
        n, k = weight.shape
        self.check("weight", n, k)
        groups = weight.view(n, k // size, size)
        least, most = groups.amin(dim=2), groups.amax(dim=2)
        lowest, highest = NESTED_RANGE
        # Of a positive and a negative scale, the smaller with which no value exceeds the range.
        plus = torch.maximum(least * (1 / lowest), most * (1 / highest))
        minus = torch.maximum(most * (-1 / lowest), least * (-1 / highest))
        scale = torch.where(minus < plus, -minus, plus).to(SCALE_DTYPE)
        scale = torch.where(scale != 0, scale, 1.0)
        scaled = groups / scale.float()[:, :, None]
        values = scaled.round_().clamp_(lowest, highest).to(torch.int8)
        return QTensor(values=values.view(n, k), scale=scale, kind="nested")

    def nest(self, weight: QTensor) -> QTensor:
        """Converts int8 with the same groups and bfloat16 scales to nested.

        Groups whose integers are in the nested range stay as they are; other groups are quantized
        again.
        """
        size = weight.group_size
        assert size == self.group_size, f"groups of {size}"
        again = self.quantize(weight.dequantize())
        kept_NG = weight.values.unflatten(1, (-1, size)).amax(dim=2) <= NESTED_RANGE[1]
        kept_NK = kept_NG.repeat_interleave(size, dim=1)
        return replace(
            again,
            values=torch.where(kept_NK, weight.values, again.values),
            scale=torch.where(kept_NG, weight.scale, again.scale),
        )

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
        largest = QMAX if self.group_size is None else NESTED_RANGE[1]
        values.random_(-largest, largest + 1, generator=generator)
        size = std / (largest / 3**0.5)
        if self.group_size is None:
            scale = torch.full((n, 1), size, device=generator.device)
            return QTensor(values=values, scale=scale, offset=None, kind="int8")
        scale = values.new_full((n, k // self.group_size), size, dtype=SCALE_DTYPE)
        return QTensor(values=values, scale=scale, kind="nested")

    def format(self, k: int) -> KernelFormat:
        """Returns the format: one group per output channel, or nested in groups."""
        if self.group_size is None:
            return KernelFormat(kind="int8", group_size=k, scale_dtype=torch.float32)
        return KernelFormat(kind="nested", group_size=self.group_size, scale_dtype=SCALE_DTYPE)
