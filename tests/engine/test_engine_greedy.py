"""Greedy tokens depend on the prompt alone: not on batch, cache, chunks or compilation."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_models import N_TOKENS, write_random, write_text_files

from hotloop import LLM, SamplingParams
from hotloop.engine.scheduler import n_multi_steps
from hotloop.errors import NumericsError

PROMPTS = ([7], [5, 6], list(range(2, 19)), [260, 3] * 30, [299, 150, 2, 40, 41])
"""More of them than rows, of 1 to 60 tokens; the chunks of 3 and the 32-wide masks do not fit."""

FREELY = SamplingParams(max_new_tokens=24, ignore_eos=True)


def tokens(
    llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams = FREELY, **options: object
) -> list[tuple[int, ...]]:
    return [g.token_ids for g in llm.generate(prompts, params, **options)]


def alone(
    llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams = FREELY
) -> list[tuple[int, ...]]:
    return [tokens(llm, [prompt], params)[0] for prompt in prompts]


def test_greedy_tokens_are_those_of_recomputing_the_whole_sequence(llm, twin_logits):
    for prompt, answer in zip(PROMPTS, tokens(llm, PROMPTS), strict=True):
        logits_TV = twin_logits([*prompt, *answer])
        assert logits_TV[len(prompt) - 1 : -1].argmax(dim=-1).tolist() == list(answer)


def test_greedy_tokens_are_the_most_likely_ones_of_the_score(llm):
    for prompt, answer in zip(PROMPTS, tokens(llm, PROMPTS), strict=True):
        (score,) = llm.score([[*prompt, *answer]])
        assert score.top1[len(prompt) - 1 :].tolist() == list(answer)


@pytest.mark.parametrize("max_batch_size", [1, 2, 3])
def test_greedy_tokens_of_a_batch_are_those_of_each_prompt_alone(folder, llm, max_batch_size):
    batched = LLM(str(folder), dtype="float32", max_batch_size=max_batch_size)
    assert tokens(batched, PROMPTS) == alone(llm, PROMPTS)


def test_requests_that_end_at_different_times_leave_the_others_alone(tmp_path):
    eos = range(0, N_TOKENS, 11)
    llm = LLM(str(write_random(tmp_path, eos=eos)), dtype="float32", max_batch_size=3)
    prompts = [[i] for i in range(2, 22)]
    params = dataclasses.replace(FREELY, ignore_eos=False)
    answers = tokens(llm, prompts, params)
    assert len({len(answer) for answer in answers}) > 8
    for whole, answer in zip(alone(llm, prompts), answers, strict=True):
        first = next((i for i, token in enumerate(whole) if token in eos), len(whole))
        assert answer == whole[: first + 1]


@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_several_steps_at_once_change_no_answer(tmp_path, monkeypatch, n, asynchronous, draft):
    eos = range(0, N_TOKENS, 11)
    one_by_one, several = (
        LLM(str(write_random(tmp_path, eos=eos)), dtype="bfloat16", max_batch_size=3, draft=draft)
        for _ in range(2)
    )
    # As it would be found on a GPU, where a step is taken before the last one is looked at.
    monkeypatch.setattr(several._scheduler, "n_steps", n)
    monkeypatch.setattr(several._runner, "asynchronous", asynchronous)
    prompts = [*PROMPTS, *([i] for i in range(2, 12))]
    for options in (
        {},
        {"ignore_eos": False},
        {"max_new_tokens": 5, "logprobs": 3},
        {"temperature": 0.9, "top_k": 20, "repetition_penalty": 1.2, "seed": 3},
    ):
        params = dataclasses.replace(FREELY, **options)
        found = [llm.generate(prompts, params) for llm in (one_by_one, several)]
        answers = [[(g.token_ids, g.logprobs, g.finish_reason) for g in each] for each in found]
        assert answers[0] == answers[1]
        for g in found[1]:
            if g.speculation is not None:
                assert g.speculation.n_tokens == len(g.token_ids) - 1
                assert (
                    g.speculation.n_plain_steps <= g.speculation.n_steps <= g.speculation.n_tokens
                )


@pytest.mark.parametrize(
    ("step_s", "n"), [(1.0, 1), (4.8e-3, 1), (2.8e-3, 2), (1.9e-3, 4), (5e-4, 8), (1e-6, 8)]
)
def test_as_many_steps_at_once_as_nobody_notices(step_s, n):
    assert n_multi_steps(step_s) == n


@pytest.mark.parametrize("prefill_chunk", [1, 3, 512])
def test_the_size_of_prefill_chunks_does_not_change_tokens(folder, llm, prefill_chunk):
    chunked = LLM(str(folder), dtype="float32", max_batch_size=3, prefill_chunk=prefill_chunk)
    assert tokens(chunked, PROMPTS) == tokens(llm, PROMPTS)


def test_a_seat_forgets_the_request_that_was_there(folder, llm):
    single = LLM(str(folder), dtype="float32")
    expected = tokens(llm, [[7]])
    tokens(single, [[260, 3] * 100])
    assert tokens(single, [[7]]) == expected


def test_no_prompts_give_no_answers(llm):
    assert llm.generate([]) == []
    assert list(llm.stream([])) == []


def test_one_text_gives_one_answer_and_a_list_gives_a_list(llm):
    one, listed = llm.generate("one", FREELY), llm.generate(["one"], FREELY)
    assert [one.token_ids] == [g.token_ids for g in listed]
    assert one.prompt_ids == tuple(llm.encode("one"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, LLM]:
    """A compiled engine of three rows, and the same one uncompiled."""
    folder = str(write_random(tmp_path_factory.mktemp("compiled"), n_layers=1))
    return (
        LLM(folder, dtype="float32", max_batch_size=3, execution="compile"),
        LLM(folder, dtype="float32", max_batch_size=3),
    )


def test_compiled_tokens_equal_eager_ones_at_every_number_of_rows(compiled):
    fast, plain = compiled
    for n in (1, 2, 3, len(PROMPTS)):
        assert tokens(fast, PROMPTS[:n]) == tokens(plain, PROMPTS[:n])
    assert tokens(fast, PROMPTS) == alone(fast, PROMPTS)


def test_compiled_tokens_equal_eager_ones_until_the_context_is_full(compiled):
    fast, plain = compiled
    prompts = [[9] * 250, [4, 5]]
    answers = [tokens(fast, [p], max_new_tokens=320 - len(p)) for p in prompts]
    assert answers == [tokens(plain, [p], max_new_tokens=320 - len(p)) for p in prompts]


def test_compiled_samples_equal_eager_ones(compiled):
    fast, plain = compiled
    options = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 5}
    assert tokens(fast, PROMPTS, **options) == tokens(plain, PROMPTS, **options)


def test_a_compiled_step_without_finite_logits_ends_the_request_with_an_error(compiled):
    fast, _ = compiled
    ((first, *_),) = tokens(fast, [[4, 5]])
    row = fast._runner._model.decoder.embedding.packed0[first]
    kept = row.clone()
    try:
        with torch.inference_mode():
            row.fill_(torch.nan)
        with pytest.raises(NumericsError, match="after 1 tokens"):
            tokens(fast, [[4, 5]])
    finally:
        with torch.inference_mode():
            row.copy_(kept)


@pytest.mark.usefixtures("compiled")
def test_another_model_of_the_same_shapes_is_compiled_for_itself(tmp_path):
    folder = str(write_random(tmp_path, rms_norm_eps=0.9))
    fast, plain = (
        LLM(folder, dtype="float32", max_batch_size=3, execution=execution)
        for execution in ("compile", "eager")
    )
    assert tokens(fast, PROMPTS) == tokens(plain, PROMPTS)


def test_a_compiled_engine_says_how_it_was_compiled(compiled):
    fast, plain = compiled
    assert fast.describe().compile_cache == "cold"
    assert plain.describe().compile_cache is None
    assert min(fast.describe().warmup_s, plain.describe().warmup_s) > 0


@pytest.mark.parametrize(
    "context", [pytest.param(8, id="short"), pytest.param(300, id="beyond_a_power_of_two")]
)
def test_a_suggested_length_is_cut_to_what_fills_the_context_to_the_last_position(
    tmp_path, twin_logits, context
):
    folder = write_random(tmp_path)
    write_text_files(folder, max_new_tokens=10_000)
    llm = LLM(str(folder), dtype="float32", max_batch_size=3, max_seq_len=context)
    prompts = [[7], [5] * (context - 1), [5, 6, 7], [8] * (context - 2)]
    for prompt, g in zip(prompts, llm.generate(prompts, ignore_eos=True), strict=True):
        assert len(prompt) + len(g.token_ids) == context
        assert g.finish_reason == "length"
        logits_TV = twin_logits([*prompt, *g.token_ids])
        assert logits_TV[len(prompt) - 1 : -1].argmax(dim=-1).tolist() == list(g.token_ids)


def test_rows_of_the_embedding_beyond_the_tokenizer_are_never_chosen(tmp_path: Path):
    padded = write_random(tmp_path, vocab_size=400)
    llm = LLM(str(padded), dtype="float32", max_batch_size=2)
    params = SamplingParams(max_new_tokens=60, ignore_eos=True, repetition_penalty=1.3, logprobs=9)
    for options in ({"temperature": 0.0}, {"temperature": 50.0, "seed": 1}):
        for g in llm.generate([[5], [399, 350]], params, **options):
            assert max(g.token_ids) < N_TOKENS
            assert max(i for logprob in g.logprobs for i, _ in logprob.top) < N_TOKENS
