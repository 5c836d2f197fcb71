"""Writes matrices as compressed-tensors, so that vLLM and transformers load what hotloop quantized.

Integers become pack-quantized, also those of 8 bits: vLLM supports int-quantized only with
quantized activations. e4m3 becomes float-quantized. Values, scales and zero points are stored as
they are; anything that the format cannot store is refused, never rounded.

``quant.encodings.compressed_tensors`` and ``quant.encodings.fp8`` read the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hotloop.errors import ConfigError
from hotloop.quant import QTensor, Scheme
from hotloop.quant.encodings.bits import pack
from hotloop.quant.encodings.compressed_tensors import PACKED, SCALE, SHAPE, ZERO
from hotloop.quant.encodings.fp8 import WEIGHT

_BITS = {"int4": 4, "int8": 8, "nested": 8, "fp8": 8}


def refuse_unsupported(scheme: Scheme, head: Scheme) -> None:
    """Refuses schemes that compressed-tensors, or an engine that reads it, cannot hold.

    Args:
        scheme: The scheme of the projections in blocks.
        head: The scheme of the head, and of an embedding tied to it.

    Raises:
        ConfigError: compressed-tensors has no such number format, or the head is quantized.
    """
    if head.name != "none":
        raise ConfigError(
            f"head {head.name!r} cannot be written as compressed-tensors: vLLM reads heads and "
            "embeddings unquantized only. Leave head out, or give none."
        )
    form = scheme.format(1)
    if form.zero == "offset":
        raise ConfigError(
            f"quant {scheme.name!r} cannot be written as compressed-tensors, which has integer "
            "zero points and no floating-point offsets: give "
            f"{scheme.name.replace('-asym', '-zp')}, or format hotloop."
        )
    if form.kind not in _BITS or form.super_size is not None or form.permuted:
        raise ConfigError(
            f"quant {scheme.name!r} cannot be written as compressed-tensors: give int8, fp8, "
            "int8-gN, int4-gN or int4-gN-zp."
        )


def encode(weight: QTensor) -> dict[str, Tensor]:
    """Returns the tensors that store a matrix, by the suffix of its name."""
    scale = {SCALE: weight.scale}
    if weight.kind == "fp8":
        return {WEIGHT: weight.values} | scale
    bits = _BITS[weight.kind]
    parts = {PACKED: pack(weight.values, bits)} | scale | {SHAPE: torch.tensor(weight.shape)}
    if weight.offset is not None:
        assert not weight.offset.is_floating_point(), "zero points"
        parts[ZERO] = pack(weight.offset.T, bits).T.contiguous()
    return parts


def describe(scheme: Scheme, *, ignore: Sequence[str]) -> dict[str, Any]:
    """Returns the keys of ``config.json`` that describe matrices under one scheme.

    Args:
        scheme: The scheme of all linear layers except the ignored ones.
        ignore: Linear layers that are not quantized.
    """
    form = scheme.format(1)
    per_channel = form.is_per_channel(1)
    format_ = "float-quantized" if form.kind == "fp8" else "pack-quantized"
    weights = {
        "num_bits": _BITS[form.kind],
        "type": "float" if form.kind == "fp8" else "int",
        "symmetric": form.zero == "none",
        "strategy": "channel" if per_channel else "group",
        "group_size": None if per_channel else form.group_size,
        "dynamic": False,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": format_,
    }
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": format_,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(ignore),
        }
    }
