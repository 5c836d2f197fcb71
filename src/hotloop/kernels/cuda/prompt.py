"""Launches of ``prompt.cu``: the prefill kernels between GEMMs.

The scale per feature and the bias of a weight are not part of its GEMM: the kernel that reads the
``GemmOutput`` applies them.

Shape letters: M rows, N features, K width, F feed-forward width, H query heads, J key/value heads,
S seats, C cache positions, E head dimension.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from hotloop.kernels.cuda.compile import Kernel
from hotloop.kernels.cuda.launch import Arguments, Call

_WARPS = 8
_THREADS = 32 * _WARPS


@dataclass(frozen=True, kw_only=True)
class GemmOutput:
    """Output of a GEMM, with a scale and a bias that are not applied yet.

    Attributes:
        y: bfloat16 [M, N], output of the GEMM.
        scale: float32 [N], factor of each feature, or None.
        bias: bfloat16 [N], added after scaling, or None.
    """

    y: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None

    def with_scale_and_bias(self) -> Tensor:
        """Applies scale and bias, and rounds once, as the kernels do: bfloat16 [M, N]."""
        y = self.y if self.scale is None else self.y * self.scale
        y = y if self.bias is None else y + self.bias
        return y.to(self.y.dtype)

    def arguments(self) -> dict[str, Tensor | None]:
        """Returns the arguments that all kernels share."""
        assert self.y.dtype == torch.bfloat16, f"y is {self.y.dtype}"
        return {"gemm": self.y, "scale": self.scale, "bias": self.bias}


_NO_GEMM: dict[str, Tensor | None] = dict.fromkeys(("gemm", "scale", "bias"))


class AddNormArguments(Arguments):
    """``AddNormArgs`` of ``prompt.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "gemm", "scale", "bias")),
        *((name, ctypes.c_void_p) for name in ("weight", "sum", "normed")),
        ("k", ctypes.c_int),
        ("eps", ctypes.c_float),
    )


class RopeArguments(Arguments):
    """``RopeArgs`` of ``prompt.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gemm", "scale", "bias", "cos", "sin")),
        *((name, ctypes.c_void_p) for name in ("q_norm", "k_norm", "seat", "start", "q")),
        *((name, ctypes.c_void_p) for name in ("new_keys", "new_values", "keys", "values")),
        *((name, ctypes.c_int) for name in ("heads", "kv_heads", "capacity")),
        ("eps", ctypes.c_float),
    )


class SwigluArguments(Arguments):
    """``SwigluArgs`` of ``prompt.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gemm", "scale", "bias", "out")),
        ("f", ctypes.c_int),
    )


def kernels(head_dim: int) -> list[Kernel]:
    """Returns the kernels of a model with this head dimension."""
    return [_ADD_NORM, _rope_kernel(head_dim), _SWIGLU]


def add_norm(
    x_MK: Tensor,
    weight_K: Tensor,
    eps: float,
    normed_MK: Tensor,
    *,
    gemm: GemmOutput | None = None,
    sum_MK: Tensor | None = None,
) -> Call:
    """Returns the launch that adds to the residual stream, and normalizes the sum.

    The norm is specified by ``reference.rms_norm``.

    Args:
        x_MK: bfloat16, the residual stream.
        weight_K: bfloat16, the norm's weight.
        eps: The norm's epsilon.
        normed_MK: bfloat16, written.
        gemm: [M, K], added, or None.
        sum_MK: bfloat16, written if there is a ``gemm``; may be ``x_MK``.
    """
    rows, k = x_MK.shape
    assert k % 8 == 0, f"rows of {k} are not read eight values at a time"
    assert normed_MK.shape == x_MK.shape, f"{tuple(normed_MK.shape)} for {tuple(x_MK.shape)}"
    assert (gemm is None) == (sum_MK is None), "a sum only with a GEMM's output"
    assert gemm is None or gemm.y.shape == x_MK.shape, (
        "the sum and the GEMM output must have the shape of x"
    )
    assert sum_MK is None or sum_MK.shape == x_MK.shape, (
        "the sum and the GEMM output must have the shape of x"
    )
    args, tensors = AddNormArguments.of(
        x=x_MK,
        **(_NO_GEMM if gemm is None else gemm.arguments()),
        weight=weight_K,
        sum=sum_MK,
        normed=normed_MK,
        k=k,
        eps=eps,
    )
    return Call(
        kernel=_ADD_NORM, grid=(rows, 1, 1), shared_bytes=4 * _WARPS, args=args, tensors=tensors
    )


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Heads of queries, keys and values, which ``rope`` writes.

    Attributes:
        q: bfloat16 [M, H * E].
        k: bfloat16 [M, J * E].
        v: Like ``k``.
    """

    q: Tensor
    k: Tensor
    v: Tensor


def rope(
    gemm: GemmOutput,
    heads: Heads,
    keys_SJCE: Tensor,
    values_SJCE: Tensor,
    seat_1: Tensor,
    start_1: Tensor,
    cos_CE: Tensor,
    sin_CE: Tensor,
    *,
    q_norm_E: Tensor | None = None,
    k_norm_E: Tensor | None = None,
    eps: float = 0.0,
) -> Call:
    """Returns the launch that applies head norms and rope, and stores keys and values in the cache.

    It is specified by the first part of ``reference.fused_attention``.

    Args:
        gemm: [M, (H + 2J) * E], queries, keys and values.
        heads: Written.
        keys_SJCE: bfloat16, the cache; written.
        values_SJCE: Like ``keys_SJCE``.
        seat_1: int64, the seat, in device memory.
        start_1: int64, the position of the first row, in device memory. The other rows follow it,
            and all positions must lie within the cache.
        cos_CE: float32 cosines of rope, both halves alike.
        sin_CE: float32 sines of rope, both halves alike.
        q_norm_E: bfloat16, weight of the norm of query heads, or None.
        k_norm_E: bfloat16, weight of the norm of key heads, or None.
        eps: Epsilon of those norms.
    """
    _, kv_heads, capacity, head_dim = keys_SJCE.shape
    rows, n_heads = len(heads.q), heads.q.shape[1] // head_dim
    n_all = n_heads + 2 * kv_heads
    assert gemm.y.shape == (rows, n_all * head_dim), f"{tuple(gemm.y.shape)}"
    for new in (heads.k, heads.v):
        assert new.shape == (rows, kv_heads * head_dim), f"{tuple(new.shape)}"
    assert values_SJCE.shape == keys_SJCE.shape, f"values are {tuple(values_SJCE.shape)}"
    for scalar in (seat_1, start_1):
        assert scalar.dtype == torch.int64, f"seats and positions are {scalar.dtype}"
    args, tensors = RopeArguments.of(
        **gemm.arguments(),
        cos=cos_CE,
        sin=sin_CE,
        q_norm=q_norm_E,
        k_norm=k_norm_E,
        seat=seat_1,
        start=start_1,
        q=heads.q,
        new_keys=heads.k,
        new_values=heads.v,
        keys=keys_SJCE,
        values=values_SJCE,
        heads=n_heads,
        kv_heads=kv_heads,
        capacity=capacity,
        eps=eps,
    )
    return Call(
        kernel=_rope_kernel(head_dim),
        grid=(rows, -(-n_all // _WARPS), 1),
        shared_bytes=0,
        args=args,
        tensors=tensors,
    )


def swiglu(gemm: GemmOutput, out_MF: Tensor) -> Call:
    """Returns the launch that applies ``reference.swiglu`` to a GEMM's output [M, 2F]."""
    rows, f = out_MF.shape
    assert f % 8 == 0, f"rows of {f} are not read eight values at a time"
    assert gemm.y.shape == (rows, 2 * f), f"{tuple(gemm.y.shape)}"
    args, tensors = SwigluArguments.of(**gemm.arguments(), out=out_MF, f=f)
    grid = (rows, -(-f // (8 * _THREADS)), 1)
    return Call(kernel=_SWIGLU, grid=grid, shared_bytes=0, args=args, tensors=tensors)


def _kernel(name: str, function: str, args: str) -> Kernel:
    return Kernel(name=name, file="prompt.cu", function=function, args=args, threads=_THREADS)


def _rope_kernel(head_dim: int) -> Kernel:
    return _kernel(f"prompt_rope_e{head_dim}", f"rope<{head_dim}, {_WARPS}>", "RopeArgs")


_ADD_NORM = _kernel("prompt_add_norm", f"add_norm<{_WARPS}>", "AddNormArgs")
_SWIGLU = _kernel("prompt_swiglu", "swiglu", "SwigluArgs")
