"""Keys of a config.json that are read, and those that are refused by name."""

import math
from typing import Any

import pytest
import torch

from hotloop.errors import ConfigError, UnknownNameError, UnsupportedError
from hotloop.models import names
from hotloop.models.config import ModelConfig, RopeConfig
from hotloop.models.families import FAMILIES, family_of, read_config
from hotloop.models.rope import head_order, inverse_frequencies, rope_tables
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


def windows(config: ModelConfig) -> tuple[int | None, ...]:
    return tuple(layer.attention.window for layer in config.layers)


# What is understood.


def test_keys_left_out_mean_what_transformers_means_by_that():
    config = read_config(keys())
    attention, feed_forward = config.layers[0].attention, config.layers[0].feed_forward
    assert (attention.n_kv_heads, attention.head_dim, config.max_position) == (4, 16, 2048)
    assert attention.rope == RopeConfig(theta=10_000.0)
    assert not any((config.tie_embeddings, attention.qkv_bias, attention.qk_norm))
    assert not feed_forward.bias
    assert windows(config) == (None, None)
    assert windows(read_config(keys("MistralForCausalLM"))) == (4096, 4096)
    assert windows(read_config(keys("MistralForCausalLM", sliding_window=None))) == (None, None)
    assert read_config(keys("Qwen3ForCausalLM")).layers[0].attention.head_dim == 128
    assert read_config(keys("Qwen2ForCausalLM")).layers[0].attention.qkv_bias


def test_llama_ignores_a_window_as_transformers_does():
    assert windows(read_config(keys(sliding_window=16))) == (None, None)


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
    assert read_config(keys(**settings)).layers[0].attention.rope == expected


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
    assert not any(names.is_redundant(config, name) for name in tensors)


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


@pytest.mark.parametrize("value", [MISSING, None, [], "LlamaForCausalLM", ["A", "B"], [1], {}])
def test_other_than_one_architecture_is_refused(value):
    assert "architectures must name one" in message(ConfigError, architectures=value)


@pytest.mark.parametrize("value", [MISSING, None, []])
def test_the_model_type_stands_in_for_an_architecture_that_is_left_out(value):
    for architecture in FAMILIES:
        tiny = dict(family_of(keys(architecture)).tiny)
        expected = read_config(tiny)
        tiny |= {"architectures": value}
        assert read_config({k: v for k, v in tiny.items() if v is not MISSING}) == expected
    said = message(UnknownNameError, architectures=value, model_type="lama")
    assert "unknown model_type 'lama'. Did you mean 'llama'" in said


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.22),
        ("attention_multiplier", 0.0078),
        ("logits_scaling", 8.0),
        ("clip_qkv", 8.0),
        ("num_local_experts", 8),
        ("no_rope_layers", [1, 1, 0]),
        ("position_embedding_type", "alibi"),
        ("is_causal", False),
        ("use_alibi", True),
        ("scale_of_everything", 2.0),
    ],
)
def test_keys_that_would_change_the_arithmetic_are_refused_by_name(architecture, key, value):
    said = message(UnsupportedError, architecture, **{key: value})
    assert key in said
    assert repr(value) in said


@pytest.mark.parametrize("key", ["hidden_act", "final_logit_softcapping"])
def test_keys_that_say_what_is_so_anyway_are_fine(key):
    value = "silu" if key == "hidden_act" else None
    assert read_config(keys(**{key: value})) == read_config(keys())


@pytest.mark.parametrize("architecture", FAMILIES)
def test_keys_that_say_nothing_of_the_arithmetic_are_ignored(architecture):
    told = {"torch_dtype": "float16", "use_cache": True, "_attn_implementation": "sdpa"}
    told |= {"bos_token_id": 1, "eos_token_id": [2, 3], "unheard_of": None, "use_alibi": False}
    assert read_config(keys(architecture, **told)) == read_config(keys(architecture))


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("Qwen2ForCausalLM", {"use_sliding_window": False, "sliding_window": 9}, (None, None)),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "max_window_layers": 1}, (None, 4096)),
        (
            "Qwen3ForCausalLM",
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (9, None),
        ),
        ("Qwen3ForCausalLM", {"layer_types": ["full_attention"] * 2}, (None, None)),
        (
            "MistralForCausalLM",
            {"sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"]},
            (None, 9),
        ),
        ("MistralForCausalLM", {"layer_types": ["full_attention"] * 2}, (None, None)),
    ],
)
def test_every_layer_has_the_window_that_its_type_says(architecture, changes, expected):
    assert windows(read_config(keys(architecture, **changes))) == expected


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_a_window_of_null_is_full_attention_in_qwen(architecture):
    changes = {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None}
    assert windows(read_config(keys(architecture, **changes))) == (None, None)
    types = {"layer_types": ["sliding_attention"] * 2}
    assert "sliding_window is missing" in message(ConfigError, architecture, **changes, **types)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types has 1 values, and num_hidden_layers"),
        ({"layer_types": ["full_attention", "linear"]}, "layer_types[1]: 'linear' is not a choice"),
        (
            {"layer_types": ["sliding_attention"] * 2, "sliding_window": None},
            "sliding_window is missing",
        ),
    ],
)
def test_types_of_layers_that_cannot_be_are_refused(changes, says):
    assert says in message(ConfigError, "MistralForCausalLM", **changes)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rope_scaling": {"factor": 4.0}}, "factor = 4.0 does not belong to rope_type 'default'"),
        ({"rope_scaling": {"type": "gguf_factors", "factors": []}}, "'gguf_factors'"),
        ({"rope_scaling": {"type": "linear"}}, "needs factor, which is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor: must be 0.001 or more"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 3}}, "beta_fast = 3"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}}, "and type"),
        ({"rope_scaling": "linear"}, "rope_scaling: must be an object, not 'linear'"),
        ({"rope_scaling": False}, "rope_scaling: must be an object, not False"),
        ({"rope_scaling": LLAMA_3 | {"low_freq_factor": 4.0}}, "low_freq_factor 4.0 must be below"),
        ({"rope_scaling": {**LLAMA_3, "high_freq_factor": None}}, "needs high_freq_factor"),
        ({"rope_scaling": YARN | {"beta_slow": 40.0}}, "beta_slow 40.0 must not exceed"),
        ({"rope_scaling": YARN | {"finetuned": True}}, "finetuned: there is no such key"),
        (
            {"rope_scaling": LONG | {"long_factor": [2.0] * 7}},
            "long_factor has 7 values, and 8 frequencies need",
        ),
        ({"rope_scaling": LONG | {"short_factor": [0.0] * 8}}, "short_factor[0]: must be"),
        ({"rope_theta": 0}, "rope_theta: must be above 1"),
        ({"rope_theta": -1e4}, "rope_theta: must be above 1"),
        ({"partial_rotary_factor": 0.3}, "rotates 4.8 elements"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor: must be above 0"),
    ],
)
def test_rotary_settings_that_cannot_be_are_refused(settings, says):
    assert says in message(ConfigError, **settings)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": MISSING}, "hidden_size: is missing"),
        ({"rms_norm_eps": None}, "rms_norm_eps: is missing"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps: must be 0 or more, not -1e-05"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers: must be an integer, not '2'"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers: must be at most"),
        ({"vocab_size": 0}, "vocab_size: must be 1 or more, not 0"),
        ({"vocab_size": True}, "vocab_size: must be an integer, not True"),
        ({"head_dim": 2.5}, "head_dim: must be an integer, not 2.5"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps: must be a number, not 'tiny'"),
        ({"rope_theta": math.inf}, "rope_theta: must be a finite number, not inf"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: must be true or false"),
        ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim must be even for rotary embedding, not 15"),
    ],
)
def test_wrong_and_missing_values_are_refused_by_name(changes, says):
    said = message(ConfigError, **changes)
    assert says in said
    assert said.startswith("config.json")


def test_window_of_nothing_is_refused():
    said = message(ConfigError, "MistralForCausalLM", sliding_window=0)
    assert "sliding_window: must be 1 or more, not 0" in said


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


def test_given_factors_divide_the_frequencies_by_the_length_of_the_longest_sequence():
    short, long = (1.0, 2.0, 4.0, 8.0), (2.0, 2.0, 2.0, 2.0)
    rope = RopeConfig(
        scaling="longrope", short_factors=short, long_factors=long, original_max_position=16
    )
    assert rope.depends_on_length
    for n_positions, factors in ((16, short), (17, long)):
        ratio = inverse_frequencies(8, RopeConfig()) / inverse_frequencies(8, rope, n_positions)
        torch.testing.assert_close(ratio, torch.tensor(factors))


def test_elements_that_are_not_rotated_have_no_angle():
    rope = RopeConfig(partial=0.5, scaling="yarn", attention_factor=1.5)
    cos, sin = rope_tables(8, 20, rope)
    assert (cos[:, [2, 3, 6, 7]] == 1).all()
    assert (sin[:, [2, 3, 6, 7]] == 0).all()
    assert head_order(8, rope).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert head_order(8, RopeConfig()) is None


def test_tables_hold_the_angle_of_every_position_in_both_halves():
    cos, sin = rope_tables(8, 50, RopeConfig(theta=100.0))
    assert (cos.shape, cos.dtype, sin.dtype) == ((50, 8), torch.float32, torch.float32)
    for position in (0, 1, 49):
        angles = [position * 100.0 ** (-2 * i / 8) for i in range(4)] * 2
        expected = torch.tensor([[math.cos(a), math.sin(a)] for a in angles])
        torch.testing.assert_close(torch.stack((cos[position], sin[position]), 1), expected)
