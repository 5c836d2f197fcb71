"""GGUF files keep their blocks' own integers and scales."""

from contextlib import closing
from pathlib import Path

import pytest
import torch
from cuda_emulation import EmulatedDevice, needs_compiler
from stored_models import distribution
from whole_models import write_gguf_model

from hotloop import LLM, EngineConfig
from hotloop.engine.memory import predict_memory
from hotloop.weights.checkpoint import open_checkpoint

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
KINDS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
KINDS += ["IQ4_NL", "IQ4_XS", "MXFP4"]


def notes(path: Path, quant: str) -> list[str]:
    with LLM(str(path), quant=quant, device="cpu", dtype="float32") as llm:
        return [note for note in llm.describe().notes if "gguf" in note]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_compute_what_they_are_worth(kind, tmp_path):
    path = write_gguf_model(tmp_path / "m.gguf", kind, tied=False, **WIDE)
    torch.testing.assert_close(distribution(path), distribution(path, quant="none"))
    assert notes(path, "auto") == []
    assert notes(path, "none") == [f"15 matrices stored as gguf-{kind.lower()} are dequantized."]


def test_a_scheme_that_is_named_has_one_note_for_all_that_it_quantizes_again(tmp_path):
    kinds = {"output": "Q8_0", "attn_v": "Q6_K"}
    path = write_gguf_model(tmp_path / "m.gguf", "Q4_0", tied=False, kinds=kinds, **WIDE)
    first = "12 matrices stored as gguf-q4_0"
    assert notes(path, "none") == [
        f"{first}, 2 as gguf-q6_k and 1 as gguf-q8_0 are dequantized.",
    ]
    assert notes(path, "int4-g32") == [
        f"{first} and 2 as gguf-q6_k are dequantized, and quantized again as int4-g32.",
        "1 matrix stored as gguf-q8_0 is dequantized, and quantized again as int8.",
    ]


@pytest.mark.parametrize("tied", [False, True])
def test_one_projection_may_join_blocks_of_several_types(tied, tmp_path):
    kinds = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "attn_k": "F16", "ffn_up": "Q5_K"}
    kinds |= {"token_embd": "Q6_K", "output": "Q8_0"}
    path = write_gguf_model(tmp_path / "m.gguf", "Q4_K", tied=tied, kinds=kinds, **WIDE)
    torch.testing.assert_close(distribution(path), distribution(path, quant="none"))
    with LLM(str(path), quant="auto", device="cpu", dtype="float32") as llm:
        assert "stacked" in str(llm.describe().kernels["qkv_proj"])


def test_memory_is_known_beforehand(tmp_path):
    kinds = {"attn_v": "Q6_K", "token_embd": "Q6_K"}
    for tied in (False, True):
        path = write_gguf_model(tmp_path / "m.gguf", "Q4_K", tied=tied, kinds=kinds, **WIDE)
        with LLM(str(path), quant="auto", device="cpu") as llm:
            assert llm.describe().weight_bytes == predict_memory(llm.config).weights_bytes


SEVERAL = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "ffn_up": "IQ4_XS", "token_embd": "Q6_K"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "MXFP4"])
def test_the_fused_step_of_a_gpu_is_as_near_the_exact_one_as_eager(kind, tmp_path):
    kinds = SEVERAL if kind == "Q4_K" else None
    path = write_gguf_model(tmp_path / "m.gguf", kind, tied=True, kinds=kinds, **WIDE)
    exact = distribution(path)
    errors = {
        execution: (
            distribution(path, device="cuda", dtype="bfloat16", execution=execution) - exact
        ).square()
        for execution in ("eager", "fused")
    }
    assert errors["fused"].mean().sqrt() < 1.3 * errors["eager"].mean().sqrt()


@pytest.mark.parametrize("quant", ["auto", "none"])
@pytest.mark.parametrize("tied", [False, True])
def test_bytes_that_are_read_are_those_of_the_blocks(tied, quant, tmp_path):
    path = write_gguf_model(tmp_path / "m.gguf", "Q4_K", tied=tied, **WIDE)
    with closing(open_checkpoint(path)) as checkpoint:
        stored = sum(info.n_bytes for info in checkpoint.tensors.values())
    with LLM(str(path), quant=quant, device="cpu", max_seq_len=16) as llm:
        assert llm.describe().read_bytes == stored


@needs_compiler
@pytest.mark.parametrize("quant", ["auto", "int8"])
def test_the_fused_step_holds_blocks_of_several_types_as_they_are(quant, tmp_path, monkeypatch):
    monkeypatch.setattr("hotloop.engine.runner.device_of", lambda _: EmulatedDevice())
    monkeypatch.setattr("hotloop.engine.setup.fused_unavailable_reason", lambda _: None)
    path = write_gguf_model(tmp_path / "m.gguf", "Q4_K", tied=True, kinds=SEVERAL, **WIDE)
    config = EngineConfig(model=str(path), quant=quant, max_seq_len=16, device="cpu")
    with LLM(config) as llm:
        described = llm.describe()
        assert described.weight_bytes == predict_memory(llm.config).weights_bytes
    assert described.execution == "fused"
    found = [described.kernels[name] for name in ("qkv_proj", "gate_up_proj", "down_proj")]
    several = ["stacked(uint4/fused, int8/fused)", "stacked(uint4/fused, lut4/fused)"]
    assert found == ([*several, "int8/fused"] if quant == "auto" else ["int8/fused"] * 3)
