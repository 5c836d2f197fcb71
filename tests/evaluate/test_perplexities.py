"""Perplexity by the protocols of other tools, against their definitions written out."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_tasks import BOS, LetterEngine

from hotloop.evaluate.greedy import greedy_agreement
from hotloop.evaluate.perplexity import PROTOCOLS, perplexities
from hotloop.evaluate.windows import take_document
from hotloop.types import Generation, Timing

TEXT = "the cat sat on the mat and the dog sat on the log. " * 40
SIZE, LIMIT = 16, 5


def engine_for(*, adds_bos=False):
    engine = LetterEngine(adds_bos=adds_bos)
    for first, second in ("th", "he", "at", "on"):
        engine.log_probs_VV[ord(first)] -= 1.0
        engine.log_probs_VV[ord(first), ord(second)] += 3.0
        engine.log_probs_VV[ord(first)] = engine.log_probs_VV[ord(first)].log_softmax(-1)
    return engine


def nll(engine, before, token):
    return -engine.log_probs_VV[before, token].item()


@pytest.mark.parametrize("adds_bos", [False, True])
def test_llama_cpps_is_over_the_second_halves_of_windows_that_begin_with_bos(adds_bos):
    engine = engine_for(adds_bos=adds_bos)
    figure = perplexities(engine, TEXT, ["llama.cpp"], size=SIZE, limit=LIMIT)["llama.cpp"]
    stream = [BOS] * adds_bos + engine.encode(TEXT)
    values = []
    for i in range(LIMIT):
        window = stream[i * SIZE : (i + 1) * SIZE]
        if adds_bos:
            window[0] = BOS
        first = SIZE // 2
        values.append([nll(engine, window[j], window[j + 1]) for j in range(first, SIZE - 1)])
    assert figure.mean == pytest.approx(math.exp(np.mean(values)))
    assert figure.n == LIMIT
    (windows,) = engine.calls
    assert all((window[0] == BOS) == adds_bos for window in windows)


def test_lm_evals_shares_the_likelihood_out_over_words_and_bytes():
    engine = engine_for()
    figures = perplexities(engine, TEXT, PROTOCOLS, size=SIZE, limit=LIMIT)
    document, ids = take_document(engine.encode, TEXT, (SIZE - 1) * LIMIT)
    total = sum(nll(engine, a, b) for a, b in zip([BOS, *ids], ids, strict=False))
    assert figures["lm-eval word"].mean == pytest.approx(
        math.exp(total / len(re.split(r"\s+", document))), rel=1e-5
    )
    assert figures["lm-eval byte"].mean == pytest.approx(
        math.exp(total / len(document.encode())), rel=1e-5
    )
    assert list(figures) == ["llama.cpp", "lm-eval word", "lm-eval byte"]


def test_a_document_ends_at_a_word_and_holds_no_more_than_asked():
    for n in (1, 7, 50, 10_000):
        document, ids = take_document(lambda text: list(map(ord, text)), TEXT, n)
        assert TEXT.startswith(document)
        assert len(ids) == len(document) <= n
        assert n < 7 or TEXT[len(document) :][:1] in ("", " ")


def test_an_engine_asked_for_gptq_alone_scores_nothing_here():
    engine = engine_for()
    assert perplexities(engine, TEXT, ["gptq"], size=SIZE, limit=LIMIT) == {}
    assert engine.calls == []


class Writes(LetterEngine):
    """Generates the likeliest letters, but for those that ``errors`` replaces."""

    def __init__(self):
        super().__init__()
        self.errors = {}

    def generate(self, prompts, params):
        (prompt,) = prompts
        ids = list(prompt)
        for i in range(params.max_new_tokens):
            ids.append(self.errors.get(i, int(self.log_probs_VV[ids[-1]].argmax())))
        n = params.max_new_tokens
        return [
            Generation(
                prompt_ids=tuple(prompt),
                token_ids=tuple(ids[len(prompt) :]),
                text="",
                finish_reason="length",
                timing=Timing(n_tokens=n, ttft_s=1.0, e2e_s=2.0),
            )
        ]


WINDOWS = [list(map(ord, TEXT[i * 20 : i * 20 + 20])) for i in range(6)]


def test_generated_tokens_are_the_most_likely_tokens_by_scoring():
    engine = Writes()
    engine.log_probs_VV = torch.randn(
        128, 128, generator=torch.Generator().manual_seed(0)
    ).log_softmax(-1)
    figures = greedy_agreement(engine, WINDOWS)
    assert (figures.agreement.mean, figures.gap_max) == (1.0, 0.0)
    assert figures.agreement.n == 4
    assert figures.draft == "none"


def test_a_generated_token_that_scoring_would_not_choose_is_seen():
    engine = Writes()
    engine.log_probs_VV = torch.randn(
        128, 128, generator=torch.Generator().manual_seed(0)
    ).log_softmax(-1)
    engine.errors = {3: 5}
    figures = greedy_agreement(engine, WINDOWS)
    assert figures.agreement.mean == pytest.approx(0.9)
    assert figures.gap_max > 0.5


def test_windows_too_short_for_an_answer_have_no_agreement():
    assert greedy_agreement(Writes(), [[1]]) is None


def test_an_engine_that_does_not_return_its_tokens_has_no_agreement():
    class Hides(Writes):
        def generate(self, prompts, params):
            return [replace(answer, token_ids=()) for answer in super().generate(prompts, params)]

    assert greedy_agreement(Hides(), WINDOWS) is None
