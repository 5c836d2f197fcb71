"""Encodings decode what is stored without loss, and kernels hold what was decoded exactly."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from hotloop.kernels.linear import DENSE, LinearSpec, choose_linear
from hotloop.models.linear import Linear
from hotloop.quant import QTensor, parse_scheme
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


@pytest.mark.parametrize(
    ("kind", "scale", "zero", "group", "reason"),
    [
        ("int4", torch.float16, None, 32, "holds scales in torch.bfloat16, not torch.float16"),
        ("int4", torch.bfloat16, torch.int8, 64, "holds no integer zero points"),
        ("int4", torch.bfloat16, None, 16, "holds groups of 32 or 64 or 128, not 16"),
        ("int8", torch.float32, None, 32, "holds groups of the whole row, not 32"),
        ("int8", torch.float16, torch.float16, 128, "holds no offsets"),
    ],
)
def test_what_a_kernel_cannot_hold_exactly_goes_to_the_next_with_the_reason(
    kind, scale, zero, group, reason
):
    n, k = 48, 128
    most = 7 if kind == "int4" else 127
    offset = None
    if zero is not None:
        offset = (3 * normal(n, k // group, seed=1)).to(zero)
    weight = QTensor(
        values=torch.randint(-most, most + 1, (n, k), dtype=torch.int8),
        scale=normal(n, k // group).to(scale),
        offset=offset,
        kind=kind,
    )
    for dtype in (torch.float32, torch.bfloat16):
        linear, x = Linear(n, k), normal(3, k, seed=2).to(dtype)
        linear.assign(weight, dtype=dtype, device=CPU)
        assert linear.kernel is not None
        expected = x @ weight.dequantize(dtype).T
        torch.testing.assert_close(linear(x), expected)
        spec = LinearSpec(format=weight.format, n=n, k=k, dtype=dtype, device="cpu")
        assert linear.nbytes == choose_linear(spec)[0].nbytes, "memory is known beforehand"
        assert any(reason in note for note in linear.notes) or dtype == torch.float32


def test_the_fused_step_refuses_what_it_cannot_hold_exactly():
    weight = QTensor(
        values=torch.zeros(16, 64, dtype=torch.int8),
        scale=torch.ones(16, 2, dtype=torch.float16),
        offset=None,
        kind="int4",
    )
    spec = LinearSpec(
        format=weight.format, n=16, k=64, dtype=torch.bfloat16, device="cuda", fused=True
    )
    with pytest.raises(AssertionError, match=r"holds scales in torch\.bfloat16"):
        choose_linear(spec)
