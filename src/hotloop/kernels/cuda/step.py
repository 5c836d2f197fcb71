"""How the kernels of ``step.cu`` are launched: a step's first and last, and the one after a sum.

Shape letters: M rows, V vocabulary, K width, S slots, B of them, T tokens of each.
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
        *((name, ctypes.c_void_p) for name in ("best_value", "best_index", "ids")),
        ("n", ctypes.c_int),
    )


_SIZES = ("width", "drafts_stride", "tokens", "last_position")


class LookUpArguments(Arguments):
    """``LookUpArgs`` of ``step.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("history", "positions", "drafts")),
        *((name, ctypes.c_int) for name in ("width", "n_drafts")),
    )


class NextTokensArguments(Arguments):
    """``NextTokensArgs`` of ``step.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("history", "positions", "drafts", "ids", "at")),
        *((name, ctypes.c_int) for name in _SIZES),
    )


class AcceptArguments(Arguments):
    """``AcceptArgs`` of ``step.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("ids", "drafts", "history", "positions")),
        *((name, ctypes.c_void_p) for name in ("n_kept", "n_drafts")),
        *((name, ctypes.c_int) for name in _SIZES),
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
    """The one that finds the most likely token."""
    return _of_one_warp("argmax_step", "argmax", "ArgmaxArgs")


_SEEKERS = 256  # kSeekers of step.cu


def look_up_kernel() -> Kernel:
    """The one that makes drafts of what was there before."""
    return Kernel(
        name="look_up_step",
        file="step.cu",
        function="look_up",
        args="LookUpArgs",
        threads=_SEEKERS,
    )


def next_tokens_kernel() -> Kernel:
    """The one that begins a step."""
    return _of_one_warp("next_tokens_step", "next_tokens", "NextTokensArgs")


def accept_kernel() -> Kernel:
    """The one that ends a step."""
    return _of_one_warp("accept_step", "accept", "AcceptArgs")


def _of_one_warp(name: str, function: str, args: str) -> Kernel:
    return Kernel(name=name, file="step.cu", function=function, args=args, threads=32)


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
    return _block_for_each(embed_kernel(int8=int8), len(ids_M), args, tensors)


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


def argmax(best: tuple[Tensor, Tensor], ids_M: Tensor) -> Call:
    """The launch that finds the most likely tokens; see ``reference.argmax``.

    Args:
        best: As the head's product left it: float32 and int32 [M, blocks].
        ids_M: int64, written.
    """
    value, index = best
    assert value.shape == index.shape, f"{tuple(value.shape)} and {tuple(index.shape)}"
    args, tensors = ArgmaxArguments.of(
        best_value=value,
        best_index=index,
        ids=ids_M,
        n=value.shape[1],
    )
    return _block_for_each(argmax_kernel(), len(ids_M), args, tensors)


def look_up(history_SW: Tensor, positions_S: Tensor, drafts_BD: Tensor) -> Call:
    """The launch that drafts for the first B slots; its twin is ``NgramDrafter.propose``.

    Args:
        history_SW: int64, the tokens of each slot.
        positions_S: int64, of the newest ones.
        drafts_BD: int64, written; -1 where the newest tokens have not been there before.
    """
    B, D = drafts_BD.shape
    assert min(len(history_SW), len(positions_S)) >= B, f"{B} slots"
    assert D <= _SEEKERS, f"a thread has a draft, and there are {D}"
    assert history_SW.shape[1] < 2**30, f"{history_SW.shape[1]} positions"
    for tensor in (history_SW, positions_S, drafts_BD):
        assert tensor.dtype == torch.int64, f"it is {tensor.dtype}"
    args, tensors = LookUpArguments.of(
        history=history_SW,
        positions=positions_S,
        drafts=drafts_BD,
        width=history_SW.shape[1],
        n_drafts=D,
    )
    return Call(
        kernel=look_up_kernel(),
        grid=(B, 1, 1),
        shared_bytes=4 * (_SEEKERS // 32),
        args=args,
        tensors=tensors,
    )


def next_tokens(
    history_SW: Tensor,
    positions_S: Tensor,
    drafts_BD: Tensor | None,
    ids_BT: Tensor,
    positions_BT: Tensor,
    *,
    last_position: int,
) -> Call:
    """The launch that begins a step of the first B slots; its twin is ``Slots.next_tokens``.

    Args:
        history_SW: int64, the tokens of each slot.
        positions_S: int64, of the newest ones.
        drafts_BD: int64 for D = T - 1, negative for none; None where T is 1. Rows may lie apart.
        ids_BT: int64, written.
        positions_BT: int64, written.
        last_position: The last one of the cache.
    """
    slots = _slots(history_SW, positions_S, drafts_BD, ids_BT, last_position)
    args, tensors = NextTokensArguments.of(at=positions_BT, **slots)
    return _block_for_each(next_tokens_kernel(), len(ids_BT), args, tensors)


def accept(
    ids_BT: Tensor,
    drafts_BD: Tensor | None,
    history_SW: Tensor,
    positions_S: Tensor,
    *,
    n_kept_B: Tensor | None,
    n_drafts_B: Tensor | None,
    last_position: int,
) -> Call:
    """The launch that ends a step of the first B slots; its twin is ``Slots.accept``.

    Args:
        ids_BT: int64, what the model chose.
        drafts_BD: As for ``next_tokens``.
        history_SW: int64; the choices are appended.
        positions_S: int64; moved on by what is kept.
        n_kept_B: int64, written; None where T is 1.
        n_drafts_B: int64, written; None where T is 1.
        last_position: The last one of the cache.
    """
    slots = _slots(history_SW, positions_S, drafts_BD, ids_BT, last_position)
    args, tensors = AcceptArguments.of(n_kept=n_kept_B, n_drafts=n_drafts_B, **slots)
    return _block_for_each(accept_kernel(), len(ids_BT), args, tensors)


def _slots(
    history_SW: Tensor,
    positions_S: Tensor,
    drafts_BD: Tensor | None,
    ids_BT: Tensor,
    last_position: int,
) -> dict[str, Tensor | int | None]:
    """Arguments that both have."""
    B, T = ids_BT.shape
    assert T <= 32, f"a lane has a token, and there are {T}"
    common = {
        "history": history_SW,
        "positions": positions_S,
        "ids": ids_BT,
        "width": history_SW.shape[1],
        "tokens": T,
        "last_position": last_position,
    }
    if drafts_BD is None:
        assert T == 1, "a token after each draft"
        return {"drafts": None, "drafts_stride": 0, **common}
    assert drafts_BD.shape == (B, T - 1), f"drafts are {tuple(drafts_BD.shape)}"
    assert drafts_BD.stride(1) == 1, "drafts of a slot are side by side"
    stride = drafts_BD.stride(0)
    flat = drafts_BD.as_strided(((B - 1) * stride + T - 1,), (1,))  # all that lies between
    return {"drafts": flat, "drafts_stride": stride, **common}


def _block_for_each(
    kernel: Kernel, blocks: int, args: Arguments, tensors: tuple[Tensor, ...]
) -> Call:
    return Call(kernel=kernel, grid=(blocks, 1, 1), shared_bytes=0, args=args, tensors=tensors)
