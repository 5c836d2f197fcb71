"""vLLM as an engine, by a stand-in with its signatures; vLLM itself needs a GPU."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from tiny_models import N_TOKENS, write_random

from hotloop.baselines.vllm import ENGINE
from hotloop.errors import UnsupportedError
from hotloop.sweep.recipe import load_recipe, replace_models
from hotloop.sweep.runner import run_sweep
from hotloop.types import EngineConfig, SamplingParams
from hotloop.weights.quantize import quantize_checkpoint

FAKE = Path(__file__).parent / "fake_vllm"
FIXED = SamplingParams(max_new_tokens=4, ignore_eos=True)
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}


@pytest.fixture
def _fake(monkeypatch):
    monkeypatch.syspath_prepend(str(FAKE))
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_random(tmp_path_factory.mktemp("model"), eos=[31]))


def create(folder, **levers):
    base = {"model": folder, "engine": "vllm", "max_seq_len": 32, "max_batch_size": 2}
    return ENGINE.create(EngineConfig(**base | levers))


def answer(token, n):
    tokens = []
    for _ in range(n):
        token = (7 * token + 3) % N_TOKENS
        tokens.append(token)
    return tuple(tokens)


@pytest.mark.usefixtures("_fake")
def test_each_token_is_timed_at_the_step_that_gave_it(folder):
    engine = create(folder)
    for _ in range(2):
        first, second = engine.generate([[5, 4], [9]], FIXED)
        assert (first.token_ids, second.token_ids) == (answer(4, 4), answer(9, 4))
        assert 0 < first.timing.ttft_s < first.timing.e2e_s
    (ended,) = engine.generate([[4]], SamplingParams(max_new_tokens=4))  # 4 is followed by 31
    assert (ended.token_ids, ended.finish_reason) == ((31,), "eos")
    engine.close()


@pytest.mark.usefixtures("_fake")
def test_scores_are_of_the_most_likely_tokens(folder):
    (score,) = create(folder).score([[4, 31, 299]], full=True)
    assert score.top1.tolist() == [31, (7 * 31 + 3) % N_TOKENS]
    assert score.token_logprobs.tolist() == pytest.approx([-0.1, -50.0])
    assert score.top[0].shape == (2, 20)
    assert score.log_probs is None


@pytest.mark.usefixtures("_fake")
@pytest.mark.parametrize(
    ("quant", "method"),
    [
        ("none", None),
        ("int4-g128-asym", "awq"),
        ("int4-g64", "gptq"),
        ("int8", "gptq"),
        ("fp8", "fp8"),
    ],
)
def test_random_weights_have_the_quantization_that_is_asked_for(quant, method):
    engine = create("llama-2-7b", weights="random", quant=quant)
    assert engine._llm.kwargs["load_format"] == "dummy"
    assert engine._llm.hf_config["hidden_size"] == 4096
    about = engine.describe()
    assert about.settings["resolved_quantization"] == method
    assert about.version == "vllm 0.26.0+fake"
    assert about.execution == "compile"
    assert about.name == f"vllm/{quant}/compile/batch2"
    assert about.weight_bytes_per_step is None
    engine.close()


@pytest.mark.usefixtures("_fake")
def test_eager_and_the_lengths_are_those_of_the_cell(folder):
    engine = create(folder, execution="eager", dtype="float16")
    given = engine.describe().settings
    assert given["enforce_eager"] is True
    assert (given["dtype"], given["max_model_len"], given["max_num_seqs"]) == ("float16", 33, 2)
    assert given["enable_prefix_caching"] is False


@pytest.mark.usefixtures("_fake")
def test_what_its_environment_says_of_speed_is_a_setting_and_nothing_else_is(folder, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_API_KEY", "a secret")
    settings = create(folder).describe().settings
    assert settings["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert "a secret" not in settings.values()
    assert "VLLM_ATTENTION_BACKEND" not in settings


@pytest.mark.usefixtures("_fake")
def test_a_checkpoint_is_run_in_its_own_quantization_and_no_other(folder, tmp_path):
    with pytest.raises(UnsupportedError, match=r"does not quantize .* is stored as 'none'"):
        create(folder, quant="int8")
    assert create(folder, quant="fp8").describe().settings["quantization"] == "fp8"

    from hotloop.baselines.vllm import _stored_scheme

    assert _stored_scheme(AWQ) == "int4-g64-asym"
    assert _stored_scheme({**AWQ, "zero_point": False}) == "awq"
    assert _stored_scheme(None) == "none"
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.raises(Exception, match="gguf"):
        create(str(gguf))


@pytest.mark.usefixtures("_fake")
@pytest.mark.parametrize("quant", ["int4-g32", "int8", "fp8"])
def test_a_copy_in_compressed_tensors_is_run_as_it_is_stored(folder, tmp_path, quant):
    copy = quantize_checkpoint(
        Path(folder), tmp_path / "copy", quant=quant, copy_format="compressed-tensors"
    )
    engine = create(str(copy))
    settings = engine.describe().settings
    assert settings["resolved_quantization"] == "compressed-tensors"
    assert settings["quantization"] is None, "vLLM takes what the copy says"
    engine.close()
    with pytest.raises(UnsupportedError, match="is stored as 'compressed-tensors'"):
        create(str(copy), quant="int4-g64")


@pytest.mark.usefixtures("_fake")
def test_what_its_interpreter_lacks_for_the_measurement_is_named(folder, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("hotloop.engine.setup")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hotloop.weights.checkpoint", None)
    with pytest.raises(UnsupportedError, match="interpreter of vllm lacks hotloop"):
        create(folder)


def test_without_its_library_it_is_unsupported(folder):
    with pytest.raises(UnsupportedError, match=r"vllm is not installed \(pip install vllm\)"):
        create(folder)


@pytest.mark.parametrize(
    ("levers", "said"),
    [
        ({"quant": "int4-g64+head"}, "does not support quant"),
        ({"execution": "fused"}, "does not support execution"),
        ({"draft": "ngram"}, "support the option draft"),
        ({"device": "cpu"}, "support the option device"),
    ],
)
def test_an_option_that_it_does_not_have_is_refused_before_anything_is_loaded(levers, said):
    with pytest.raises(UnsupportedError, match=said):
        ENGINE.predict(EngineConfig(model="m", engine="vllm", **levers))


def test_the_row_of_an_engine_says_what_its_interpreter_lacks_until_that_is_installed(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: llama-2-7b\nweights: random\ncells: [{engine: vllm, quant: int4-g128-asym}]\n"
        "workload: {prompt_tokens: 3, new_tokens: 4, repeats: 2}\n"
    )
    own = replace_models(load_recipe(recipe), pythons={"vllm": python})
    (missing,) = run_sweep(own, tmp_path / "out")
    assert (missing.status, missing.baseline) == ("unsupported", "vllm")
    assert "--python vllm=PATH" in missing.reason
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{FAKE}" exec "{sys.executable}" "$@"\n')
    (record,) = run_sweep(own, tmp_path / "out", resume=True)
    assert record.decode_tok_s is not None, record.reason
    assert record.engine["version"] == "vllm 0.26.0+fake"
    assert record.engine["settings"]["max_num_seqs"] == 1
    assert str(tmp_path) not in json.dumps(record.config)
    assert os.sep not in record.cell.replace("/", "", 2)
