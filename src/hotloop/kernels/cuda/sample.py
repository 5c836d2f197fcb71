"""How the kernel of ``sample.cu`` is launched: it draws tokens.

Its specification is the drawing of ``engine.sampling`` in plain PyTorch.

Shape letters: B sequences, T tokens of each, V vocabulary.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from hotloop.kernels.cuda.compile import Kernel
from hotloop.kernels.cuda.launch import Arguments, Call

LISTED = 8192
"""So many tokens that are left go on in shared memory: what any GPU has room for."""


_THREADS = 1024


class SampleArguments(Arguments):
    """``SampleArgs`` of ``sample.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scores", "best", "positions", "temperature")),
        *((name, ctypes.c_void_p) for name in ("top_k", "top_p", "min_p", "seed", "ids")),
        *((name, ctypes.c_int) for name in ("stride", "n", "tokens")),
    )


def sample_kernel(listed: int = LISTED) -> Kernel:
    """The instance that lists at most so many tokens."""
    return Kernel(
        name=f"sample_{listed}",
        file="sample.cu",
        function=f"sample<{listed}, {_shared_bytes(listed)}>",
        args="SampleArgs",
        threads=_THREADS,
    )


def sample(
    scores_BTV: Tensor,
    best_BT: Tensor,
    positions_BT: Tensor,
    ids_BT: Tensor,
    *,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    seed_B: Tensor,
    listed: int = LISTED,
) -> Call:
    """The launch that draws ``ids_BT``, by each sequence's options.

    Args:
        scores_BTV: float32; its rows may lie apart.
        best_BT: int64: where each row is largest, which is what temperature 0 takes.
        positions_BT: int64: that the tokens will have.
        ids_BT: int64, written.
        temperature_B: float32.
        top_k_B: int64; V for all tokens.
        top_p_B: float32; 1 for all tokens.
        min_p_B: float32; 0 for all tokens.
        seed_B: int64.
        listed: How many tokens are listed at most; changes no bits.
    """
    B, T, n = scores_BTV.shape
    assert scores_BTV.dtype == torch.float32, f"scores are {scores_BTV.dtype}"
    assert scores_BTV.stride(2) == 1, "a row's scores follow each other"
    floats, integers = (temperature_B, top_p_B, min_p_B), (best_BT, positions_BT, top_k_B, seed_B)
    assert all(t.dtype == torch.float32 for t in floats), "temperature, top-p and min-p are float32"
    assert all(t.dtype == torch.int64 for t in (*integers, ids_BT)), "integers are int64"
    stride = scores_BTV.stride(1) if T > 1 else scores_BTV.stride(0)
    assert B == 1 or scores_BTV.stride(0) == T * stride, "rows are equally far apart"
    args, tensors = SampleArguments.of(
        scores=scores_BTV.as_strided(((B * T - 1) * stride + n,), (1,)),  # all that lies between
        best=best_BT,
        positions=positions_BT,
        temperature=temperature_B,
        top_k=top_k_B,
        top_p=top_p_B,
        min_p=min_p_B,
        seed=seed_B,
        ids=ids_BT,
        stride=stride,
        n=n,
        tokens=T,
    )
    return Call(
        kernel=sample_kernel(listed),
        grid=(B * T, 1, 1),
        shared_bytes=_shared_bytes(listed),
        args=args,
        tensors=tensors,
    )


def _shared_bytes(listed: int) -> int:
    """Of ``Shared`` in ``sample.cu``, which checks this."""
    of_warps, found, bins = 32 * (16 + 8), 24, 3 * 4 * _THREADS
    return 8 * max(listed, _THREADS) + of_warps + found + bins + 8
