"""Launches of ``step.cu``: the first and last kernels of a decode step, and all-reduces over ranks.

Shape letters: M rows of activations, V vocabulary, K width, R rows of a step, B of them in use (the
first), T tokens of each, D drafts of each, W width of a history.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hotloop.kernels.cuda.compile import Kernel
from hotloop.kernels.cuda.launch import Arguments, Call
from hotloop.kernels.cuda.linear import NormEpilogue


class EmbedArguments(Arguments):
    """``EmbedArgs`` of ``step.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("ids", "table", "scale", "x", "next_norm")),
        *((name, ctypes.c_void_p) for name in ("next_x", "next_squares")),
        *((name, ctypes.c_int) for name in ("k", "vocab")),
    )


class AddArguments(Arguments):
    """``AddArgs`` of ``step.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("added", "residual", "x", "next_norm")),
        *((name, ctypes.c_void_p) for name in ("next_x", "next_squares")),
        ("k", ctypes.c_int),
    )


class AllReduceArguments(Arguments):
    """``AllReduceArgs`` of ``step.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("local", "residual", "x", "next_norm")),
        *((name, ctypes.c_void_p) for name in ("next_x", "next_squares", "inboxes", "rounds")),
        *((name, ctypes.c_int) for name in ("k", "rank", "capacity")),
    )


class ArgmaxArguments(Arguments):
    """``ArgmaxArgs`` of ``step.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("best_value", "best_index", "ids")),
        ("n", ctypes.c_int),
    )


class ArgmaxOverRanksArguments(Arguments):
    """``ArgmaxOverRanksArgs`` of ``step.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("best_value", "best_index", "ids")),
        *((name, ctypes.c_void_p) for name in ("inboxes", "rounds")),
        *((name, ctypes.c_int) for name in ("n", "first", "rank", "ranks", "capacity")),
    )


_ALL_REDUCE_THREADS = 128

_SIZES = ("width", "drafts_stride", "tokens", "last_position")


class NgramDraftArguments(Arguments):
    """``NgramDraftArgs`` of ``step.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("history", "positions", "drafts")),
        *((name, ctypes.c_int) for name in ("width", "n_drafts")),
    )


class NextTokensArguments(Arguments):
    """``NextTokensArgs`` of ``step.cu``."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("history", "positions", "drafts", "ids", "token_positions")
        ),
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
    """Returns the embedding kernel for a bfloat16 or an int8 table."""
    return Kernel(
        name=f"embed_{'int8' if int8 else 'bf16'}",
        file="step.cu",
        function=f"embed<{str(int8).lower()}>",
        args="EmbedArgs",
        threads=256,
    )


def add_kernel() -> Kernel:
    """Returns the kernel that adds the result of an all-reduce to the residual stream."""
    return Kernel(name="add_total", file="step.cu", function="add", args="AddArgs", threads=128)


def all_reduce_kernel(ranks: int) -> Kernel:
    """Returns the kernel that adds the addends of this many ranks to the residual stream."""
    return Kernel(
        name=f"all_reduce_{ranks}",
        file="step.cu",
        function=f"all_reduce<{ranks}>",
        args="AllReduceArgs",
        threads=_ALL_REDUCE_THREADS,
    )


def argmax_kernel() -> Kernel:
    """Returns the argmax kernel."""
    return _of_one_warp("argmax_step", "argmax", "ArgmaxArgs")


def argmax_over_ranks_kernel() -> Kernel:
    """Returns the kernel of the argmax over all ranks' parts of the vocabulary."""
    return _of_one_warp("argmax_over_ranks_step", "argmax_over_ranks", "ArgmaxOverRanksArgs")


_DRAFT_THREADS = 256  # kDraftThreads of step.cu


def ngram_draft_kernel() -> Kernel:
    """Returns the kernel of n-gram drafts."""
    return Kernel(
        name="ngram_draft_step",
        file="step.cu",
        function="ngram_draft",
        args="NgramDraftArgs",
        threads=_DRAFT_THREADS,
    )


def next_tokens_kernel() -> Kernel:
    """Returns the kernel that collects the input tokens of a step."""
    return _of_one_warp("next_tokens_step", "next_tokens", "NextTokensArgs")


def accept_kernel() -> Kernel:
    """Returns the kernel that accepts drafts, and advances positions."""
    return _of_one_warp("accept_step", "accept", "AcceptArgs")


def _of_one_warp(name: str, function: str, args: str) -> Kernel:
    return Kernel(name=name, file="step.cu", function=function, args=args, threads=32)


def embed(
    ids_M: Tensor,
    table_VK: Tensor,
    scale_V: Tensor | None,
    x_MK: Tensor,
    norm_epilogue: NormEpilogue,
) -> Call:
    """Returns the launch that looks up the rows of ``ids_M``; see ``reference.embed``.

    Args:
        ids_M: int64; ids outside the table are clamped to it.
        table_VK: bfloat16, or int8 with scales.
        scale_V: float32 scales of an int8 table.
        x_MK: bfloat16, written.
        norm_epilogue: Epilogue of the first norm.
    """
    int8 = table_VK.dtype == torch.int8
    assert int8 or table_VK.dtype == torch.bfloat16, f"the table is {table_VK.dtype}"
    assert int8 == (scale_V is not None), "int8 tables have scales"
    assert ids_M.dtype == torch.int64, f"ids are {ids_M.dtype}"
    assert x_MK.shape == (len(ids_M), table_VK.shape[1]), f"x is {tuple(x_MK.shape)}"
    assert x_MK.shape[1] % 8 == 0, "rows are read eight values at a time"
    vocab, k = table_VK.shape
    args, tensors = EmbedArguments.of(
        ids=ids_M,
        table=table_VK,
        scale=scale_V,
        x=x_MK,
        k=k,
        vocab=vocab,
        **norm_epilogue.arguments(),
    )
    return _block_for_each(embed_kernel(int8=int8), len(ids_M), args, tensors)


def add(added_MK: Tensor, residual_MK: Tensor, x_MK: Tensor, norm_epilogue: NormEpilogue) -> Call:
    """Returns the launch that adds to the residual stream, with a norm epilogue.

    It is specified by a bfloat16 sum, and by ``reference.norm_epilogue`` of that sum.

    Args:
        added_MK: bfloat16, summed over ranks.
        residual_MK: bfloat16.
        x_MK: bfloat16, written; may be ``residual_MK``.
        norm_epilogue: Epilogue of the norm that follows.
    """
    rows, k = x_MK.shape
    for tensor in (added_MK, residual_MK, x_MK):
        assert tensor.dtype == torch.bfloat16, f"it is {tensor.dtype}"
        assert tensor.shape == (rows, k), f"{tuple(tensor.shape)} and {(rows, k)}"
    assert k % 8 == 0, "rows are read eight values at a time"
    args, tensors = AddArguments.of(
        added=added_MK, residual=residual_MK, x=x_MK, k=k, **norm_epilogue.arguments()
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
    """Buffers of one kind of all-reduce among the ranks of a model.

    An inbox is memory of a rank into which the other ranks write. Every rank launches the same
    all-reduces in the same order.

    Attributes:
        rank: This rank.
        inboxes: int64 [ranks], on the device: the address of every rank's inbox, which has
            ``inbox_bytes`` bytes, all zero before any rank's first launch.
        rounds: int32 [capacity, blocks of a row]: the number of completed all-reduces.
        capacity: The most rows.
        k: Width of rows that are summed; 0 for an argmax.
        kept: The owner of the inboxes' memory, which is kept alive.
    """

    rank: int
    inboxes: Tensor
    rounds: Tensor
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
        """Makes the exchange of one rank over all ranks' inboxes at these addresses."""
        blocks = max(1, _blocks_of_row(k))
        return cls(
            rank=rank,
            inboxes=torch.tensor(addresses, dtype=torch.int64, device=device),
            rounds=torch.zeros(capacity, blocks, dtype=torch.int32, device=device),
            capacity=capacity,
            k=k,
            kept=kept,
        )

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return len(self.inboxes)


def inbox_bytes(ranks: int, capacity: int, k: int = 0) -> int:
    """Returns the bytes of an inbox: two addends of every rank, with a flag for each four bytes.

    Args:
        ranks: The number of ranks.
        capacity: The most rows.
        k: Width of rows of bfloat16; 0 for an argmax, which exchanges a value and a token id.
    """
    return 2 * ranks * capacity * (2 * 2 * k or 16)


def all_reduce(
    local_MK: Tensor,
    residual_MK: Tensor,
    x_MK: Tensor,
    norm_epilogue: NormEpilogue,
    exchange: Exchange,
) -> Call:
    """Returns the launch that adds all ranks' addends to the residual stream and ends with a norm.

    It computes ``add`` of the sum over ranks. The sum is computed in the order of ranks, and not
    rounded.

    Args:
        local_MK: bfloat16, this rank's addend; M is at most the exchange's capacity.
        residual_MK: bfloat16.
        x_MK: bfloat16, written; may be ``residual_MK``.
        norm_epilogue: Epilogue of the norm that follows.
        exchange: Buffers shared with the other ranks.
    """
    rows, k = x_MK.shape
    for tensor in (local_MK, residual_MK, x_MK):
        assert tensor.dtype == torch.bfloat16, f"it is {tensor.dtype}"
        assert tensor.shape == (rows, k), f"{tuple(tensor.shape)} and {(rows, k)}"
    assert k == exchange.k, f"rows of {k} in an exchange of rows of {exchange.k}"
    assert k % 8 == 0, "rows are read eight values at a time"
    assert rows <= exchange.capacity, f"{rows} rows in an exchange of {exchange.capacity}"
    args, tensors = AllReduceArguments.of(
        local=local_MK,
        residual=residual_MK,
        x=x_MK,
        **norm_epilogue.arguments(),
        inboxes=exchange.inboxes,
        rounds=exchange.rounds,
        k=k,
        rank=exchange.rank,
        capacity=exchange.capacity,
    )
    return Call(
        kernel=all_reduce_kernel(exchange.ranks),
        grid=(_blocks_of_row(k), rows, 1),
        shared_bytes=0,
        args=args,
        tensors=tensors,
    )


def _blocks_of_row(k: int) -> int:
    return -(-k // (8 * _ALL_REDUCE_THREADS))


def argmax(best: tuple[Tensor, Tensor], ids_M: Tensor) -> Call:
    """Returns the launch of the argmax over the vocabulary; see ``reference.argmax``.

    Args:
        best: The best candidate of each block, as the head's matrix product writes it.
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


def argmax_over_ranks(
    best: tuple[Tensor, Tensor], ids_M: Tensor, exchange: Exchange, *, first: int
) -> Call:
    """Returns the launch of the argmax over all ranks' parts of the vocabulary, on every rank.

    If logits are equal, it takes the first, as ``VocabularyShard.argmax`` does.

    Args:
        best: The best candidate of each block, as the matrix product of this rank's part of the
            head writes it.
        ids_M: int64, written.
        exchange: Buffers shared with the other ranks.
        first: The first token id of this rank's part.
    """
    (value, index), rows = best, len(ids_M)
    assert value.shape == index.shape, f"{tuple(value.shape)} and {tuple(index.shape)}"
    assert exchange.ranks <= 32, f"{exchange.ranks} ranks, one per lane"
    assert rows <= exchange.capacity, f"{rows} rows in an exchange of {exchange.capacity}"
    args, tensors = ArgmaxOverRanksArguments.of(
        best_value=value,
        best_index=index,
        ids=ids_M,
        inboxes=exchange.inboxes,
        rounds=exchange.rounds,
        n=value.shape[1],
        first=first,
        rank=exchange.rank,
        ranks=exchange.ranks,
        capacity=exchange.capacity,
    )
    return _block_for_each(argmax_over_ranks_kernel(), rows, args, tensors)


def ngram_draft(history_RW: Tensor, positions_R: Tensor, drafts_BD: Tensor) -> Call:
    """Returns the launch of n-gram drafts for the first B rows.

    It is specified by ``reference.ngram_draft``.

    Args:
        history_RW: int64, the tokens of each row.
        positions_R: int64, the position of each row's newest token.
        drafts_BD: int64, written; -1 where the newest tokens did not occur before.
    """
    B, D = drafts_BD.shape
    assert min(len(history_RW), len(positions_R)) >= B, f"{B} rows"
    assert D <= _DRAFT_THREADS, f"{D} drafts, one per thread"
    assert history_RW.shape[1] < 2**30, f"{history_RW.shape[1]} positions"
    for tensor in (history_RW, positions_R, drafts_BD):
        assert tensor.dtype == torch.int64, f"it is {tensor.dtype}"
    args, tensors = NgramDraftArguments.of(
        history=history_RW,
        positions=positions_R,
        drafts=drafts_BD,
        width=history_RW.shape[1],
        n_drafts=D,
    )
    return Call(
        kernel=ngram_draft_kernel(),
        grid=(B, 1, 1),
        shared_bytes=4 * (_DRAFT_THREADS // 32),
        args=args,
        tensors=tensors,
    )


def next_tokens(
    history_RW: Tensor,
    positions_R: Tensor,
    drafts_BD: Tensor | None,
    ids_BT: Tensor,
    positions_BT: Tensor,
    *,
    last_position: int,
) -> Call:
    """Returns the launch that collects the input tokens of a step of the first B rows.

    It is specified by ``reference.next_tokens``.

    Args:
        history_RW: int64, the tokens of each row.
        positions_R: int64, the position of each row's newest token.
        drafts_BD: int64, D = T - 1, negative for no draft, with any stride of rows; None if T is 1.
        ids_BT: int64, written.
        positions_BT: int64, written.
        last_position: The last position of the cache.
    """
    common = _of_rows(history_RW, positions_R, drafts_BD, ids_BT, last_position)
    args, tensors = NextTokensArguments.of(token_positions=positions_BT, **common)
    return _block_for_each(next_tokens_kernel(), len(ids_BT), args, tensors)


def accept(
    ids_BT: Tensor,
    drafts_BD: Tensor | None,
    history_RW: Tensor,
    positions_R: Tensor,
    *,
    n_kept_B: Tensor | None,
    n_drafts_B: Tensor | None,
    last_position: int,
) -> Call:
    """Returns the launch that accepts drafts and advances the first B rows.

    It is specified by ``reference.accept``.

    Args:
        ids_BT: int64, the sampled tokens.
        drafts_BD: As for ``next_tokens``.
        history_RW: int64; the sampled tokens are appended.
        positions_R: int64; advanced by the number of tokens kept.
        n_kept_B: int64, written; None if T is 1.
        n_drafts_B: int64, written; None if T is 1.
        last_position: The last position of the cache.
    """
    common = _of_rows(history_RW, positions_R, drafts_BD, ids_BT, last_position)
    args, tensors = AcceptArguments.of(n_kept=n_kept_B, n_drafts=n_drafts_B, **common)
    return _block_for_each(accept_kernel(), len(ids_BT), args, tensors)


def _of_rows(
    history_RW: Tensor,
    positions_R: Tensor,
    drafts_BD: Tensor | None,
    ids_BT: Tensor,
    last_position: int,
) -> dict[str, Tensor | int | None]:
    """Returns the arguments that ``next_tokens`` and ``accept`` share."""
    B, T = ids_BT.shape
    assert T <= 32, f"{T} tokens, one per lane"
    common = {
        "history": history_RW,
        "positions": positions_R,
        "ids": ids_BT,
        "width": history_RW.shape[1],
        "tokens": T,
        "last_position": last_position,
    }
    if drafts_BD is None:
        assert T == 1, "one token without drafts"
        return {"drafts": None, "drafts_stride": 0, **common}
    assert drafts_BD.shape == (B, T - 1), f"drafts are {tuple(drafts_BD.shape)}"
    assert drafts_BD.stride(1) == 1, "drafts of a row are adjacent"
    stride = drafts_BD.stride(0)
    flat = drafts_BD.as_strided(((B - 1) * stride + T - 1,), (1,))  # with the gaps
    return {"drafts": flat, "drafts_stride": stride, **common}


def _block_for_each(
    kernel: Kernel, blocks: int, args: Arguments, tensors: tuple[Tensor, ...]
) -> Call:
    return Call(kernel=kernel, grid=(blocks, 1, 1), shared_bytes=0, args=args, tensors=tensors)
