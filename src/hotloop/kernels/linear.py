"""Matrix products with a weight: the implementations, and the choice of one.

A kernel packs a weight into its own layout once. At each call it chooses an algorithm by the number
of rows: with few rows (decoding), a GEMV is bound by reading the weight; with many rows (prefill),
a GEMM is bound by arithmetic.

Shape letters: M rows, N output features, K input features, G groups along K, S super-blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hotloop.kernels import cpu, reference
from hotloop.kernels.cpu.packing import (
    BLOCK_FEATURES,
    high_plane,
    pack_groups,
    packed_bytes,
    with_rows,
)
from hotloop.kernels.cuda import packing
from hotloop.kernels.cuda.dequantize import dequantize, dequantize_exactly
from hotloop.kernels.cuda.packing import (
    FACTOR,
    GROUP_SIZES,
    HALF_SLICE,
    MAX_TERMS,
    TILE_ROWS,
    Format,
    Scale,
    pack,
    terms,
)

QuantizedKind = Literal["int8", "fp8", "int4", "uint4", "lut4", "nested"]
"""The elements of a quantized weight: ``int8``, integers of up to 8 bits; ``fp8``, e4m3; ``int4``,
-8…7; ``uint4``, 0…15; ``lut4``, indices of a lookup table of 16 numbers; ``nested``, -128…119,
stored as two planes of -8…7 (``reference.split_planes``), whose high plane alone is an int4 weight.
"""

Kind = Literal["dense"] | QuantizedKind
"""The elements of a weight: unquantized floating point, or a quantized type."""

FOUR_BITS: tuple[Kind, ...] = ("int4", "uint4", "lut4")

NESTED_RANGE = (-128, 119)
"""The smallest and the largest integer of a nested weight."""

Zero = Literal["none", "integer", "offset"]
"""Kind of zero of a quantized weight: the integer 0, an integer zero point, or a float offset."""


@dataclass(frozen=True, kw_only=True)
class KernelFormat:
    """The number format of a weight, as a kernel reads it.

    Attributes:
        kind: Its elements.
        group_size: Input features that share a scale; K with one scale per row. None for a dense
            weight.
        scale_dtype: Element type of scales, and of floating-point offsets.
        zero: ``integer``: a group's integer zero point is subtracted before scaling. ``offset``: a
            group's offset is added after scaling.
        super_size: Input features that share a factor of scales and offsets, in two-level formats.
        super_dtype: Element type of these factors.
        table: The lookup table of ``lut4``.
        permutation_hash: ``quant.qtensor.hash_permutation`` of the order of columns, if it differs
            from that of the input features (act-order); else None.
    """

    kind: Kind
    group_size: int | None = None
    scale_dtype: torch.dtype | None = None
    zero: Zero = "none"
    super_size: int | None = None
    super_dtype: torch.dtype | None = None
    table: tuple[float, ...] | None = None
    permutation_hash: str | None = None

    @property
    def permuted(self) -> bool:
        """Whether the order of columns differs from that of input features."""
        return self.permutation_hash is not None

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the tensors of a ``Quantized`` weight, without a permutation."""
        two_level = self.super_size is not None
        present = {
            "values": True,
            "scale": True,
            "offset": self.zero != "none",
            "super_scale": two_level,
            "super_offset": two_level and self.zero == "offset",
            "table": self.kind == "lut4",
        }
        return tuple(name for name, is_present in present.items() if is_present)

    @property
    def high(self) -> KernelFormat:
        """The format of a nested weight's high plane."""
        assert self.kind == "nested", f"{self.kind} has no planes"
        return replace(self, kind="int4")

    def describe(self, k: int) -> str:
        """Describes the format of a weight with ``k`` input features, in words."""
        if self.group_size is None or self.scale_dtype is None:
            return "floating point"
        per = "row" if self.group_size == k else f"group of {self.group_size}"
        kind = {"lut4": "4-bit lookup table", "nested": "nested int8"}.get(self.kind, self.kind)
        said = [kind, f"{_dtype_name(self.scale_dtype)} scale per {per}"]
        if self.super_size is not None and self.super_dtype is not None:
            wide = "row" if self.super_size == k else f"block of {self.super_size}"
            said.append(f"{_dtype_name(self.super_dtype)} factor per {wide}")
        zero = {"none": (), "integer": ("zero points",), "offset": ("offsets",)}[self.zero]
        return ", ".join((*said, *zero, *(("act-order",) if self.permuted else ())))

    def is_per_channel(self, k: int) -> bool:
        """Returns whether a weight with ``k`` input features has one scale per row and no zeros."""
        plain = KernelFormat(kind=self.kind, group_size=k, scale_dtype=self.scale_dtype)
        return self.kind != "dense" and self == plain


DENSE = KernelFormat(kind="dense")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_TABLE_BYTES = 4 * 16


class Quantized(Protocol):
    """The tensors of a quantized weight, as ``quant.QTensor`` defines them."""

    @property
    def values(self) -> Tensor: ...
    @property
    def scale(self) -> Tensor: ...
    @property
    def offset(self) -> Tensor | None: ...
    @property
    def super_scale(self) -> Tensor | None: ...
    @property
    def super_offset(self) -> Tensor | None: ...
    @property
    def table(self) -> Tensor | None: ...
    @property
    def permutation(self) -> Tensor | None: ...


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """The properties on which the choice of a kernel depends.

    Attributes:
        format: The number format of the weight.
        n: Output features.
        k: Input features.
        dtype: Element type of activations, and of unquantized weights.
        device: "cpu" or "cuda".
        fused: The weight is for the fused step, which reads only one packed layout.
        plain_rows: The fused step reads bfloat16 as plain rows, if these fit
            (``cuda.tuning.reads_plain_rows``).
        paired: The rows are gate features followed by up features; the fused step computes SwiGLU.
    """

    format: KernelFormat
    n: int
    k: int
    dtype: torch.dtype
    device: str
    fused: bool = False
    plain_rows: bool = False
    paired: bool = False

    @property
    def kind(self) -> Kind:
        """The elements of the weight."""
        return self.format.kind

    @property
    def high(self) -> LinearSpec:
        """The high plane of a nested weight."""
        return replace(self, format=self.format.high)

    @property
    def n_scales(self) -> int:
        """Scales in the whole weight."""
        return self.n * (self.k // self.format.group_size) if self.format.group_size else 0

    @property
    def stored_bytes(self) -> int:
        """Bytes that the format needs for the weight, before a kernel packs it."""
        if self.kind == "dense":
            return self.n * self.k * self.dtype.itemsize
        return (self.n * self.k >> (self.kind in FOUR_BITS)) + self.scale_bytes

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales, zeros and tables of a quantized weight, before packing."""
        form = self.format
        scale = 0 if form.scale_dtype is None else form.scale_dtype.itemsize
        total = self.n_scales * (scale + {"none": 0, "integer": 1, "offset": scale}[form.zero])
        if form.super_size is not None and form.super_dtype is not None:
            n_super_blocks = self.n * (self.k // form.super_size)
            total += n_super_blocks * form.super_dtype.itemsize * (1 + (form.zero == "offset"))
        return total + (_TABLE_BYTES if form.kind == "lut4" else 0)


def n_rows(weight: Tensor | Quantized) -> int:
    """Returns the output features of a weight, or of some of its rows."""
    return len(weight if isinstance(weight, Tensor) else weight.values)


class LinearKernel(Protocol):
    """Computes ``x @ weight.T`` for one weight."""

    @property
    def name(self) -> str:
        """Its name in records, such as ``int4/tinygemm``."""
        ...

    @property
    def keeps_rows(self) -> bool:
        """Whether packed rows equal the unpacked rows, so that a slice of rows needs no copy."""
        ...

    @property
    def embeds(self) -> bool:
        """Whether it can look up rows of a packed weight, so that a tied embedding shares it."""
        ...

    @property
    def row_alignment(self) -> int:
        """Output features that are packed together; half of them from each half of a paired weight.

        Pieces of a weight that have a multiple of this many rows can be packed one by one: their
        packed tensors, concatenated along ``row_axes``, are those of the whole.
        """
        ...

    def pack(self, weight: Tensor | Quantized) -> list[Tensor]:
        """Arranges a weight in the kernel's layout, on the weight's device.

        Args:
            weight: [N, K], or a multiple of ``row_alignment`` of its rows.
        """
        ...

    def dequantize(self, packed: Sequence[Tensor], n: int) -> Tensor:
        """Dequantizes the result of ``pack`` for ``n`` rows: float32 [n, K], with nothing rounded.

        It reads the packed bytes, so that packing can be checked; speed does not matter.
        """
        ...

    def row_axes(self, packed: Sequence[Tensor]) -> list[int | None]:
        """Returns the dimension of output features in each packed tensor.

        It is None for a tensor that all output features share.
        """
        ...

    @property
    def nbytes(self) -> int:
        """The exact bytes of the tensors that ``pack`` returns."""
        ...

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        """Computes the matrix product, [M, N] in ``x``'s type."""
        ...

    def embed(self, ids: Tensor, *packed: Tensor) -> Tensor:
        """Looks up rows [..., K] of the weight by ids [...], which are clamped to it."""
        ...

    def high_plane(self, packed: Sequence[Tensor]) -> tuple[LinearKernel, list[Tensor]]:
        """Returns the kernel of a nested weight's high plane, and the packed high plane.

        It shares the memory of ``packed``.
        """
        ...


class LinearCandidate(LinearKernel, Protocol):
    """A kernel that ``choose_linear`` tries.

    Args:
        spec: The weight.
    """

    def __init__(self, spec: LinearSpec) -> None: ...

    @property
    def permutes(self) -> bool:
        """Whether it permutes input features itself; ``Permuted`` does it for other kernels."""
        ...

    @staticmethod
    def unsupported(spec: LinearSpec) -> str | None:
        """Returns why it cannot serve a weight, or None if it can; see ``NOT_APPLICABLE``."""
        ...


NOT_APPLICABLE = ""
"""The result of ``unsupported`` if the kernel is for another device or kind of weight. It is not
reported as a reason why a faster kernel is not used."""


class _ByRows:
    """Defaults for kernels whose packed tensors have a row for each output feature."""

    row_alignment = 1

    def row_axes(self, packed: Sequence[Tensor]) -> list[int | None]:
        return [0] * len(packed)

    def high_plane(self, packed: Sequence[Tensor]) -> tuple[LinearKernel, list[Tensor]]:
        raise NotImplementedError


class DenseTorch(_ByRows):
    """Matrix product with a floating-point weight, by PyTorch."""

    name = "dense/torch"
    keeps_rows = embeds = True
    permutes = False

    def __init__(self, spec: LinearSpec) -> None:
        self._dtype = spec.dtype
        self.nbytes = spec.n * spec.k * spec.dtype.itemsize

    @staticmethod
    def unsupported(spec: LinearSpec) -> str | None:
        return None if spec.kind == "dense" else NOT_APPLICABLE

    def pack(self, weight: Tensor | Quantized) -> list[Tensor]:
        assert isinstance(weight, Tensor), "the weight must be floating point"
        return [weight.contiguous()]

    def dequantize(self, packed: Sequence[Tensor], n: int) -> Tensor:  # noqa: ARG002
        return packed[0].float()

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        return F.linear(x_MK, packed[0])

    def embed(self, ids: Tensor, *packed: Tensor) -> Tensor:
        return reference.embed(ids, packed[0], None, self._dtype)


class DenseCpu(DenseTorch):
    """Matrix product with a bfloat16 weight on a CPU, by our own kernel."""

    name = "dense/cpu"

    @staticmethod
    def unsupported(spec: LinearSpec) -> str | None:
        return _cpu_unsupported(spec, "dense")

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        return torch.ops.hotloop_cpu.linear_rows(x_MK, packed[0], None)


class ChannelwiseTorch(_ByRows):
    """Matrix product with an eight-bit weight, in plain PyTorch.

    torch.compile fuses the conversion into the GEMV.
    """

    keeps_rows = embeds = True
    permutes = False

    def __init__(self, spec: LinearSpec) -> None:
        self._dtype = spec.dtype
        self.name = f"{spec.kind}/torch"
        self.nbytes = spec.n * spec.k + 4 * spec.n

    @staticmethod
    def unsupported(spec: LinearSpec) -> str | None:
        if spec.kind not in ("int8", "fp8"):
            return NOT_APPLICABLE
        return _inexact(spec, scales=_FLOATS, zeros=("none",), groups=(spec.k,))

    def pack(self, weight: Tensor | Quantized) -> list[Tensor]:
        assert not isinstance(weight, Tensor), "the weight must be quantized"
        return [weight.values.contiguous(), weight.scale.reshape(-1).float()]

    def dequantize(self, packed: Sequence[Tensor], n: int) -> Tensor:  # noqa: ARG002
        values, scale_N = packed
        return reference.dequantize(values, scale_N[:, None])

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        return reference.linear_channelwise(x_MK, *packed)

    def embed(self, ids: Tensor, *packed: Tensor) -> Tensor:
        values, scale_N = packed
        return reference.embed(ids, values, scale_N, self._dtype)


class Int8Cpu(ChannelwiseTorch):
    """Matrix product with an int8 weight on a CPU, with a scale per row, by our own kernel."""

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        self.name = "int8/cpu"

    @staticmethod
    def unsupported(spec: LinearSpec) -> str | None:
        return _cpu_unsupported(spec, "int8") if _int8_per_channel(spec) else NOT_APPLICABLE

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        return torch.ops.hotloop_cpu.linear_rows(x_MK, *packed)


class GroupedCpu(_ByRows):
    """Matrix product with a weight in groups on a CPU, by our own kernel.

    Values are integers, indices of a lookup table or fp8. Integers of 5 and 6 bits are stored in 8
    bits.
    """

    keeps_rows = False
    embeds = permutes = True
    row_alignment = BLOCK_FEATURES

    def __init__(self, spec: LinearSpec) -> None:
        self.name = f"{spec.kind}/cpu"
        self._spec, self._format, self._n, self._k = spec, spec.format, spec.n, spec.k

    @property
    def nbytes(self) -> int:
        return packed_bytes(self._format, self._n, self._k)

    @staticmethod
    def unsupported(spec: LinearSpec) -> str | None:
        if spec.kind == "dense" or _int8_per_channel(spec):
            return NOT_APPLICABLE
        reason = _cpu_unsupported(spec, spec.kind)
        if reason is None and spec.kind == "fp8" and spec.format.zero != "none":
            return "does not support fp8 with zero points or offsets"
        if reason is None and (spec.format.group_size or 0) % 8:
            return f"supports only groups of a multiple of 8, not {spec.format.group_size}"
        return reason

    def pack(self, weight: Tensor | Quantized) -> list[Tensor]:
        assert not isinstance(weight, Tensor), "the weight must be quantized"
        return pack_groups(self._format, weight, n=self._n)

    def dequantize(self, packed: Sequence[Tensor], n: int) -> Tensor:
        described, blocks = packed
        return torch.ops.hotloop_cpu.dequantize_groups(with_rows(described, n), blocks, self._k)

    def row_axes(self, packed: Sequence[Tensor]) -> list[int | None]:
        assert len(packed) == 2, "a description, and blocks of rows"
        return [None, 0]

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        return torch.ops.hotloop_cpu.linear_groups(x_MK, *packed, self._n)

    def embed(self, ids: Tensor, *packed: Tensor) -> Tensor:
        return torch.ops.hotloop_cpu.embed_groups(ids.contiguous(), *packed, self._k)

    def high_plane(self, packed: Sequence[Tensor]) -> tuple[LinearKernel, list[Tensor]]:
        return GroupedCpu(self._spec.high), high_plane(self._format, packed, self._k)


class Int4TinyGemm(_ByRows):
    """Matrix product with an int4 weight on CUDA, by PyTorch's tinygemm."""

    name = "int4/tinygemm"
    keeps_rows = embeds = permutes = False

    row_alignment = 8

    def __init__(self, spec: LinearSpec) -> None:
        self.nbytes = spec.n * spec.k // 2 + 4 * spec.n_scales  # a zero beside every scale

    @staticmethod
    def unsupported(spec: LinearSpec) -> str | None:
        if spec.kind != "int4" or spec.device != "cuda":
            return NOT_APPLICABLE
        if spec.dtype != torch.bfloat16:
            return f"tinygemm needs bfloat16 activations, not {spec.dtype}"
        if spec.n % 8 or spec.k % 32:
            return f"tinygemm needs N a multiple of 8 and K of 32, not {spec.n} and {spec.k}"
        return _inexact(spec, scales=_BF16, zeros=("none", "offset"), groups=(32, 64, 128))

    def pack(self, weight: Tensor | Quantized) -> list[Tensor]:
        assert not isinstance(weight, Tensor), "the weight must be quantized"
        return self.pack_values(weight.values, weight.scale, weight.offset)

    @staticmethod
    def pack_values(values: Tensor, scale: Tensor, offset: Tensor | None = None) -> list[Tensor]:
        nibbles = (values + 8).to(torch.uint8)
        bytes_ = (nibbles[:, ::2] << 4) | nibbles[:, 1::2]
        k = nibbles.shape[1]
        inner_k_tiles = next(t for t in (8, 4, 2) if k % (16 * t) == 0)
        words = torch.ops.aten._convert_weight_to_int4pack(bytes_.contiguous(), inner_k_tiles)
        zero = torch.zeros_like(scale) if offset is None else offset
        scale_zero_GN2 = torch.stack((scale.T, zero.T), dim=-1).contiguous()
        return [words, scale_zero_GN2]

    def dequantize(self, packed: Sequence[Tensor], n: int) -> Tensor:  # noqa: ARG002
        words, scale_zero_GN2 = packed
        scale_GN, zero_GN = scale_zero_GN2.unbind(-1)
        return reference.dequantize(self.unpack_values(words), scale_GN.T, zero_GN.T)

    @staticmethod
    def unpack_values(words: Tensor) -> Tensor:
        """Inverts ``_convert_weight_to_int4pack`` of CUDA: int8 [N, K] in -8…7.

        Words are [N / 8, K / 32J, 32, J]. Lane (g, t) holds the operand of ``mma.m16n8k16``: row g,
        features 2t, 2t + 1, 2t + 8 and 2t + 9 of two slices of 16.
        """
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
        nibbles = words.unflatten(2, (8, 4))[..., None] >> shifts & 15
        # [tile, J slices, g, t, J, odd feature, slice, half]
        ordered = nibbles.unflatten(-1, (2, 2, 2)).permute(0, 2, 1, 4, 6, 7, 3, 5)
        return (ordered.flatten(2).flatten(0, 1) - 8).to(torch.int8)

    def row_axes(self, packed: Sequence[Tensor]) -> list[int | None]:
        assert len(packed) % 2 == 0, "words [N / 8, ...], and scales [G, N, 2]"
        return [0, 1] * (len(packed) // 2)

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        words, scale_zero_GN2 = packed
        group_size = x_MK.shape[1] // scale_zero_GN2.shape[0]
        return torch.ops.aten._weight_int4pack_mm(x_MK, words, group_size, scale_zero_GN2)

    def embed(self, ids: Tensor, *packed: Tensor) -> Tensor:
        raise NotImplementedError


class NestedTinyGemm(Int4TinyGemm):
    """Matrix product with a nested weight on CUDA, by tinygemm.

    It is the sum of two rounded matrix products, one with each plane.
    """

    name = "nested/tinygemm"

    def __init__(self, spec: LinearSpec) -> None:
        self._spec = spec
        self.nbytes = spec.n * spec.k + 8 * spec.n_scales  # of each plane, with zeros

    @staticmethod
    def unsupported(spec: LinearSpec) -> str | None:
        return Int4TinyGemm.unsupported(spec.high) if spec.kind == "nested" else NOT_APPLICABLE

    def pack(self, weight: Tensor | Quantized) -> list[Tensor]:
        assert not isinstance(weight, Tensor), "the weight must be quantized"
        high, low = reference.split_planes(weight.values)
        return [*self.pack_values(high, weight.scale * 16), *self.pack_values(low, weight.scale)]

    def dequantize(self, packed: Sequence[Tensor], n: int) -> Tensor:
        high, low = super().dequantize(packed[:2], n), super().dequantize(packed[2:], n)
        return high + low

    def high_plane(self, packed: Sequence[Tensor]) -> tuple[LinearKernel, list[Tensor]]:
        return Int4TinyGemm(self._spec.high), list(packed[:2])

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        return super().__call__(x_MK, *packed[:2]) + super().__call__(x_MK, *packed[2:])


class FusedParts(NamedTuple):
    """The tensors of a weight of the fused step.

    Attributes:
        weight: As ``packing.pack`` returns it.
        scale: float32 [N], scales of output features, or None.
        features: int32 [K], the input feature of each column of a permuted weight, or None.
    """

    weight: Tensor
    scale: Tensor | None
    features: Tensor | None


class Fused(_ByRows):
    """Matrix product with a weight in the packed layout of the fused step (``kernels.cuda``).

    The fused step reads the packed weight itself. A call of this kernel, for the many rows of a
    prompt, dequantizes the weight to bfloat16.

    Attributes:
        form: The packed format, from which the fused step chooses its kernels.
    """

    embeds = False
    row_alignment = TILE_ROWS

    def __init__(self, spec: LinearSpec) -> None:
        self.name = f"{spec.kind}/fused"
        self._spec, self._format = spec, spec.format
        self.form = _packed_format(spec)
        if spec.plain_rows:
            self.form = self.form.with_plain_rows()
        self.keeps_rows = self.form.plain_rows
        self.nbytes = self.form.nbytes + (4 * spec.n if self.form.has_channel_scales else 0)
        self.nbytes += 4 * spec.k * self.form.permuted

    @staticmethod
    def unsupported(spec: LinearSpec) -> str | None:
        """Returns why the fused step cannot hold a weight exactly, or None if it can."""
        format_ = spec.format
        if format_.table is not None and terms(format_.table) is None:
            return (
                "supports only lookup tables whose numbers are sums of at most "
                f"{MAX_TERMS} bfloat16 numbers"
            )
        size = format_.group_size
        if size is not None and size % HALF_SLICE and not format_.is_per_channel(spec.k):
            return f"supports only groups of a multiple of {HALF_SLICE}, not {size}"
        return None

    def pack(self, weight: Tensor | Quantized) -> list[Tensor]:
        form = replace(self.form, n=n_rows(weight))
        if isinstance(weight, Tensor):
            return [pack(form, weight, None, None)]
        values, features_K = weight.values, weight.permutation
        if features_K is not None and not self.form.permuted:  # one group: any order will do
            values = values.view(torch.int8).index_select(1, features_K.argsort())
            values = values.view(weight.values.dtype)
        if self.form.group_size is None:
            packed = pack(form, values, None, None)
            return [
                packed,
                weight.scale.reshape(-1).float().clone(),
            ]  # a copy, which no embedding shares
        # The packed format has smaller groups than some weights: their scales are repeated.
        repeats = (self._format.group_size or 0) // self.form.group_size
        scale, offset, factors = weight.scale, weight.offset, ()
        if self.form.scale == "two":
            factors = weight.super_scale, weight.super_offset
        elif weight.super_scale is not None and not self.form.row_scale:
            scale = reference.scaled(scale, weight.super_scale)
            if offset is not None and weight.super_offset is not None:
                offset = reference.scaled(offset, weight.super_offset)
        scale, offset = (
            t if t is None or repeats == 1 else t.repeat_interleave(repeats, dim=1)
            for t in (_widened(scale), offset)
        )
        packed = [pack(form, values, scale, offset, *factors)]
        if self.form.row_scale:
            assert weight.super_scale is not None, "the weight needs a factor for each row"
            packed.append(weight.super_scale.reshape(-1).clone())
        if self.form.permuted:
            assert features_K is not None, "the weight must be permuted"
            packed.append(features_K.contiguous())
        return packed

    def dequantize(self, packed: Sequence[Tensor], n: int) -> Tensor:
        weight, scale_N, features_K = self.named(packed)
        return dequantize_exactly(replace(self.form, n=n), weight, features_K, scale_N)

    def row_axes(self, packed: Sequence[Tensor]) -> list[int | None]:
        rows = len(packed) - self.form.permuted
        return [0 if part < rows else None for part in range(len(packed))]

    def named(self, packed: Sequence[Tensor]) -> FusedParts:
        """Names the tensors that ``pack`` returned."""
        weight, *others = packed
        scale_N = others.pop(0) if self.form.has_channel_scales else None
        features_K = others.pop(0) if self.form.permuted else None
        assert not others, f"{len(others)} tensors too many"
        return FusedParts(weight, scale_N, features_K)

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        weight, scale_N, features_K = self.named(packed)
        y = F.linear(x_MK, dequantize(self.form, weight, features_K))
        return y if scale_N is None else (y * scale_N).to(y.dtype)

    def embed(self, ids: Tensor, *packed: Tensor) -> Tensor:
        raise NotImplementedError

    def high_plane(self, packed: Sequence[Tensor]) -> tuple[LinearKernel, list[Tensor]]:
        (weight,) = packed
        return Fused(self._spec.high), [packing.high_plane(self.form, weight)]


def _packed_format(spec: LinearSpec) -> Format:
    """Returns the packed format of a weight that the fused step holds exactly.

    Two-level scales are kept as such if they are like those of GGUF's super-blocks, or have one
    factor per row. Others become float32 scales, which equal them by specification.
    """
    form = spec.format
    kind = "bf16" if spec.kind == "dense" else spec.kind
    eight_bits = kind in ("int8", "fp8")
    if form.group_size is None or (eight_bits and form.is_per_channel(spec.k)):
        return Format(kind=kind, n=spec.n, k=spec.k, paired=spec.paired)
    # bfloat16 holds every eight-bit float, too.
    scales: dict[torch.dtype | None, Scale] = {torch.float32: "f32", torch.float16: "f16"}
    held = Format(
        kind=kind,
        group_size=math.gcd(form.group_size, GROUP_SIZES[-1]),
        scale="f32" if form.super_size else scales.get(form.scale_dtype, "bf16"),
        zero=form.zero,
        table=form.table,
        permuted=form.permuted and form.group_size != spec.k,
        n=spec.n,
        k=spec.k,
        paired=spec.paired,
    )
    if form.super_size is None:
        return held
    if _has_row_scale(spec):
        return replace(held, scale="bf16", row_scale=True)
    return replace(held, scale="two") if _has_two_levels(form, held.unit_k) else held


def _has_row_scale(spec: LinearSpec) -> bool:
    """Returns whether a factor per row can be applied to the results, as for nvfp4."""
    form = spec.format
    return (
        form.super_size == spec.k
        and form.super_dtype == torch.float32
        and form.scale_dtype in _EIGHT_BIT_FLOATS
        and form.zero == "none"
    )


def _has_two_levels(form: KernelFormat, unit_k: int) -> bool:
    """Returns whether scales are integers, and their half-precision factors span whole units."""
    is_whole = form.super_size is not None and form.super_size % unit_k == 0
    are_halves = form.scale_dtype == torch.int8 and form.super_dtype == FACTOR
    return is_whole and are_halves and form.zero != "integer"


class Dequantizing(_ByRows):
    """Matrix product with a quantized weight of any format, which every call dequantizes.

    Four-bit values are packed. So are the planes of nested weights: the high plane with its scales,
    then the low plane. Other eight-bit values remain as they are.
    """

    keeps_rows = permutes = False
    embeds = True

    def __init__(self, spec: LinearSpec) -> None:
        self.name = f"{spec.kind}/dequantized"
        self._spec, self._format, self._dtype = spec, spec.format, spec.dtype
        self._group = spec.format.group_size or 0  # nibbles are packed by group
        self._nested = spec.kind == "nested"
        self._packs = spec.kind in FOUR_BITS and self._group % 4 == 0
        self._bias = 8 if spec.kind in ("uint4", "lut4") else 0
        self.nbytes = (spec.n * spec.k >> self._packs) + spec.scale_bytes

    @staticmethod
    def unsupported(spec: LinearSpec) -> str | None:
        return NOT_APPLICABLE if spec.kind == "dense" else None

    def pack(self, weight: Tensor | Quantized) -> list[Tensor]:
        if self._nested:
            assert not isinstance(weight, Tensor), "the weight must be quantized"
            high, low = (
                reference.pack_int4(plane, self._group)
                for plane in reference.split_planes(weight.values)
            )
            return [high, weight.scale * 16, low]
        values, *scales = (getattr(weight, name).contiguous() for name in self._format.parts)
        if self._packs:
            values = reference.pack_int4(values - self._bias, self._group)
        return [values, *scales]

    def dequantize(self, packed: Sequence[Tensor], n: int) -> Tensor:  # noqa: ARG002
        return self._dequantize(*packed)

    def row_axes(self, packed: Sequence[Tensor]) -> list[int | None]:  # noqa: ARG002
        axes: list[int | None] = [None if part == "table" else 0 for part in self._format.parts]
        return [0, *axes] if self._nested else axes

    def high_plane(self, packed: Sequence[Tensor]) -> tuple[LinearKernel, list[Tensor]]:
        return Dequantizing(self._spec.high), list(packed[:-1])

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        return F.linear(x_MK, self._dequantize(*packed).to(x_MK.dtype))

    def embed(self, ids: Tensor, *packed: Tensor) -> Tensor:
        at = ids.flatten().clamp(0, len(packed[0]) - 1)
        axes = self.row_axes(packed)
        rows = (t if axis is None else t[at] for axis, t in zip(axes, packed, strict=True))
        return self._dequantize(*rows).to(self._dtype).unflatten(0, ids.shape)

    def _dequantize(self, *packed: Tensor) -> Tensor:
        if self._nested:
            high, scale, low = packed
            planes = (reference.unpack_int4(plane, self._group) for plane in (high, low))
            return reference.dequantize(reference.join_planes(*planes), scale * 2.0**-4)
        part = dict(zip(self._format.parts, packed, strict=True))
        values = part["values"]
        if self._packs:
            values = reference.unpack_int4(values, self._group) + self._bias
        return reference.dequantize(
            values,
            part["scale"],
            part.get("offset"),
            super_scale_NS=part.get("super_scale"),
            super_offset_NS=part.get("super_offset"),
            table=part.get("table"),
        )


class Permuted:
    """Matrix product with a permuted weight, by another kernel on permuted activations.

    Args:
        inner: The kernel of the weight without its permutation.
        k: Input features.
    """

    keeps_rows = embeds = False

    def __init__(self, inner: LinearKernel, k: int) -> None:
        self.name = f"{inner.name}, permuted"
        self._inner = inner
        self.nbytes = inner.nbytes + 4 * k

    def pack(self, weight: Tensor | Quantized) -> list[Tensor]:
        assert not isinstance(weight, Tensor), "the weight must be quantized"
        assert weight.permutation is not None, "the weight must be permuted"
        return [*self._inner.pack(weight), weight.permutation]

    def dequantize(self, packed: Sequence[Tensor], n: int) -> Tensor:
        *inner, permutation_K = packed
        weight = self._inner.dequantize(inner, n)
        return torch.empty_like(weight).index_copy_(1, permutation_K.long(), weight)

    @property
    def row_alignment(self) -> int:
        return self._inner.row_alignment

    def row_axes(self, packed: Sequence[Tensor]) -> list[int | None]:
        return [*self._inner.row_axes(packed[:-1]), None]

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        *inner, permutation_K = packed
        return self._inner(x_MK.index_select(1, permutation_K), *inner)

    def embed(self, ids: Tensor, *packed: Tensor) -> Tensor:
        raise NotImplementedError

    def high_plane(self, packed: Sequence[Tensor]) -> tuple[LinearKernel, list[Tensor]]:
        raise NotImplementedError


class Stacked:
    """A weight that is a concatenation of row pieces of different number formats.

    Args:
        pieces: The kernel of each, with its number of packed tensors.
    """

    keeps_rows = False

    def __init__(self, pieces: Sequence[tuple[LinearKernel, int]]) -> None:
        self._pieces = tuple(pieces)
        self.kernels = [kernel for kernel, _ in self._pieces]
        self.name = f"stacked({', '.join(kernel.name for kernel, _ in self._pieces)})"

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        """Computes the matrix product, [M, N] in ``x``'s type."""
        results, start = [], 0
        for kernel, n_packed in self._pieces:
            results.append(kernel(x_MK, *packed[start : start + n_packed]))
            start += n_packed
        return torch.cat(results, dim=1)


KERNELS: tuple[type[LinearCandidate], ...] = (
    Int4TinyGemm,
    NestedTinyGemm,
    Int8Cpu,
    GroupedCpu,
    DenseCpu,
    ChannelwiseTorch,
    DenseTorch,
    Dequantizing,
)
"""All kernels, in order of preference."""


def choose_linear(spec: LinearSpec) -> tuple[LinearKernel, list[str]]:
    """Returns the first kernel that can serve a weight exactly, and why faster kernels cannot."""
    if spec.fused:
        reason = Fused.unsupported(spec)
        assert reason is None, f"the fused step {reason}"
        return Fused(spec), []
    notes: list[str] = []
    for kernel in (make(spec) for make in KERNELS):
        reason = kernel.unsupported(spec)
        if reason is None:
            notes = _notes(kernel, notes)
            if spec.format.permuted and not kernel.permutes:
                return Permuted(kernel, spec.k), notes
            return kernel, notes
        if reason != NOT_APPLICABLE:
            notes.append(f"{kernel.name} not used: {reason}")
    raise AssertionError(f"no kernel serves {spec}")


def _notes(chosen: LinearCandidate, not_used: list[str]) -> list[str]:
    """Returns why faster kernels are not used, and which slow kernel is used instead."""
    if not_used and isinstance(chosen, Dequantizing):
        slow = "is slow: it dequantizes weights for every matrix product"
        return [*not_used, f"{chosen.name} is used instead, and {slow}"]
    return not_used


_BF16 = (torch.bfloat16,)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_EIGHT_BIT_FLOATS = (torch.float8_e4m3fn, torch.float8_e8m0fnu)


def _widened(scale: Tensor) -> Tensor:
    """Converts eight-bit floats to bfloat16, which holds each exactly."""
    return scale.bfloat16() if scale.dtype in _EIGHT_BIT_FLOATS else scale


def _int8_per_channel(spec: LinearSpec) -> bool:
    return spec.kind == "int8" and spec.format.is_per_channel(spec.k)


def _inexact(
    spec: LinearSpec,
    *,
    scales: tuple[torch.dtype, ...],
    zeros: tuple[Zero, ...],
    groups: tuple[int, ...],
) -> str | None:
    """Returns why a kernel cannot hold a quantized weight exactly, or None if it can.

    Args:
        spec: The weight.
        scales: Element types of scales that the kernel holds.
        zeros: Kinds of zero that the kernel holds.
        groups: Group sizes that the kernel holds.
    """
    format_ = spec.format
    if format_.super_size is not None:
        return "does not support two-level scales"
    if format_.group_size not in groups:
        sizes = "the whole row" if groups == (spec.k,) else " or ".join(map(str, groups))
        return f"supports only groups of {sizes}, not {format_.group_size}"
    if format_.scale_dtype not in scales:
        return f"supports only scales in {', '.join(map(str, scales))}, not {format_.scale_dtype}"
    if format_.zero not in zeros:
        return {
            "integer": "does not support integer zero points",
            "offset": "does not support offsets",
            "none": "does not support weights without offsets",
        }[format_.zero]
    return None


def _cpu_unsupported(spec: LinearSpec, kind: Kind) -> str | None:
    if spec.kind != kind or spec.device != "cpu":
        return NOT_APPLICABLE
    if spec.dtype != torch.bfloat16:
        return NOT_APPLICABLE  # with float32, exactness matters more than speed
    return cpu.unavailable_reason()
