"""Quantization schemes: the error they promise, and what they keep exactly."""

import math

import pytest
import torch
from torch import Tensor

from hotloop.errors import ConfigError, UnknownNameError
from hotloop.kernels import reference
from hotloop.quant import QTensor, Scheme, parse_head_scheme, parse_scheme
from hotloop.quant.int8 import Int8

# Signal to quantization noise on normally distributed weights, dB: just below what was measured
# (in brackets). docs/numerics.md quotes this table.
SQNR_FLOOR_DB = {
    "int8": 41.9,  # 42.0, rows of 1024
    "int8-g32": 45.2,  # 45.4
    "int8-g64": 44.4,  # 44.5
    "int8-g128": 43.6,  # 43.7
    "fp8": 31.5,  # 31.6
    "int4-g32": 21.2,  # 21.3
    "int4-g64": 20.3,  # 20.4
    "int4-g128": 19.6,  # 19.7
    "int4-g32-asym": 22.0,  # 22.1
    "int4-g64-asym": 20.8,  # 20.9
    "int4-g128-asym": 19.9,  # 20.0
    "int4-g32-zp": 21.7,  # 21.8
    "int4-g64-zp": 20.7,  # 20.8
    "int4-g128-zp": 19.8,  # 19.9
}
INTEGERS = [name for name in SQNR_FLOOR_DB if name.startswith("int")]
INT4 = [name for name in SQNR_FLOOR_DB if name.startswith("int4")]


def quantized(name: str, weight: Tensor) -> QTensor:
    weight = parse_scheme(name).quantize(weight)
    assert isinstance(weight, QTensor)
    return weight


def normal(*shape: int, seed: int = 0) -> Tensor:
    return 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid(*, scale: Tensor, offset: Tensor | float) -> Tensor:
    """Weights [8, G * 32] on 4-bit grids in groups of 32, with both ends of each grid in use."""
    values = torch.randint(
        -8, 8, (8, scale.shape[1], 32), generator=torch.Generator().manual_seed(1)
    )
    values[..., 3], values[..., 17] = -8, 7
    weight = values * scale[..., None] + torch.as_tensor(offset).expand_as(scale)[..., None]
    return weight.reshape(8, -1)


@pytest.mark.parametrize(("name", "floor_db"), SQNR_FLOOR_DB.items())
def test_error_on_normal_weights_stays_below_the_declared_floor(name, floor_db):
    weight = normal(256, 1024)
    noise = quantized(name, weight).dequantize() - weight
    measured_db = 10 * math.log10(float(weight.square().sum() / noise.square().sum()))
    assert floor_db <= measured_db < floor_db + 0.3, "set the floor just below what is measured"


@pytest.mark.parametrize("name", ["none", *SQNR_FLOOR_DB])
def test_slices_of_rows_are_quantized_as_in_the_whole_once_their_maxima_are_combined(name):
    scheme, weight = parse_scheme(name), normal(16, 512)
    weight[3, 400] = 1.0  # the largest of its row by far, in one slice only
    largest = weight.abs().amax(dim=1, keepdim=True)
    whole = scheme.quantize(weight)
    for start, stop in ((0, 128), (128, 512)):
        assert start % scheme.alignment == 0
        part = scheme.quantize(weight[:, start:stop], reduce_max=lambda _: largest)
        if isinstance(whole, Tensor):
            assert torch.equal(part, whole[:, start:stop])
        else:
            for ours, expected in zip(
                part.tensors, whole.columns(start, stop).tensors, strict=True
            ):
                assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", INTEGERS)
def test_no_weight_is_further_off_than_half_a_step_and_its_rounded_scale(name):
    weight = normal(64, 256)
    q = quantized(name, weight)
    error = (q.dequantize() - weight).abs().view(64, -1, q.group_size)
    # The value of the other sign stops at 7 where 8 would be nearest: one whole step at most.
    steps = 1.03 if name in ("int4-g32", "int4-g64", "int4-g128") else 0.54
    # A rounded scale moves the end of 128 steps by a quarter of a step, beyond which none is.
    steps = 0.76 if q.kind == "nested" else steps
    assert (error <= steps * q.scale.float().abs()[..., None]).all()


def test_no_fp8_weight_is_further_off_than_half_a_step_at_its_own_size():
    weight = normal(64, 256)
    q = quantized("fp8", weight)
    # Three bits of mantissa; below 2**-6 they are steps of 2**-9.
    half_step = torch.maximum(weight.abs() * 2.0**-4, q.scale * 2.0**-10)
    assert ((q.dequantize() - weight).abs() <= 1.001 * half_step).all()


@pytest.mark.parametrize("name", SQNR_FLOOR_DB)
def test_values_use_their_range_and_stay_within_it(name):
    q = quantized(name, normal(64, 256))
    low, high = {
        "int8": (-127, 127),
        "nested": (-128, 119),
        "fp8": (-448, 448),
        "int4": (-8, 7),
    }[q.kind]
    assert (q.values.float().min(), q.values.float().max()) == (low, high)


def spread(k: int) -> Tensor:
    """Mean squares of activations, of which a few are far larger than the rest."""
    return torch.randn(k, generator=torch.Generator().manual_seed(2)).pow(4)


def errors(weight: Tensor, q: QTensor, importance: Tensor) -> Tensor:
    """The weighted squared errors of each group."""
    squares = (q.dequantize() - weight).square() * importance
    return squares.unflatten(1, (-1, q.group_size)).sum(dim=2)


@pytest.mark.parametrize("name", INT4)
def test_calibrated_scales_lower_the_weighted_error_of_every_group_or_leave_it(name):
    scheme, weight, importance = parse_scheme(f"{name}-cal"), normal(64, 512), spread(512)
    fitted = scheme.quantize(weight, importance=importance)
    before = errors(weight, quantized(name, weight), importance)
    after = errors(weight, fitted, importance)
    assert fitted.format == parse_scheme(name).format(512)
    assert (after <= 1.00001 * before).all()
    assert after.sum() < 0.85 * before.sum()
    assert (fitted.values.min(), fitted.values.max()) == (-8, 7)


@pytest.mark.parametrize("name", INT4)
def test_calibrated_scales_of_a_slice_are_those_of_the_whole(name):
    scheme, weight, importance = parse_scheme(f"{name}-cal"), normal(16, 512), spread(512)
    whole = scheme.quantize(weight, importance=importance)
    rows = scheme.quantize(weight[3:9], importance=importance)
    columns = scheme.quantize(weight[:, 128:256].contiguous(), importance=importance[128:256])
    for ours, expected in ((rows, whole.rows(3, 9)), (columns, whole.columns(128, 256))):
        for a, b in zip(ours.tensors, expected.tensors, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", INT4)
def test_features_that_are_never_active_and_groups_of_zeros_keep_the_plain_scale(name):
    scheme, weight, importance = parse_scheme(f"{name}-cal"), normal(8, 256), spread(256)
    importance[:128], weight[:, 128:] = 0, 0
    fitted, plain = scheme.quantize(weight, importance=importance), quantized(name, weight)
    for a, b in zip(fitted.tensors, plain.tensors, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", INT4)
def test_without_activations_a_calibrated_scheme_is_the_plain_one(name):
    weight = normal(8, 256)
    for a, b in zip(
        quantized(f"{name}-cal", weight).tensors, quantized(name, weight).tensors, strict=True
    ):
        assert torch.equal(a, b)


def test_names_of_calibrated_schemes_are_read_back_whatever_the_order_of_options():
    for name in INT4:
        assert parse_scheme(f"{name}-cal").name == f"{name}-cal"
    assert parse_scheme("int4-cal-zp-g32").name == "int4-g32-zp-cal"
    with pytest.raises(ConfigError, match="'int8' has no option 'cal'"):
        parse_scheme("int8-cal")


@pytest.mark.parametrize("offset", [0.0, 0.001, -0.25, 3.0])
def test_asymmetric_int4_keeps_groups_that_already_lie_on_its_grid(offset):
    # Steps and offsets that bfloat16 holds, and offsets small enough for exact sums.
    scale = torch.rand(8, 3, generator=torch.Generator().manual_seed(0)).add(0.5).bfloat16().float()
    offset = torch.full_like(scale, offset).bfloat16().float()
    weight = grid(scale=scale, offset=offset)
    q = quantized("int4-g32-asym", weight)
    torch.testing.assert_close(q.scale.float(), scale, rtol=0, atol=0)
    torch.testing.assert_close(q.offset.float(), offset, rtol=0, atol=0)
    torch.testing.assert_close(q.dequantize(), weight, rtol=0, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_symmetric_int4_keeps_groups_that_already_lie_on_its_grid(sign):
    scale = sign * torch.tensor([[0.5, 0.0078125, 3.0]]).expand(8, 3)
    weight = grid(scale=scale, offset=0.0)
    torch.testing.assert_close(quantized("int4-g32", weight).dequantize(), weight, rtol=0, atol=0)


def test_quantizing_again_what_was_quantized_changes_nothing():
    # A zero point is rounded, so a group may leave one of its 16 steps unused, and then be finer.
    for name in (name for name in SQNR_FLOOR_DB if not name.endswith("-zp")):
        once = quantized(name, normal(16, 128)).dequantize()
        twice = quantized(name, once).dequantize()
        torch.testing.assert_close(twice, once, rtol=2**-8, atol=0, msg=name)


@pytest.mark.parametrize("name", SQNR_FLOOR_DB)
def test_groups_of_zeros_stay_zero(name):
    weight = normal(4, 256)
    weight[1], weight[2, 128:] = 0, 0
    dequantized = quantized(name, weight).dequantize()
    assert not dequantized[1].any()
    assert not dequantized[2, 128:].any()
    assert dequantized[0].any()


@pytest.mark.parametrize("name", SQNR_FLOOR_DB)
@pytest.mark.parametrize("value", [0.017, -3.3, 1e-8])
def test_constant_rows_stay_constant_up_to_rounding(name, value):
    dequantized = quantized(name, torch.full((2, 128), value)).dequantize()
    torch.testing.assert_close(dequantized, torch.full((2, 128), value), rtol=2**-8, atol=0)


@pytest.mark.parametrize("name", SQNR_FLOOR_DB)
@pytest.mark.parametrize("exponent", [-100, -40, 40, 100])
def test_powers_of_two_scale_out_exactly(name, exponent):
    weight, factor = normal(4, 128), 2.0**exponent
    once, scaled = quantized(name, weight), quantized(name, weight * factor)
    assert torch.equal(scaled.values, once.values)
    torch.testing.assert_close(scaled.dequantize(), once.dequantize() * factor, rtol=0, atol=0)


@pytest.mark.parametrize("name", SQNR_FLOOR_DB)
@pytest.mark.parametrize("largest", [1e-45, 1e-42, 1e-40, 1e37])
def test_extreme_magnitudes_stay_finite_and_no_further_off_than_themselves(name, largest):
    weight = normal(4, 128)
    weight *= largest / weight.abs().max()
    dequantized = quantized(name, weight).dequantize()
    assert (dequantized - weight).abs().max() <= weight.abs().max()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_high_nibbles_of_int8_in_groups_are_as_good_an_int4_as_one_quantized_directly(group):
    weight = normal(256, 1024)
    nested, direct = quantized(f"int8-g{group}", weight), quantized(f"int4-g{group}", weight)
    high = nested.high
    assert high.format == direct.format
    assert torch.equal(high.scale.float(), 16 * nested.scale.float())
    assert high.values.min() == -8
    assert high.values.max() == 7
    low = nested.values.int() - 16 * high.values.int()
    assert low.min() == -8
    assert low.max() == 7

    def noise(q: QTensor) -> float:
        return float((q.dequantize() - weight).square().sum())

    assert noise(high) < 1.03 * noise(direct)  # 0.13 dB
    assert noise(nested) < noise(quantized("int8", weight))


def test_every_integer_of_a_nested_weight_is_the_sum_of_its_planes():
    values = torch.arange(-128, 120, dtype=torch.int8)[None]
    high, low = reference.split_planes(values)
    assert torch.equal(16 * high.int() + low.int(), values.int())
    assert torch.equal(reference.join_planes(high, low), values)
    for plane in (high, low):
        assert plane.dtype == torch.int8
        assert plane.min() == -8
        assert plane.max() == 7


def test_groups_of_int8_are_nested_as_they_are_where_their_integers_allow():
    scheme = Int8(32)
    made = scheme.quantize(normal(16, 128))
    plain = QTensor(values=made.values.clone(), scale=made.scale, kind="int8")
    for ours, theirs in zip(scheme.nest(plain).tensors, made.tensors, strict=True):
        assert torch.equal(ours, theirs)
    plain.values[3, 40] = 127  # and its scale positive or not, too large for a high nibble
    nested = scheme.nest(plain)
    assert nested.kind == "nested"
    assert nested.values.max() <= 119
    others = torch.ones(16, 4, dtype=torch.bool)
    others[3, 1] = False
    assert torch.equal(nested.scale[others], made.scale[others])
    assert not torch.equal(nested.scale[3, 1], made.scale[3, 1])
    step = plain.scale.float().abs().max()
    assert (nested.dequantize() - plain.dequantize()).abs().max() < step


def test_outlier_does_not_reach_beyond_its_group():
    weight = normal(1, 128)
    plain = quantized("int4-g32", weight)
    weight[0, 40] = 100.0
    spoiled = quantized("int4-g32", weight)
    assert torch.equal(plain.values[:, :32], spoiled.values[:, :32])
    assert torch.equal(plain.values[:, 64:], spoiled.values[:, 64:])
    assert not torch.equal(plain.values[:, 32:64], spoiled.values[:, 32:64])


@pytest.mark.parametrize("name", SQNR_FLOOR_DB)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_quantized_as_their_float32_values(name, dtype):
    weight = normal(8, 256).to(dtype)
    half, single = quantized(name, weight), quantized(name, weight.float())
    for a, b in zip(half.tensors, single.tensors, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "k", "fix"),
    [
        ("int4", 576, "Use int4-g32 or int4-g64 instead."),
        ("int4-g64", 96, "Use int4-g32 instead."),
        ("int4-asym", 64, "Use int4-g32-asym or int4-g64-asym instead."),
        ("int4-g32", 100, "Use int8 instead."),
        ("int8-g128", 576, "Use int8-g32 or int8-g64 instead."),
        ("int8-g32", 100, "Use int8 instead."),
    ],
)
def test_groups_that_do_not_divide_are_refused_with_those_that_do(name, k, fix):
    for act in (
        lambda s: s.check("layers.3.q_proj", 8, k),
        lambda s: s.quantize(torch.zeros(8, k)),
        lambda s: s.random(8, k, std=1, dtype=torch.float32, generator=torch.Generator()),
    ):
        with pytest.raises(ConfigError) as caught:
            act(parse_scheme(name))
        assert f"{k} input features" in str(caught.value)
        assert str(caught.value).endswith(fix)
    with pytest.raises(ConfigError, match=r"^layers\.3\.q_proj has"):
        parse_scheme(name).check("layers.3.q_proj", 8, k)


# Names.


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("none", "none"),
        ("int8", "int8"),
        ("int8-g64", "int8-g64"),
        ("fp8", "fp8"),
        ("int4", "int4-g128"),
        ("int4-g64", "int4-g64"),
        ("int4-asym-g32", "int4-g32-asym"),
        ("int4-sym-g32", "int4-g32"),
        ("int4-zp", "int4-g128-zp"),
    ],
)
def test_names_are_read_in_any_order_and_written_in_one(given, canonical):
    scheme = parse_scheme(given)
    assert scheme.name == canonical
    assert parse_scheme(canonical) == scheme


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("int4-g48", "no option 'g48'. Choose from: g32, g64, g128, sym, asym, zp, cal."),
        ("int4-", "no option ''"),
        ("int8-g48", "no option 'g48': it is symmetric, with one scale per output channel, or"),
        ("int8-g32-g64", "two values of group_size"),
        ("fp8-e5m2", "no option 'e5m2': it is e4m3, with one scale per output channel"),
        ("none-g64", "no option 'g64'"),
        ("int4-g32-g64", "two values of group_size"),
        ("int4-sym-asym", "two values of zero"),
    ],
)
def test_options_that_a_scheme_does_not_have_are_refused(name, says):
    with pytest.raises(ConfigError) as caught:
        parse_scheme(name)
    assert says in str(caught.value)


def test_unknown_scheme_is_refused_with_the_nearest():
    with pytest.raises(UnknownNameError, match=r"'int5'\. Did you mean 'int"):
        parse_scheme("int5-g64")


@pytest.mark.parametrize("name", ["awq", "gptq", "gguf", "q4_k_m"])
def test_unknown_scheme_is_answered_with_what_the_help_lists_and_how_stored_formats_are_read(name):
    with pytest.raises(
        UnknownNameError, match="quant auto, the default, keeps the quantization"
    ) as caught:
        parse_scheme(name)
    assert "int4, int4-gN, int4-gN-asym, int4-gN-cal, int4-gN-zp, int8, int8-gN, none" in str(
        caught.value
    )


def test_head_follows_only_quantized_projections():
    for name, head in (("none", "none"), ("int8", "int8"), ("fp8", "int8"), ("int4-g32", "int8")):
        assert parse_head_scheme("auto", parse_scheme(name)).name == head
    assert parse_head_scheme("int4-g64", parse_scheme("none")).name == "int4-g64"


# Random weights.


@pytest.mark.parametrize("name", ["none", *SQNR_FLOOR_DB])
def test_random_weights_have_the_form_and_the_spread_of_real_ones(name):
    scheme: Scheme = parse_scheme(name)

    def make(seed: int) -> Tensor | QTensor:
        generator = torch.Generator().manual_seed(seed)
        return scheme.random(256, 512, std=0.02, dtype=torch.bfloat16, generator=generator)

    state = torch.random.get_rng_state()
    made, real = make(0), scheme.quantize(normal(256, 512).bfloat16())
    assert torch.equal(torch.random.get_rng_state(), state), "torch's own generator is the user's"
    assert type(made) is type(real)
    dense = [
        w.dequantize() if isinstance(w, QTensor) else w.float() for w in (made, make(0), make(1))
    ]
    assert torch.equal(dense[0], dense[1])
    assert not torch.equal(dense[0], dense[2])
    assert dense[0].std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(dense[0].mean().item()) < 5e-4
    if isinstance(made, QTensor) and isinstance(real, QTensor):
        for a, b in zip(made.tensors, real.tensors, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
    else:
        assert (made.dtype, made.shape) == (torch.bfloat16, (256, 512))
