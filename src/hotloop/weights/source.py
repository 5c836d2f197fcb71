"""Where the weights of a model come from, one matrix at a time.

Three sources, one interface: a checkpoint whose matrices are quantized as they are read, a
checkpoint that ``hotloop quantize`` wrote, and random weights for which only the shape is needed.

A quantized matrix ``x.weight`` is stored as ``x.weight.values`` (8 bits: int8 [N, K]; 4 bits:
uint8 [N, K/2], even columns in the low nibble, each plus 8), ``x.weight.scale`` and, where the
scheme has them, ``x.weight.offset`` [N, G].
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hotloop.errors import CheckpointError
from hotloop.quant import QTensor, Scheme
from hotloop.weights.checkpoint import Checkpoint, check_finite

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
        if f"{name}.weight.values" in self.checkpoint.tensors:
            return self._quantized(f"{name}.weight", shape)
        return scheme.quantize(self.tensor(f"{name}.weight", shape).to(self.device))

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Reads a tensor in the type it is stored in."""
        info = self.checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(
                self.checkpoint.path,
                "missing from the checkpoint, though the model's configuration calls for it",
                tensor=name,
            )
        if info.shape != shape:
            raise CheckpointError(
                info.file,
                f"has shape {list(info.shape)} where the model's configuration calls for "
                f"{list(shape)}",
                tensor=name,
            )
        self.used.add(name)
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

    def _quantized(self, name: str, shape: tuple[int, int]) -> QTensor:
        n, k = shape
        stored = self.checkpoint.tensors[f"{name}.values"]
        bits = 4 if stored.dtype == "U8" else 8
        values = self.tensor(f"{name}.values", (n, k // 2 if bits == 4 else k))
        groups = self.checkpoint.tensors.get(f"{name}.scale")
        scale = self.tensor(f"{name}.scale", (n, groups.shape[1] if groups else 1))
        offset = None
        if f"{name}.offset" in self.checkpoint.tensors:
            offset = self.tensor(f"{name}.offset", tuple(scale.shape))
        if bits == 4:
            values = torch.stack((values & 15, values >> 4), dim=-1).view(n, k).to(torch.int8) - 8
        return QTensor(values=values, scale=scale, offset=offset, bits=bits)


def stored_parts(name: str, weight: QTensor) -> dict[str, Tensor]:
    """The tensors that a quantized ``name`` is stored as; ``CheckpointSource`` reads them back."""
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
        self.like = torch.empty(0, dtype=dtype, device=device)
        torch.manual_seed(seed)

    def matrix(self, name: str, shape: tuple[int, int], scheme: Scheme) -> Tensor | QTensor:
        """Random integers or floating-point numbers of about the usual size."""
        scheme.check(name, *shape)
        return scheme.random(*shape, std=INITIAL_STD, like=self.like)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Random numbers for a table, ones for a norm, zeros for a bias."""
        if len(shape) == 2:
            return self.like.new_empty(shape).normal_(0, INITIAL_STD)
        return self.like.new_full(shape, 0.0 if name.endswith(".bias") else 1.0)

    def finish(self) -> None:
        """Nothing can be left over."""
