"""Opening a checkpoint, of whichever format, as names, shapes and tensors that can be read.

A checkpoint is described in Hugging Face's words: the keys of ``config.json`` and the names of
tensors, which GGUF files are translated to. What a tensor is for, and what becomes of it, is for
``weights.load``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hotloop.errors import CheckpointError, UnsupportedError, shorten
from hotloop.gguf_header import is_gguf
from hotloop.outside import file_kind
from hotloop.weights.gguf import GGUFCheckpoint
from hotloop.weights.identity import StoredForm, StoredType, read_quantization
from hotloop.weights.safetensors import SafetensorsCheckpoint
from hotloop.weights.tensor_file import TensorInfo

__all__ = ["Checkpoint", "TensorInfo", "check_finite", "open_checkpoint", "stored_form"]


class Checkpoint(Protocol):
    """A model on disk. Headers are checked on opening; tensors are read one at a time.

    Attributes:
        path: The folder or the ``.gguf`` file.
        config: The keys of Hugging Face's ``config.json``; composed from the metadata of a GGUF.
        config_file: The file that they were read from.
        tensors: Every tensor by its Hugging Face name.
    """

    path: Path
    config: dict[str, Any]
    config_file: Path
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """One tensor on the CPU, in memory of its own, cut to ``index`` (steps of 1).

        Safetensors keep their stored type. GGUF's F32, F16 and BF16 keep theirs, and its block
        formats come dequantized to float32.

        Held at a time are the result and a chunk of 8 MiB (for block formats some 50 MiB), and
        nothing afterwards: files are not memory-mapped.

        Raises:
            CheckpointError: The file is not what its header said.
        """
        ...

    def close(self) -> None:
        """Closes the files."""
        ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a folder of safetensors, by its own path or that of a file in it, or a GGUF file.

    GGUF files are told by their first bytes, whatever their name.

    Raises:
        CheckpointError: Nothing is there, or it is damaged; the message names file and tensor.
        UnsupportedError: Sound, but of a kind that is not read: pickles, or an architecture,
            element type or metadata key of GGUF that is not implemented.
    """
    if file_kind(path) == "folder":
        return SafetensorsCheckpoint(path)
    if is_gguf(path):
        return GGUFCheckpoint(path)
    if path.suffix == ".safetensors":
        return SafetensorsCheckpoint(path.parent)
    raise UnsupportedError(
        f"{shorten(str(path))} is no checkpoint that can be read: give a folder with config.json "
        "and safetensors, or a GGUF file. Pickles (.bin, .pt) are never loaded."
    )


def stored_form(checkpoint: Checkpoint) -> StoredForm:
    """The types that a checkpoint stores, and what it was quantized from.

    Raises:
        UnsupportedError: Quantized by a later version of hotloop.
        ConfigError: Its description of that is damaged.
    """
    counts, sizes = Counter[str](), Counter[str]()
    for tensor in checkpoint.tensors.values():
        counts[tensor.dtype] += 1
        sizes[tensor.dtype] += tensor.n_bytes
    return StoredForm(
        types=tuple(
            StoredType(dtype=dtype, n_tensors=counts[dtype], n_bytes=n_bytes)
            for dtype, n_bytes in sizes.most_common()
        ),
        quantization=read_quantization(checkpoint.config, checkpoint.config_file),
    )


def check_finite(
    tensor: Tensor, info: TensorInfo, *, first_row: int = 0, first_column: int = 0
) -> None:
    """Refuses NaN and infinite weights, in one pass over the tensor that allocates nothing.

    Args:
        tensor: What was read of the tensor, whole or in part.
        info: Its entry, for the message.
        first_row: The row of the tensor at which ``tensor`` begins, for the message.
        first_column: Its column, likewise.

    Raises:
        CheckpointError: An element is not finite; the first one's place is named.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # The smallest and the largest element are finite only if all are: NaN wins every comparison.
    comparable = tensor if tensor.itemsize > 1 else tensor.to(torch.bfloat16)
    if all(bool(torch.isfinite(end)) for end in torch.aminmax(comparable)):
        return
    bad = torch.isfinite(comparable).logical_not().nonzero()
    place = bad[0].tolist()
    for dim, first in enumerate((first_row, first_column)[: len(place)]):
        place[dim] += first
    raise CheckpointError(
        info.file,
        f"{len(bad)} of {tensor.numel()} elements read are NaN or infinite, the first at "
        f"{place}: the checkpoint is damaged",
        tensor=info.name,
    )
