"""Launches of ``sample.cu``, which samples tokens.

It is specified by ``engine.sampling`` in plain PyTorch.

Shape letters: B sequences, T tokens of each, V vocabulary.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from hotloop.kernels.cuda.compile import Kernel
from hotloop.kernels.cuda.launch import Arguments, Call

MAX_CANDIDATES = 8192
"""The most tokens that are compacted into shared memory: any supported GPU has room for them."""


_THREADS = 1024


class SampleArguments(Arguments):
    """``SampleArgs`` of ``sample.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scores", "best", "positions", "temperature")),
        *((name, ctypes.c_void_p) for name in ("top_k", "top_p", "min_p", "seed", "ids")),
        *((name, ctypes.c_int) for name in ("stride", "n", "tokens")),
    )


def sample_kernel(max_candidates: int = MAX_CANDIDATES) -> Kernel:
    """Returns the instance for at most this many candidates."""
    return Kernel(
        name=f"sample_{max_candidates}",
        file="sample.cu",
        function=f"sample<{max_candidates}, {_shared_bytes(max_candidates)}>",
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
    max_candidates: int = MAX_CANDIDATES,
) -> Call:
    """Returns the launch that samples ``ids_BT``, with each sequence's options.

    Args:
        scores_BTV: float32; rows may have any equal stride.
        best_BT: int64, argmax of each row, which is the sample at temperature 0.
        positions_BT: int64, positions of the sampled tokens.
        ids_BT: int64, written.
        temperature_B: float32.
        top_k_B: int64; V for all tokens.
        top_p_B: float32; 1 for all tokens.
        min_p_B: float32; 0 for all tokens.
        seed_B: int64.
        max_candidates: The most tokens compacted into shared memory. Does not change results.
    """
    B, T, n = scores_BTV.shape
    assert scores_BTV.dtype == torch.float32, f"scores are {scores_BTV.dtype}"
    assert scores_BTV.stride(2) == 1, "a row's scores are adjacent"
    floats, integers = (temperature_B, top_p_B, min_p_B), (best_BT, positions_BT, top_k_B, seed_B)
    assert all(t.dtype == torch.float32 for t in floats), "temperature, top-p and min-p are float32"
    assert all(t.dtype == torch.int64 for t in (*integers, ids_BT)), "integers are int64"
    stride = scores_BTV.stride(1) if T > 1 else scores_BTV.stride(0)
    assert B == 1 or scores_BTV.stride(0) == T * stride, "all rows have one stride"
    args, tensors = SampleArguments.of(
        scores=scores_BTV.as_strided(((B * T - 1) * stride + n,), (1,)),  # with the gaps
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
        kernel=sample_kernel(max_candidates),
        grid=(B * T, 1, 1),
        shared_bytes=_shared_bytes(max_candidates),
        args=args,
        tensors=tensors,
    )


def _shared_bytes(max_candidates: int) -> int:
    """Returns the size of ``Shared`` in ``sample.cu``, which asserts it."""
    warps, cutoff, bins = 32 * (16 + 8), 24, 3 * 4 * _THREADS
    return 8 * max(max_candidates, _THREADS) + warps + cutoff + bins + 8
