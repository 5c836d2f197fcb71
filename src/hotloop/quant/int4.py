"""int4, weight only: round to nearest in groups along the input features.

Symmetric (``int4-g64``): the value of largest magnitude becomes -8, so the scale has its sign
(negated), and all 16 levels are used (as in GGUF's Q4_0). Asymmetric (``int4-g64-asym``): 16 levels
from the group's minimum to its maximum, with a floating-point offset, so weights that another tool
rounded to such levels keep their values. With zero points (``int4-g64-zp``): 16 levels from the
group's minimum to its maximum, one of which is exactly 0, as in AWQ and compressed-tensors; a range
without 0 is extended to it.

Calibrated (``int4-g64-cal``; also after ``-asym`` and ``-zp``): scales are searched for. A group's
range is multiplied by factors from 0.6 to 1.1, and the best of these grids is fitted to its
integers by least squares. The grid with the smallest sum of squared errors is used, where each
error is weighted by the mean square of the activation that the weight multiplies
(``weights.calibration``). Without these weights, such a search makes a model worse:
docs/decisions/calibrated-scales.md has the measurements.

Scales and offsets are rounded to bfloat16 *before* the values are chosen, so that the values
compensate for that rounding, and every kernel on every device computes with the same numbers. For
the same reason the code multiplies by inverse constants: CUDA divides by constants a little
differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hotloop.errors import ConfigError
from hotloop.kernels.linear import KernelFormat, Zero
from hotloop.quant.qtensor import QTensor, ReduceMax

GROUP_SIZES = (32, 64, 128)
SCALE_DTYPE = torch.bfloat16
_ZEROS: Mapping[str, Zero] = {"sym": "none", "asym": "offset", "zp": "integer"}

RANGE_FACTORS = tuple(1.1 - 0.025 * i for i in range(21) if i != 4)
"""The factors of a group's range that the search tries, 1.1 to 0.6, in addition to 1."""


class GroupSizeError(ConfigError):
    """A matrix whose rows a scheme's groups do not divide.

    Args:
        name: The matrix.
        k: Its input features.
        group_size: The group size that does not divide them.
        fits: The schemes with suitable group sizes that are otherwise equal; if empty, the message
            suggests int8.
    """

    def __init__(self, name: str, k: int, group_size: int, fits: Sequence[str]) -> None:
        self.problem = f"{name} has {k} input features, which groups of {group_size} do not divide."
        self.fits = tuple(fits) or ("int8",)
        super().__init__(f"{self.problem} {self.fix()}")

    def fix(self, prefix: str = "") -> str:
        """Returns the schemes to use, for a message, each with the option's ``prefix``."""
        return f"Use {' or '.join(prefix + name for name in self.fits)} instead."


_Grid = tuple[Tensor, Tensor | None]
"""A quantization grid for each group: scales, and offsets or zero points or None, [N, G] each."""


@dataclass(frozen=True)
class Int4:
    """The scheme int4, in groups.

    Attributes:
        group_size: Input features that share a scale.
        zero: Symmetric, or with zero points or offsets.
        calibrated: Scales are searched, weighted by the activations of the model.
    """

    group_size: int = 128
    zero: Zero = "none"
    calibrated: bool = False

    @property
    def name(self) -> str:
        """The name, such as ``int4-g64``, ``int4-g32-asym`` or ``int4-g64-cal``."""
        suffix = {"none": "", "offset": "-asym", "integer": "-zp"}[self.zero]
        return f"int4-g{self.group_size}{suffix}" + ("-cal" if self.calibrated else "")

    @classmethod
    def from_options(cls, options: tuple[str, ...]) -> Int4:
        """Takes ``gN`` with N in 32, 64, 128; ``sym``, ``asym`` or ``zp``; and ``cal``."""
        meanings: dict[str, tuple[str, Any]]
        meanings = {f"g{size}": ("group_size", size) for size in GROUP_SIZES}
        meanings |= {option: ("zero", zero) for option, zero in _ZEROS.items()}
        meanings["cal"] = ("calibrated", True)
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
            raise GroupSizeError(name, k, self.group_size, fits)

    @property
    def alignment(self) -> int:
        """The group size: a scale does not depend on the rest of the row."""
        return self.group_size

    def quantize(
        self,
        weight: Tensor,
        *,
        reduce_max: ReduceMax | None = None,  # noqa: ARG002
        importance: Tensor | None = None,
    ) -> QTensor:
        """Rounds to the nearest of 16 levels per group.

        Args:
            weight: See ``Scheme``.
            reduce_max: Not used, since a scale covers one group.
            importance: [K], the non-negative weights of squared errors in the search for scales;
                None uses the range of each group without a search.
        """
        n, k = weight.shape
        self.check("weight", n, k)
        groups = weight.float().view(n, k // self.group_size, self.group_size)
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        scale, offset = self._grid(low, high)
        if importance is not None:
            weights = importance.to(weight.device, torch.float32).view(1, -1, self.group_size)
            scale, offset = self._search(groups, weights, (low, high), (scale, offset))
        values = self._round(groups, scale, offset).to(torch.int8)
        return QTensor(values=values.view(n, k), scale=scale, offset=offset, kind="int4")

    def _grid(self, low: Tensor, high: Tensor) -> _Grid:
        """Returns the grid of 16 levels from ``low`` to ``high``, [N, G] each."""
        if self.zero == "none":
            scale = (torch.where(high > -low, high, low) * (-1 / 8)).to(SCALE_DTYPE)
        else:
            if self.zero == "integer":
                low, high = low.clamp(max=0), high.clamp(min=0)
            scale = ((high - low) * (1 / 15)).to(SCALE_DTYPE)
        offset = None
        if self.zero == "offset":
            # -8 is the minimum, 7 the maximum: level 0 is half a scale above their middle.
            offset = ((low + high + scale.float()) * 0.5).to(SCALE_DTYPE)
        scale = torch.where(scale != 0, scale, 1.0)  # all values of the group are equal
        if self.zero == "integer":
            offset = (-8 - low / scale.float()).round_().clamp_(-8, 7).to(torch.int8)
        return scale, offset

    def _round(self, groups: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        """Rounds [N, G, group_size] to integers, float32."""
        wide = scale.float()[:, :, None]
        if self.zero == "integer":
            assert offset is not None, "zero points"
            scaled = groups / wide + offset[:, :, None]
        else:
            scaled = (groups if offset is None else groups - offset.float()[:, :, None]) / wide
        return scaled.round_().clamp_(-8, 7)

    def _search(
        self, groups: Tensor, weights: Tensor, bounds: tuple[Tensor, Tensor], grid: _Grid
    ) -> _Grid:
        """Returns each group's best grid: of a scaled range, or a least-squares fit of the best.

        Args:
            groups: [N, G, group_size].
            weights: [1, G, group_size], weights of squared errors.
            bounds: The minimum and the maximum of each group, [N, G].
            grid: The grid to start from.
        """
        low, high = bounds
        middle = (low + high) * 0.5 if self.zero == "offset" else torch.zeros_like(low)
        best, least = grid, self._error(groups, weights, grid)
        for factor in RANGE_FACTORS:
            ends = (middle + (end - middle) * factor for end in bounds)
            best, least = self._better(groups, weights, best, least, self._grid(*ends))
        return self._better(groups, weights, best, least, self._fit(groups, weights, best))[0]

    def _better(
        self, groups: Tensor, weights: Tensor, best: _Grid, least: Tensor, other: _Grid
    ) -> tuple[_Grid, Tensor]:
        """Returns the better of two grids for each group, and its error."""
        error = self._error(groups, weights, other)
        is_better = error < least
        scale = torch.where(is_better, other[0], best[0])
        offset = None
        if best[1] is not None and other[1] is not None:
            offset = torch.where(is_better, other[1], best[1])
        return (scale, offset), torch.where(is_better, error, least)

    def _error(self, groups: Tensor, weights: Tensor, grid: _Grid) -> Tensor:
        """Sums the weighted squared errors of each group, [N, G]."""
        scale, offset = grid
        values = self._round(groups, scale, offset)
        if self.zero == "integer":
            assert offset is not None, "zero points"
            values -= offset[:, :, None]
        values *= scale.float()[:, :, None]
        if self.zero == "offset":
            assert offset is not None, "offsets"
            values += offset.float()[:, :, None]
        return (values.sub_(groups).square_().mul_(weights)).sum(dim=2)

    def _fit(self, groups: Tensor, weights: Tensor, grid: _Grid) -> _Grid:
        """Fits scales, and offsets, to the integers by weighted least squares."""
        scale, offset = grid
        values = self._round(groups, scale, offset)
        mean_value = mean = torch.zeros_like(groups[:, :, :1])
        if self.zero == "offset":
            total = weights.sum(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            mean_value = (values * weights).sum(dim=2, keepdim=True) / total
            mean = (groups * weights).sum(dim=2, keepdim=True) / total
        elif offset is not None:
            values -= offset[:, :, None]
        centered = values - mean_value
        weighted = centered * weights
        squares = (centered * weighted).sum(dim=2)
        fitted = ((groups - mean) * weighted).sum(dim=2) / squares
        fitted = fitted.to(SCALE_DTYPE)
        fitted = torch.where(fitted.isfinite() & (fitted != 0), fitted, scale)
        if self.zero == "offset":
            offset = (mean - fitted.float()[:, :, None] * mean_value)[:, :, 0].to(SCALE_DTYPE)
        return fitted, offset

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
        size = std / ((15**2 - 1) / 12) ** 0.5
        scale = values.new_full((n, k // self.group_size), size, dtype=SCALE_DTYPE)
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
