"""Matrix products against float64, and the choice among them."""

import dataclasses
from collections.abc import Iterator

import number_formats
import pytest
import torch
import torch.nn.functional as F
from number_formats import NAMES, random_weight
from torch import Tensor, library

from hotloop.kernels import cpu, reference
from hotloop.kernels.linear import DENSE, KERNELS, LinearKernel, LinearSpec, choose_linear
from hotloop.quant import QTensor, parse_scheme
from hotloop.quant.encodings.compressed_tensors import fp4_table
from hotloop.quant.encodings.gguf import IQ4

NESTED = [f"int8-g{g}" for g in (32, 64, 128)]
SCHEMES = ["none", "int8", "fp8", *NESTED]
SCHEMES += [f"int4-g{g}{s}" for g in (32, 64, 128) for s in ("", "-asym")]
IN_FLOATS = ("fp8", "nvfp4", "mxfp4", "nf4", "IQ4")  # ours multiply them in float32, mostly
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(7, 128), (65, 576), (33, 1536), (5, 13824), (1, 2176)]  # odd N, tails of every kind

needs_compiler = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exactly(weight: Tensor | QTensor) -> Tensor:
    """The weight that it represents, in float64."""
    if not isinstance(weight, QTensor):
        return weight.double()
    n, k = weight.shape
    exact = weight.values.double().view(n, -1, weight.group_size)
    exact = exact * weight.scale.double()[..., None]
    if weight.offset is not None:
        exact = exact + weight.offset.double()[..., None]
    return exact.view(n, k)


def assert_within_rounding(y: Tensor, x: Tensor, weight: Tensor, *, x_step: float = 0.0) -> None:
    """Holds ``y`` against x @ weight.T in float64.

    Allowed are one rounding to ``y``'s type, float32 sums in any order, and activations rounded to
    half a step of ``x_step`` of their row's largest.
    """
    x = x.double()
    exact = x @ weight.T
    half_ulp = torch.finfo(y.dtype).eps / 2
    allowed = half_ulp * 1.001 * exact.abs() + 2**-20 * (x.abs() @ weight.abs().T)
    allowed += x_step / 2 * x.abs().amax(1, keepdim=True) * weight.abs().sum(1)
    worst = ((y.double() - exact).abs() / allowed.clamp(min=1e-300)).max()
    assert worst <= 1, f"{worst:.2f} times the error that rounding explains"


def form_of(name: str, n: int, k: int, dtype: torch.dtype) -> LinearSpec:
    return LinearSpec(format=parse_scheme(name).format(k), n=n, k=k, dtype=dtype, device="cpu")


def kernels_for(form: LinearSpec) -> list:
    return [kernel(form) for kernel in KERNELS if kernel.unsupported(form) is None]


# Our own kernels.


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def quantized(name: str, n: int, k: int) -> Tensor | QTensor:
    """Makes a random weight of [n, k], with k rounded up to whole groups."""
    size = parse_scheme(name).alignment
    return parse_scheme(name).quantize(normal(n, -(-k // size) * size, dtype=torch.bfloat16))


def run_operator(x: Tensor, weight: Tensor | QTensor) -> Tensor:
    kernel, packed = packed_for_cpu(weight)
    return kernel(x, *packed)


def packed_for_cpu(weight: Tensor | QTensor) -> tuple[LinearKernel, list[Tensor]]:
    n, k = weight.shape
    form = weight.format if isinstance(weight, QTensor) else DENSE
    kernel, _ = choose_linear(LinearSpec(format=form, n=n, k=k, dtype=torch.bfloat16, device="cpu"))
    assert kernel.name.endswith("/cpu"), kernel.name
    return kernel, kernel.pack(weight)


def step_of(name: str) -> float:
    return 0.0 if name in ("none", "fp8") else 1.001 / 32767


@needs_compiler
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_decode_kernels_equal_their_specification_up_to_rounding(name, n, k):
    weight = quantized(name, n, k)
    n, k = weight.shape
    for rows in (*range(1, 11), 16, 19):  # more than nine are taken in parts
        x = normal(rows, k, seed=rows, dtype=torch.bfloat16)
        y = run_operator(x, weight)
        assert (y.dtype, y.shape) == (torch.bfloat16, (rows, n))
        assert_within_rounding(y, x, exactly(weight), x_step=step_of(name))


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n", "k"), [(7, 256), (80, 768), (48, 13824)])
def test_decode_kernels_hold_every_number_format(name, n, k):
    assert_held(random_weight(name, n, k), x_step=0.0 if name.startswith(IN_FLOATS) else None)


@needs_compiler
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256, 768])
def test_groups_of_every_size_are_held_by_the_kernels_of_cpus_and_of_the_fused_step(group):
    weight = number_formats.weight(
        "int4", 33, 768, group=group, scale=torch.float16, zero="integer"
    )
    assert_held(weight)
    fused, _ = choose_linear(
        LinearSpec(
            format=weight.format, n=33, k=768, dtype=torch.bfloat16, device="cuda", fused=True
        )
    )
    assert torch.equal(fused.dequantize(fused.pack(weight), 33), weight.dequantize())


SUPER_BLOCKS = [name for name in NAMES if random_weight(name, 2, 768).format.super_size == 256]


@needs_compiler
@pytest.mark.parametrize("name", SUPER_BLOCKS)
def test_super_blocks_that_ranks_cut_apart_cost_no_kernel(name):
    weight = random_weight(name, 33, 768)
    for size in (128, 32):
        assert_held(
            weight.with_super_blocks(size), x_step=0.0 if name.startswith(IN_FLOATS) else None
        )
    # A unit of the fused step has a factor of its own: the same bytes.
    fused = LinearSpec(
        format=weight.format, n=33, k=768, dtype=torch.bfloat16, device="cuda", fused=True
    )
    halves = weight.with_super_blocks(128)
    whole, cut = (
        choose_linear(dataclasses.replace(fused, format=each.format))[0].pack(each)
        for each in (weight, halves)
    )
    assert all(map(torch.equal, whole, cut))


def assert_held(weight: QTensor, *, x_step: float | None = None) -> None:
    """Holds the kernel of a weight against float64, and rows among others against rows alone."""
    kernel, packed = packed_for_cpu(weight)
    x = normal(19, weight.shape[1], seed=1, dtype=torch.bfloat16)
    alone = torch.cat([kernel(row[None], *packed) for row in x])
    # A zero point far from the values makes sums larger than weights.
    step = 1.2 / 32767 if x_step is None else x_step
    assert_within_rounding(alone, x, number_formats.exactly(weight), x_step=step)
    for rows in (2, 3, 4, 5, 9, 10, 19):
        assert torch.equal(kernel(x[:rows], *packed), alone[:rows])


@needs_compiler
@pytest.mark.parametrize(
    ("name", "table"), [("IQ4_NL", IQ4), ("IQ4_XS", IQ4), ("mxfp4", None), ("nvfp4", None)]
)
def test_tables_of_integers_are_multiplied_as_integers(name, table):
    numbers = fp4_table(torch.device("cpu")) if table is None else torch.tensor(table)
    weight = dataclasses.replace(random_weight(name, 33, 768), table=numbers.float())
    assert_held(weight)
    rough = dataclasses.replace(weight, table=numbers.float() * 0.3)
    assert_held(rough, x_step=0.0)


@needs_compiler
def test_every_fp8_number_is_multiplied_exactly():
    finite = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = finite.where(finite.float().isfinite(), torch.zeros_like(finite))
    one = torch.ones(256, 1)
    weight = QTensor(values=finite[:, None].expand(256, 8).contiguous(), scale=one, kind="fp8")
    x = torch.eye(8, dtype=torch.bfloat16)
    assert torch.equal(run_operator(x, weight), finite.float().bfloat16().expand(8, 256))


@needs_compiler
@pytest.mark.parametrize("name", ["int8-g128-zero", "int4-row-zero"])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_with_zero_points_do_not_overflow_at_the_largest_values(name, sign):
    k = 13824
    form = random_weight(name, 16, k)
    values, zero = (127, -128) if form.kind == "int8" else (7, -8)
    extreme = QTensor(
        values=torch.full_like(form.values, values if sign > 0 else zero),
        scale=torch.full_like(form.scale, 0.125),
        offset=torch.full_like(form.scale, zero if sign > 0 else values, dtype=torch.int8),
        kind=form.kind,
    )
    x = torch.ones(1, k, dtype=torch.bfloat16)
    expected = torch.full((1, 16), sign * (values - zero) * k / 8, dtype=torch.float64)
    y = run_operator(x, extreme)
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=0)


@needs_compiler
@pytest.mark.parametrize("k", [1, 2, 31, 33, 4131])
@pytest.mark.parametrize("n", [1, 17])
def test_bfloat16_kernel_serves_every_shape(k, n):
    weight, x = normal(n, k, dtype=torch.bfloat16), normal(3, k, seed=1, dtype=torch.bfloat16)
    assert_within_rounding(run_operator(x, weight), x, weight.double())


@needs_compiler
@pytest.mark.parametrize("k", [1, 31, 33, 577, 2047, 2049, 4109])
@pytest.mark.parametrize("n", [1, 17])
def test_int8_kernel_serves_every_shape(k, n):
    weight = parse_scheme("int8").quantize(normal(n, k))
    x = normal(3, k, seed=1, dtype=torch.bfloat16)
    y = run_operator(x, weight)
    assert_within_rounding(y, x, exactly(weight), x_step=step_of("int8"))


@needs_compiler
@pytest.mark.parametrize("sign", [1, -1])
def test_integer_sums_do_not_overflow_at_the_largest_values(sign):
    k = 13824
    x = torch.full((1, k), 1.0, dtype=torch.bfloat16)
    values = torch.full((2, k), sign * 127, dtype=torch.int8)
    y = torch.ops.hotloop_cpu.linear_rows(x, values, torch.full((2,), 2.0**-7))
    expected = torch.full((1, 2), sign * 127 * k / 128, dtype=torch.float64)
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=0)
    lowest = torch.full((16, k), -8 if sign < 0 else 7, dtype=torch.int8)
    scale = torch.full((16, k // 128), 0.125, dtype=torch.bfloat16)
    y = run_operator(x, QTensor(values=lowest, scale=scale, offset=None, kind="int4"))
    expected = torch.full((1, 16), float(lowest[0, 0]) * k / 8, dtype=torch.float64)
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=0)


@needs_compiler
@pytest.mark.parametrize("name", ["none", "int8", "int4-g32", "int4-g64-asym", "int4-g128"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 37, 575])
def test_poisoned_activations_poison_their_row_and_no_other(name, poison, place):
    weight = quantized(name, 9, 576)
    x = normal(4, weight.shape[1], dtype=torch.bfloat16)
    clean = run_operator(x, weight)
    x[2, place] = poison
    y = run_operator(x, weight)
    assert y[2].isnan().all() if poison != poison else not y[2].isfinite().any()
    others = [0, 1, 3]
    assert torch.equal(y[others], clean[others])


@needs_compiler
@pytest.mark.parametrize("name", ["none", "int8", "int4-g64", "int4-g64-asym"])
def test_zero_activations_give_zero(name):
    weight = quantized(name, 9, 576)
    assert not run_operator(torch.zeros(2, 576, dtype=torch.bfloat16), weight).any()


@needs_compiler
@pytest.mark.parametrize("name", ["none", "int8", "int4-g64", "int4-g64-asym"])
@pytest.mark.parametrize("exponent", [-60, 60])
def test_activations_of_any_size_lose_no_precision(name, exponent):
    weight = quantized(name, 9, 576)
    x = normal(2, 576, seed=1, dtype=torch.bfloat16)
    y, scaled = (run_operator(x * 2.0**e, weight) for e in (0, exponent))
    torch.testing.assert_close(scaled, y * 2.0**exponent, rtol=2**-7, atol=0)


@needs_compiler
@pytest.mark.parametrize("name", ["none", "int8", "int4-g32", "int4-g64-asym", "int4-g128"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_no_bit(name, rows):
    weight = quantized(name, 301, 1536)
    x = normal(rows, 1536, seed=1, dtype=torch.bfloat16)
    results = []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        results.append(run_operator(x, weight))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_compiler
@pytest.mark.parametrize(
    "name", ["none", "int8", "int8-g64", "int4-g32", "int4-g64-asym", "int4-g128"]
)
@pytest.mark.parametrize("k", [576, 4224])
def test_a_row_gives_the_same_bits_alone_and_among_any_number_of_others(name, k):
    weight = quantized(name, 65, k)
    x = normal(20, weight.shape[1], seed=1, dtype=torch.bfloat16)
    alone = torch.cat([run_operator(row[None], weight) for row in x])
    for rows in range(2, 21):
        assert torch.equal(run_operator(x[:rows], weight), alone[:rows])


@needs_compiler
def test_torch_compile_is_told_the_shapes_that_operators_return():
    x, checks = normal(3, 64, dtype=torch.bfloat16), ("test_schema", "test_faketensor")
    ops, int8 = torch.ops.hotloop_cpu, parse_scheme("int8").quantize(normal(7, 64))
    int4 = packed_for_cpu(parse_scheme("int4-g32-asym").quantize(normal(33, 64)))[1]
    nested, packed = packed_for_cpu(parse_scheme("int8-g32").quantize(normal(33, 64)))
    _, high = nested.high_plane(packed)
    q, cache = normal(2, 2, 4, 16), normal(2, 2, 8, 16)
    where = torch.tensor([1, 0]), torch.tensor([[2, 3], [6, 7]])
    for op, arguments in (
        (ops.linear_rows, (x, normal(7, 64, dtype=torch.bfloat16), None)),
        (ops.linear_rows, (x, int8.values, int8.scale.view(-1))),
        (ops.linear_groups, (x, *int4, 33)),
        (ops.linear_groups, (x, *high, 33)),
        (ops.embed_groups, (torch.tensor([[3, 32]]), *int4, 64)),
        (ops.decode_attention, (q, cache, cache, *where, 0, 0.25)),
    ):
        library.opcheck(op.default, arguments, test_utils=checks)


# Every kernel, ours or not.


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_high_plane_of_a_nested_weight_is_an_int4_weight_that_takes_no_memory(name, dtype):
    n, k = 83, 1152
    weight, x = parse_scheme(name).quantize(normal(n, k)), normal(5, k, seed=1, dtype=dtype)
    for kernel in kernels_for(form_of(name, n, k, dtype)):
        packed = kernel.pack(weight)
        high, shared = kernel.high_plane(packed)
        direct = type(kernel)(form_of(name.replace("int8", "int4"), n, k, dtype))
        assert high.name == direct.name
        assert torch.equal(high(x, *shared), direct(x, *direct.pack(weight.high)))
        assert sum(t.nbytes for t in shared) == direct.nbytes < 0.6 * kernel.nbytes
        held = {t.untyped_storage().data_ptr() for t in packed}
        assert held.issuperset(t.untyped_storage().data_ptr() for t in shared)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_gives_the_product_for_few_rows_and_many(name, dtype):
    n, k = 80, 1152  # 9 groups of 128
    weight = parse_scheme(name).quantize(normal(n, k, dtype=dtype))
    form = form_of(name, n, k, dtype)
    kernels = kernels_for(form)
    assert kernels
    for kernel in kernels:
        packed = kernel.pack(weight)
        for rows in (1, 2, 9, 64, 131):
            x = normal(rows, k, seed=rows, dtype=dtype)
            y = kernel(x, *packed)
            assert (y.dtype, y.shape) == (dtype, (rows, n)), kernel.name
            # Plain torch rounds the dequantized weight, or the product before it is scaled.
            rtol = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}[dtype]
            expected = x.double() @ exactly(weight).T
            torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=rtol * k**0.5)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_of_a_weight_are_known_before_it_is_packed(name, dtype):
    for n, k in ((7, 128), (64, 1152)):
        form = form_of(name, n, k, dtype)
        for kernel in kernels_for(form):
            packed = kernel.pack(parse_scheme(name).quantize(normal(n, k, dtype=dtype)))
            assert sum(t.nbytes for t in packed) == kernel.nbytes, kernel.name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_some_kernel_holds_every_number_format_exactly(name, dtype):
    n, k = 48, 512
    weight = random_weight(name, n, k)
    spec = LinearSpec(format=weight.format, n=n, k=k, dtype=dtype, device="cpu")
    kernel, _ = choose_linear(spec)
    packed = kernel.pack(weight)
    assert sum(t.nbytes for t in packed) == kernel.nbytes
    x = normal(3, k, seed=1, dtype=dtype)
    expected = x.double() @ number_formats.exactly(weight).T
    rtol = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}[dtype]
    torch.testing.assert_close(kernel(x, *packed).double(), expected, rtol=rtol, atol=rtol * 30)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_eight_bit_products_in_float16_do_not_overflow(name):
    weight = parse_scheme(name).quantize(0.02 * normal(64, 4096))
    x = 20 * normal(2, 4096, seed=1, dtype=torch.float16)
    expected = (x.double() @ exactly(weight).T).half()
    assert expected.abs().max() > 40, "small results would prove nothing"
    y = reference.linear_channelwise(x, weight.values, weight.scale.view(-1))
    torch.testing.assert_close(y, expected, rtol=2e-3, atol=0.1)


# Packing.


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_packing_int4_and_unpacking_it_is_exact(group_size):
    values = torch.randint(-8, 8, (5, 384), dtype=torch.int8)
    values[0], values[1] = -8, 7
    packed = reference.pack_int4(values, group_size)
    assert (packed.dtype, packed.shape) == (torch.int16, (5, 96))
    assert torch.equal(reference.unpack_int4(packed, group_size), values)
    assert torch.equal(reference.pack_int4(values[:, 128:256], group_size), packed[:, 32:64])


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_packed_word_holds_four_runs_of_its_group_from_the_lowest_nibble_up(group_size):
    values = torch.randint(-8, 8, (1, group_size), dtype=torch.int8)
    quarter = group_size // 4
    for j, word in enumerate(reference.pack_int4(values, group_size)[0].tolist()):
        nibbles = [(word >> 4 * i & 15) - 8 for i in range(4)]
        assert nibbles == values[0, j::quarter].tolist()


# The choice.


@needs_compiler
@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("none", torch.bfloat16, "dense/cpu"),
        ("none", torch.float32, "dense/torch"),
        ("none", torch.float16, "dense/torch"),
        ("int8", torch.bfloat16, "int8/cpu"),
        ("int8", torch.float32, "int8/torch"),
        ("fp8", torch.float32, "fp8/torch"),
        ("int4-g64", torch.bfloat16, "int4/cpu"),
        ("int4-g64-asym", torch.bfloat16, "int4/cpu"),
        ("int4-g64", torch.float32, "int4/dequantized"),
    ],
)
def test_fastest_kernel_is_taken_without_a_word(name, dtype, expected):
    kernel, notes = choose_linear(form_of(name, 64, 128, dtype))
    assert (kernel.name, notes) == (expected, [])


@needs_compiler
@pytest.mark.parametrize("name", ["fp8", "fp8-blocks", "nvfp4", "nf4", "Q4_K", "awq-act-order"])
def test_no_number_format_is_slow_on_a_cpu(name):
    form = random_weight(name, 41, 256).format
    kernel, notes = choose_linear(
        LinearSpec(format=form, n=41, k=256, dtype=torch.bfloat16, device="cpu")
    )
    assert (kernel.name, notes) == (f"{form.kind}/cpu", [])


def test_gpu_takes_no_cpu_kernel_and_says_why_not_tinygemm():
    for dtype, n, says in (
        (torch.float16, 64, "int4/tinygemm not used: tinygemm needs bfloat16 activations"),
        (torch.bfloat16, 60, "int4/tinygemm not used: tinygemm needs N a multiple of 8"),
    ):
        form = LinearSpec(
            format=parse_scheme("int4-g64").format(128), n=n, k=128, dtype=dtype, device="cuda"
        )
        kernel, notes = choose_linear(form)
        assert kernel.name == "int4/dequantized"
        assert notes[0].startswith(says)
        assert not any("cpu" in note for note in notes)
        assert notes[1].startswith("int4/dequantized is used instead, and is slow")


@needs_compiler
def test_what_our_kernel_does_not_hold_is_dequantized_with_the_reason():
    weight = number_formats.weight("int4", 48, 60, group=12, scale=torch.float16)
    spec = LinearSpec(format=weight.format, n=48, k=60, dtype=torch.bfloat16, device="cpu")
    kernel, (not_used, instead) = choose_linear(spec)
    assert not_used == "int4/cpu not used: supports only groups of a multiple of 8, not 12"
    assert instead.startswith("int4/dequantized is used instead, and is slow")
    x = normal(3, 60, dtype=torch.bfloat16)
    expected = F.linear(x, weight.dequantize(torch.bfloat16))
    assert torch.equal(kernel(x, *kernel.pack(weight)), expected)


def test_the_fused_step_refuses_what_it_cannot_hold_exactly():
    weight = number_formats.weight("int4", 16, 240, group=24)
    spec = LinearSpec(
        format=weight.format, n=16, k=240, dtype=torch.bfloat16, device="cuda", fused=True
    )
    with pytest.raises(AssertionError, match="supports only groups of a multiple of 16, not 24"):
        choose_linear(spec)
