"""Draws follow the distribution that SamplingParams defines, and nothing else moves them."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sampling_definition import distribution
from scipy import stats
from tiny_models import write_markov

from hotloop import LLM, SamplingParams
from hotloop.engine import sampling
from hotloop.engine.core import Features
from hotloop.engine.sampling import Sampler, _gumbel
from hotloop.errors import RequestError

ANSWER = [2, 6, 2, 2, 0]
"""Tokens that have been generated: what presence and frequency penalties are about."""

LOGITS = np.array([0.2, -1.5, 2.1, 0.9, 0.9, -0.3, 1.7, -2.2, 0.0, 1.1])
SEEN = [2, 5, 7]
"""Prompt tokens: with positive and negative logits, what a repetition penalty is about."""


def draws(
    logits: np.ndarray,
    params: SamplingParams,
    n_seeds: int = 4096,
    n_positions: int = 8,
    answer: Sequence[int] = (),
) -> np.ndarray:
    """Tokens drawn at many positions with many seeds, all from the same logits."""
    sampler = Sampler(n_seeds, len(logits), torch.device("cpu"))
    for row in range(n_seeds):
        sampler.admit(row, params, row * 7919 + 13, SEEN)
    for token in answer:
        sampler.update_penalties(torch.full((n_seeds, 1), token), 0)
    logits_SV = torch.tensor(logits, dtype=torch.float32).expand(n_seeds, -1)
    drawn = []
    for position in range(n_positions):
        positions_S = torch.full((n_seeds,), position + 3)
        sampled = sampler.sample(logits_SV[:, None], positions_S[:, None], 0, Features.of([params]))
        drawn.append(sampled.ids[:, 0])
    return torch.cat(drawn).numpy()


def assert_drawn_from(drawn: np.ndarray, probabilities: np.ndarray) -> None:
    """Nothing impossible, and a chi-square test that right code fails once in ten thousand runs."""
    counts = np.bincount(drawn, minlength=len(probabilities))
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    if possible.sum() > 1:
        expected = len(drawn) * probabilities[possible]
        assert stats.chisquare(counts[possible], expected).pvalue > 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.8},
        {"top_k": 1},
        {"top_k": 4},
        {"top_k": 99},
        {"top_p": 0.5},
        {"top_p": 0.93},
        {"top_p": 1e-30},
        {"top_p": 1e-60},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"temperature": 0.7, "top_k": 6, "top_p": 0.9},
        {"temperature": 1.5, "top_k": 7, "top_p": 0.95, "min_p": 0.15},
        {"temperature": 0.9, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.4},
        {"presence_penalty": 1.5},
        {"presence_penalty": -0.8},
        {"frequency_penalty": 0.7},
        {"logit_bias": {2: -100, 0: 2.5, 9: -1}},
        {
            "temperature": 0.8,
            "top_k": 6,
            "repetition_penalty": 1.3,
            "presence_penalty": 0.4,
            "frequency_penalty": 0.3,
            "logit_bias": {3: 1.0, 6: -0.5},
        },
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()),
)
def test_draws_follow_the_distribution_of_the_options(options):
    params = SamplingParams(**{"temperature": 1.0} | options)
    drawn = draws(LOGITS, params, answer=ANSWER)
    assert_drawn_from(drawn, distribution(LOGITS, params, SEEN, ANSWER))


def test_options_that_another_row_has_do_not_change_a_rows_bits():
    adjusts = SamplingParams(
        repetition_penalty=1.3, presence_penalty=1, frequency_penalty=1, logit_bias={1: 3}
    )
    logits_BTV = torch.randn(3, 1, 10)
    sampler = Sampler(3, 10, torch.device("cpu"))
    for row, params in enumerate((SamplingParams(temperature=1.0), adjusts)):
        sampler.admit(row, params, 5, SEEN, eos_ids=[3])
    sampler.move(1, 2)
    sampler.admit(1, SamplingParams(temperature=1.0), 5, SEEN)
    positions = torch.full((3, 1), 7)
    plain = sampler._adjusted(logits_BTV[:2], positions[:2], slice(0, 2), None)
    assert plain.equal(logits_BTV[:2])
    adjusted = sampler._adjusted(logits_BTV[2:], positions[2:], slice(2, 3), None)
    assert not adjusted.equal(logits_BTV[2:]), "it has moved with its options"


def test_no_answer_ends_before_its_least_number_of_tokens(tmp_path):
    ends = np.full((10, 10), -5.0)
    ends[:, 3] = 9.0
    folder = write_markov(tmp_path, torch.tensor(ends, dtype=torch.float32), eos=[3])
    with LLM(str(folder), dtype="float32", max_batch_size=2) as llm:
        for options in ({}, {"temperature": 1.0, "seed": 4}, {"logprobs": 2}):
            for least in (0, 1, 2, 5):
                answer = llm.generate([[1]], max_new_tokens=9, min_new_tokens=least, **options)[0]
                assert answer.finish_reason == "eos"
                assert len(answer.token_ids) == least + 1, "the end is the likeliest everywhere"
                assert answer.token_ids.index(3) == least
        ignored = llm.generate([[1]], max_new_tokens=9, min_new_tokens=5, ignore_eos=True)[0]
        assert set(ignored.token_ids) == {3}
        with pytest.raises(RequestError, match="min_new_tokens is 10, more than the 9 tokens"):
            llm.generate([[1]], max_new_tokens=9, min_new_tokens=10)


def test_penalties_count_the_tokens_of_the_answer_alone(tmp_path):
    logits = np.tile(np.linspace(0, 1, 10), (10, 1))
    folder = write_markov(tmp_path, torch.tensor(logits, dtype=torch.float32), eos=[])
    options = {"max_new_tokens": 12, "ignore_eos": True}
    with LLM(str(folder), dtype="float32") as llm:
        once = llm.generate([[9, 8]], presence_penalty=5, **options)[0].token_ids
        assert once == (9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 9, 9), "until all are there"
        often = llm.generate([[9, 8]], frequency_penalty=0.16, **options)[0].token_ids
        params, answer = SamplingParams(frequency_penalty=0.16), []
        for token in often:
            assert token == distribution(logits[0], params, [], answer).argmax()
            answer.append(token)
        banned = llm.generate([[9]], logit_bias={9: -100, "8": -100}, **options)[0].token_ids
        assert set(banned) == {7}


def test_answers_to_one_prompt_draw_with_the_seeds_that_follow(llm):
    drawn = {"temperature": 1.0, "max_new_tokens": 6, "ignore_eos": True}
    found = llm.generate([[5, 6], [7]], n=3, seed=10, **drawn)
    alone = [llm.generate([p], seed=10 + i, **drawn)[0] for p in ([5, 6], [7]) for i in range(3)]
    assert [g.token_ids for g in found] == [g.token_ids for g in alone]
    assert len({g.token_ids for g in found[:3]}) > 1
    again = [llm.generate([[5, 6]], n=3, **drawn) for _ in range(2)]
    assert [g.token_ids for g in again[0]] != [g.token_ids for g in again[1]]
    indices = [d.index for d in llm.stream([[5], [6]], n=2, **drawn) if d.generation]
    assert sorted(indices) == [0, 1, 2, 3]
    with pytest.raises(RequestError, match="n is 2, but a prompt by itself has one answer"):
        llm.generate("a text", n=2)


def test_equally_likely_tokens_at_the_edge_of_top_k_are_kept_by_their_ids():
    params = SamplingParams(temperature=1.0, top_k=4)
    assert set(draws(LOGITS, params)) == {2, 3, 6, 9}  # 1.1 is the third, 0.9 stands twice


@pytest.mark.parametrize("penalty", [1.0, 3.0])
def test_temperature_zero_takes_the_largest_logit_after_the_penalty(penalty):
    params = SamplingParams(repetition_penalty=penalty, top_k=3, seed=1)
    assert set(draws(LOGITS, params, n_seeds=64)) == {2 if penalty == 1 else 6}


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40, 1e-300])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("top_k", [0, 3])
def test_the_lowest_temperatures_take_the_most_likely_token(temperature, sign, top_k):
    logits = LOGITS + 5 * sign
    params = SamplingParams(temperature=temperature, top_k=top_k)
    assert set(draws(logits, params, n_seeds=64)) == {2}


def test_the_highest_temperatures_draw_evenly():
    params = SamplingParams(temperature=1e30)
    assert_drawn_from(draws(LOGITS, params), np.full(10, 0.1))


def test_tokens_without_probability_are_never_drawn():
    logits = np.array([0.0, -200.0, 0.1, -np.inf, -150.0, 0.2])
    for options in ({}, {"top_p": 0.999}, {"min_p": 1e-3}, {"top_k": 5}):
        params = SamplingParams(temperature=1.0, **options)
        assert set(draws(logits, params)) == {0, 2, 5}


@pytest.fixture
def neighbors() -> tuple[Sampler, SamplingParams, SamplingParams]:
    """A sampler of two rows: one draws from all tokens, the other truncates and penalizes."""
    sampler = Sampler(2, 49_152, torch.device("cpu"))
    plain = SamplingParams(temperature=1.0)
    other = SamplingParams(temperature=1.0, top_p=0.5, repetition_penalty=1.5, logprobs=1)
    sampler.admit(1, other, 5, SEEN)
    return sampler, plain, other


def drawn_alone_and_beside(neighbors, seed: int) -> tuple[int, int]:
    sampler, plain, other = neighbors
    logits_V = torch.randn(49_152, generator=torch.Generator().manual_seed(0)) * 2
    sampler.admit(0, plain, seed, SEEN)
    positions_B1 = torch.tensor([[3], [3]])
    alone = sampler.sample(logits_V[None, None], positions_B1[:1], 0, Features.of([plain]))
    both = Features.of([plain, other])
    beside = sampler.sample(logits_V.expand(2, 1, -1), positions_B1, 0, both)
    return alone.ids[0, 0].item(), beside.ids[0, 0].item()


def test_a_neighbor_that_truncates_does_not_move_a_draw(neighbors):
    for seed in range(10):
        alone, beside = drawn_alone_and_beside(neighbors, seed)
        assert alone == beside


def test_beside_a_neighbor_that_truncates_the_least_likely_token_can_be_drawn(
    neighbors, monkeypatch
):
    # So many tokens that float32's running sum of their probabilities reaches 1 before the end.
    least = int(torch.randn(49_152, generator=torch.Generator().manual_seed(0)).argmin())
    gumbel_V = torch.zeros(49_152).index_fill_(0, torch.tensor([least]), 1e3)
    monkeypatch.setattr("hotloop.engine.sampling._gumbel", lambda *_: gumbel_V)
    assert drawn_alone_and_beside(neighbors, 0) == (least, least)


def test_a_draw_does_not_depend_on_how_many_candidates_are_looked_at(monkeypatch):
    # Sharp and flat rows, for which some, many and all tokens are needed.
    generator = torch.Generator().manual_seed(1)
    sharpness = torch.tensor([8.0, 3.0, 1.0, 0.1, 3.0, 3.0, 1.0, 1.0])
    logits_BTV = torch.randn(8, 3, 20_000, generator=generator) * sharpness[:, None, None]
    logits_BTV = logits_BTV.round(decimals=2)  # with many equal ones
    options = [{"top_p": p} for p in (0.9, 0.95, 0.99, 0.5)]
    options += [{}, {"temperature": 0.0}, {"top_k": 300, "top_p": 0.8}, {"top_k": 9_000}]
    rows = [SamplingParams(**{"temperature": 1.0} | each) for each in options]
    sampler = Sampler(8, 20_000, torch.device("cpu"))
    for row, params in enumerate(rows):
        sampler.admit(row, params, 7 + row, SEEN)

    scaled_BTV = logits_BTV - logits_BTV.amax(dim=-1, keepdim=True)

    def masks(here: slice, few: tuple[int, ...]) -> torch.Tensor:
        monkeypatch.setattr("hotloop.engine.sampling.FEW_CANDIDATES", few)
        return sampler._kept(scaled_BTV[here], here, Features.of(rows[here]))

    together = masks(slice(0, 8), (256, 4096))
    assert together[0].sum(dim=-1).max() < 256 < together[2].sum(dim=-1).min()
    assert together.equal(masks(slice(0, 8), (19_999,)))
    for row in range(8):
        here = slice(row, row + 1)
        assert masks(here, (256, 4096)).equal(masks(here, (19_999,))), rows[row]
        assert masks(here, (256, 4096)).equal(together[here]), rows[row]


def test_a_draw_is_the_same_where_only_tokens_that_pass_get_noise(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    logits_BTV = 6 * torch.randn(5, 3, 20_011, generator=generator)
    logits_BTV = logits_BTV.round(decimals=1)  # with many equal ones
    options = [{"top_p": 0.95}, {"top_k": 50}, {"min_p": 0.01}, {"temperature": 0.0}, {"top_k": 1}]
    rows = [SamplingParams(**{"temperature": 1.0} | each) for each in options]
    sampler = Sampler(5, 20_011, torch.device("cpu"))
    drawn, sizes = [], []
    of = sampling._gumbel_of
    monkeypatch.setattr(
        sampling, "_gumbel_of", lambda keys, ids: (sizes.append(len(ids)), of(keys, ids))[1]
    )
    for most in (8, 10**9):
        monkeypatch.setattr(sampling, "SPARSE_DIVISOR", most)
        ids = []
        for seed in range(20):
            for row, params in enumerate(rows):
                sampler.admit(row, params, 100 * seed + row, SEEN)
            positions_BT = torch.arange(seed, seed + 3).expand(5, 3)
            features = Features.of(rows)
            ids.append(sampler.sample(logits_BTV, positions_BT, 0, features).ids)
        drawn.append(torch.stack(ids))
    assert drawn[0].equal(drawn[1])
    assert max(sizes[:20]) < 15 * 20_011 / 8
    assert set(sizes[20:]) == {20_011}


def test_a_sharp_distribution_is_not_sorted(monkeypatch):
    sampler = Sampler(1, 20_000, torch.device("cpu"))
    params = SamplingParams(temperature=1.0, top_p=0.9)
    sampler.admit(0, params, 5, SEEN)
    topk, sizes = sampler.vocabulary.topk, []
    monkeypatch.setattr(sampler.vocabulary, "topk", lambda x, n: (sizes.append(n), topk(x, n))[1])
    logits_V = torch.randn(20_000, generator=torch.Generator().manual_seed(2))
    for sharpness, looked_at in ((5.0, [256]), (1.0, [256, 4096, 20_000])):
        scores_BTV = sharpness * logits_V[None, None]
        sampler.sample(scores_BTV, torch.tensor([[3]]), 0, Features.of([params]))
        assert sizes == looked_at
        sizes.clear()


def test_gumbel_numbers_are_finite_independent_and_distributed_as_they_should_be():
    seeds_B, positions_B = torch.arange(200), torch.arange(5, 205)
    zeros_B1 = torch.zeros_like(seeds_B)[:, None]
    of_seeds = _gumbel(seeds_B, zeros_B1, 1000)[:, 0]
    of_positions = _gumbel(torch.tensor([0]), positions_B[None], 1000)[0]
    of_high_seeds = _gumbel(seeds_B << 40, zeros_B1, 1000)[:, 0]
    for gumbel_BV in (of_seeds, of_positions, of_high_seeds):
        assert gumbel_BV.isfinite().all()
        uniform = np.exp(-np.exp(-gumbel_BV.double().numpy()))
        assert stats.kstest(uniform.ravel(), "uniform").pvalue > 1e-3
        # Neighboring rows, and neighboring ids, have nothing to do with each other.
        cells = (uniform * 16).astype(int)
        for first, second in ((cells[1:], cells[:-1]), (cells[:, 1:], cells[:, :-1])):
            pairs = np.bincount((first * 16 + second).ravel(), minlength=256)
            assert stats.chisquare(pairs).pvalue > 1e-3


def test_the_largest_hash_does_not_make_an_infinite_gumbel_number(monkeypatch):
    for word in (0, 2**32 - 1):
        monkeypatch.setattr("hotloop.engine.sampling._mix", lambda x, w=word: x * 0 + w)
        assert _gumbel(torch.tensor([1]), torch.tensor([[1]]), 4).isfinite().all()


# ------------------------------------------------------------------------ through the whole engine


@pytest.fixture(scope="module")
def markov(tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, np.ndarray]:
    """An engine of four rows, and its logits [V, V] after each of six tokens."""
    logits_VV = torch.randn(6, 6, generator=torch.Generator().manual_seed(3))
    folder = write_markov(tmp_path_factory.mktemp("markov"), logits_VV)
    return LLM(str(folder), dtype="float32", max_batch_size=4), logits_VV.numpy()


SAMPLED = SamplingParams(max_new_tokens=40, ignore_eos=True, temperature=1.0)


def test_an_engine_draws_each_token_from_the_distribution_after_the_one_before_it(markov):
    llm, logits_VV = markov
    params = dataclasses.replace(SAMPLED, temperature=0.8, top_k=5, top_p=0.95)
    pairs = []
    for seed in range(60):
        (g,) = llm.generate([[4]], params, seed=seed)
        pairs += zip((4, *g.token_ids), g.token_ids, strict=False)
    before, after = np.array(pairs).T
    for token in range(6):
        expected = distribution(logits_VV[token], params, [])
        assert_drawn_from(after[before == token], expected)


def test_a_repetition_penalty_covers_prompt_and_answer(markov):
    llm, logits_VV = markov
    params = SamplingParams(max_new_tokens=30, ignore_eos=True, repetition_penalty=1.8)
    prompts = [[4], [0, 1], [3, 3, 5]]
    for prompt, g in zip(prompts, llm.generate(prompts, params), strict=True):
        for i, token in enumerate(g.token_ids):
            seen = [*prompt, *g.token_ids[:i]]
            assert distribution(logits_VV[seen[-1]], params, seen)[token] == 1


def test_a_seed_gives_the_same_answer_whatever_the_batch_and_the_row(markov):
    llm, _ = markov
    prompts = [[i % 6] for i in range(4, 11)]
    params = dataclasses.replace(SAMPLED, seed=11, logprobs=2)
    together = [g.token_ids for g in llm.generate(prompts, params)]
    assert together == [llm.generate([prompt], params)[0].token_ids for prompt in prompts]
    assert together == [g.token_ids for g in llm.generate(prompts, params)]


def test_different_seeds_give_different_answers(markov):
    llm, _ = markov
    seeds = (0, 1, 2**32, 2**32 + 1, 2**63 - 1)
    assert len({llm.generate([[4]], SAMPLED, seed=s)[0].token_ids for s in seeds}) == len(seeds)


def test_without_a_seed_every_request_is_drawn_anew(markov):
    llm, _ = markov
    answers = [g.token_ids for _ in range(2) for g in llm.generate([[4], [4]], SAMPLED)]
    assert len(set(answers)) == 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probabilities_are_those_of_the_raw_logits(llm, twin_logits, temperature):
    prompts = [[5, 6], [7] * 9]
    params = SamplingParams(
        max_new_tokens=12, temperature=temperature, top_k=5, repetition_penalty=1.5, seed=3
    )
    for prompt, g in zip(
        prompts, llm.generate(prompts, params, logprobs=7, ignore_eos=True), strict=True
    ):
        expected_TV = twin_logits([*prompt, *g.token_ids]).log_softmax(dim=-1)[len(prompt) - 1 :]
        assert [entry.token_id for entry in g.logprobs] == list(g.token_ids)
        for entry, expected_V in zip(g.logprobs, expected_TV, strict=False):
            top = expected_V.topk(7)
            torch.testing.assert_close(torch.tensor(entry.logprob), expected_V[entry.token_id])
            torch.testing.assert_close(torch.tensor([p for _, p in entry.top]), top.values)
            assert [i for i, _ in entry.top] == top.indices.tolist()


def test_log_probabilities_come_only_when_asked_for(llm):
    (g,) = llm.generate([[5]], max_new_tokens=3)
    assert g.logprobs is None
    (g,) = llm.generate([[5]], max_new_tokens=3, logprobs=0)
    assert [entry.top for entry in g.logprobs] == [()] * 3
