"""Where the weights of a model come from, one matrix at a time.

Three sources, one interface: a checkpoint whose matrices are quantized as they are read, a few
rows at a time, a checkpoint that ``hotloop quantize`` wrote, and random weights for which only the
shape is needed.

A quantized matrix ``x.weight`` is stored as ``x.weight.values`` (8 bits: int8 [N, K]; 4 bits:
uint8 [N, K/2], even columns in the low nibble, each plus 8), ``x.weight.scale`` and, where the
scheme has them, ``x.weight.offset`` [N, G].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from hotloop.errors import CheckpointError
from hotloop.kernels.linear import WeightFormat
from hotloop.quant import QTensor, Scheme, join_rows
from hotloop.weights.checkpoint import Checkpoint, TensorInfo, check_finite
from hotloop.weights.tensor_file import row_chunks

INITIAL_STD = 0.02
"""Standard deviation of random weights: what transformers are commonly initialized with."""


class Source(Protocol):
    """Gives out weights by their Hugging Face names, without ``.weight``."""

    def matrix(self, name: str, shape: tuple[int, int], scheme: Scheme) -> Tensor | QTensor:
        """A weight matrix under ``scheme``, checked for its shape and for finite values."""
        ...

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """An unquantized tensor by its full name."""
        ...

    def finish(self) -> None:
        """Called when the model is whole; a checkpoint with tensors left over is refused."""
        ...


class CheckpointSource:
    """Reads a checkpoint, quantizing what is not quantized yet.

    Args:
        checkpoint: The open checkpoint.
        device: Where matrices are quantized: on a GPU it is faster than on the host.
        ignored: Names of tensors that may be in the checkpoint without being used.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, ignored: frozenset[str] = frozenset()
    ) -> None:
        self.checkpoint, self.device, self.ignored = checkpoint, device, ignored
        self.used: set[str] = set()

    def matrix(self, name: str, shape: tuple[int, int], scheme: Scheme) -> Tensor | QTensor:
        """Reads ``name.weight``, or its quantized parts where those are stored."""
        scheme.check(name, *shape)
        n, k = shape
        wide = torch.float32  # in which schemes quantize
        pieces = row_chunks(range(n), k * wide.itemsize)
        form = scheme.format(n, k, dtype=wide, device=self.device.type)
        if form.bits and f"{name}.weight.values" in self.checkpoint.tensors:
            stored = self._expect_quantized(f"{name}.weight", form)
            return join_rows((self._read_quantized(stored, rows) for rows in pieces), n)
        info = self._expect(f"{name}.weight", shape)
        return join_rows((scheme.quantize(self._read(info, rows)) for rows in pieces), n)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Reads a tensor in the type it is stored in."""
        info = self._expect(name, shape)
        tensor = self.checkpoint.read(name)
        check_finite(tensor, info)
        return tensor

    def finish(self) -> None:
        """Refuses a checkpoint with tensors that the model does not have."""
        surplus = self.checkpoint.tensors.keys() - self.used - self.ignored
        surplus = {name for name in surplus if not name.endswith("rotary_emb.inv_freq")}
        if surplus:
            first = min(surplus)
            raise CheckpointError(
                self.checkpoint.tensors[first].file,
                f"not a part of the model that config.json describes ({len(surplus)} such "
                "tensors in all): the checkpoint is of another architecture",
                tensor=first,
            )

    def _expect(self, name: str, shape: tuple[int, ...], dtype: str | None = None) -> TensorInfo:
        info = self.checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(
                self.checkpoint.path,
                "missing from the checkpoint, though the model's configuration calls for it",
                tensor=name,
            )
        if info.shape != shape or dtype not in (None, info.dtype):
            raise CheckpointError(
                info.file,
                f"has shape {list(info.shape)} of {info.dtype} where the model's configuration "
                f"calls for {list(shape)}{f' of {dtype}' if dtype else ''}",
                tensor=name,
            )
        self.used.add(name)
        return info

    def _read(self, info: TensorInfo, rows: range) -> Tensor:
        tensor = self.checkpoint.read(info.name, (slice(rows.start, rows.stop),))
        check_finite(tensor, info, first_row=rows.start)
        return tensor.to(self.device)

    def _expect_quantized(self, name: str, form: WeightFormat) -> dict[str, TensorInfo]:
        """The parts of a quantized matrix, each as its scheme would have stored it."""
        four = form.bits == 4
        scales = ((form.n, form.n_scales // form.n), "BF16" if four else "F32")
        parts = {
            "values": ((form.n, form.k // 2 if four else form.k), "U8" if four else "I8"),
            "scale": scales,
        }
        if not form.symmetric:
            parts["offset"] = scales
        return {part: self._expect(f"{name}.{part}", *parts[part]) for part in parts}

    def _read_quantized(self, stored: Mapping[str, TensorInfo], rows: range) -> QTensor:
        parts = {part: self._read(info, rows) for part, info in stored.items()}
        values, bits = parts["values"], 8
        if values.dtype == torch.uint8:  # two of four bits each
            nibbles = torch.stack((values & 15, values >> 4), dim=-1)
            values, bits = nibbles.flatten(1).to(torch.int8) - 8, 4
        return QTensor(values=values, scale=parts["scale"], offset=parts.get("offset"), bits=bits)


def stored_parts(name: str, weight: Tensor | QTensor) -> dict[str, Tensor]:
    """The tensors that ``name`` is stored as; ``CheckpointSource`` reads them back."""
    if isinstance(weight, Tensor):
        return {name: weight}
    values = weight.values
    if weight.bits == 4:
        nibbles = (values + 8).to(torch.uint8)
        values = nibbles[:, ::2] | (nibbles[:, 1::2] << 4)
    parts = {f"{name}.values": values, f"{name}.scale": weight.scale}
    return parts if weight.offset is None else parts | {f"{name}.offset": weight.offset}


class RandomSource:
    """Random weights made on the device, directly in quantized form.

    Norms are ones and biases zeros, so that activations keep their size through the layers.
    """

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def matrix(self, name: str, shape: tuple[int, int], scheme: Scheme) -> Tensor | QTensor:
        """Random integers or floating-point numbers of about the usual size."""
        scheme.check(name, *shape)
        return scheme.random(*shape, std=INITIAL_STD, dtype=self.dtype, generator=self.generator)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Random numbers for a table, ones for a norm, zeros for a bias."""
        tensor = torch.empty(shape, dtype=self.dtype, device=self.generator.device)
        if len(shape) == 2:
            return tensor.normal_(0, INITIAL_STD, generator=self.generator)
        return tensor.fill_(0.0 if name.endswith(".bias") else 1.0)

    def finish(self) -> None:
        """Nothing can be left over."""
