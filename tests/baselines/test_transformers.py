"""transformers as an engine: the same tokens and distributions as hotloop's, by the same clock."""

import sys
from functools import partial

import pytest
import torch
import transformers
from tiny_models import N_TOKENS, write_random

from hotloop import LLM
from hotloop.baselines.transformers import ENGINE
from hotloop.errors import RequestError, UnsupportedError
from hotloop.types import EngineConfig, SamplingParams

LEVERS = {"device": "cpu", "dtype": "float32", "max_seq_len": 64, "max_batch_size": 2}
PROMPTS = [[7, 20, 33, 41, 5], [9, 9, 250, 3, 77]]
FIXED = SamplingParams(max_new_tokens=9, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_random(tmp_path_factory.mktemp("model"), eos=range(200)))


@pytest.fixture(scope="module")
def engine(folder):
    engine = ENGINE.create(config(folder))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def own(folder):
    with LLM(folder, quant="none", execution="eager", **LEVERS) as llm:
        yield llm


def config(folder, **levers):
    return EngineConfig(model=folder, engine="transformers", **LEVERS | levers)


def test_greedy_tokens_are_hotloops(engine, own):
    ours = [answer.token_ids for answer in own.generate(PROMPTS, FIXED)]
    assert [answer.token_ids for answer in engine.generate(PROMPTS, FIXED)] == ours


def test_an_answer_has_the_tokens_asked_for_and_the_time_of_each_step(engine):
    (answer,) = engine.generate(PROMPTS[:1], FIXED)
    assert answer.timing.n_tokens == len(answer.token_ids) == 9
    assert 0 < answer.timing.ttft_s < answer.timing.e2e_s
    assert answer.finish_reason == "length"


def test_an_answer_ends_at_the_models_end_unless_that_is_ignored(engine):
    answers = engine.generate(PROMPTS, SamplingParams(max_new_tokens=9))
    whole = engine.generate(PROMPTS, FIXED)
    for answer, other in zip(answers, whole, strict=True):
        n = next((i for i, token in enumerate(other.token_ids, 1) if token < 200), 9)
        assert answer.token_ids == other.token_ids[:n]
        assert answer.timing.n_tokens == n
    assert "eos" in {answer.finish_reason for answer in answers}, "nothing was shown"


def test_scores_are_hotloops(engine, own):
    window = list(range(3, 43))
    ((score,), (ours,)) = (list(one.score([window], full=True)) for one in (engine, own))
    torch.testing.assert_close(score.log_probs, ours.log_probs)
    torch.testing.assert_close(score.token_logprobs, ours.token_logprobs)
    assert torch.equal(score.top1, ours.top1)
    (short,) = engine.score([window])
    assert short.log_probs is None


def test_it_describes_the_same_model_with_its_version_and_settings(engine, own):
    theirs, ours = engine.describe(), own.describe()
    for field in ("n_params", "kv_bytes_per_token", "vocab_size", "dtype", "family"):
        assert getattr(theirs, field) == getattr(ours, field), field
    assert theirs.weight_bytes == 4 * theirs.n_params
    assert theirs.weight_bytes_per_step == theirs.weight_bytes - 4 * N_TOKENS * 64
    assert theirs.version == f"transformers {transformers.__version__}"
    assert theirs.settings == {"attn_implementation": "sdpa", "cache_implementation": "dynamic"}
    assert theirs.name == "transformers/eager/float32/batch2"


def test_compile_is_transformers_own(folder, engine, monkeypatch):
    traced = partial(transformers.CompileConfig, backend="eager")  # Inductor takes a minute
    monkeypatch.setattr(transformers, "CompileConfig", traced)
    torch._dynamo.utils.counters.clear()
    compiled = ENGINE.create(config(folder, execution="compile"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert compiled.describe().settings["cache_implementation"] == "static"
    ours = [answer.token_ids for answer in engine.generate(PROMPTS, FIXED)]
    assert [answer.token_ids for answer in compiled.generate(PROMPTS, FIXED)] == ours


def test_random_weights_need_no_tokenizer(folder):
    engine = ENGINE.create(config(folder, weights="random", dtype="bfloat16"))
    (answer,) = engine.generate(PROMPTS[:1], FIXED)
    assert len(answer.token_ids) == 9
    with pytest.raises(RequestError, match="no tokenizer"):
        engine.encode("text")


@pytest.mark.parametrize(
    ("prompts", "params", "said"),
    [
        ([[1, 2], [3]], FIXED, "equal length"),
        ([[]], FIXED, "at least one token"),
        ([[1] * 60], FIXED, "more than 64"),
        (PROMPTS, SamplingParams(max_new_tokens=3, temperature=0.5), "greedy"),
        (PROMPTS, SamplingParams(), "max_new_tokens"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(engine, prompts, params, said):
    with pytest.raises(RequestError, match=said):
        engine.generate(prompts, params)


@pytest.mark.parametrize(
    ("levers", "said"),
    [
        ({"quant": "int8"}, "does not support quant 'int8'. It supports: auto, none"),
        ({"execution": "fused"}, "does not support execution 'fused'"),
        ({"draft": "ngram"}, "does not support the option draft"),
        ({"tensor_parallel": 2}, "does not support the option tensor_parallel"),
    ],
)
def test_an_option_that_it_does_not_have_is_refused_before_anything_is_loaded(levers, said):
    with pytest.raises(UnsupportedError, match=said):
        ENGINE.predict(EngineConfig(model="m", engine="transformers", **levers))


def test_without_its_library_it_is_unsupported(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnsupportedError, match=r"not installed \(pip install transformers\)"):
        ENGINE.create(config(folder))
