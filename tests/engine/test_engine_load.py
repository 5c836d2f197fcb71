"""Neighbors, arrival order, chunks, load and reused prefixes never change an answer."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tiny_models import N_TOKENS, write_random

from hotloop import LLM, SamplingParams
from hotloop.engine.core import Admit, Command, Pending
from hotloop.engine.request import Request
from hotloop.engine.scheduler import Scheduler
from hotloop.types import EXACT_CPU_CHUNK, Generation

CONTEXT = 160
ENGINES = {
    "decoder": {"dtype": "float32"},
    "decoder, asynchronous": {"dtype": "float32"},
    "cpu kernels": {"dtype": "bfloat16"},
    "int8 cpu kernels": {"dtype": "bfloat16", "quant": "int8"},
}
OPTIONS: Sequence[dict[str, object]] = (
    {},
    {"temperature": 0.8, "seed": 5, "top_k": 30},
    {"temperature": 1.1, "seed": 8, "top_p": 0.9, "repetition_penalty": 1.3},
    {"logprobs": 1, "ignore_eos": True},
    {"presence_penalty": 0.6, "frequency_penalty": 0.2, "logit_bias": {9: 3, 11: -100}},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers end after different numbers of tokens."""
    return write_random(tmp_path_factory.mktemp("load"), eos=range(0, N_TOKENS, 23))


def requests(random: Random, n: int) -> list[tuple[list[int], SamplingParams]]:
    """Returns prompts, some of which begin alike, with their sampling options."""
    shared = [random.randrange(N_TOKENS) for _ in range(CONTEXT)]
    made = []
    for _ in range(n):
        begins = shared[: random.choice([0, 0, 40, 70, 90])]
        n = random.randint(1, random.choice([6, 40]))
        prompt = [*begins, *(random.randrange(N_TOKENS) for _ in range(n))]
        options = random.choice(OPTIONS)
        made.append((prompt, SamplingParams(max_new_tokens=random.randint(1, 24), **options)))
    return made


def new_request(llm: LLM, prompt: list[int], params: SamplingParams) -> Request:
    speculates = llm.config.draft != "none"
    return llm._request(0, prompt, params, time.perf_counter(), speculates=speculates)


def answer_under_load(
    llm: LLM, random: Random, asked: Sequence[tuple[list[int], SamplingParams]]
) -> list[Generation]:
    """Answers requests that arrive at random, beside others that are cancelled at random."""
    scheduler: Scheduler = llm._scheduler
    wanted: list[Request] = []
    others: list[Request] = []
    for prompt, params in asked:
        wanted.append(new_request(llm, prompt, params))
        scheduler.submit(wanted[-1])
        if random.random() < 0.5:
            ((prompt, params),) = requests(random, 1)
            others.append(new_request(llm, prompt, params))
            scheduler.submit(others[-1])
        for _ in range(random.randint(0, 9)):
            scheduler.iterate()
        if others and random.random() < 0.5:
            scheduler.cancel(random.choice(others))
    while not scheduler.idle:
        scheduler.iterate()
    return [request.generation() for request in wanted]


def comparable(generation: Generation) -> tuple[object, ...]:
    tokens = [(each.token_id, each.top[0][0]) for each in generation.logprobs or ()]
    return generation.token_ids, generation.finish_reason, tokens


def watch_admissions(llm: LLM, patch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that will have the number of prompts of each ``Admit``."""
    run, together = llm._runner.run, []

    def watched(command: Command[Any]) -> Pending[Any]:
        if isinstance(command, Admit):
            together.append(len(command.prompts))
        return run(command)

    patch.setattr(llm._runner, "run", watched)
    return together


@pytest.mark.parametrize(
    ("engine", "draft", "prefix_cache"),
    [
        ("decoder", "none", "tokens"),
        ("decoder", "itself", "none"),
        ("decoder, asynchronous", "none", "none"),
        ("decoder, asynchronous", "ngram", "chunks"),
        ("decoder, asynchronous", "itself", "tokens"),
        ("cpu kernels", "none", "tokens"),
        ("cpu kernels", "itself", "chunks"),
        ("cpu kernels", "ngram+self-int4-g32", "tokens"),
        ("int8 cpu kernels", "ngram", "tokens"),
    ],
)
def test_each_answer_is_that_of_the_request_alone(folder, monkeypatch, engine, draft, prefix_cache):
    options = dict(
        max_seq_len=CONTEXT,
        max_batch_size=3,
        prefill_chunk=32,
        draft=str(folder) if draft == "itself" else draft,
        draft_tokens=3,
        draft_policy="always",
        **ENGINES[engine],
    )
    random = Random(f"{engine} {draft} {prefix_cache}")
    asked = requests(random, 12)
    with LLM(str(folder), **options) as llm:
        alone = [llm.generate([prompt], params)[0] for prompt, params in asked]
    with LLM(str(folder), **options, prefix_cache=prefix_cache) as llm:
        if engine.endswith("asynchronous"):
            monkeypatch.setattr(llm._runner, "asynchronous", True)
            if draft == "none":
                monkeypatch.setattr(llm._scheduler, "n_steps", 2)
        together = watch_admissions(llm, monkeypatch)
        for _ in range(2):  # the second time prefixes of all are there
            found = answer_under_load(llm, random, asked)
            assert list(map(comparable, found)) == list(map(comparable, alone))
            if engine.endswith("cpu kernels"):
                bits = [[each.logprob for each in g.logprobs or ()] for g in found]
                assert bits == [[each.logprob for each in g.logprobs or ()] for g in alone]
        reused = sum(generation.cached_tokens for generation in found)
        assert (reused > 0) == (prefix_cache != "none")
        assert max(together) == 1 or engine.endswith("cpu kernels"), "only where bits stay equal"


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_short_prompts_at_once_have_the_bits_of_each_alone(folder, monkeypatch, quant):
    random = Random(quant)
    asked = [
        (
            [random.randrange(N_TOKENS) for _ in range(1 + i % 6)],
            SamplingParams(max_new_tokens=6, **({"logprobs": 2} | options)),
        )
        for i, options in enumerate(2 * OPTIONS)
    ]
    with LLM(str(folder), dtype="bfloat16", quant=quant, max_seq_len=64, max_batch_size=8) as llm:
        alone = [llm.generate([prompt], params)[0] for prompt, params in asked]
        together = watch_admissions(llm, monkeypatch)
        wanted = [new_request(llm, prompt, params) for prompt, params in asked]
        for request in wanted:
            llm._scheduler.submit(request)
        while not llm._scheduler.idle:
            llm._scheduler.iterate()
    assert together[0] == 8
    for request, expected in zip(wanted, alone, strict=True):
        found = request.generation()
        assert found.token_ids == expected.token_ids
        assert found.logprobs == expected.logprobs


def test_a_second_turn_prefills_only_what_is_new(folder):
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    with LLM(str(folder), dtype="float32", prefix_cache="tokens") as llm:
        first = llm.generate([[7, *range(2, 40)]], params)[0]
        assert first.cached_tokens == 0
        turn = [*first.prompt_ids, *first.token_ids, 50, 51, 52]
        second = llm.generate([turn], params)[0]
        assert second.cached_tokens == len(turn) - 4, "the last token of the answer was no input"
        again = llm.generate([turn], params)[0]
        assert again.cached_tokens == len(turn) - 1, "the last token gives the logits"
    with LLM(str(folder), dtype="float32") as llm:
        plain = llm.generate([turn], params)[0]
        assert plain.token_ids == second.token_ids == again.token_ids
        assert plain.cached_tokens == 0


@pytest.mark.parametrize(
    "options", [{}, {"quant": "int4-g32", "draft": "ngram"}, {"tensor_parallel": 2}], ids=str
)
def test_with_cpu_kernels_a_short_second_turn_prefills_only_what_is_new_with_the_same_bits(
    folder, options
):
    params = SamplingParams(max_new_tokens=12, ignore_eos=True, logprobs=1)
    engine = options | {"dtype": "bfloat16", "prefill_chunk": EXACT_CPU_CHUNK}
    with LLM(str(folder), **engine, prefix_cache="chunks") as llm:
        first = llm.generate([[7, *range(2, 20)]], params)[0]
        turn = [*first.prompt_ids, *first.token_ids, 50, 51, 52]
        second = llm.generate([turn], params)[0]
    with LLM(str(folder), **engine) as llm:
        alone = llm.generate([turn], params)[0]
    assert second.cached_tokens == len(turn) - 4, "the last token of the answer was no input"
    assert (second.token_ids, second.logprobs) == (alone.token_ids, alone.logprobs)


def test_chunks_beyond_what_cpu_kernels_compute_alike_are_reused_whole(folder):
    params = SamplingParams(max_new_tokens=1)
    with LLM(str(folder), dtype="bfloat16", prefill_chunk=80, prefix_cache="chunks") as llm:
        prompt = [7, *range(2, 100)]
        llm.generate([prompt], params)
        assert llm.generate([[*prompt, 5]], params)[0].cached_tokens == 80


def test_whole_chunks_are_reused_with_the_bits_that_they_would_have(folder):
    params = SamplingParams(max_new_tokens=12, ignore_eos=True, logprobs=1)
    prompts = [[*range(2, 2 + 100), i] for i in (5, 6)]
    with LLM(str(folder), dtype="float32", prefill_chunk=16, prefix_cache="chunks") as llm:
        llm.generate([prompts[0]], params)
        reused = llm.generate([prompts[1]], params)[0]
    with LLM(str(folder), dtype="float32", prefill_chunk=16) as llm:
        alone = llm.generate([prompts[1]], params)[0]
    assert reused.cached_tokens == 96
    assert dataclasses.replace(reused, timing=alone.timing, cached_tokens=0) == alone
