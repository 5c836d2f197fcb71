"""The fused step with its kernels' own source run on a CPU: against the decoder, and itself."""

import ctypes
import dataclasses
import gc
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from agreement import ALTERNATIVES, assert_top_two_agree
from cuda_emulation import EmulatedDevice, needs_compiler
from number_formats import random_weight
from test_engine_memory import resident_bytes
from thread_group import ThreadGroup, ThreadRanks, ThreadRunner
from tiny_models import N_TOKENS, write_random
from torch import Tensor

from hotloop import LLM, EngineConfig, Grammar, SamplingParams
from hotloop.engine import fused
from hotloop.engine.core import Admit, Features, MoveRow
from hotloop.engine.fused import FusedForward, Peers, fused_forms
from hotloop.engine.gemm_prefill import GemmPrefill
from hotloop.engine.memory import predict_memory
from hotloop.engine.prompt import FusedPrefill
from hotloop.engine.sampling import Sampler
from hotloop.engine.setup import _resolve_execution
from hotloop.errors import NumericsError, UnsupportedError
from hotloop.kernels.attention import torch_attention
from hotloop.kernels.cuda.sample import sample_kernel
from hotloop.models import names
from hotloop.models.cache import KVCache
from hotloop.models.decoder import Decoder
from hotloop.models.families import FAMILIES, read_config
from hotloop.parallel.collectives import Group
from hotloop.quant import QTensor, parse_scheme
from hotloop.quant.auto import Auto
from hotloop.registry import resolve
from hotloop.weights.load import load_weights
from hotloop.weights.source import RandomSource, Request, schemes_by_name

pytestmark = needs_compiler

CPU = torch.device("cpu")
N_POSITIONS = 80
CHUNK = 20
PROMPTS = ([7], list(range(2, 19)), [260, 3] * 10)
FREELY = SamplingParams(max_new_tokens=7, ignore_eos=True, logprobs=ALTERNATIVES)
MODELS = {
    **{name: (name, {"head_dim": 64}) for name in FAMILIES},
    "untied": ("LlamaForCausalLM", {"tie_word_embeddings": False, "head_dim": 96}),
    "odd heads": (
        "LlamaForCausalLM",
        {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64, "hidden_size": 96},
    ),
    "no shared heads": (
        "Qwen2ForCausalLM",
        {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128},
    ),
    "wide heads": (
        "Qwen3ForCausalLM",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256},
    ),
    "two kinds of layers": (
        "Qwen3ForCausalLM",
        {"head_dim": 64, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
}
SCHEMES = {
    "none": "none",
    "int8": "int8",
    "int8-g32": "int8",
    "fp8": "fp8",
    "int4-g32": "int8",
    "int4-g64-asym": "int4-g64",
    "int4-g128": "none",
    "int4-g32-asym": "fp8",
}
"""Of the projections, and of the head beside them."""
STORED = ["awq", "int8-g128-zero", "fp8-blocks"]
"""Number formats of other tools (``number_formats``), of the projections."""
MIXED = {
    "v apart": {"": "awq", "v_proj": "int8-g128", "down_proj": "int8-g128"},
    "three formats": {
        "": "awq",
        "q_proj": "int8",
        "k_proj": "gptq",
        "gate_proj": "fp8",
        "up_proj": "Q4_1",
    },
    "Q4_K_M": {"": "Q4_K", "v_proj": "Q6_K", "down_proj": "Q6_K"},
    "tables": {"": "nvfp4", "up_proj": "nf4"},
    "act-order": {"": "gptq-act-order"},
}
"""Formats by the name of a projection, and so several within a matrix product."""


# One step.


class Model:
    """A decoder with random weights, in any of three ways, and its cache."""

    def __init__(
        self, keys: dict[str, Any], quant: str, head: str, dtype: torch.dtype, *, fused: bool
    ) -> None:
        self.config = config = read_config(keys)
        self.decoder = Decoder(
            config, n_positions=N_POSITIONS, attention=torch_attention, device=CPU
        )
        stored = None
        if quant in STORED or quant in MIXED:
            stored, quant = quant, "none"
        schemes = schemes_by_name(config, parse_scheme(quant), parse_scheme(head))
        if stored is not None:
            for name, shape in names.linear_weights(config).items():
                format_ = stored_weight(stored, name, shape).format
                schemes[name] = Auto(stored=format_, k=shape[1])
        load_weights(
            self.decoder,
            config,
            VariedSource(stored),
            shard=config.shards(1)[0],
            adds_biases=True,
            schemes=schemes,
            dtype=dtype,
            device=CPU,
            fused=fused,
        )
        self.cache = KVCache(
            kv_heads=config.kv_heads,
            n_seats=2,
            n_positions=N_POSITIONS,
            dtype=dtype,
            device=CPU,
        )

    @torch.inference_mode()
    def logits(self, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        hidden = self.decoder(
            ids_BT,
            positions_BT,
            self.cache,
            seats_B=torch.arange(len(ids_BT)),
            length=N_POSITIONS,
        )
        return self.decoder.logits(hidden)


class VariedSource(RandomSource):
    """Norms and biases that matter, and matrices that keep activations at their size."""

    def __init__(self, stored: str | None = None) -> None:
        super().__init__(0, torch.float32, CPU)
        self.stored = stored

    def tensor(self, name: str, shape: tuple[int, ...], **options: Any) -> Tensor:
        tensor = super().tensor(name, shape, **options)
        return tensor + 0.2 * noise(name, tensor.shape)

    def pieces(self, request: Request) -> Iterator[Tensor | QTensor]:
        name, shape = request.name, request.shape
        if self.stored and ".layers." in name:
            yield stored_weight(self.stored, name, shape)
        else:
            yield request.scheme.quantize(noise(name, shape) * (1.5 * shape[1] ** -0.5))


def stored_weight(stored: str, name: str, shape: tuple[int, int]) -> QTensor:
    by_name = MIXED.get(stored, {"": stored})
    format_ = by_name.get(name.split(".")[-1], by_name[""])
    weight = random_weight(format_, *shape, seed=crc32(name.encode()))
    factor = 2.0 ** round(math.log2(shape[1] ** -0.5))
    two_level = weight.super_scale is not None
    scaled = ("super_scale", "super_offset") if two_level else ("scale",)
    parts = {part: getattr(weight, part) for part in scaled}
    return dataclasses.replace(
        weight,
        **{part: (t.float() * factor).to(t.dtype) for part, t in parts.items() if t is not None},
    )


def noise(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(crc32(name.encode())))


def positions_from(*first: int, T: int) -> Tensor:
    return torch.tensor(first)[:, None] + torch.arange(T)


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        *((name, "int4-g32-asym") for name in MODELS),
        *(("LlamaForCausalLM", quant) for quant in (*SCHEMES, *STORED)),
        ("LlamaForCausalLM", "v apart"),
        ("Qwen2ForCausalLM", "three formats"),
        ("LlamaForCausalLM", "Q4_K_M"),
        ("LlamaForCausalLM", "tables"),
        ("LlamaForCausalLM", "act-order"),
    ],
)
@torch.inference_mode()
def test_a_step_is_as_near_the_exact_one_as_the_decoder_is_in_bfloat16(name, quant, monkeypatch):
    monkeypatch.setattr("hotloop.engine.prompt.MAX_PASS_PREFILL_TOKENS", 0)
    architecture, changes = MODELS[name]
    whole_groups = {"hidden_size": 128, "intermediate_size": 128}
    sizes = whole_groups if quant in ("int4-g128", "int4-g64-asym", *STORED, *MIXED) else {}
    if quant == "Q4_K_M":  # whole super-blocks
        sizes = {"hidden_size": 256, "intermediate_size": 256}
    keys = dict(resolve("architecture", FAMILIES, architecture).tiny) | sizes | changes
    exact, eager, fast = (
        Model(keys, quant, SCHEMES.get(quant, "none"), dtype, fused=fused)
        for dtype, fused in (
            (torch.float32, False),
            (torch.bfloat16, False),
            (torch.bfloat16, True),
        )
    )
    vocab = exact.config.vocab_size
    device = EmulatedDevice()
    forward = FusedForward(fast.decoder, fast.cache, device, n_tokens=vocab - 3)
    prompt = FusedPrefill(forward, fast.decoder, fast.cache, device, chunk=CHUNK, sharded=False)
    generator = torch.Generator().manual_seed(1)
    found = []
    for first, T in (((0, 0), 31), ((31, 31), 1), ((32, 20), 4), ((36, 21), 1)):
        ids = torch.randint(vocab, (2, T), generator=generator)
        positions = positions_from(*first, T=T)
        wanted, plainly = exact.logits(ids, positions), eager.logits(ids, positions)
        if T > fused.MAX_TOKENS:  # prompts, of which only the last tokens have logits
            last = []
            for seat, row in enumerate(ids):
                *_, logits_of_last = [
                    prompt(row[start : start + CHUNK], start, seat) for start in range(0, T, CHUNK)
                ]
                last.append(logits_of_last())
            logits = torch.stack(last)
            assert distance(logits, wanted[:, -1:]) < 2 * distance(plainly, wanted)
            caches = [torch.stack(m.cache.layer(2))[..., :T, :] for m in (exact, eager, fast)]
            assert distance(caches[2], caches[0]) < 1.3 * distance(caches[1], caches[0])
        else:
            logits, best = forward(ids, positions, torch.arange(len(ids)))
            assert torch.equal(best, logits[..., : vocab - 3].argmax(-1))
            assert distance(logits, wanted) < 2 * distance(plainly, wanted), f"{T} at {first}"
            found.append((wanted, plainly, logits))
    # Random lookup tables and permutations differ from matrix to matrix.
    launched = {part for kernel, _ in device.launched for part in kernel.split("_")}
    assert ("part" in launched) == (quant in MIXED)
    assert ("gated" in launched) == (quant in ("three formats", "tables", "act-order"))
    # Of one token alone, errors of the same size differ by a fifth from seed to seed.
    wanted, plainly, logits = (torch.cat(x, dim=1) for x in zip(*found, strict=True))
    error, usual = distance(logits, wanted), distance(plainly, wanted)
    assert error < 1.3 * usual, f"{error:.3g} and not {usual:.3g}"


def distance(x: Tensor, wanted: Tensor) -> Tensor:
    return (x - wanted).square().mean().sqrt()


@torch.inference_mode()
def test_a_row_has_the_same_bits_in_steps_of_any_size():
    keys = dict(resolve("architecture", FAMILIES, "LlamaForCausalLM").tiny) | {"head_dim": 64}
    ids = torch.randint(128, (2, 16), generator=torch.Generator().manual_seed(2))
    results = []
    for sizes in ((16,), (1,) * 16, (2, 3, 11), (7, 8, 1)):
        model = Model(keys, "int4-g32", "int8", torch.bfloat16, fused=True)
        model.logits(ids, positions_from(0, 0, T=16))  # a prompt
        forward = FusedForward(model.decoder, model.cache, EmulatedDevice(), n_tokens=128)
        parts, at = [], 16
        for T in sizes:
            taken = ids[:, at - 16 : at - 16 + T]
            parts.append(forward(taken, positions_from(at, at, T=T), torch.arange(2))[0])
            at += T
        results.append(torch.cat(parts, dim=1))
    for other in results[1:]:
        assert torch.equal(other, results[0])


@torch.inference_mode()
def test_chunks_are_replayed_at_the_captured_length_above_their_own(monkeypatch):
    replayed = []

    class Graph:
        def __init__(self, program) -> None:
            self.program = program

        def pool(self) -> None:
            pass

        def replay(self) -> None:
            replayed.append(self)
            self.program()

    monkeypatch.setattr(
        "hotloop.engine.graphs.capture", lambda program, *_, **__: (Graph(program), None)
    )
    keys = dict(resolve("architecture", FAMILIES, "LlamaForCausalLM").tiny) | {"head_dim": 64}
    model = Model(keys, "int4-g32", "int8", torch.bfloat16, fused=True)
    prefill = GemmPrefill(model.decoder, model.cache, EmulatedDevice(), chunk=40, sharded=False)
    ids = torch.randint(128, (N_POSITIONS,), generator=torch.Generator().manual_seed(3))
    chunks = (0, 8), (8, 30), (30, 52), (52, N_POSITIONS - 1)  # padded, the last one would not fit

    def run() -> tuple[Tensor, ...]:
        last = [prefill(ids[start:end], start, 1) for start, end in chunks]
        return *last, *(tensor[1, :, : chunks[-1][1]].clone() for tensor in model.cache.layer(2))

    launched = run()
    prefill.captures = True
    prefill.warm_up()
    for found, expected in zip(run(), launched, strict=True):
        # PyTorch's product of 40 rows on a CPU rounds otherwise than that of 22.
        assert distance(found, expected) < 0.02 * expected.square().mean().sqrt()
    first, *later = replayed
    assert len(later) == 2
    assert first is not later[0]
    assert later[0] is later[1], "the start is read from the device"


@torch.inference_mode()
def test_the_last_layer_of_a_prompt_computes_only_the_last_rows(monkeypatch):
    keys = dict(resolve("architecture", FAMILIES, "LlamaForCausalLM").tiny) | {"head_dim": 64}
    model = Model(keys, "int4-g32", "int8", torch.bfloat16, fused=True)
    prefill = GemmPrefill(model.decoder, model.cache, EmulatedDevice(), chunk=40, sharded=False)
    ids = torch.randint(128, (N_POSITIONS,), generator=torch.Generator().manual_seed(3))
    chunks = (0, 40), (40, 56), (56, 71)  # of which the last one is too short
    multiply, heights = torch.mm, []

    def counted(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        heights.append(len(a))
        return multiply(a, b, out=out)

    def run(last_rows: int) -> tuple[Tensor, ...]:
        heights.clear()
        monkeypatch.setattr("hotloop.engine.gemm_prefill.LAST_ROWS", last_rows)
        last = [prefill(ids[start:end], start, 1) for start, end in chunks]
        return *last, *(tensor[1, :, :71].clone() for tensor in model.cache.layer(2))

    monkeypatch.setattr(torch, "mm", counted)
    expected = run(N_POSITIONS)
    assert set(heights) == {40, 16, 15}
    for found, wanted in zip(run(8), expected, strict=True):
        # PyTorch's product of 8 rows on a CPU rounds otherwise than that of 40.
        assert distance(found, wanted) < 0.02 * wanted.square().mean().sqrt()
    assert heights.count(8) == 2 * 3, "o, gate and up, and down of two chunks"


@torch.inference_mode()
def test_what_is_not_a_number_stays_in_its_sequence_and_chooses_no_token():
    keys = dict(resolve("architecture", FAMILIES, "LlamaForCausalLM").tiny) | {"head_dim": 64}
    model = Model(keys, "int8", "int8", torch.bfloat16, fused=True)
    forward = FusedForward(model.decoder, model.cache, EmulatedDevice(), n_tokens=128)
    ids = torch.arange(40).view(2, 20)
    model.logits(ids[:, :18], positions_from(0, 0, T=18))
    last, positions = ids[:, 18:], positions_from(18, 18, T=2)
    sound, best = forward(last, positions, torch.arange(len(last)))
    model.cache.k0[0, :, 3] = torch.nan
    poisoned, chosen = forward(last, positions, torch.arange(len(last)))
    assert poisoned[0].isnan().all()
    assert chosen[0].tolist() == [-1, -1]
    assert torch.equal(poisoned[1], sound[1])
    assert torch.equal(chosen[1], best[1])


@torch.inference_mode()
def test_many_rows_on_an_h200_take_a_kernel_of_their_own_and_have_the_same_bits():
    keys = dict(resolve("architecture", FAMILIES, "LlamaForCausalLM").tiny) | {"head_dim": 64}
    model = Model(keys, "int4-g32", "none", torch.bfloat16, fused=True)
    h200 = dataclasses.replace(EmulatedDevice.limits, warpgroups=True, bytes_per_s=4.8e12)
    rows = torch.arange(18).view(2, 9)
    logits, best = {}, {}
    for limits in (EmulatedDevice.limits, h200):
        device = EmulatedDevice(limits)
        forward = FusedForward(model.decoder, model.cache, device, n_tokens=128, n_layers=1)
        logits[limits], best[limits] = forward(rows, 3 + rows % 9, torch.arange(2))
        names = [name for name, _ in device.launched]
        assert sum(name.startswith("wide_") for name in names) == (5 if limits is h200 else 0)
    for results in (logits, best):
        one, other = results.values()
        assert torch.equal(one, other)


@torch.inference_mode()
@pytest.mark.parametrize("scheme", ["none", "int4-g128"])
def test_what_computes_many_rows_stores_them_as_the_next_product_reads_them(scheme):
    keys = dict(resolve("architecture", FAMILIES, "LlamaForCausalLM").tiny)
    keys |= {"hidden_size": 512, "intermediate_size": 512, "head_dim": 64}
    keys |= {"num_attention_heads": 8, "num_key_value_heads": 2}
    model = Model(keys, scheme, "none", torch.bfloat16, fused=True)
    h200 = dataclasses.replace(EmulatedDevice.limits, warpgroups=True, bytes_per_s=4.8e12)
    rows = torch.arange(18).view(2, 9)
    results = []
    for limits in (EmulatedDevice.limits, h200):
        device = EmulatedDevice(limits)
        forward = FusedForward(model.decoder, model.cache, device, n_tokens=128, n_layers=2)
        results.append(forward(rows, 3 + rows % 9, torch.arange(2)))
    names = [name for name, _ in device.launched]
    assert sum(name.startswith("stage_x") for name in names) == 1  # of the embedding
    assert sum(name.startswith("wide_") for name in names) == 9
    assert sum("_next" in name for name in names) == 8  # all of two layers but for qkv
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@torch.inference_mode()
def test_after_sums_over_ranks_a_kernel_stages_many_rows_and_sums_them_too():
    keys = dict(resolve("architecture", FAMILIES, "LlamaForCausalLM").tiny)
    keys |= {"hidden_size": 512, "intermediate_size": 512, "head_dim": 64}
    keys |= {"num_attention_heads": 8, "num_key_value_heads": 2}
    model = Model(keys, "int4-g128", "none", torch.bfloat16, fused=True)
    h200 = dataclasses.replace(EmulatedDevice.limits, warpgroups=True, bytes_per_s=4.8e12)
    rows, results = torch.arange(18).view(2, 9), []
    for limits in (EmulatedDevice.limits, h200):
        device = EmulatedDevice(limits)
        (peers,) = ThreadRanks(1).run(lambda group: Peers.of(group, model.decoder, 0, rows=18))
        forward = FusedForward(
            model.decoder, model.cache, device, n_tokens=128, n_layers=1, sharded=True, peers=peers
        )
        results.append(forward(rows, 3 + rows % 9, torch.arange(2)))
    names = [name for name, _ in device.launched if name.startswith("wide_int4")]
    assert ["_norm" in name for name in names] == [True, False, True, False]
    assert [name for name in names if "_direct" not in name] == names[::2]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@torch.inference_mode()
def test_all_kernels_but_the_first_may_overlap_their_predecessor():
    keys = dict(resolve("architecture", FAMILIES, "Qwen3ForCausalLM").tiny) | {"head_dim": 64}
    model, device = Model(keys, "none", "none", torch.bfloat16, fused=True), EmulatedDevice()
    forward = FusedForward(model.decoder, model.cache, device, n_tokens=128)
    forward(torch.ones(1, 1, dtype=torch.int64), positions_from(3, T=1), torch.arange(1))
    names, overlap = zip(*device.launched, strict=True)
    assert overlap == (False, *[True] * (5 * 3 + 2))
    assert names[0] == "embed_bf16"
    assert names[-1] == "argmax_step"


@torch.inference_mode()
def test_the_fused_all_reduce_is_a_kernel_of_the_chain():
    keys = dict(resolve("architecture", FAMILIES, "LlamaForCausalLM").tiny) | {"head_dim": 64}
    model, device = Model(keys, "none", "none", torch.bfloat16, fused=True), EmulatedDevice()
    (peers,) = ThreadRanks(1).run(lambda group: Peers.of(group, model.decoder, 0, rows=4))
    forward = FusedForward(
        model.decoder, model.cache, device, n_tokens=128, sharded=True, peers=peers
    )
    alone = FusedForward(model.decoder, model.cache, EmulatedDevice(), n_tokens=128)
    ids, positions = torch.ones(1, 1, dtype=torch.int64), positions_from(3, T=1)
    (logits, best), (wanted, _) = (f(ids, positions, torch.arange(1)) for f in (forward, alone))
    assert best == logits[..., :128].argmax(-1)
    assert distance(logits, wanted) < 0.02 * wanted.std(), "a part is rounded before it is added"
    names, overlap = zip(*device.launched, strict=True)
    assert overlap == (False, *[True] * (7 * model.config.n_layers + 2))
    assert names[-1] == "argmax_over_ranks_step"
    assert names.count("all_reduce_1") == 2 * model.config.n_layers


@torch.inference_mode()
def test_after_a_collective_one_kernel_waits_and_the_next_may_overlap():
    keys = dict(resolve("architecture", FAMILIES, "LlamaForCausalLM").tiny) | {"head_dim": 64}
    model, device = Model(keys, "none", "none", torch.bfloat16, fused=True), EmulatedDevice()
    forward = FusedForward(model.decoder, model.cache, device, n_tokens=128, sharded=True)
    forward(torch.ones(1, 1, dtype=torch.int64), positions_from(3, T=1), torch.arange(1))
    first, *layers, head = device.launched
    assert not first[1]
    assert head[1]
    assert len(layers) == 7 * model.config.n_layers
    for name, overlaps in layers:
        assert overlaps == (name != "add_total")
    assert [name for name, _ in layers[3::7]] == ["add_total"] * model.config.n_layers
    assert [name for name, _ in layers[6::7]] == ["add_total"] * model.config.n_layers


# The sampler beside it.


DRAWN = {
    "temperature": SamplingParams(temperature=0.9),
    "top-k and top-p": SamplingParams(temperature=0.8, top_k=20, top_p=0.9),
    "min-p": SamplingParams(temperature=1.2, min_p=0.1),
    "penalty": SamplingParams(temperature=0.9, top_k=9, repetition_penalty=1.7),
    "adjusted": SamplingParams(
        temperature=0.8, presence_penalty=0.5, frequency_penalty=0.3, logit_bias=((3, 2), (5, -9))
    ),
    "none": SamplingParams(),
}


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("names", [("min-p", "none", "top-k and top-p"), tuple(DRAWN)])
@torch.inference_mode()
def test_its_kernel_draws_what_torch_draws(names, first, T):
    device, n_tokens = EmulatedDevice(), 300
    plain, fast = (Sampler(7, n_tokens, CPU, launcher=launcher) for launcher in (None, device))
    params = [DRAWN[name] for name in names]
    generator = torch.Generator().manual_seed(4)
    for row, options in enumerate(params, start=first):
        for sampler in (plain, fast):
            sampler.admit(row, options, 5 + row, range(0, n_tokens, 3))
    drafts = torch.randint(n_tokens, (len(params), 2), generator=generator)
    for positions in (torch.full((len(params), T), at) for at in (3, 4)):
        # Rows that no token has; of a drafter's first step the last position alone.
        logits = 3 * torch.randn(len(params), 5, n_tokens + 20, generator=generator)[:, -T:]
        few = torch.zeros(len(params), T, -(-n_tokens // 32), dtype=torch.int32)
        few[..., 3:5] = 0b1001  # of 4 tokens, where top-k keeps more
        for masks in (None, few):
            choices = [
                sampler.sample(
                    logits,
                    positions,
                    first,
                    sampler.relevant(Features.of(params)),
                    drafts,
                    masks_BTW=masks,
                ).ids
                for sampler in (plain, fast)
            ]
            assert torch.equal(*choices)
        assert set(choices[0].flatten().tolist()) <= {96, 99, 128, 131}
    assert {name for name, _ in device.launched} == {sample_kernel().name}


@pytest.mark.parametrize("logprobs", [None, 3])
def test_its_sampler_distinguishes_no_ways_to_truncate(logprobs):
    fast = Sampler(1, 300, CPU, launcher=EmulatedDevice())
    drawn = [dataclasses.replace(p, logprobs=logprobs) for p in DRAWN.values() if not p.greedy]
    plainly = {fast.relevant(Features.of([p])) for p in drawn if not p.adjusts_logits}
    assert plainly == {Features(draw=True, logprobs=logprobs is not None)}
    assert len({fast.relevant(Features.of([p])) for p in drawn}) == 2


# The whole engine.


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotloop.engine.runner.device_of", lambda _: EmulatedDevice())
    monkeypatch.setattr("hotloop.engine.setup.fused_unavailable_reason", lambda _: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(
        tmp_path_factory.mktemp("model"), head_dim=64, vocab_size=N_TOKENS + 20, n_layers=2
    )


@pytest.fixture
def engine(folder: Path) -> Iterator[Any]:
    def make(**options: Any) -> LLM:
        return LLM(str(folder), max_seq_len=64, **options)

    return make


def answers(llm: LLM, prompts: Any = PROMPTS, **options: Any) -> list[Any]:
    return [(g.token_ids, g.logprobs) for g in llm.generate(prompts, FREELY, **options)]


def test_it_is_taken_by_default_and_says_so(engine, monkeypatch):
    monkeypatch.setattr(EmulatedDevice, "compile_seconds", 5.0)  # for an engine before this one
    llm = engine(quant="int4-g32")
    described = llm.describe()
    assert (described.execution, described.config.execution) == ("fused", "auto")
    assert (described.config.name, described.name) == ("int4-g32/auto", "int4-g32/fused")
    kernels = dict.fromkeys(("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), "int4/fused")
    assert described.kernels == kernels | {"head": "int8/fused", "attention": "attention/fused"}
    assert described.notes == ()
    assert described.compile_cache == "warm", "nothing was compiled"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quant", ["none", "int8", "int8-g32"])
def test_described_and_predicted_bytes_of_a_self_draft_are_those_resident(quant, tied, tmp_path):
    biases, nested = {"attention_bias": True}, quant == "int8-g32"
    model = write_random(tmp_path, head_dim=64, tie_word_embeddings=tied, n_layers=1, **biases)
    draft = "self" if nested else "self-int4-g32"
    config = EngineConfig(model=str(model), quant=quant, max_seq_len=16, draft=draft)
    plain = predict_memory(dataclasses.replace(config, draft="none"))
    predicted, llm = predict_memory(config), LLM(config)
    runner = llm._runner._model
    resident = resident_bytes(torch.nn.ModuleList([runner.decoder, runner.draft_decoder]))
    assert llm.describe().weight_bytes == predicted.weights_bytes == resident
    assert predicted.draft_bytes == resident - plain.weights_bytes
    assert (predicted.draft_bytes == 0) == nested
    assert llm.describe().kernels["draft/gate_up_proj"] == "int4/fused"
    assert ("draft/head" in llm.describe().kernels) == (quant == "none")


@pytest.mark.parametrize("quant", ["none", "int8", "fp8", "int4-g64-asym"])
@pytest.mark.parametrize("head", ["auto", "none", "int4-g32"])
@pytest.mark.parametrize("tied", [True, False])
def test_described_and_predicted_bytes_are_those_resident(quant, head, tied, tmp_path):
    model = write_random(
        tmp_path, head_dim=64, tie_word_embeddings=tied, attention_bias=True, n_layers=1
    )
    config = EngineConfig(
        model=str(model), quant=quant, head=head, max_seq_len=16, draft="ngram", draft_tokens=1
    )
    predicted, llm = predict_memory(config), LLM(config)
    resident = resident_bytes(llm._runner._model.decoder)
    assert llm.describe().weight_bytes == predicted.weights_bytes == resident


def test_plain_rows_give_the_tokens_of_packed_weights_and_take_no_second_copy(engine, monkeypatch):
    found, taken = [], []
    for plain in (True, False):
        monkeypatch.setattr("hotloop.kernels.cuda.tuning.reads_plain_rows", lambda _, p=plain: p)
        llm = engine(draft="exit-1", draft_policy="always", draft_tokens=2)
        decoder = llm._runner._model.decoder
        linears = [linear for block in decoder.blocks for linear in block.linears.values()]
        forms = {form for linear in linears for form in fused_forms(linear)}
        assert {form.plain_rows for form in forms} == {plain}
        taken.append(predict_memory(llm.config).workspace_bytes)
        found.append(answers(llm))
    largest = max(form.n * form.k for form in forms)
    assert taken[1] - taken[0] == 2 * largest, "nothing is dequantized"
    assert found[0] == found[1]


def test_greedy_tokens_agree_with_the_plain_engine_to_the_top_two(engine):
    plain = engine(execution="eager", dtype="float32")
    assert_top_two_agree(*(llm.generate(list(PROMPTS), FREELY) for llm in (engine(), plain)))


def test_a_prompt_gives_the_same_by_steps_and_by_many_rows(engine, monkeypatch):
    found = []
    for short in (0, 64):
        monkeypatch.setattr("hotloop.engine.prompt.MAX_PASS_PREFILL_TOKENS", short)
        found.append(engine(quant="int4-g32").generate(list(PROMPTS), FREELY))
    for one, other in zip(*found, strict=True):
        here, there = (dict(g.logprobs[0].top) for g in (one, other))
        both = here.keys() & there.keys()
        assert len(both) >= ALTERNATIVES - 1
        assert max(abs(here[i] - there[i]) for i in both) < 0.1


def test_what_other_prompts_left_behind_changes_nothing(engine, monkeypatch):
    monkeypatch.setattr("hotloop.engine.prompt.MAX_PASS_PREFILL_TOKENS", 0)
    llm, prompts = engine(), list(PROMPTS)
    assert answers(llm, prompts[::-1])[::-1] == answers(llm, prompts)


def test_neighbors_change_nothing(engine):
    together, alone = engine(max_batch_size=4), engine()
    for sampling in ({}, {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 3}):
        assert answers(together, **sampling) == [
            answers(alone, [prompt], **sampling)[0] for prompt in PROMPTS
        ]


def test_short_prompts_share_steps_and_have_the_bits_of_each_alone(engine, monkeypatch):
    together, alone = (engine(quant="int4-g32", max_batch_size=n) for n in (4, 1))
    run, admitted = together._runner.run, []

    def watched(command: Any) -> Any:
        if isinstance(command, Admit):
            admitted.append(len(command.prompts))
        return run(command)

    monkeypatch.setattr(together._runner, "run", watched)
    prompts = [*map(list, PROMPTS[1:]), [9] * 24, list(range(40, 22, -1))]  # three steps each
    expected = [answers(alone, [prompt])[0] for prompt in prompts]
    assert answers(together, prompts) == expected
    assert admitted == [4]

    steps = together._runner._model._fused_prefill._passes

    class Replay:
        """Runs what a GPU would replay."""

        def __init__(self, n: int) -> None:
            self.n, self.logits = n, steps._run(n).clone()

        def replay(self) -> None:
            self.logits.copy_(steps._run(self.n))

    graphs = {n: Replay(n) for n in (1, 2, 4)}
    steps._captured = {n: (graph, graph.logits) for n, graph in graphs.items()}
    assert answers(together, prompts[1:]) == expected[1:], "a scratch seat is the fourth"


def test_windows_share_steps_and_have_the_bits_of_each_alone(engine):
    together, alone = (engine(quant="int4-g32", max_batch_size=n) for n in (3, 1))
    question = [9, *PROMPTS[1]]
    windows = [*([*question, answer, 5] for answer in (40, 41, 42)), [260, 3] * 11, [7, 8]]
    expected = [next(alone.score([window], full=True)) for window in windows]
    for options in ({"share_prefixes": True}, {}, {"full": True}):
        for score, theirs in zip(together.score(windows, **options), expected, strict=True):
            assert score.token_logprobs.equal(theirs.token_logprobs)
            assert score.top1.equal(theirs.top1)
            assert "full" not in options or score.log_probs.equal(theirs.log_probs)


def test_a_grammar_is_followed_beside_drafts_and_changes_no_neighbor(engine):
    grammar = Grammar(kind="regex", source="(the token )+[a-z]{1,9}")
    follow = SamplingParams(max_new_tokens=12, grammar=grammar, logprobs=2)
    plain, drafted = (
        engine(max_batch_size=2, draft=draft, draft_policy="always", draft_tokens=3)
        for draft in ("none", "ngram")
    )
    (free,) = answers(plain, [PROMPTS[1]])
    for sampling in ({}, {"temperature": 0.9, "top_k": 20, "seed": 3}):
        found = []
        for llm in (plain, drafted):
            beside = llm.stream([PROMPTS[0]], follow, **sampling)
            begun = next(beside)
            assert answers(llm, [PROMPTS[1]]) == [free]
            *_, last = (begun, *beside)
            found.append((last.generation.token_ids, last.generation.logprobs))
            assert last.generation.text.startswith("the token"[: len(last.generation.text)])
        assert found[0] == found[1]


def test_rows_that_move_as_requests_end_change_nothing(tmp_path, monkeypatch):
    model = str(write_random(tmp_path, head_dim=64, n_layers=2))
    sampling = SamplingParams(ignore_eos=True, logprobs=2, temperature=0.9, top_k=20, seed=3)
    together = LLM(model, max_seq_len=64, max_batch_size=3, draft="exit-1", draft_policy="always")
    alone = LLM(model, max_seq_len=64)
    run, commands = together._runner.run, []
    monkeypatch.setattr(together._runner, "run", lambda c: commands.append(type(c)) or run(c))
    options = [dataclasses.replace(sampling, max_new_tokens=n) for n in (8, 14, 14)]
    asked = list(zip(PROMPTS, options, strict=True))
    streams = [together.stream([prompt], params) for prompt, params in asked]
    begun = [next(stream) for stream in streams]  # all run before the first one ends
    assert not any(delta.generation for delta in begun)
    found = [[*stream][-1].generation for stream in streams]
    expected = [alone.generate([prompt], params)[0] for prompt, params in asked]
    assert MoveRow in commands
    assert [(g.token_ids, g.logprobs) for g in found] == [
        (g.token_ids, g.logprobs) for g in expected
    ]


# A GPU tries each with each.
@pytest.mark.parametrize(
    ("draft", "draft_tokens"),
    [("ngram", 1), ("exit-1", 3), ("self-int4-g32,ngram", 3), ("self", 3), ("itself", 7)],
)
def test_drafts_change_neither_tokens_nor_their_probabilities(folder, engine, draft, draft_tokens):
    quant = "int8-g32" if draft == "self" else "int8"
    plain = engine(quant=quant, max_batch_size=2)
    drafted = engine(
        quant=quant,
        max_batch_size=2,
        draft=str(folder) if draft == "itself" else draft,
        draft_policy="always",
        draft_tokens=draft_tokens,
    )
    for sampling in ({}, {"temperature": 0.9, "repetition_penalty": 1.2, "seed": 3}):
        assert answers(drafted, **sampling) == answers(plain, **sampling)
    assert drafted.generate(list(PROMPTS), FREELY)[0].speculation.n_steps > 0


@pytest.mark.parametrize("draft", ["none", "exit-1", "self-int4-g32", "itself"])
def test_one_kernel_draws_for_the_model_and_its_drafter(folder, engine, monkeypatch, draft):
    device = EmulatedDevice()
    monkeypatch.setattr("hotloop.engine.runner.device_of", lambda _: device)
    monkeypatch.setattr(Sampler, "_draw", None)
    llm = engine(draft=str(folder) if draft == "itself" else draft, draft_policy="always")
    llm.generate([[7]], FREELY, max_new_tokens=4, temperature=0.9, seed=3)
    overlaps = {overlap for name, overlap in device.launched if name == sample_kernel().name}
    assert overlaps == {False}, "it comes after torch's own"


@pytest.mark.parametrize("quant", ["none", "int4-g32"])
@pytest.mark.parametrize("by", ["inboxes", "collectives"])
def test_ranks_agree_with_one_to_the_top_two(quant, by, engine, monkeypatch):
    monkeypatch.setattr("hotloop.engine.llm.RankGroup", ThreadRunner)
    if by == "collectives":
        monkeypatch.setattr(ThreadGroup, "inboxes", Group.inboxes)
    devices: list[EmulatedDevice] = []

    def device_of(_: object) -> EmulatedDevice:
        devices.append(EmulatedDevice())
        return devices[-1]

    monkeypatch.setattr("hotloop.engine.runner.device_of", device_of)
    one, two = engine(quant=quant), engine(quant=quant, tensor_parallel=2, max_batch_size=2)
    assert two.describe().kernels["o_proj"] == one.describe().kernels["o_proj"]
    assert_top_two_agree(*(llm.generate(list(PROMPTS), FREELY) for llm in (one, two)))
    _, *ranks = ({name for name, _ in device.launched} for device in devices)
    ours, others = {"all_reduce_2", "argmax_over_ranks_step"}, {"add_total"}
    wanted, avoided = (ours, others) if by == "inboxes" else (others, ours)
    assert all(wanted <= names and not avoided & names for names in ranks)
    used = "fused" if by == "inboxes" else "threads"
    assert two.describe().kernels["all_reduce"] == f"all_reduce/{used}"


# GPUs try each with two ranks and more.
@pytest.mark.parametrize("draft", ["self-int4-g32", "self"])
def test_drafts_of_ranks_change_neither_tokens_nor_their_probabilities(draft, engine, monkeypatch):
    monkeypatch.setattr("hotloop.engine.llm.RankGroup", ThreadRunner)
    monkeypatch.setattr("hotloop.engine.runner.device_of", lambda _: EmulatedDevice())
    quant = "int8-g32" if draft == "self" else "int8"
    options = {"quant": quant, "tensor_parallel": 2, "max_batch_size": 2}
    plain = engine(**options)
    drafted = engine(draft=draft, draft_policy="always", draft_tokens=2, **options)
    for sampling in ({}, {"temperature": 0.9, "top_k": 20, "seed": 3}):
        found = drafted.generate(list(PROMPTS), FREELY, **sampling)
        assert [(g.token_ids, g.logprobs) for g in found] == answers(plain, **sampling)
        assert all(any(g.speculation.proposed) for g in found)


class NodesOnHost:
    """IF nodes of a graph, by the host: the body of one that is skipped changes nothing."""

    def __init__(self, _: object = None) -> None:
        self.conditions: list[bool] = []

    def run(self, decide: Any, body: Any) -> None:
        condition, chain = ctypes.c_uint32(7), body.__self__
        decide(ctypes.addressof(condition))
        assert condition.value in (0, 1), "the kernel has decided"
        before = chain.drafts.clone()
        body()  # as it is captured, whatever a replay does
        self.conditions.append(bool(condition.value))
        if condition.value == 0:
            chain.drafts.copy_(before)
            chain.logits.fill_(torch.nan)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[NodesOnHost]:
    """Chains of drafts end as in a CUDA graph; returns the nodes of each engine."""
    made: list[NodesOnHost] = []

    def make(_: object) -> NodesOnHost:
        made.append(NodesOnHost())
        return made[-1]

    class Graph:
        def __init__(self, program: Any) -> None:
            self.program, self.result = program, program()

        def replay(self) -> None:
            self.result.copy_(self.program())

    def capture(program: Any, _: object) -> tuple[Graph, Tensor]:
        graph = Graph(program)
        return graph, graph.result

    monkeypatch.setattr("hotloop.engine.setup.Setup.ends_on_host", False)
    monkeypatch.setattr("hotloop.engine.runner.IfNodes", make)
    monkeypatch.setattr("hotloop.engine.chains.capture", capture)
    return made


@pytest.mark.parametrize("draft", ["exit-1", "itself"])
def test_chains_that_end_on_the_device_are_those_of_the_host_and_change_no_token(
    folder, engine, monkeypatch, draft, nodes
):
    draft = str(folder) if draft == "itself" else draft
    options = {"quant": "int8", "max_batch_size": 2}
    drafted = options | {"draft": draft, "draft_policy": "always", "draft_tokens": 4}
    plain, on_device = engine(**options), engine(**drafted)
    assert on_device._runner.ends_chains
    assert on_device.describe().notes == ()
    monkeypatch.setattr("hotloop.engine.setup.Setup.ends_on_host", True)
    on_host = engine(**drafted)
    on_device._runner._stepper._verified = (4,)  # a graph verifies as many as ever
    prompts = PROMPTS[:2]
    for sampling in ({}, {"temperature": 0.9, "repetition_penalty": 1.2, "seed": 3}):
        expected, proposed = answers(plain, prompts, **sampling), []
        for least in (1e-9, 3e-3, 2.0):
            found = []
            for llm in (on_device, on_host):
                controller = llm._scheduler.controller
                monkeypatch.setattr(controller, "_min_probability", lambda *_, least=least: least)
                generations = llm.generate(prompts, FREELY, **sampling)
                assert [(g.token_ids, g.logprobs) for g in generations] == expected
                found.append([g.speculation.proposed for g in generations])
            assert found[0] == found[1]
            proposed.append(found[0][0])
        assert len(proposed[0]) == 4, "all are made"
        assert len(proposed[2]) == 1, "the first is always made"
    assert {True, False} == set(nodes[0].conditions)


@pytest.mark.usefixtures("nodes")
def test_where_nodes_fail_all_drafts_are_made_and_a_note_says_so(engine, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: invalid argument")

    def never(_nodes: NodesOnHost, _decide: Any, body: Any) -> None:
        body()

    for run, reason in (
        (fail, "drafts in IF nodes of a CUDA graph failed: CUDA error: invalid argument"),
        (never, "drafts in a CUDA graph were [[0, 0, 0]], and not [[0, -1, -1]]"),
    ):
        monkeypatch.setattr(NodesOnHost, "run", run)
        llm = engine(draft="exit-1", draft_tokens=2, draft_policy="always")
        assert llm.describe().notes == (f"chains of drafts do not end early: {reason}",)
        assert not llm._runner.ends_chains
        (found,) = llm.generate([[7]], FREELY)
        assert found.speculation.proposed[1] > 0


def test_closing_frees_plans_counters_weights_and_cache(engine):
    llm = engine(draft="exit-1")
    llm.generate([[7]], FREELY)
    runner = llm._runner
    forwards = [runner._stepper.forward, runner._drafters[0].forward]
    kept = [weakref.ref(part) for part in (*forwards, runner._model.decoder, runner._model.cache)]
    kept += [weakref.ref(plans) for forward in forwards for plans in forward._plans.values()]
    assert len(kept) >= 4 + 2
    del forwards
    llm.close()
    gc.collect()
    assert not any(ref() for ref in kept)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"repetition_penalty": 1.2}], ids=str
)
@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_a_step_without_finite_logits_ends_the_request_with_an_error(engine, options, draft):
    llm = engine(draft=draft, max_batch_size=2)
    with torch.inference_mode():
        llm._runner._model.decoder.embedding.packed0[7] = torch.nan
    answered = []
    with pytest.raises(NumericsError, match="answer 1: after 0 tokens"):  # noqa: PT012
        for delta in llm.stream([[3], [9, 7]], FREELY, seed=1, **options):
            answered += delta.token_ids if delta.index == 0 else ()
    assert len(answered) == FREELY.max_new_tokens


# What cannot run.


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "float32"}, "it computes in bfloat16, not float32"),
        ({"draft": "ngram", "draft_tokens": 16}, "a step verifies at most 15 drafts, not 16"),
    ],
)
def test_what_it_cannot_run_is_refused_and_left_to_eager_by_default(engine, options, says):
    with pytest.raises(UnsupportedError, match=f"^execution 'fused' cannot run here: {says}"):
        engine(execution="fused", **options)
    assert engine(**options).describe().execution == "eager"


def test_heads_of_other_widths_are_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="heads must be 64, 96, 128, 256 wide, not 16"):
        LLM(str(write_random(tmp_path)), execution="fused")


def test_on_a_gpu_the_reason_is_noted_and_elsewhere_goes_without_saying(folder, monkeypatch):
    config = EngineConfig(model=str(folder))
    for device, reason, notes in (
        ("cuda:0", None, ()),
        ("cuda:0", "no luck", ("execution/fused not used, but eager: no luck",)),
        ("cpu", "no luck", ()),
    ):
        monkeypatch.setattr("hotloop.engine.setup.fused_unavailable_reason", lambda _, r=reason: r)
        resolved = _resolve_execution(config, torch.device(device), torch.bfloat16, [])
        assert resolved == ("eager" if reason else "fused", notes)
