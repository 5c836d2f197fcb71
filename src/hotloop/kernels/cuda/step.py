"""How the kernels of ``step.cu`` are launched: a step's first, its last, and the one after a sum.

Shape letters: M rows, V vocabulary, K width.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from hotloop.kernels.cuda.compile import Kernel
from hotloop.kernels.cuda.launch import Arguments, Call
from hotloop.kernels.cuda.linear import Onward


class EmbedArguments(Arguments):
    """``EmbedArgs`` of ``step.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("ids", "table", "scale", "x", "norm")),
        *((name, ctypes.c_void_p) for name in ("next_x", "next_squares")),
        ("k", ctypes.c_int),
    )


class AddArguments(Arguments):
    """``AddArgs`` of ``step.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("added", "residual", "x", "norm")),
        *((name, ctypes.c_void_p) for name in ("next_x", "next_squares")),
        ("k", ctypes.c_int),
    )


class ArgmaxArguments(Arguments):
    """``ArgmaxArgs`` of ``step.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("best_value", "best_index", "ids", "positions")),
        *((name, ctypes.c_int) for name in ("n", "last_position")),
    )


def embed_kernel(*, int8: bool) -> Kernel:
    """The instance for a bfloat16 table, or for an int8 one."""
    return Kernel(
        name=f"embed_{'int8' if int8 else 'bf16'}",
        file="step.cu",
        function=f"embed<{str(int8).lower()}>",
        args="EmbedArgs",
        threads=256,
    )


def add_kernel() -> Kernel:
    """The one that adds what ranks have summed."""
    return Kernel(name="add_total", file="step.cu", function="add", args="AddArgs", threads=128)


def argmax_kernel() -> Kernel:
    """The one that ends a greedy step."""
    return Kernel(
        name="argmax_step", file="step.cu", function="argmax", args="ArgmaxArgs", threads=32
    )


def embed(
    ids_M: Tensor, table_VK: Tensor, scale_V: Tensor | None, x_MK: Tensor, onward: Onward
) -> Call:
    """The launch that looks up the rows of ``ids_M``; see ``reference.embed``.

    Args:
        ids_M: int64.
        table_VK: bfloat16, or int8 with scales.
        scale_V: float32 scales of an int8 table.
        x_MK: bfloat16, written.
        onward: What goes on to the first product; written but for the weight.
    """
    int8 = table_VK.dtype == torch.int8
    assert int8 or table_VK.dtype == torch.bfloat16, f"the table is {table_VK.dtype}"
    assert int8 == (scale_V is not None), "int8 tables have scales"
    assert ids_M.dtype == torch.int64, f"ids are {ids_M.dtype}"
    assert x_MK.shape == (len(ids_M), table_VK.shape[1]), f"x is {tuple(x_MK.shape)}"
    assert x_MK.shape[1] % 8 == 0, "rows are read eight values at a time"
    args, tensors = EmbedArguments.of(
        ids=ids_M, table=table_VK, scale=scale_V, x=x_MK, k=x_MK.shape[1], **onward.arguments()
    )
    return Call(
        kernel=embed_kernel(int8=int8),
        grid=(len(ids_M), 1, 1),
        shared_bytes=0,
        args=args,
        tensors=tensors,
    )


def add(added_MK: Tensor, residual_MK: Tensor, x_MK: Tensor, onward: Onward) -> Call:
    """The launch that adds to the residual stream, and begins a norm.

    Its twins are a sum, and ``reference.begin_norm`` of it.

    Args:
        added_MK: bfloat16.
        residual_MK: bfloat16.
        x_MK: bfloat16, written; it can be ``residual_MK``.
        onward: What goes on to the next product; written but for the weight.
    """
    rows, k = x_MK.shape
    for tensor in (added_MK, residual_MK, x_MK):
        assert tensor.dtype == torch.bfloat16, f"it is {tensor.dtype}"
        assert tensor.shape == (rows, k), f"{tuple(tensor.shape)} and {(rows, k)}"
    assert k % 8 == 0, "rows are read eight values at a time"
    args, tensors = AddArguments.of(
        added=added_MK, residual=residual_MK, x=x_MK, k=k, **onward.arguments()
    )
    kernel = add_kernel()
    return Call(
        kernel=kernel,
        grid=(-(-k // (8 * kernel.threads)), rows, 1),
        shared_bytes=0,
        args=args,
        tensors=tensors,
    )


def argmax(
    best: tuple[Tensor, Tensor],
    ids_M: Tensor,
    positions_M: Tensor | None = None,
    *,
    last_position: int = 0,
) -> Call:
    """The launch that ends a greedy step: newest ids from what the head's blocks found best.

    Args:
        best: As the head's product left it: float32 and int32 [M, blocks].
        ids_M: int64, written.
        positions_M: int64, each moved on by one but not beyond ``last_position``; or None.
        last_position: The last one of the cache.
    """
    value, index = best
    assert value.shape == index.shape, f"{tuple(value.shape)} and {tuple(index.shape)}"
    args, tensors = ArgmaxArguments.of(
        best_value=value,
        best_index=index,
        ids=ids_M,
        positions=positions_M,
        n=value.shape[1],
        last_position=last_position,
    )
    return Call(
        kernel=argmax_kernel(),
        grid=(len(ids_M), 1, 1),
        shared_bytes=0,
        args=args,
        tensors=tensors,
    )
