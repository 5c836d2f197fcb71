"""Attention over the cache against float64, and the choice between implementations."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hotloop.kernels import cpu, reference
from hotloop.kernels.attention import (
    Attention,
    choose_attention,
    cpu_attention,
    torch_attention,
)
from hotloop.types import EXACT_CPU_CHUNK

needs_compiler = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)
HEADS = [(9, 3), (4, 4), (8, 1), (4, 2)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_definition(
    q_BTHE: Tensor, k_BJCE: Tensor, v_BJCE: Tensor, positions_BT: Tensor, window: int | None
) -> Tensor:
    """Computes attention in float64, for each head and token over its visible positions."""
    out = torch.empty(q_BTHE.shape, dtype=torch.float64)
    B, T, H, E = q_BTHE.shape
    for b in range(B):
        for t in range(T):
            stop = int(positions_BT[b, t]) + 1
            start = 0 if window is None else max(0, stop - window)
            for h in range(H):
                j = h * k_BJCE.shape[1] // H
                keys, values = (c[b, j, start:stop].double() for c in (k_BJCE, v_BJCE))
                scores = keys @ q_BTHE[b, t, h].double() * E**-0.5
                out[b, t, h] = scores.softmax(0) @ values
    return out


def attend(
    attention: Attention, q_BTHE: Tensor, k_BJCE: Tensor, v_BJCE: Tensor, *at: Tensor, **how: Any
) -> Tensor:
    """Computes attention with sequence b in seat b."""
    return attention(q_BTHE, k_BJCE, v_BJCE, torch.arange(len(q_BTHE)), *at, first_seat=0, **how)


def assert_attention(
    attention, lengths: list[int], heads: tuple[int, int], E: int, window: int | None, dtype, T=1
) -> None:
    """T new tokens each, after which sequences have these lengths."""
    H, J = heads
    C = max(lengths) + 3
    q = normal(len(lengths), T, H, E, dtype=dtype)
    k, v = (normal(len(lengths), J, C, E, seed=s, dtype=dtype) for s in (1, 2))
    positions = torch.tensor(lengths)[:, None] + torch.arange(-T, 0)
    arguments = {"length": C, "window": window, "scale": E**-0.5}
    y = attend(attention, q, k, v, positions, **arguments)
    seats = torch.arange(len(lengths)).roll(1) + 2  # any others of a larger cache
    caches = [normal(len(lengths) + 3, J, C, E, seed=3, dtype=dtype) for _ in range(2)]
    for cache, rows in zip(caches, (k, v), strict=True):
        cache[seats] = rows
    elsewhere = attention(q, *caches, seats, positions, first_seat=None, **arguments)
    assert torch.equal(elsewhere, y)
    assert (y.dtype, y.shape) == (dtype, q.shape)
    expected = by_definition(q, k, v, positions, window)
    rtol, atol = (1.3e-6, 1e-5) if dtype == torch.float32 else (2**-8, 1e-4)
    if attention is torch_attention and dtype != torch.float32:
        atol = 0.02  # PyTorch's rounds the probabilities as well
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=atol)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("E", [24, 64, 80, 128, 20])
@pytest.mark.parametrize("heads", HEADS)
def test_decode_kernel_equals_the_definition_for_every_shape_of_head(heads, E, dtype):
    assert_attention(cpu_attention, [130, 1, 57], heads, E, None, dtype)


@needs_compiler
@pytest.mark.parametrize("window", [None, 1, 7, 127, 128, 129, 200])
@pytest.mark.parametrize("lengths", [[1], [127], [128], [129], [256, 257], [300, 5, 128, 131]])
def test_decode_kernel_equals_the_definition_across_blocks_and_windows(lengths, window):
    assert_attention(cpu_attention, lengths, (4, 2), 24, window, torch.float32)


@needs_compiler
@pytest.mark.parametrize("window", [None, 1, 7, 128])
@pytest.mark.parametrize("T", [2, 5, 9, EXACT_CPU_CHUNK])
def test_kernel_lets_each_of_several_tokens_see_up_to_itself(T, window):
    # Across a block's end, a whole sequence, and one longer than the other.
    for lengths in ([130], [T], [257, T + 3], [128 + T, 3 * T]):
        assert_attention(cpu_attention, lengths, (9, 3), 24, window, torch.float32, T)


@needs_compiler
def test_shares_are_as_exact_as_float32_however_far_scores_are_apart():
    scores = -1.75 * torch.arange(64)  # to where e^x is no normal number any more
    q, k = torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 64, 64)
    q[..., 0], k[0, 0, :, 0] = 8, scores
    values = torch.eye(64)[None, None]  # so what comes out are the shares
    last = torch.tensor([[63]])
    shares = attend(cpu_attention, q, k, values, last, length=64, window=None, scale=0.125)
    expected = scores.double().softmax(0)
    torch.testing.assert_close(shares.double().flatten(), expected, rtol=3e-7, atol=2e-38)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 40])
def test_a_token_gives_the_same_bits_alone_and_among_others(window, dtype):
    q = normal(2, EXACT_CPU_CHUNK, 9, 64, dtype=dtype)
    k, v = (normal(2, 3, 320, 64, seed=s, dtype=dtype) for s in (1, 2))
    positions = torch.tensor([[120], [250]]) + torch.arange(EXACT_CPU_CHUNK)
    arguments = {"length": 320, "window": window, "scale": 0.125}
    together = attend(cpu_attention, q, k, v, positions, **arguments)
    for t in range(EXACT_CPU_CHUNK):
        one = slice(t, t + 1)
        alone = attend(cpu_attention, q[:, one], k, v, positions[:, one].contiguous(), **arguments)
        assert torch.equal(alone, together[:, one])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("heads", HEADS)
def test_torch_attention_equals_the_definition(heads, window, dtype):
    assert_attention(torch_attention, [33, 1, 20], heads, 24, window, dtype)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("attention", [torch_attention, cpu_attention])
def test_prefill_of_many_tokens_sees_the_past_and_itself(attention, window):
    T = EXACT_CPU_CHUNK + 1
    positions = torch.tensor([[4], [0]]) + torch.arange(T)
    q, k, v = normal(2, T, 4, 24), normal(2, 2, T + 9, 24, seed=1), normal(2, 2, T + 9, 24, seed=2)
    y = attend(attention, q, k, v, positions, length=T + 4, window=window, scale=24**-0.5)
    expected = by_definition(q, k, v, positions, window)
    torch.testing.assert_close(y.double(), expected, rtol=1.3e-6, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("window", [None, 40])
def test_decode_kernel_reads_nothing_that_its_token_does_not_see(window):
    lengths = torch.tensor([150, 20])
    q, k, v = normal(2, 1, 4, 64), normal(2, 2, 200, 64, seed=1), normal(2, 2, 200, 64, seed=2)
    arguments = {"length": 200, "window": window, "scale": 0.125}
    clean = attend(cpu_attention, q, k, v, lengths[:, None] - 1, **arguments)
    for b, length in enumerate(lengths.tolist()):
        for cache in (k, v):
            cache[b, :, length:] = math.nan
            if window is not None:
                cache[b, :, : max(0, length - window)] = math.nan
    assert torch.equal(attend(cpu_attention, q, k, v, lengths[:, None] - 1, **arguments), clean)


@needs_compiler
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poison_reaches_the_heads_that_see_it_and_no_others(where, poison):
    q, k, v = normal(2, 1, 4, 64), normal(2, 2, 200, 64, seed=1), normal(2, 2, 200, 64, seed=2)
    positions = torch.tensor([[199], [50]])
    arguments = {"length": 200, "window": None, "scale": 0.125}
    clean = attend(cpu_attention, q, k, v, positions, **arguments)
    if where == "query":
        q[0, 0, 2, 5] = poison
        touched = [2]
    else:
        (k if where == "key" else v)[0, 1, 140, 5] = poison
        touched = [2, 3]  # the query heads of key/value head 1
    y = attend(cpu_attention, q, k, v, positions, **arguments)
    for h in range(4):
        if h in touched:
            assert not y[0, 0, h].isfinite().all()
        else:
            assert torch.equal(y[0, 0, h], clean[0, 0, h])
    assert torch.equal(y[1], clean[1])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("threads")
def test_number_of_threads_and_neighbors_change_no_bit(dtype):
    q = normal(3, 1, 9, 64, dtype=dtype)
    k, v = (normal(3, 3, 300, 64, seed=s, dtype=dtype) for s in (1, 2))
    positions = torch.tensor([[299], [3], [130]])
    arguments = {"length": 300, "window": None, "scale": 0.125}
    results = []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        results.append(attend(cpu_attention, q, k, v, positions, **arguments))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    for b in range(3):
        one = slice(b, b + 1)
        alone = attend(cpu_attention, q[one], k[one], v[one], positions[one], **arguments)
        assert torch.equal(alone, results[0][one])


@needs_compiler
def test_position_beyond_the_cache_is_refused():
    q, cache = normal(1, 1, 2, 8), normal(1, 2, 16, 8)
    with pytest.raises(RuntimeError, match="position beyond the cache"):
        attend(
            cpu_attention, q, cache, cache, torch.tensor([[16]]), length=16, window=None, scale=1.0
        )


@needs_compiler
@pytest.mark.parametrize("seat", [-1, 2])
def test_seat_beyond_the_cache_is_refused(seat):
    q, cache, position = normal(1, 1, 2, 8), normal(2, 2, 16, 8), torch.tensor([[3]])
    arguments = {"first_seat": None, "length": 16, "window": None, "scale": 1.0}
    with pytest.raises(RuntimeError, match="a seat of the cache"):
        cpu_attention(q, cache, cache, torch.tensor([seat]), position, **arguments)


@needs_compiler
def test_choice_names_what_runs():
    device = torch.device("cpu")
    for dtype, expected in (
        (torch.float32, ("cpu", cpu_attention, [])),
        (torch.bfloat16, ("cpu", cpu_attention, [])),
        (torch.float16, ("torch", torch_attention, [])),
    ):
        assert choose_attention(device, dtype) == expected
    cuda = choose_attention(torch.device("cuda"), torch.bfloat16)
    assert cuda == ("torch", torch_attention, [])


# The pieces around attention.


def test_rotation_turns_pairs_half_a_head_apart_by_their_angle():
    x = normal(1, 1, 1, 8)
    angles = torch.arange(4) * 0.3
    cos, sin = (torch.cat((f, f))[None, None] for f in (angles.cos(), angles.sin()))
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(4), angles)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(reference.apply_rope(x, cos, sin), expected)


def test_rotation_and_norm_are_computed_in_float32_and_rounded_once():
    x = normal(2, 3, 4, 16, dtype=torch.bfloat16)
    cos, sin = normal(2, 3, 16), normal(2, 3, 16, seed=1)
    exact = reference.apply_rope(x.double(), cos, sin).bfloat16()
    assert torch.equal(reference.apply_rope(x, cos, sin), exact)
    ones = torch.ones(16, dtype=torch.bfloat16)
    wide = x.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    off_by = (reference.rms_norm(x, ones, 1e-6).double() - normed).abs() / normed.abs()
    assert off_by.max() <= 2**-8 * 1.01


def test_swiglu_is_silu_of_the_first_half_times_the_second():
    x = normal(3, 10)
    gate, up = x[:, :5], x[:, 5:]
    torch.testing.assert_close(reference.swiglu(x), gate * torch.sigmoid(gate) * up)
