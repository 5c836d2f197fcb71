"""Every family against its twin in Hugging Face transformers, in float32.

Parametrized over the registry: a new family is tested by being registered.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.phi3 import modeling_phi3
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from twins import Twin, load, reference_logits, save_random

from hotloop.kernels import cpu
from hotloop.kernels.attention import cpu_attention, torch_attention
from hotloop.models import names
from hotloop.models.families import FAMILIES, read_config
from hotloop.quant import parse_scheme
from hotloop.registry import resolve

ATTENTIONS = [torch_attention]
if cpu.unavailable_reason() is None:
    ATTENTIONS.append(cpu_attention)

LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ORIGINAL = {"original_max_position_embeddings": 32}
LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.0, 1.1, 1.2, 1.5, 2.0, 2.5, 3.0],
    "long_factor": [1.0, 1.2, 2.0, 3.0, 4.0, 6.0, 8.0, 9.0],
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
VARIANTS = {
    "llama-untied-without-biases": (
        "LlamaForCausalLM",
        {"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False},
    ),
    "llama-plain-rope": ("LlamaForCausalLM", {"rope_scaling": None, "rope_theta": 500.0}),
    "llama-linear-rope": (
        "LlamaForCausalLM",
        {"rope_scaling": {"type": "linear", "factor": 3.0}, "head_dim": None},
    ),
    "llama-yarn": (
        "LlamaForCausalLM",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}, "rope_theta": 500.0},
    ),
    "llama-yarn-with-every-setting": (
        "LlamaForCausalLM",
        {
            "rope_scaling": {
                "type": "yarn",
                "factor": 8.0,
                "beta_fast": 8.0,
                "beta_slow": 2.0,
                "mscale": 1.2,
                "mscale_all_dim": 0.7,
                "truncate": False,
                **ORIGINAL,
            },
            "rope_theta": 100.0,
        },
    ),
    "qwen2-yarn": (  # as the makers of Qwen2.5 tell their users to write it
        "Qwen2ForCausalLM",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, **ORIGINAL}},
    ),
    "llama-dynamic-rope": (
        "LlamaForCausalLM",
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 32},
    ),
    "llama-longrope-long": (
        "LlamaForCausalLM",
        {"rope_scaling": LONG_ROPE | ORIGINAL, "head_dim": 16, "max_position_embeddings": 256},
    ),
    "llama-longrope-short": (
        "LlamaForCausalLM",
        {
            "rope_scaling": LONG_ROPE | {"attention_factor": 1.3},
            "head_dim": 16,
            "original_max_position_embeddings": 128,
        },
    ),
    "llama-3-rope": ("LlamaForCausalLM", {"rope_scaling": LLAMA_3, "rope_theta": 5e5}),
    "llama-one-kv-head": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "llama-no-shared-kv-heads": ("LlamaForCausalLM", {"num_key_value_heads": 4, "head_dim": 40}),
    "llama-odd-heads": (  # as SmolLM2's 9 and 3
        "LlamaForCausalLM",
        {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 20, "hidden_size": 60},
    ),
    "mistral-window-of-one": ("MistralForCausalLM", {"sliding_window": 1}),
    "mistral-without-window": ("MistralForCausalLM", {"sliding_window": None}),
    "mistral-window-never-reached": ("MistralForCausalLM", {"sliding_window": 512}),
    "qwen2-untied-with-head-dim": (
        "Qwen2ForCausalLM",
        {"tie_word_embeddings": False, "head_dim": 24, "sliding_window": 4},
    ),
    "qwen3-tied-with-biases": (
        "Qwen3ForCausalLM",
        {"tie_word_embeddings": True, "attention_bias": True},
    ),
    "qwen3-default-head-dim": ("Qwen3ForCausalLM", {"head_dim": 128}),
    "qwen2-window-in-later-layers": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3-windows-by-layer-types": (
        "Qwen3ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED},
    ),
}


def tiny(architecture: str) -> dict[str, Any]:
    return dict(resolve("model architecture", FAMILIES, architecture).tiny)


def tokens(model: PreTrainedModel, B: int, T: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (B, T), generator=generator)


@pytest.fixture(scope="module", params=[*FAMILIES, *VARIANTS])
def folder_and_model(request, tmp_path_factory) -> tuple[Path, PreTrainedModel]:
    architecture, changes = VARIANTS.get(request.param, (request.param, {}))
    folder = tmp_path_factory.mktemp("model")
    return folder, save_random(folder, tiny(architecture) | changes)


def test_logits_of_whole_sequences_are_those_of_transformers(folder_and_model):
    folder, model = folder_and_model
    ids = tokens(model, 2, 90)
    twin = load(folder, n_positions=ids.shape[1])  # some frequencies depend on the length
    logits = twin.logits(ids, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(logits, reference_logits(model, ids))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_prefill_in_chunks_and_decoding_through_the_cache_change_nothing(
    folder_and_model, attention
):
    folder, model = folder_and_model
    ids = tokens(model, 2, 24)
    expected = reference_logits(model, ids)
    twin = load(folder, attention=attention, n_positions=ids.shape[1])
    at = 0
    for n in (5, 1, 9, *[1] * 9):
        positions = torch.full((2,), at)
        logits = twin.logits(ids[:, at : at + n], positions)
        torch.testing.assert_close(logits, expected[:, at : at + n], msg=f"at {at}")
        at += n
    assert at == ids.shape[1]


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_seats_of_different_lengths_decode_together(architecture, attention, tmp_path):
    model = save_random(tmp_path, tiny(architecture))
    long, short = tokens(model, 2, 40)
    expected = [reference_logits(model, ids[None])[0] for ids in (long, short)]
    twin = load(tmp_path, n_seats=3, attention=attention)
    twin.logits(long[None, :31], torch.tensor([0]), first_seat=1)
    twin.logits(short[None, :3], torch.tensor([0]), first_seat=2)
    for step in range(9):
        at = torch.tensor([31 + step, 3 + step])
        ids = torch.stack((long[at[0]], short[at[1]]))[:, None]
        logits = twin.logits(ids, at, first_seat=1)
        torch.testing.assert_close(logits[0, 0], expected[0][at[0]])
        torch.testing.assert_close(logits[1, 0], expected[1][at[1]])


def test_seat_used_again_remembers_nothing(tmp_path):
    model = save_random(tmp_path, tiny("LlamaForCausalLM"))
    ids = tokens(model, 2, 30)
    twin = load(tmp_path, n_seats=1)

    def fresh(ids: Tensor, twin: Twin) -> Tensor:
        return twin.logits(ids[None], torch.tensor([0]))

    fresh(ids[0], twin)
    again = fresh(ids[1, :10], twin)
    assert torch.equal(again, fresh(ids[1, :10], load(tmp_path, n_seats=1)))


def test_sliding_window_forgets_what_is_beyond_it_and_nothing_nearer(tmp_path):
    """3 layers of window 7 see 18 tokens back, whichever way they are fed."""
    model = save_random(tmp_path, tiny("MistralForCausalLM"))
    ids = tokens(model, 1, 40)
    logits = load(tmp_path).logits(ids, torch.tensor([0]))[0, -1]
    for changed, same in ((39 - 18, False), (39 - 19, True)):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % model.config.vocab_size
        different = load(tmp_path).logits(other, torch.tensor([0]))[0, -1]
        assert torch.equal(different, logits) == same, changed


def test_layer_types_bound_the_layers_of_a_mistral_as_of_a_ministral(tmp_path):
    """transformers has a class of its own for Mistrals of which some layers see everything."""
    keys = tiny("MistralForCausalLM") | {"model_type": "ministral", "layer_types": MIXED}
    model = save_random(tmp_path, keys | {"architectures": ["MinistralForCausalLM"]})
    written = json.loads((tmp_path / "config.json").read_text())
    written |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    (tmp_path / "config.json").write_text(json.dumps(written))
    ids = tokens(model, 2, 40)
    logits = load(tmp_path).logits(ids, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(logits, reference_logits(model, ids))


@pytest.mark.parametrize("rope_type", ["default", "yarn"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_partial_rotary_factors_rotate_the_first_elements_of_a_head(
    architecture, rope_type, tmp_path, monkeypatch
):
    """transformers' Llama has no code for it; its Phi-3, which rotates the same pairs, has."""
    settings: dict[str, Any] = {"partial_rotary_factor": 0.5, "rope_type": rope_type}
    if rope_type == "yarn":
        settings |= {"factor": 4.0, **ORIGINAL}
    model = save_random(tmp_path, tiny(architecture) | {"rope_scaling": settings, "head_dim": 24})
    if rope_type == "default":
        rotary = Phi3RotaryEmbedding.compute_default_rope_parameters(model.config)[0]
        model.model.rotary_emb.inv_freq = rotary
    monkeypatch.setattr(
        sys.modules[type(model).__module__],
        "apply_rotary_pos_emb",
        modeling_phi3.apply_rotary_pos_emb,
    )
    ids = tokens(model, 2, 40)
    logits = load(tmp_path).logits(ids, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(logits, reference_logits(model, ids))
    quantized = load(tmp_path, quant="int8")
    assert quantized.logits(ids, torch.zeros(2, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize("architecture", FAMILIES)
def test_both_spellings_of_a_configuration_mean_the_same(architecture, tmp_path):
    keys = tiny(architecture)
    save_random(tmp_path, keys)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written, "transformers has changed its spelling again"
    assert read_config(written) == read_config(keys)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_tiny_configuration_switches_on_what_the_family_has(architecture):
    config = read_config(tiny(architecture))
    attention, feed_forward = config.layers[0].attention, config.layers[0].feed_forward
    assert attention.n_kv_heads < attention.n_heads
    assert config.n_layers > 1
    switches = {
        "llama": attention.qkv_bias
        and attention.o_bias
        and feed_forward.bias
        and attention.rope.scaling,
        "mistral": attention.window and attention.window < 24,
        "qwen2": attention.qkv_bias and not attention.o_bias,
        "qwen3": attention.qk_norm,
    }
    assert switches.get(config.family, True)


@pytest.mark.parametrize("quant", ["int8", "fp8", "int4-g32", "int4-g32-asym"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_quantized_model_is_the_model_of_its_dequantized_weights(architecture, quant, tmp_path):
    model = save_random(tmp_path, tiny(architecture))
    ids = tokens(model, 2, 20)
    plain = reference_logits(model, ids)
    scheme = parse_scheme(quant)
    # A table of its own for tokens stays as it is; a tied one is the head, and follows it.
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name in [*names.linear_weights(read_config(tiny(architecture))), "lm_head"]:
            weight = modules[name].weight
            weight.copy_(scheme.quantize(weight).dequantize())
    expected = reference_logits(model, ids)
    logits = load(tmp_path, quant=quant).logits(ids, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(logits, expected)
    assert (logits - plain).abs().max() > 1e-3, "nothing was quantized"
