"""The pieces of a decoder that hold weights or a cache."""

import pytest
import torch
from number_formats import NAMES, random_weight
from torch import Tensor

from hotloop.kernels.linear import LinearSpec, Stacked, choose_linear
from hotloop.models.cache import KVCache, write
from hotloop.models.linear import Embedding, Linear
from hotloop.quant import parse_scheme

CPU = torch.device("cpu")
FLOATS = [torch.float32, torch.bfloat16]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("name", ["none", "int8", "int4-g32-asym"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_projection_keeps_leading_dimensions_and_adds_its_bias(name, dtype):
    weight, bias = normal(6, 64, dtype=dtype), normal(6, dtype=dtype)
    linear = Linear(6, 64)
    linear.assign(parse_scheme(name).quantize(weight), bias, dtype=dtype, device=CPU)
    with_bias = linear(normal(2, 3, 64, dtype=dtype))
    assert (with_bias.shape, with_bias.dtype) == ((2, 3, 6), dtype)
    assert linear.nbytes == sum(t.nbytes for t in linear.packed) + bias.nbytes
    linear.assign(parse_scheme(name).quantize(weight), torch.zeros(6), dtype=dtype, device=CPU)
    assert torch.equal(linear(normal(2, 3, 64, dtype=dtype)) + bias, with_bias)


def test_projection_accounts_for_itself_as_its_scheme_foretells():
    for name in ("none", "int8", "int4-g64", "int4-g32-asym"):
        scheme, linear = parse_scheme(name), Linear(10, 128)
        linear.assign(scheme.quantize(normal(10, 128)), dtype=torch.bfloat16, device=CPU)
        form = LinearSpec(
            format=scheme.format(128), n=10, k=128, dtype=torch.bfloat16, device="cpu"
        )
        assert choose_linear(form)[0].nbytes == linear.nbytes


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_projection_of_several_formats_has_a_kernel_for_each(dtype):
    q, k = random_weight("Q4_K", 32, 256), random_weight("gptq-act-order", 16, 256)
    parts, x, linear = (
        [q, k, normal(5, 256, dtype=dtype)],
        normal(3, 256, dtype=dtype),
        Linear(53, 256),
    )
    linear.assign(parts, normal(53, dtype=dtype), dtype=dtype, device=CPU)
    assert isinstance(linear.kernel, Stacked)
    alone = []
    for part in parts:
        each = Linear(part.shape[0], 256)
        each.assign(part, dtype=dtype, device=CPU)
        alone.append(each(x))
    assert torch.equal(linear(x), torch.cat(alone, dim=1) + normal(53, dtype=dtype))


def test_projection_refuses_a_weight_of_another_shape():
    with pytest.raises(AssertionError):
        Linear(6, 64).assign(normal(64, 6), dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_an_embedding_gives_the_rows_of_the_dequantized_table(name, dtype):
    weight = random_weight(name, 37, 512)
    spec = LinearSpec(format=weight.format, n=37, k=512, dtype=dtype, device="cpu")
    kernel, _ = choose_linear(spec)
    assert kernel.embeds == ("permuted" not in kernel.name)
    if not kernel.embeds:
        return
    embedding, ids = Embedding(37, 512), torch.tensor([[3, 0, -1], [36, 3, 99]])
    embedding.assign(spec, kernel.pack(weight))
    assert torch.equal(embedding(ids), weight.dequantize(dtype)[ids.clamp(0, 36)])


def test_new_keys_land_in_their_seats_and_positions_and_nowhere_else():
    cache = KVCache(
        kv_heads=[(2, 4)] * 2,
        n_seats=3,
        n_positions=8,
        dtype=torch.float32,
        device=CPU,
    )
    keys, values = cache.layer(1)
    assert keys.shape == values.shape == (3, 2, 8, 4)
    assert not keys.any()
    new = normal(2, 3, 2, 4)
    positions = torch.tensor([[0, 1, 2], [5, 6, 7]])
    write(keys, torch.tensor([1, 2]), positions, new)
    torch.testing.assert_close(keys[1, :, 0:3].transpose(0, 1), new[0], rtol=0, atol=0)
    torch.testing.assert_close(keys[2, :, 5:8].transpose(0, 1), new[1], rtol=0, atol=0)
    assert int((keys != 0).sum()) == new.numel()
    assert not values.any()
    assert not any(t.any() for t in cache.layer(0))
