"""Test cases of each CUDA kernel: random inputs, and checks of its outputs up to rounding.

A case holds the launch and a check of what it wrote. Outputs and workspaces are poisoned, so that
whatever is not written, or read where nothing was written, shows. The same cases run on a GPU and,
small ones, on a CPU (``cuda_emulation``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import number_formats
import torch
from torch import Tensor

from hotloop.engine.rows import Rows
from hotloop.engine.sampling import _gumbel
from hotloop.engine.speculation import NgramDrafter
from hotloop.kernels import reference
from hotloop.kernels.cuda import prompt, step
from hotloop.kernels.cuda.attention import AttentionPlan
from hotloop.kernels.cuda.chain import extend_chain
from hotloop.kernels.cuda.dequantize import dequantize_call, dequantize_torch
from hotloop.kernels.cuda.launch import Call, Limits
from hotloop.kernels.cuda.linear import (
    Epilogue,
    GemmPlan,
    LinearPlan,
    NextOperand,
    NormEpilogue,
    Prefetch,
    PrescaledInput,
    Tuning,
)
from hotloop.kernels.cuda.packing import Format, high_plane, pack
from hotloop.kernels.cuda.prompt import GemmOutput
from hotloop.kernels.cuda.sample import MAX_CANDIDATES, sample
from hotloop.kernels.cuda.wide import WidePlan, WideTuning, pairs_units
from hotloop.kernels.linear import Fused, LinearSpec
from hotloop.quant import QTensor, parse_scheme
from hotloop.quant.encodings.compressed_tensors import FP4
from hotloop.quant.encodings.gguf import IQ4

BF16 = torch.bfloat16
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)

OURS: dict[str, dict[str, Any]] = {
    "bf16": {"kind": "bf16"},
    "fp8": {"kind": "fp8"},
    "int8": {"kind": "int8"},
    **{f"int4-g{g}": {"kind": "int4", "group_size": g} for g in (32, 64, 128)},
    **{
        f"int4-g{g}-asym": {"kind": "int4", "group_size": g, "zero": "offset"}
        for g in (32, 64, 128)
    },
    **{f"int8-g{g}": {"kind": "nested", "group_size": g} for g in (32, 128)},
}
"""Packed formats of the schemes that hotloop quantizes by: what ``Format`` takes beside shapes."""

OTHERS: dict[str, dict[str, Any]] = {
    "gptq": {"kind": "int4", "group_size": 128, "scale": "f16"},
    "awq": {"kind": "int4", "group_size": 64, "scale": "f16", "zero": "integer"},
    "int4-g32-zeros": {"kind": "int4", "group_size": 32, "zero": "integer"},
    "Q4_1": {"kind": "uint4", "group_size": 32, "scale": "f16", "zero": "offset"},
    "Q2_K": {"kind": "uint4", "group_size": 16, "scale": "two", "zero": "offset"},
    "Q3_K": {"kind": "int4", "group_size": 16, "scale": "two"},
    "Q4_K": {"kind": "uint4", "group_size": 32, "scale": "two", "zero": "offset"},
    "Q5_K": {"kind": "int8", "group_size": 32, "scale": "two", "zero": "offset"},
    "Q6_K": {"kind": "int8", "group_size": 16, "scale": "two"},
    "Q8_0": {"kind": "int8", "group_size": 32, "scale": "f16"},
    "IQ4_NL": {"kind": "lut4", "group_size": 32, "scale": "f16", "table": IQ4},
    "IQ4_XS": {"kind": "lut4", "group_size": 32, "scale": "two", "table": IQ4},
    "nvfp4": {"kind": "lut4", "group_size": 16, "row_scale": True, "table": FP4},
    "mxfp4": {"kind": "lut4", "group_size": 32, "table": FP4},
    "nf4": {"kind": "lut4", "group_size": 64, "scale": "f32", "table": NF4},
    "gptq-act-order": {"kind": "int4", "group_size": 128, "scale": "f16", "permuted": True},
    "int4-g16-act-order": {"kind": "int4", "group_size": 16, "permuted": True},
    "int4-g16-zeros": {"kind": "int4", "group_size": 16, "scale": "f16", "zero": "integer"},
    "uint4-g32-offsets": {"kind": "uint4", "group_size": 32, "scale": "f32", "zero": "offset"},
    "int8-g128-zeros": {"kind": "int8", "group_size": 128, "zero": "integer"},
    "fp8-g128": {"kind": "fp8", "group_size": 128},
    "fp8-blocks": {"kind": "fp8", "group_size": 128, "scale": "f32"},
}
"""Packed formats of what other tools quantize."""

KINDS = OURS | OTHERS
PLAIN_ROWS = {"kind": "bf16", "plain_rows": True}
"""Of whole tiles and units alone."""

DTYPES = {"bf16": BF16, "f16": torch.float16, "f32": torch.float32, "two": torch.int8}
SUM_STEP = 2.0**-18
"""Error of float32 sums of products, relative to the sum of their magnitudes."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A launch, its inputs (outputs of the one before it), its outputs, and their check.

    ``staging`` is a launch before it, which writes ``staged`` for it from the same inputs.
    """

    call: Call
    staging: Call | None = None
    staged: Tensor | None = None
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...]
    check: Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A packed weight, and the weight that it represents."""

    form: Format
    packed: Tensor
    scale: Tensor | None  # float32 [N], of eight-bit weights
    features: Tensor | None = None  # int32 [K], of permuted weights
    exact: Tensor  # float64 [N, K]
    quantized: QTensor | None = None


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return torch.full(shape, float("nan"), device=device).to(dtype)


def normal(generator: torch.Generator, *shape: int, std: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device) * std


def make_weight(name: str, n: int, k: int, generator: torch.Generator, *, paired=False) -> Weight:
    form = Format(**KINDS[name], n=n, k=k, paired=paired)
    if name in OTHERS:
        q = other_weight(form, bits={"Q5_K": 5, "Q6_K": 6}.get(name, 8)).to(generator.device)
        spec = LinearSpec(
            format=q.format, n=n, k=k, dtype=BF16, device="cuda", fused=True, paired=paired
        )
        kernel = Fused(spec)
        assert kernel.form == form, f"{kernel.form} for {form}"
        packed, scale_N, features_K = kernel.named(kernel.pack(q))
        return Weight(
            form=form,
            packed=packed,
            scale=scale_N,
            features=features_K,
            exact=number_formats.exactly(q),
            quantized=q,
        )
    q = parse_scheme(name.replace("bf16", "none")).quantize(
        normal(generator, n, k, std=k**-0.5).bfloat16()
    )
    if isinstance(q, Tensor):
        return Weight(form=form, packed=pack(form, q, None, None), scale=None, exact=q.double())
    scale_N = q.scale.reshape(-1) if form.has_channel_scales else None
    packed = pack(form, q.values, q.scale, q.offset)
    exact = number_formats.exactly(q)
    return Weight(form=form, packed=packed, scale=scale_N, exact=exact, quantized=q)


def high_plane_of(weight: Weight) -> tuple[Weight, Weight]:
    """The high plane of a nested weight, in its place, and the same int4 weight by itself."""
    assert weight.quantized is not None, "made by a scheme"
    q, form = weight.quantized.high, weight.form.high
    packed = high_plane(weight.form, weight.packed), pack(form, q.values, q.scale, None)
    inner, alone = (
        Weight(form=form, packed=each, scale=None, exact=number_formats.exactly(q), quantized=q)
        for each in packed
    )
    return inner, alone


def with_plain_rows(weight: Weight) -> Weight:
    """The same weight of bfloat16 as plain rows."""
    form = weight.form.with_plain_rows()
    assert form.plain_rows, f"{form} has padding"
    rows = dequantize_torch(weight.form, weight.packed)
    return dataclasses.replace(weight, form=form, packed=pack(form, rows, None, None))


def other_weight(form: Format, bits: int) -> QTensor:
    """Makes a random weight that has this packed format."""
    super_size = None
    if form.scale == "two":  # several units, where K has as many
        super_size = 2 * form.unit_k if form.k % (2 * form.unit_k) == 0 else form.unit_k
    scale = DTYPES[form.scale]
    if form.row_scale:
        super_size, scale = form.k, number_formats.E4M3
    return number_formats.weight(
        form.kind,
        form.n,
        form.k,
        group=form.group_size,
        scale=scale,
        zero=form.zero,
        super_size=super_size,
        super_dtype=torch.float32 if form.row_scale else torch.float16,
        table=form.table,
        permuted=form.permuted,
        bits=bits,
        seed=form.n,
    )


def assert_within(y: Tensor, exact: Tensor, allowed: Tensor, what: str) -> None:
    assert not y.isnan().any(), f"{what}: {int(y.isnan().sum())} NaNs"
    worst = ((y.double() - exact).abs() / allowed.clamp(min=1e-300)).max()
    assert worst <= 1, f"{what}: {worst:.3g} times the error that rounding explains"


def linear_case(
    weight: Weight,
    rows: int,
    generator: torch.Generator,
    *,
    epilogue: Epilogue = "plain",
    norm: bool = False,
    bias: bool = False,
    residual: bool = False,
    norm_epilogue: bool = False,
    tuning: Tuning,
    limits: Limits,
    wide: WideTuning | None = None,
    x_MK: Tensor | None = None,
    residual_MN: Tensor | None = None,
    prefetch: Prefetch | None = None,
    next_operand: NextOperand | None = None,
) -> Case:
    """A matrix product by ``linear.cu``, or with ``wide`` by ``wide.cu``.

    Its check is not of what it stores as ``next_operand``, which ``wide.cu`` alone does.
    """
    device, form, eps = generator.device, weight.form, 1e-5
    common = {"form": form, "rows": rows, "epilogue": epilogue, "norm": norm}
    common |= {"tuning": tuning, "limits": limits}
    plan: GemmPlan = LinearPlan(**common)
    if wide is not None:
        plan = WidePlan(**common, wide=wide, has_next=next_operand is not None)
    x = normal(generator, rows, form.k).bfloat16() if x_MK is None else x_MK
    taken: Tensor | PrescaledInput = x
    if norm:
        before = normal(generator, rows, form.k).bfloat16() if x_MK is None else x_MK
        weight_K = (1 + normal(generator, form.k, std=0.2)).bfloat16()
        x, squares = reference.norm_epilogue(before, weight_K)
        taken = PrescaledInput(x=x, squares=squares, eps=eps)
    bias_N = normal(generator, form.n).bfloat16() if bias else None
    added = normal(generator, rows, plan.width).bfloat16() if residual else residual_MN
    dtype = torch.float32 if epilogue == "logits" else torch.bfloat16
    first, beside = (5, 9) if epilogue == "part" else (0, 0)  # features of other parts
    all_y = poisoned(rows, first + plan.width + beside, dtype=dtype, device=device)
    y = all_y[:, first : first + plan.width]
    gates = normal(generator, rows, plan.width) if epilogue == "gated" else None
    best = None
    if epilogue == "logits":
        best = (
            poisoned(rows, plan.candidates, dtype=torch.float32, device=device),
            torch.full((rows, plan.candidates), -1, dtype=torch.int32, device=device),
        )
    following = make_norm_epilogue(plan.width, rows, generator) if norm_epilogue else None
    beyond = 64  # more workspace than needed, which must stay as it is
    partial = poisoned(plan.n_partial + beyond, dtype=torch.float32, device=device)
    counters = torch.zeros(plan.n_counters + beyond, dtype=torch.int32, device=device)
    staging = operand = None
    if isinstance(plan, WidePlan):
        operand = torch.full((plan.operand_bytes,), 0xFF, dtype=torch.uint8, device=device)
        staging = plan.staging(taken, operand, weight.features)
    call = plan.call(
        taken,
        all_y,
        weight.packed,
        weight.scale,
        weight.features,
        bias_N=bias_N,
        residual=added,
        first=first,
        gate=gates,
        norm_epilogue=following,
        best=best,
        prefetch=prefetch,
        partial=partial,
        counters=counters,
        operand=operand,
        next_operand=next_operand,
    )

    def check() -> None:
        what = f"{call.kernel.name} [{rows}, {form.k}] x [{form.n}, {form.k}]"
        factor = torch.ones(rows, 1, dtype=torch.float64, device=device)
        if norm:
            factor = (before.double().square().mean(1, keepdim=True) + eps).rsqrt()
        sums = x.double() @ weight.exact.T * factor
        error = SUM_STEP * (x.double().abs() @ weight.exact.abs().T * factor)
        if bias_N is not None:
            sums = sums + bias_N.double()
        if epilogue == "swiglu":
            (gate, up), (gate_error, up_error) = sums.chunk(2, 1), error.chunk(2, 1)
            silu = gate * gate.sigmoid()
            sums = silu * up
            error = 1.1 * gate_error * up.abs() + silu.abs() * up_error + 2**-20 * sums.abs()
        if gates is not None:
            silu = gates.double() * gates.double().sigmoid()
            sums, error = silu * sums, silu.abs() * (error + 2**-20 * sums.abs())
        if added is not None:
            sums = sums + added.double()
        half_ulp = torch.finfo(dtype).eps / 2
        allowed = error + half_ulp * 1.001 * sums.abs() + 2**-22 * sums.abs()
        assert_within(y, sums, allowed, what)
        twin = reference.fused_linear(
            x,
            weight.exact,
            squares=squares if norm else None,
            eps=eps,
            bias=bias_N,
            paired=epilogue == "swiglu",
            gate=gates,
            residual=added,
            dtype=dtype,
        )
        assert_within(twin, sums, allowed, f"{what}: its twin in plain torch")
        assert int(all_y.isnan().sum()) == rows * (first + beside), f"{what}: beside its part"
        if following is not None:
            assert_norm_epilogue(y, following, what)
        if best is not None:
            value, index = best
            assert ((index >= 0) & (index < form.n)).all(), f"{what}: indices of the best"
            found = y.gather(1, index.long()).where(value > -torch.inf, value)
            assert torch.equal(value, found), f"{what}: values of the best"
            assert torch.equal(value.amax(1), y.amax(1)), f"{what}: the best of all"
        assert not counters.any(), f"{what}: counters are zeros again"
        assert partial[plan.n_partial :].isnan().all(), f"{what}: beyond the workspace"

    inputs = [x, *([squares] if norm else []), *([] if added is None else [added])]
    inputs += [] if gates is None else [gates]
    outputs = [y, *(best or ()), *(outputs_of(following) if following else ())]
    return Case(
        call=call,
        staging=staging,
        staged=operand,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        check=check,
    )


NEXT_OPERANDS = {
    ("plain", "plain rows"): 3,
    ("int8", "plain rows"): 4,
    ("swiglu", "plain rows"): 6,
    ("attention", "plain rows"): 12,
    ("plain", "int4-g128"): 4,  # of two units and of one
    ("int8", "int4-g32-asym"): 3,
    ("swiglu", "int4-g128"): 5,
    ("attention", "int4-g128"): 1,
    ("attention", "mxfp4"): 4,
    ("plain", "fp8"): 5,
    ("swiglu", "Q5_K"): 2,
    ("plain", "int8-g32"): 3,
}
"""The kernels that compute x of a matrix product, the weight of the latter, and the parts of K."""


def next_operand_cases(
    by: str, reader: str, rows: int, seed: int, device: torch.device | str, limits: Limits
) -> tuple[Case, Case, Call, Tensor, Tensor]:
    """The kernels that compute x of a matrix product, which store it as that product reads it.

    Args:
        by: What computes x: a product by plain rows, or in int8, with a norm epilogue; one with
            SwiGLU; or attention.
        reader: The weight of the product that reads x; with ``by`` one of ``NEXT_OPERANDS``.
        rows: M, a multiple of 3.
        seed: Of inputs.
        device: Of all tensors.
        limits: Of the device.

    Returns:
        The kernel without and with that, the launch that stages what the first has stored, and both
        operands.
    """
    norm, kind = by in ("plain", "int8"), PLAIN_ROWS if reader == "plain rows" else KINDS[reader]
    form, tuning = Format(**kind, n=64, k=768), Tuning(warps=NEXT_OPERANDS[by, reader])
    wide = WideTuning(pairs=rows <= 32 and pairs_units(form), direct=True)
    plan = WidePlan(form=form, rows=rows, norm=norm, tuning=tuning, limits=limits, wide=wide)
    # Rows that do not exist are not written.
    staged, stored = (
        torch.zeros(plan.operand_bytes, dtype=torch.uint8, device=device) for _ in range(2)
    )
    cases = []
    for next_operand in (None, plan.next_operand(stored)):
        generator = torch.Generator(device).manual_seed(seed)
        if by == "attention":
            attention = AttentionPlan(
                batch=rows // 3,
                tokens=3,
                n_heads=form.k // 64,
                n_kv_heads=form.k // 128,
                head_dim=64,
                n_positions=40,
                stores_operand=next_operand is not None,
            )
            positions = [i % 37 for i in range(rows // 3)]
            case = attention_case(attention, positions, generator, next_operand=next_operand)
        else:
            paired = by == "swiglu"
            name, n = ("int8" if by == "int8" else "bf16"), (2 * form.k if paired else form.k)
            weight = make_weight(name, n, 96, generator, paired=paired)
            case = linear_case(
                with_plain_rows(weight) if name == "bf16" else weight,
                rows,
                generator,
                epilogue="swiglu" if paired else "plain",
                residual=norm,
                norm_epilogue=norm,
                tuning=Tuning(warps=3 if name == "bf16" else 2),
                limits=limits,
                wide=WideTuning(tiles=2 if paired else 1, splits=1 if paired else 2),
                next_operand=next_operand,
            )
        cases.append(case)
    plainly, directly = cases
    x: Tensor | PrescaledInput = plainly.outputs[0]
    if norm:
        _, prescaled, squares = plainly.outputs
        x = PrescaledInput(x=prescaled, squares=squares, eps=1e-5)
    return plainly, directly, plan.staging(x, staged), staged, stored


def make_norm_epilogue(k: int, rows: int, generator: torch.Generator) -> NormEpilogue:
    device = generator.device
    prescaled = PrescaledInput.empty(rows, k, 1e-5, device)
    for tensor in (prescaled.x, prescaled.squares):
        tensor.fill_(torch.nan)
    weight_K = (1 + normal(generator, k, std=0.2)).bfloat16()
    return NormEpilogue(weight=weight_K, prescaled=prescaled)


def outputs_of(norm_epilogue: NormEpilogue) -> tuple[Tensor, Tensor]:
    return norm_epilogue.prescaled.x, norm_epilogue.prescaled.squares


def assert_norm_epilogue(y: Tensor, norm_epilogue: NormEpilogue, what: str) -> None:
    x, squares = reference.norm_epilogue(y, norm_epilogue.weight)
    assert torch.equal(norm_epilogue.prescaled.x, x), f"{what}: the prescaled input"
    torch.testing.assert_close(norm_epilogue.prescaled.squares, squares, msg=f"{what}: squares")


def dequantize_case(weight: Weight) -> Case:
    form = weight.form
    rows = poisoned(form.n, form.k, dtype=torch.bfloat16, device=weight.packed.device)

    def check() -> None:
        wanted = dequantize_torch(form, weight.packed, weight.features)
        assert torch.equal(rows, wanted), f"rows of {form}"

    call = dequantize_call(form, weight.packed, rows, weight.features)
    return Case(call=call, outputs=(rows,), check=check)


def attention_case(
    plan: AttentionPlan,
    positions: list[int],
    generator: torch.Generator,
    *,
    norms: bool = False,
    next_operand: NextOperand | None = None,
) -> Case:
    device, eps = generator.device, 1e-6
    B, T, H, J = plan.batch, plan.tokens, plan.n_heads, plan.n_kv_heads
    C, E = plan.n_positions, plan.head_dim
    qkv = normal(generator, B * T, (H + 2 * J) * E).bfloat16()
    qkv[:, : H * E] *= 3  # so that some positions matter much more than others
    keys, values = (normal(generator, B + 1, J, C, E).bfloat16() for _ in range(2))
    seats = torch.randperm(B + 1, generator=generator, device=device)[:B]
    positions_B = torch.tensor(positions, device=device)
    cos, sin = rotations(C, E, device)
    q_norm, k_norm = (
        (1 + normal(generator, E, std=0.2)).bfloat16() if norms else None for _ in range(2)
    )
    out = poisoned(B * T, H * E, dtype=torch.bfloat16, device=device)
    beyond = 64  # more room than it needs, which is to stay as it is
    counters = torch.zeros(plan.n_counters + beyond, dtype=torch.int32, device=device)
    partial = poisoned(plan.n_partial + beyond, dtype=torch.float32, device=device)
    before = keys.clone(), values.clone()
    call = plan.call(
        qkv,
        out,
        keys,
        values,
        seats,
        positions_B,
        cos,
        sin,
        q_norm_E=q_norm,
        k_norm_E=k_norm,
        eps=eps,
        partial=partial,
        counters=counters,
        next_operand=next_operand,
    )

    def check() -> None:
        what = f"{call.kernel.name} {plan} at {positions}"
        wanted = [t.clone() for t in before]
        norms_of_heads = {"q_norm": q_norm, "k_norm": k_norm, "eps": eps}
        settings = {"n_heads": H, "scale": plan.scale, "window": plan.window, **norms_of_heads}
        of_seats = [t[seats] for t in wanted]
        reference.fused_attention(qkv, *of_seats, positions_B, cos, sin, **settings)
        for all_seats, these in zip(wanted, of_seats, strict=True):
            all_seats[seats] = these
        written = (wanted[0] != before[0]) | (wanted[1] != before[1])
        for now, then, want in zip((keys, values), before, wanted, strict=True):
            assert torch.equal(now[~written], then[~written]), f"{what}: elsewhere in the cache"
            torch.testing.assert_close(now, want, rtol=2**-7, atol=1e-6)
        assert torch.equal(values, wanted[1]), f"{what}: values are only copied"
        assert not counters.any(), f"{what}: counters are zeros again"
        assert partial[plan.n_partial :].isnan().all(), f"{what}: beyond the workspace"
        # The sums in float64, of the keys and values that the kernel itself left.
        q = qkv.view(B, T, -1, E)[:, :, :H]
        q = q if q_norm is None else reference.rms_norm(q, q_norm, eps)
        at = (positions_B[:, None] + torch.arange(T, device=device)).clamp(max=C - 1)
        q = reference.apply_rope(q, cos[at], sin[at]).double()
        k, v = (t[seats].double().repeat_interleave(H // J, 1) for t in (keys, values))
        scale = E**-0.5 if plan.scale is None else plan.scale
        scores = torch.einsum("bthe,bhce->bhtc", q, k) * scale
        behind = at[:, None, :, None] - torch.arange(C, device=device)
        hidden = (behind < 0) | (behind >= (plan.window or C + T))
        share = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        wide = torch.einsum("bhtc,bhce->bthe", share, v).reshape(B * T, H * E)
        size = torch.einsum("bhtc,bhce->bthe", share, v.abs()).reshape(B * T, H * E)
        assert_within(out, wide, 2**-8 * wide.abs() + 2**-6 * size, what)
        typical = ((out.double() - wide).abs() / size).mean()
        assert typical < 2**-9, f"{what}: mean error {typical:.2g} of the values' size"
        assert not counters.any(), f"{what}: counters are not zero again"

    return Case(call=call, inputs=(qkv,), outputs=(out, keys, values), check=check)


def rotations(n: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [n, head_dim]."""
    angles = torch.outer(torch.arange(n), 1e4 ** -(torch.arange(0, head_dim, 2) / head_dim))
    angles = torch.cat((angles, angles), 1).to(device)
    return angles.cos(), angles.sin()


def gemm_output_of(
    rows: int, n: int, generator: torch.Generator, *, scale: bool, bias: bool
) -> tuple[GemmOutput, Tensor, Tensor]:
    """Makes a GEMM's output, its exact result in float64 [rows, n], and the size of its terms."""
    y = normal(generator, rows, n).bfloat16()
    scale_N = 1 + normal(generator, n, std=0.2) if scale else None
    bias_N = normal(generator, n).bfloat16() if bias else None
    exact = y.double() * (1 if scale_N is None else scale_N.double())
    size = exact.abs()
    if bias_N is not None:
        exact, size = exact + bias_N.double(), size + bias_N.double().abs()
    return GemmOutput(y=y, scale=scale_N, bias=bias_N), exact, size


def add_norm_case(
    rows: int, k: int, generator: torch.Generator, *, scale: bool, bias: bool, adds: bool = True
) -> Case:
    device, eps = generator.device, 1e-5
    x = normal(generator, rows, k).bfloat16()
    weight = (1 + normal(generator, k, std=0.2)).bfloat16()
    gemm, exact, size = gemm_output_of(rows, k, generator, scale=scale, bias=bias)
    total, normed = (poisoned(rows, k, dtype=torch.bfloat16, device=device) for _ in range(2))

    def check() -> None:
        before = total if adds else x
        if adds:
            wanted = x.double() + exact
            allowed = 2**-8 * wanted.abs() + 2**-22 * (size + x.double().abs())
            assert_within(total, wanted, allowed, "sum")
        wide = before.double()
        factor = (wide.square().mean(1, keepdim=True) + eps).rsqrt()
        wanted = wide * factor * weight.double()
        assert_within(normed, wanted, 2**-7 * wanted.abs(), "norm")  # rounded twice
        typical = (normed.double() - wanted).abs().sum() / wanted.abs().sum()
        assert typical < 2**-8.5, f"norm: a mean error of {typical:.2g}"

    call = prompt.add_norm(
        x,
        weight,
        eps,
        normed,
        gemm=gemm if adds else None,
        sum_MK=total if adds else None,
    )
    outputs = (total, normed) if adds else (normed,)
    return Case(call=call, inputs=(x, gemm.y), outputs=outputs, check=check)


def rope_case(
    rows: int,
    heads: tuple[int, int],
    head_dim: int,
    position: int,
    generator: torch.Generator,
    *,
    scale: bool = False,
    bias: bool = False,
    norms: bool = False,
) -> Case:
    device, eps = generator.device, 1e-6
    (H, J), E, C = heads, head_dim, position + rows + 3
    gemm, exact, _ = gemm_output_of(rows, (H + 2 * J) * E, generator, scale=scale, bias=bias)
    cos, sin = rotations(C, E, device)
    q_norm, k_norm = (
        (1 + normal(generator, E, std=0.2)).bfloat16() if norms else None for _ in range(2)
    )
    q, k, v = (poisoned(rows, n * E, dtype=torch.bfloat16, device=device) for n in (H, J, J))
    S, seat = 3, 1
    keys, values = (normal(generator, S, J, C, E).bfloat16() for _ in range(2))
    before = keys.clone(), values.clone()
    here = slice(position, position + rows)

    def check() -> None:
        parts = exact.bfloat16().view(1, rows, -1, E).split((H, J, J), dim=2)
        turned = zip(parts, (q_norm, k_norm), strict=False)
        wanted = [
            part if norm is None else reference.rms_norm(part, norm, eps) for part, norm in turned
        ]
        wanted = [reference.apply_rope(x, cos[None, here], sin[None, here])[0] for x in wanted]
        found = (x.view(rows, -1, E) for x in (q, k, v))
        for got, want in zip(found, (*wanted, parts[2][0]), strict=True):
            torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6)
            assert (got == want).double().mean() > 0.97, "more than roundings differ"
        for now, then, new in zip((keys, values), before, (k, v), strict=True):
            then[seat, :, here] = new.view(rows, J, E).transpose(0, 1)
            assert torch.equal(now, then), "not the same in the cache, or elsewhere in it"

    call = prompt.rope(
        gemm,
        prompt.Heads(q=q, k=k, v=v),
        keys,
        values,
        *(torch.tensor([scalar], device=device) for scalar in (seat, position)),
        cos,
        sin,
        q_norm_E=q_norm,
        k_norm_E=k_norm,
        eps=eps,
    )
    return Case(call=call, inputs=(gemm.y,), outputs=(q, k, v, keys, values), check=check)


def swiglu_case(rows: int, f: int, generator: torch.Generator, *, scale: bool, bias: bool) -> Case:
    gemm, exact, size = gemm_output_of(rows, 2 * f, generator, scale=scale, bias=bias)
    out = poisoned(rows, f, dtype=torch.bfloat16, device=generator.device)

    def check() -> None:
        gate, up = exact.chunk(2, 1)
        wanted = gate * gate.sigmoid() * up
        gate_size, up_size = size.chunk(2, 1)
        allowed = 2**-8 * wanted.abs() + 2**-20 * gate_size * up_size
        assert_within(out, wanted, allowed, "swiglu")

    call = prompt.swiglu(gemm, out)
    return Case(call=call, inputs=(gemm.y,), outputs=(out,), check=check)


def embed_case(rows: int, vocab: int, k: int, generator: torch.Generator, *, int8: bool) -> Case:
    device = generator.device
    ids = torch.randint(vocab, (rows,), generator=generator, device=device)
    for i, beyond in enumerate((-1, vocab, 2**62)[: rows - 1]):  # never memory beyond the table
        ids[i] = beyond
    table, scale = normal(generator, vocab, k).bfloat16(), None
    if int8:
        q = parse_scheme("int8").quantize(table)
        table, scale = q.values, q.scale.reshape(-1).float()
    x = poisoned(rows, k, dtype=torch.bfloat16, device=device)
    following = make_norm_epilogue(k, rows, generator)

    def check() -> None:
        assert torch.equal(x, reference.embed(ids, table, scale, torch.bfloat16)), "embed"
        assert_norm_epilogue(x, following, "embed")

    call = step.embed(ids, table, scale, x, following)
    return Case(call=call, inputs=(ids,), outputs=(x, *outputs_of(following)), check=check)


def add_case(rows: int, k: int, generator: torch.Generator) -> Case:
    added, residual = (normal(generator, rows, k).bfloat16() for _ in range(2))
    x = poisoned(rows, k, dtype=torch.bfloat16, device=generator.device)
    following = make_norm_epilogue(k, rows, generator)

    def check() -> None:
        assert torch.equal(x, residual + added), "add"
        assert_norm_epilogue(x, following, "add")

    call = step.add(added, residual, x, following)
    outputs = (x, *outputs_of(following))
    return Case(call=call, inputs=(added, residual), outputs=outputs, check=check)


def all_reduce_cases(ranks: int, rows: int, k: int, generator: torch.Generator) -> list[list[Case]]:
    """Makes successive all-reduces of every rank, of many rows and of one, more than twice each."""
    device, capacity = generator.device, rows + 1
    nbytes = step.inbox_bytes(ranks, capacity, k)
    inboxes = [torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(ranks)]
    addresses = [inbox.data_ptr() for inbox in inboxes]
    exchanges = [
        step.Exchange.over(r, addresses, capacity=capacity, k=k, device=device, kept=inboxes)
        for r in range(ranks)
    ]
    cases: list[list[Case]] = [[] for _ in range(ranks)]
    for n in (rows, 1, rows, 1, 1, rows):
        parts = normal(generator, ranks, n, k).bfloat16()
        residual = normal(generator, n, k).bfloat16()
        for own, exchange in zip(cases, exchanges, strict=True):
            own.append(_all_reduce_case(parts, residual.clone(), exchange, generator))
    return cases


def _all_reduce_case(
    parts: Tensor, residual: Tensor, exchange: step.Exchange, generator: torch.Generator
) -> Case:
    mine = parts[exchange.rank].clone()
    rows, k = mine.shape
    x = poisoned(rows, k, dtype=torch.bfloat16, device=mine.device)
    following = make_norm_epilogue(k, rows, generator)

    def check() -> None:
        total = sum(part.float() for part in parts)
        assert torch.equal(x, (residual.float() + total).bfloat16()), (
            f"sum of {exchange.rank}"
        )  # which is so kept alive
        assert_norm_epilogue(x, following, "sum")

    call = step.all_reduce(mine, residual, x, following, exchange)
    outputs = (x, *outputs_of(following))
    return Case(call=call, inputs=(mine, residual), outputs=outputs, check=check)


def argmax_over_ranks_cases(
    ranks: int, rows: int, n: int, generator: torch.Generator
) -> list[list[Case]]:
    """Makes successive argmaxes of every rank, among few different values."""
    device, vocab = generator.device, 1000
    inboxes = [
        torch.zeros(step.inbox_bytes(ranks, rows), dtype=torch.uint8, device=device)
        for _ in range(ranks)
    ]
    addresses = [inbox.data_ptr() for inbox in inboxes]
    exchanges = [
        step.Exchange.over(r, addresses, capacity=rows, device=device, kept=inboxes)
        for r in range(ranks)
    ]
    cases: list[list[Case]] = [[] for _ in range(ranks)]
    for m in (rows, 1, rows, 1, rows):
        value = torch.randint(4, (ranks, m, n), generator=generator, device=device).float()
        value[-1] = -torch.inf  # as of padding alone
        if ranks > 1:
            value[0, 0] = 3
            value[1, 0] = 3
        index = torch.rand(ranks, m, vocab, generator=generator, device=device)
        index = index.argsort(-1)[..., :n].int()
        everywhere = index.long() + vocab * torch.arange(ranks, device=device)[:, None, None]
        if m > 1:
            value[ranks // 2, 1, n // 2] = torch.nan
        largest = value.amax((0, 2))
        ranked = everywhere.where(value == largest[:, None], ranks * vocab)
        wanted = ranked.amin((0, 2)).where(largest.abs() < torch.inf, -1)
        for own, exchange in zip(cases, exchanges, strict=True):
            own.append(_argmax_over_ranks_case(value, index, vocab, wanted, exchange))
    return cases


def _argmax_over_ranks_case(
    value: Tensor, index: Tensor, vocab: int, wanted: Tensor, exchange: step.Exchange
) -> Case:
    best = value[exchange.rank].clone(), index[exchange.rank].clone()
    ids = torch.full_like(wanted, -2)

    def check() -> None:
        assert torch.equal(ids, wanted), f"choice of {exchange.rank}"  # which is so kept alive

    call = step.argmax_over_ranks(best, ids, exchange, first=exchange.rank * vocab)
    return Case(call=call, inputs=best, outputs=(ids,), check=check)


def argmax_case(rows: int, n: int, generator: torch.Generator) -> Case:
    device = generator.device
    # Few different values, so that there are ties; indices in any order.
    value = torch.randint(5, (rows, n), generator=generator, device=device).float()
    for row, bad in zip(value[1:], (-torch.inf, torch.inf, torch.nan, -torch.nan), strict=False):
        row[n // 2 if bad > -torch.inf else slice(None)] = bad
    index = torch.randperm(rows * n, generator=generator, device=device).view(rows, n).int()
    ids = torch.full((rows,), -2, device=device)

    def check() -> None:
        logits = torch.full((rows, rows * n), -torch.inf, device=device)
        wanted = reference.argmax(logits.scatter_(1, index.long(), value))
        assert torch.equal(ids, wanted), "the first of the largest, of those that are finite"

    call = step.argmax((value, index), ids)
    return Case(call=call, inputs=(value, index), outputs=(ids,), check=check)


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Rows with something in them, drafts for some, and the same without kernels."""

    state: Rows
    twin: Rows
    drafts: Tensor | None  # [rows, k]

    @classmethod
    def random(cls, rows: int, k: int, generator: torch.Generator) -> _Rows:
        device, last = generator.device, 20
        made = [Rows(rows + 1, last + 1, k, device) for _ in range(2)]
        history = torch.randint(4, made[0].history.shape, generator=generator, device=device)
        positions = torch.randint(last + 1, (rows + 1,), generator=generator, device=device)
        positions[0] = last
        for state in made:
            state.history.copy_(history)
            state.positions.copy_(positions)
        drafts = torch.randint(-1, 4, (rows, k + 2), generator=generator, device=device)
        return cls(state=made[0], twin=made[1], drafts=drafts[:, :k] if k else None)


def next_tokens_case(rows: int, k: int, generator: torch.Generator) -> Case:
    of = _Rows.random(rows, k, generator)
    state = of.state
    ids, positions = (state.positions.new_full((rows, k + 1), -7) for _ in range(2))

    def check() -> None:
        expected_ids, expected = of.twin.next_tokens(rows, of.drafts)
        assert torch.equal(ids, expected_ids), "ids"
        assert torch.equal(positions, expected), "positions"

    call = step.next_tokens(
        state.history, state.positions, of.drafts, ids, positions, last_position=state.last
    )
    inputs = (state.history, state.positions)
    return Case(call=call, inputs=inputs, outputs=(ids, positions), check=check)


def ngram_draft_case(width: int, k: int, n_words: int, generator: torch.Generator) -> Case:
    """Makes rows whose newest tokens are at any position, the first two and the last among them.

    The fewer words there are, the more often three tokens stood there before.
    """
    device, rows = generator.device, 14
    state = Rows(rows + 1, width, k, device)
    random = {"generator": generator, "device": device}
    state.history.copy_(torch.randint(n_words, state.history.shape, **random))
    state.positions.copy_(torch.randint(width, (rows + 1,), **random))
    state.positions[:7] = torch.tensor([0, 1, 2, 3, 4, 2, width - 1])
    state.history[2:5] = 1  # the first places at which two, then three tokens can be found
    drafts = state.history.new_full((rows, k), -7)

    def check() -> None:
        expected = NgramDrafter(state).propose(rows, k, length=width)
        assert torch.equal(drafts, expected), f"drafts of {n_words} words"

    call = step.ngram_draft(state.history, state.positions, drafts)
    inputs = (state.history, state.positions)
    return Case(call=call, inputs=inputs, outputs=(drafts,), check=check)


def accept_case(rows: int, k: int, generator: torch.Generator) -> Case:
    of = _Rows.random(rows, k, generator)
    state = of.state
    ids = torch.randint(4, (rows, k + 1), generator=generator, device=generator.device)
    if of.drafts is not None and rows > 1:  # one kept to its end, another not at all
        of.drafts[0], of.drafts[1, 0] = ids[0, :k], -1
    counts = [state.positions.new_full((rows,), -7) if k else None for _ in range(2)]

    def check() -> None:
        n_kept, n_drafts = of.twin.accept(ids, of.drafts)
        if n_kept is not None and n_drafts is not None:
            assert torch.equal(counts[0], n_kept), "kept"
            assert torch.equal(counts[1], n_drafts), "drafts"
        assert torch.equal(state.history, of.twin.history), "history"
        assert torch.equal(state.positions, of.twin.positions), "positions"

    call = step.accept(
        ids, of.drafts, state.history, state.positions, n_kept_B=counts[0],
        n_drafts_B=counts[1], last_position=state.last,
    )  # fmt: skip
    outputs = tuple(count for count in counts if count is not None)
    return Case(call=call, inputs=(ids,), outputs=(*outputs, state.history), check=check)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sampling options of a sequence."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


DRAWS = {
    "temperature": Options(temperature=0.8, seed=1),
    "lowest temperature": Options(temperature=1e-40, top_k=9),
    "highest temperature": Options(temperature=1e30, top_k=9, top_p=0.9, seed=2**40),
    "top-k": Options(top_k=50, seed=2**62 + 7),
    "top-k of one": Options(top_k=1),
    "top-k of most": Options(top_k=290, temperature=1.7),
    "top-p": Options(top_p=0.9, seed=3),
    "least top-p": Options(top_p=1e-30),
    "most top-p": Options(top_p=0.9999, temperature=2.0),
    "min-p": Options(min_p=0.05, seed=4),
    "most min-p": Options(min_p=1.0),
    "all": Options(temperature=0.8, top_k=50, top_p=0.95, min_p=0.01, seed=5),
    "top-k and top-p of equals": Options(temperature=1e30, top_k=40, top_p=0.5, seed=6),
}


def hard_scores(vocab: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Makes scores [B, T, V] of a different kind for each sequence."""
    x = normal(generator, tokens, vocab)
    peaked, masked, close = x.clone(), 2 * x, 1e-6 * x
    peaked[:, vocab // 3] += 40
    close[:, vocab // 2] = 100  # beside which the others are equal
    masked[:, ::3] = -torch.inf
    rounded = (8 * x).bfloat16().float()
    spread = x * 10 ** (4 * normal(generator, tokens, vocab)).clamp(max=30)
    equal = torch.zeros_like(x)
    kinds = (2.5 * x, 0.01 * x, peaked, masked, close, rounded, spread, equal, equal - 1e4)
    return torch.stack(kinds)


def sample_case(
    scores_BTV: Tensor,
    options: Sequence[Options],
    *,
    positions_BT: Tensor | None = None,
    max_candidates: int = MAX_CANDIDATES,
) -> Case:
    """Makes a case of sampling, checked against ``engine.sampling`` in float64."""
    (B, T, V), device = scores_BTV.shape, scores_BTV.device

    def per_sequence(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([getattr(o, name) for o in options], dtype=dtype, device=device)

    temperature, top_p, min_p = (
        per_sequence(name, torch.float32) for name in ("temperature", "top_p", "min_p")
    )
    top_k, seed = (per_sequence(name, torch.int64) for name in ("top_k", "seed"))
    top_k = torch.where(top_k > 0, top_k, V).clamp(max=V)
    if positions_BT is None:
        positions_BT = torch.arange(B * T, device=device).view(B, T) * 7 + 3
    best = scores_BTV.argmax(-1)
    ids = torch.full((B, T), -1, device=device)

    def check() -> None:
        wanted = drawn(scores_BTV, best, positions_BT, temperature, top_k, top_p, min_p, seed)
        for b, t in (ids != wanted).nonzero().tolist():
            raise AssertionError(
                f"{int(ids[b, t])} and not {int(wanted[b, t])} of {V} at {b}, {t}: {options[b]}"
            )

    call = sample(
        scores_BTV,
        best,
        positions_BT,
        ids,
        temperature_B=temperature,
        top_k_B=top_k,
        top_p_B=top_p,
        min_p_B=min_p,
        seed_B=seed,
        max_candidates=max_candidates,
    )
    # Late inputs are whole tensors in memory, and scores can lie apart.
    late = (*((scores_BTV,) if scores_BTV.is_contiguous() else ()), best, positions_BT)
    return Case(call=call, inputs=late, outputs=(ids,), check=check)


def drawn(
    scores_BTV: Tensor,
    best_BT: Tensor,
    positions_BT: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    seed_B: Tensor,
) -> Tensor:
    """Returns the right tokens, by weights and sums in float64, without ties."""
    V = scores_BTV.shape[-1]
    temperature, top_k, top_p, min_p = (
        options[:, None, None] for options in (temperature_B, top_k_B, top_p_B, min_p_B)
    )
    scaled = scores_BTV - scores_BTV.amax(-1, keepdim=True)
    scaled = scaled / torch.where(temperature > 0, temperature, 1.0)
    best_first, ids = scaled.sort(dim=-1, descending=True, stable=True)
    among = (torch.arange(V, device=scaled.device) < top_k).expand_as(scaled).clone()
    weights = best_first.double().exp() * among
    sums = weights.cumsum(-1)
    among &= (sums - weights < top_p.double() * sums[..., -1:]) | (top_p == 1)
    among[..., 0] = True
    kept = torch.zeros_like(among).scatter(-1, ids, among) & (scaled.exp() >= min_p)
    values = (scaled + _gumbel(seed_B, positions_BT, V)).where(kept, -torch.inf)
    return torch.where((temperature > 0)[..., 0], values.argmax(-1), best_BT)


def chain_case(
    logits_BV: Tensor,
    *,
    min_probability: float,
    accepted: float | None = None,
    own: float | None = None,
    ids: Sequence[int] | None = None,
    undrafted: Sequence[int] = (),
    handle: int | None = None,
) -> Case:
    """Makes a case of a chain's next draft, checked against its specification in float64.

    Args:
        logits_BV: float32, of which rows may have any stride.
        min_probability: The lowest probability of a chain that goes on.
        accepted: That of the drafts before; None if it is the first.
        own: The probability of every row's newest draft; None for that of the logits.
        ids: Negative where there is no draft; None for random ones.
        undrafted: Rows that do not count.
        handle: See ``extend_chain``.
    """
    (B, V), device = logits_BV.shape, logits_BV.device
    ids_B = torch.tensor(ids or [(37 * b + 5) % V for b in range(B)], device=device)
    own_B = None if own is None else torch.full((B,), own, device=device)
    undrafted_B = torch.tensor([b in undrafted for b in range(B)], device=device)
    min_probability_1 = torch.tensor([min_probability], device=device)
    accepted_B = torch.full((B,), torch.nan if accepted is None else accepted, device=device)
    # Of the first draft nothing of the chain before is read.
    state = torch.tensor([0, accepted is None], dtype=torch.int32, device=device)
    expected_B = own_B
    if expected_B is None:
        chosen = ids_B.clamp(min=0)[:, None]
        expected_B = logits_BV.double().softmax(-1).gather(1, chosen)[:, 0]
    expected_B = expected_B.where(ids_B >= 0, 0.0)
    before_B = None if accepted is None else accepted_B.clone()
    expected_B, mean = reference.extend_chain(expected_B, before_B, undrafted_B)

    def check() -> None:
        torch.testing.assert_close(accepted_B, expected_B.float(), rtol=1e-4, atol=0)
        assert abs(float(mean) / min_probability - 1) > 1e-3, "the case is not at the limit"
        assert state.tolist() == [0, int(mean < min_probability)]

    call = extend_chain(
        logits_BV,
        ids_B,
        own_B,
        undrafted_B,
        min_probability_1,
        accepted_B,
        state,
        is_first=accepted is None,
        handle=handle,
    )
    # Late inputs are whole tensors that a launch does not write.
    late = (logits_BV,) if logits_BV.is_contiguous() else ()
    late += (ids_B, min_probability_1, *(() if own_B is None else (own_B,)))
    return Case(call=call, inputs=late, outputs=(accepted_B, state), check=check)
