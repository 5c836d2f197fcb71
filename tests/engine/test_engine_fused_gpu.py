"""The fused step in whole engines on a GPU: ``pytest -m gpu`` where there is one."""

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import ALTERNATIVES, assert_top_two_agree
from tiny_models import N_TOKENS, write_random
from torch import Tensor

from hotloop import LLM, Generation, SamplingParams
from hotloop.engine.core import Step
from hotloop.engine.service import Service
from hotloop.evaluate.quality import kl_divergence
from hotloop.evaluate.text import load_text
from hotloop.evaluate.windows import make_windows
from hotloop.kernels.cuda.attention import MAX_TOKENS
from hotloop.kernels.cuda.launch import Device, unavailable_reason
from hotloop.models.families import FAMILIES
from hotloop.registry import resolve

CUDA = torch.device("cuda", 0)
REASON = unavailable_reason(CUDA) if torch.cuda.is_available() else "no CUDA device"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

SCHEMES = ("none", "int8", "int8-g64", "int8-g128", "fp8", "int4-g32", "int4-g128", "int4-g64-asym")
PROMPTS = [[7], list(range(2, 40)), [260, 3] * 10]
GREEDY = SamplingParams(max_new_tokens=24, ignore_eos=True, logprobs=ALTERNATIVES)
DRAWN = {
    "temperature": {"temperature": 0.9},
    "top-k": {"temperature": 0.9, "top_k": 20},
    "top-p": {"temperature": 1.1, "top_p": 0.9},
    "min-p": {"temperature": 1.1, "min_p": 0.05},
    "penalty": {"temperature": 0.9, "repetition_penalty": 1.3},
}

LARGE = {
    "n_layers": 6,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1280,
}

Make = Callable[..., LLM]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each, with every switch of the family on, and rows that no token has."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
    sizes |= {"vocab_size": N_TOKENS + 20}
    folders = {}
    for name in FAMILIES:
        keys = dict(resolve("architecture", FAMILIES, name).tiny)
        del keys["architectures"], keys["num_hidden_layers"]
        folder = tmp_path_factory.mktemp(name)
        folders[name] = write_random(folder, n_layers=3, **keys | sizes)
    return folders


@pytest.fixture(scope="module")
def make(families: dict[str, Path]) -> Make:
    model = str(families["LlamaForCausalLM"])

    def make(*, draft: str = "none", **options: Any) -> LLM:
        draft = model if draft == "itself" else draft
        return LLM(model, execution="fused", device="cuda", draft=draft, **options)

    return make


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose kernels take long enough to overlap, with room for a long prompt."""
    return write_random(tmp_path_factory.mktemp("large"), **LARGE)


def answers(llm: LLM, prompts: list[list[int]], **options: Any) -> list[Any]:
    return [(g.token_ids, g.logprobs) for g in llm.generate(prompts, GREEDY, **options)]


@pytest.mark.parametrize("quant", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_agree_with_exact_ones_to_the_top_two(
    family: str, quant: str, families: dict[str, Path]
) -> None:
    found: list[list[Generation]] = []
    # Not with eager ones: their logits are rounded to bfloat16, and equal each other too often.
    ways = {"fused": {"device": "cuda"}, "eager": {"device": "cpu", "dtype": "float32"}}
    for execution, options in ways.items():
        llm = LLM(str(families[family]), quant=quant, execution=execution, **options)
        assert llm.describe().execution == execution
        found.append(llm.generate(PROMPTS, GREEDY))
        llm.close()
    assert_top_two_agree(*found)
    assert all(token < N_TOKENS for g in found[0] for token in g.token_ids)


@pytest.mark.parametrize("quant", ["none", "int4-g32"])
def test_neighbors_change_nothing(quant: str, make: Make) -> None:
    prompts = [[2 + i] * (1 + 3 * i) for i in range(16)]
    alone, among = make(quant=quant), make(quant=quant, max_batch_size=16)
    singly = answers(alone, prompts)
    for n in (1, 2, 3, 5, 8, 16):
        assert answers(among, prompts[:n]) == singly[:n]


@torch.inference_mode()
def test_a_row_has_the_same_bits_among_any_number_of_rows(make: Make) -> None:
    llm = make(quant="int8", max_batch_size=16)
    llm.generate([[2 + i] * (1 + 3 * i) for i in range(16)], GREEDY)
    forward, rows = llm._runner._stepper.forward, llm._runner._rows
    positions = rows.positions[:, None].clone()
    ids = rows.tokens(positions)
    whole, best = forward(ids, positions, rows.seats)
    for n in (1, 2, 3, 5, 8):
        logits, chosen = forward(ids[:n], positions[:n], rows.seats[:n])
        assert torch.equal(logits, whole[:n])
        assert torch.equal(chosen, best[:n])


@pytest.mark.parametrize("draft", ["ngram", "exit-1", "self", "self-int4-g32", "itself"])
@pytest.mark.parametrize("draft_tokens", [1, 4, MAX_TOKENS - 1])
def test_drafts_change_neither_tokens_nor_their_probabilities(
    draft: str, draft_tokens: int, make: Make
) -> None:
    quant = "int8-g128" if draft == "self" else "int8"
    plain = make(quant=quant, max_batch_size=3)
    drafted = make(
        quant=quant,
        max_batch_size=3,
        draft=draft,
        draft_policy="always",
        draft_tokens=draft_tokens,
    )
    for sampling in ({}, {"seed": 3, **DRAWN["top-k"]}, {"seed": 3, **DRAWN["penalty"]}):
        assert answers(drafted, PROMPTS, **sampling) == answers(plain, PROMPTS, **sampling)
    assert any(any(g.speculation.proposed) for g in drafted.generate(PROMPTS, GREEDY))


@pytest.mark.parametrize("draft", ["exit-1", "self-int4-g32", "itself"])
@pytest.mark.parametrize("overlap", [True, False])
def test_chains_that_end_early_in_a_graph_change_no_token(
    draft: str,
    overlap: bool,
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device(CUDA, dependent_launch=overlap)
    monkeypatch.setattr("hotloop.engine.runner.device_of", lambda _: device)
    monkeypatch.setattr("hotloop.engine.llm.n_multi_steps", lambda _: 1)
    plain = make(quant="int8", max_batch_size=3)
    drafted = make(
        quant="int8",
        max_batch_size=3,
        draft=draft,
        draft_policy="always",
        draft_tokens=7,
    )
    assert drafted._runner.ends_chains, drafted.describe().notes
    controller = drafted._scheduler.controller
    for sampling in ({}, {"seed": 3, **DRAWN["top-k"]}, {"seed": 3, **DRAWN["penalty"]}):
        lengths = []
        for least in (0.0, 0.5, 0.999, 2.0, 0.999, 0.0):  # of the same graphs
            monkeypatch.setattr(controller, "_min_probability", lambda *_, least=least: least)
            for prompts in (PROMPTS, PROMPTS[:1]):
                found = drafted.generate(prompts, GREEDY, **sampling)
                alone = plain.generate(prompts, GREEDY, **sampling)
                assert [g.token_ids for g in found] == [g.token_ids for g in alone]
            seen = found[0].speculation  # of one row alone
            lengths.append(sum(seen.proposed) / (seen.n_steps - seen.n_plain_steps))
        assert lengths[3] == 1, "the first draft is always made"
        assert lengths[0] > 3, "all are made, but for the end of an answer"
        assert 1 < lengths[2] < lengths[0]
        assert lengths[4:] == [lengths[2], lengths[0]], "it is the least of each step"


def test_a_server_captures_chains_that_end_early_and_keeps_their_memory(large: Path) -> None:
    # What bodies of IF nodes allocate is theirs alone: other work between steps changes nothing.
    options = {"max_batch_size": 4, "max_seq_len": 256, "execution": "fused", "device": "cuda"}
    plain = LLM(str(large), **options)
    drafted = LLM(str(large), **options, draft="exit-2", draft_tokens=7)
    assert drafted._runner.ends_chains
    prompts = [list(range(2, 40)), [7], [260, 3] * 10, [9, 8, 7]]
    params = dataclasses.replace(GREEDY, max_new_tokens=100, logprobs=None)
    with Service(drafted) as service:
        tickets = [service.submit(prompt, params) for prompt in prompts * 3]
        poison = [torch.full((1 << n,), torch.nan, device=CUDA) for n in range(8, 24)]
        found = [tuple(t for piece in ticket for t in piece.token_ids) for ticket in tickets]
        assert service.state().n_captured == 0
    assert all(bool(each.isnan().all()) for each in poison), "nor does a body write elsewhere"
    assert found == [g.token_ids for g in plain.generate(prompts, params)] * 3


@pytest.mark.parametrize("draft", ["ngram", "self-int4-g32", "itself"])
def test_several_steps_with_drafts_are_one_program_and_change_no_bit(
    draft: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotloop.engine.llm.n_multi_steps", lambda _: 8)
    plain = make(quant="int8", max_batch_size=3)
    drafted = make(
        quant="int8",
        max_batch_size=3,
        draft=draft,
        draft_policy="always",
    )
    steps: list[Any] = []
    run = drafted._runner.run
    monkeypatch.setattr(drafted._runner, "run", lambda c: steps.append(c) or run(c))
    for sampling in ({}, {"seed": 3, **DRAWN["top-k"]}, {"seed": 3, **DRAWN["penalty"]}):
        for prompt in PROMPTS:
            assert answers(drafted, [prompt], **sampling) == answers(plain, [prompt], **sampling)
    mixed = [GREEDY, dataclasses.replace(GREEDY, speculate=False)] * 2
    with Service(drafted) as service:
        tickets = [service.submit(PROMPTS[i % 3], mixed[i]) for i in range(4)]
        found = [tuple(t for piece in ticket for t in piece.token_ids) for ticket in tickets]
        assert service.state().n_captured == 0
    expected = plain.generate(PROMPTS, GREEDY)
    assert found == [expected[i % 3].token_ids for i in range(4)]
    assert 4 in {step.n_steps for step in steps if isinstance(step, Step) and step.k}


@pytest.mark.parametrize("sampling", DRAWN.values(), ids=DRAWN)
def test_drawn_tokens_can_be_repeated(sampling: dict[str, Any], make: Make) -> None:
    llm, another = make(max_batch_size=3), make()
    first = answers(llm, PROMPTS, seed=5, **sampling)
    assert answers(llm, PROMPTS, seed=5, **sampling) == first
    assert answers(another, PROMPTS, seed=5, **sampling) == first
    assert answers(llm, PROMPTS, seed=6, **sampling) != first


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="this GPU has no dependent launch",
)
@pytest.mark.parametrize("quant", ["none", "int8", "int4-g128"])
def test_overlapping_kernels_give_the_bits_of_kernels_one_after_the_other(
    quant: str, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[list[Any], list[Tensor]]:
        llm = LLM(str(large), execution="fused", device="cuda", quant=quant, max_batch_size=3)
        prompts = [list(range(2, 290)) * 2, [5, 6, 7], [9] * 100]
        found = answers(llm, prompts)
        window = [2 + (7 * i) % 290 for i in range(64)]
        logits = [decoded_log_probs(llm, window) for _ in range(10)]
        llm.close()
        return found, logits

    found, logits = run()
    one_by_one = Device(CUDA, dependent_launch=False)
    monkeypatch.setattr("hotloop.engine.runner.device_of", lambda _: one_by_one)
    assert not one_by_one.dependent_launch
    expected, (first, *_) = run()
    assert found == expected
    assert all(torch.equal(each, first) for each in logits)


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_a_long_prompt_is_seen_to_its_beginning(quant: str, large: Path) -> None:
    prompts = [[2 + (i * i) % 290 for i in range(1000)], [5, 6, 7]]
    params = SamplingParams(max_new_tokens=48, ignore_eos=True, logprobs=ALTERNATIVES)
    found = []
    for execution in ("fused", "eager"):
        llm = LLM(str(large), device="cuda", quant=quant, execution=execution, max_batch_size=2)
        found.append(llm.generate(prompts, params))
        if execution == "fused":
            changed = llm.generate([[3, *prompts[0][1:]]], params)[0]
            assert changed.logprobs[1:] != found[0][0].logprobs[1:]
        llm.close()
    assert_top_two_agree(*found)


@pytest.mark.parametrize("quant", ["none", "int8", "int4-g128"])
def test_a_captured_prompt_gives_what_launches_one_by_one_gave(quant: str, large: Path) -> None:
    prompts = [[2 + (i * i + n) % 290 for i in range(n)] for n in (70, 128, 120, 500, 1000)]
    llm = LLM(str(large), execution="fused", device="cuda", quant=quant, max_batch_size=2)
    assert llm._runner._model._fused_prefill is not None
    prefill = llm._runner._model._fused_prefill._gemm
    assert len(prefill._captured) == 8, "every multiple of 64 up to 512, before the first request"
    found = [answers(llm, [prompt])[0] for prompt in prompts]
    assert answers(llm, prompts) == found, "in any seat, and behind other prompts"
    prefill.captures = False
    assert answers(llm, [prompts[1]]) == [found[1]], "launched one by one"
    llm.close()


@pytest.mark.parametrize("quant", ["none", "int4-g128"])
def test_captured_later_chunks_give_what_launches_one_by_one_gave(quant: str, large: Path) -> None:
    prompts = [[2 + (i * i + n) % 290 for i in range(n)] for n in (576, 512, 384, 1000)]
    options = {"quant": quant, "max_batch_size": 2, "prefill_chunk": 192, "max_seq_len": 1100}
    llm = LLM(str(large), execution="fused", device="cuda", **options)
    prefill = llm._runner._model._fused_prefill._gemm
    assert len(prefill._captured_later) == len(prefill._captured) == 3
    found = [answers(llm, [prompt])[0] for prompt in prompts]
    assert answers(llm, prompts) == found, "in any seat, and behind other prompts"
    prefill.captures = False
    whole = [prompt for prompt in prompts if len(prompt) % 64 == 0]  # no chunk of theirs is padded
    assert answers(llm, whole) == found[: len(whole)], "launched one by one"
    llm.close()


@pytest.mark.parametrize("draft", ["none", "ngram", "exit-2"])
@pytest.mark.parametrize("prefix_cache", ["none", "chunks"])
def test_load_and_reused_chunks_change_no_answer_and_nothing_is_captured_in_service(
    large: Path, draft: str, prefix_cache: str
) -> None:
    shared = [2 + (i * i) % 290 for i in range(400)]
    prompts = [
        [*shared[: 100 * (i % 5)], *(3 + (7 * i + j) % 280 for j in range(5 + 37 * i % 90))]
        for i in range(24)
    ]
    sampling = ({}, {"temperature": 0.8, "seed": 3}, {"presence_penalty": 0.5, "logprobs": 1})
    params = [
        SamplingParams(max_new_tokens=16 + i, ignore_eos=True, **sampling[i % 3]) for i in range(24)
    ]
    options = {"execution": "fused", "device": "cuda", "draft": draft, "prefill_chunk": 128}
    llm = LLM(str(large), max_batch_size=6, prefix_cache=prefix_cache, **options)
    alone = [llm.generate([p], each)[0].token_ids for p, each in zip(prompts, params, strict=True)]
    with Service(llm) as service:
        for _ in range(2):
            tickets = []
            for i, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
                tickets.append(service.submit(prompt, each))
                if i % 4 == 3:
                    service.cancel(service.submit(prompt, each))
                    tickets[-1].wait()
            found = [tuple(t for piece in ticket for t in piece.token_ids) for ticket in tickets]
            assert found == alone
        assert service.state().n_captured == 0
    llm.close()


@pytest.mark.parametrize("sliding_window", [None, 150])
def test_a_prompt_in_chunks_agrees_with_eager_to_the_top_two(
    sliding_window: int | None, large: Path, tmp_path: Path
) -> None:
    folder = large
    if sliding_window is not None:
        keys = LARGE | {"model_type": "mistral", "sliding_window": sliding_window}
        folder = write_random(tmp_path, **keys)
    prompts = [[2 + (i * i + n) % 290 for i in range(n)] for n in (1000, 330, 140)]
    params = SamplingParams(max_new_tokens=24, ignore_eos=True, logprobs=ALTERNATIVES)

    def run(**options: Any) -> list[Generation]:
        llm = LLM(str(folder), device="cuda", max_batch_size=3, **options)
        found = llm.generate(prompts, params)
        llm.close()
        return found

    eager = run(execution="eager")
    for chunk in (None, 300, 96):
        assert_top_two_agree(run(execution="fused", prefill_chunk=chunk), eager)


def test_closing_gives_the_memory_back(large: Path) -> None:
    gc.collect()
    before = torch.cuda.memory_allocated()
    llm = LLM(str(large), execution="fused", device="cuda", draft="exit-2")
    llm.generate(PROMPTS, GREEDY)
    weight_bytes = llm.describe().weight_bytes
    assert torch.cuda.memory_allocated() - before > weight_bytes
    llm.close()
    gc.collect()
    assert torch.cuda.memory_allocated() - before < weight_bytes / 2  # cuBLAS keeps a workspace


@pytest.mark.parametrize("quant", ["none", "int8", "int4-g32"])
def test_windows_scored_together_have_the_bits_of_each_alone(make: Make, quant: str) -> None:
    question = list(range(2, 40))
    windows = [*([*question, answer, 5] for answer in (40, 41, 42, 43)), [260, 3] * 40, [7, 8]]
    with make(quant=quant, max_seq_len=96) as llm:
        alone = [next(llm.score([window], full=True)) for window in windows]
    with make(quant=quant, max_seq_len=96, max_batch_size=6) as llm:
        kinds: tuple[dict[str, bool], ...] = ({"share_prefixes": True}, {}, {"full": True})
        for options in kinds:
            for score, expected in zip(llm.score(windows, **options), alone, strict=True):
                assert score.token_logprobs.equal(expected.token_logprobs)
                assert score.top1.equal(expected.top1)
                if options.get("full"):
                    assert score.log_probs is not None
                    assert score.log_probs.equal(expected.log_probs)


def test_windows_scored_together_by_cublas_have_the_scores_of_each_alone(
    families: dict[str, Path],
) -> None:
    options: dict[str, Any] = {"device": "cuda", "execution": "eager", "max_seq_len": 96}
    model = str(families["LlamaForCausalLM"])
    windows = [[*range(2, 40), answer, 5] for answer in (40, 41, 42, 43)] + [[7, 8], [260, 3] * 40]
    with LLM(model, **options) as llm:
        alone = [next(llm.score([window])).token_logprobs for window in windows]
    with LLM(model, max_batch_size=6, **options) as llm:
        for score, expected in zip(llm.score(windows, share_prefixes=True), alone, strict=True):
            torch.testing.assert_close(score.token_logprobs, expected, atol=0.1, rtol=0)


# A model that was trained.


@pytest.mark.parametrize("quant", ["none", "int8", "int4-g64"])
def test_a_trained_model_is_as_near_its_float32_self_as_eager_bfloat16_is(
    quant: str, smollm2: str
) -> None:
    options: dict[str, Any] = {"quant": quant, "max_seq_len": 256, "max_batch_size": 3}
    exact = LLM(smollm2, device="cpu", dtype="float32", **options)
    windows = make_windows(exact.encode(load_text(None).content), 256, 3)
    expected = [score.log_probs for score in exact.score(windows, full=True)]

    kl, ln_ppl = {}, {"exact": mean_loss(windows, expected)}
    for execution in ("fused", "eager"):
        llm = LLM(smollm2, device="cuda", execution=execution, **options)
        ways = {
            "decoded": [decoded_log_probs(llm, window) for window in windows],
            "scored": [score.log_probs for score in llm.score(windows, full=True)],
        }
        for way, found in ways.items():
            pairs = zip(expected, found, strict=True)
            kl[execution, way] = torch.cat([kl_divergence(p, q) for p, q in pairs]).mean().item()
            ln_ppl[f"{execution}, {way}"] = mean_loss(windows, found)
        if execution == "fused":
            prompts = [window[:24] for window in windows]
            params = SamplingParams(max_new_tokens=40, ignore_eos=True, logprobs=ALTERNATIVES)
            assert_top_two_agree(*(e.generate(prompts, params) for e in (llm, exact)))
        llm.close()
    for way in ("decoded", "scored"):
        assert kl["fused", way] <= 1.15 * kl["eager", way] + 1e-5, kl
    exactly = ln_ppl.pop("exact")
    assert all(abs(found - exactly) < 0.005 for found in ln_ppl.values()), (exactly, ln_ppl)


@torch.inference_mode()
def decoded_log_probs(llm: LLM, window: list[int]) -> Tensor:
    """The distributions [T - 1, V] after each token but the last, by steps of a few tokens."""
    how = {"first_seat": 0, "length": llm.describe().max_seq_len}
    forward, seats = llm._runner._stepper.forward, torch.zeros(1, dtype=torch.int64, device=CUDA)
    ids = torch.tensor([window[:-1]], device=CUDA)
    positions = torch.arange(len(window) - 1, device=CUDA)[None]
    steps = zip(ids.split(MAX_TOKENS, 1), positions.split(MAX_TOKENS, 1), strict=True)
    logits = [forward(*step, seats, **how)[0][0] for step in steps]
    return torch.cat(logits).log_softmax(-1).cpu()


def mean_loss(windows: list[list[int]], log_probs: list[Tensor]) -> float:
    losses = [
        -log_probs_TV.gather(1, torch.tensor(window[1:])[:, None])
        for window, log_probs_TV in zip(windows, log_probs, strict=True)
    ]
    return torch.cat(losses).mean().item()
