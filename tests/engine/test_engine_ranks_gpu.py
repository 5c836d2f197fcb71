"""Ranks on several GPUs, against one: ``pytest -m gpu`` where there are some.

``RANKS_ON=cpu`` rehearses the very tests with two ranks on a CPU, eagerly.
"""

import functools
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import ALTERNATIVES, assert_top_two_agree
from tiny_models import write_random
from waiting import alive, wait_until

from hotloop import LLM, Generation, Grammar, SamplingParams
from hotloop.errors import RankError, UnsupportedError

DEVICE = os.environ.get("RANKS_ON", "cuda")
N_DEVICES = 2 if DEVICE == "cpu" else torch.cuda.device_count()
TIE = 2**-4
"""Logits from 4 to 8 are 2**-5 apart in bfloat16, and each side has rounded the two it compares."""

PROMPTS = [[5, 6, 7], list(range(2, 40)), [11], [260, 3] * 10]
GREEDY = SamplingParams(max_new_tokens=24, ignore_eos=True, logprobs=ALTERNATIVES)

EXECUTIONS = ("eager",) if DEVICE == "cpu" else ("eager", "compile", "fused")
SUMS = ("auto",) if DEVICE == "cpu" else ("nccl", "symm_mem")
SIZES = [
    pytest.param(
        n,
        id=f"tp{n}",
        marks=pytest.mark.skipif(n > N_DEVICES, reason=f"needs {n} GPUs, found {N_DEVICES}"),
    )
    for n in (2, 4, 8)
]
SMOLLM2_SIZES = SIZES[:2]  # its nine heads have no eight shares

pytestmark = pytest.mark.gpu
each_size = pytest.mark.parametrize("n", SIZES)
each_execution = pytest.mark.parametrize("execution", EXECUTIONS)
each_sum = pytest.mark.parametrize("all_reduce", SUMS)

Ask = Callable[..., list[Generation]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads as wide as the fused step takes them, enough for eight ranks, and every bias."""
    return write_random(
        tmp_path_factory.mktemp("model"),
        hidden_size=512,
        intermediate_size=1024,
        head_dim=64,
        num_attention_heads=8,
        num_key_value_heads=4,
        attention_bias=True,
        mlp_bias=True,
        embedding_std=0.3,
    )


@pytest.fixture
def make() -> Iterator[Callable[..., LLM]]:
    """Makes engines that are closed in the end; a way to add up that is not there is a skip."""
    made: list[LLM] = []

    def make(model: Path | str, **options: Any) -> LLM:
        try:
            made.append(LLM(str(model), device=DEVICE, max_seq_len=320, **options))
        except UnsupportedError as error:
            if "does not work here" not in str(error):
                raise
            pytest.skip(str(error))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


@pytest.fixture(scope="module")
def alone() -> Ask:
    """The answers of one rank, made once."""

    @functools.cache
    def ask(model: Path | str, **options: Any) -> list[Generation]:
        llm = LLM(str(model), device=DEVICE, max_seq_len=320, **options)
        try:
            return llm.generate(PROMPTS, GREEDY)
        finally:
            llm.close()

    return ask


def tokens(answers: list[Generation]) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in answers]


def assert_added_up_on(llm: LLM, all_reduce: str) -> None:
    described = llm.describe()
    used = described.kernels["all_reduce"].removeprefix("all_reduce/")
    if all_reduce == "auto":
        assert used == "shm"
    elif all_reduce == "symm_mem" and described.execution == "fused":
        assert used == "fused", "in its own kernels, through each other's symmetric memory"
    else:
        assert used == all_reduce


@each_size
@each_sum
@pytest.mark.parametrize("execution", [e for e in EXECUTIONS if e != "fused"])
@pytest.mark.parametrize("quant", ["none", "int4-g32"])
def test_float32_greedy_tokens_are_those_of_one_rank(
    folder: Path, make: Any, alone: Ask, n: int, all_reduce: str, execution: str, quant: str
) -> None:
    options = {"dtype": "float32", "quant": quant, "execution": execution}
    llm = make(folder, tensor_parallel=n, all_reduce=all_reduce, **options)
    assert tokens(llm.generate(PROMPTS, GREEDY)) == tokens(alone(folder, **options))
    assert_added_up_on(llm, all_reduce)


@each_size
@each_execution
@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_grammars_leave_ranks_the_same_tokens_and_drafts_change_none(
    folder: Path, make: Any, n: int, execution: str, draft: str
) -> None:
    grammar = Grammar(kind="regex", source="(the token )+[a-z]{1,9}|[0-9]{4,8}")
    drafts = {"draft": draft, "draft_policy": "always", "draft_tokens": 3}
    llm = make(folder, tensor_parallel=n, execution=execution, max_batch_size=2, **drafts)
    plain = make(folder, tensor_parallel=n, execution=execution)
    for sampling in ({}, {"temperature": 0.9, "top_k": 20, "seed": 3}):
        params = SamplingParams(max_new_tokens=24, grammar=grammar, **sampling)
        found = llm.generate(PROMPTS, params)
        for g in found:
            whole = re.fullmatch(grammar.source, g.text)
            assert whole or g.finish_reason == "length", g.text
        if draft == "none" or execution == "fused":  # others round differently with drafts
            assert tokens(found) == [plain.generate([p], params)[0].token_ids for p in PROMPTS]


@each_size
@each_sum
@each_execution
@pytest.mark.parametrize("quant", ["none", "int4-g32"])
def test_bfloat16_greedy_tokens_agree_with_those_of_one_rank_to_the_top_two(
    folder: Path, make: Any, alone: Ask, n: int, all_reduce: str, execution: str, quant: str
) -> None:
    options = {"quant": quant, "execution": execution}
    llm = make(folder, tensor_parallel=n, all_reduce=all_reduce, **options)
    assert llm.describe().execution == execution
    assert_top_two_agree(llm.generate(PROMPTS, GREEDY), alone(folder, **options), TIE)
    assert_added_up_on(llm, all_reduce)


@pytest.mark.parametrize("n", SMOLLM2_SIZES)
@each_sum
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trained_model_answers_as_on_one_rank(
    smollm2: str, make: Any, alone: Ask, n: int, all_reduce: str, dtype: str
) -> None:
    options = {"dtype": dtype, "quant": "int8"}
    llm = make(smollm2, tensor_parallel=n, all_reduce=all_reduce, **options)
    ours, theirs = llm.generate(PROMPTS, GREEDY), alone(smollm2, **options)
    if dtype == "float32":
        assert tokens(ours) == tokens(theirs)
    else:
        assert_top_two_agree(ours, theirs, TIE)


@each_size
@each_sum
@each_execution
def test_samples_can_be_repeated_and_are_as_likely_as_they_are_scored(
    folder: Path, make: Any, n: int, all_reduce: str, execution: str
) -> None:
    options = {"execution": execution, "quant": "int8"}
    llm = make(folder, tensor_parallel=n, all_reduce=all_reduce, **options)
    params = SamplingParams(
        max_new_tokens=48, ignore_eos=True, temperature=0.9, top_k=20, seed=3, logprobs=4
    )
    first, again = (llm.generate([PROMPTS[0]], params)[0] for _ in range(2))
    assert first.token_ids == again.token_ids
    (score,) = llm.score([[*first.prompt_ids, *first.token_ids]])
    scored = score.token_logprobs[len(first.prompt_ids) - 1 :]
    for logprob, expected in zip(first.logprobs, scored, strict=True):
        assert logprob.logprob == pytest.approx(expected.item(), abs=0.15)


@each_size
@each_execution
@pytest.mark.parametrize("draft", ["ngram", "self", "self-int4-g32", "itself"])
def test_a_draft_beside_several_ranks_changes_no_tokens(
    folder: Path, make: Any, alone: Ask, n: int, execution: str, draft: str
) -> None:
    options = {"execution": execution}
    if execution != "fused":
        options["dtype"] = "float32"
    if draft == "self":
        options["quant"] = "int8-g32"
    llm = make(
        folder,
        tensor_parallel=n,
        draft=str(folder) if draft == "itself" else draft,
        draft_policy="always",
        draft_tokens=3,
        **options,
    )
    ours, theirs = llm.generate(PROMPTS, GREEDY), alone(folder, **options)
    if execution == "fused":
        assert_top_two_agree(ours, theirs, TIE)
    else:
        assert tokens(ours) == tokens(theirs)
    assert any(any(answer.speculation.proposed) for answer in ours)
    if draft == "itself":
        assert all(answer.speculation.draft_s > 0 for answer in ours)


@each_size
@each_execution
def test_a_rank_killed_while_it_generates_ends_the_run(
    folder: Path, make: Any, n: int, execution: str
) -> None:
    llm = make(folder, tensor_parallel=n, execution=execution)
    pids = [rank.process.pid for rank in llm._runner._ranks._ranks]
    stream = llm.stream([[7]], SamplingParams(max_new_tokens=300, ignore_eos=True))
    next(stream)
    os.kill(pids[-1], signal.SIGKILL)
    with pytest.raises(RankError, match=f"rank {n - 1} of {n} was killed by SIGKILL"):
        list(stream)
    wait_until(lambda: not any(map(alive, pids)), "no rank is left")
