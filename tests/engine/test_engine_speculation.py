"""Speculation changes when tokens come, never which."""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from sampling_definition import distribution
from scipy import stats
from tiny_models import N_TOKENS, encode, write_markov, write_random, write_script

from hotloop import LLM, EngineConfig, Generation, SamplingParams, Speculation
from hotloop.engine.core import StepTimes
from hotloop.engine.draft_control import Choice, DraftController, sizes_up_to
from hotloop.engine.setup import prepare, resolve_auto
from hotloop.engine.simulated_acceptance import assumed_probability, simulate_acceptance
from hotloop.errors import ConfigError, HotloopError
from hotloop.kernels import cpu
from hotloop.quant import parse_scheme
from hotloop.weights.quantize import quantize_checkpoint

PROMPTS = ([7], [5, 6], list(range(2, 19)), [260, 3] * 30, [299, 150, 2, 40, 41])
FREELY = SamplingParams(max_new_tokens=24, ignore_eos=True)
SAMPLING = {
    "drawn": {"temperature": 0.9},
    "truncated": {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    "penalized": {"temperature": 0.7, "repetition_penalty": 1.3},
    "penalized greedy": {"repetition_penalty": 1.3},
    "adjusted": {
        "temperature": 0.7,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "logit_bias": {5: 2.0, 7: -100},
        "min_new_tokens": 6,
        "ignore_eos": False,
    },
}
DRAFTS = (
    "ngram",
    "exit-1",
    "self-int4-g32",
    "ngram+self-int4-g32+exit-1",
    "another",
    "itself",
)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three layers."""
    return write_random(tmp_path_factory.mktemp("deep"), n_layers=3)


@pytest.fixture(scope="module")
def drafts(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Returns the name of ``draft`` for each of ``DRAFTS``."""
    another = write_random(tmp_path_factory.mktemp("another"), n_layers=1, num_key_value_heads=1)
    models = {"another": str(another), "itself": str(deep)}
    return {name: models.get(name, name) for name in DRAFTS}


@pytest.fixture(scope="module")
def plain(deep: Path) -> LLM:
    return LLM(str(deep), dtype="float32", max_batch_size=3)


def answers(llm: LLM, prompts: Sequence[Sequence[int]] = PROMPTS, **options: object) -> list:
    return [g.token_ids for g in llm.generate(prompts, FREELY, **options)]


def total(generations: Sequence[Generation]) -> Speculation:
    return sum((g.speculation for g in generations), Speculation())


@pytest.mark.parametrize("policy", ["always", "adaptive"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_tokens_are_those_of_plain_decoding(deep, drafts, plain, draft, policy):
    llm = LLM(
        str(deep), dtype="float32", max_batch_size=3, draft=drafts[draft], draft_policy=policy
    )
    assert answers(llm) == answers(plain)
    for options in SAMPLING.values():
        assert answers(llm, **options, seed=5) == answers(plain, **options, seed=5)


@pytest.mark.parametrize("draft", DRAFTS)
def test_tokens_of_a_compiled_engine_are_those_of_plain_decoding(tmp_path_factory, drafts, draft):
    folder = str(write_random(tmp_path_factory.mktemp("compiled"), n_layers=2))
    drafts = drafts | {"itself": folder}
    plain = LLM(folder, dtype="float32", max_batch_size=2)
    compiled = LLM(
        folder,
        dtype="float32",
        max_batch_size=2,
        execution="compile",
        draft=drafts[draft],
        draft_policy="always",
        draft_tokens=3,
    )
    assert answers(compiled) == answers(plain)
    options = SAMPLING["truncated"] | {"seed": 2}
    assert answers(compiled, **options) == answers(plain, **options)


@pytest.mark.parametrize("draft_tokens", [1, 2, 7])
def test_the_number_of_drafts_does_not_change_tokens(deep, plain, draft_tokens):
    llm = LLM(
        str(deep),
        dtype="float32",
        max_batch_size=3,
        draft="exit-2",
        draft_policy="always",
        draft_tokens=draft_tokens,
    )
    assert answers(llm) == answers(plain)
    assert answers(llm, temperature=1.0, seed=1) == answers(plain, temperature=1.0, seed=1)


@pytest.mark.parametrize("draft", ["exit-2", "self-int4-g32", "another"])
def test_chains_that_end_early_change_no_token(deep, drafts, plain, draft, monkeypatch):
    llm = LLM(
        str(deep),
        dtype="float32",
        max_batch_size=3,
        draft=drafts.get(draft, draft),
        draft_policy="always",
        draft_tokens=5,
    )
    lengths = []
    for least in (1e-9, 0.02, 2.0):
        monkeypatch.setattr(
            llm._scheduler.controller, "_min_probability", lambda *_, least=least: least
        )
        for options in ({}, SAMPLING["truncated"] | {"seed": 3}):
            found = llm.generate(PROMPTS, FREELY, **options)
            assert [g.token_ids for g in found] == answers(plain, **options)
        lengths.append(total(found).proposed)
    assert len(lengths[0]) == 5
    assert len(lengths[2]) == 1, "the first is always made"
    if draft != "another":  # whose distribution is flat
        assert lengths[1][0] > lengths[1][1] > 0


@pytest.mark.parametrize("rows", [1, 3])
def test_a_draft_model_that_is_the_model_is_always_right(deep, rows, monkeypatch):
    # Its cache must hold what it was not there for: prompts, and steps without drafts.
    llm = LLM(str(deep), dtype="float32", max_batch_size=rows, draft=str(deep), draft_tokens=3)
    wanted = itertools.cycle([3, 0, 0, 2, 1, 0, 3, 3])
    controller = llm._scheduler.controller
    chosen = lambda limits, room: Choice(k=min(*limits.values(), room, next(wanted)))  # noqa: E731
    monkeypatch.setattr(controller, "choose", chosen)
    for options in ({}, *SAMPLING.values()):
        seen = total(llm.generate(PROMPTS, FREELY, **options, seed=8))
        assert len(seen.proposed) == 3
        assert seen.accepted == seen.proposed
        assert seen.n_plain_steps > 0


def test_first_layers_that_add_nothing_more_are_always_right(tmp_path):
    # All layers of a Markov model add nothing, so that its first one is as good as all.
    logits_VV = torch.randn(N_TOKENS, N_TOKENS, generator=torch.Generator().manual_seed(0)) * 3
    folder = write_markov(tmp_path, logits_VV, n_layers=2)
    llm = LLM(str(folder), dtype="float32", draft="exit-1", draft_policy="always")
    for options in ({}, {"temperature": 1.0, "seed": 4}):
        (g,) = llm.generate([[5, 6, 7]], FREELY, **options)
        assert g.speculation.proposed == g.speculation.accepted
        assert g.speculation.tokens_per_step > 3


def test_the_model_under_a_scheme_that_changes_no_weight_is_always_right(tmp_path):
    # Eight bits hold a Markov model of integer logits exactly; its other matrices are zeros.
    values_VV = torch.randint(-127, 128, (16, 16), generator=torch.Generator().manual_seed(0))
    values_VV[:, 0] = 127  # the largest of each row of the head, so that its scale is the unit
    folder = write_markov(tmp_path, values_VV.T / 64, n_layers=2)
    llm = LLM(str(folder), dtype="float32", draft="self-int8", draft_policy="always")
    assert llm.describe().kernels["draft/qkv_proj"] == "int8/torch"
    for options in ({}, {"temperature": 1.0, "seed": 4}):
        (g,) = llm.generate([[5, 6, 7]], FREELY, **options)
        assert g.speculation.proposed == g.speculation.accepted
        assert g.speculation.tokens_per_step > 3


def test_a_better_copy_of_the_model_drafts_better(deep):
    found = []
    for scheme in ("int4-g64", "int8"):
        llm = LLM(str(deep), dtype="float32", draft=f"self-{scheme}", draft_policy="always")
        found.append(total(llm.generate(PROMPTS, FREELY, temperature=0.8, seed=1)).acceptance[0])
    assert 0.1 < found[0] < found[1]


def test_a_self_draft_drafts_for_weights_as_the_model_has_them(deep, tmp_path):
    # Of an int8 model in int8 nothing is lost a second time; four bits are those of its int8.
    copy = quantize_checkpoint(deep, tmp_path / "int8", quant="int8")
    for stored in (deep, copy):
        llm = LLM(str(stored), dtype="float32", quant="int8", draft="self-int4-g32")
        model, draft = llm._runner._model.decoder, llm._runner._model.draft_decoder
        for block, of_draft in zip(model.blocks, draft.blocks, strict=True):
            for name, linear in block.linears.items():
                values, scale = linear.packed
                dense = values * scale[:, None]
                expected = parse_scheme("int4-g32").quantize(dense).dequantize()
                ours = of_draft.linears[name].kernel._dequantize(*of_draft.linears[name].packed)
                assert torch.equal(ours, expected)
            assert of_draft.attention.norm is block.attention.norm
        assert draft.embedding is model.embedding
        assert draft.head is model.head, "int8 already"


@pytest.mark.parametrize(
    ("execution", "dtype", "draft"),
    [
        ("eager", "float32", "self"),
        ("eager", "bfloat16", "ngram+self"),
        ("compile", "float32", "self"),
    ],
)
def test_high_halves_of_int8_in_groups_draft_and_change_no_token(deep, execution, dtype, draft):
    # bfloat16 has the same bits with CPU kernels, whatever the number of rows.
    if dtype == "bfloat16" and cpu.unavailable_reason() is not None:
        pytest.skip(cpu.unavailable_reason())
    options = {"quant": "int8-g32", "dtype": dtype, "max_batch_size": 3}
    plain = LLM(str(deep), **options)
    llm = LLM(str(deep), **options, execution=execution, draft=draft, draft_policy="always")
    sampling = SAMPLING["truncated"] | {"seed": 2}
    assert answers(llm) == answers(plain)
    assert answers(llm, **sampling) == answers(plain, **sampling)
    assert total(llm.generate(PROMPTS, FREELY, **sampling)).acceptance[0] > 0.1
    kernels = llm.describe().kernels
    suffix = "cpu" if dtype == "bfloat16" else "dequantized"
    assert kernels["down_proj"] == f"nested/{suffix}"
    assert kernels["draft/down_proj"] == f"int4/{suffix}"


def test_high_halves_draft_from_the_models_own_bytes(deep, tmp_path):
    copy = quantize_checkpoint(deep, tmp_path / "copy", quant="int8-g32")
    for stored, options in (
        (deep, {"quant": "int8-g32"}),
        (deep, {"quant": "int8-g32", "weights": "random"}),
        (copy, {}),
    ):
        llm = LLM(str(stored), dtype="float32", draft="self", **options)
        model, draft = llm._runner._model.decoder, llm._runner._model.draft_decoder
        for block, of_draft in zip(model.blocks, draft.blocks, strict=True):
            for name, linear in block.linears.items():
                ours, theirs = of_draft.linears[name].packed, linear.packed
                held = {t.untyped_storage().data_ptr() for t in theirs}
                assert held.issuperset(t.untyped_storage().data_ptr() for t in ours)
        assert draft.head is model.head
        assert llm.describe().kernels["draft/qkv_proj"] == "int4/dequantized"


def test_high_halves_of_other_weights_are_refused(folder, deep):
    for quant, saves in (("none", True), ("int8", True), ("int4-g64", False), ("auto", True)):
        message = refused(folder, draft="self", quant=quant)
        assert "draft 'self' uses the high half of each int8 weight quantized in groups" in message
        assert "give --quant int8-g64" in message
        advised = EngineConfig(model=str(folder), quant="int8-g64", draft="self", device="cpu")
        assert prepare(advised).draft.nested
        assert ("--draft self-int4-g64." in message) == saves
        if saves:
            copied = dataclasses.replace(advised, quant=quant, draft="self-int4-g64")
            assert prepare(copied).draft.schemes
    assert "self-" in refused(folder, draft="self-", quant="int8-g32"), "no scheme, so a model"
    assert "names a drafter twice" in refused(deep, quant="int8-g32", draft="self+self-int4-g32")
    copied = EngineConfig(model=str(deep), quant="int8-g32", draft="self-int4-g32", device="cpu")
    assert prepare(copied).draft.schemes, "a copy, as of any weight"


def test_random_weights_are_requantized_for_their_drafts(deep):
    options = {"weights": "random", "dtype": "float32", "max_batch_size": 2}
    plain = LLM(str(deep), quant="int8", **options)
    for quant, draft in (("int8", "self-int4-g32"), ("none", "self-int8")):
        llm = LLM(str(deep), quant=quant, draft=draft, draft_policy="always", **options)
        seen = total(llm.generate(PROMPTS, FREELY))
        assert seen.acceptance[0] > 0.3, "of other random weights it would be 1 in 300"
        if quant == "int8":
            assert answers(llm) == answers(plain)


def test_of_several_drafters_each_is_used_and_counted(deep):
    options = {"dtype": "float32", "draft_policy": "always", "max_batch_size": 2}
    llm = LLM(str(deep), draft="ngram,exit-2", **options)
    plain, used = LLM(str(deep), dtype="float32", max_batch_size=2), []
    run = llm._runner.run
    llm._runner.run = lambda command: used.append(getattr(command, "drafter", None)) or run(command)
    long = SamplingParams(max_new_tokens=60, ignore_eos=True)
    for prompts in ([[7]], [[5, 6], [260, 3] * 30]):
        found, expected = (each.generate(prompts, long) for each in (llm, plain))
        assert [g.token_ids for g in found] == [g.token_ids for g in expected]
        assert total(found).n_tokens == sum(len(g.token_ids) - 1 for g in found)
    assert {0, 1} <= set(used)
    assert llm.step_costs([[7]], max_new_tokens=4) == (), "each has costs of its own"


def test_text_that_repeats_is_looked_up(tmp_path):
    folder = write_script(tmp_path, range(10, 16))
    llm = LLM(str(folder), dtype="float32", draft="ngram", draft_policy="always")
    (g,) = llm.generate([[10, 11, 12, 13, 14, 15, 10]], FREELY)
    assert g.speculation.accepted == g.speculation.proposed
    assert g.speculation.n_plain_steps == 0
    assert len(g.speculation.proposed) == 4


def test_text_without_repetition_is_decoded_plainly(tmp_path):
    folder = write_script(tmp_path, range(10, 90))
    llm = LLM(str(folder), dtype="float32", draft="ngram", draft_policy="always", max_seq_len=64)
    (g,) = llm.generate([[10, 11, 12]], FREELY)
    assert g.token_ids == tuple(range(13, 13 + 24))
    assert g.speculation.n_plain_steps == g.speculation.n_steps == 23
    assert g.speculation.proposed == ()


@pytest.mark.parametrize("draft", ["ngram+self-int4-g32", "another"])
@pytest.mark.parametrize("policy", ["always", "adaptive"])
def test_a_request_without_drafts_has_none_beside_others_with_them(
    deep, drafts, plain, draft, policy
):
    name = drafts.get(draft, draft)
    llm = LLM(str(deep), dtype="float32", max_batch_size=3, draft=name, draft_policy=policy)
    for options in ({}, SAMPLING["drawn"] | {"seed": 3}, SAMPLING["adjusted"] | {"seed": 4}):
        speculates = [i % 3 != 1 for i in range(len(PROMPTS))]
        params = [changed_params(options, speculate=each) for each in speculates]
        tickets = [llm.stream([p], each) for p, each in zip(PROMPTS, params, strict=True)]
        found = together(tickets)
        assert [g.token_ids for g in found] == answers(plain, **options)
        for g, each in zip(found, speculates, strict=True):
            assert each or g.speculation.n_plain_steps == g.speculation.n_steps
        if policy == "always":
            assert any(g.speculation.n_plain_steps < g.speculation.n_steps for g in found)
    (g,) = llm.generate([PROMPTS[3]], FREELY, speculate=False)
    assert g.speculation.proposed == ()


def changed_params(options: dict, **others: object) -> SamplingParams:
    return dataclasses.replace(FREELY, **options, **others)


def together(streams: list) -> list[Generation]:
    """Takes pieces of each stream by turns, so that they decode in the same steps."""
    done: dict[int, Generation] = {}
    while len(done) < len(streams):
        for i, stream in enumerate(streams):
            if i not in done and (delta := next(stream)).generation is not None:
                done[i] = delta.generation
    return [done[i] for i in range(len(streams))]


def test_counts_of_speculation_add_up(deep):
    llm = LLM(str(deep), dtype="float32", draft="exit-2", draft_policy="always", draft_tokens=3)
    for g in llm.generate(PROMPTS, FREELY):
        seen = g.speculation
        assert seen.n_tokens == len(g.token_ids) - 1  # the first comes of the prompt
        assert seen.n_tokens <= seen.n_steps + sum(seen.accepted)
        assert list(seen.accepted) == sorted(seen.accepted, reverse=True)
        assert all(a <= p for a, p in zip(seen.accepted, seen.proposed, strict=True))
        assert seen.draft_s > 0
        assert seen.verify_s > 0


def test_an_engine_without_drafts_counts_nothing(plain):
    (g,) = plain.generate([[7]], FREELY)
    assert g.speculation is None


# ----------------------------------------------------------------------------------- distribution


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, np.ndarray]:
    """A Markov chain of six tokens drafted for by another one, and its logits [V, V]."""
    target_VV, noise_VV = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(3))
    target, other = (
        str(write_markov(tmp_path_factory.mktemp("chain"), logits_VV))
        for logits_VV in (target_VV, target_VV + noise_VV)
    )
    llm = LLM(target, dtype="float32", draft=other, draft_policy="always")
    return llm, target_VV.numpy()


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.1}],
    ids=lambda o: ",".join(o) or "all",
)
def test_draws_follow_the_exact_distribution_at_first_and_later_positions(chains, options):
    llm, logits_VV = chains
    params = SamplingParams(max_new_tokens=5, ignore_eos=True, temperature=0.8, **options)
    generated = [llm.generate([[2]], params, seed=seed)[0] for seed in range(600)]
    seen = total(generated)
    assert 0 < sum(seen.accepted) < sum(seen.proposed)
    transition_VV = np.array([distribution(logits, params, []) for logits in logits_VV])
    probabilities = np.eye(6)[2]
    for tokens in np.array([g.token_ids for g in generated]).T:
        probabilities = probabilities @ transition_VV
        counts, possible = np.bincount(tokens, minlength=6), probabilities > 0
        assert counts[~possible].sum() == 0
        expected = probabilities[possible] * len(generated)
        assert stats.chisquare(counts[possible], expected).pvalue > 1e-4


def test_a_draft_that_the_model_would_never_choose_is_never_kept(tmp_path_factory):
    # The draft model is sure of another token, to which top_k leaves no probability.
    ids = range(10, 16)
    target, other = (
        str(write_script(tmp_path_factory.mktemp("s"), order)) for order in (ids, ids[::-1])
    )
    llm = LLM(target, dtype="float32", draft=other, draft_policy="always")
    (g,) = llm.generate([[10]], FREELY, temperature=5.0, top_k=1)
    assert g.token_ids == tuple(10 + (i + 1) % 6 for i in range(24))
    assert sum(g.speculation.proposed) > 0
    assert sum(g.speculation.accepted) == 0


# ------------------------------------------------------------------------------- how answers end


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, LLM]:
    """Engines with and without drafts that are always right, whose answers end by themselves."""
    folder = str(write_random(tmp_path_factory.mktemp("eos"), eos=range(0, N_TOKENS, 11)))
    options = {"dtype": "float32", "max_batch_size": 2, "max_seq_len": 90}
    drafting = LLM(folder, draft=folder, draft_policy="always", draft_tokens=5, **options)
    return drafting, LLM(folder, **options)


def same(a: Generation, b: Generation) -> None:
    assert a.token_ids == b.token_ids
    assert (a.text, a.finish_reason) == (b.text, b.finish_reason)
    for x, y in zip(a.logprobs or (), b.logprobs or (), strict=True):
        assert x.token_id == y.token_id
        assert x.logprob == pytest.approx(y.logprob, abs=1e-4)
        assert [i for i, _ in x.top] == [i for i, _ in y.top]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="eos"),
        pytest.param({"ignore_eos": True}, id="full_context"),
        *(
            pytest.param({"max_new_tokens": n, "ignore_eos": True}, id=f"{n}_tokens")
            for n in (1, 2, 3, 7)
        ),
        pytest.param({"logprobs": 3, "max_new_tokens": 15}, id="logprobs"),
        pytest.param({"temperature": 1.0, "seed": 3, "logprobs": 2}, id="drawn"),
    ],
)
def test_answers_end_as_without_speculation(ending, options):
    drafting, plain = ending
    prompts = [[i] for i in range(2, 12)]
    for a, b in zip(
        drafting.generate(prompts, SamplingParams(**options)),
        plain.generate(prompts, SamplingParams(**options)),
        strict=True,
    ):
        same(a, b)


def test_stop_strings_end_answers_as_without_speculation(tmp_path):
    text = "there is the token of the engine "
    ids = list(dict.fromkeys(encode(text)))
    folder = str(write_script(tmp_path, ids))
    options = {"dtype": "float32", "max_seq_len": 60}
    plain = LLM(folder, **options)
    drafting = LLM(folder, draft=folder, draft_policy="always", draft_tokens=7, **options)
    whole = plain.generate([ids[:1]], FREELY)[0].text
    for start in range(1, 10):
        stop = whole[start : start + 3]
        same(*(llm.generate([ids[:1]], FREELY, stop=(stop,))[0] for llm in (drafting, plain)))


def test_streamed_pieces_make_up_the_answer(ending):
    drafting, plain = ending
    pieces = list(drafting.stream([[5], [6], [7]], FREELY))
    for i, g in enumerate(plain.generate([[5], [6], [7]], FREELY)):
        mine = [piece for piece in pieces if piece.index == i]
        assert tuple(t for piece in mine for t in piece.token_ids) == g.token_ids
        assert "".join(piece.text for piece in mine) == g.text
        assert len(mine) < len(g.token_ids)


# -------------------------------------------------------------------------------------- refusals


def refused(folder: Path, **options: object) -> str:
    with pytest.raises(HotloopError) as caught:
        LLM(str(folder), dtype="float32", **options)
    return str(caught.value)


def test_a_draft_model_of_another_vocabulary_is_refused_by_the_first_difference(folder, tmp_path):
    other = write_random(tmp_path)
    made = json.loads((other / "tokenizer.json").read_text())
    vocabulary = made["model"]["vocab"]
    first, second = vocabulary["a"], vocabulary["b"]
    vocabulary["a"], vocabulary["b"] = second, first
    (other / "tokenizer.json").write_text(json.dumps(made))
    message = refused(folder, draft=str(other))
    assert f"token {first} is b'b', not b'a'" in message


def test_a_draft_model_with_more_tokens_is_refused(folder):
    message = refused(folder, draft="llama-2-7b", weights="random")
    assert "32000" in message
    assert "300" in message


def test_drafts_that_cannot_be_are_refused(folder):
    assert "from 1 to 1" in refused(folder, draft="exit-2")
    assert "neither 'ngram'" in refused(folder, draft="no-such-model")
    assert "nor 'self', nor 'self-SCHEME'" in refused(folder, draft="no-such-model")
    assert "draft_quant" in refused(folder, draft="ngram", draft_quant="int8")
    assert "draft_quant" in refused(folder, draft="self-int8", draft_quant="int8")
    assert "draft 'self-int5': unknown quantization" in refused(folder, draft="self-int5")
    message = refused(folder, draft="self-int4-g128")
    assert "draft 'self-int4-g128': model.layers.0" in message
    assert message.endswith("Use self-int4-g32 or self-int4-g64 instead.")
    with pytest.raises(ConfigError, match="draft_tokens"):
        LLM(str(folder), draft="ngram", draft_tokens=0)


@pytest.mark.parametrize(
    ("quant", "draft"),
    [("int8", "self-int8"), ("none", "self-none"), ("none", "self-auto"), ("int8", "self-fp8")],
)
def test_a_self_draft_that_reads_no_less_than_the_model_is_refused(folder, quant, draft):
    message = refused(folder, quant=quant, draft=draft)
    assert f"draft {draft!r} reads" in message
    assert "save no time. Choose a scheme with fewer bits" in message


@pytest.mark.parametrize("draft", ["ngram+ngram", "self-int8,self-int4-g32", "self-int8,self-int8"])
def test_several_drafters_are_different_ones(folder, draft):
    assert f"draft {draft!r} names a drafter twice" in refused(folder, draft=draft)


def test_several_drafters_are_named_by_plus_and_need_no_other_model(folder):
    config = EngineConfig(model=str(folder), draft="ngram,self-int4-sym-g32, exit-1", device="cpu")
    assert prepare(config).config.draft == "ngram+self-int4-g32+exit-1"
    assert config.name.endswith("draft=ngram,self-int4-sym-g32, exit-1-4")
    assert "draft 'exit-9' runs" in refused(folder, draft="ngram+exit-9")
    assert "neither 'ngram'" in refused(folder, draft="ngram+no-such-model")


def test_a_self_draft_has_a_head_of_its_own_where_that_saves_bytes(deep, folder):
    for draft, quant, head, owns in (
        ("self-int4-g32", "none", "auto", True),  # the head is a quarter of these tiny models
        ("self-int4-g32", "int8", "auto", False),
        ("self-int4-g32", "int8", "none", True),
        ("self-int8", "none", "int8", False),
    ):
        config = EngineConfig(model=str(deep), quant=quant, head=head, draft=draft, device="cpu")
        assert ("lm_head" in prepare(config).draft.schemes) == owns
    name = EngineConfig(model=str(folder), draft="self-int4-sym-g32", device="cpu")
    assert prepare(name).config.draft == resolve_auto(name).draft == "self-int4-g32"


def test_a_context_longer_than_the_drafts_is_refused_only_where_it_was_asked_for(folder, tmp_path):
    short = write_random(tmp_path, max_position_embeddings=16)
    assert "context of 16" in refused(folder, draft=str(short), max_seq_len=100)
    with LLM(str(folder), dtype="float32", draft=str(short)) as llm:
        assert llm.describe().max_seq_len == 16


# ------------------------------------------------------------------------------------ controller


class Asker:
    """A request, of which a controller knows only that it is one."""


class Device:
    """A pretended device: what a step costs, and how often drafts are right, by drafter.

    ``found`` is how often there is a draft, by drafter; a step without drafts is a plain one.
    """

    def __init__(
        self,
        cost_s: dict[int, float],
        *chances: float,
        factors: tuple = (1.0,),
        found: tuple = (),
    ) -> None:
        self.cost_s, self.chances, self.factors = cost_s, list(chances), factors
        self.found = list(found or [1.0] * len(chances))
        self.random = np.random.default_rng(0)
        self.seconds = self.tokens = 0.0
        self.sizes: list[int] = []
        self.drafters: list[int] = []
        self.limits = {Asker(): 99}

    def run(self, controller: DraftController, n_steps: int) -> None:
        for _ in range(n_steps):
            choice = controller.choose(self.limits, 99)
            k, chance = choice.k, self.chances[choice.drafter]
            if self.random.random() >= self.found[choice.drafter]:
                k = 0
            right = int(np.cumprod(self.random.random(k) < chance).sum())
            cost = self.cost_s[0] + (self.cost_s[k] - self.cost_s[0]) * self.factors[choice.drafter]
            times = StepTimes(draft_s=cost / 3, model_s=2 * cost / 3)
            kept = dict.fromkeys(self.limits, right + 1)
            controller.observe(1, k, choice=choice, times=times, kept=kept)
            self.sizes.append(k)
            self.drafters.append(choice.drafter)
            self.seconds += cost
            self.tokens += right + 1


COSTS_S = {0: 0.010, 1: 0.013, 2: 0.014, 4: 0.018}


def test_drafting_that_does_not_pay_costs_at_most_a_few_per_cent():
    for chance in (0.0, 0.1, 0.25):
        device = Device(COSTS_S, chance)
        device.run(DraftController(sizes_up_to(4)), 1000)
        assert device.seconds / device.tokens < COSTS_S[0] * 1.03


def test_drafting_that_pays_is_found_and_kept():
    device = Device(COSTS_S, 0.9)
    device.run(DraftController(sizes_up_to(4)), 300)
    best = COSTS_S[4] / sum(0.9**i for i in range(5))
    assert device.seconds / device.tokens < best * 1.05
    assert device.sizes.count(4) > 250


H200_S = {0: 0.0021, 1: 0.0037, 2: 0.0052, 4: 0.0081}
"""A model of 8B in int8, and its high four bits as its drafter: break-even is at 0.76."""


def engines(chance: float, n_steps: int, warm_up: float = 0.0) -> list[tuple[Device, Device]]:
    """Runs two requests on each of twelve engines, after a warm-up in other text."""
    found = []
    for seed in range(12):
        controller = DraftController(sizes_up_to(4))
        Device(H200_S, warm_up).run(controller, 20)
        controller.forget_texts()
        pair = Device(H200_S, chance), Device(H200_S, chance)
        for i, device in enumerate(pair):
            device.random = np.random.default_rng([seed, i])
            device.run(controller, n_steps)
        found.append(pair)
    return found


def test_drafting_that_pays_by_a_tenth_is_not_given_up_after_a_bad_streak():
    """Ten samples of 0.92 are often below 0.76; sixty hardly ever are."""
    first, later = zip(*engines(0.92, 60), strict=True)
    for devices, share in ((first, 0.8), (later, 0.85)):
        drafted = [sum(size > 0 for size in device.sizes) / 60 for device in devices]
        assert np.mean(drafted) > share
    speeds = [device.tokens / device.seconds * H200_S[0] for device in later]
    assert np.mean(speeds) > 1.08


def test_what_warm_up_accepted_says_nothing_about_texts():
    first, _ = zip(*engines(0.92, 20, warm_up=0.0), strict=True)
    assert all(device.sizes[0] > 0 for device in first)
    first, _ = zip(*engines(0.0, 20, warm_up=1.0), strict=True)
    lost = [device.seconds / H200_S[0] - device.tokens for device in first]
    assert max(lost) < DraftController.INITIAL_GAINED + 2


def test_drafts_lose_one_per_cent_after_what_they_may_lose_at_first():
    for chance in (0.0, 0.5, 0.7):
        lost = plain = 0.0
        for pair in engines(chance, 250):
            plain += sum(device.tokens for device in pair)
            lost += sum(device.seconds / H200_S[0] - device.tokens for device in pair)
            lost -= DraftController.INITIAL_GAINED
        assert lost < 0.011 * plain


def test_one_cold_step_does_not_decide_what_steps_of_its_kind_cost():
    controller, limits, seen = DraftController(sizes_up_to(4)), {Asker(): 99}, set()
    for _ in range(30):
        choice = controller.choose(limits, 99)
        cost_s = COSTS_S[choice.k] * (1.0 if choice.k in seen else 4.0)
        seen.add(choice.k)
        kept = dict.fromkeys(limits, choice.k + 1)
        times = StepTimes(model_s=cost_s)
        controller.observe(1, choice.k, choice=choice, times=times, kept=kept)
    assert choice.k == 4, "its first step took longer than four plain ones"


class Machine(Device):
    """A device whose speed changes, and whose steps vary, as of a CPU beside other processes.

    ``slowness`` is the factor of all steps from now on, and ``noise`` the deviation of their logs.
    """

    slowness, noise = 1.0, 0.0

    def run(self, controller: DraftController, n_steps: int) -> None:
        costs_s = self.cost_s
        for _ in range(n_steps):
            factor = self.slowness * math.exp(self.random.normal(0.0, self.noise))
            self.cost_s = {k: cost_s * factor for k, cost_s in costs_s.items()}
            super().run(controller, 1)
        self.cost_s = costs_s


INT8_CPU_S = {0: 0.0069, 1: 0.0131, 2: 0.0201, 4: 0.0325}
"""SmolLM2 in int8 with drafts of itself in int4: at any acceptance they gain next to nothing."""


def test_a_machine_whose_speed_changes_does_not_make_drafts_look_cheap():
    """Plain steps between drafts that seem to pay a little keep their time current."""
    lost = []
    for seed in range(12):
        controller, machine = DraftController(sizes_up_to(4)), Machine(INT8_CPU_S, 0.8)
        machine.random, machine.noise = np.random.default_rng(seed), 0.06
        machine.run(controller, 100)
        plain = lost_s = 0.0
        for i in range(60):
            machine.slowness = math.exp(0.12 * math.sin(i / 4))
            machine.seconds = machine.tokens = 0.0
            machine.run(controller, 10)
            plain_s = machine.tokens * machine.slowness * INT8_CPU_S[0]
            plain, lost_s = plain + plain_s, lost_s + machine.seconds - plain_s
        lost.append(lost_s / plain - machine.noise**2 / 2)
    assert np.mean(lost) < 0.012


def test_drafts_that_gain_less_than_the_times_of_steps_tell_are_not_made():
    """Of several sizes, one seems the best and faster than plain steps by chance."""
    lost = []
    for seed in range(12):
        controller = DraftController(sizes_up_to(4))
        machine = Machine(INT8_CPU_S, 0.85)
        machine.random, machine.noise = np.random.default_rng(seed), 0.08
        machine.run(controller, 500)
        mean_s = INT8_CPU_S[0] * math.exp(machine.noise**2 / 2)
        lost.append(machine.seconds / mean_s / machine.tokens - 1)
    assert np.mean(lost) < 0.015


def test_plain_steps_are_decided_for_several_steps_and_other_requests_are_not_kept_waiting(
    monkeypatch,
):
    decided, choose = [], DraftController._choose
    monkeypatch.setattr(DraftController, "_choose", lambda *of: decided.append(1) or choose(*of))
    controller, bad, good = DraftController(sizes_up_to(4)), Asker(), Asker()
    steps_of(controller, {good: 0.95}, 40)
    steps_of(controller, {bad: 0.0}, 100)
    decided.clear()
    assert steps_of(controller, {bad: 0.0}, 100).count(0) > 95
    assert len(decided) < 30
    assert steps_of(controller, {good: 0.95}, 1) == [4]


def test_plain_steps_are_the_more_frequent_the_less_drafts_gain():
    plain = []
    for draft_s in (0.002, 0.0092):
        device = Device({0: 0.01, 1: 0.01 + draft_s}, 1.0)
        device.run(DraftController((0, 1)), 640)
        plain.append(device.sizes.count(0))
    assert 8 <= plain[0] <= 12, "one in 64, and those at the beginning"
    assert 25 <= plain[1] <= 50
    assert device.tokens / device.seconds * 0.01 > 1.038, "of the 1.042 that drafts give"


def test_the_controller_follows_a_change_of_text():
    controller, device = DraftController(sizes_up_to(4)), Device(COSTS_S, 0.95)
    device.run(controller, 200)
    device.chances[0] = 0.0
    device.run(controller, 100)
    assert device.sizes[-60:].count(0) > 55
    device.chances[0] = 0.95
    device.run(controller, 1500)
    assert device.sizes[-100:].count(4) > 90


def steps_of(
    controller: DraftController, chances: dict[Asker, float], n_steps: int, *others: Asker
) -> list[int]:
    """Runs steps of several requests, each with its chance, and of others that get no drafts.

    Returns:
        The drafts of each step.
    """
    random, sizes = np.random.default_rng(1), []
    limits = dict.fromkeys(chances, 99) | dict.fromkeys(others, 0)
    for _ in range(n_steps):
        choice = controller.choose(limits, 99)
        kept = {
            asker: 1 + int(np.cumprod(random.random(choice.k) < chances.get(asker, 0.0)).sum())
            for asker in limits
        }
        times = StepTimes(model_s=COSTS_S[choice.k])
        controller.observe(len(limits), choice.k, choice=choice, times=times, kept=kept)
        sizes.append(choice.k)
    return sizes


def test_acceptance_is_that_of_each_request():
    controller, good, bad = DraftController(sizes_up_to(4)), Asker(), Asker()
    steps_of(controller, {good: 0.95}, 40)
    steps_of(controller, {bad: 0.0, good: 0.95}, 40)  # together they draft, for the one
    assert steps_of(controller, {bad: 0.0}, 40)[-30:].count(0) > 26, "it never did by itself"
    assert steps_of(controller, {good: 0.95}, 30).count(4) > 25, "what others do is not its own"


def test_requests_that_can_use_no_drafts_count_as_one_token():
    controller = DraftController(sizes_up_to(4))
    asker, others = Asker(), [Asker() for _ in range(7)]
    everybody = dict.fromkeys([asker, *others], 0.7)
    assert steps_of(controller, everybody, 60)[-30:].count(0) < 5
    found = steps_of(controller, {asker: 0.7}, 60, *others)
    assert found[-30:].count(0) > 26, "one request in eight gains less than all of them pay"
    assert steps_of(controller, everybody, 30)[-20:].count(0) < 5, "theirs are no samples"


def test_what_steps_of_some_rows_take_is_measured_of_others_only_where_drafts_seem_to_pay():
    controller, asker = DraftController(sizes_up_to(4)), Asker()
    steps_of(controller, {asker: 0.0}, 200)
    three = {asker: 0.0, Asker(): 0.0, Asker(): 0.0}
    assert steps_of(controller, three, 16).count(0) >= 13, "not two steps of each size"
    pays = {Asker(): 0.95, Asker(): 0.95}
    assert steps_of(controller, pays, 60)[-30:].count(4) > 25


def test_text_that_misleads_the_controller_costs_no_more_than_its_share():
    """Whatever it drafts in is wrong, and what it does not draft in would be right."""
    for flips in (6, 12, 25):
        device, controller = Device(COSTS_S, 0.95), DraftController(sizes_up_to(4))
        device.run(controller, 20)
        start = device.seconds, device.tokens
        for _ in range(4000 // flips):
            drafts = device.sizes[-1] > 0
            device.chances[0] = 0.0 if drafts else 0.95
            device.run(controller, flips)
        seconds, tokens = device.seconds - start[0], device.tokens - start[1]
        allowed = COSTS_S[0] * (tokens + DraftController.MAX_GAINED + 5)
        assert seconds < 1.012 * allowed


def chains_of(
    controller: DraftController, unsure: float, n_steps: int, seed: int
) -> tuple[float, list[int]]:
    """Runs chains of drafts that know of themselves how good they are.

    Returns:
        Tokens per second of the last half of the steps, and the drafts of each.
    """
    random, limits = np.random.default_rng(seed), {Asker(): 99}
    tokens, seconds, made = [], [], []
    for _ in range(n_steps):
        choice = controller.choose(limits, 99)
        chances = np.where(random.random(choice.k) < unsure, 0.2, 0.99)
        ends = np.cumprod(chances)[:-1] < choice.min_probability
        n_made = int(ends.argmax()) + 1 if ends.any() else choice.k
        kept = 1 + int(np.cumprod(random.random(n_made) < chances[:n_made]).sum())
        times = StepTimes(draft_s=0.004 * n_made, model_s=0.010)
        controller.observe(
            1, n_made, choice=choice, times=times, kept=dict.fromkeys(limits, kept), n_made=n_made
        )
        tokens.append(kept)
        seconds.append(0.010 + 0.004 * n_made)
        made.append(n_made)
    half = n_steps // 2
    return sum(tokens[half:]) / sum(seconds[half:]), made


def test_a_chain_ends_where_another_draft_does_not_pay():
    for unsure, gain in ((0.3, 1.08), (0.6, 1.0), (0.0, 1.0)):
        whole, early, lengths = 0.0, 0.0, []
        for seed in range(4):
            whole += chains_of(DraftController(sizes_up_to(7)), unsure, 1000, seed)[0]
            ending = DraftController(sizes_up_to(7), ends_early=True)
            speed, made = chains_of(ending, unsure, 1000, seed)
            early += speed
            lengths += made[500:]
        if unsure == 0.3:
            assert {1, 3, 5, 7} <= set(lengths), "of any length"
        if unsure == 0.0:
            assert lengths.count(7) > 1800
        assert early > 0.98 * gain * whole


def test_steps_whose_chains_are_long_are_not_taken_for_delayed_ones():
    """Half of the chains end at their first draft, which is rejected; others are accepted whole."""
    for draft_s, pays in ((0.009, False), (0.005, True)):
        controller, random = DraftController(sizes_up_to(4)), np.random.default_rng(1)
        limits, tokens, seconds, sizes = {Asker(): 99}, 0, 0.0, []
        for _ in range(1000):
            choice = controller.choose(limits, 99)
            n_made = choice.k if random.random() < 0.5 else min(1, choice.k)
            kept = 1 + (n_made if n_made == choice.k > 1 else 0)
            step_s = 0.010 + draft_s * n_made
            controller.observe(
                1,
                n_made,
                choice=choice,
                times=StepTimes(model_s=step_s),
                kept=dict.fromkeys(limits, kept),
                n_made=n_made,
            )
            tokens, seconds = tokens + kept, seconds + step_s
            sizes.append(choice.k)
        if pays:
            assert sizes[-200:].count(4) > 180
        else:
            assert sizes[-200:].count(0) > 180
            assert seconds < 1.02 * 0.010 * tokens


def test_what_verification_takes_at_any_length_does_not_end_chains():
    """A chain ends where another draft does not pay: a CUDA graph verifies all positions anyway."""
    controller, random = DraftController((0, 4), ends_early=True), np.random.default_rng(1)
    limits, tokens, seconds = {Asker(): 99}, 0, 0.0
    for i in range(400):
        choice = controller.choose(limits, 99)
        lengths = ([1, 2] if i % 2 else [4, 3]) if choice.k else [0]  # of a program
        times = [0.010 + (0.004 + 0.001 * n_made if n_made else 0.0) for n_made in lengths]
        for n_made in lengths:
            kept = 1 + int(np.cumprod(random.random(n_made) < 0.9).sum())
            tokens += kept
            controller.observe(
                1,
                choice.k,
                choice=choice,
                times=StepTimes(model_s=np.mean(times)),  # which is known of all together
                kept=dict.fromkeys(limits, kept),
                n_made=n_made,
                mean_made=np.mean(lengths),
            )
        seconds += sum(times)
    assert choice.min_probability == pytest.approx(tokens / seconds * 0.001 / 0.9, rel=0.4)


BOTH = {"factors": (0.2, 1.0)}
"""A drafter that costs little, such as n-grams, and one that costs more."""


def test_the_drafter_that_is_faster_is_found_and_kept():
    for chances, best, per_step in (
        ((0.5, 0.9), 1, sum(0.9**i for i in range(5)) / COSTS_S[4]),
        ((0.8, 0.85), 0, sum(0.8**i for i in range(5)) / 0.0116),
    ):
        device = Device(COSTS_S, *chances, **BOTH)
        device.run(DraftController(sizes_up_to(4), n_drafters=2), 1000)
        assert device.tokens / device.seconds > 0.96 * per_step
        assert device.drafters[-200:].count(best) > 170


def test_drafters_that_do_not_pay_cost_at_most_a_few_per_cent_together():
    device = Device(COSTS_S, 0.0, 0.1, 0.1, factors=(0.2, 1.0, 1.0))
    device.run(DraftController(sizes_up_to(4), n_drafters=3), 1000)
    assert device.seconds / device.tokens < COSTS_S[0] * 1.03


def test_a_drafter_that_becomes_better_than_the_best_is_noticed():
    controller, device = (
        DraftController(sizes_up_to(4), n_drafters=2),
        Device(COSTS_S, 0.0, 0.85, **BOTH),
    )
    device.run(controller, 300)
    assert device.drafters[-100:].count(1) > 85
    device.chances[0] = 0.95
    device.run(controller, 500)
    assert device.drafters[-100:].count(0) > 85


def test_a_drafter_that_costs_more_than_any_trial_may_is_not_waited_for():
    controller = DraftController(sizes_up_to(4), n_drafters=2)
    device = Device(COSTS_S, 0.0, 0.0, factors=(0.2, 20.0))
    device.run(controller, 300)
    device.chances[0] = 0.95
    device.run(controller, 500)
    assert device.drafters[-100:].count(0) > 85
    assert device.sizes[-100:].count(4) > 85


@pytest.mark.parametrize("chance", [0.1, 0.95])
@pytest.mark.parametrize("always", [False, True])
def test_a_drafter_that_finds_no_drafts_does_not_keep_another_from_drafting(chance, always):
    """Whether or not what it found earlier was good."""
    controller = DraftController(sizes_up_to(4), n_drafters=2, always=always)
    device = Device(COSTS_S, chance, 0.85, found=(0.0, 1.0), **BOTH)
    device.run(controller, 200)
    assert device.drafters[-100:].count(1) > 85
    device.found[0] = 1.0
    device.run(controller, 500)
    best = 0 if chance > 0.85 else 1
    assert device.drafters[-100:].count(best) > 85
    device.found[0] = 0.0
    device.run(controller, 300)
    assert device.drafters[-100:].count(1) > 85


@pytest.mark.parametrize("n_drafters", [1, 2])
def test_whatever_steps_found_and_took_there_is_a_choice(n_drafters):
    """Drafts are rare, sizes are new to a program, requests come and go: few steps are alike."""
    for seed in range(40):
        random = np.random.default_rng(seed)
        controller = DraftController(sizes_up_to(4), n_drafters=n_drafters, ends_early=True)
        askers, unseen = [Asker() for _ in range(3)], {1, 2, 4}
        for _ in range(60):
            limits = {
                asker: int(random.integers(0, 6)) for asker in askers if random.random() < 0.6
            }
            if not limits:
                continue
            choice = controller.choose(limits, 99)
            assert choice.k <= max(limits.values())
            k = choice.k if random.random() < 0.15 else 0
            times = None if k in unseen else StepTimes(model_s=float(random.gamma(2.0, 0.01)))
            unseen.discard(k)
            kept = {asker: int(random.integers(1, k + 2)) for asker in limits}
            controller.observe(len(limits), k, choice=choice, times=times, kept=kept)


def test_always_drafting_chooses_among_drafters_as_well():
    controller = DraftController(sizes_up_to(4), n_drafters=2, always=True)
    device = Device(COSTS_S, 0.0, 0.85, **BOTH)
    device.run(controller, 300)
    assert set(device.sizes) == {4}
    assert device.drafters[-100:].count(1) > 85
    device.chances[0] = 0.95
    device.run(controller, 500)
    assert device.drafters[-100:].count(0) > 85


def test_the_controller_keeps_within_the_limit():
    for controller in (DraftController(sizes_up_to(4)), DraftController((0, 1, 4), always=True)):
        device = Device(COSTS_S, 1.0)
        device.run(controller, 20)
        for limit in (-1, 0, 1, 3):
            assert controller.choose({Asker(): limit}, 99).k <= max(0, limit)
            assert controller.choose({Asker(): 99, Asker(): 2}, limit).k <= max(0, limit)


def test_sizes_are_few_and_fill_octets_of_rows():
    assert sizes_up_to(1) == (0, 1)
    assert sizes_up_to(4) == (0, 1, 2, 4)
    assert sizes_up_to(5) == (0, 1, 2, 4, 5)
    assert sizes_up_to(8) == (0, 1, 2, 4, 7, 8)
    assert sizes_up_to(15) == (0, 1, 2, 4, 7, 15)


def test_an_assumed_acceptance_keeps_that_share_of_drafts_and_ends_as_asked(deep):
    options = {"weights": "random", "dtype": "float32", "draft": "exit-1", "draft_policy": "always"}
    many = SamplingParams(max_new_tokens=200, ignore_eos=True)
    for share in (0.0, 0.7, 1.0):
        llm = LLM(str(deep), assume_acceptance=share, **options)
        (found,) = llm.generate([[5, 6, 7]], many)
        assert len(found.token_ids) == 200
        first = found.speculation.acceptance[0]
        assert abs(first - share) <= (0.2 if 0 < share < 1 else 0.0)
        llm.close()


def test_assumed_drafts_are_kept_with_their_probability_each_and_independently():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(0, 300, shape, generator=generator)

    B, D = 20_000, 3
    ids, drafts, after = draw(B, D + 1), draw(B, D), draw(B, D + 1)
    positions = draw(B, 1) + torch.arange(D + 1)
    accepted = (simulate_acceptance(ids, drafts, after, positions, 0.7)[:, :-1] == drafts).double()
    assert (accepted.mean(0) - 0.7).abs().max() < 0.015
    assert abs(float((accepted[:, 0] * accepted[:, 1]).mean()) - 0.49) < 0.015
    own = assumed_probability(positions[:, 1:], after[:, :1], 0.7)
    assert abs(float(own.mean()) - 0.7) < 0.01
    for probability in own.unique():  # a drafter is as right as it is sure
        kept = accepted[own == probability]
        assert len(kept) > B // 2
        assert abs(float(kept.mean() - probability)) < 0.02
    none = simulate_acceptance(ids, torch.full_like(drafts, -1), after, positions, 1.0)
    assert torch.equal(none, ids), "where there is no draft nothing is kept"
    broken = simulate_acceptance(torch.full_like(ids, -1), drafts, after, positions, 1.0)
    assert (broken == -1).all(), "logits that are not finite stay an error"


def test_chains_end_early_where_an_acceptance_is_assumed(deep, monkeypatch):
    options = {"weights": "random", "draft": "exit-1", "draft_tokens": 7, "assume_acceptance": 0.8}
    llm = LLM(str(deep), draft_policy="always", **options)
    monkeypatch.setattr(llm._scheduler.controller, "_min_probability", lambda *_: 0.45)
    (found,) = llm.generate([[5, 6, 7]], FREELY, max_new_tokens=100)
    proposed = found.speculation.proposed
    assert proposed[0] > proposed[1] > proposed[2], "of the first, 0.2 or 0.95 are accepted"
    assert 0.6 < sum(found.speculation.accepted) / sum(proposed) < 1


def test_an_assumed_acceptance_is_for_random_weights_with_drafts(deep):
    for options in ({"draft": "ngram"}, {"weights": "random"}):
        with pytest.raises(ConfigError, match=r"assume_acceptance 0\.5"):
            LLM(str(deep), assume_acceptance=0.5, **options)


def test_steps_of_every_number_of_drafts_are_timed(deep, plain):
    llm = LLM(str(deep), dtype="float32", draft="exit-1", draft_tokens=3)
    costs = llm.step_costs([[5, 6, 7]], max_new_tokens=24)
    assert [cost.k for cost in costs] == [0, 1, 2, 3]
    for cost in costs:
        assert cost.n_steps > 0
        assert cost.verify_s > 0
        assert (cost.draft_s > 0) == (cost.k > 0)
    assert plain.step_costs([[5, 6, 7]], max_new_tokens=24) == ()
    assert answers(llm) == answers(plain), "the engine answers as before"
