"""Quantized tensors and the schemes that make them.

The name of a scheme is its registered name followed by its options, separated by dashes: ``int8``,
``fp8``, ``int8-g128``, ``int4-g64``, ``int4-g32-asym``, ``int4-g64-cal``. ``parse_scheme`` is the
only reader of such names.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hotloop.errors import UnknownNameError
from hotloop.kernels.linear import KernelFormat
from hotloop.quant.qtensor import QTensor, ReduceMax, join_alike, join_rows, slice_weight
from hotloop.registry import resolve

SCHEMES = {
    "auto": "hotloop.quant.auto:Auto",
    "none": "hotloop.quant.none:NoScheme",
    "int8": "hotloop.quant.int8:Int8",
    "fp8": "hotloop.quant.fp8:Fp8",
    "int4": "hotloop.quant.int4:Int4",
}
"""Every quantization scheme: ``name -> "module:attribute"``."""

WITH_OPTIONS = ("int4-gN", "int4-gN-asym", "int4-gN-zp", "int4-gN-cal", "int8-gN")
"""The forms of names with options, for messages."""


class Scheme(Protocol):
    """Quantizes weight matrices."""

    @property
    def name(self) -> str:
        """The canonical short name, which ``parse_scheme`` reads back."""
        ...

    @property
    def alignment(self) -> int:
        """Number of adjacent input features that share a scale, which a slice must not separate.

        It is 1 where a scale covers a whole row: for a slice of columns, ``quantize`` then needs
        ``reduce_max``.
        """
        ...

    @classmethod
    def from_options(cls, options: tuple[str, ...]) -> Scheme:
        """Returns the scheme with the options that followed its name.

        Raises:
            ConfigError: There is no such option, or two contradict each other.
        """
        ...

    def check(self, name: str, n: int, k: int) -> None:
        """Checks that this scheme can quantize the weight ``name`` of shape [n, k].

        Raises:
            ConfigError: It cannot; the message names the weight and what would fit.
        """
        ...

    def quantize(self, weight: Tensor, *, reduce_max: ReduceMax | None = None) -> Tensor | QTensor:
        """Quantizes a floating-point [N, K] weight, on its own device.

        Each row is quantized by itself, so rows can be quantized a few at a time.

        Args:
            weight: Whole rows, or the same columns of each row, cut at multiples of ``alignment``.
            reduce_max: All-reduces the maxima of rows, [N, 1], over the slices of columns, so that
                the result is a slice of the quantized whole. None for whole rows.
        """
        ...

    def random(
        self, n: int, k: int, *, std: float, dtype: torch.dtype, generator: torch.Generator
    ) -> Tensor | QTensor:
        """Makes random [n, k] weights of about this standard deviation, on the generator's device.

        They are made in quantized form; ``dtype`` is the type of weights that are not quantized.
        """
        ...

    def format(self, k: int) -> KernelFormat:
        """Returns the number format of a weight with ``k`` input features."""
        ...


def parse_scheme(name: str) -> Scheme:
    """Returns the scheme of a short name such as ``int4-g64-asym``.

    Raises:
        UnknownNameError: No scheme has that name.
        ConfigError: The scheme has no such option.
    """
    base, *options = name.split("-")
    if base not in SCHEMES:
        hint = "quant auto, the default, keeps the quantization of AWQ, GPTQ, GGUF and other files."
        raise UnknownNameError("quantization scheme", base, (*SCHEMES, *WITH_OPTIONS), hint)
    return resolve("quantization scheme", SCHEMES, base).from_options(tuple(options))


def parse_head_scheme(name: str, scheme: Scheme) -> Scheme:
    """Returns the scheme of the output head, given the scheme of the blocks.

    ``auto`` is int8 if the blocks are quantized by ``scheme``: with four bits the head would lose
    more quality than it gains in speed.
    """
    if name == "auto":
        name = scheme.name if scheme.name in ("auto", "none") else "int8"
    return parse_scheme(name)


__all__ = [
    "SCHEMES",
    "QTensor",
    "ReduceMax",
    "Scheme",
    "join_alike",
    "join_rows",
    "parse_head_scheme",
    "parse_scheme",
    "slice_weight",
]
