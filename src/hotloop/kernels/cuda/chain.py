"""Launches of ``chain.cu``, which decides whether a chain of drafts continues.

Shape letters: B rows, V vocabulary.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from hotloop.kernels.cuda.compile import Kernel
from hotloop.kernels.cuda.launch import Arguments, Call

_THREADS = 1024  # kThreads of chain.cu


class ChainArguments(Arguments):
    """``ChainArgs`` of ``chain.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "ids", "own", "undrafted")),
        *((name, ctypes.c_void_p) for name in ("min_probability", "accepted", "state")),
        ("handle", ctypes.c_uint64),
        *((name, ctypes.c_int) for name in ("stride", "n", "rows", "is_first", "has_node")),
    )


def chain_kernel() -> Kernel:
    """Returns the kernel."""
    return Kernel(
        name="extend_chain_step",
        file="chain.cu",
        function="extend_chain",
        args="ChainArgs",
        threads=_THREADS,
    )


def extend_chain(
    logits_BV: Tensor,
    ids_B: Tensor,
    own_B: Tensor | None,
    undrafted_B: Tensor,
    min_probability: Tensor,
    accepted_B: Tensor,
    state: Tensor,
    *,
    is_first: bool,
    handle: int | None,
) -> Call:
    """Returns the launch that sets the condition of the next draft.

    It is specified by ``reference.extend_chain`` and ``Sampler.probability``.

    Args:
        logits_BV: float32, the logits of the newest draft; rows may have any stride.
        ids_B: int64, the newest draft, negative for none.
        own_B: float32, its probability; None computes the probability from the logits.
        undrafted_B: bool, rows whose drafts do not count.
        min_probability: float32 [1]; a chain of lower probability ends.
        accepted_B: float32, the probability that all drafts so far are accepted; updated.
        state: int32 [2]: a counter of blocks, and whether the chain has ended; zeros before the
            first launch. It is kept from one launch of a chain to the next: once the chain has
            ended, further launches leave it ended.
        is_first: It is the first draft of a chain.
        handle: The handle of the IF node with the next draft; None if the draft is always made.
    """
    (B, n), stride = logits_BV.shape, logits_BV.stride(0)
    assert logits_BV.stride(1) == 1, "a row's logits are adjacent"
    assert n < 2**31 - 8 * _THREADS, f"{n} logits"
    for tensor, dtype, size in (
        (logits_BV, torch.float32, B),
        (ids_B, torch.int64, B),
        (own_B, torch.float32, B),
        (undrafted_B, torch.bool, B),
        (min_probability, torch.float32, 1),
        (accepted_B, torch.float32, B),
        (state, torch.int32, 2),
    ):
        if tensor is not None:
            assert tensor.dtype == dtype, f"it is {tensor.dtype}"
            assert len(tensor) == size, f"{len(tensor)} of {size}"
    args, tensors = ChainArguments.of(
        logits=logits_BV.as_strided(((B - 1) * stride + n,), (1,)),  # with the gaps
        ids=ids_B,
        own=own_B,
        undrafted=undrafted_B,
        min_probability=min_probability,
        accepted=accepted_B,
        state=state,
        handle=handle or 0,
        stride=stride,
        n=n,
        rows=B,
        is_first=is_first,
        has_node=handle is not None,
    )
    return Call(
        kernel=chain_kernel(),
        grid=(B, 1, 1),
        shared_bytes=4 * (_THREADS // 32 + 1),
        args=args,
        tensors=tensors,
    )
