"""Several ranks give what one gives: the arithmetic of shards, with ranks that are threads.

Ranks that are processes are in ``test_engine_ranks``.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from thread_group import ThreadGroup, ThreadRanks, ranks_as_threads
from tiny_models import N_TOKENS, write_markov, write_random
from transformers import AutoConfig, AutoModelForCausalLM

from hotloop import LLM, Grammar, SamplingParams
from hotloop.engine.core import TOP_K_CANDIDATES, Describe, Features
from hotloop.engine.memory import predict_memory
from hotloop.engine.sampling import Sampler
from hotloop.engine.vocabulary import VocabularyShard
from hotloop.models.families import FAMILIES, family_of
from hotloop.models.linear import Embedding, Linear

SMOLLM2_HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
PROMPTS = ([7], [5, 6], list(range(2, 19)), [260, 3] * 30, [299, 150, 2, 40, 41])
FREELY = SamplingParams(max_new_tokens=16, ignore_eos=True)
SCHEMES = ["none", "int8", "int8-g32", "int4-g32", "int4-g64-asym"]


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    with ranks_as_threads():
        yield


def pair(folder: Path, n: int, **options: Any) -> tuple[LLM, LLM]:
    """The engine of one rank, and the same of ``n``."""
    options = {"dtype": "float32", "max_batch_size": 3} | options
    return LLM(str(folder), **options), LLM(str(folder), tensor_parallel=n, **options)


def tokens(
    llm: LLM, prompts: Sequence[Sequence[int]] = PROMPTS, **options: Any
) -> list[tuple[int, ...]]:
    return [g.token_ids for g in llm.generate(prompts, FREELY, **options)]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine query and three key/value heads, as SmolLM2 has, with every bias."""
    return write_random(
        tmp_path_factory.mktemp("nine"),
        **SMOLLM2_HEADS,
        intermediate_size=256,
        tie_word_embeddings=request.param,
        attention_bias=True,
        mlp_bias=True,
        embedding_std=0.3,
    )


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("quant", SCHEMES)
def test_greedy_tokens_in_float32_are_those_of_one_rank(folder, quant, n):
    one, several = pair(folder, n, quant=quant)
    assert tokens(several) == tokens(one)


@pytest.mark.parametrize(("n", "draft"), [(2, "itself"), (3, "ngram"), (4, "none")])
def test_ranks_choose_what_one_chooses_of_the_tokens_that_a_grammar_allows(folder, draft, n):
    options = {"draft_policy": "always", "draft": str(folder) if draft == "itself" else draft}
    grammar = Grammar(kind="regex", source="(the token |letters){2,9}[0-9]{1,3}")
    params = SamplingParams(grammar=grammar, max_new_tokens=40)
    found = []
    for llm in pair(folder, n, **options):
        beside = llm.stream([[9]], FREELY)
        neighbor = list(next(beside).token_ids)
        for sampling in ({}, {"temperature": 0.9, "top_k": 20, "seed": 3}):
            for g in llm.generate(PROMPTS[:2], params, **sampling):
                assert g.finish_reason in ("eos", "length")
                found.append(g.token_ids)
        neighbor += [token for delta in beside for token in delta.token_ids]
        found.append(tuple(neighbor))
    assert found[:5] == found[5:]


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize(
    "draft", ["ngram", "exit-1", "self", "self-int8", "self-int4-g32", "itself"]
)
def test_drafts_do_not_change_tokens_and_are_those_of_one_rank(folder, draft, n):
    options = {"draft_policy": "always", "draft": str(folder) if draft == "itself" else draft}
    one, several = pair(
        folder, n, quant={"exit-1": "int8", "self": "int8-g32"}.get(draft, "none"), **options
    )
    plain = LLM(str(folder), dtype="float32", max_batch_size=3, quant=one.config.quant)
    for sampling in ({}, {"temperature": 0.9, "top_k": 20, "repetition_penalty": 1.2, "seed": 4}):
        assert tokens(several, **sampling) == tokens(one, **sampling) == tokens(plain, **sampling)
    counts = [
        [(g.speculation.proposed, g.speculation.accepted) for g in llm.generate(PROMPTS, FREELY)]
        for llm in (one, several)
    ]
    assert counts[0] == counts[1]


def test_short_prompts_at_once_have_the_bits_of_each_alone(folder):
    llm = LLM(str(folder), dtype="bfloat16", quant="int8", tensor_parallel=2, max_batch_size=4)
    assert llm._scheduler._prefill_batching is not None, "a row's bits do not depend on the others"
    prompts, params = [[7], [5, 9, 2], [3] * 6, [8, 4]], replace(FREELY, logprobs=2)
    together = llm.generate(prompts, params)
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = llm.generate([prompt], params)
        assert (found.token_ids, found.logprobs) == (alone.token_ids, alone.logprobs)


@pytest.mark.parametrize("draft", ["exit-1", "itself"])
def test_chains_of_drafts_end_at_the_same_draft_on_every_rank(folder, draft, monkeypatch):
    options = {"draft_policy": "always", "draft": str(folder) if draft == "itself" else draft}
    one, several = pair(folder, 2, **options)
    counts = []
    for llm in (one, several):
        least = itertools.cycle([2.0, 1e-6, 1e-4, 1e-3, 1e-5])  # none is as likely as 2
        controller = llm._scheduler.controller
        monkeypatch.setattr(controller, "_min_probability", lambda *_, least=least: next(least))
        found = llm.generate(PROMPTS, FREELY, temperature=0.9, seed=4)
        counts.append([(g.token_ids, g.speculation.proposed) for g in found])
    assert counts[0] == counts[1]
    assert any(len(set(proposed)) > 1 for _, proposed in counts[0]), "of any length"


@pytest.mark.parametrize("head", ["none", "int8", "int4-g64"])
def test_every_scheme_of_the_head_is_split(folder, head):
    one, several = pair(folder, 4, quant="int8", head=head)
    assert tokens(several) == tokens(one)


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("n", [2, 4])
def test_every_family_is_split(architecture, n, tmp_path):
    keys = dict(family_of({"architectures": [architecture]}).tiny) | {"vocab_size": N_TOKENS}
    write_random(tmp_path)  # for its tokenizer
    config = AutoConfig.for_model(**keys)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    model.save_pretrained(tmp_path)
    one, several = pair(tmp_path, n, quant="int8", max_seq_len=200)
    assert tokens(several) == tokens(one)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, LLM]:
    """One rank and three, over a vocabulary with padding: the last rank's rows are nothing else."""
    folder = write_random(
        tmp_path_factory.mktemp("padded"), vocab_size=430, **SMOLLM2_HEADS, embedding_std=0.3
    )
    one, several = pair(folder, 3)
    shares = [len(shard.vocabulary) for shard in several._setup.shards]
    assert shares == [160, 160, 110]
    return one, several


OPTIONS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 0.7, "top_k": TOP_K_CANDIDATES + 1},
    {"temperature": 1.2, "top_p": 0.7},
    {"temperature": 1.2, "min_p": 0.1},
    {"temperature": 1.0, "top_k": 9, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.3},
    {"temperature": 0.0, "repetition_penalty": 1.6},
    {"temperature": 50.0},
]


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items())
)
def test_sampled_tokens_are_those_of_one_rank(engines, options):
    one, several = engines
    assert tokens(several, seed=5, **options) == tokens(one, seed=5, **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probabilities_are_those_of_one_rank(engines, temperature):
    answers = [
        llm.generate(PROMPTS, FREELY, temperature=temperature, seed=1, logprobs=20)
        for llm in engines
    ]
    for expected, g in zip(*answers, strict=True):
        for theirs, ours in zip(expected.logprobs, g.logprobs, strict=True):
            assert ours.token_id == theirs.token_id
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [i for i, _ in ours.top] == [i for i, _ in theirs.top]
            for (_, p), (_, q) in zip(ours.top, theirs.top, strict=True):
                assert p == pytest.approx(q, abs=1e-4)


@pytest.mark.parametrize("full", [False, True])
def test_scores_are_those_of_one_rank(engines, full):
    window = torch.randint(2, 400, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    (expected,), (score,) = (list(llm.score([window], full=full)) for llm in engines)
    torch.testing.assert_close(score.token_logprobs, expected.token_logprobs, rtol=1e-4, atol=1e-4)
    assert score.top1.equal(expected.top1)
    if full:
        torch.testing.assert_close(score.log_probs, expected.log_probs, rtol=1e-4, atol=1e-4)
    else:
        assert score.log_probs is None


def test_exact_ties_over_ranks_go_to_the_smallest_id(tmp_path):
    logits_VV = torch.zeros(12, 12)
    logits_VV[:, [3, 5, 11]] = 2.0
    folder = write_markov(tmp_path, logits_VV)
    assert tokens(LLM(str(folder), dtype="float32"), [[4]]) == [(3,) * 16]
    # Its one attention head cannot be split: the vocabulary alone is.
    shares = [range(4), range(4, 8), range(8, 12)]

    def chosen(group: ThreadGroup) -> list[int]:
        sampler = Sampler(1, 12, torch.device("cpu"), VocabularyShard(shares, 12, group))
        logits = logits_VV[:1, None, shares[group.rank].start : shares[group.rank].stop]
        return sampler.sample(logits, torch.zeros(1, 1).long(), 0, Features()).ids.tolist()

    assert ThreadRanks(3).run(chosen) == [[[3]]] * 3


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items())
)
def test_draws_from_the_same_logits_are_exactly_those_of_one_rank(options):
    V, n_tokens, S = 1000, 900, 64
    params = SamplingParams(**options, logprobs=3)
    logits = (torch.randn(S, 1, V, generator=torch.Generator().manual_seed(0)) * 3).round(
        decimals=1
    )
    shares = [range(384), range(384, 768), range(768, 920), range(920, V)]
    positions = torch.arange(S)[:, None]

    def drawn(vocabulary: VocabularyShard) -> tuple[torch.Tensor, torch.Tensor]:
        sampler = Sampler(S, n_tokens, torch.device("cpu"), vocabulary)
        for row in range(S):
            sampler.admit(row, params, row, [row, 950])
        here = logits[..., vocabulary.rows.start : vocabulary.rows.stop]
        sampled = sampler.sample(here, positions, 0, Features.of([params]))
        return sampled.ids, sampled.top_ids

    expected, top = drawn(VocabularyShard([range(V)], n_tokens, ThreadRanks(1).groups[0]))
    for ids, top_ids in ThreadRanks(4).run(lambda g: drawn(VocabularyShard(shares, n_tokens, g))):
        assert ids.equal(expected)
        assert top_ids.equal(top)


def test_only_what_is_needed_crosses_over(monkeypatch):
    """One number a token; a few candidates; all of them for top-p alone."""
    crossed: list[int] = []
    for name in ("all_gather", "max"):
        original = getattr(ThreadGroup, name)

        def counting(self, x, original=original):
            if self.rank == 0:
                crossed.append(x.numel())
            return original(self, x)

        monkeypatch.setattr(ThreadGroup, name, counting)
    monkeypatch.setattr(ThreadGroup, "max", lambda self, x: self.all_gather(x).amax(dim=0))
    shares = [range(500), range(500, 1000)]
    logits = torch.randn(1, 1, 1000)

    def draw(params: SamplingParams) -> Callable[[ThreadGroup], None]:
        def run(group: ThreadGroup) -> None:
            sampler = Sampler(1, 1000, torch.device("cpu"), VocabularyShard(shares, 1000, group))
            sampler.admit(0, params, 1, [1])
            here = logits[..., shares[group.rank].start : shares[group.rank].stop]
            sampler.sample(here, torch.zeros(1, 1).long(), 0, Features.of([params]))

        return run

    for options, most in (
        ({}, 1),
        ({"temperature": 1.0}, 3),  # the greedy token, the largest logit, the drawn token
        ({"temperature": 1.0, "min_p": 0.1}, 3),
        ({"temperature": 1.0, "top_k": 40, "top_p": 0.9}, 3 + TOP_K_CANDIDATES),
        ({"temperature": 1.0, "top_p": 0.9}, 3 + 500),
        ({"logprobs": 5}, 1 + 1 + 20 + 1),
    ):
        crossed.clear()
        ThreadRanks(2).run(draw(SamplingParams(**options)))
        assert sum(crossed) == most, options


@pytest.mark.parametrize("quant", ["none", "int8", "int4-g64-asym"])
@pytest.mark.parametrize("head", ["auto", "int4-g32"])
def test_predicted_and_described_bytes_are_those_resident_on_rank_0_and_no_rank_has_more(
    folder, quant, head
):
    _, several = pair(folder, 4, quant=quant, head=head, max_seq_len=40)
    predicted, described = predict_memory(several.config), several.describe()
    residents = []
    for runner in several._runner.runners:
        buffers = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in runner._model.decoder.buffers()
        }
        residents.append(sum(buffers.values()))
        cache = sum(t.nbytes for t in runner._model.cache.buffers())
        assert runner.run(Describe()).wait()["weight_bytes"] == residents[-1]
        assert cache <= predicted.cache_bytes
    assert predicted.weights_bytes == described.weight_bytes == residents[0] == max(residents)
    rank0 = several._runner.runners[0]
    assert predicted.cache_bytes == sum(t.nbytes for t in rank0._model.cache.buffers())
    read = sum(
        t.nbytes
        for module in rank0._model.decoder.modules()
        if not isinstance(module, Embedding)
        for name, t in module.named_buffers(recurse=False)
        if name not in ("cos0", "sin0")
    )
    assert described.weight_bytes_per_step == read
    linears = {
        n.split(".")[-1] for n, m in rank0._model.decoder.named_modules() if isinstance(m, Linear)
    }
    assert described.kernels.keys() == linears | {"attention", "all_reduce"}
