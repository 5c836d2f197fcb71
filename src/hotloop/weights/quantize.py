"""``hotloop quantize``: a checkpoint in, a quantized checkpoint out, one tensor at a time.

The result is a folder that stands alone: safetensors (``weights.source`` says how a quantized
matrix is stored), ``config.json`` with a versioned description, and the tokenizer's files. Loading
it gives bit for bit what quantizing on load gives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hotloop.errors import ConfigError, UnsupportedError
from hotloop.models import names
from hotloop.models.families import read_config
from hotloop.quant import QTensor, parse_scheme
from hotloop.text.tokenizer import load_tokenizer
from hotloop.weights.checkpoint import open_checkpoint
from hotloop.weights.source import CheckpointSource, stored_parts
from hotloop.weights.writer import SafetensorsWriter

DESCRIPTION = "hotloop_quantization"
VERSION = 1


def stored_schemes(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Names of the schemes of projections and head, if ``config.json`` is of a quantized model.

    Raises:
        UnsupportedError: Written by a later version.
    """
    description = config.get(DESCRIPTION)
    if description is None:
        return None
    if description["version"] != VERSION:
        raise UnsupportedError(
            f"the checkpoint is quantized in format {description['version']}; this hotloop reads "
            f"format {VERSION}. Update hotloop, or quantize again."
        )
    return description["scheme"], description["head"]


def quantize_checkpoint(
    src: Path,
    dst: Path,
    *,
    quant: str,
    head: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Quantizes ``src`` into the new folder ``dst``.

    Args:
        src: A folder of safetensors, or a GGUF file.
        dst: A folder that does not exist yet or is empty.
        quant: Scheme of the projections in blocks.
        head: Scheme of the head; ``auto`` is int8. A tied embedding is the same matrix.
        progress: Called with (tensors done, tensors in all).

    Returns:
        ``dst``.

    Raises:
        ConfigError: A scheme that does not fit, or a source that is already quantized.
        CheckpointError: A damaged source; ``dst`` is then not made.
    """
    scheme = parse_scheme(quant)
    head_scheme = parse_scheme("int8" if head == "auto" else head)
    checkpoint = open_checkpoint(src)
    try:
        if stored := stored_schemes(checkpoint.config):
            raise ConfigError(f"{src} is already quantized as {stored[0]} with head {stored[1]}.")
        model = read_config(checkpoint.config)
        schemes = dict.fromkeys(names.linear_weights(model), scheme)
        schemes[names.head(model)] = head_scheme
        shapes = names.tensors(model)
        for name, each in schemes.items():
            each.check(name, *shapes[f"{name}.weight"])
        tokenizer, sampling = load_tokenizer(src), generation_defaults(src)
        source = CheckpointSource(checkpoint, torch.device("cpu"), ignored=names.redundant(model))
        with SafetensorsWriter(dst) as writer:
            for i, (name, shape) in enumerate(shapes.items(), start=1):
                matrix = name.removesuffix(".weight")
                if matrix in schemes:
                    weight = source.matrix(matrix, shape, schemes[matrix])
                else:
                    weight = source.tensor(name, shape)
                for part, tensor in stored_parts(name, weight).items():
                    writer.add(part, tensor)
                if progress:
                    progress(i, len(shapes))
            source.finish()
            description = {"version": VERSION, "scheme": scheme.name, "head": head_scheme.name}
            config = checkpoint.config | {DESCRIPTION: description}
            (writer.staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            write_generation_config(writer.staging, sampling=sampling)
            tokenizer.save(writer.staging)
    finally:
        checkpoint.close()
    return dst
