"""How the kernels of ``step.cu`` are launched: a step's first and last, and those of several ranks.

Shape letters: M rows, V vocabulary, K width, S slots, B of them, T tokens of each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

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
        *((name, ctypes.c_int) for name in ("k", "vocab")),
    )


class AddArguments(Arguments):
    """``AddArgs`` of ``step.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("added", "residual", "x", "norm")),
        *((name, ctypes.c_void_p) for name in ("next_x", "next_squares")),
        ("k", ctypes.c_int),
    )


class SumArguments(Arguments):
    """``SumArgs`` of ``step.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("mine", "residual", "x", "norm")),
        *((name, ctypes.c_void_p) for name in ("next_x", "next_squares", "inboxes", "turns")),
        *((name, ctypes.c_int) for name in ("k", "rank", "capacity")),
    )


class ArgmaxArguments(Arguments):
    """``ArgmaxArgs`` of ``step.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("best_value", "best_index", "ids")),
        ("n", ctypes.c_int),
    )


class ArgmaxOfRanksArguments(Arguments):
    """``ArgmaxOfRanksArgs`` of ``step.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("best_value", "best_index", "ids")),
        *((name, ctypes.c_void_p) for name in ("inboxes", "turns")),
        *((name, ctypes.c_int) for name in ("n", "first", "rank", "ranks", "capacity")),
    )


_SUM_THREADS = 128

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


def sum_kernel(ranks: int) -> Kernel:
    """The one that adds what so many ranks have."""
    return Kernel(
        name=f"sum_of_{ranks}",
        file="step.cu",
        function=f"sum<{ranks}>",
        args="SumArgs",
        threads=_SUM_THREADS,
    )


def argmax_kernel() -> Kernel:
    """The one that finds the most likely token."""
    return _of_one_warp("argmax_step", "argmax", "ArgmaxArgs")


def argmax_of_ranks_kernel() -> Kernel:
    """The one that finds the token that is most likely to all ranks."""
    return _of_one_warp("argmax_of_ranks_step", "argmax_of_ranks", "ArgmaxOfRanksArgs")


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
        ids_M: int64; ids that are not of the table look up its first or last row.
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
    vocab, k = table_VK.shape
    args, tensors = EmbedArguments.of(
        ids=ids_M, table=table_VK, scale=scale_V, x=x_MK, k=k, vocab=vocab, **onward.arguments()
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


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """By which the ranks of a model send each other what they have, in launches of one kind.

    Every rank launches the same in the same order.

    Attributes:
        rank: Which rank this is.
        inboxes: int64 [ranks], on the device: addresses of every rank's inbox, which holds
            ``inbox_bytes`` and was zeros when the first of them was made.
        turns: int32 [capacity, blocks of a row], zeros at first: how often there was one.
        capacity: Rows that an inbox has room for.
        k: Width of rows that are summed up; 0 where it is for choices.
        kept: What the inboxes are in, kept alive with this.
    """

    rank: int
    inboxes: Tensor
    turns: Tensor
    capacity: int
    k: int
    kept: object

    @classmethod
    def over(
        cls,
        rank: int,
        addresses: Sequence[int],
        *,
        capacity: int,
        k: int = 0,
        device: torch.device,
        kept: object,
    ) -> Exchange:
        """One over the ranks' inboxes at these addresses."""
        blocks = max(1, _blocks_of_row(k))
        return cls(
            rank=rank,
            inboxes=torch.tensor(addresses, dtype=torch.int64, device=device),
            turns=torch.zeros(capacity, blocks, dtype=torch.int32, device=device),
            capacity=capacity,
            k=k,
            kept=kept,
        )

    @property
    def ranks(self) -> int:
        """How many there are."""
        return len(self.inboxes)


def inbox_bytes(ranks: int, capacity: int, k: int = 0) -> int:
    """Of an inbox: for what comes of each rank in two turns, four bytes of marks for four bytes.

    Args:
        ranks: How many there are.
        capacity: Rows.
        k: Width of rows, of values of two bytes; 0 for choices, which are a value and a token id.
    """
    return 2 * ranks * capacity * (2 * 2 * k or 16)


def sum_ranks(
    mine_MK: Tensor, residual_MK: Tensor, x_MK: Tensor, onward: Onward, exchange: Exchange
) -> Call:
    """The launch that adds what ranks have to the residual stream, and begins a norm.

    As ``add`` does with their sum, which is taken in the order of ranks, and not rounded by itself.

    Args:
        mine_MK: bfloat16, this rank's part; M is up to the exchange's capacity.
        residual_MK: bfloat16.
        x_MK: bfloat16, written; it can be ``residual_MK``.
        onward: What goes on to the next product; written but for the weight.
        exchange: With the other ranks.
    """
    rows, k = x_MK.shape
    for tensor in (mine_MK, residual_MK, x_MK):
        assert tensor.dtype == torch.bfloat16, f"it is {tensor.dtype}"
        assert tensor.shape == (rows, k), f"{tuple(tensor.shape)} and {(rows, k)}"
    assert k == exchange.k, f"rows of {k}, and an exchange of {exchange.k}"
    assert k % 8 == 0, "rows are read eight values at a time"
    assert rows <= exchange.capacity, f"{rows} rows, and room for {exchange.capacity}"
    args, tensors = SumArguments.of(
        mine=mine_MK,
        residual=residual_MK,
        x=x_MK,
        **onward.arguments(),
        inboxes=exchange.inboxes,
        turns=exchange.turns,
        k=k,
        rank=exchange.rank,
        capacity=exchange.capacity,
    )
    return Call(
        kernel=sum_kernel(exchange.ranks),
        grid=(_blocks_of_row(k), rows, 1),
        shared_bytes=0,
        args=args,
        tensors=tensors,
    )


def _blocks_of_row(k: int) -> int:
    return -(-k // (8 * _SUM_THREADS))


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


def argmax_of_ranks(
    best: tuple[Tensor, Tensor], ids_M: Tensor, exchange: Exchange, *, first: int
) -> Call:
    """The launch that finds the tokens that are most likely to all ranks, on each of them.

    Of equal ones the first, as ``Vocabulary.argmax`` does.

    Args:
        best: As the product of this rank's part of the head left it: float32 and int32 [M, blocks].
        ids_M: int64, written.
        exchange: With the other ranks.
        first: Id of the first token of this rank's part.
    """
    (value, index), rows = best, len(ids_M)
    assert value.shape == index.shape, f"{tuple(value.shape)} and {tuple(index.shape)}"
    assert exchange.ranks <= 32, f"a lane for a rank, and there are {exchange.ranks}"
    assert rows <= exchange.capacity, f"{rows} rows, and room for {exchange.capacity}"
    args, tensors = ArgmaxOfRanksArguments.of(
        best_value=value,
        best_index=index,
        ids=ids_M,
        inboxes=exchange.inboxes,
        turns=exchange.turns,
        n=value.shape[1],
        first=first,
        rank=exchange.rank,
        ranks=exchange.ranks,
        capacity=exchange.capacity,
    )
    return _block_for_each(argmax_of_ranks_kernel(), rows, args, tensors)


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
