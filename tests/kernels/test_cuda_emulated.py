"""The CUDA kernels' own source, run on a CPU, against float64."""

import ctypes
import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_cases import (
    DRAWS,
    KINDS,
    NEXT_OPERANDS,
    PLAIN_ROWS,
    Case,
    Options,
    Weight,
    accept_case,
    add_case,
    add_norm_case,
    all_reduce_cases,
    argmax_case,
    argmax_over_ranks_cases,
    attention_case,
    chain_case,
    dequantize_case,
    drawn,
    embed_case,
    hard_scores,
    high_plane_of,
    linear_case,
    make_weight,
    next_operand_cases,
    next_tokens_case,
    ngram_draft_case,
    normal,
    rope_case,
    sample_case,
    swiglu_case,
    with_plain_rows,
)
from cuda_emulation import emulate, needs_compiler

from hotloop.kernels.cuda import linear
from hotloop.kernels.cuda.attention import AttentionPlan, AttentionTuning
from hotloop.kernels.cuda.launch import Limits
from hotloop.kernels.cuda.linear import Epilogue, Prefetch, Tuning
from hotloop.kernels.cuda.packing import Format
from hotloop.kernels.cuda.tuning import wide_tuning
from hotloop.kernels.cuda.wide import WidePlan, WideTuning, can_be_direct, pairs_units

pytestmark = needs_compiler

SMALL = Tuning(warps=2, ring_bytes=8 * 1024)
TOGETHER = Tuning(warps=2, tiles=2, ring_bytes=16 * 1024)
DIRECT = Tuning(warps=2, ring_bytes=8 * 1024, staged_bytes=0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def limits(n_sms: int) -> Limits:
    return Limits(n_sms=n_sms, shared_bytes=99 * 1024)


def weight(name: str, n: int = 72, *, paired: bool = False) -> Weight:
    whole = KINDS[name].get("group_size") == 128 or KINDS[name].get("scale") == "two"
    k = 640 if whole else 576 if KINDS[name].get("group_size") != 16 else 560  # not whole units
    return make_weight(name, n, k, generator(), paired=paired)


def normal_scores(*shape: int) -> torch.Tensor:
    return 2.5 * torch.randn(*shape, generator=generator(sum(shape)))


def run(case: Case) -> None:
    staged = []
    if case.staging is not None and case.staged is not None:
        emulate(case.staging, late=case.inputs)
        staged = [case.staged]
    emulate(case.call, late=[*case.inputs, *staged])
    case.check()


@pytest.mark.parametrize("name", KINDS)
def test_every_weight_type_equals_its_specification(name):
    run(
        linear_case(
            weight(name),
            3,
            generator(1),
            residual=True,
            norm_epilogue=True,
            tuning=SMALL,
            limits=limits(3),
        )
    )


@pytest.mark.parametrize("rows", [1, 8, 9, 16, 17, 64])
@pytest.mark.parametrize("tuning", [TOGETHER, DIRECT], ids=["together", "direct"])
def test_every_number_of_rows_equals_its_specification(rows, tuning):
    run(linear_case(weight("int8", 40), rows, generator(rows), tuning=tuning, limits=limits(3)))


@pytest.mark.parametrize("name", ["int4-g64-asym", "fp8"])
@pytest.mark.parametrize("tuning", [SMALL, DIRECT], ids=["staged", "direct"])
def test_norm_bias_and_swiglu_equal_their_specification(name, tuning):
    paired = weight(name, 2 * 44, paired=True)
    for rows in (1, 5):
        run(
            linear_case(
                paired,
                rows,
                generator(rows),
                epilogue="swiglu",
                norm=True,
                bias=True,
                tuning=tuning,
                limits=limits(2),
            )
        )


@pytest.mark.parametrize("epilogue", ["part", "gated"])
@pytest.mark.parametrize("name", ["int8", "int4-g32-zeros"])
def test_parts_of_a_projection_equal_their_specification(name, epilogue):
    part = weight(name, 44)
    for rows in (1, 5, 20):
        run(
            linear_case(
                part,
                rows,
                generator(rows),
                epilogue=epilogue,
                norm=True,
                bias=True,
                tuning=SMALL,
                limits=limits(2),
                wide=WideTuning() if rows > 16 else None,
            )
        )


@pytest.mark.parametrize("name", ["bf16", "int4-g32"])
def test_logits_and_the_best_of_each_block_equal_their_specification(name):
    head = weight(name, 83)
    for rows in (2, 11):
        run(
            linear_case(
                head,
                rows,
                generator(rows),
                epilogue="logits",
                norm=True,
                tuning=SMALL,
                limits=limits(2),
            )
        )


@pytest.mark.parametrize(
    ("name", "tuning"),
    [("int4-g64-asym", SMALL), ("Q4_K", TOGETHER), ("int4-g32-zeros", DIRECT), ("Q6_K", SMALL)],
    ids=["two strands", "four, together", "four, direct", "of two groups"],
)
def test_a_rows_bits_do_not_depend_on_the_number_of_rows(name, tuning):
    given = weight(name)
    x = torch.randn(17, given.form.k, generator=generator(3)).bfloat16()
    results = []
    for rows in (1, 2, 8, 9, 17):
        case = linear_case(
            given, rows, generator(4), norm=True, tuning=tuning, limits=limits(3), x_MK=x[:rows]
        )
        emulate(case.call)
        results.append(case.outputs[0])
    for y in results:
        assert torch.equal(y, results[-1][: len(y)])


@pytest.mark.parametrize("name", ["bf16", "int8", "int4-g64", "Q6_K"])
def test_x_of_several_rows_can_arrive_in_any_number_of_parts(name):
    for k in (64, 448, 832):  # of 128 features each: one, four, and more, of which the last is half
        given = make_weight(name, 24, -(-k // 256) * 256 if name == "Q6_K" else k, generator())
        x = normal(generator(k), 5, given.form.k).bfloat16()
        results = []
        for of, part_bytes in ((x, 1 << 16), (x, 0), (x[:1], 0)):
            case = linear_case(
                given,
                len(of),
                generator(4),
                tuning=Tuning(warps=1, part_bytes=part_bytes),
                limits=Limits(n_sms=2, shared_bytes=227 * 1024),
                x_MK=of,
            )
            run(case)
            results.append(case.outputs[0][0])
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[2])


@pytest.mark.parametrize("name", ["gptq-act-order", "int4-g16-act-order"])
def test_x_can_be_gathered_some_rows_at_a_time(name, monkeypatch):
    given = weight(name)
    x = normal(generator(3), 5, given.form.k).bfloat16()
    results = []
    for rows_at_once in (5, 2):
        monkeypatch.setattr(linear, "SOURCE_BYTES", rows_at_once * 2 * given.form.k)
        case = linear_case(given, 5, generator(4), tuning=SMALL, limits=limits(3), x_MK=x)
        run(case)
        results.append(case.outputs[0])
    once = linear_case(
        given,
        5,
        generator(4),
        tuning=SMALL,
        limits=Limits(n_sms=3, shared_bytes=227 * 1024),
        wide=WideTuning(splits=2),
        x_MK=x,
    )
    run(once)
    for y in results:
        assert torch.equal(y, once.outputs[0])


@pytest.mark.parametrize("name", ["IQ4_NL", "nf4"])
def test_bits_do_not_depend_on_how_numbers_are_looked_up(name):
    given = weight(name)
    results = []
    for shared_bytes, looks_up_pairs in ((227 * 1024, True), (30 * 1024, False)):
        roomy = Limits(n_sms=3, shared_bytes=shared_bytes)
        case = linear_case(given, 2, generator(4), tuning=SMALL, limits=roomy)
        assert ("PairTable" in case.call.kernel.function) == looks_up_pairs
        run(case)
        results.append(case.outputs[0])
    assert torch.equal(*results)


def test_bits_do_not_depend_on_the_copies_issued_before_x():
    given = weight("int4-g64", 200)
    results = []
    for early_stages in (None, 0, 1):
        tuning = Tuning(warps=2, ring_bytes=16 * 1024, early_stages=early_stages)
        case = linear_case(given, 2, generator(1), tuning=tuning, limits=limits(3))
        emulate(case.call, late=case.inputs)
        case.check()
        results.append(case.outputs[0])
    assert all(torch.equal(y, results[0]) for y in results)


MANY_ROWS: dict[str, tuple[int, Epilogue, bool]] = {
    "bf16": (64, "plain", False),
    "fp8": (17, "swiglu", True),
    "int8": (33, "plain", True),
    "int4-g32": (24, "logits", True),
    "int4-g64": (9, "plain", False),
    "int4-g128": (64, "swiglu", True),
    "int8-g32": (33, "plain", True),
    "int8-g128": (12, "swiglu", True),
    "int4-g32-asym": (48, "plain", True),
    "int4-g64-asym": (16, "swiglu", True),
    "int4-g128-asym": (11, "logits", True),
    "awq": (20, "swiglu", True),
    "Q4_1": (9, "plain", False),
    "Q2_K": (20, "swiglu", True),
    "Q5_K": (33, "plain", False),
    "Q6_K": (40, "plain", True),
    "int4-g16-zeros": (9, "plain", False),
    "gptq-act-order": (24, "swiglu", True),
    "int4-g16-act-order": (12, "plain", True),
    "nvfp4": (24, "logits", True),
    "nf4": (17, "plain", False),
    "IQ4_XS": (12, "swiglu", True),
    "fp8-blocks": (12, "plain", True),
}
"""Rows, epilogue and norm of a weight type: every number of octets and epilogue occurs."""


@pytest.mark.parametrize("name", MANY_ROWS)
def test_many_rows_equal_their_specification_and_have_the_bits_of_a_row_alone(name):
    rows, epilogue, norm = MANY_ROWS[name]
    n = 2 * 92 if epilogue == "swiglu" else 190  # not whole tiles, nor whole groups of them
    # Not whole pairs of units.
    k = {16: 368, 64: 448, 128: 896}.get(KINDS[name].get("group_size"), 352)
    if KINDS[name].get("scale") == "two":
        k = 384
    given = make_weight(name, n, k, generator(), paired=epilogue == "swiglu")
    width = n // 2 if epilogue == "swiglu" else n
    x, added = (normal(generator(size), rows, size).bfloat16() for size in (k, width))

    def case(of: slice, wide: WideTuning | None) -> Case:
        return linear_case(
            given,
            len(x[of]),
            generator(1),
            epilogue=epilogue,
            norm=norm,
            bias=True,
            residual_MN=None if epilogue == "logits" else added[of],
            norm_epilogue=epilogue == "plain",
            tuning=Tuning(warps=3),
            limits=Limits(n_sms=2, shared_bytes=227 * 1024),
            wide=wide,
            x_MK=x[of],
        )

    one = case(slice(rows // 2, rows // 2 + 1), None)
    emulate(one.call)
    # Candidates for the best logit are those of other parts of the vocabulary.
    wanted = one.outputs[:1] if epilogue == "logits" else one.outputs
    for fewer, tiles, splits, ring_bytes in ((0, 2, 1, 0), (min(7, rows - 9), 1, 3, 1 << 20)):
        pairs = pairs_units(given.form) and tiles == 2
        direct = can_be_direct(given.form) and tiles == 2
        wide = WideTuning(
            tiles=tiles,
            splits=splits,
            ring_bytes=ring_bytes,
            pairs=pairs,
            early_bytes=ring_bytes,
            direct=direct,
        )
        many = case(slice(rows - fewer), wide)
        run(many)
        for alone, found in zip(wanted, many.outputs, strict=False):
            assert torch.equal(alone[0], found[rows // 2]), f"{wide}"


@pytest.mark.parametrize("rows", [12, 33])
@pytest.mark.parametrize(("by", "reader"), NEXT_OPERANDS)
def test_what_computes_x_stores_the_operand_that_staging_would(by, reader, rows):
    large = Limits(n_sms=5, shared_bytes=227 * 1024)
    plainly, directly, staging, staged, stored = next_operand_cases(
        by, reader, rows, rows, "cpu", large
    )
    run(plainly)
    emulate(staging)
    if directly.staging is not None:
        emulate(directly.staging)
    emulate(directly.call)
    assert staged.any()
    assert torch.equal(staged, stored)
    if by in ("plain", "int8"):  # the residual stream, and sums of its squares
        for i in (0, 2):
            assert torch.equal(plainly.outputs[i], directly.outputs[i])


def test_sums_over_parts_of_k_and_padding_and_gathered_columns_need_a_kernel_that_stages_x():
    def plan(kind: dict[str, Any], parts: int, k: int = 768) -> WidePlan:
        form, large = Format(**kind, n=64, k=k), Limits(n_sms=2, shared_bytes=227 * 1024)
        settings = {"rows": 17, "tuning": Tuning(warps=parts), "limits": large}
        return WidePlan(form=form, wide=wide_tuning(form, 17, parts, large), **settings)

    assert plan(PLAIN_ROWS, 3).is_staged_before
    assert not plan(PLAIN_ROWS, 5).is_staged_before  # parts of an odd number of units
    for name in ("int4-g128", "int4-g32-asym", "fp8", "mxfp4", "Q5_K"):
        assert plan(KINDS[name], 5).is_staged_before, name
    assert not plan(KINDS["int4-g64"], 3, k=704).is_staged_before  # half a unit is padding
    for name in ("int8", "gptq-act-order", "int4-g16-zeros"):
        assert not plan(KINDS[name], 3).is_staged_before, name


def test_a_high_plane_in_its_place_gives_the_bits_of_an_int4_weight():
    inner, alone = high_plane_of(weight("int8-g32"))
    assert not inner.packed.is_contiguous()
    large = Limits(n_sms=3, shared_bytes=227 * 1024)
    for rows, epilogue, where, wide in (
        (3, "plain", limits(3), None),
        (24, "logits", large, WideTuning(splits=2)),
    ):
        found = []
        for each in (inner, alone):
            case = linear_case(
                each,
                rows,
                generator(rows),
                epilogue=epilogue,
                norm=epilogue == "logits",
                tuning=SMALL,
                limits=where,
                wide=wide,
            )
            run(case)
            found.append(case.outputs[0])
        assert torch.equal(*found)


@pytest.mark.parametrize("paired", [False, True], ids=["plain", "paired"])
@pytest.mark.parametrize("tuning", [SMALL, TOGETHER, DIRECT], ids=["staged", "together", "direct"])
def test_plain_rows_of_bfloat16_give_the_bits_of_packed_ones(tuning, paired):
    packed = make_weight("bf16", 80, 352, generator(), paired=paired)  # 11 units, 5 tiles
    for rows in (1, 8, 9):
        results = []
        for given in (packed, with_plain_rows(packed)):
            case = linear_case(
                given,
                rows,
                generator(rows),
                epilogue="swiglu" if paired else "plain",
                norm=paired,
                norm_epilogue=not paired,
                tuning=tuning,
                limits=limits(2),
            )
            run(case)
            results.append(case.outputs)
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("rows", "epilogue", "wide"),
    [
        (64, "plain", WideTuning(splits=3)),
        (17, "swiglu", WideTuning(tiles=2)),
        (24, "logits", WideTuning(tiles=2, splits=2, ring_bytes=0)),
    ],
)
def test_plain_rows_give_many_rows_the_bits_of_a_row_alone(rows, epilogue, wide):
    n, k = 192, 352  # neither whole groups of tiles, nor pairs of units
    packed = make_weight("bf16", n, k, generator(), paired=epilogue == "swiglu")
    x = normal(generator(k), rows, k).bfloat16()
    results = []
    for given, of, how in (
        (packed, x[-1:], None), (with_plain_rows(packed), x, wide),
    ):  # fmt: skip
        case = linear_case(
            given,
            len(of),
            generator(1),
            epilogue=epilogue,
            norm=epilogue != "plain",
            tuning=Tuning(warps=3),
            limits=Limits(n_sms=2, shared_bytes=227 * 1024),
            wide=how,
            x_MK=of,
        )
        run(case)
        results.append(case.outputs[0][-1])
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("items_left", "name"), [(0, "int4-g64"), (1, "int4-g64"), (9, "int4-g64"), (1, "int8-g32")]
)
def test_planned_tiles_are_prefetched_and_results_stay_the_same(items_left, name):
    later = weight(name, 200)  # 13 tiles
    if name == "int8-g32":  # whose tiles lie apart
        later, _ = high_plane_of(later)
    prefetch = Prefetch(
        weight=later.packed,
        form=later.form,
        first=3,
        step=4,
        tiles=3,
        tile_bytes=1024,
        items_left=items_left,
    )
    case = linear_case(
        weight("int8"), 3, generator(1), tuning=SMALL, limits=limits(4), prefetch=prefetch
    )
    asked = emulate(case.call, late=case.inputs)
    case.check()
    tile_bytes = later.packed.stride(0)
    wanted = sorted(tile for block in range(4) for tile in range(3 + block, 13, 4))
    found = sorted((at - later.packed.data_ptr()) / tile_bytes for at, _ in asked)
    assert found == wanted
    assert {n for _, n in asked} == {1024}


@pytest.mark.parametrize("name", ["int8", "int4-g32", "int4-g128-asym"])
def test_the_zero_point_costs_no_accuracy_where_x_is_far_from_zero(name):
    given = weight(name)
    x = (20 + torch.randn(3, given.form.k, generator=generator(5))).bfloat16()
    run(linear_case(given, 3, generator(6), tuning=SMALL, limits=limits(3), x_MK=x))


def test_more_warps_than_units_and_more_blocks_than_tiles_work():
    tiny = make_weight("int4-g32", 5, 96, generator())
    run(
        linear_case(
            tiny, 2, generator(1), tuning=Tuning(warps=3, ring_bytes=4096), limits=limits(9)
        )
    )


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("paired", [False, True], ids=["plain", "paired"])
def test_dequantized_weights_equal_their_specification(name, paired):
    run(dequantize_case(weight(name, 2 * 44 if paired else 83, paired=paired)))


def attention_plan(
    *,
    B: int,
    T: int,
    H: int,
    J: int,
    E: int,
    C: int,
    scale: float | None = None,
    window: int | None = None,
    **tuning: int,
) -> AttentionPlan:
    return AttentionPlan(
        batch=B,
        tokens=T,
        n_heads=H,
        n_kv_heads=J,
        head_dim=E,
        n_positions=C,
        scale=scale,
        window=window,
        tuning=AttentionTuning(**tuning),
    )


WINDOW = {"B": 1, "T": 5, "H": 4, "J": 2, "E": 64, "C": 90, "window": 20, "warps": 1}
PLANS = {
    "one row": attention_plan(B=2, T=1, H=3, J=3, E=64, C=70, min_chunk=96, warps=2),
    "one stage": attention_plan(B=2, T=3, H=2, J=1, E=128, C=70, min_chunk=80, warps=1, stages=1),
    "grouped": attention_plan(B=2, T=3, H=8, J=2, E=96, C=50, min_chunk=32, warps=2),
    "window": attention_plan(**WINDOW, min_chunk=16),
    "another scale": attention_plan(**WINDOW, min_chunk=16, scale=0.3),
    "longer chunks of a window": attention_plan(**WINDOW, min_chunk=16, chunks=1),
    "longer chunks": attention_plan(
        B=2, T=5, H=6, J=2, E=64, C=104, chunks=2, min_chunk=16, warps=1
    ),
    "many chunks": attention_plan(
        B=1, T=2, H=3, J=1, E=64, C=200, chunks=20, min_chunk=16, warps=1
    ),
    "many rows": attention_plan(B=1, T=6, H=12, J=2, E=128, C=40, chunks=2, min_chunk=16, warps=1),
    "turns": attention_plan(
        B=2, T=3, H=6, J=3, E=64, C=150, min_chunk=160, warps=4, turns=2, stages=1
    ),
    "turns and longer chunks": attention_plan(
        B=2, T=5, H=6, J=2, E=64, C=104, chunks=2, min_chunk=16, warps=2, turns=2, stages=1
    ),
    "turns of a window": attention_plan(**WINDOW | {"warps": 2}, min_chunk=32, turns=2, stages=1),
    "turns of a ring": attention_plan(
        B=1, T=2, H=6, J=1, E=128, C=210, min_chunk=256, warps=4, turns=4, stages=2
    ),
    "wide heads": attention_plan(B=1, T=4, H=6, J=2, E=256, C=40, min_chunk=48, warps=3, stages=3),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("norms", [False, True], ids=["plain", "norms"])
def test_attention_equals_its_specification(name, norms):
    plan = PLANS[name]
    last = plan.n_positions - plan.tokens
    for at in (0, 7, 15, 16, 29, 62, last):
        if at > last:
            continue
        positions = [at, last - at][: plan.batch]
        run(attention_case(plan, positions, generator(at), norms=norms))


def test_tokens_beyond_the_cache_are_not_stored():
    plan = PLANS["window"]
    run(attention_case(plan, [plan.n_positions - 2], generator(1)))


@pytest.mark.parametrize("name", [name for name in PLANS if PLANS[name].tokens > 1])
@pytest.mark.parametrize("more_positions", [0, 100])
def test_a_tokens_bits_depend_on_neither_other_tokens_nor_the_cache(name, more_positions):
    many = PLANS[name]
    # The new tokens reach into another step, into another chunk, or to where chunks are longer.
    for at in (0, 13, 27, 30):
        case = attention_case(many, [at] * many.batch, generator(at))
        emulate(case.call)
        out, *caches = case.outputs
        qkv, cos, sin, _, seats, *_ = case.call.tensors
        width = (many.n_heads + 2 * many.n_kv_heads) * many.head_dim
        longer = [F.pad(cache, (0, 0, 0, more_positions)) for cache in caches]
        cos, sin = (F.pad(table, (0, 0, 0, more_positions)) for table in (cos, sin))
        n_positions = many.n_positions + more_positions
        stages = 1 if many.tuning.stages > 1 else 2
        tuning = dataclasses.replace(many.tuning, stages=stages, turns=1)
        one = dataclasses.replace(many, tokens=1, n_positions=n_positions, tuning=tuning)
        for token in range(many.tokens):
            alone = torch.empty(many.batch, many.n_heads * many.head_dim, dtype=torch.bfloat16)
            positions = torch.full((many.batch,), at + token)
            work = {
                "partial": torch.full((one.n_partial,), float("nan")),
                "counters": torch.zeros(one.n_counters, dtype=torch.int32),
            }
            of_token = qkv.view(many.batch, -1, width)[:, token].contiguous()
            emulate(one.call(of_token, alone, *longer, seats, positions, cos, sin, **work))
            assert torch.equal(alone, out.view(many.batch, many.tokens, -1)[:, token])


FINISHES = [{"scale": s, "bias": b} for s in (False, True) for b in (False, True)]


@pytest.mark.parametrize("finish", FINISHES, ids=str)
def test_a_prompts_sums_and_norms_equal_their_specification(finish):
    for k in (72, 2056):
        run(add_norm_case(2, k, generator(k), **finish))


def test_a_prompts_first_norm_adds_no_gemm_output():
    run(add_norm_case(3, 72, generator(), scale=False, bias=False, adds=False))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("norms", [False, True], ids=["plain", "norms"])
def test_a_prompts_queries_keys_and_values_equal_their_specification(head_dim, norms):
    for finish in FINISHES:
        run(rope_case(3, (6, 2), head_dim, 5, generator(), norms=norms, **finish))


@pytest.mark.parametrize("finish", FINISHES, ids=str)
def test_a_prompts_swiglu_equals_its_specification(finish):
    for f in (72, 2056):
        run(swiglu_case(2, f, generator(f), **finish))


@pytest.mark.parametrize("int8", [False, True])
def test_embedding_equals_its_specification(int8):
    run(embed_case(3, 50, 72, generator(), int8=int8))


@pytest.mark.parametrize("k", [8, 72, 1024, 2056])
def test_adding_to_the_residual_stream_equals_its_specification(k):
    run(add_case(3, k, generator()))


def run_ranks(cases: list[list[Case]]) -> None:
    """Runs each rank's cases in order, in parallel with the other ranks'."""

    def one(own: list[Case]) -> None:
        for case in own:
            run(case)

    with ThreadPoolExecutor(len(cases)) as pool:
        list(pool.map(one, cases))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_all_reduce_sums_over_ranks(ranks):
    for k in (72, 2056):
        run_ranks(all_reduce_cases(ranks, 3, k, generator(k)))


@pytest.mark.parametrize("ranks", [1, 2, 5, 32])
def test_the_argmax_over_ranks_is_the_same_on_all(ranks):
    for n in (1, 40):
        run_ranks(argmax_over_ranks_cases(ranks, 3, n, generator(n)))


@pytest.mark.parametrize("n", [1, 7, 100])
def test_argmax_takes_the_first_of_the_largest(n):
    run(argmax_case(5, n, generator()))


@pytest.mark.parametrize("k", [0, 1, 7, 15])
def test_a_step_reads_newest_tokens_and_drafts_and_appends_accepted_ones(k):
    for rows in (1, 4):
        run(next_tokens_case(rows, k, generator(k)))
        run(accept_case(rows, k, generator(k)))


@pytest.mark.parametrize("n_words", [2, 4, 12, 200])
def test_ngram_drafts_equal_their_specification(n_words):
    run(ngram_draft_case(70, 5, n_words, generator(n_words)))
    run(ngram_draft_case(2500, 15, n_words, generator(n_words)))


MAX_CANDIDATES = (8192, 64)
"""As many candidates as on a GPU, and too few for most cutoffs."""


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("max_candidates", MAX_CANDIDATES)
def test_draws_equal_their_definition(name, max_candidates):
    scores = hard_scores(301, 2, generator(7))
    run(sample_case(scores, [DRAWS[name]] * len(scores), max_candidates=max_candidates))


@pytest.mark.parametrize("vocab", [1, 2, 1024, 32_000, 49_152])
def test_draws_from_vocabularies_of_any_size_equal_their_definition(vocab):
    scores = normal_scores(1, 2, vocab)
    for options in (Options(), Options(top_k=50, top_p=0.95), Options(top_p=0.9)):
        run(sample_case(scores, [options]))


def test_each_row_is_drawn_with_its_sequences_options_and_from_rows_that_lie_apart():
    options = [Options(temperature=0.0), *DRAWS.values()]
    wide = normal_scores(len(options), 3, 320)
    run(sample_case(wide[..., :301], options))  # padding
    run(sample_case(wide[:, -1:, :301], options))  # the last one of each sequence


@pytest.mark.parametrize("max_candidates", MAX_CANDIDATES)
@pytest.mark.parametrize("option", ["top_k", "top_p", "min_p"])
def test_the_last_token_kept_can_be_drawn_and_the_next_one_cannot(option, max_candidates):
    n_kept, n_seeds = 70, 4096
    scores = 0.3 * normal_scores(1, 1, 301)
    best_first = scores[0, 0].sort(descending=True)
    weights = (best_first.values - best_first.values[0]).double().exp()
    before = weights.cumsum(0) - weights
    value = {
        "top_k": n_kept,
        "top_p": (before[n_kept - 1 : n_kept + 1].mean() / weights.sum()).item(),
        "min_p": weights[n_kept - 1 : n_kept + 1].mean().item(),
    }[option]
    # Seeds with which the token at the edge wins, or the one beyond it would if it were kept.
    for edge, kept in ((n_kept - 1, True), (n_kept, False)):
        many, ones = scores.expand(n_seeds, 1, -1), torch.ones(n_seeds)
        positions, seeds = torch.full((n_seeds, 1), 3), torch.arange(n_seeds)
        so_many = torch.full((n_seeds,), edge + 1)
        ids = drawn(many, many.argmax(-1), positions, ones, so_many, ones, 0 * ones, seeds)
        decisive = seeds[ids[:, 0] == best_first.indices[edge]][:3].tolist()
        case = sample_case(
            scores.expand(3, 1, -1).contiguous(),
            [Options(**{option: value}, seed=seed) for seed in decisive],
            positions_BT=positions[:3],
            max_candidates=max_candidates,
        )
        run(case)
        assert (case.outputs[0] == best_first.indices[edge]).tolist() == [[kept]] * 3


@pytest.mark.parametrize("max_candidates", MAX_CANDIDATES)
@pytest.mark.parametrize("option", [{"top_k": 5}, {"top_p": 4.5 / (2500 * (1 + math.exp(-1)))}])
def test_equal_scores_are_kept_in_the_order_of_ids(option, max_candidates):
    scores = torch.zeros(16, 1, 5000)
    scores[..., ::2] = -1
    options = [Options(**option, seed=seed) for seed in range(len(scores))]
    case = sample_case(scores, options, max_candidates=max_candidates)
    run(case)
    assert set(case.outputs[0].flatten().tolist()) == {1, 3, 5, 7, 9}


def test_tokens_of_probability_zero_are_sampled_only_if_all_are():
    scores = torch.full((4, 1, 301), -torch.inf)
    scores[0, 0, 300] = scores[1, 0, 5:7] = 1.0
    scores[3] = torch.nan
    for options in (Options(), Options(top_k=200), Options(top_p=0.9), Options(min_p=0.1)):
        case = sample_case(scores, [options] * 4)
        emulate(case.call, late=case.inputs)
        ids = case.outputs[0].flatten()
        assert ids[0] == 300
        assert ids[1] in (5, 6)
        assert torch.equal(ids[2:], scores[2:, 0].argmax(-1))


def test_rows_without_an_argmax_sample_nothing():
    case = sample_case(normal_scores(2, 1, 301), [Options(top_p=0.9)] * 2)
    run(case)
    first, second = case.outputs[0].flatten().tolist()
    best = case.inputs[1]
    best[0] = -1
    emulate(case.call)
    assert case.outputs[0].flatten().tolist() == [-1, second] != [first, second]


def test_nan_scores_are_skipped():
    scores = normal_scores(1, 1, 301)
    scores[..., ::2] = torch.nan
    case = sample_case(scores.nan_to_num(-torch.inf), [Options(top_k=9, top_p=0.8)])
    run(case)
    wanted = case.outputs[0].clone()
    case.call.tensors[0].copy_(scores.flatten())
    case.outputs[0].fill_(-1)
    emulate(case.call)
    assert torch.equal(case.outputs[0], wanted)


def test_a_draw_depends_on_neither_max_candidates_nor_other_rows():
    scores = normal_scores(3, 2, 700)
    options = [Options(top_p=0.9, seed=3), Options(top_k=40, seed=4), Options(seed=5)]
    results = []
    for max_candidates in MAX_CANDIDATES:
        case = sample_case(scores, options, max_candidates=max_candidates)
        run(case)
        results.append(case.outputs[0])
    assert torch.equal(*results)
    for b in range(3):
        positions = torch.arange(6).view(3, 2)[b : b + 1] * 7 + 3
        alone = sample_case(scores[b : b + 1], options[b : b + 1], positions_BT=positions)
        run(alone)
        assert torch.equal(alone.outputs[0][0], results[0][b])


def test_a_chain_goes_on_while_its_drafts_are_likely():
    condition = ctypes.c_uint32()
    for B, V, options, goes_on in (
        (1, 301, {"min_probability": 1e-6}, True),
        (1, 301, {"min_probability": 0.9}, False),
        (3, 9000, {"min_probability": 1e-9, "accepted": 0.5}, True),  # more than a thread's loads
        (3, 40, {"min_probability": 0.3, "accepted": 0.9, "own": 0.5}, True),
        (3, 40, {"min_probability": 0.3, "accepted": 0.9, "own": 0.5, "undrafted": [1, 2]}, False),
        (2, 40, {"min_probability": 1e-6, "ids": [-1, -1]}, False),  # whose logits are not finite
    ):
        condition.value = 7
        handle = ctypes.addressof(condition)
        run(chain_case(normal_scores(B, V), **options, handle=handle))
        assert condition.value == goes_on, f"{B} rows of {V}, {options}"
    logits = normal_scores(3, 2, 300)[:, 1]
    run(chain_case(logits, min_probability=1e-6))  # rows that lie apart, and no node
    logits[:, 7] = 1e4  # beside which any other token has a probability of 0
    run(chain_case(logits, min_probability=1e-6))


def test_a_chain_that_has_ended_stays_so_whatever_is_left_of_its_drafts():
    condition = ctypes.c_uint32(7)
    logits = torch.full((2, 300), torch.nan)
    case = chain_case(logits, min_probability=0.1, accepted=1.0, handle=ctypes.addressof(condition))
    accepted, state = case.outputs
    state[1] = 1
    emulate(case.call)
    assert condition.value == 0
    assert (accepted.tolist(), state.tolist()) == ([1.0, 1.0], [0, 1])
