"""Matrix products with a weight: the implementations, and the choice of one.

A weight is handed over as its parts (``values``, ``scale``, ``offset``; see ``quant.QTensor``),
once, to be packed the way a kernel reads it. At each call the kernel decides by the number of
rows: a GEMV with few (decoding) is bound by reading the weight, a GEMM with many (prefill) by
arithmetic.

Shape letters: M rows, N output features, K input features, G groups along K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hotloop.kernels import cpu, reference
from hotloop.kernels.cuda.dequantize import dequantize
from hotloop.kernels.cuda.packing import Format, pack

Kind = Literal["dense", "int8", "fp8", "int4"]
"""The elements of a weight: unquantized floating point, or a quantized type."""

Zero = Literal["none", "integer", "offset"]
"""Kind of zero of a quantized weight: the integer 0, an integer zero point, or a float offset."""


@dataclass(frozen=True, kw_only=True)
class KernelFormat:
    """The number format of a weight, as a kernel reads it.

    Attributes:
        kind: Its elements.
        group_size: Input features that share a scale; all of them where a scale is of a whole row.
            None for a dense weight.
        scale_dtype: Element type of scales, and of floating-point offsets.
        zero: ``integer``: a group's integer zero point is subtracted before scaling. ``offset``: a
            group's floating-point offset is added after it.
    """

    kind: Kind
    group_size: int | None = None
    scale_dtype: torch.dtype | None = None
    zero: Zero = "none"


DENSE = KernelFormat(kind="dense")


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """The properties that a choice of kernel depends on.

    Attributes:
        format: The number format of the weight.
        n: Output features.
        k: Input features.
        dtype: Element type of activations, and of unquantized weights.
        device: "cpu" or "cuda".
        fused: For the fused step, which reads one packed layout alone.
        paired: Gate and up features, one below the other; the fused step computes their SwiGLU.
    """

    format: KernelFormat
    n: int
    k: int
    dtype: torch.dtype
    device: str
    fused: bool = False
    paired: bool = False

    @property
    def kind(self) -> Kind:
        """The elements of the weight."""
        return self.format.kind

    @property
    def n_scales(self) -> int:
        """Scales in the whole weight."""
        return self.n * (self.k // self.format.group_size) if self.format.group_size else 0

    @property
    def zero_bytes(self) -> int:
        """Bytes of zero points or offsets, one for each scale, as they are."""
        if self.format.zero == "none":
            return 0
        return self.n_scales * (1 if self.format.zero == "integer" else self.scale_bytes)

    @property
    def scale_bytes(self) -> int:
        """Bytes of one scale."""
        return 0 if self.format.scale_dtype is None else self.format.scale_dtype.itemsize


class LinearKernel(Protocol):
    """One implementation of ``x @ weight.T``."""

    @property
    def name(self) -> str:
        """Its name in records, such as ``int4/tinygemm``."""
        ...

    @property
    def keeps_rows(self) -> bool:
        """Whether packed rows are the unpacked ones, so that an embedding can share them."""
        ...

    def unsupported(self, spec: LinearSpec) -> str | None:
        """Returns the reason why it cannot serve this weight; None if it can. See ``NOT_MEANT``."""
        ...

    def pack(self, values: Tensor, scale: Tensor | None, offset: Tensor | None) -> list[Tensor]:
        """Arranges a weight on its device as the kernel reads it.

        Args:
            values: [N, K].
            scale: [N, G] of a quantized weight.
            offset: [N, G] where its format has zeros: integer zero points, or offsets.
        """
        ...

    def nbytes(self, spec: LinearSpec) -> int:
        """Returns the exact bytes of what ``pack`` returns."""
        ...

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        """Computes the matrix product, [M, N] in ``x``'s type."""
        ...


NOT_MEANT = ""
"""The ``unsupported`` reason that is not reported: a kernel of another device or kind of weight."""


class DenseTorch:
    """Floating-point weights through PyTorch's own matrix product."""

    name = "dense/torch"
    keeps_rows = True

    def unsupported(self, spec: LinearSpec) -> str | None:
        return None if spec.kind == "dense" else NOT_MEANT

    def pack(self, values: Tensor, scale: Tensor | None, offset: Tensor | None) -> list[Tensor]:
        assert scale is None, "a floating-point weight has no scale"
        assert offset is None, "a floating-point weight has no offset"
        return [values.contiguous()]

    def nbytes(self, spec: LinearSpec) -> int:
        return spec.n * spec.k * spec.dtype.itemsize

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        return F.linear(x_MK, packed[0])


class DenseCpu(DenseTorch):
    """bfloat16 weights on a CPU, with our own kernel."""

    name = "dense/cpu"

    def unsupported(self, spec: LinearSpec) -> str | None:
        return _cpu_unsupported(spec, "dense")

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        return torch.ops.hotloop_cpu.linear_bf16(x_MK, packed[0])


class ChannelwiseTorch:
    """Eight-bit weights in plain PyTorch: torch.compile fuses the conversion into the GEMV.

    Args:
        kind: ``int8`` or ``fp8``.
    """

    keeps_rows = True

    def __init__(self, kind: Kind) -> None:
        self.kind: Kind = kind
        self.name = f"{kind}/torch"

    def unsupported(self, spec: LinearSpec) -> str | None:
        if spec.kind != self.kind:
            return NOT_MEANT
        return _inexact(spec, scales=_FLOATS, zeros=("none",), groups=(spec.k,))

    def pack(self, values: Tensor, scale: Tensor | None, offset: Tensor | None) -> list[Tensor]:
        assert scale is not None, f"{self.kind} needs its scales"
        assert offset is None, f"{self.kind} is symmetric"
        return [values.contiguous(), scale.reshape(-1).float()]

    def nbytes(self, spec: LinearSpec) -> int:
        return spec.n * spec.k + 4 * spec.n_scales

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        return reference.linear_channelwise(x_MK, *packed)


class Int8Cpu(ChannelwiseTorch):
    """int8 weights on a CPU, with our own kernel."""

    def __init__(self) -> None:
        super().__init__("int8")
        self.name = "int8/cpu"

    def unsupported(self, spec: LinearSpec) -> str | None:
        reason = _cpu_unsupported(spec, "int8")
        return super().unsupported(spec) if reason is None else reason

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        return torch.ops.hotloop_cpu.linear_int8(x_MK, *packed)


class Int4Torch:
    """int4 weights in plain PyTorch."""

    name = "int4/torch"
    keeps_rows = False

    def unsupported(self, spec: LinearSpec) -> str | None:
        if spec.kind != "int4":
            return NOT_MEANT
        return _inexact(spec, scales=_FLOATS, zeros=("none", "offset"), groups=(32, 64, 128))

    def pack(self, values: Tensor, scale: Tensor | None, offset: Tensor | None) -> list[Tensor]:
        assert scale is not None, "int4 needs its scales"
        packed = reference.pack_int4(values, values.shape[1] // scale.shape[1])
        return [packed, scale.contiguous(), *([] if offset is None else [offset.contiguous()])]

    def nbytes(self, spec: LinearSpec) -> int:
        return spec.n * spec.k // 2 + spec.n_scales * spec.scale_bytes + spec.zero_bytes

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        return reference.linear_int4(x_MK, *_with_offset(packed))


class Int4Cpu(Int4Torch):
    """int4 weights on a CPU, with our own kernel."""

    name = "int4/cpu"

    def unsupported(self, spec: LinearSpec) -> str | None:
        reason = _cpu_unsupported(spec, "int4")
        if reason is None and spec.n % cpu.INT4_FEATURES:
            return f"needs a multiple of {cpu.INT4_FEATURES} output features, not {spec.n}"
        inexact = _inexact(spec, scales=_BF16, zeros=("none", "offset"), groups=(32, 64, 128))
        return inexact if reason is None else reason

    def pack(self, values: Tensor, scale: Tensor | None, offset: Tensor | None) -> list[Tensor]:
        assert scale is not None, "int4 needs its scales"
        scales = [scale] if offset is None else [scale, offset]
        return [cpu.pack_int4(values), *map(cpu.interleave_features, scales)]

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        return torch.ops.hotloop_cpu.linear_int4(x_MK, *_with_offset(packed))


class Int4TinyGemm:
    """int4 weights on CUDA through tinygemm, which PyTorch ships."""

    name = "int4/tinygemm"
    keeps_rows = False

    def unsupported(self, spec: LinearSpec) -> str | None:
        if spec.kind != "int4" or spec.device != "cuda":
            return NOT_MEANT
        if spec.dtype != torch.bfloat16:
            return f"tinygemm needs bfloat16 activations, not {spec.dtype}"
        if spec.n % 8 or spec.k % 32:
            return f"tinygemm needs N a multiple of 8 and K of 32, not {spec.n} and {spec.k}"
        return _inexact(spec, scales=_BF16, zeros=("none", "offset"), groups=(32, 64, 128))

    def pack(self, values: Tensor, scale: Tensor | None, offset: Tensor | None) -> list[Tensor]:
        assert scale is not None, "int4 needs its scales"
        nibbles = (values + 8).to(torch.uint8)
        bytes_ = (nibbles[:, ::2] << 4) | nibbles[:, 1::2]
        k = values.shape[1]
        inner_k_tiles = next(t for t in (8, 4, 2) if k % (16 * t) == 0)
        words = torch.ops.aten._convert_weight_to_int4pack(bytes_.contiguous(), inner_k_tiles)
        zero = torch.zeros_like(scale) if offset is None else offset
        scale_zero_GN2 = torch.stack((scale.T, zero.T), dim=-1).to(torch.bfloat16).contiguous()
        return [words, scale_zero_GN2]

    def nbytes(self, spec: LinearSpec) -> int:
        return spec.n * spec.k // 2 + 4 * spec.n_scales  # a zero beside every scale

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        words, scale_zero_GN2 = packed
        group_size = x_MK.shape[1] // scale_zero_GN2.shape[0]
        return torch.ops.aten._weight_int4pack_mm(x_MK, words, group_size, scale_zero_GN2)


class Fused:
    """Weights in the packed layout of the kernels of the fused step (``kernels.cuda``).

    Those read the packed weight themselves. Called like other kernels, for the many rows of a
    prompt, it dequantizes the weight to bfloat16 for the call.

    Args:
        spec: The weight that it serves.
    """

    keeps_rows = False

    def __init__(self, spec: LinearSpec) -> None:
        self.name = f"{spec.kind}/fused"
        self.form = Format(
            kind="bf16" if spec.kind == "dense" else spec.kind,
            group_size=spec.format.group_size if spec.kind == "int4" else None,
            symmetric=spec.format.zero == "none",
            n=spec.n,
            k=spec.k,
            paired=spec.paired,
        )

    @staticmethod
    def unsupported(spec: LinearSpec) -> str | None:
        """Returns why the fused step cannot hold a weight exactly, or None if it can."""
        if spec.kind == "dense":
            return None
        if spec.kind == "int4":
            return _inexact(spec, scales=_BF16, zeros=("none", "offset"), groups=(32, 64, 128))
        return _inexact(spec, scales=_FLOATS, zeros=("none",), groups=(spec.k,))

    def pack(self, values: Tensor, scale: Tensor | None, offset: Tensor | None) -> list[Tensor]:
        packed = pack(self.form, values, scale, offset)
        if self.form.kind in ("int8", "fp8"):
            assert scale is not None, f"{self.form.kind} needs its scales"
            return [packed, scale.reshape(-1).float().clone()]  # shared with no embedding
        return [packed]

    def nbytes(self, spec: LinearSpec) -> int:
        return self.form.nbytes + (4 * spec.n if self.form.kind in ("int8", "fp8") else 0)

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        weight, *scale_N = packed
        y = F.linear(x_MK, dequantize(self.form, weight))
        return (y * scale_N[0]).to(y.dtype) if scale_N else y


class Dequantizing:
    """Quantized weights of any format, dequantized for every matrix product."""

    name = "dequantized/torch"
    keeps_rows = False

    def unsupported(self, spec: LinearSpec) -> str | None:
        return NOT_MEANT if spec.kind == "dense" else None

    def pack(self, values: Tensor, scale: Tensor | None, offset: Tensor | None) -> list[Tensor]:
        assert scale is not None, "a quantized weight needs its scales"
        return [t.contiguous() for t in (values, scale, offset) if t is not None]

    def nbytes(self, spec: LinearSpec) -> int:
        return spec.n * spec.k + spec.n_scales * spec.scale_bytes + spec.zero_bytes

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        weight = reference.dequantize(*_with_offset(packed))
        return F.linear(x_MK, weight.to(x_MK.dtype))


KERNELS: tuple[LinearKernel, ...] = (
    Int4TinyGemm(),
    Int4Cpu(),
    Int8Cpu(),
    DenseCpu(),
    Int4Torch(),
    ChannelwiseTorch("int8"),
    ChannelwiseTorch("fp8"),
    DenseTorch(),
    Dequantizing(),
)
"""In order of preference."""


def choose_linear(spec: LinearSpec) -> tuple[LinearKernel, list[str]]:
    """Returns the first kernel that can serve a weight exactly, and why those before it cannot."""
    if spec.fused:
        reason = Fused.unsupported(spec)
        assert reason is None, f"the fused step {reason}"
        return Fused(spec), []
    notes: list[str] = []
    for kernel in KERNELS:
        reason = kernel.unsupported(spec)
        if reason is None:
            return kernel, notes
        if reason != NOT_MEANT:
            notes.append(f"{kernel.name} not used: {reason}")
    raise AssertionError(f"no kernel serves {spec}")


_BF16 = (torch.bfloat16,)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _inexact(
    spec: LinearSpec,
    *,
    scales: tuple[torch.dtype, ...],
    zeros: tuple[Zero, ...],
    groups: tuple[int, ...],
) -> str | None:
    """Says which property of a quantized weight a kernel cannot hold exactly; None if none.

    Args:
        spec: The weight.
        scales: Element types of scales that it holds.
        zeros: Kinds of zero that it holds.
        groups: Sizes of groups that it holds.
    """
    format_ = spec.format
    if format_.group_size not in groups:
        sizes = "the whole row" if groups == (spec.k,) else " or ".join(map(str, groups))
        return f"holds groups of {sizes}, not {format_.group_size}"
    if format_.scale_dtype not in scales:
        return f"holds scales in {', '.join(map(str, scales))}, not {format_.scale_dtype}"
    if format_.zero not in zeros:
        return {
            "integer": "holds no integer zero points",
            "offset": "holds no offsets",
            "none": "holds no weight without offsets",
        }[format_.zero]
    return None


def _cpu_unsupported(spec: LinearSpec, kind: Kind) -> str | None:
    if spec.kind != kind or spec.device != "cpu":
        return NOT_MEANT
    if spec.dtype != torch.bfloat16:
        return NOT_MEANT  # float32 is asked for where exactness matters more than speed
    return cpu.unavailable_reason()


def _with_offset(packed: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
    words, scale, *offset = packed
    return words, scale, offset[0] if offset else None
