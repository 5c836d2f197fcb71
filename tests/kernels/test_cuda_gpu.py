"""The CUDA kernels on a GPU, against float64; benchmarks/kernels_cuda.py checks many more cases."""

import dataclasses
import itertools

import pytest
import torch
from cuda_cases import (
    DRAWS,
    KINDS,
    NEXT_OPERANDS,
    Case,
    accept_case,
    add_case,
    add_norm_case,
    all_reduce_cases,
    argmax_over_ranks_cases,
    attention_case,
    chain_case,
    dequantize_case,
    embed_case,
    hard_scores,
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

from hotloop.kernels.cuda.attention import AttentionPlan
from hotloop.kernels.cuda.compile import unavailable_reason
from hotloop.kernels.cuda.launch import Device
from hotloop.kernels.cuda.linear import Prefetch, Tuning
from hotloop.kernels.cuda.tuning import attention_tuning
from hotloop.kernels.cuda.wide import WideTuning, can_be_direct, pairs_units

REASON = "no CUDA device" if not torch.cuda.is_available() else unavailable_reason()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.fixture(scope="module")
def device() -> Device:
    return Device(torch.device("cuda", torch.cuda.current_device()))


def generator(device: Device, seed: int) -> torch.Generator:
    return torch.Generator(device.device).manual_seed(seed)


def assert_right_and_the_same_with_dependent_launch(device: Device, case: Case) -> None:
    calls = [call for call in (case.staging, case.call) if call is not None]
    for call in calls:
        device.prepare(call, dependent=False)()
    torch.cuda.synchronize()
    case.check()
    first = [output.clone() for output in case.outputs]
    launches = [device.prepare(call) for call in calls]
    for _ in range(3):
        for launch in launches:
            launch()
    torch.cuda.synchronize()
    for one, other in zip(first, case.outputs, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("name", KINDS)
def test_matrix_products_equal_their_specification(device, name):
    weight = make_weight(name, 333, 1152, generator(device, 0))
    for rows in (1, 5, 16):
        for tuning in (Tuning(), Tuning(warps=7, staged_bytes=0)):
            case = linear_case(
                weight,
                rows,
                generator(device, rows),
                residual=True,
                norm_epilogue=True,
                tuning=tuning,
                limits=device.limits,
            )
            assert_right_and_the_same_with_dependent_launch(device, case)


@pytest.mark.parametrize("epilogue", ["part", "gated"])
@pytest.mark.parametrize("rows", [1, 5, 24])
def test_parts_of_a_projection_equal_their_specification(device, rows, epilogue):
    if rows > 16 and not device.limits.warpgroups:
        pytest.skip("wide.cu is for Hopper")
    for name in ("int8", "awq"):
        case = linear_case(
            make_weight(name, 333, 1152, generator(device, 0)),
            rows,
            generator(device, rows),
            epilogue=epilogue,
            norm=True,
            bias=True,
            tuning=Tuning(),
            limits=device.limits,
            wide=WideTuning() if rows > 16 else None,
        )
        assert_right_and_the_same_with_dependent_launch(device, case)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("rows", [9, 24, 64])
@pytest.mark.parametrize("splits", [1, 4])
def test_many_rows_have_the_bits_of_a_row_alone(device, name, rows, splits):
    if not device.limits.warpgroups:
        pytest.skip("wide.cu is for Hopper")
    weight = make_weight(name, 333, 1152, generator(device, 0))
    x = normal(generator(device, 1), rows, 1152).bfloat16()
    settings = {"norm_epilogue": True, "tuning": Tuning(warps=7), "limits": device.limits}
    pairs = pairs_units(weight.form) and rows < 64
    early_bytes = 0 if rows == 24 else 1 << 20
    wide = WideTuning(
        tiles=2 if rows == 24 else 1,
        splits=splits,
        pairs=pairs,
        early_bytes=early_bytes,
        direct=can_be_direct(weight.form) and splits == 1,
    )
    case = linear_case(weight, rows, generator(device, 2), x_MK=x, wide=wide, **settings)
    assert_right_and_the_same_with_dependent_launch(device, case)
    one = linear_case(weight, 1, generator(device, 2), x_MK=x[-1:], **settings)
    device.prepare(one.call)()
    torch.cuda.synchronize()
    for alone, among in zip(one.outputs, case.outputs, strict=True):
        assert torch.equal(alone[0], among[-1])


@pytest.mark.parametrize("rows", [18, 63])
@pytest.mark.parametrize(("by", "reader"), NEXT_OPERANDS)
def test_many_rows_of_x_are_stored_as_staging_would(device, by, reader, rows):
    if not device.limits.warpgroups:
        pytest.skip("wide.cu is for Hopper")
    plainly, directly, staging, staged, stored = next_operand_cases(
        by, reader, rows, rows, device.device, device.limits
    )
    assert_right_and_the_same_with_dependent_launch(device, plainly)
    for call in (staging, directly.staging, directly.call):
        if call is not None:
            device.prepare(call)()
    torch.cuda.synchronize()
    assert staged.any()
    assert torch.equal(staged, stored)
    if by in ("plain", "int8"):  # the residual stream, and sums of its squares
        for i in (0, 2):
            assert torch.equal(plainly.outputs[i], directly.outputs[i])


@pytest.mark.parametrize("paired", [False, True], ids=["plain", "paired"])
@pytest.mark.parametrize("rows", [1, 8, 16, 24, 64])
def test_plain_rows_of_bfloat16_give_the_bits_of_packed_ones(device, rows, paired):
    if not device.limits.boxes:
        pytest.skip("it copies no boxes of tensors")
    packed = make_weight("bf16", 1152, 2080, generator(device, 0), paired=paired)
    plans: list[tuple[Tuning, WideTuning | None]] = [(Tuning(warps=7, units_per_stage=4), None)]
    if rows <= 16:
        plans += [(Tuning(warps=7, tiles=2, staged_bytes=0), None)]
    elif device.limits.warpgroups:
        plans += [(Tuning(warps=7), WideTuning(tiles=2, splits=n)) for n in (1, 3)]
    for tuning, wide in plans:
        results = []
        for given in (packed, with_plain_rows(packed)):
            case = linear_case(
                given,
                rows,
                generator(device, rows),
                epilogue="swiglu" if paired else "plain",
                norm=paired,
                norm_epilogue=not paired,
                tuning=tuning,
                limits=device.limits,
                wide=wide,
            )
            assert_right_and_the_same_with_dependent_launch(device, case)
            results.append(case.outputs)
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other), f"{tuning} {wide}"


@pytest.mark.parametrize("items_left", [0, 2])
def test_prefetching_changes_no_result(device, items_left):
    weight, later = (make_weight("int4-g64", n, 1152, generator(device, n)) for n in (9000, 5000))
    prefetch = Prefetch(
        weight=later.packed,
        form=later.form,
        first=100,
        step=device.limits.n_sms,
        tiles=5,
        tile_bytes=later.packed[0].nbytes,
        items_left=items_left,
    )
    case = linear_case(
        weight, 1, generator(device, 1), tuning=Tuning(), limits=device.limits, prefetch=prefetch
    )
    assert_right_and_the_same_with_dependent_launch(device, case)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("paired", [False, True])
def test_dequantized_weights_equal_their_specification(device, name, paired):
    weight = make_weight(name, 2 * 172, 1152, generator(device, 0), paired=paired)
    assert_right_and_the_same_with_dependent_launch(device, dequantize_case(weight))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("tuned_for", [8, 40], ids=["sixteen chunks", "three chunks"])
def test_attention_equals_its_specification(device, head_dim, tuned_for):
    plan = AttentionPlan(
        batch=2,
        tokens=3,
        n_heads=8,
        n_kv_heads=2,
        head_dim=head_dim,
        n_positions=12_000,
        tuning=attention_tuning(
            head_dim=head_dim,
            n_kv_heads=tuned_for,
            n_positions=12_000,
            batch=2,
            limits=device.limits,
        ),
    )
    longer_from = [at for at in range(1, 12_000) if plan.chunk_at(at) > plan.chunk_at(at - 1)]
    for at in ([0, 512], [15, 597], [longer_from[0] - 2, longer_from[-1] - 1], [3000, 11_997]):
        case = attention_case(plan, at, generator(device, 1), norms=True)
        assert_right_and_the_same_with_dependent_launch(device, case)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("n_kv_heads", [8, 2])
def test_attention_in_turns_has_the_same_bits(device, tokens, n_kv_heads):
    """More blocks than fit at once, which have chains one after the other."""
    batch = -(-9 * device.limits.n_sms // 4 // n_kv_heads)
    rows = tokens * 8 // n_kv_heads
    tuning = attention_tuning(
        head_dim=128,
        n_kv_heads=n_kv_heads,
        n_positions=700,
        batch=batch,
        rows=rows,
        limits=device.limits,
    )
    assert tuning.turns == 2
    plan = AttentionPlan(
        batch=batch,
        tokens=tokens,
        n_heads=8,
        n_kv_heads=n_kv_heads,
        head_dim=128,
        n_positions=700,
        tuning=tuning,
    )
    positions = [(37 * i * i) % (700 - tokens + 1) for i in range(batch)]
    case = attention_case(plan, positions, generator(device, 1))
    assert_right_and_the_same_with_dependent_launch(device, case)
    at_once = dataclasses.replace(plan, tuning=dataclasses.replace(tuning, turns=1))
    same = attention_case(at_once, positions, generator(device, 1))
    device.prepare(same.call)()
    torch.cuda.synchronize()
    for one, other in zip(case.outputs, same.outputs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("int8", [False, True])
def test_embedding_equals_its_specification(device, int8):
    case = embed_case(3, 1000, 5120, generator(device, 2), int8=int8)
    assert_right_and_the_same_with_dependent_launch(device, case)


@pytest.mark.parametrize("k", [0, 7, 15])
def test_a_step_reads_newest_tokens_and_drafts_and_appends_accepted_ones(device, k):
    case = next_tokens_case(5, k, generator(device, k))
    assert_right_and_the_same_with_dependent_launch(device, case)
    accepted = accept_case(5, k, generator(device, k))
    device.prepare(accepted.call)()  # once: it moves on
    accepted.check()


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("dependent", [False, True])
def test_all_reduces_over_ranks_equal_their_specification(device, ranks, dependent):
    """Ranks of one GPU, in streams: their blocks are few enough to run at the same time."""
    streams = [torch.cuda.Stream() for _ in range(ranks)]
    of_sums = all_reduce_cases(ranks, 3, 5120, generator(device, ranks))
    of_choices = argmax_over_ranks_cases(ranks, 3, 132, generator(device, ranks))
    torch.cuda.synchronize()
    for cases in (of_sums, of_choices):
        for at_once in zip(*cases, strict=True):
            for stream, case in zip(streams, at_once, strict=True):
                with torch.cuda.stream(stream):
                    device.prepare(case.call, dependent=dependent)()
        torch.cuda.synchronize()
        for case in itertools.chain(*cases):
            case.check()


@pytest.mark.parametrize("n_words", [2, 12, 200])
def test_ngram_drafts_equal_their_specification(device, n_words):
    for width in (70, 5000):
        case = ngram_draft_case(width, 7, n_words, generator(device, width))
        assert_right_and_the_same_with_dependent_launch(device, case)


@pytest.mark.parametrize("scale", [False, True])
def test_prefill_kernels_equal_their_specification(device, scale):
    finish = {"scale": scale, "bias": scale}
    for k in (576, 5120, 13824):
        case = add_norm_case(67, k, generator(device, k), **finish)
        assert_right_and_the_same_with_dependent_launch(device, case)
        case = swiglu_case(67, k, generator(device, k), **finish)
        assert_right_and_the_same_with_dependent_launch(device, case)
    for head_dim in (64, 96, 128, 256):
        case = rope_case(
            67, (9, 3), head_dim, 5, generator(device, head_dim), norms=scale, **finish
        )
        assert_right_and_the_same_with_dependent_launch(device, case)


@pytest.mark.parametrize("vocab", [300, 32_000, 128_257])
@pytest.mark.parametrize("name", DRAWS)
def test_draws_equal_their_definition(device, vocab, name):
    scores = hard_scores(vocab, 16, generator(device, vocab))
    for max_candidates in (8192, 64):
        case = sample_case(scores, [DRAWS[name]] * len(scores), max_candidates=max_candidates)
        assert_right_and_the_same_with_dependent_launch(device, case)


@pytest.mark.parametrize("rows", [1, 8])
def test_adding_to_the_residual_stream_equals_its_specification(device, rows):
    case = add_case(rows, 5120, generator(device, 3))
    assert_right_and_the_same_with_dependent_launch(device, case)


@pytest.mark.parametrize("vocab", [300, 32_000, 128_257])
@pytest.mark.parametrize("rows", [1, 8])
def test_a_chain_goes_on_while_its_drafts_are_likely(device, rows, vocab):
    logits = 5 * torch.randn(rows, vocab, generator=generator(device, vocab), device=device.device)
    for least in (1e-12, 0.5):
        case = chain_case(logits, min_probability=least)
        assert_right_and_the_same_with_dependent_launch(device, case)
    for options in ({"own": 0.5}, {"own": 0.5, "undrafted": [0]}):
        case = chain_case(logits, min_probability=0.3, accepted=0.9, **options)
        device.prepare(case.call, dependent=False)()
        torch.cuda.synchronize()
        case.check()
