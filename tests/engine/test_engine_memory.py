"""Bytes that are described or predicted are the bytes that are there."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import write_random
from torch import nn

from hotloop import LLM, EngineConfig
from hotloop.engine.memory import predict_memory
from hotloop.errors import OutOfMemoryError
from hotloop.models.linear import Embedding, Linear

TABLES = ("cos0", "sin0")


@pytest.fixture(scope="module", params=["tied", "untied", "untied, with biases"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    biases = "biases" in request.param
    return write_random(
        tmp_path_factory.mktemp("model"),
        tie_word_embeddings=request.param == "tied",
        attention_bias=biases,
        mlp_bias=biases,
    )


def resident_bytes(module: nn.Module) -> int:
    """Every storage once, however many tensors look at it."""
    storages = [t.untyped_storage() for t in (*module.parameters(), *module.buffers())]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize("head", ["auto", "none", "int8", "fp8", "int4-g32"])
@pytest.mark.parametrize("quant", ["none", "int8", "int8-g32", "fp8", "int4-g32", "int4-g64-asym"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_described_and_predicted_bytes_are_those_resident(model, dtype, quant, head):
    config = EngineConfig(
        model=str(model),
        quant=quant,
        head=head,
        dtype=dtype,
        max_batch_size=2,
        max_seq_len=40,
    )
    predicted = predict_memory(config)
    llm = LLM(config)
    described = llm.describe()
    weights, cache = (
        resident_bytes(llm._runner._model.decoder),
        resident_bytes(llm._runner._model.cache),
    )
    assert described.weight_bytes == predicted.weights_bytes == weights
    assert described.kv_bytes_per_token * 2 * 40 == predicted.cache_bytes == cache

    # One step reads every product and norm, a tied head too; of the embedding only single rows.
    read = sum(
        t.nbytes
        for module in llm._runner._model.decoder.modules()
        if not isinstance(module, Embedding)
        for name, t in module.named_buffers(recurse=False)
        if name not in TABLES
    )
    assert described.weight_bytes_per_step == read


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("quant", "draft"),
    [
        ("none", "self-int4-g32"),
        ("none", "self-fp8"),
        ("int8", "self-int4-g64"),
        ("int8-g32", "self"),
    ],
)
def test_described_and_predicted_bytes_of_a_self_draft_are_those_resident(
    model, dtype, quant, draft
):
    config = EngineConfig(model=str(model), quant=quant, dtype=dtype, max_seq_len=40, draft=draft)
    plain = predict_memory(replace(config, draft="none"))
    predicted, llm = predict_memory(config), LLM(config)
    runner = llm._runner._model
    resident = resident_bytes(nn.ModuleList([runner.decoder, runner.draft_decoder]))
    assert llm.describe().weight_bytes == predicted.weights_bytes == resident
    assert predicted.weights_bytes - predicted.draft_bytes == plain.weights_bytes
    assert (predicted.draft_bytes == 0) == (draft == "self")
    assert predicted.cache_bytes == plain.cache_bytes, "it is the model's"


def test_random_weights_take_the_bytes_of_the_checkpoint(model):
    for quant in ("none", "int4-g32"):
        read, made = (
            LLM(str(model), quant=quant, weights=weights) for weights in ("checkpoint", "random")
        )
        assert resident_bytes(read._runner._model.decoder) == resident_bytes(
            made._runner._model.decoder
        )


def test_a_prediction_says_where_it_is_and_adds_up(folder):
    plan = predict_memory(EngineConfig(model=str(folder), max_batch_size=4))
    counts = plan.to_dict()
    parts = ("weights_bytes", "cache_bytes", "workspace_bytes")
    assert counts["total_bytes"] == plan.total_bytes == sum(counts[part] for part in parts)
    assert plan.device == "cpu"
    assert plan.free_bytes > 0


def test_shapes_of_70_billion_parameters_are_predicted_without_loading_any():
    config = EngineConfig(model="llama-2-70b", weights="random", device="cpu", max_seq_len=1024)
    plan = predict_memory(config)
    assert plan.weights_bytes / 68_976_648_192 == pytest.approx(2, rel=1e-4)  # bfloat16
    assert plan.cache_bytes == 1024 * 80 * 2 * 8 * 128 * 2


def test_a_description_is_of_the_engine_that_runs(model):
    llm = LLM(str(model), quant="int8", dtype="float32", max_seq_len=100, max_batch_size=2)
    described = llm.describe()
    assert (described.family, described.device, described.dtype) == ("llama", "cpu", "float32")
    assert (described.vocab_size, described.max_seq_len) == (300, 100)
    assert described.name == "int8/eager/float32/batch2"
    dense = LLM(str(model), dtype="float32")
    parameters = {t.data_ptr(): t.numel() for t in dense._runner._model.decoder.buffers()}
    tables = sum(getattr(dense._runner._model.decoder, name).numel() for name in TABLES)
    assert described.n_params == sum(parameters.values()) - tables
    linears = {
        name for name, m in dense._runner._model.decoder.named_modules() if isinstance(m, Linear)
    }
    assert described.kernels.keys() == {n.split(".")[-1] for n in linears} | {"attention"}
    assert described.load_s > 0
    assert described.warmup_s > 0


def test_closing_frees_weights_and_cache(folder):
    llm = LLM(str(folder), dtype="float32")
    kept = [
        weakref.ref(module) for module in (llm._runner._model.decoder, llm._runner._model.cache)
    ]
    llm.close()
    gc.collect()
    assert [ref() for ref in kept] == [None, None]
    llm.close()  # twice does no harm


@pytest.mark.parametrize("options", [{"max_batch_size": 10**8}, {"max_batch_size": 2**31 - 1}])
def test_a_cache_that_no_machine_could_hold_is_refused_before_anything_is_built(
    folder, monkeypatch, options
):
    monkeypatch.delattr("hotloop.engine.llm.Runner")
    with pytest.raises(OutOfMemoryError, match="max_batch_size") as raised:
        LLM(str(folder), device="cpu", **options)
    assert raised.value.needed_bytes > raised.value.free_bytes


@pytest.mark.parametrize(
    ("method", "phase"),
    [
        ("hotloop.engine.steps.Stepper.step", "decode"),
        ("hotloop.engine.sampling.Sampler.admit", "prefill"),
    ],
)
def test_memory_that_runs_short_is_reported_with_its_phase(folder, monkeypatch, method, phase):
    def run_short(*_: object) -> None:
        raise RuntimeError("can't allocate memory: you tried to allocate 64 bytes.")

    llm = LLM(str(folder), dtype="float32")
    monkeypatch.setattr(method, run_short)
    for call, said in ((lambda: llm.generate([[5]]), phase), (lambda: LLM(str(folder)), "warmup")):
        with pytest.raises(OutOfMemoryError) as raised:
            call()
        assert (raised.value.phase, raised.value.needed_bytes) == (said, 64)
