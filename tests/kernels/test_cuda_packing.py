"""Packing of weights for the CUDA kernels, and the tuning of their launches."""

import dataclasses
import itertools

import pytest
import torch
from cuda_cases import KINDS, make_weight
from number_formats import random_weight, weight

from hotloop.kernels.cuda.attention import HEAD_DIMS, AttentionPlan, AttentionTuning
from hotloop.kernels.cuda.dequantize import dequantize, dequantize_torch
from hotloop.kernels.cuda.launch import Limits
from hotloop.kernels.cuda.linear import LinearPlan, Tuning
from hotloop.kernels.cuda.packing import Format, pack, unpack
from hotloop.kernels.cuda.tuning import (
    attention_tuning,
    linear_tuning,
    plan_prefetch,
    plan_rows,
    reads_plain_rows,
)
from hotloop.kernels.cuda.wide import WidePlan, max_counters
from hotloop.kernels.linear import DENSE, Fused, LinearSpec, choose_linear

H100 = Limits(n_sms=132, shared_bytes=227 * 1024, bytes_per_s=3.35e12, boxes=True)
H200 = Limits(n_sms=132, shared_bytes=227 * 1024, bytes_per_s=4.81e12, warpgroups=True, boxes=True)
SMALLER = Limits(n_sms=76, shared_bytes=99 * 1024)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("n", "k"), [(32, 640), (50, 640), (18, 384)])
def test_packed_weights_have_the_bytes_of_their_format(name, paired, n, k):
    weight = make_weight(name, n, k, torch.Generator().manual_seed(0), paired=paired)
    form = weight.form
    assert weight.packed.dtype == torch.uint8
    tile = (form.units, form.unit_bytes)
    if form.kind == "nested":  # one plane behind the other
        tile = (form.units * form.unit_bytes,)
    assert weight.packed.shape == (form.tiles, *tile)
    assert weight.packed.nbytes == form.nbytes


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("n", "k"), [(32, 640), (50, 640), (18, 384)])
def test_packing_and_unpacking_again_is_exact(name, paired, n, k):
    weight = make_weight(name, n, k, torch.Generator().manual_seed(0), paired=paired)
    form, q = weight.form, weight.quantized
    values, scale, offset, factor, offset_factor = unpack(form, weight.packed)
    if q is None:
        assert torch.equal(values.double(), weight.exact)
        assert torch.equal(dequantize(form, weight.packed, weight.features), values)
        return
    assert torch.equal(values.view(torch.int8), q.values.view(torch.int8))
    if form.group_size is None:
        assert (scale, offset) == (None, None)
        assert torch.equal(dequantize(form, weight.packed, weight.features), values.bfloat16())
        return
    assert scale is not None
    assert (offset is None, scale.dtype) == (q.offset is None, widened(q.scale).dtype)
    assert torch.equal(scale, widened(q.scale))
    assert offset is None or torch.equal(offset, q.offset)
    if form.row_scale:
        assert torch.equal(weight.scale, q.super_scale.flatten())
        q = dataclasses.replace(q, super_scale=None)
    for found, of_blocks in ((factor, q.super_scale), (offset_factor, q.super_offset)):
        assert (found is None) == (of_blocks is None)
        if of_blocks is not None:  # and of units
            each = found.shape[1] // of_blocks.shape[1]
            assert torch.equal(found, of_blocks.repeat_interleave(each, dim=1))
    assert torch.equal(
        dequantize(form, weight.packed, weight.features), q.dequantize(torch.bfloat16)
    )


def test_plain_rows_are_the_weight_itself():
    spec = LinearSpec(
        format=DENSE, n=32, k=64, dtype=torch.bfloat16, device="cuda", fused=True, plain_rows=True
    )
    weight = torch.randn(32, 64).bfloat16()
    kernel, _ = choose_linear(spec)
    (packed,) = kernel.pack(weight)
    assert kernel.keeps_rows
    assert packed.data_ptr() == weight.data_ptr() == dequantize(kernel.form, packed).data_ptr()
    assert kernel.nbytes == packed.nbytes


@pytest.mark.parametrize("changes", [{"n": 24}, {"k": 40}, {"plain_rows": False}])
def test_bfloat16_with_padding_or_on_other_devices_is_packed(changes):
    sizes = {"n": 32, "k": 64, "plain_rows": True} | changes
    spec = LinearSpec(format=DENSE, dtype=torch.bfloat16, device="cuda", fused=True, **sizes)
    kernel, _ = choose_linear(spec)
    weight = torch.randn(spec.n, spec.k).bfloat16()
    (packed,) = kernel.pack(weight)
    assert not kernel.keeps_rows
    assert packed.nbytes == kernel.nbytes
    assert torch.equal(dequantize(kernel.form, packed), weight)


@pytest.mark.parametrize(
    ("limits", "plain"),
    [(H200, True), (H100, False), (SMALLER, False)],
    ids=["H200", "H100", "A10"],
)
def test_weights_are_plain_rows_where_memory_is_fast(limits, plain, monkeypatch):
    monkeypatch.setattr("hotloop.kernels.cuda.tuning.limits_of", lambda _: limits)
    assert reads_plain_rows(torch.device("cuda", 0)) == plain


def widened(scale):
    return scale.bfloat16() if scale.dtype == torch.float8_e4m3fn else scale


@pytest.mark.parametrize(
    "name",
    [
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "mxfp4", "nf4"),
        *("int4-row", "int4-row-zero", "int8-g128-zero", "fp8-blocks-ue8m0"),
        *("gptq-act-order", "awq-act-order", "int8-row-act-order"),
    ],
)
@pytest.mark.parametrize("paired", [False, True])
def test_the_fused_step_holds_other_formats_exactly(name, paired):
    q = random_weight(name, 48, 768)
    spec = LinearSpec(
        format=q.format,
        n=48,
        k=768,
        dtype=torch.bfloat16,
        device="cuda",
        fused=True,
        paired=paired,
    )
    kernel, notes = choose_linear(spec)
    packed = kernel.pack(q)
    assert not notes
    assert sum(t.nbytes for t in packed) == kernel.nbytes
    weight, scale_N, features_K = kernel.named(packed)
    found = dequantize_torch(kernel.form, weight, features_K)
    found = found if scale_N is None else (found.double() * scale_N[:, None]).bfloat16()
    assert torch.equal(found, q.dequantize(torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("int4-g24", "supports only groups of a multiple of 16, not 24"),
    ],
)
def test_the_fused_step_says_what_it_cannot_hold(name, reason):
    q = weight("int4", 16, 384, group=24) if name == "int4-g24" else random_weight(name, 16, 384)
    spec = LinearSpec(format=q.format, n=16, k=384, dtype=torch.bfloat16, device="cuda", fused=True)
    assert Fused.unsupported(spec) == reason


def test_a_tile_holds_each_of_its_weights_once():
    values = torch.arange(32 * 128, dtype=torch.int16).view(32, 128)
    form = Format(kind="bf16", n=32, k=128)
    packed = pack(form, values.view(torch.bfloat16), None, None).view(torch.int16)
    for tile, rows in zip(packed, values.view(2, 16, 128), strict=True):
        assert torch.equal(tile.flatten().sort().values, rows.flatten())


def test_models_in_use_need_little_padding():
    for n, k, most in ((15360, 5120, 0), (5120, 13824, 0), (49152, 576, 0.12), (32000, 4096, 0)):
        form = Format(kind="int4", group_size=64, n=n, k=k)
        plain = n * k // 2 + n * k // 64 * 2
        assert plain <= form.nbytes <= (1 + most) * plain


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "int8", "n": 16, "k": 60},
        {"kind": "int4", "n": 16, "k": 64},
        {"kind": "int4", "group_size": 128, "n": 16, "k": 192},
        {"kind": "int8", "n": 16, "k": 64, "zero": "integer"},
        {"kind": "int8", "n": 15, "k": 64, "paired": True},
    ],
)
def test_formats_without_a_kernel_are_refused(bad):
    with pytest.raises(AssertionError):
        Format(**bad)


def test_items_are_spread_evenly_over_blocks():
    form = Format(kind="int4", group_size=128, n=5120, k=5120)
    for tiles in (1, 2):
        plan = LinearPlan(form=form, rows=1, tuning=Tuning(tiles=tiles), limits=H100)
        assert plan.blocks <= 132
        assert plan.items == 320 / tiles


@pytest.mark.parametrize("limits", [H100, SMALLER], ids=["H100", "smaller"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_tuned_attention_fits_the_device(limits, head_dim):
    for tokens, group in itertools.product((1, 16), (1, 8)):
        plan = AttentionPlan(
            batch=1,
            tokens=tokens,
            n_heads=group,
            n_kv_heads=1,
            head_dim=head_dim,
            n_positions=4096,
            tuning=attention_tuning(
                head_dim=head_dim, n_kv_heads=1, n_positions=4096, batch=1, limits=limits
            ),
        )
        assert plan.shared_bytes <= limits.shared_bytes


@pytest.mark.parametrize("n_kv_heads", [1, 8, 10, 32, 40, 64, 96, 500])
def test_chunks_of_a_long_sequence_fill_the_device(n_kv_heads):
    chunks = attention_tuning(
        head_dim=128, n_kv_heads=n_kv_heads, n_positions=4096, batch=1, limits=H100
    ).chunks
    turns = -(-chunks * n_kv_heads // H100.n_sms)
    assert turns == 4 if n_kv_heads == 500 else turns <= 3
    assert chunks * n_kv_heads >= 0.85 * turns * H100.n_sms


def test_attentions_order_of_sums_does_not_depend_on_the_batch():
    tunings = [
        attention_tuning(head_dim=128, n_kv_heads=8, n_positions=4096, batch=batch, limits=H100)
        for batch in (1, 16, 64)
    ]
    assert len(set(tunings)) == len(tunings)
    assert len({(t.chunks, t.min_chunk, t.warps) for t in tunings}) == 1


@pytest.mark.parametrize("window", [None, 100, 700])
@pytest.mark.parametrize("chunks", [1, 3, 16])
@pytest.mark.parametrize("tokens", [1, 6])
def test_enough_blocks_are_launched_for_all_chunks(tokens, chunks, window):
    plan = AttentionPlan(
        batch=1,
        tokens=tokens,
        n_heads=1,
        n_kv_heads=1,
        head_dim=64,
        n_positions=3000,
        window=window,
        tuning=AttentionTuning(chunks=chunks, min_chunk=64, warps=2),
    )
    for at in range(plan.n_positions - tokens + 1):
        begin = 0 if window is None else max(at - window + 1, 0)
        last_of = {
            plan.chunk_at(end): end for end in range(at, at + tokens)
        }  # of each length of chunk
        of_each = [end // n - begin // n + 1 for n, end in last_of.items()]
        assert max(of_each) <= plan.chunks, f"at {at}"
        assert sum(of_each) <= plan.blocks, f"at {at}"


@pytest.mark.parametrize("limits", [H100, H200, SMALLER], ids=["H100", "H200", "smaller"])
@pytest.mark.parametrize("name", KINDS)
def test_tuned_matrix_products_fit_the_device(limits, name):
    widths, roles = (640, 4096, 5120, 8192, 13824, 28672), ("qkv", "gate_up", "down")
    for k, rows, role in itertools.product(widths, (1, 8), roles):
        form = Format(**KINDS[name], n=8192, k=k)
        plan = LinearPlan(
            form=form, rows=rows, tuning=linear_tuning(form, limits, role), limits=limits
        )
        assert plan.layout is not None
        assert plan.layout.shared_bytes <= limits.shared_bytes
        assert 1 <= plan.layout.early_stages < plan.layout.stages, "a copy is left for after x"


@pytest.mark.parametrize(
    ("kind", "n", "fewer"),
    [("int4", 28672, True), ("int4", 57344, False), ("int8", 28672, False)],
    ids=["int4", "a long weight", "int8"],
)
def test_fast_memory_loads_less_of_a_short_int4_weight_before_x(kind, n, fewer):
    form = Format(kind=kind, group_size=128 if kind == "int4" else None, n=n, k=5120, paired=True)
    early = [
        LinearPlan(
            form=form,
            rows=1,
            epilogue="swiglu",
            tuning=linear_tuning(form, limits, "gate_up"),
            limits=limits,
        ).layout.early_stages
        for limits in (H100, H200)
    ]
    assert (early[1] < early[0]) == fewer, f"{early} copies"
    assert fewer or early[0] == early[1]


@pytest.mark.parametrize("name", KINDS)
def test_plans_of_many_rows_fit_and_occupy_the_device(name):
    for n, k, rows in itertools.product(
        (640, 8192, 28672), (640, 4096, 28672), (9, 16, 17, 32, 33, 64, 129)
    ):
        form = Format(**KINDS[name], n=n, k=k)
        tuning = linear_tuning(form, H200, "down")
        plans = plan_rows(form, rows, norm=False, tuning=tuning, limits=H200)
        covered = [row for of, _ in plans for row in range(rows)[of]]
        assert covered == list(range(rows))
        for of, plan in plans:
            assert plan.rows == len(range(rows)[of])
            assert plan.tuning == tuning, "the order of sums belongs to the weight"
            assert plan.shared_bytes <= H200.shared_bytes
            assert plan.n_counters <= max_counters(form)
            if isinstance(plan, WidePlan) and n >= 8192 and k >= 4096:
                assert plan.blocks > 0.6 * H200.n_sms, plan


@pytest.mark.parametrize(
    ("k", "rows", "gathers_once"), [(14336, 2, False), (14336, 8, True), (4096, 8, False)]
)
def test_x_of_a_permuted_weight_is_gathered_once_where_it_does_not_fit(k, rows, gathers_once):
    form = Format(**KINDS["gptq-act-order"], n=4096, k=k)
    plans = {}
    for limits in (H100, H200):
        tuning = linear_tuning(form, limits, "down")
        ((_, plans[limits]),) = plan_rows(form, rows, norm=False, tuning=tuning, limits=limits)
    assert isinstance(plans[H200], WidePlan) == gathers_once
    assert isinstance(plans[H100], LinearPlan), "wide.cu was measured on an H200 alone"


@pytest.mark.parametrize(
    ("width", "hidden", "rows", "direct"),
    [
        (4096, 14336, 32, {"qkv", "o", "gate_up", "down"}),
        (4096, 14336, 64, {"qkv", "o"}),
        (5120, 13824, 32, {"o"}),
    ],
)
def test_blocks_that_need_few_sums_of_x_compute_them_unless_x_is_staged_anyway(
    width, hidden, rows, direct
):
    qkv = 3 * width if width == 5120 else width + 2 * 1024
    shapes = {"qkv": (qkv, width), "o": (width, width)}
    shapes |= {"gate_up": (2 * hidden, width), "down": (width, hidden)}

    def chosen(*, rows: int, staged: bool) -> set[str]:
        found = set()
        for name, (n, k) in shapes.items():
            form = Format(**KINDS["int4-g128"], n=n, k=k, paired=name == "gate_up")
            tuning, epilogue = linear_tuning(form, H200, name), "swiglu" if form.paired else "plain"
            plans = plan_rows(
                form, rows, epilogue, norm=False, tuning=tuning, limits=H200, staged=staged
            )
            found |= {name} if any(plan.wide.direct for _, plan in plans) else set()
        return found

    assert chosen(rows=rows, staged=False) == direct
    assert not chosen(rows=rows, staged=True)
    assert not chosen(rows=64 + rows, staged=False), "several launches share one x"


@pytest.mark.parametrize("name", KINDS)
def test_the_sums_of_many_rows_fit_the_registers(name):
    for n, rows in itertools.product((4096, 28672), (17, 32, 64)):
        form = Format(**KINDS[name], n=n, k=4096)
        tuning = linear_tuning(form, H200, "down")
        wide = plan_rows(form, rows, norm=False, tuning=tuning, limits=H200)[0][1]
        assert isinstance(wide, WidePlan)
        assert wide.wide.tiles == 1 or wide.octets * (wide.wide.tiles * form.strands + 1) <= 36


@pytest.mark.parametrize("name", KINDS)
def test_the_order_of_sums_depends_on_the_weight_and_not_on_the_device(name):
    for n, k in itertools.product((4096, 32000), (640, 4096, 5120, 13824)):
        form = Format(**KINDS[name], n=n, k=k)
        warps = {linear_tuning(form, limits, "o").warps for limits in (H100, H200, SMALLER)}
        assert len(warps) == 1


@pytest.mark.parametrize("limits", [H100, SMALLER], ids=["H100", "smaller"])
@pytest.mark.parametrize("name", KINDS)
def test_layouts_fit_the_device_whatever_the_tuning(limits, name):
    form = Format(**KINDS[name], n=5120, k=13824)
    for warps, units, rows in itertools.product((1, 8, 16), (1, 4), (1, 8, 16, 64)):
        wanted = Tuning(warps=warps, units_per_stage=units, staged_bytes=1 << 20)
        layout = LinearPlan(form=form, rows=rows, tuning=wanted, limits=limits).layout
        if rows <= 8:
            assert layout is not None, "decoding always fits"
        if layout is not None:
            assert layout.shared_bytes <= limits.shared_bytes
            assert layout.stages >= 2
    roomy = LinearPlan(form=form, rows=1, tuning=Tuning(), limits=H100).layout
    assert (roomy.units_per_stage, roomy.staged) == (2, True), "what fits is left as it is"


@pytest.mark.parametrize("by", ["qkv", "o"])
@pytest.mark.parametrize("name", KINDS)
def test_prefetched_tiles_are_not_those_that_the_later_product_issues_first(name, by):
    form = Format(**KINDS[name], n=28672, k=4096, paired=True)
    for rows in (1, 8):
        later = LinearPlan(
            form=form,
            rows=rows,
            epilogue="swiglu",
            tuning=linear_tuning(form, H100, "gate_up"),
            limits=H100,
        )
        weight = torch.empty(form.nbytes, dtype=torch.uint8)
        prefetch = plan_prefetch(by, later, weight)
        assert prefetch is not None
        assert prefetch.first // 132 > later.tiles_in_flight
        assert prefetch.first + (prefetch.tiles - 1) * prefetch.step + 132 <= form.tiles
        assert prefetch.tiles * prefetch.tile_bytes * 132 < 16e6, "well within the cache"


def test_weights_that_are_wholly_in_flight_are_not_prefetched():
    form = Format(kind="int4", group_size=64, n=3072, k=576, paired=True)
    later = LinearPlan(
        form=form,
        rows=1,
        epilogue="swiglu",
        tuning=linear_tuning(form, H100, "gate_up"),
        limits=H100,
    )
    weight = torch.empty(form.nbytes, dtype=torch.uint8)
    assert plan_prefetch("qkv", later, weight) is None
    assert plan_prefetch("o", later, weight) is None
