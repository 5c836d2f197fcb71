"""The engine on a CUDA device, against itself on the CPU: ``pytest -m gpu`` where there is one."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import ALTERNATIVES, assert_top_two_agree
from tiny_models import write_random

from hotloop import LLM, Grammar, SamplingParams
from hotloop.engine.core import Command, Features, Pending
from hotloop.engine.memory import predict_memory
from hotloop.engine.sampling import Sampler
from hotloop.engine.seats import common_prefix
from hotloop.engine.service import Service
from hotloop.kernels.cuda.launch import unavailable_reason
from hotloop.kernels.linear import LinearSpec, choose_linear
from hotloop.quant import QTensor, parse_scheme
from hotloop.types import EngineConfig, Execution

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [11], [20, 21, 22, 23]]
GREEDY = SamplingParams(max_new_tokens=24, ignore_eos=True)


def tokens(llm: LLM, prompts: list[list[int]] = PROMPTS) -> list[tuple[int, ...]]:
    return [g.token_ids for g in llm.generate(prompts, GREEDY)]


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[tuple[int, ...]]:
    return tokens(LLM(str(folder), dtype="float32", device="cpu"))


@pytest.mark.parametrize("execution", ["eager", "compile"])
@pytest.mark.parametrize("rows", [1, 3])
def test_float32_greedy_tokens_on_the_gpu_are_those_of_the_cpu(
    folder: Path, expected: list[tuple[int, ...]], execution: str, rows: int
) -> None:
    llm = LLM(str(folder), dtype="float32", device="cuda", execution=execution, max_batch_size=rows)
    assert tokens(llm) == expected
    llm.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
@pytest.mark.parametrize("draft", ["none", "ngram"])
@pytest.mark.parametrize("execution", ["eager", "compile", "auto"])
def test_another_gpu_than_the_first_gives_the_tokens_of_the_first(
    tmp_path: Path, execution: str, draft: str
) -> None:
    folder = write_random(tmp_path, head_dim=64, hidden_size=128, intermediate_size=256)
    found = []
    for device in ("cuda:0", "cuda:1"):
        options = {"device": device, "execution": execution, "draft": draft, "max_batch_size": 2}
        with LLM(str(folder), **options) as llm, llm.meter() as peak:
            assert llm.describe().device == device
            drawn = llm.generate(PROMPTS, GREEDY, temperature=0.9, seed=3)
            found.append((tokens(llm), [g.token_ids for g in drawn]))
        assert peak.peak_bytes > 0
    assert found[0] == found[1]
    assert torch.cuda.current_device() == 0, "the caller's own device is as it was"


FOLLOW = Grammar(kind="regex", source="(the token )+[a-z]{1,9}|[0-9]{4,8}")


@pytest.mark.parametrize("execution", ["eager", "compile", "fused"])
@pytest.mark.parametrize("draft", ["none", "ngram", "exit-1", "itself"])
def test_grammars_are_followed_beside_drafts_and_others_and_nothing_is_captured_in_service(
    tmp_path: Path, execution: Execution, draft: str
) -> None:
    if execution == "fused" and (why := unavailable_reason(torch.device("cuda", 0))) is not None:
        pytest.skip(why)
    folder = write_random(tmp_path, head_dim=64, hidden_size=128, intermediate_size=256)
    drawn = {"temperature": 0.9, "top_k": 20, "seed": 3}
    # Inductor takes seconds for each number of rows and drafts, so that compiled steps have few.
    compiles = execution == "compile"
    n_rows, n_drafts = (2, 1) if compiles else (5, 3)
    asked = [
        (prompt, SamplingParams(max_new_tokens=24, **options))
        for prompt in (PROMPTS[:2] if compiles else PROMPTS)
        for options in (
            {"grammar": FOLLOW},
            {"grammar": FOLLOW, **drawn},
            {"ignore_eos": True, "logprobs": 2},
            {"grammar": Grammar(kind="json_object"), "presence_penalty": 0.5, **drawn},
            {"ignore_eos": True, **drawn},
        )
    ]
    # In float32 rounding, which the number of rows can change in compiled steps, changes no token.
    options = {
        "device": "cuda",
        "execution": execution,
        "dtype": "bfloat16" if execution == "fused" else "float32",
        "max_seq_len": 64,
    }
    with LLM(str(folder), **options) as llm:
        alone = [llm.generate([prompt], params)[0] for prompt, params in asked]
        assert any(g.text.startswith("the token") for g in alone)
    options |= {"max_batch_size": n_rows, "draft_policy": "always", "draft_tokens": n_drafts}
    with LLM(str(folder), draft=str(folder) if draft == "itself" else draft, **options) as llm:
        with Service(llm) as service:
            tickets = [service.submit(prompt, params) for prompt, params in asked]
            found = [tuple(t for piece in ticket for t in piece.token_ids) for ticket in tickets]
            n_captured = service.state().n_captured
        different = [
            f"{prompt}, {params}: {common_prefix(got, expected.token_ids)} tokens are equal, "
            f"then there are {got} in service, and {expected.token_ids} alone"
            for (prompt, params), got, expected in zip(asked, found, alone, strict=True)
            if got != expected.token_ids
        ]
        assert not different, "\n".join([f"{len(different)} of {len(asked)}:", *different])
        assert n_captured == 0, f"{n_captured} programs were captured in service"
        again = llm.generate([prompt for prompt, _ in asked[:5]], grammar=FOLLOW)
        if draft != "none":
            assert any(any(g.speculation.proposed) for g in again), "nothing was drafted"


@pytest.mark.parametrize("execution", ["compile", "auto"])
def test_tokens_do_not_depend_on_how_many_graphs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, execution: str
) -> None:
    folder = write_random(tmp_path, head_dim=64, hidden_size=128, intermediate_size=256)
    found = []
    for most in (64, 1):
        monkeypatch.setattr("hotloop.engine.graphs.MAX_GRAPHS", most)
        # Adaptive drafts follow the clock, and compiled steps with drafts round differently.
        options = {"execution": execution, "draft": "ngram", "draft_policy": "always"}
        with LLM(str(folder), device="cuda", max_batch_size=3, **options) as llm:
            found.append([tokens(llm, PROMPTS[:n]) for n in (1, 3, 2, 4)])
            assert len(llm._runner._stepper._graphs._kept) <= most
    assert found[0] == found[1]


def test_an_engine_that_was_not_closed_can_be_collected_while_another_one_captures(
    tmp_path: Path,
) -> None:
    """Destroying a graph is refused in a thread that captures, and ends the capture."""
    folder = str(write_random(tmp_path, head_dim=64, hidden_size=128, intermediate_size=256))
    expected = tokens(
        LLM(folder, device="cuda", max_batch_size=3)
    )  # a cycle: no longer referred to
    before = gc.get_threshold()
    try:
        gc.set_threshold(1)  # at the next allocation, wherever it is
        with LLM(folder, device="cuda", max_batch_size=3) as llm:
            assert tokens(llm) == expected
    finally:
        gc.set_threshold(*before)


@pytest.mark.parametrize("quant", ["none", "int8", "fp8", "int4-g32", "int4-g32-asym"])
def test_compiled_bfloat16_steps_agree_with_eager_ones_to_the_top_two(
    folder: Path, quant: str
) -> None:
    eager, compiled = (
        LLM(str(folder), device="cuda", quant=quant, execution=execution).generate(
            PROMPTS, SamplingParams(max_new_tokens=24, ignore_eos=True, logprobs=ALTERNATIVES)
        )
        for execution in ("eager", "compile")
    )
    assert_top_two_agree(eager, compiled)


@pytest.mark.parametrize(
    "scheme", ["int8", "int8-g64", "fp8", "int4-g32", "int4-g64-asym", "int4-g128"]
)
@pytest.mark.parametrize("rows", [1, 2, 5, 64])
@pytest.mark.parametrize(("n", "k"), [(576, 1536), (960, 640), (32000, 1024), (5120, 13824)])
def test_quantized_products_are_within_bfloat16_rounding_of_float64(
    scheme: str, rows: int, n: int, k: int
) -> None:
    generator = torch.Generator("cuda").manual_seed(n + k + rows)
    weight = torch.randn(n, k, device="cuda", generator=generator) * 0.02
    x = torch.randn(rows, k, device="cuda", generator=generator).bfloat16()
    quantized = parse_scheme(scheme).quantize(weight)
    assert isinstance(quantized, QTensor)
    form = LinearSpec(
        format=parse_scheme(scheme).format(k), n=n, k=k, dtype=torch.bfloat16, device="cuda"
    )
    kernel, _ = choose_linear(form)
    packed = kernel.pack(quantized)
    assert sum(t.nbytes for t in packed) == kernel.nbytes
    expected = x.double() @ quantized.dequantize(torch.float64).T
    error = (kernel(x, *packed).double() - expected).norm() / expected.norm()
    assert error < 6e-3  # bfloat16 products of bfloat16-rounded weights


def test_draws_on_the_gpu_are_those_of_the_cpu() -> None:
    params = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, seed=7)
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)) * 3
    drawn = []
    for device in ("cpu", "cuda"):
        sampler = Sampler(4, 1000, torch.device(device))
        for row in range(4):
            sampler.admit(row, params, 7 + row, [1, 2])
        positions = torch.arange(4, device=device) + 10
        logits_BTV = logits.to(device)[:, None]
        sampled = sampler.sample(logits_BTV, positions[:, None], 0, Features.of([params]))
        drawn.append(sampled.ids.tolist())
    assert drawn[0] == drawn[1]


def test_sampled_text_does_not_depend_on_execution_or_neighbors(folder: Path) -> None:
    params = SamplingParams(max_new_tokens=16, ignore_eos=True, temperature=0.9, top_p=0.9, seed=3)
    alone = LLM(str(folder), dtype="float32", device="cuda")
    among = LLM(str(folder), dtype="float32", device="cuda", execution="compile", max_batch_size=4)
    singly = [alone.generate([p], params)[0].token_ids for p in PROMPTS]
    assert [g.token_ids for g in among.generate(PROMPTS, params)] == singly


@pytest.mark.parametrize("execution", ["eager", "compile"])
@pytest.mark.parametrize("draft", ["ngram", "exit-1", "self", "self-int4-g32", "itself"])
def test_speculation_does_not_change_tokens(
    folder: Path, expected: list[tuple[int, ...]], execution: str, draft: str
) -> None:
    sampled = SamplingParams(max_new_tokens=16, ignore_eos=True, temperature=0.9, top_k=30, seed=3)
    options = {"dtype": "float32", "device": "cuda", "max_batch_size": 2}
    options |= {"quant": "int8-g32"} if draft == "self" else {}
    plain = LLM(str(folder), **options)
    llm = LLM(
        str(folder),
        execution=execution,
        draft=str(folder) if draft == "itself" else draft,
        draft_policy="always",
        draft_tokens=3,
        **options,
    )
    assert tokens(llm) == (tokens(plain) if draft == "self" else expected)
    drawn = [[g.token_ids for g in engine.generate(PROMPTS, sampled)] for engine in (llm, plain)]
    assert drawn[0] == drawn[1]
    if draft == "itself":
        for g in llm.generate(PROMPTS, GREEDY):
            assert g.speculation is not None
            assert g.speculation.accepted == g.speculation.proposed
            assert g.speculation.draft_s > 0


def test_a_compiled_engine_reads_a_longer_cache_as_answers_grow(folder: Path) -> None:
    # From 256 positions on, a step reads twice as many: another program.
    params = SamplingParams(max_new_tokens=60, ignore_eos=True)
    prompts = [[5, 6, 7, 8] * 55, [9, 8, 7]]
    answers = [
        [
            g.token_ids
            for g in LLM(str(folder), dtype="float32", **options).generate(prompts, params)
        ]
        for options in (
            {"device": "cpu"},
            {"device": "cuda", "execution": "compile", "max_batch_size": 2},
            {"device": "cuda", "execution": "compile", "draft": "ngram", "draft_policy": "always"},
        )
    ]
    assert answers[1] == answers[0]
    assert answers[2] == answers[0]


@pytest.mark.parametrize("execution", ["eager", "auto"])
def test_memory_is_what_was_predicted(execution: Execution) -> None:
    config = EngineConfig(
        model="llama-2-7b",
        weights="random",
        quant="int4-g128",
        execution=execution,
        device="cuda",
        max_seq_len=1024,
    )
    plan = predict_memory(config)
    ones = torch.ones(8, 8, device="cuda", dtype=torch.bfloat16)
    torch.addmm(ones, ones, ones)  # the workspaces of cuBLAS are the process's
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    llm = LLM(config)
    resident = torch.cuda.memory_allocated() - before
    exact = plan.weights_bytes + plan.cache_bytes
    if execution == "eager":
        assert exact <= resident <= exact + 64 * 2**20  # small state beside them
    else:  # the fused step keeps the buffers of prompts
        assert exact <= resident <= plan.total_bytes
    llm.generate([[1] * 900], GREEDY)
    list(llm.score([[1] * 900]))
    assert torch.cuda.max_memory_allocated() - before <= plan.total_bytes
    llm.close()


@pytest.mark.parametrize("draft", ["none", "ngram"])
@pytest.mark.parametrize("execution", ["eager", "auto"])
def test_the_host_waits_for_nothing_while_it_admits_prefills_and_steps(
    folder: Path, monkeypatch: pytest.MonkeyPatch, execution: str, draft: str
) -> None:
    """``test_engine_waits`` finds what PyTorch would wait for; here the device says so."""
    options = {"execution": execution, "draft": draft, "draft_policy": "always"}
    every = replace(GREEDY, temperature=0.8, top_k=9, min_new_tokens=2, presence_penalty=0.5)
    with (
        LLM(str(folder), device="cuda", max_batch_size=3, prefill_chunk=16, **options) as llm,
        Service(llm) as service,
    ):
        run = llm._runner.run

        def watched(command: Command[Any]) -> Pending[Any]:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return run(command)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(llm._runner, "run", watched)
        prompts = [[*range(2, 40)], [5, 6], [9], [7, 8, 9]]
        tickets = [service.submit(prompt, every) for prompt in prompts]
        assert [len(list(ticket)) > 0 for ticket in tickets] == [True] * 4
