"""Invalid requests are refused with the value and the fix, and the engine stays usable."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import encode, tokenizer, write_random

from hotloop import LLM, EngineConfig, SamplingParams
from hotloop.engine.setup import prepare
from hotloop.errors import (
    CheckpointError,
    ConfigError,
    ModelNotFoundError,
    RequestError,
    UnknownNameError,
    UnsupportedError,
)
from hotloop.types import MIN_DEFAULT_SEQ_LEN
from hotloop.weights.quantize import quantize_checkpoint


@pytest.fixture(scope="module")
def small(folder: Path) -> LLM:
    return LLM(str(folder), dtype="float32", max_batch_size=2, max_seq_len=16)


@pytest.fixture(scope="module")
def textless(folder: Path) -> LLM:
    return LLM(str(folder), weights="random", dtype="float32")


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("", {}, "prompt is empty"),
        ([[]], {}, "prompt is empty"),
        ([[5], []], {}, "prompt is empty"),
        ([[5] * 16], {}, "prompt has 16 tokens, but the context of 16"),
        ([[5] * 10], {"max_new_tokens": 7}, "prompt has 10 tokens and max_new_tokens is 7"),
        ([[300]], {}, "token id 300 is outside the vocabulary: ids are 0 to 299"),
        ([[5], [5, -1]], {}, "token id -1 is outside the vocabulary"),
        ([[5]], {"temperature": -1}, "temperature must be 0 or more, not -1"),
        ([[5]], {"temperature": float("nan")}, "temperature must be"),
        ([[5]], {"top_p": 0}, "top_p must be above 0"),
        ([[5]], {"logprobs": 21}, "logprobs must be between 0 and 20"),
        ([[5]], {"stop": b"text"}, "stop must be text, or a list of texts, not b'text'"),
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_and_the_engine_goes_on(
    small, prompts, options, message
):
    expected = small.generate([[5, 6]], max_new_tokens=4)[0].token_ids
    with pytest.raises(RequestError, match=message):
        small.generate(prompts, **options)
    assert small.generate([[5, 6]], max_new_tokens=4)[0].token_ids == expected


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ([5], "2 tokens or more, not 1"),
        ([5, 300], "token id 300 is outside"),
        ([5] * 17, "17 tokens is beyond the context of 16"),
    ],
)
def test_a_window_that_cannot_be_scored_is_refused_and_the_engine_goes_on(small, window, message):
    with pytest.raises(RequestError, match=message):
        list(small.score([window]))
    (score,) = small.score([[5] * 16])
    assert len(score.token_logprobs) == 15


def test_without_a_tokenizer_only_token_ids_are_served(textless):
    for request in (
        lambda: textless.generate("text"),
        lambda: textless.generate([[5]], stop=["text"]),
        lambda: textless.encode("text"),
    ):
        with pytest.raises(UnsupportedError, match="random weights has no tokenizer"):
            request()
    assert len(textless.generate([[5]], max_new_tokens=3)[0].token_ids) == 3


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("dtype", "bfloat", "unknown dtype 'bfloat'. Did you mean 'bfloat16'"),
        ("execution", "compiled", "unknown execution 'compiled'. Did you mean 'compile'"),
        ("weights", "radnom", "unknown weights 'radnom'. Did you mean 'random'"),
        ("quant", "in8", "unknown quantization scheme 'in8'. Did you mean 'int8'"),
        ("head", "int88", "unknown quantization scheme 'int88'. Did you mean 'int8'"),
    ],
)
def test_a_misspelled_choice_is_answered_with_the_nearest(folder, option, value, message):
    with pytest.raises(UnknownNameError, match=message):
        LLM(str(folder), **{option: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant": "int4-g48"}, "no option 'g48'"),
        ({"quant": "int8-g48"}, "no option 'g48'"),
        (
            {"quant": "int4-g128"},
            "64 input features.* not divide.* int4-g32 or int4-g64",
        ),
        ({"device": "gpu"}, "device 'gpu' is not the name of a device"),
        (
            {"max_seq_len": 321},
            r"max_seq_len \(--max-seq-len\) 321 exceeds the model's context of 320",
        ),
        ({"max_batch_size": 0}, "max_batch_size must be 1 or more, not 0"),
        ({"prefill_chunk": 0}, "prefill_chunk must be 1 or more, not 0"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        LLM(str(folder), **options)


def test_a_text_is_refused_whose_token_has_no_row_in_the_embedding(tmp_path):
    text = tokenizer().decode([290])
    assert max(encode(text)) >= 280
    with LLM(str(write_random(tmp_path, vocab_size=280)), dtype="float32") as llm:
        says = r"token id \d+ is outside the vocabulary: ids are 0 to 279"
        with pytest.raises(RequestError, match=says):
            llm.generate(text)


def test_a_context_that_nobody_asked_for_is_the_models_as_far_as_the_cache_stays_small(
    folder, tmp_path
):
    model = str(write_random(tmp_path, max_position_embeddings=10_000))

    def context(**options: object) -> int:
        return prepare(EngineConfig(model=model, device="cpu", **options)).n_positions

    assert context() == 10_000
    assert context(max_batch_size=10_000) == MIN_DEFAULT_SEQ_LEN
    assert context(draft=str(folder)) == 320, "what the draft model can hold"
    with pytest.raises(ConfigError, match=r"max_seq_len \(--max-seq-len\) 400 exceeds"):
        context(draft=str(folder), max_seq_len=400)


def test_fused_is_refused_on_a_cpu_and_auto_is_eager_there(folder):
    message = "execution 'fused' cannot run here: it is for NVIDIA GPUs. Choose 'auto', or 'eager'"
    with pytest.raises(UnsupportedError, match=message):
        LLM(str(folder), execution="fused", device="cpu")
    assert LLM(str(folder), execution="auto", device="cpu").describe().execution == "eager"


def test_a_built_in_shape_needs_random_weights():
    with pytest.raises(ConfigError, match=r"built-in shape without weights.*--weights random"):
        LLM("llama-2-7b")


def test_a_model_that_is_not_there_is_refused():
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        LLM("no-such-model")


def test_a_folder_without_a_tokenizer_is_refused_unless_its_weights_are_random(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        LLM(str(tmp_path), dtype="float32")
    LLM(str(tmp_path), dtype="float32", weights="random")


def test_a_quantized_checkpoint_is_not_quantized_again(folder, tmp_path):
    quantized = quantize_checkpoint(folder, tmp_path / "int8", quant="int8")
    for options in ({"quant": "int4-g64"}, {"head": "none"}):
        with pytest.raises(ConfigError, match="already quantized as int8 with head int8"):
            LLM(str(quantized), **options)
    for options in ({}, {"quant": "int8"}, {"quant": "int8", "head": "int8"}):
        llm = LLM(str(quantized), dtype="float32", **options)
        assert llm.describe().name == "int8/eager/float32"


def test_a_quantized_checkpoint_gives_the_tokens_of_quantizing_on_load(folder, tmp_path):
    quantized = quantize_checkpoint(folder, tmp_path / "int4", quant="int4-g32-asym", head="none")
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    stored = LLM(str(quantized), dtype="float32").generate([[5, 6]], params)[0]
    made = LLM(str(folder), dtype="float32", quant="int4-g32-asym", head="none")
    assert stored.token_ids == made.generate([[5, 6]], params)[0].token_ids


def test_a_broken_config_is_refused_before_weights_are_read(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(UnsupportedError, match="hidden_act = 'gelu'"):
        LLM(str(tmp_path))


def test_importing_hotloop_does_not_import_torch():
    code = "import sys, hotloop; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
