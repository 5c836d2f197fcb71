"""Encodings decode what is stored without loss, and kernels hold what was decoded exactly."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from hotloop.kernels.linear import DENSE
from hotloop.quant import parse_scheme
from hotloop.quant.encodings import ENCODINGS, StoredMatrix
from hotloop.quant.encodings.gguf import BLOCKS, Blocks
from hotloop.quant.encodings.hotloop import Hotloop
from hotloop.registry import resolve
from hotloop.weights.tensor_file import TensorInfo

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", [name for name in ENCODINGS if name.startswith("gguf-")])
def test_blocks_of_gguf_are_worth_what_the_gguf_package_makes_of_them(name):
    blocks: Blocks = resolve("encoding", ENCODINGS, name)
    noise = np.random.default_rng(0)
    raw = noise.integers(0, 256, (7, 5 * blocks.n_bytes), dtype=np.uint8)
    if name == "gguf-mxfp4":  # here 255 is NaN, there a number that is never written
        raw[raw == 255] = 254
    k = 5 * blocks.size
    weight = blocks.decode({BLOCKS: torch.from_numpy(raw)}, (7, k))
    with np.errstate(invalid="ignore"):  # some scales of random bytes are not finite
        expected = dequantize(raw, GGMLQuantizationType[blocks.type])
    assert weight.shape == (7, k)
    assert weight.format == blocks.format
    assert torch.equal(weight.dequantize().nan_to_num(), torch.from_numpy(expected).nan_to_num())
    assert torch.equal(weight.dequantize().isnan(), torch.from_numpy(expected).isnan())


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int4-g32", "int4-g64-asym"])
def test_what_hotloop_stores_is_decoded_to_the_same_numbers(scheme):
    weight = parse_scheme(scheme).quantize(normal(6, 128))
    decoded = Hotloop.decode(stored := Hotloop.encode(weight), (6, 128))
    assert decoded.format == weight.format == parse_scheme(scheme).format(128)
    for ours, theirs in zip(decoded.tensors, weight.tensors, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.float(), theirs.float())
    dtypes = {torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}
    dtypes |= {torch.float32: "F32", torch.bfloat16: "BF16"}
    names = {name: dtypes[tensor.dtype] for name, tensor in stored.items()}
    tensors = {
        name: TensorInfo(
            name=name,
            shape=tuple(tensor.shape),
            dtype=names[name],
            file=Path("x"),
            n_bytes=tensor.nbytes,
        )
        for name, tensor in stored.items()
    }
    matrix = StoredMatrix(
        name="x", shape=(6, 128), tensors=tensors, read=stored.__getitem__, wanted=weight.format
    )
    layout = Hotloop.recognize(matrix)
    assert layout is not None
    assert {name: (part.shape, part.dtype) for name, part in layout.parts.items()} == {
        name: (info.shape, info.dtype) for name, info in tensors.items()
    }
    undescribed = replace(matrix, wanted=DENSE)
    assert Hotloop.recognize(undescribed) is None, "no scheme says how to read them"
