"""Matrix products with a weight: which implementations exist, and which one to take.

A weight is handed over as its parts (``values``, ``scale``, ``offset``; see ``quant.QTensor``),
once, to be packed the way a kernel reads it. At each call the kernel decides by the number of
rows: products with few (decoding) are bound by reading the weight, those with many (prefill) by
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
"""What a weight's elements are: unquantized floating point, or a quantized type."""


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """What a choice of kernel depends on.

    Attributes:
        kind: What its elements are.
        group_size: Input features that share a scale, or None for a dense weight.
        symmetric: Without offsets.
        n: Output features.
        k: Input features.
        dtype: Element type of activations, and of unquantized weights.
        device: "cpu" or "cuda".
        fused: For the fused step, which reads one order of bytes alone.
        paired: Gate and up features, one below the other; the fused step takes their SwiGLU.
    """

    kind: Kind
    group_size: int | None
    symmetric: bool
    n: int
    k: int
    dtype: torch.dtype
    device: str
    fused: bool = False
    paired: bool = False

    @property
    def n_scales(self) -> int:
        """Scales in the whole weight."""
        return self.n * (self.k // self.group_size) if self.group_size else 0


class LinearKernel(Protocol):
    """One implementation of ``x @ weight.T``."""

    @property
    def name(self) -> str:
        """As records name it, such as ``int4/tinygemm``."""
        ...

    @property
    def keeps_rows(self) -> bool:
        """Whether packed rows are the rows as they came: an embedding can share them."""
        ...

    def unsupported(self, form: WeightFormat) -> str | None:
        """Why it cannot serve this weight, or None if it can; empty if it was never meant to."""
        ...

    def pack(self, values: Tensor, scale: Tensor | None, offset: Tensor | None) -> list[Tensor]:
        """Arranges a weight on its device as the kernel reads it."""
        ...

    def nbytes(self, form: WeightFormat) -> int:
        """Exact bytes of what ``pack`` returns."""
        ...

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        """The product, [M, N] in ``x``'s type."""
        ...


NOT_MEANT = ""
"""An ``unsupported`` answer that needs no mention: another device, another kind of weight."""


class DenseTorch:
    """Floating-point weights through PyTorch's own product."""

    name = "dense/torch"
    keeps_rows = True

    def unsupported(self, form: WeightFormat) -> str | None:
        return None if form.kind == "dense" else NOT_MEANT

    def pack(self, values: Tensor, scale: Tensor | None, offset: Tensor | None) -> list[Tensor]:
        assert scale is None, "a floating-point weight has no scale"
        assert offset is None, "a floating-point weight has no offset"
        return [values.contiguous()]

    def nbytes(self, form: WeightFormat) -> int:
        return form.n * form.k * form.dtype.itemsize

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        return F.linear(x_MK, packed[0])


class DenseCpu(DenseTorch):
    """bfloat16 weights on a CPU, with our own kernel."""

    name = "dense/cpu"

    def unsupported(self, form: WeightFormat) -> str | None:
        return _cpu_unsupported(form, "dense")

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        return torch.ops.hotloop_cpu.linear_bf16(x_MK, packed[0])


class ChannelwiseTorch:
    """Eight-bit weights in plain PyTorch: torch.compile fuses the conversion into the product.

    Args:
        kind: ``int8`` or ``fp8``.
    """

    keeps_rows = True

    def __init__(self, kind: Kind) -> None:
        self.kind: Kind = kind
        self.name = f"{kind}/torch"

    def unsupported(self, form: WeightFormat) -> str | None:
        return None if form.kind == self.kind else NOT_MEANT

    def pack(self, values: Tensor, scale: Tensor | None, offset: Tensor | None) -> list[Tensor]:
        assert scale is not None, f"{self.kind} needs its scales"
        assert offset is None, f"{self.kind} is symmetric"
        return [values.contiguous(), scale.reshape(-1).float()]

    def nbytes(self, form: WeightFormat) -> int:
        return form.n * form.k + 4 * form.n_scales

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        return reference.linear_channelwise(x_MK, *packed)


class Int8Cpu(ChannelwiseTorch):
    """int8 weights on a CPU, with our own kernel."""

    def __init__(self) -> None:
        super().__init__("int8")
        self.name = "int8/cpu"

    def unsupported(self, form: WeightFormat) -> str | None:
        return _cpu_unsupported(form, "int8")

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        return torch.ops.hotloop_cpu.linear_int8(x_MK, *packed)


class Int4Torch:
    """int4 weights in plain PyTorch."""

    name = "int4/torch"
    keeps_rows = False

    def unsupported(self, form: WeightFormat) -> str | None:
        return None if form.kind == "int4" else NOT_MEANT

    def pack(self, values: Tensor, scale: Tensor | None, offset: Tensor | None) -> list[Tensor]:
        assert scale is not None, "int4 needs its scales"
        packed = reference.pack_int4(values, values.shape[1] // scale.shape[1])
        return [packed, scale.contiguous(), *([] if offset is None else [offset.contiguous()])]

    def nbytes(self, form: WeightFormat) -> int:
        return form.n * form.k // 2 + 2 * form.n_scales * (1 if form.symmetric else 2)

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        return reference.linear_int4(x_MK, *_with_offset(packed))


class Int4Cpu(Int4Torch):
    """int4 weights on a CPU, with our own kernel."""

    name = "int4/cpu"

    def unsupported(self, form: WeightFormat) -> str | None:
        reason = _cpu_unsupported(form, "int4")
        if reason is None and form.n % cpu.INT4_FEATURES:
            return f"needs a multiple of {cpu.INT4_FEATURES} output features, not {form.n}"
        return reason

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

    def unsupported(self, form: WeightFormat) -> str | None:
        if form.kind != "int4" or form.device != "cuda":
            return NOT_MEANT
        if form.dtype != torch.bfloat16:
            return f"tinygemm needs bfloat16 activations, not {form.dtype}"
        if form.n % 8 or form.k % 32:
            return f"tinygemm needs N a multiple of 8 and K of 32, not {form.n} and {form.k}"
        return None

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

    def nbytes(self, form: WeightFormat) -> int:
        return form.n * form.k // 2 + 4 * form.n_scales  # a zero beside every scale

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        words, scale_zero_GN2 = packed
        group_size = x_MK.shape[1] // scale_zero_GN2.shape[0]
        return torch.ops.aten._weight_int4pack_mm(x_MK, words, group_size, scale_zero_GN2)


class Fused:
    """Weights in the order in which the kernels of the fused step read them (``kernels.cuda``).

    Those read the bytes themselves. Called like other kernels, for the many rows of a prompt, it
    gives the weight back as rows of bfloat16, for the occasion.

    Args:
        form: The one format that it serves.
    """

    keeps_rows = False

    def __init__(self, form: WeightFormat) -> None:
        self.name = f"{form.kind}/fused"
        self.form = Format(
            kind="bf16" if form.kind == "dense" else form.kind,
            group_size=form.group_size if form.kind == "int4" else None,
            symmetric=form.symmetric,
            n=form.n,
            k=form.k,
            paired=form.paired,
        )

    def unsupported(self, form: WeightFormat) -> str | None:
        return None if form.fused else NOT_MEANT

    def pack(self, values: Tensor, scale: Tensor | None, offset: Tensor | None) -> list[Tensor]:
        packed = pack(self.form, values, scale, offset)
        if self.form.kind in ("int8", "fp8"):
            assert scale is not None, f"{self.form.kind} needs its scales"
            return [packed, scale.reshape(-1).float().clone()]  # shared with no embedding
        return [packed]

    def nbytes(self, form: WeightFormat) -> int:
        return self.form.nbytes + (4 * form.n if self.form.kind in ("int8", "fp8") else 0)

    def __call__(self, x_MK: Tensor, *packed: Tensor) -> Tensor:
        weight, *scale_N = packed
        y = F.linear(x_MK, dequantize(self.form, weight))
        return (y * scale_N[0]).to(y.dtype) if scale_N else y


KERNELS: tuple[LinearKernel, ...] = (
    Int4TinyGemm(),
    Int4Cpu(),
    Int8Cpu(),
    DenseCpu(),
    Int4Torch(),
    ChannelwiseTorch("int8"),
    ChannelwiseTorch("fp8"),
    DenseTorch(),
)
"""In order of preference."""


def choose_linear(form: WeightFormat) -> tuple[LinearKernel, list[str]]:
    """The first kernel that can serve a weight, and why those before it cannot."""
    if form.fused:
        return Fused(form), []
    notes: list[str] = []
    for kernel in KERNELS:
        reason = kernel.unsupported(form)
        if reason is None:
            return kernel, notes
        if reason != NOT_MEANT:
            notes.append(f"{kernel.name} not used: {reason}")
    raise AssertionError(f"no kernel serves {form}")


def _cpu_unsupported(form: WeightFormat, kind: Kind) -> str | None:
    if form.kind != kind or form.device != "cpu":
        return NOT_MEANT
    if form.dtype != torch.bfloat16:
        return NOT_MEANT  # float32 is asked for where exactness matters more than speed
    return cpu.unavailable_reason()


def _with_offset(packed: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
    words, scale, *offset = packed
    return words, scale, offset[0] if offset else None
