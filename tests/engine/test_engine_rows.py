"""Rows move together as requests end, and no answer changes by it."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import N_TOKENS, write_random

from hotloop import LLM, SamplingParams
from hotloop.engine.core import Command, MoveRow, Pending, Step
from hotloop.kernels.attention import torch_attention

PROMPTS = ([7], [260, 3] * 10, list(range(2, 19)), [5, 6], [299, 150, 2, 40, 41], [21])
"""Those whose answers are alike are not prefilled together, or they would end together."""
PARAMS = SamplingParams(max_new_tokens=40, min_new_tokens=20, logprobs=2)
SAMPLING = {
    "greedy": {},
    "drawn": {"temperature": 0.9, "top_k": 20, "repetition_penalty": 1.2, "seed": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers end after different numbers of tokens."""
    return write_random(tmp_path_factory.mktemp("ends"), eos=range(0, N_TOKENS, 11))


class Watch:
    """The steps and moves that an engine's core was told."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[Step] = []
        self.n_moves = 0
        run = llm._runner.run

        def watched(command: Command[Any]) -> Pending[Any]:
            self.n_moves += isinstance(command, MoveRow)
            self.steps += [command] if isinstance(command, Step) else []
            return run(command)

        monkeypatch.setattr(llm._runner, "run", watched)


@pytest.fixture(params=["cpu kernels", "torch attention"])
def _attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "torch attention":
        chosen = ("torch", torch_attention, [])
        monkeypatch.setattr("hotloop.engine.runner.choose_attention", lambda *_: chosen)
    return


def check(llm: LLM, monkeypatch: pytest.MonkeyPatch, sampling: str, *, bits: bool = False) -> None:
    """Answers together what is answered alone, if ``bits`` with the same log-probabilities."""
    watch = Watch(llm, monkeypatch)
    params = dataclasses.replace(PARAMS, **SAMPLING[sampling])
    together = llm.generate(list(PROMPTS), params)
    assert len({len(g.token_ids) for g in together}) > 3, "they end at different times"
    assert watch.n_moves > 0
    lone = [step for step in watch.steps if len(step.known_positions) == 1]
    assert lone, "the last one is alone for a while"
    assert all(step.n == 1 for step in lone), "and then takes no more than a row"
    alone = [llm.generate([prompt], params)[0] for prompt in PROMPTS]
    assert [g.token_ids for g in together] == [g.token_ids for g in alone]
    if bits:
        assert [g.logprobs for g in together] == [g.logprobs for g in alone]


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("draft", ["none", "ngram", "exit-1", "itself"])
@pytest.mark.usefixtures("_attention")
def test_answers_are_those_of_each_prompt_alone(folder, monkeypatch, draft, sampling):
    llm = LLM(
        str(folder),
        dtype="float32",
        max_batch_size=len(PROMPTS),
        draft=str(folder) if draft == "itself" else draft,
        draft_policy="always",
        draft_tokens=3,
    )
    check(llm, monkeypatch, sampling)


@pytest.mark.parametrize("sampling", SAMPLING)
def test_compiled_answers_are_those_of_each_prompt_alone(folder, monkeypatch, sampling):
    llm = LLM(str(folder), dtype="float32", max_batch_size=len(PROMPTS), execution="compile")
    check(llm, monkeypatch, sampling)


@pytest.mark.parametrize("draft", ["none", "itself"])
def test_in_bfloat16_to_the_bit_and_on_a_device_that_is_a_step_behind_too(
    folder, monkeypatch, draft
):
    draft = str(folder) if draft == "itself" else draft
    llm = LLM(str(folder), dtype="bfloat16", max_batch_size=len(PROMPTS), draft=draft)
    check(llm, monkeypatch, "greedy", bits=True)
    monkeypatch.setattr(llm._runner, "asynchronous", True)
    check(llm, monkeypatch, "greedy", bits=True)
    monkeypatch.setattr(llm._scheduler, "n_steps", 4)
    check(llm, monkeypatch, "greedy", bits=True)
