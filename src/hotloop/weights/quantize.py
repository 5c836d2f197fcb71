"""``hotloop quantize``: makes a quantized copy of a checkpoint, one tensor at a time.

The result is a self-contained folder: safetensors, ``config.json`` with a versioned description,
the tokenizer's files and the generation config. Loading it gives the same bits as quantizing on
load.

Matrices are stored in hotloop's own encoding (``quant.encodings.hotloop``), or as
compressed-tensors, which other engines read (``quant.compressed_tensors``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from hotloop.errors import ConfigError
from hotloop.models import names
from hotloop.printable import printable
from hotloop.quant import QTensor, compressed_tensors, parse_head_scheme, parse_scheme
from hotloop.quant.encodings.hotloop import Hotloop
from hotloop.text.generation_config import generation_defaults, write_generation_config
from hotloop.text.tokenizer import load_tokenizer
from hotloop.types import CopyFormat
from hotloop.weights.calibration import importance_for, read_tokens
from hotloop.weights.checkpoint import open_checkpoint, read_model
from hotloop.weights.identity import (
    DESCRIPTION_KEYS,
    QUANTIZATION_KEY,
    Quantization,
    SourceModel,
    read_quantization,
    sample_checkpoint,
)
from hotloop.weights.recognition import recognize_matrices
from hotloop.weights.source import (
    CheckpointSource,
    Request,
    is_calibrated,
    read_matrix,
    requantization_notes,
    schemes_by_name,
)
from hotloop.weights.writer import SafetensorsWriter, refuse_occupied
from hotloop.writing import write_json


def quantize_checkpoint(
    src: Path,
    dst: Path,
    *,
    quant: str,
    head: str = "auto",
    copy_format: CopyFormat = "hotloop",
    source_name: str | None = None,
    calibration: Path | None = None,
    progress: Callable[[int, int], None] = lambda _done, _of: None,
    on_note: Callable[[str], None] = lambda _: None,
) -> Path:
    """Quantizes ``src`` into the new folder ``dst``.

    Args:
        src: A folder of safetensors, or a GGUF file.
        dst: A folder that does not exist yet or is empty.
        quant: Scheme of the projections in blocks.
        head: Scheme of the head, and of a tied embedding. ``auto`` is none if ``quant`` is none and
            in compressed-tensors, and otherwise int8.
        copy_format: The format of the copy.
        source_name: The name of the source that the copy records; None takes the path.
        calibration: The text whose activations a calibrated scheme uses; None for random tokens.
        progress: Called with (steps done, steps in all): a tensor, or a layer run to calibrate.
        on_note: Called with notes on matrices that another tool has quantized.

    Returns:
        ``dst``.

    Raises:
        ConfigError: A scheme does not fit, changes nothing, or cannot be stored in the format; the
            source is already quantized; the destination is in use; or the text is too short or
            unreadable, or the scheme uses no text.
        CheckpointError: The source is damaged or incomplete; ``dst`` is then not made.
    """
    refuse_occupied(dst)
    scheme = parse_scheme(quant)
    if copy_format == "compressed-tensors" and head == "auto":
        head = "none"
    head_scheme = parse_head_scheme(head, scheme)
    if "auto" in (scheme.name, head_scheme.name):
        raise ConfigError("'auto' keeps what the source stores: give a scheme.")
    if scheme.name == head_scheme.name == "none":
        raise ConfigError("quant 'none' with head 'none' quantizes nothing: give a scheme.")
    if calibration is not None and not any(map(is_calibrated, (scheme, head_scheme))):
        raise ConfigError(
            f"quant {scheme.name!r} is not fitted to activations, so a calibration text changes "
            "nothing: leave it out, or give a scheme of int4 with -cal, such as int4-g64-cal."
        )
    encode = Hotloop.encode
    if copy_format == "compressed-tensors":
        compressed_tensors.refuse_unsupported(scheme, head_scheme)
        encode = compressed_tensors.encode
    checkpoint = open_checkpoint(src)
    try:
        src = checkpoint.path
        if stored := read_quantization(checkpoint.config, checkpoint.config_file):
            raise ConfigError(
                f"{src} is already quantized as {stored.scheme} with head {stored.head}."
            )
        model, _ = read_model(checkpoint)
        schemes = schemes_by_name(model, scheme, head_scheme)
        for note in requantization_notes(recognize_matrices(checkpoint, model), schemes):
            on_note(note)
        tokenizer, sampling = load_tokenizer(src), generation_defaults(src)
        cpu = torch.device("cpu")
        tensors = names.tensors(model)
        text, ids_BT = None, None
        if calibration is not None:
            text, ids_BT = read_tokens(calibration, tokenizer, model)
        importance = importance_for(
            schemes,
            checkpoint,
            model,
            cpu,
            ids_BT=ids_BT,
            on_layer=lambda done, of: progress(done, of + len(tensors)),
        )
        if text is not None and importance is None:
            raise ConfigError(
                f"{src} stores every matrix that {scheme.name!r} would quantize in its format "
                "already, so a calibration text changes nothing: leave it out."
            )
        n_run = 0 if importance is None else len(model.layers)
        source = CheckpointSource(checkpoint, cpu, model=model, importance=importance)
        with SafetensorsWriter(dst) as writer:
            for i, (name, shape) in enumerate(tensors.items(), start=1):
                matrix = name.removesuffix(".weight")
                if matrix in schemes:
                    request = Request(
                        name=matrix, shape=(shape[0], shape[1]), scheme=schemes[matrix]
                    )
                    weight = read_matrix(source, request)
                else:
                    weight = source.tensor(name, shape)
                if isinstance(weight, QTensor):
                    parts = {f"{matrix}{part}": t for part, t in encode(weight).items()}
                else:
                    parts = {name: weight}
                for part, tensor in parts.items():
                    writer.add(part, tensor)
                progress(n_run + i, n_run + len(tensors))
            source.finish()
            description = Quantization(
                scheme=scheme.name,
                head=head_scheme.name,
                source=SourceModel(
                    name=printable(source_name or str(src)), sample=sample_checkpoint(src)
                ),
                calibration=text,
            )
            # The source's description of its quantization does not hold for the copy.
            kept = checkpoint.config.keys() - DESCRIPTION_KEYS
            config = {key: checkpoint.config[key] for key in checkpoint.config if key in kept} | {
                "tie_word_embeddings": model.tie_embeddings,
                QUANTIZATION_KEY: description.model_dump(exclude_none=True),
            }
            if copy_format == "compressed-tensors":
                config |= compressed_tensors.describe(scheme, ignore=[names.HEAD])
            write_json(writer.staging / "config.json", config)
            write_generation_config(writer.staging, sampling=sampling)
            tokenizer.save(writer.staging)
    finally:
        checkpoint.close()
    return dst
