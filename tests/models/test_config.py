"""What is read of a config.json, and what is refused, by name."""

import math
from typing import Any

import pytest
import torch

from hotloop.errors import ConfigError, UnknownNameError, UnsupportedError
from hotloop.models import names
from hotloop.models.config import RopeConfig
from hotloop.models.families import FAMILIES, family_of, read_config
from hotloop.models.rope import inverse_frequencies, rope_tables
from hotloop.models.shapes import SHAPES, shape

MISSING = object()
BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "rms_norm_eps": 1e-5,
}


def keys(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    merged = BASE | {"architectures": [architecture]} | changes
    return {key: value for key, value in merged.items() if value is not MISSING}


def message(kind: type[Exception], *args: str, **changes: Any) -> str:
    with pytest.raises(kind) as caught:
        read_config(keys(*args, **changes))
    return str(caught.value)


# What is understood.


def test_keys_left_out_mean_what_transformers_means_by_that():
    config = read_config(keys())
    assert (config.n_kv_heads, config.head_dim, config.max_position) == (4, 16, 2048)
    assert config.rope == RopeConfig(theta=10_000.0)
    assert not any((config.tie_embeddings, config.qkv_bias, config.mlp_bias, config.qk_norm))
    assert read_config(keys("MistralForCausalLM")).sliding_window == 4096
    assert read_config(keys("MistralForCausalLM", sliding_window=None)).sliding_window is None
    assert read_config(keys("Qwen3ForCausalLM")).head_dim == 128
    assert read_config(keys("Qwen2ForCausalLM")).qkv_bias


def test_llama_ignores_a_window_as_transformers_does():
    assert read_config(keys(sliding_window=16)).sliding_window is None


def test_configuration_of_a_folder_depends_on_no_name_in_it():
    given = keys(_name_or_path="mistralai/Mistral-7B", model_type="gemma")
    assert read_config(given) == read_config(keys())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rope_theta": 5e5}, RopeConfig(theta=5e5)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, RopeConfig(theta=5e5)),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            RopeConfig(scaling="linear", factor=2.0),
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}},
            RopeConfig(scaling="linear", factor=2.0),
        ),
        ({"rope_scaling": None, "partial_rotary_factor": 1.0}, RopeConfig()),
    ],
)
def test_rotary_settings_are_read_in_every_spelling(settings, expected):
    assert read_config(keys(**settings)).rope == expected


@pytest.mark.parametrize(
    ("name", "n_params"),
    [  # as the models' cards have them
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
    ],
)
def test_built_in_shapes_have_the_published_number_of_parameters(name, n_params):
    assert read_config(shape(name)).n_params == n_params


def test_unknown_shape_is_refused_with_the_nearest():
    with pytest.raises(UnknownNameError, match=r"'llama-2-7B'\. Did you mean 'llama-2-7b'"):
        shape("llama-2-7B")


@pytest.mark.parametrize("architecture", FAMILIES)
def test_parameters_are_counted_tensor_by_tensor(architecture):
    config = read_config(family_of(keys(architecture)).tiny)
    tensors = names.tensors(config)
    assert config.n_params == sum(map(math.prod, tensors.values()))
    for name, size in names.linear_weights(config).items():
        assert tensors[f"{name}.weight"] == size
    assert (f"{names.HEAD}.weight" in tensors) == (not config.tie_embeddings)
    assert f"{names.head(config)}.weight" in tensors
    assert not names.redundant(config) & tensors.keys()


def test_cache_bytes_count_keys_and_values_of_every_layer():
    config = read_config(SHAPES["llama-3.1-8b"])
    assert config.kv_bytes_per_token(2) == 2 * 32 * 8 * 128 * 2


# What is refused.


@pytest.mark.parametrize(
    ("architecture", "nearest"),
    [("LlamaForCasualLM", "LlamaForCausalLM"), ("Qwen4ForCausalLM", "Qwen")],
)
def test_unknown_architecture_is_refused_with_the_nearest(architecture, nearest):
    said = message(UnknownNameError, architecture)
    assert f"unknown model architecture {architecture!r}. Did you mean '{nearest}" in said


def test_architecture_is_refused_before_its_own_keys():
    assert "Gemma2" in message(UnknownNameError, "Gemma2ForCausalLM", attn_logit_softcapping=50.0)


@pytest.mark.parametrize("value", [MISSING, None, [], "LlamaForCausalLM", ["A", "B"]])
def test_other_than_one_architecture_is_refused(value):
    assert "must name one architecture" in message(ConfigError, architectures=value)


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("quantization_config", {"quant_method": "gptq"}),
        ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.22),
        ("attention_multiplier", 0.0078),
        ("logits_scaling", 8.0),
        ("clip_qkv", 8.0),
        ("num_local_experts", 8),
        ("no_rope_layers", [1, 1, 0]),
        ("position_embedding_type", "alibi"),
        ("is_causal", False),
    ],
)
def test_keys_that_would_change_the_arithmetic_are_refused_by_name(architecture, key, value):
    said = message(UnsupportedError, architecture, **{key: value})
    assert key in said
    assert repr(value) in said


@pytest.mark.parametrize("key", ["hidden_act", "final_logit_softcapping", "quantization_config"])
def test_keys_that_say_what_is_so_anyway_are_fine(key):
    value = "silu" if key == "hidden_act" else None
    assert read_config(keys(**{key: value})) == read_config(keys())


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_windows_in_some_layers_are_refused(architecture):
    said = message(UnsupportedError, architecture, use_sliding_window=True, sliding_window=64)
    assert "use_sliding_window" in said
    mixed = ["full_attention", "sliding_attention"]
    assert "'sliding_attention'" in message(UnsupportedError, architecture, layer_types=mixed)
    off = keys(
        architecture,
        use_sliding_window=False,
        sliding_window=64,
        layer_types=["full_attention"] * 2,
    )
    assert read_config(off).sliding_window is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling type 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_scaling type 'longrope'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "attention_factor": 1.2}},
            "'attention_factor'",
        ),
    ],
)
def test_rotary_settings_that_are_not_implemented_are_refused(settings, says):
    assert says in message(UnsupportedError, **settings)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": MISSING}, "has no 'hidden_size'"),
        ({"rms_norm_eps": None}, "has no 'rms_norm_eps'"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers = '2'; it must be an integer above 0"),
        ({"vocab_size": 0}, "vocab_size = 0; it must be an integer above 0"),
        ({"vocab_size": True}, "vocab_size = True; it must be an integer"),
        ({"head_dim": 2.5}, "head_dim = 2.5; it must be an integer"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps = 'tiny'; it must be a number"),
        ({"rope_theta": math.inf}, "rope_theta = inf; it must be a number"),
        ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim must be even for rotary embedding, not 15"),
        ({"rope_scaling": {"type": "linear"}}, "has no 'factor'"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
            "has no 'high_freq_factor'",
        ),
    ],
)
def test_wrong_and_missing_values_are_refused_by_name(changes, says):
    assert says in message(ConfigError, **changes)


def test_window_of_nothing_is_refused():
    said = message(ConfigError, "MistralForCausalLM", sliding_window=0)
    assert "sliding_window = 0" in said


# Rotary tables.


def test_llama_3_stretches_long_wavelengths_only():
    rope = RopeConfig(
        theta=5e5, scaling="llama3", factor=8.0, original_max_position=8192, high_freq_factor=4.0
    )
    plain = inverse_frequencies(128, RopeConfig(theta=5e5))
    stretched = inverse_frequencies(128, rope)
    ratio, wavelength = plain / stretched, 2 * math.pi / plain
    torch.testing.assert_close(ratio[wavelength < 2048], torch.ones(int((wavelength < 2048).sum())))
    long = wavelength > 8192
    torch.testing.assert_close(ratio[long], torch.full((int(long.sum()),), 8.0))
    between = ratio[(wavelength > 2048) & ~long]
    assert len(between)
    assert ((between > 1) & (between < 8)).all()
    assert (ratio.diff() >= 0).all()


def test_given_factors_divide_the_frequencies():
    rope = RopeConfig(scaling="factors", factors=(1.0, 2.0, 4.0, 8.0))
    ratio = inverse_frequencies(8, RopeConfig()) / inverse_frequencies(8, rope)
    torch.testing.assert_close(ratio, torch.tensor([1.0, 2.0, 4.0, 8.0]))


def test_tables_hold_the_angle_of_every_position_in_both_halves():
    cos, sin = rope_tables(8, 50, RopeConfig(theta=100.0))
    assert (cos.shape, cos.dtype, sin.dtype) == ((50, 8), torch.float32, torch.float32)
    for position in (0, 1, 49):
        angles = [position * 100.0 ** (-2 * i / 8) for i in range(4)] * 2
        expected = torch.tensor([[math.cos(a), math.sin(a)] for a in angles])
        torch.testing.assert_close(torch.stack((cos[position], sin[position]), 1), expected)
