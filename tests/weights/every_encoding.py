"""A tiny checkpoint in every encoding of other tools."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from stored_models import Encode, write_stored
from test_awq_gptq import AWQ, GPTQ, awq, gptq
from test_compressed_tensors import FORMATS, compressed, description, scheme_of
from test_fp8_bitsandbytes import BNB, FP8, PER_TENSOR, blocks, nf4, one_scale
from test_gguf_as_stored import KINDS
from whole_models import write_gguf_model

Write = Callable[..., Path]
"""Writes a checkpoint into a folder, with these keys of ``config.json``; returns its path."""


def _stored(encode: Encode, said: dict[str, Any]) -> Write:
    return lambda folder, **keys: write_stored(folder, encode, said, **keys)[0]


def _library(name: str) -> Write:
    format_, args = FORMATS[name]
    scheme = scheme_of(format_, **args)
    return _stored(compressed(scheme), description(scheme, format_=format_))


def _gguf(kind: str) -> Write:
    return lambda folder, **keys: write_gguf_model(folder / "m.gguf", kind, tied=False, **keys)


ENCODINGS: Mapping[str, Write] = {
    "awq": _stored(awq(32), AWQ),
    "awq, symmetric": _stored(awq(32, symmetric=True), AWQ),
    "awq in groups of 128": _stored(awq(128), AWQ | {"group_size": 128}),
    "gptq": _stored(gptq(32), GPTQ),
    "gptq of 8 bits": _stored(gptq(32, bits=8), GPTQ | {"bits": 8}),
    "gptq, symmetric": _stored(gptq(32, symmetric=True), GPTQ | {"sym": True}),
    "gptq per channel": _stored(gptq(-1), GPTQ | {"group_size": -1}),
    "gptq, act-order": _stored(gptq(32, act_order=True), GPTQ | {"desc_act": True}),
    **{name: _library(name) for name in FORMATS},
    "block fp8": _stored(blocks(), FP8),
    "block fp8, powers of two": _stored(blocks(torch.uint8), FP8 | {"scale_fmt": "ue8m0"}),
    "per-tensor fp8": _stored(one_scale((), "weight_scale"), PER_TENSOR),
    "nf4": _stored(nf4(nested=False), BNB),
    "nf4, nested": _stored(nf4(nested=True), BNB),
    "fp4": _stored(nf4(nested=False, type_="fp4"), BNB | {"bnb_4bit_quant_type": "fp4"}),
    **{kind: _gguf(kind) for kind in KINDS},
}
