"""What a checkpoint's configuration says about the quantization of its matrices.

Quantizers describe their result in ``quantization_config`` of ``config.json``, or in a file beside
it. The description is validated, and becomes a :class:`Claim` for each matrix. Tensors decide how a
matrix is stored; a claim settles what they leave open, and one that they contradict is refused
(``quant.encodings``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from hotloop.errors import UnsupportedError, shorten_value
from hotloop.outside import StrictModel, config_error, validated


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the configuration says of one matrix; None where it says nothing.

    Attributes:
        quantized: Whether it is quantized.
        encodings: The names of encodings that it may be in.
        bits: Bits of an element.
        group_size: Input features that share a scale; -1 for all of them.
        symmetric: Whether zero points are half the range.
        version: Of GPTQ's zero points.
        label: The method and format, for errors.
    """

    quantized: bool | None = None
    encodings: tuple[str, ...] | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    version: int | None = None
    label: str = "no method"


Claims = Callable[[str], Claim]
"""Returns the claim about the matrix of a name, such as ``model.layers.0.self_attn.q_proj``."""

Bits = Annotated[int, Field(ge=1, le=32)]
GroupSize = Annotated[int, Field(ge=-1, le=2**20)]
Texts = Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=100_000)]
_Anything = Any
"""Of a key that says how the file was made, or how another engine would run it."""


def no_claims(_name: str) -> Claim:
    """The claims of a checkpoint whose configuration says nothing."""
    return Claim()


def read_claims(where: str, config: Mapping[str, Any]) -> Claims:
    """Reads a quantizer's description.

    Args:
        where: Where it comes from, for errors.
        config: The keys of ``quantization_config``, or of the file that stands for it.

    Raises:
        UnsupportedError: A method that is not read.
        ConfigError: A key that is not known, or a value that a key cannot have.
    """
    method = config.get("quant_method")
    if method is None:  # the files of old AutoAWQ and AutoGPTQ
        method = "awq" if "w_bit" in config or "zero_point" in config else "gptq"
        if "config_groups" in config:
            method = "compressed-tensors"
    readers: dict[str, type[_Description]] = {
        "awq": _Awq,
        "gptq": _Gptq,
    }
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
        """Returns what it says of the matrix ``name``."""
        raise NotImplementedError


class _Awq(_Description):
    """AutoAWQ's; ``w_bit`` and ``q_group_size`` are the keys of its first files."""

    bits: Bits | None = None
    w_bit: Bits | None = None
    group_size: GroupSize | None = None
    q_group_size: GroupSize | None = None
    zero_point: bool | None = None
    version: str = "gemm"
    modules_to_not_convert: Texts = Field(default_factory=list)
    backend: _Anything = None
    do_fuse: _Anything = None
    exllama_config: _Anything = None
    fuse_max_seq_len: _Anything = None
    modules_to_fuse: _Anything = None

    def claim(self, name: str) -> Claim:
        excluded = _is_named(name, self.modules_to_not_convert)
        return Claim(
            quantized=_is_in_a_layer(name) and not excluded,
            encodings=("awq",) if self.version.lower() == "gemm" else (),
            bits=self.bits or self.w_bit,
            group_size=self.group_size or self.q_group_size,
            label=f"awq {self.version.lower()}",
        )


class _Override(StrictModel):
    """What GPTQ's ``dynamic`` says otherwise of some matrices."""

    bits: Bits | None = None
    group_size: GroupSize | None = None
    sym: bool | None = None
    desc_act: _Anything = None
    mse: _Anything = None
    damp_percent: _Anything = None


class _Gptq(_Description):
    """AutoGPTQ's and GPTQModel's."""

    bits: Bits
    group_size: GroupSize | None = None
    sym: bool | None = None
    checkpoint_format: str | None = None
    format: str | None = None
    dynamic: dict[str, _Override] = Field(default_factory=dict)
    lm_head: bool = False
    modules_in_block_to_quantize: list[Texts] = Field(default_factory=list)
    act_group_aware: _Anything = None
    backend: _Anything = None
    batch_size: _Anything = None
    block_name_to_quantize: _Anything = None
    cache_block_outputs: _Anything = None
    damp_auto_increment: _Anything = None
    damp_percent: _Anything = None
    dataset: _Anything = None
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

    def claim(self, name: str) -> Claim:
        format_ = (self.checkpoint_format or self.format or "gptq").lower()
        versions = {"gptq": 1, "gptq_v2": 2}
        quantized = _is_in_a_layer(name) or self.lm_head
        listed = [part for parts in self.modules_in_block_to_quantize for part in parts]
        if listed and _is_in_a_layer(name):
            quantized = _is_named(name, listed)
        bits, group_size, sym = self.bits, self.group_size, self.sym
        for pattern, override in self.dynamic.items():
            if not _matches(pattern.removeprefix("-:").removeprefix("+:"), name):
                continue
            if pattern.startswith("-:"):
                quantized = False
            bits, group_size = override.bits or bits, override.group_size or group_size
            sym = sym if override.sym is None else override.sym
            break
        return Claim(
            quantized=quantized,
            encodings=("gptq",) if format_ in versions else (),
            bits=bits,
            group_size=group_size,
            symmetric=sym,
            version=versions.get(format_),
            label=f"gptq, checkpoint_format {format_}",
        )


def _is_in_a_layer(name: str) -> bool:
    return name.startswith("model.layers.")


def _is_named(name: str, modules: list[str]) -> bool:
    """Tells whether a matrix is one of some modules, or in one; each is named by whole parts."""
    return any(f".{module.strip('.')}." in f".{name}." for module in modules)


_MOST_REPEATS = 6
_NESTED = re.compile(r"\([^()]*[*+}][^()]*\)[*+{]")


def _matches(pattern: str, name: str) -> bool:
    """Tells whether a regular expression of a configuration matches the beginning of a name.

    Raises:
        UnsupportedError: It is none, or one that could take very long.
    """
    repeats = len(re.findall(r"[*+{]", pattern))
    try:
        if repeats > _MOST_REPEATS or _NESTED.search(pattern):
            raise UnsupportedError(
                f"the pattern {shorten_value(pattern)} of the quantization repeats too much to be "
                "matched safely."
            )
        return re.match(pattern, name) is not None
    except re.error as error:
        raise UnsupportedError(
            f"the pattern {shorten_value(pattern)} of the quantization is no regular expression: "
            f"{error}."
        ) from error
