"""The keys of ``config.json`` and their valid values; unknown keys are refused by name.

Every key is of one of four kinds: read here or by the family; harmless; accepted only with its
neutral value; or refused, since it may change the computation. Null means that the key is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, model_validator

from hotloop.checked import Count
from hotloop.errors import UnsupportedError, shorten_value
from hotloop.models.config import RopeConfig
from hotloop.untrusted import StrictModel, config_error, validated

_Factor = Annotated[float, Field(ge=1e-3, le=1e38)]
"""Divisor of a rotary frequency; a very large one means no rotation at all."""

_HARMLESS = frozenset(
    """
    _name_or_path add_cross_attention architectures attention_dropout attention_probs_dropout_prob
    attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token bos_token_id
    chunk_size_feed_forward classifier_dropout compression_config cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop
    encoder_no_repeat_ngram_size eos_token eos_token_id exponential_decay_length_penalty
    finetuning_task flash_attention forced_bos_token_id forced_eos_token_id gradient_checkpointing
    hidden_dropout hidden_dropout_prob hotloop_quantization id2label initializer_range
    keys_to_ignore_at_inference label2id length_penalty license max_length max_model_len max_seq_len
    max_sequence_length min_length model_max_length model_name model_type name_or_path
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_past output_scores pad_token pad_token_id prefix pretraining_tp
    problem_type quantization_config remove_invalid_values repetition_penalty resid_dropout
    resid_pdrop return_dict return_dict_in_generate sep_token_id seq_length suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    torch_dtype torchscript transformers.js_config transformers_version typical_p unk_token_id
    unsloth_fixed unsloth_version use_bfloat16 use_cache use_flash_attention_2 use_flash_attn
    """.split()  # noqa: SIM905  (a list of one word a line is a page long)
)
"""Keys that do not affect the arithmetic of decoding."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "alibi": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "bias": (False,),
    "clip_qkv": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "is_llama_config": (True,),
    "logits_scaling": (1,),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "position_embedding_type": ("rope",),
    "pruned_heads": ({}, []),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "rotary_pct": (1,),
    "use_alibi": (False,),
    "use_bias": (False,),
    "use_mrope": (False,),
    "use_parallel_residual": (False,),
}
"""Keys with which other models change the arithmetic, and the values that do not change it."""


class RopeKeys(StrictModel):
    """The keys of ``rope_parameters``, or of ``rope_theta`` and ``rope_scaling``, together."""

    rope_type: Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"] = "default"
    rope_theta: Annotated[float, Field(gt=1, le=1e18)] = RopeConfig.theta
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    factor: Annotated[float, Field(ge=1e-3, le=1e6)] | None = None
    original_max_position_embeddings: Annotated[int, Field(ge=2, le=2**31)] | None = None
    low_freq_factor: _Factor | None = None
    high_freq_factor: _Factor | None = None
    attention_factor: Annotated[float, Field(gt=0, le=100)] | None = None
    beta_fast: Annotated[float, Field(gt=0, le=1e6)] = 32.0
    beta_slow: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    mscale: Annotated[float, Field(ge=0, le=100)] | None = None
    mscale_all_dim: Annotated[float, Field(ge=0, le=100)] | None = None
    truncate: bool = True
    short_factor: Annotated[list[_Factor], Field(max_length=4096)] | None = None
    long_factor: Annotated[list[_Factor], Field(max_length=4096)] | None = None

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        needed, also = _ROPE_SETTINGS[self.rope_type]
        given = self.model_fields_set - _ROPE_ALWAYS
        if missing := sorted(needed - given):
            raise ValueError(f"rope_type {self.rope_type!r} needs {missing[0]}, which is missing")
        if surplus := sorted(given - needed - also):
            raise ValueError(
                f"{surplus[0]} = {shorten_value(getattr(self, surplus[0]))} does not belong to "
                f"rope_type {self.rope_type!r}, or rope_type is missing"
            )
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise ValueError(f"low_freq_factor {low} must be below high_freq_factor {high}")
        if self.beta_slow > self.beta_fast:
            raise ValueError(
                f"beta_slow {self.beta_slow} must not exceed beta_fast {self.beta_fast}"
            )
        return self


_ROPE_ALWAYS = {"rope_type", "rope_theta", "partial_rotary_factor"} | {
    "original_max_position_embeddings"
}
_YARN = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
_ROPE_SETTINGS: Mapping[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "yarn": (set(), {"factor"} | _YARN),
    "longrope": ({"short_factor", "long_factor"}, {"factor", "attention_factor"}),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, set()),
}
"""For each type of scaling: its required keys, and its optional keys."""


class ModelKeys(StrictModel):
    """The keys that every family reads. A family adds its own by deriving from this class.

    ``rope`` holds the settings of rotary embedding, from either spelling.
    """

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Annotated[int, Field(ge=1, le=10_000)]
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    max_position_embeddings: Count = 2048
    rms_norm_eps: Annotated[float, Field(ge=0, lt=1)]
    tie_word_embeddings: bool = False
    rope: RopeKeys = RopeKeys()

    @property
    def n_kv_heads(self) -> int:
        """Key/value heads; by default as many as query heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def width_of_head(self) -> int:
        """Width of one head; by default an even share of the hidden size."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.num_attention_heads % self.n_kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.n_kv_heads}"
            )
        width = self.width_of_head
        if width < 2 or width % 2:
            raise ValueError(f"head_dim must be even for rotary embedding, not {width}")
        rotated = width * self.rope.partial_rotary_factor
        least = 4 if self.rope.rope_type == "dynamic" else 2
        if rotated % 2 or rotated < least:
            raise ValueError(
                f"partial_rotary_factor {self.rope.partial_rotary_factor} of heads {width} wide "
                f"rotates {rotated:g} elements; their number must be even and at least {least}"
            )
        for key in ("short_factor", "long_factor"):
            factors = getattr(self.rope, key)
            if factors is not None and len(factors) != rotated // 2:
                raise ValueError(
                    f"{key} has {len(factors)} values, and {rotated // 2:.0f} frequencies need a "
                    "divisor each"
                )
        return self


class WindowKeys(ModelKeys):
    """Keys of families with sliding-window attention in all layers or in some."""

    sliding_window: Count | None = 4096
    layer_types: (
        Annotated[list[Literal["full_attention", "sliding_attention"]], Field(max_length=10_000)]
        | None
    ) = None

    def windowed(self) -> tuple[bool, ...]:
        """Returns whether each layer has a window; without ``layer_types`` every layer has one."""
        if self.layer_types is None:
            return (self.sliding_window is not None,) * self.num_hidden_layers
        return tuple(kind == "sliding_attention" for kind in self.layer_types)

    @model_validator(mode="after")
    def _every_layer_has_its_window(self) -> Self:
        n_types = len(self.layer_types or ())
        if self.layer_types is not None and n_types != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {n_types} values, and num_hidden_layers is "
                f"{self.num_hidden_layers}"
            )
        if self.sliding_window is None and any(self.windowed()):
            raise ValueError("layer_types has sliding_attention, and sliding_window is missing")
        return self

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer in tokens; None for all tokens."""
        return tuple(self.sliding_window if each else None for each in self.windowed())


K = TypeVar("K", bound=ModelKeys)


def read_keys(
    keys: type[K],
    config: Mapping[str, Any],
    file: Path | str,
    *,
    neutral: Mapping[str, tuple[Any, ...]],
    harmless: Iterable[str] = (),
    nullable: Iterable[str] = (),
) -> K:
    """Checks the keys of a ``config.json``.

    Args:
        keys: The model that they must fit.
        config: The keys.
        file: Their file, for errors.
        neutral: Keys that the family accepts with these values only.
        harmless: Keys that do not affect this family's arithmetic.
        nullable: Keys whose meaning with null differs from that of a missing key.

    Raises:
        UnsupportedError: A key that is not known, or a value that is not implemented.
        ConfigError: A value that a key cannot have.
    """
    known = {key: value for key, value in config.items() if value is not None or key in nullable}
    for key, values in {**_NEUTRAL, **neutral}.items():
        value = known.pop(key, None)
        if value is not None and not any(_is_same(value, each) for each in values):
            supported = ", ".join(map(repr, values)) or "leaving it out"
            raise UnsupportedError(
                f"{file}: {key} = {shorten_value(value)} would change the arithmetic and is not "
                f"implemented; supported: {supported}."
            )
    rope = _rope_settings(known, file)
    fields = keys.model_fields.keys() - {"rope"}
    ignored = _HARMLESS.union(harmless)
    unknown = sorted(k for k in known.keys() - fields - ignored if not k.startswith("_"))
    if unknown:
        more = f" ({len(unknown)} such keys in all)" if len(unknown) > 1 else ""
        raise UnsupportedError(
            f"{file}: the key {shorten_value(unknown[0])} = {shorten_value(known[unknown[0]])} is "
            f"not known for this architecture and may change what the model computes{more}. If it "
            "does not, remove it from the file."
        )
    given = {key: known[key] for key in fields & known.keys()}
    parsed = validated(RopeKeys, rope, f"{file}, rope settings", refuse=config_error)
    return validated(keys, given | {"rope": parsed}, file, refuse=config_error)


def _is_same(value: object, other: object) -> bool:
    """Returns whether values are equal, where True differs from 1, and 1.0 does not."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _rope_settings(known: dict[str, Any], file: Path | str) -> dict[str, Any]:
    """Takes the rotary settings, in either spelling, out of ``known``, as ``RopeKeys`` has them.

    The newer spelling overrules the older one.
    """
    settings: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if (value := known.pop(key, None)) is None:
            continue
        if not isinstance(value, dict):
            raise config_error(file, f"{key}: must be an object, not {shorten_value(value)}")
        older = value.get("type")
        given = {k: v for k, v in value.items() if v is not None and k != "type"}
        if older is not None and given.setdefault("rope_type", older) != older:
            raise config_error(
                file,
                f"{key}: has rope_type {shorten_value(given['rope_type'])} and type "
                f"{shorten_value(older)}",
            )
        settings |= given
    if settings.get("rope_type") == "su":  # longrope's first name
        settings["rope_type"] = "longrope"
    for key in ("rope_theta", "partial_rotary_factor"):
        if (value := known.pop(key, None)) is not None:
            settings.setdefault(key, value)
    # As in transformers, the top-level key takes precedence over the same one in rope_scaling.
    if (value := known.pop("original_max_position_embeddings", None)) is not None:
        settings["original_max_position_embeddings"] = value
    return settings
