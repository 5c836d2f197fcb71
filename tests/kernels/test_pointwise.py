"""Norms, rope and SwiGLU against their specification."""

import pytest
import torch
from torch import Tensor

from hotloop.kernels import cpu, pointwise, reference

needs_compiler = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def assert_alike(ours: Tensor, specified: Tensor) -> None:
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, specified, rtol=2**-7, atol=2**-8)
    same = torch.isclose(ours, specified, rtol=0, atol=1e-30).float().mean()
    assert same > 0.97, "only sums in another order may round otherwise"


@needs_compiler
@pytest.mark.parametrize("width", [1, 15, 64, 576, 577])
def test_norm_is_what_is_specified(width):
    x, weight = normal(2, 3, width), normal(width)
    assert_alike(
        torch.ops.hotloop_cpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)
    )


@needs_compiler
@pytest.mark.parametrize("head_dim", [2, 10, 64, 128])
def test_rotation_is_what_is_specified_for_heads_amid_others(head_dim):
    qkv = normal(2, 3, 9, head_dim)
    angles = torch.randn(2, 3, head_dim // 2).repeat(1, 1, 2)
    for x in qkv.split((5, 2, 2), dim=2):
        ours = torch.ops.hotloop_cpu.rope(x, angles.cos(), angles.sin())
        assert_alike(ours, reference.apply_rope(x, angles.cos(), angles.sin()))


@needs_compiler
@pytest.mark.parametrize("width", [1, 17, 1536])
def test_swiglu_is_what_is_specified(width):
    gate_up = normal(2, 3, 2 * width)
    gate_up[0, 0, 0], gate_up[0, 1, 0] = -300.0, 300.0
    assert_alike(torch.ops.hotloop_cpu.swiglu(gate_up), reference.swiglu(gate_up))


@needs_compiler
def test_numbers_that_are_none_stay_none():
    x = normal(1, 1, 64)
    x[0, 0, 3] = torch.nan
    assert torch.ops.hotloop_cpu.rms_norm(x, normal(64), 1e-5).isnan().all()
    assert torch.ops.hotloop_cpu.swiglu(x)[0, 0, 3].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_are_computed_as_specified(dtype):
    x, weight = normal(1, 1, 64, dtype=dtype), normal(64, dtype=dtype)
    assert torch.equal(pointwise.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    assert torch.equal(pointwise.swiglu(x), reference.swiglu(x))
