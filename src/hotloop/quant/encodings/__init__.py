"""Encodings: how tools store quantized matrices.

An encoding recognizes a matrix by the names, shapes and element types of its tensors, and decodes
them into a ``QTensor`` without loss. The checkpoint's configuration makes a claim about the matrix
(``quant.claims``): it is used for properties that the tensors do not determine, and a contradiction
is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from hotloop.errors import CheckpointError
from hotloop.kernels.linear import KernelFormat
from hotloop.quant.claims import Claim
from hotloop.quant.qtensor import QTensor, expand_blocks, hash_permutation
from hotloop.registry import resolve

ENCODINGS = {
    "hotloop": "hotloop.quant.encodings.hotloop:Hotloop",
    "awq": "hotloop.quant.encodings.awq:Awq",
    "gptq": "hotloop.quant.encodings.gptq:Gptq",
    "pack-quantized": "hotloop.quant.encodings.compressed_tensors:PackQuantized",
    "int-quantized": "hotloop.quant.encodings.compressed_tensors:IntQuantized",
    "nvfp4-pack-quantized": "hotloop.quant.encodings.compressed_tensors:Nvfp4",
    "mxfp4-pack-quantized": "hotloop.quant.encodings.compressed_tensors:Mxfp4",
    "float-quantized": "hotloop.quant.encodings.fp8:FloatQuantized",
    "fp8": "hotloop.quant.encodings.fp8:ScaleInverse",
    "bnb-nf4": "hotloop.quant.encodings.bitsandbytes:Nf4",
    "bnb-fp4": "hotloop.quant.encodings.bitsandbytes:Fp4",
    "gguf-q4_0": "hotloop.quant.encodings.gguf:Q4_0",
    "gguf-q4_1": "hotloop.quant.encodings.gguf:Q4_1",
    "gguf-q5_0": "hotloop.quant.encodings.gguf:Q5_0",
    "gguf-q5_1": "hotloop.quant.encodings.gguf:Q5_1",
    "gguf-q8_0": "hotloop.quant.encodings.gguf:Q8_0",
    "gguf-q2_k": "hotloop.quant.encodings.gguf:Q2_K",
    "gguf-q3_k": "hotloop.quant.encodings.gguf:Q3_K",
    "gguf-q4_k": "hotloop.quant.encodings.gguf:Q4_K",
    "gguf-q5_k": "hotloop.quant.encodings.gguf:Q5_K",
    "gguf-q6_k": "hotloop.quant.encodings.gguf:Q6_K",
    "gguf-iq4_nl": "hotloop.quant.encodings.gguf:IQ4_NL",
    "gguf-iq4_xs": "hotloop.quant.encodings.gguf:IQ4_XS",
    "gguf-mxfp4": "hotloop.quant.encodings.gguf:MXFP4",
}
"""Every encoding: ``name -> "module:attribute"``."""


SCALE_DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Element types of scales, by their names in safetensors."""


class StoredTensor(Protocol):
    """The entry of a tensor in a checkpoint."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""
        ...

    @property
    def dtype(self) -> str:
        """Its element type, as the checkpoint's format names it."""
        ...

    @property
    def file(self) -> Path:
        """The file that holds it."""
        ...


@dataclass(frozen=True, kw_only=True)
class StoredMatrix:
    """A matrix [N, K] as a checkpoint stores it.

    Attributes:
        name: Its name, to which the names of its tensors are added.
        shape: [N, K].
        tensors: Its tensors by suffix, such as ``.weight.scale``.
        read: Reads a whole tensor; for small tensors whose values are part of the format.
        claim: The claim of the checkpoint's configuration about it.
        wanted: The number format of its scheme; None for ``auto``. Copies that ``hotloop quantize``
            wrote are stored in this format, since their description names the scheme.
    """

    name: str
    shape: tuple[int, int]
    tensors: Mapping[str, StoredTensor]
    read: Callable[[str], Tensor]
    claim: Claim = field(default_factory=Claim)
    wanted: KernelFormat | None = None

    def error(self, suffix: str, problem: str) -> CheckpointError:
        """Makes the error of one of its tensors."""
        return CheckpointError(self.tensors[suffix].file, problem, tensor=f"{self.name}{suffix}")

    def scale_dtype(self, suffix: str) -> torch.dtype:
        """Returns the element type of a tensor of scales; CheckpointError if it is no float."""
        name = self.tensors[suffix].dtype
        if name not in SCALE_DTYPES:
            raise self.error(suffix, f"holds scales as {name}, not as {', '.join(SCALE_DTYPES)}")
        return SCALE_DTYPES[name]

    def groups(self, suffix: str, n_groups: int) -> Groups:
        """Returns the groups of input features; the last group may be smaller than the others.

        Args:
            suffix: The tensor that has an element for each group.
            n_groups: Groups along the input features.

        Raises:
            CheckpointError: The configuration gives another size, or no size although groups are
                uneven.
        """
        k, claimed = self.shape[1], self.claim.group_size
        size = k if claimed == -1 else claimed
        if size is None and n_groups and k % n_groups == 0:
            size = k // n_groups
        if size is None or -(-k // size) != n_groups:
            claim = "gives no group size" if size is None else f"says groups of {size}"
            claim = "says one group (group_size -1)" if claimed == -1 else claim
            raise self.error(
                suffix,
                f"has {n_groups} groups along {k} input features, and the checkpoint's "
                f"configuration {claim}",
            )
        return Groups.of(k, size)

    def permutation_hash(self, suffix: str, groups: Groups) -> str | None:
        """Hashes the order in which input features were grouped (act-order); None if unchanged.

        Args:
            suffix: The tensor with the group of each input feature; it may be missing.
            groups: The groups.

        Raises:
            CheckpointError: The tensor is not int32 [K], or does not put ``groups.size`` features
                into each group.
        """
        if suffix not in self.tensors:
            return None
        k, entry = self.shape[1], self.tensors[suffix]
        if entry.shape != (k,) or entry.dtype != "I32":
            raise self.error(
                suffix, f"has shape {list(entry.shape)} of {entry.dtype}, not [{k}] of I32"
            )
        group, consecutive = self.read(suffix), (torch.arange(k) // groups.size).int()
        if torch.equal(group, consecutive) or bool((group == -1).all()):
            return None
        outside = ((group < 0) | (group >= groups.n)).nonzero().flatten()
        if len(outside):
            at = int(outside[0])
            raise self.error(
                suffix, f"puts input feature {at} into group {int(group[at])} of {groups.n}"
            )
        if not torch.equal(group.sort().values, consecutive):
            raise self.error(
                suffix, f"does not put {groups.size} input features into each of {groups.n} groups"
            )
        return hash_permutation(sorted_features(group))

    def n_groups(self, suffix: str) -> int | None:
        """Returns the number of groups, by the claim or a tensor [G, ...]; None if unknown."""
        size, entry = self.claim.group_size, self.tensors.get(suffix)
        if size is not None:
            return 1 if size == -1 else -(-self.shape[1] // size)
        return entry.shape[0] if entry is not None and entry.shape else None


def sorted_features(group_K: Tensor) -> Tensor:
    """Sorts input features by their group: int32 [K], the feature of each column."""
    return group_K.argsort(stable=True).int()


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Groups of input features.

    Attributes:
        size: Input features of a group; the last group may have fewer.
        n: The number of groups.
        even: The size of the groups of the ``QTensor``, which all have the same size: the largest
            that divides ``size`` and the input features.
    """

    size: int
    n: int
    even: int

    @classmethod
    def of(cls, k: int, size: int) -> Groups:
        """Returns the groups of ``k`` input features."""
        size = min(size, k)
        return cls(size=size, n=-(-k // size), even=math.gcd(size, k))

    @property
    def features(self) -> int:
        """Input features for ``StoredPart.features``: those of a group; 0 if one group has all."""
        return 0 if self.n == 1 else self.size

    def expand(self, per_group: Tensor, k: int) -> Tensor:
        """Expands data of groups, [N, groups], to groups of ``even`` input features of ``k``."""
        return expand_blocks(
            per_group,
            rows=1,
            columns=self.size,
            group_size=self.even,
            shape=(len(per_group), k),
        )


@dataclass(frozen=True, kw_only=True)
class StoredPart:
    """A tensor that stores a matrix [N, K], or a part of it such as its scales.

    Attributes:
        shape: Its dimensions: output features, then input features.
        dtype: Its element type, as the checkpoint's format names it.
        features: The numbers of output and input features that an element covers; the last element
            may cover fewer. 0 along an axis on which the tensor does not depend.
        transposed: The dimensions are input features, then output features.
        block: Elements along the input features that are stored together, as whole bytes.
        is_whole: It is read as a whole, and so is the matrix.
    """

    shape: tuple[int, ...]
    dtype: str
    features: tuple[int, int] = (1, 1)
    transposed: bool = False
    block: int = 1
    is_whole: bool = False

    def granularity(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Returns the numbers of output and input features of [N, K] that must be read together."""
        if self.is_whole:
            return shape
        n, k = self.features
        return max(n, 1), max(k, 1) * self.block

    def index(self, rows: range, columns: range) -> tuple[slice, ...]:
        """Returns the slice of elements for output and input features.

        Args:
            rows: Output features, aligned to ``granularity``.
            columns: Input features, aligned to ``granularity``.
        """
        if self.is_whole:
            return ()
        axes = ((rows, self.features[0]), (columns, self.features[1]))
        return tuple(
            slice(axis.start // each, -(-axis.stop // each)) if each else slice(None)
            for axis, each in (axes[::-1] if self.transposed else axes)[: len(self.shape)]
        )


Decode = Callable[[Mapping[str, Tensor], tuple[int, int]], QTensor]
"""Decodes a matrix, or some of its rows and columns.

Args:
    parts: The same slice of each part, by name; blocks are bytes.
    shape: The shape of the slice.
"""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The encoding of one matrix.

    Attributes:
        parts: The tensors that must store it, by suffix.
        decode: Makes a ``QTensor`` from them.
        format: The number format of the ``QTensor``.
        k: Input features of the matrix.
        bits: Bits of a stored element.
        surplus: Redundant tensors that may exist, by suffix.
        detail: A variant of the encoding, for messages.
        assumption: An assumed property that neither tensors nor configuration determine, for
            messages.
    """

    parts: Mapping[str, StoredPart]
    decode: Decode
    format: KernelFormat
    k: int
    bits: int
    surplus: frozenset[str] = frozenset()
    detail: str = ""
    assumption: str = ""


@dataclass(frozen=True)
class Expected:
    """A tensor that an encoding needs.

    Attributes:
        dtype: Its element type; None if several are possible.
        shape: Its dimensions, each None if unknown; None if several shapes are possible.
    """

    dtype: str | None = None
    shape: tuple[int | None, ...] | None = None

    def fits(self, entry: StoredTensor) -> bool:
        """Returns whether a stored tensor has this type and shape."""
        if self.dtype not in (None, entry.dtype):
            return False
        if self.shape is None:
            return True
        return len(self.shape) == len(entry.shape) and all(
            ours in (None, theirs) for ours, theirs in zip(self.shape, entry.shape, strict=True)
        )

    def __str__(self) -> str:
        """Describes it, such as ``[8, 64] of I32``."""
        sizes = "" if self.shape is None else ", ".join(str(n or "any") for n in self.shape)
        words = (f"[{sizes}]" if self.shape is not None else "", self.dtype or "")
        return " of ".join(filter(None, words))


class Encoding(Protocol):
    """One way of storing a quantized matrix."""

    def expected(self, matrix: StoredMatrix) -> Mapping[str, Expected]:
        """Returns the tensors that the claimed format of a matrix would have in this encoding.

        Used only for the error message of a matrix that no encoding recognizes.

        Returns:
            The tensors by suffix, beginning with the one that identifies the encoding. Empty if the
            encoding contributes nothing to the message.
        """
        ...

    def recognize(self, matrix: StoredMatrix) -> Layout | None:
        """Returns how a matrix is stored; None if it is not in this encoding.

        Raises:
            CheckpointError: It is in this encoding, but its tensors contradict each other or the
                configuration.
        """
        ...


def load_encodings() -> dict[str, Encoding]:
    """Loads every registered encoding, by name, in the order of the registry."""
    return {name: resolve("encoding", ENCODINGS, name) for name in ENCODINGS}
