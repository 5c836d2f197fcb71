"""What a block computes between its products: which implementation to take.

``reference`` specifies it. Compiled code fuses these operations. Where a CPU runs them one by one,
one operator of ours does what takes PyTorch up to nine, each of which costs more than its
arithmetic. It is taken for any number of rows, so that a row's bits do not depend on the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hotloop.kernels import cpu, reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As ``reference.rms_norm``, up to the order of sums."""
    if _ours(x) and x.is_contiguous():
        return torch.ops.hotloop_cpu.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def apply_rope(x_BTHE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> Tensor:
    """As ``reference.apply_rope``, for heads of which each is contiguous."""
    if _ours(x_BTHE):
        return torch.ops.hotloop_cpu.rope(x_BTHE, cos_BTE, sin_BTE)
    return reference.apply_rope(x_BTHE, cos_BTE, sin_BTE)


def swiglu(gate_up_BTF: Tensor) -> Tensor:
    """As ``reference.swiglu``."""
    if _ours(gate_up_BTF):
        return torch.ops.hotloop_cpu.swiglu(gate_up_BTF)
    return reference.swiglu(gate_up_BTF)


def _ours(x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and cpu.unavailable_reason() is None
    )
