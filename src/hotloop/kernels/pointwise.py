"""Norms, rope and SwiGLU: chooses the implementation of each call.

``reference`` specifies them, and torch.compile fuses the reference code. In an eager step on a CPU,
each of them would take up to nine PyTorch operators, whose overhead exceeds their arithmetic; there
one operator of hotloop's computes it, for any number of rows, so that a row's bits do not depend on
the other rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hotloop.kernels import cpu, reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes ``reference.rms_norm`` of rows or heads [B, T, H, E]; sums may differ in order."""
    if _uses_cpu_kernel(x) and (x.is_contiguous() or x.dim() == 4):
        return torch.ops.hotloop_cpu.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def apply_rope(x_BTHE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> Tensor:
    """Computes ``reference.apply_rope``; each head is contiguous."""
    if _uses_cpu_kernel(x_BTHE):
        return torch.ops.hotloop_cpu.rope(x_BTHE, cos_BTE, sin_BTE)
    return reference.apply_rope(x_BTHE, cos_BTE, sin_BTE)


def swiglu(gate_up_BTF: Tensor) -> Tensor:
    """Computes ``reference.swiglu``."""
    if _uses_cpu_kernel(gate_up_BTF):
        return torch.ops.hotloop_cpu.swiglu(gate_up_BTF)
    return reference.swiglu(gate_up_BTF)


def _uses_cpu_kernel(x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and cpu.unavailable_reason() is None
    )
