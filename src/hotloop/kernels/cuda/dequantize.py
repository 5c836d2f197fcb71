"""Dequantizes packed weights to bfloat16: launches of ``dequantize.cu``.

Shape letters: N output features, K input features.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from hotloop.kernels import reference
from hotloop.kernels.cuda.compile import Kernel
from hotloop.kernels.cuda.launch import Arguments, Call, device_of
from hotloop.kernels.cuda.packing import Format, tile_stride, unpack

_WARPS = 8


class DequantizeArguments(Arguments):
    """``DequantizeArgs`` of ``dequantize.cu``."""

    TILED = ("weight",)

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "rows")),
        *((name, ctypes.c_int) for name in ("n", "k", "tiles", "units", "tile_stride")),
        ("features", ctypes.c_void_p),
    )


def dequantize(form: Format, packed: Tensor, features_K: Tensor | None = None) -> Tensor:
    """Dequantizes a weight to bfloat16 [N, K], rounded once; plain rows are returned as they are.

    Scales and offsets of groups are applied. Scales per output feature are not, so that eight-bit
    values remain exact.

    Args:
        form: Format of the weight.
        packed: As ``packing.pack`` returns it.
        features_K: int32, the input feature of each column of a permuted weight.
    """
    if form.plain_rows:
        return packed
    if not packed.is_cuda:
        return dequantize_torch(form, packed, features_K)
    rows_NK = torch.empty(form.n, form.k, dtype=torch.bfloat16, device=packed.device)
    call = dequantize_call(form, packed, rows_NK, features_K)
    device_of(packed.device).prepare(call, dependent=False)()
    return rows_NK


def dequantize_torch(form: Format, packed: Tensor, features_K: Tensor | None = None) -> Tensor:
    """Computes ``dequantize`` in plain PyTorch."""
    return dequantize_exactly(form, packed, features_K).to(torch.bfloat16)


def dequantize_exactly(
    form: Format,
    packed: Tensor,
    features_K: Tensor | None = None,
    scale_N: Tensor | None = None,
) -> Tensor:
    """Dequantizes a weight to float32 [N, K], by ``reference.dequantize``; see ``dequantize``.

    Args:
        form: Format of the weight.
        packed: As ``packing.pack`` returns it.
        features_K: See ``dequantize``.
        scale_N: float32, scales of output features to apply; None for 1.
    """
    parts = unpack(form, packed)
    scale, factor = parts.scale, parts.factor
    if scale is None:
        assert features_K is None, "weights with groups are permuted"
        if scale_N is None:
            return parts.values.float()
        scale = scale_N[:, None]
    elif scale_N is not None:
        factor = scale_N[:, None]
    table = None if form.table is None else torch.tensor(form.table, device=packed.device)
    return reference.dequantize(
        parts.values,
        scale,
        parts.offset,
        super_scale_NS=factor,
        super_offset_NS=parts.offset_factor,
        table=table,
        permutation_K=features_K,
    )


def dequantize_kernel(form: Format) -> Kernel:
    """Returns the instance for a format."""
    return Kernel(
        name=f"dequantize_{form.label}{'_paired' if form.paired else ''}",
        file="dequantize.cu",
        function=f"dequantize<{form.struct}, {str(form.paired).lower()}, {_WARPS}>",
        args="DequantizeArgs",
        threads=32 * _WARPS,
    )


def dequantize_call(
    form: Format, packed: Tensor, rows_NK: Tensor, features_K: Tensor | None = None
) -> Call:
    """Returns the launch that writes ``rows_NK``, bfloat16; see ``dequantize``."""
    assert (features_K is not None) == form.permuted, "only permuted weights have features_K"
    assert rows_NK.shape == (form.n, form.k), f"rows are {tuple(rows_NK.shape)} for {form}"
    assert rows_NK.dtype == torch.bfloat16, f"rows are {rows_NK.dtype}"
    assert not form.plain_rows, "plain rows are read as they are"
    assert packed.nbytes == form.nbytes, f"{packed.nbytes} bytes for {form}"
    args, tensors = DequantizeArguments.of(
        weight=packed,
        rows=rows_NK,
        n=form.n,
        k=form.k,
        tiles=form.tiles,
        units=form.units,
        tile_stride=tile_stride(form, packed),
        features=features_K,
    )
    return Call(
        kernel=dequantize_kernel(form),
        grid=(-(-form.tiles * form.units // _WARPS), 1, 1),
        shared_bytes=0,
        args=args,
        tensors=tensors,
    )
