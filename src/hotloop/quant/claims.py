"""Reads a checkpoint's description of the quantization of its matrices.

Quantizers describe their result in ``quantization_config`` of ``config.json``, or in a file beside
it. The description is validated, and becomes a :class:`Claim` for each matrix. The tensors of a
matrix determine its encoding. A claim is used for properties that the tensors do not determine; a
claim that contradicts the tensors is an error (``quant.encodings``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from hotloop.errors import UnsupportedError, shorten_value
from hotloop.untrusted import StrictModel, config_error, validated


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A configuration's statements about one matrix; a field is None if it states nothing.

    Attributes:
        quantized: Whether it is quantized.
        encodings: The names of possible encodings.
        bits: Bits of an element.
        group_size: Input features that share a scale; -1 for all of them.
        block: The numbers of output and input features that share a scale.
        symmetric: Whether all zero points are half the range.
        version: The version of GPTQ's zero points.
        version_is_stated: Whether the configuration has the version; otherwise ``version`` is the
            default.
        label: The method and format, for errors.
    """

    quantized: bool | None = None
    encodings: tuple[str, ...] | None = None
    bits: int | None = None
    group_size: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool | None = None
    version: int | None = None
    version_is_stated: bool = True
    label: str = "no method"


Claims = Callable[[str], Claim]
"""Returns the claim about the matrix of a name, such as ``model.layers.0.self_attn.q_proj``."""

Bits = Annotated[int, Field(ge=1, le=32)]
_Size = Annotated[int, Field(ge=1, le=2**20)]


def _group_size(size: int) -> int:
    if size < 1 and size != -1:
        raise ValueError(f"must be -1 or at least 1, not {size}")
    return size


GroupSize = Annotated[int, Field(le=2**20), AfterValidator(_group_size)]
_Pair = Annotated[list[_Size], Field(min_length=2, max_length=2)]
Texts = Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=100_000)]
_Anything = Any
"""The type of keys that only describe how the file was made, or how another engine would run it."""


def no_claims(_name: str) -> Claim:
    """Returns the claims of a checkpoint whose configuration says nothing."""
    return Claim()


def read_claims(where: str, config: Mapping[str, Any]) -> Claims:
    """Reads a quantizer's description.

    Args:
        where: The file and key of the description, for errors.
        config: The keys of ``quantization_config``, or of the file that replaces it.

    Raises:
        UnsupportedError: The method is not supported.
        ConfigError: A key is unknown, or a value is invalid.
    """
    method = config.get("quant_method")
    if method is None:
        # The files of old AutoAWQ and AutoGPTQ name no method.
        by_key = {"config_groups": "compressed-tensors", "w_bit": "awq", "zero_point": "awq"}
        method = next((by_key[key] for key in by_key if key in config), None)
        if method is None and "bits" not in config:
            raise config_error(where, "quant_method is missing")
        method = method or "gptq"
    readers: dict[str, type[_Description]] = {
        "auto-round": _AutoRound,
        "awq": _Awq,
        "bitsandbytes": _BitsAndBytes,
        "compressed-tensors": _CompressedTensors,
        "fp8": _Fp8,
        "gptq": _Gptq,
    }
    if method == "intel/auto-round":
        method = "auto-round"
    if not isinstance(method, str) or method not in readers:
        raise UnsupportedError(
            f"{where}: quant_method {shorten_value(method)} is not supported. Supported are "
            f"{', '.join(readers)}."
        )
    known = {key: value for key, value in config.items() if value is not None}
    return validated(readers[method], known, where, refuse=config_error).claim


class _Description(StrictModel):
    """Base of the descriptions that quantizers write."""

    quant_method: str = ""

    def claim(self, name: str) -> Claim:
        """Returns the claim about the matrix ``name``."""
        raise NotImplementedError


class _MadeByAutoRound(_Description):
    """The keys in which AutoRound records its options, also in descriptions for other packings."""

    act_bits: _Anything = None
    act_data_type: _Anything = None
    act_dynamic: _Anything = None
    act_group_size: _Anything = None
    act_sym: _Anything = None
    amp: _Anything = None
    autoround_version: _Anything = None
    backend: _Anything = None
    batch_size: _Anything = None
    block_name_to_quantize: _Anything = None
    data_type: str = "int"
    dataset: _Anything = None
    dynamic_max_gap: _Anything = None
    enable_alg_ext: _Anything = None
    enable_minmax_tuning: _Anything = None
    enable_norm_bias_tuning: Literal[False] = False
    enable_quanted_input: _Anything = None
    gradient_accumulate_steps: _Anything = None
    iters: _Anything = None
    low_gpu_mem_usage: _Anything = None
    lr: _Anything = None
    lr_scheduler: _Anything = None
    minmax_lr: _Anything = None
    model_name: _Anything = None
    not_use_best_mse: _Anything = None
    nsamples: _Anything = None
    quant_block_list: _Anything = None
    sampler: _Anything = None
    scale_dtype: _Anything = None
    seed: _Anything = None
    seqlen: _Anything = None
    super_bits: None = None
    super_group_size: None = None
    to_quant_block_names: _Anything = None
    train_bs: _Anything = None


class _Override(StrictModel):
    """Overrides for some matrices, in GPTQModel's ``dynamic``."""

    bits: Bits | None = None
    group_size: GroupSize | None = None
    sym: bool | None = None
    desc_act: _Anything = None
    mse: _Anything = None
    damp_percent: _Anything = None


class _MadeByGptqModel(_MadeByAutoRound):
    """The keys that GPTQModel, and transformers after it, write for GPTQ and AWQ alike."""

    group_size: GroupSize | None = None
    sym: bool | None = None
    checkpoint_format: str | None = None
    format: str | None = None
    dynamic: dict[str, _Override] = Field(default_factory=dict)
    lm_head: bool | None = None
    modules_in_block_to_quantize: list[Texts] = Field(default_factory=list)
    act_group_aware: _Anything = None
    cache_block_outputs: _Anything = None
    damp_auto_increment: _Anything = None
    damp_percent: _Anything = None
    desc_act: _Anything = None
    disable_exllama: _Anything = None
    exllama_config: _Anything = None
    hyb_act: _Anything = None
    is_marlin_format: Literal[False] = False
    max_input_length: _Anything = None
    meta: _Anything = None
    method: _Anything = None
    model_file_base_name: _Anything = None
    model_name_or_path: _Anything = None
    model_seqlen: _Anything = None
    module_name_preceding_first_block: _Anything = None
    mse: _Anything = None
    pack_dtype: Literal["int32"] = "int32"
    pad_token_id: _Anything = None
    static_groups: _Anything = None
    tokenizer: _Anything = None
    true_sequential: _Anything = None
    use_cuda_fp16: _Anything = None
    use_exllama: _Anything = None

    def _settings(self, name: str) -> tuple[bool | None, _Override]:
        """Returns whether a matrix is quantized (None if unknown), and its overrides."""
        quantized = self.lm_head if name == _HEAD else _unless_named(name, [])
        listed = [part for parts in self.modules_in_block_to_quantize for part in parts]
        if listed and _is_in_a_layer(name):
            quantized = _is_named(name, listed)
        for pattern, override in self.dynamic.items():
            if _matches(pattern.removeprefix("-:").removeprefix("+:"), name):
                return False if pattern.startswith("-:") else quantized, override
        return quantized, _Override()


class _Awq(_MadeByGptqModel):
    """AutoAWQ's description; ``w_bit`` and ``q_group_size`` are the keys of its first files.

    ``sym`` has no meaning here: writers leave it true even with zero points.
    """

    bits: Bits | None = None
    w_bit: Bits | None = None
    q_group_size: GroupSize | None = None
    zero_point: bool | None = None
    version: str | None = None
    modules_to_not_convert: Texts = Field(default_factory=list)
    do_fuse: _Anything = None
    fuse_max_seq_len: _Anything = None
    modules_to_fuse: _Anything = None

    def claim(self, name: str) -> Claim:
        quantized, override = self._settings(name)
        versions = {
            text.lower() for text in (self.version, self.checkpoint_format, self.format) if text
        }
        version = ", ".join(sorted(versions)) or "gemm"
        return Claim(
            quantized=False if _is_named(name, self.modules_to_not_convert) else quantized,
            encodings=("awq",) if version == "gemm" else (),
            bits=override.bits or self.bits or self.w_bit,
            group_size=override.group_size or self.group_size or self.q_group_size,
            label=f"awq {version}",
        )


class _Gptq(_MadeByGptqModel):
    """The description of AutoGPTQ and GPTQModel."""

    bits: Bits

    def claim(self, name: str) -> Claim:
        stated = self.checkpoint_format or self.format
        format_ = (stated or "gptq").lower()
        versions = {"gptq": 1, "gptq_v2": 2}
        quantized, override = self._settings(name)
        return Claim(
            quantized=quantized,
            encodings=("gptq",) if format_ in versions else (),
            bits=override.bits or self.bits,
            group_size=override.group_size or self.group_size,
            symmetric=self.sym if override.sym is None else override.sym,
            version=versions.get(format_),
            version_is_stated=stated is not None,
            label=f"gptq, checkpoint_format {format_}",
        )


class _AutoRoundOverride(StrictModel):
    """Overrides for some matrices, in AutoRound's ``extra_config``."""

    bits: Bits | None = None
    group_size: GroupSize | None = None
    sym: bool | None = None
    data_type: str = "int"
    act_bits: _Anything = None
    act_data_type: _Anything = None
    act_dynamic: _Anything = None
    act_group_size: _Anything = None
    act_sym: _Anything = None
    scale_dtype: _Anything = None
    super_bits: None = None
    super_group_size: None = None


_PLAIN_NAME = re.compile(r"[\w.-]*")

_PACKINGS: Mapping[str, tuple[tuple[str, ...], int | None]] = {
    "auto_gptq": (("gptq",), 1),
    "gptq": (("gptq",), 1),
    "gptqmodel": (("gptq",), 2),
    "auto_round": (("gptq",), 2),
    "auto_awq": (("awq",), None),
    "awq": (("awq",), None),
    "llm_compressor": (("pack-quantized", "int-quantized"), None),
}
"""AutoRound's packings: the encodings, and the version of GPTQ's zero points. ``auto_round``,
which is its own, and GPTQModel's store zero points as they are."""


class _AutoRound(_MadeByAutoRound):
    """AutoRound's description of matrices that are packed like those of another tool."""

    bits: Bits
    group_size: GroupSize | None = None
    sym: bool | None = None
    packing_format: str | None = None
    extra_config: dict[str, _AutoRoundOverride] = Field(default_factory=dict)

    def claim(self, name: str) -> Claim:
        encodings, version = _PACKINGS.get(self._packing.rpartition("auto_round:")[2], ((), None))
        override = self._override(name)
        bits = override.bits or self.bits
        quantized = _unless_named(name, [])
        if override.bits is not None:
            quantized = override.bits < 16
        return Claim(
            quantized=quantized,
            encodings=encodings if self.data_type == "int" else (),
            bits=bits if bits < 16 else None,
            group_size=override.group_size or self.group_size,
            symmetric=self.sym if override.sym is None else override.sym,
            version=version,
            label=f"auto-round {self._packing}",
        )

    @property
    def _packing(self) -> str:
        """The packing, without the suffix that names a kernel. Old files name it in ``backend``."""
        packing, backend = self.packing_format, self.backend
        if packing is None and isinstance(backend, str):
            packing = backend if backend.lower().startswith("auto_round") else None
        return re.sub(":(exllamav2|triton)$", "", (packing or "auto_round:auto_gptq").lower())

    def _override(self, name: str) -> _AutoRoundOverride:
        """Returns the settings under a matrix's name, or else under a pattern that matches it."""
        if name in self.extra_config:
            return self.extra_config[name]
        patterns = (key for key in self.extra_config if not _PLAIN_NAME.fullmatch(key))
        found = next((key for key in patterns if _matches(key, name, anywhere=True)), None)
        return self.extra_config[found] if found is not None else _AutoRoundOverride()


class _Fp8(_Description):
    """The description of fp8 by Hugging Face, DeepSeek and Qwen."""

    weight_block_size: _Pair | None = None
    modules_to_not_convert: Texts = Field(default_factory=list)
    ignored_layers: Texts = Field(default_factory=list)
    fmt: Literal["e4m3", "float8_e4m3fn"] = "e4m3"
    activation_scheme: _Anything = None
    dequantize: _Anything = None
    expert_dtype: _Anything = None
    kv_cache_scheme: _Anything = None
    scale_fmt: _Anything = None

    def claim(self, name: str) -> Claim:
        return Claim(
            quantized=_unless_named(name, [*self.modules_to_not_convert, *self.ignored_layers]),
            encodings=("fp8", "float-quantized"),
            bits=8,
            block=_as_block(self.weight_block_size),
            label="fp8",
        )


class _BitsAndBytes(_Description):
    """The description of bitsandbytes, as transformers writes it."""

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_quant_storage: Literal["uint8"] = "uint8"
    llm_int8_skip_modules: Texts = Field(default_factory=list)
    told_4bit: _Anything = Field(default=None, alias="_load_in_4bit")
    told_8bit: _Anything = Field(default=None, alias="_load_in_8bit")
    bnb_4bit_compute_dtype: _Anything = None
    bnb_4bit_use_double_quant: _Anything = None
    llm_int8_enable_fp32_cpu_offload: _Anything = None
    llm_int8_has_fp16_weight: _Anything = None
    llm_int8_threshold: _Anything = None

    def claim(self, name: str) -> Claim:
        type_ = self.bnb_4bit_quant_type
        return Claim(
            quantized=_unless_named(name, self.llm_int8_skip_modules),
            encodings=(f"bnb-{type_}",) if self.load_in_4bit else (),
            label=f"bitsandbytes {type_ if self.load_in_4bit else 'int8'}",
        )


class _Numbers(StrictModel):
    """Describes the number format of a group of compressed-tensors' matrices."""

    num_bits: Bits
    type: Literal["int", "float"]
    symmetric: bool = True
    strategy: Literal["tensor", "channel", "group", "block", "tensor_group"] | None = None
    group_size: GroupSize | None = None
    block_structure: _Pair | None = None
    dynamic: Literal[False] = False
    actorder: _Anything = None
    observer: _Anything = None
    observer_kwargs: _Anything = None
    scale_dtype: _Anything = None
    zp_dtype: _Anything = None


class _Group(StrictModel):
    """A group of compressed-tensors' matrices that are quantized alike."""

    targets: Texts
    weights: _Numbers | None = None
    format: str | None = None
    input_activations: _Anything = None
    output_activations: _Anything = None


class _Sparsity(StrictModel):
    """compressed-tensors' description of sparse matrices, which are not supported."""

    format: Literal["dense"] = "dense"
    global_sparsity: _Anything = None
    ignore: _Anything = None
    registry_requires_subclass: _Anything = None
    sparsity_structure: _Anything = None
    targets: _Anything = None


class _CompressedTensors(_Description):
    """The description of compressed-tensors, as LLM Compressor writes it."""

    config_groups: Annotated[dict[str, _Group], Field(max_length=1000)]
    format: str | None = None
    ignore: Texts = Field(default_factory=list)
    sparsity_config: _Sparsity = _Sparsity()
    transform_config: Annotated[dict[str, Any], Field(max_length=0)] = Field(default_factory=dict)
    global_compression_ratio: _Anything = None
    kv_cache_scheme: _Anything = None
    quantization_status: Literal["frozen", "compressed"] = "compressed"
    version: _Anything = None

    def claim(self, name: str) -> Claim:
        kinds = (_is_name, _is_pattern, _is_class)
        is_ignored = any(kind(target, name) for target in self.ignore for kind in kinds)
        group = None if is_ignored else self._group_of(name)
        if group is None or group.weights is None or group.format == "dense":
            return Claim(quantized=False, label="compressed-tensors")
        weights, format_ = group.weights, group.format or self.format or ""
        naive = "float-quantized" if weights.type == "float" else "int-quantized"
        format_ = naive if format_ == "naive-quantized" else format_
        group_size = -1 if weights.strategy in ("tensor", "channel") else weights.group_size
        is_blocks = weights.strategy == "block"
        return Claim(
            quantized=True,
            encodings=(format_,) if format_ in _COMPRESSED_FORMATS else (),
            bits=weights.num_bits,
            group_size=None if is_blocks else group_size,
            block=_as_block(weights.block_structure) if is_blocks else None,
            symmetric=weights.symmetric,
            label=f"compressed-tensors {format_}",
        )

    def _group_of(self, name: str) -> _Group | None:
        """Returns the group with the closest target: the name, a matching pattern, or the class."""
        for kind in (_is_name, _is_pattern, _is_class):
            for group in self.config_groups.values():
                if any(kind(target, name) for target in group.targets):
                    return group
        return None


_COMPRESSED_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)


def _is_name(target: str, name: str) -> bool:
    return target == name


def _is_pattern(target: str, name: str) -> bool:
    return target.startswith("re:") and _matches(target.removeprefix("re:"), name)


def _is_class(target: str, name: str) -> bool:
    return target == ("Embedding" if name.endswith("embed_tokens") else "Linear")


def _as_block(sizes: list[int] | None) -> tuple[int, int] | None:
    return None if sizes is None else (sizes[0], sizes[1])


def _unless_named(name: str, excluded: list[str]) -> bool | None:
    """Returns whether a matrix is quantized.

    False if it is in an excluded module, otherwise True in a layer, and None (unknown) elsewhere.
    """
    if _is_named(name, excluded):
        return False
    return True if _is_in_a_layer(name) else None


_HEAD = "lm_head"


def _is_in_a_layer(name: str) -> bool:
    return name.startswith("model.layers.")


def _is_named(name: str, modules: list[str]) -> bool:
    """Returns whether a matrix is one of some modules or within one; names match by whole parts."""
    return any(f".{module.strip('.')}." in f".{name}." for module in modules)


_MAX_REPEATS = 6
_NESTED = re.compile(r"\([^()]*[*+}][^()]*\)[*+{]")


def _matches(pattern: str, name: str, *, anywhere: bool = False) -> bool:
    """Returns whether a regular expression of a configuration matches a name from its beginning.

    Args:
        pattern: The expression.
        name: The name of a matrix.
        anywhere: It may match a part of the name.

    Raises:
        UnsupportedError: It is not valid, or could take very long.
    """
    repeats = len(re.findall(r"[*+{]", pattern))
    try:
        if repeats > _MAX_REPEATS or _NESTED.search(pattern):
            raise UnsupportedError(
                f"the pattern {shorten_value(pattern)} of the quantization's configuration repeats "
                "too much to be matched safely."
            )
        find = re.search if anywhere else re.match
        return find(pattern, name) is not None
    except re.error as error:
        raise UnsupportedError(
            f"the pattern {shorten_value(pattern)} of the quantization's configuration is not a "
            f"valid regular expression: {error}."
        ) from error
