"""How the kernels of ``prompt.cu`` are launched: what is between the products of a prompt.

A ``Product`` is what a product of many rows gave, before the scale per feature and the bias of its
weight, which whoever takes it applies.

Shape letters: M rows, N features, K width, F feed-forward width, H query heads, J key/value heads,
S slots, C cache positions, E head dimension.
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
class Product:
    """A product that is not finished.

    Attributes:
        y: bfloat16 [M, N], as it came.
        scale: float32 [N], which it is to be multiplied by, or None.
        bias: bfloat16 [N], which is added then, or None.
    """

    y: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None

    def finished(self) -> Tensor:
        """[M, N], bfloat16: rounded once, as the kernels do."""
        y = self.y if self.scale is None else self.y * self.scale
        y = y if self.bias is None else y + self.bias
        return y.to(self.y.dtype)

    def arguments(self) -> dict[str, Tensor | None]:
        """Fields that all arguments have in common."""
        assert self.y.dtype == torch.bfloat16, f"a product is {self.y.dtype}"
        return {"product": self.y, "scale": self.scale, "bias": self.bias}


_NO_PRODUCT: dict[str, Tensor | None] = dict.fromkeys(("product", "scale", "bias"))


class AddNormArguments(Arguments):
    """``AddNormArgs`` of ``prompt.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "product", "scale", "bias")),
        *((name, ctypes.c_void_p) for name in ("weight", "sum", "normed")),
        ("k", ctypes.c_int),
        ("eps", ctypes.c_float),
    )


class RotateArguments(Arguments):
    """``RotateArgs`` of ``prompt.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("product", "scale", "bias", "cos", "sin")),
        *((name, ctypes.c_void_p) for name in ("q_norm", "k_norm", "slot", "start", "q")),
        *((name, ctypes.c_void_p) for name in ("new_keys", "new_values", "keys", "values")),
        *((name, ctypes.c_int) for name in ("heads", "kv_heads", "capacity")),
        ("eps", ctypes.c_float),
    )


class SwigluArguments(Arguments):
    """``SwigluArgs`` of ``prompt.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("product", "scale", "bias", "out")),
        ("f", ctypes.c_int),
    )


def kernels(head_dim: int) -> list[Kernel]:
    """All that a model with such heads needs."""
    return [_ADD_NORM, _rotate_kernel(head_dim), _SWIGLU]


def add_norm(
    x_MK: Tensor,
    weight_K: Tensor,
    eps: float,
    normed_MK: Tensor,
    *,
    product: Product | None = None,
    sum_MK: Tensor | None = None,
) -> Call:
    """The launch that adds to the residual stream and normalizes that; see ``reference.rms_norm``.

    Args:
        x_MK: bfloat16, the residual stream.
        weight_K: bfloat16, of the norm.
        eps: Of the norm.
        normed_MK: bfloat16, written.
        product: [M, K], what is added, or None.
        sum_MK: bfloat16, written where there is a product; may be ``x_MK``.
    """
    rows, k = x_MK.shape
    assert k % 8 == 0, f"rows of {k} are not read eight values at a time"
    assert normed_MK.shape == x_MK.shape, f"{tuple(normed_MK.shape)} for {tuple(x_MK.shape)}"
    assert (product is None) == (sum_MK is None), "a sum where something is added"
    assert product is None or product.y.shape == x_MK.shape, "like what it is added to"
    assert sum_MK is None or sum_MK.shape == x_MK.shape, "like what is added"
    args, tensors = AddNormArguments.of(
        x=x_MK,
        **(_NO_PRODUCT if product is None else product.arguments()),
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
    """What ``rotate`` makes of a product, besides what goes into the cache.

    Attributes:
        q: bfloat16 [M, H * E].
        k: bfloat16 [M, J * E].
        v: Like ``k``.
    """

    q: Tensor
    k: Tensor
    v: Tensor


def rotate(
    product: Product,
    heads: Heads,
    keys_SJCE: Tensor,
    values_SJCE: Tensor,
    slot_1: Tensor,
    start_1: Tensor,
    cos_CE: Tensor,
    sin_CE: Tensor,
    *,
    q_norm_E: Tensor | None = None,
    k_norm_E: Tensor | None = None,
    eps: float = 0.0,
) -> Call:
    """The launch that makes heads, and puts keys and values into a slot of the cache.

    The same as ``reference.fused_attention`` does before it attends.

    Args:
        product: [M, (H + 2J) * E].
        heads: Written.
        keys_SJCE: bfloat16, the cache.
        values_SJCE: Like ``keys_SJCE``.
        slot_1: int64, the slot, read by the device.
        start_1: int64, the position of the first row, read by the device: the others follow it,
            and all must lie within the cache.
        cos_CE: float32, both halves alike.
        sin_CE: Like ``cos_CE``.
        q_norm_E: bfloat16, where query heads are normalized.
        k_norm_E: bfloat16, where key heads are.
        eps: Of those norms.
    """
    _, kv_heads, capacity, head_dim = keys_SJCE.shape
    rows, n_heads = len(heads.q), heads.q.shape[1] // head_dim
    n_all = n_heads + 2 * kv_heads
    assert product.y.shape == (rows, n_all * head_dim), f"{tuple(product.y.shape)}"
    for new in (heads.k, heads.v):
        assert new.shape == (rows, kv_heads * head_dim), f"{tuple(new.shape)}"
    assert values_SJCE.shape == keys_SJCE.shape, f"values are {tuple(values_SJCE.shape)}"
    for scalar in (slot_1, start_1):
        assert scalar.dtype == torch.int64, f"slots and positions are {scalar.dtype}"
    args, tensors = RotateArguments.of(
        **product.arguments(),
        cos=cos_CE,
        sin=sin_CE,
        q_norm=q_norm_E,
        k_norm=k_norm_E,
        slot=slot_1,
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
        kernel=_rotate_kernel(head_dim),
        grid=(rows, -(-n_all // _WARPS), 1),
        shared_bytes=0,
        args=args,
        tensors=tensors,
    )


def swiglu(product: Product, out_MF: Tensor) -> Call:
    """The launch that takes the SwiGLU of a product [M, 2F]; see ``reference.swiglu``."""
    rows, f = out_MF.shape
    assert f % 8 == 0, f"rows of {f} are not read eight values at a time"
    assert product.y.shape == (rows, 2 * f), f"{tuple(product.y.shape)}"
    args, tensors = SwigluArguments.of(**product.arguments(), out=out_MF, f=f)
    grid = (rows, -(-f // (8 * _THREADS)), 1)
    return Call(kernel=_SWIGLU, grid=grid, shared_bytes=0, args=args, tensors=tensors)


def _kernel(name: str, function: str, args: str) -> Kernel:
    return Kernel(name=name, file="prompt.cu", function=function, args=args, threads=_THREADS)


def _rotate_kernel(head_dim: int) -> Kernel:
    return _kernel(f"prompt_rotate_e{head_dim}", f"rotate<{head_dim}, {_WARPS}>", "RotateArgs")


_ADD_NORM = _kernel("prompt_add_norm", f"add_norm<{_WARPS}>", "AddNormArgs")
_SWIGLU = _kernel("prompt_swiglu", "swiglu", "SwigluArgs")
