"""Logits that are not finite end a request with an error: nothing is chosen from them."""

import math

import pytest
import torch
from thread_group import ThreadGroup, ThreadRanks
from tiny_models import END, encode, write_script

from hotloop import LLM
from hotloop.engine.core import Features
from hotloop.engine.sampling import Sampler
from hotloop.engine.vocabulary import VocabularyShard
from hotloop.errors import NumericsError
from hotloop.types import SamplingParams

TEXT = "ABCDEFGH"
START, OTHER = 200, 201


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> LLM:
    """Answers START with TEXT, whose fifth token it cannot digest, and OTHER with END."""
    folder = tmp_path_factory.mktemp("broken")
    write_script(folder, [START, *encode(TEXT), OTHER, END])
    llm = LLM(str(folder), dtype="float32", max_batch_size=2)
    with torch.inference_mode():
        llm._runner._model.decoder.embedding.packed0[encode(TEXT)[4]] = math.nan
    return llm


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 0.5, "top_k": 3, "top_p": 0.9},
        {"repetition_penalty": 1.1},
        {"logprobs": 2},
    ],
    ids=str,
)
def test_a_step_without_finite_logits_ends_the_request_with_an_error(broken, options):
    assert len(encode(TEXT)) == len(TEXT), "a token a letter"
    for _ in range(2):  # what was left in the seat harms nothing
        with pytest.raises(NumericsError, match=r"answer 0: after 5 tokens .* not finite"):
            broken.generate([[START]], ignore_eos=True, seed=1, **options)
    assert broken.generate([[OTHER]])[0].token_ids == (END,)


def test_the_neighbors_of_such_a_request_are_answered_first(broken):
    texts, answers = {0: "", 1: "", 2: ""}, {}
    prompts = [[START], [OTHER], [encode(TEXT)[5]]]
    with pytest.raises(NumericsError) as raised:  # noqa: PT012
        for delta in broken.stream(prompts, max_new_tokens=8, ignore_eos=True):
            texts[delta.index] += delta.text
            if delta.generation is not None:
                answers[delta.index] = delta.generation
    assert (raised.value.index, raised.value.n_tokens) == (0, 5)
    assert texts[0] == TEXT[:5]
    assert {i: g.finish_reason for i, g in answers.items()} == {2: "length"}


def test_of_several_answers_to_each_prompt_the_error_names_the_one_that_failed(broken):
    with pytest.raises(NumericsError) as raised:
        broken.generate([[OTHER], [START]], n=2, max_new_tokens=8)
    assert raised.value.index in (2, 3)
    assert str(raised.value).startswith(f"answer {raised.value.index}: ")


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}])
def test_all_ranks_agree_that_there_is_no_choice(value, options):
    params = SamplingParams(**options)
    logits = torch.randn(2, 1, 12)
    logits[1, 0, 7] = value
    shares = [range(4), range(4, 8), range(8, 12)]

    def chosen(group: ThreadGroup) -> list[int]:
        sampler = Sampler(2, 12, torch.device("cpu"), VocabularyShard(shares, 12, group))
        for row in range(2):
            sampler.admit(row, params, 1, [1])
        here = logits[..., shares[group.rank].start : shares[group.rank].stop]
        sampled = sampler.sample(here, torch.zeros(2, 1).long(), 0, Features.of([params]))
        return sampled.ids.flatten().tolist()

    (good, bad), *others = ThreadRanks(3).run(chosen)
    assert good >= 0
    assert bad == -1
    assert others == [[good, bad]] * 2
