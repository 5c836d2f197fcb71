"""A random weight of each kind of number format, for tests of several levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hotloop.kernels.linear import QuantizedKind
from hotloop.quant import QTensor
from hotloop.quant.qtensor import hash_permutation

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
RANGES = {
    "int8": (-128, 128),
    "nested": (-128, 120),
    "int4": (-8, 8),
    "uint4": (0, 16),
    "lut4": (0, 16),
}


def weight(
    kind: QuantizedKind,
    n: int,
    k: int,
    *,
    group: int | None = None,
    scale: torch.dtype = F32,
    zero: str = "none",
    super_size: int | None = None,
    super_dtype: torch.dtype = F16,
    permuted: bool = False,
    table: Sequence[float] | None = None,
    bits: int = 8,
    seed: int = 0,
) -> QTensor:
    """Makes a weight of [n, k] whose dequantized elements are of the order of 1.

    Args:
        kind: The type of its values.
        n: Output features.
        k: Input features.
        group: Input features that share a scale; None for all.
        scale: Element type of scales; int8 with ``super_size``.
        zero: ``none``, ``integer`` or ``offset``.
        super_size: Input features that share a super-scale; None for scales of one level.
        super_dtype: Element type of super-scales.
        permuted: Columns are permuted.
        table: Of ``lut4``; None for random numbers.
        bits: Of integers of ``int8``.
        seed: Of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int8)

    def floats(dtype: torch.dtype, *shape: int, factor: float = 1.0) -> Tensor:
        """Of either sign, and no powers of 2 where the type has others."""
        sign = 1 if dtype == E8M0 else 1 - 2 * integers(0, 2, *shape)
        return (factor * (0.5 + torch.rand(shape, generator=generator)) * sign).to(dtype)

    groups = (n, k // (group or k))
    if kind == "fp8":
        values = torch.randn(n, k, generator=generator).to(E4M3)
    else:
        low, high = RANGES[kind]
        shrunk = 2 ** (8 - bits) if kind == "int8" else 1
        values = integers(low // shrunk, high // shrunk, n, k)
    numbers = None
    if kind == "lut4" and table is None:
        numbers = torch.randn(16, generator=generator).sort().values
    elif table is not None:
        numbers = torch.tensor(table)
    factor = 1.0 if kind in ("fp8", "lut4") else 4 / 2**bits if kind in ("int8", "nested") else 0.25
    two_level = super_size is not None
    supers = (n, k // super_size) if super_size else (0, 0)

    def parts(factor: float) -> tuple[Tensor, Tensor | None]:
        """Scales or offsets, and their factors."""
        if not two_level:
            return floats(scale, *groups, factor=factor), None
        if scale == torch.int8:
            return integers(-32, 32, *groups), floats(super_dtype, *supers, factor=factor / 16)
        return floats(scale, *groups), floats(super_dtype, *supers, factor=factor)

    scales, super_scale = parts(factor)
    offset, super_offset = None, None
    if zero == "integer":
        offset = integers(-8, 9, *groups)
    elif zero == "offset":
        offset, super_offset = parts(1.0)
    permutation = torch.randperm(k, generator=generator).int() if permuted else None
    return QTensor(
        values=values,
        scale=scales,
        offset=offset,
        kind=kind,
        super_scale=super_scale,
        super_offset=super_offset,
        table=numbers,
        permutation=permutation,
        permutation_hash=None if permutation is None else hash_permutation(permutation),
    )


def exactly(weight: QTensor) -> Tensor:
    """The weight that it represents, in float64."""
    n, k = weight.shape

    def wide(tensor: Tensor | None) -> Tensor | None:
        """One element for each of the weight."""
        if tensor is None:
            return None
        return tensor.float().double().repeat_interleave(k // tensor.shape[1], dim=1)

    scale, offset, super_scale, super_offset = map(
        wide, (weight.scale, weight.offset, weight.super_scale, weight.super_offset)
    )
    assert scale is not None
    values = weight.values.float().double()
    if weight.table is not None:
        values = weight.table.double()[weight.values.long()]
    if super_scale is not None:
        scale = scale * super_scale
    if weight.offset is None or offset is None:
        exact = values * scale
    elif super_offset is not None:
        exact = values * scale + offset * super_offset
    elif weight.offset.is_floating_point():
        exact = values * scale + offset
    else:
        exact = (values - offset) * scale
    if weight.permutation is not None:
        exact = exact[:, weight.permutation.argsort()]
    assert exact.shape == (n, k)
    return exact


_CASES: dict[str, dict[str, Any]] = {
    "int8": {"kind": "int8"},
    "fp8": {"kind": "fp8"},
    "int4-g128": {"kind": "int4", "group": 128, "scale": BF16},
    "int4-g32-offset": {"kind": "int4", "group": 32, "scale": BF16, "zero": "offset"},
    "gptq": {"kind": "int4", "group": 128, "scale": F16},
    "gptq-act-order": {"kind": "int4", "group": 128, "scale": F16, "permuted": True},
    "awq": {"kind": "int4", "group": 64, "scale": F16, "zero": "integer"},
    "awq-act-order": {
        "kind": "int4", "group": 64, "scale": F16, "zero": "integer", "permuted": True,
    },
    "int4-row": {"kind": "int4", "scale": F16},
    "int4-row-zero": {"kind": "int4", "scale": BF16, "zero": "integer"},
    "int8-g128": {"kind": "int8", "group": 128, "scale": BF16},
    "nested-g32": {"kind": "nested", "group": 32, "scale": BF16},
    "nested-g128": {"kind": "nested", "group": 128, "scale": BF16},
    "int8-g128-zero": {"kind": "int8", "group": 128, "scale": F16, "zero": "integer"},
    "int8-row-act-order": {"kind": "int8", "scale": F16, "permuted": True},
    "fp8-blocks": {"kind": "fp8", "group": 128},
    "fp8-blocks-bf16": {"kind": "fp8", "group": 128, "scale": BF16},
    "fp8-blocks-ue8m0": {"kind": "fp8", "group": 128, "scale": E8M0},
    "nvfp4": {
        "kind": "lut4", "group": 16, "scale": E4M3, "super_size": -1, "super_dtype": F32,
    },
    "mxfp4": {"kind": "lut4", "group": 32, "scale": E8M0},
    "nf4": {"kind": "lut4", "group": 64},
    "Q4_0": {"kind": "int4", "group": 32, "scale": F16},
    "Q4_1": {"kind": "uint4", "group": 32, "scale": F16, "zero": "offset"},
    "Q5_1": {"kind": "int8", "bits": 5, "group": 32, "scale": F16, "zero": "offset"},
    "Q8_0": {"kind": "int8", "group": 32, "scale": F16},
    "IQ4_NL": {"kind": "lut4", "group": 32, "scale": F16},
    "IQ4_XS": {"kind": "lut4", "group": 32, "scale": torch.int8, "super_size": 256},
    "Q2_K": {
        "kind": "uint4", "group": 16, "scale": torch.int8, "zero": "offset", "super_size": 256,
    },
    "Q3_K": {"kind": "int4", "group": 16, "scale": torch.int8, "super_size": 256},
    "Q4_K": {
        "kind": "uint4", "group": 32, "scale": torch.int8, "zero": "offset", "super_size": 256,
    },
    "Q5_K": {
        "kind": "int8", "bits": 5, "group": 32, "scale": torch.int8, "zero": "offset",
        "super_size": 256,
    },
    "Q6_K": {"kind": "int8", "bits": 6, "group": 16, "scale": torch.int8, "super_size": 256},
}  # fmt: skip

NAMES = tuple(_CASES)
"""Formats as tools write them, and one name for each property that none of them has."""


def random_weight(name: str, n: int, k: int, *, seed: int = 0) -> QTensor:
    """Makes a weight of the named format."""
    case = dict(_CASES[name])
    if case.get("super_size") == -1:
        case["super_size"] = k
    return weight(n=n, k=k, seed=seed, **case)
