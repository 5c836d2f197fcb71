"""llama.cpp as an engine, on the demo's GGUF file; skipped where one of the two is missing."""

import sys

import pytest
import torch

from hotloop import LLM
from hotloop.baselines.llama_cpp import ENGINE
from hotloop.errors import ModelNotFoundError, UnsupportedError
from hotloop.types import EngineConfig, SamplingParams
from hotloop.weights.hub import resolve_model

LEVERS = {"device": "cpu", "max_seq_len": 48, "max_batch_size": 2}
PROMPTS = [[504, 3575, 282, 4649, 314], [1, 5345, 284, 260, 2240, 314, 260]]
FIXED = SamplingParams(max_new_tokens=6, ignore_eos=True)
MODEL = "smollm2-135m"


@pytest.fixture(scope="module")
def engine():
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    try:
        resolve_model(MODEL)
    except ModelNotFoundError:
        pytest.skip(f"{MODEL} is not here: hotloop pull {MODEL}")
    engine = ENGINE.create(EngineConfig(model=MODEL, engine="llama-cpp", **LEVERS))
    yield engine
    engine.close()


def test_answers_have_the_tokens_asked_for_whatever_runs_beside_them(engine):
    both = engine.generate(PROMPTS, FIXED)
    for prompt, answer in zip(PROMPTS, both, strict=True):
        assert answer.timing.n_tokens == len(answer.token_ids) == 6
        assert 0 < answer.timing.ttft_s < answer.timing.e2e_s
        (alone,) = engine.generate([prompt], FIXED)
        assert alone.token_ids == answer.token_ids


def test_its_distributions_are_near_those_of_the_same_weights_here(engine):
    window = engine.encode("The quick brown fox jumps over the lazy dog, and the cat sleeps.")
    (theirs,) = engine.score([window], full=True)
    with LLM(MODEL, quant="none", execution="eager", dtype="float32", **LEVERS) as llm:
        (ours,) = llm.score([window], full=True)
    kl = (ours.log_probs.exp() * (ours.log_probs - theirs.log_probs)).sum(dim=-1)
    assert theirs.log_probs.shape == ours.log_probs.shape
    assert kl.mean() < 0.02, "activations in eight bits explain this much"
    assert torch.equal(theirs.top1, theirs.log_probs.argmax(dim=-1))


def test_it_counts_the_files_weights_and_tells_its_version(engine):
    about = engine.describe()
    assert about.version.startswith("llama-cpp-python ")
    assert 80e6 < about.weight_bytes == about.weight_bytes_per_step < 98.4e6
    assert about.settings["n_seq_max"] == 2
    assert about.vocab_size == 49152


def test_without_its_library_it_is_unsupported(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UnsupportedError, match=r"not installed \(pip install llama-cpp-python\)"):
        ENGINE.create(EngineConfig(model=MODEL, engine="llama-cpp"))


@pytest.mark.parametrize(
    ("levers", "said"),
    [
        ({"quant": "int8"}, "does not support quant 'int8'. It supports: auto, none"),
        ({"weights": "random"}, "does not support weights 'random'"),
        ({"execution": "compile"}, "does not support the option execution"),
        ({"dtype": "float32"}, "does not support dtype"),
    ],
)
def test_an_option_that_it_does_not_have_is_refused_before_anything_is_loaded(levers, said):
    with pytest.raises(UnsupportedError, match=said):
        ENGINE.predict(EngineConfig(model=MODEL, engine="llama-cpp", **levers))
