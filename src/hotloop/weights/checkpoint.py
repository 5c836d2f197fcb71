"""Opens a checkpoint of any format, as names, shapes and readable tensors.

A checkpoint is described by Hugging Face's keys of ``config.json`` and names of tensors; GGUF files
are translated into these. ``weights.load`` knows the purpose of each tensor.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hotloop.errors import CheckpointError, UnsupportedError, shorten, shorten_value
from hotloop.gguf_header import is_gguf
from hotloop.models import names
from hotloop.models.config import ModelConfig
from hotloop.models.families import read_config
from hotloop.untrusted import file_kind
from hotloop.weights.gguf import GGUFCheckpoint
from hotloop.weights.identity import StoredForm, StoredType, read_quantization
from hotloop.weights.safetensors import SafetensorsCheckpoint
from hotloop.weights.tensor_file import TensorInfo, row_chunks

__all__ = [
    "Checkpoint",
    "TensorInfo",
    "check_finite",
    "open_checkpoint",
    "read_model",
    "stored_form",
    "wrong_shape",
]


class Checkpoint(Protocol):
    """A model on disk. Headers are checked on opening; tensors are read one at a time.

    Attributes:
        path: The folder or the ``.gguf`` file.
        config: The keys of Hugging Face's ``config.json``; composed from the metadata of a GGUF.
        config_file: The file of these keys.
        tensors: Every tensor by its Hugging Face name.
        quantization_config: The place of the description that a quantizer wrote, for errors, and
            its keys; None if there is none.
    """

    path: Path
    config: dict[str, Any]
    config_file: Path
    tensors: Mapping[str, TensorInfo]
    quantization_config: tuple[str, Mapping[str, Any]] | None

    def read(
        self,
        name: str,
        index: tuple[slice, ...] = (),
        *,
        encoded: bool = False,
        pinned: bool = False,
    ) -> Tensor:
        """Reads one tensor on the CPU, into memory of its own, cut to ``index`` (steps of 1).

        With ``pinned`` that memory is page-locked, so a GPU can copy from it asynchronously.

        Safetensors keep their stored type. GGUF's F32, F16 and BF16 keep theirs, and its block
        formats come dequantized to float32 or, with ``encoded``, as the bytes of whole blocks.

        Reading takes memory for the result and a chunk of 8 MiB (for block formats some 50 MiB).
        Files are not memory-mapped.

        Raises:
            CheckpointError: The file contradicts its header.
        """
        ...

    def close(self) -> None:
        """Closes the files."""
        ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a folder of safetensors, by its own path or that of a file in it, or a GGUF file.

    GGUF files are recognized by their first bytes, whatever their name.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged; the message names file and
            tensor.
        UnsupportedError: It is not damaged, but not supported: it has pickles, or an architecture,
            element type or metadata key of GGUF that is not implemented.
    """
    if file_kind(path) == "folder":
        return SafetensorsCheckpoint(path)
    if is_gguf(path):
        return GGUFCheckpoint(path)
    if path.suffix == ".safetensors":
        return SafetensorsCheckpoint(path.parent)
    raise UnsupportedError(
        f"{shorten(str(path))} is not a readable checkpoint: give a folder with config.json "
        "and safetensors, or a GGUF file. Pickles (.bin, .pt) are never loaded."
    )


def stored_form(checkpoint: Checkpoint) -> StoredForm:
    """Returns the stored types of a checkpoint, and the model from which it was quantized.

    Raises:
        UnsupportedError: A later version of hotloop quantized it.
        ConfigError: Its description of the quantization is damaged.
    """
    counts, sizes = Counter[str](), Counter[str]()
    described = checkpoint.quantization_config
    method = described[1].get("quant_method") if described else None
    for tensor in checkpoint.tensors.values():
        counts[tensor.dtype] += 1
        sizes[tensor.dtype] += tensor.n_bytes
    return StoredForm(
        types=tuple(
            StoredType(dtype=dtype, n_tensors=counts[dtype], n_bytes=n_bytes)
            for dtype, n_bytes in sizes.most_common()
        ),
        quantization=read_quantization(checkpoint.config, checkpoint.config_file),
        method=shorten(method, 40) if isinstance(method, str) else None,
    )


def read_model(checkpoint: Checkpoint) -> tuple[ModelConfig, tuple[str, ...]]:
    """Returns the configuration of a checkpoint's model, checked against its tensors.

    Sizes are compared with the tensors before anything is built from them. Two switches follow the
    tensors, as in transformers: a separate head is used even if the configuration ties it to the
    embedding, and a missing bias of the output projection is left out.

    Returns:
        The configuration, and a note for each switch in which the tensors override it.

    Raises:
        UnsupportedError: An architecture, key or value is not implemented.
        ConfigError: A value is invalid.
        CheckpointError: Sizes contradict those of the tensors.
    """
    model = read_config(checkpoint.config, checkpoint.config_file)
    _check_sizes(model, checkpoint)
    notes = []
    if model.tie_embeddings and not _is_tied(checkpoint):
        model = dataclasses.replace(model, tie_embeddings=False)
        notes.append(
            f"{names.HEAD}.weight is not the embedding: it is used as the head, although "
            "tie_word_embeddings is true."
        )
    model, unbiased = names.without_absent_biases(model, checkpoint.tensors)
    if unbiased is not None:
        notes.append(f"{unbiased} has no bias, although attention_bias is true.")
    return model, tuple(notes)


def _check_sizes(model: ModelConfig, checkpoint: Checkpoint) -> None:
    """Refuses missing layers, and tensors whose shapes contradict the model."""
    first_norm = model.layers[-1].norms[0].part
    last = f"{names.layer(model.n_layers - 1, first_norm)}.weight"
    if last not in checkpoint.tensors:
        found = len({names.layer_index(name) for name in checkpoint.tensors} - {None})
        raise CheckpointError(
            checkpoint.config_file,
            f"num_hidden_layers (block_count in GGUF) is {model.n_layers}, and the checkpoint has "
            f"{found} layers: {shorten_value(last)} is missing",
        )
    for name, shape in names.tensors(model).items():
        info = checkpoint.tensors.get(name)
        if info is not None and info.shape != shape and not _is_integer(info.dtype):
            raise wrong_shape(info, shape)


def _is_integer(dtype: str) -> bool:
    """Returns whether elements are integers, for which an encoding may use another shape."""
    return dtype[0] in "IU" and dtype[1:].isdigit()


def wrong_shape(
    info: TensorInfo, shape: tuple[int, ...], dtype: str | None = None
) -> CheckpointError:
    """Makes the error of a tensor whose shape or type contradicts the model."""
    asking = "its encoding" if dtype else "the model's configuration"
    return CheckpointError(
        info.file,
        f"has shape {list(info.shape)} of {info.dtype} where {asking} calls for "
        f"{list(shape)}{f' of {dtype}' if dtype else ''}",
        tensor=info.name,
    )


def _is_tied(checkpoint: Checkpoint) -> bool:
    """Returns whether the head is the embedding: it is missing, or equal to the embedding."""
    head, embedding = (
        checkpoint.tensors.get(f"{name}.weight") for name in (names.HEAD, names.EMBEDDING)
    )
    if head is None:  # it may be there in an encoding
        return not any(name.startswith(f"{names.HEAD}.") for name in checkpoint.tensors)
    if embedding is None:
        return True
    if head.shape != embedding.shape:
        return False
    row_bytes = max(head.n_bytes, embedding.n_bytes) // max(head.shape[0], 1)
    for rows in row_chunks(range(head.shape[0]), row_bytes):
        index = (slice(rows.start, rows.stop),)
        ours, theirs = (checkpoint.read(info.name, index) for info in (head, embedding))
        if not torch.equal(ours, theirs):
            return False
    return True


def check_finite(
    tensor: Tensor,
    info: TensorInfo,
    *,
    dtype: torch.dtype = torch.float32,
    margin: float = 1.0,
    first: tuple[int, ...] = (),
) -> None:
    """Refuses NaN and infinite weights, in one pass over the tensor that allocates nothing.

    Args:
        tensor: The tensor, or a part of it.
        info: Its entry, for the message.
        dtype: The type to which it is converted; it must be finite in that type too.
        margin: The largest factor that quantizing applies to a weight.
        first: The index at which ``tensor`` begins in the whole tensor, for the message.

    Raises:
        CheckpointError: An element is not finite; the message names the place of the first one.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # The smallest and the largest element are finite only if all are: NaN wins every comparison.
    comparable = tensor if tensor.itemsize > 1 else tensor.to(torch.bfloat16)
    ends = torch.stack(torch.aminmax(comparable)).double()
    if bool(torch.isfinite((ends * margin).to(dtype)).all()):
        return
    finite = torch.isfinite(comparable)
    if finite.all():
        largest = ends[ends.abs().argmax()].item()
        name = str(dtype).removeprefix("torch.")
        problem = f"holds {largest:.4g}, which is too large for {name}"
        raise CheckpointError(
            info.file,
            f"{problem}: choose another dtype" if margin == 1 else f"{problem} when quantized",
            tensor=info.name,
        )
    bad = finite.logical_not().nonzero()
    place = bad[0].tolist()
    place = [at + begin for at, begin in zip_longest(place, first, fillvalue=0)]
    raise CheckpointError(
        info.file,
        f"{len(bad)} of {tensor.numel()} elements read are NaN or infinite, the first at "
        f"{place}: the checkpoint is damaged",
        tensor=info.name,
    )
