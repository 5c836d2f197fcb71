"""Reads GGUF files, under Hugging Face's names.

Module :mod:`hotloop.gguf_header` reads the header, and :mod:`hotloop.quant.encodings.gguf` decodes
block formats. This module translates the metadata to the keys of ``config.json`` (with
``gguf_config``), the names of tensors, and the order of the rows of the query and key projections
of ``llama`` files: RoPE rotates the elements of a head in pairs; Hugging Face pairs element ``i``
of D with ``i + D/2``, and these files store the two elements of a pair side by side.

An unknown tensor or block format is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from hotloop.errors import CheckpointError, UnsupportedError, shorten, shorten_value
from hotloop.gguf_header import GGUFHeader, GGUFTensor, model_parts, read_gguf_header
from hotloop.models import names
from hotloop.models.config import Norm, Part
from hotloop.quant.encodings import ENCODINGS
from hotloop.quant.encodings.gguf import BLOCKS
from hotloop.registry import resolve
from hotloop.weights.gguf_config import config_from_metadata
from hotloop.weights.tensor_file import (
    TensorFile,
    TensorInfo,
    index_ranges,
    reading_threads,
    row_chunks,
)

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PREFIX = "gguf-"
_BLOCK_FORMATS = tuple(
    name.removeprefix(_PREFIX).upper() for name in ENCODINGS if name.startswith(_PREFIX)
)
_TYPES = {t.value: t for t in map(GGMLQuantizationType.__getitem__, (*_FLOATS, *_BLOCK_FORMATS))}

_ROPE_FREQS = "rope_freqs.weight"
_FACTORS = (_ROPE_FREQS, "rope_factors_short.weight", "rope_factors_long.weight")

_TENSOR_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<what>\w+)\.(?P<kind>weight|bias)")


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A tensor as a matrix of rows; a tensor of one dimension is a single column.

    Each head has ``head_rows`` rows, of which the first ``rotated_rows`` are stored in the order of
    ``llama`` files. Where no rows have to be reordered, these are 1 and 0.
    """

    info: TensorInfo
    file: TensorFile
    type: GGMLQuantizationType
    offset: int
    head_rows: int = 1
    rotated_rows: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the tensor that reading returns."""
        return _FLOATS.get(self.type.name, torch.float32)

    @property
    def n_columns(self) -> int:
        return self.info.shape[1] if len(self.info.shape) == 2 else 1

    @property
    def block(self) -> tuple[int, int]:
        """Elements of a block, and the bytes that they take."""
        return GGML_QUANT_SIZES[self.type]

    @property
    def row_bytes(self) -> int:
        elements, n_bytes = self.block
        return self.n_columns // elements * n_bytes


class GGUFCheckpoint:
    """A GGUF file, or the parts of a split one; see :class:`hotloop.weights.checkpoint.Checkpoint`.

    A model in parts (``name-00001-of-00003.gguf``) can be named by any part. All parts must exist,
    and ``path`` is the first, which holds the metadata.

    Attributes:
        metadata: The file's keys and values, including those of the tokenizer.
    """

    def __init__(self, path: Path) -> None:
        headers = _read_parts(path)
        self.path = self.config_file = headers[0].path
        self.metadata: dict[str, Any] = headers[0].metadata
        self.config: dict[str, Any] = config_from_metadata(self.metadata, self.path)
        self.quantization_config = None
        with ExitStack() as opened:
            entries: dict[str, _Entry] = {}
            threads = opened.enter_context(reading_threads())
            for header in headers:
                file = opened.enter_context(closing(TensorFile(header.path, threads)))
                for entry in _read_entries(header, file, self.config):
                    name = entry.info.name
                    if name in entries:
                        other = entries[name].info.file.name
                        raise CheckpointError(header.path, f"is in {other} too", tensor=name)
                    entries[name] = entry
            self._apply_rope_factors({name: entries.pop(name, None) for name in _FACTORS})
            self.config |= _config_from_tensors(entries, self.config["model_type"], self.path)
            self._opened = opened.pop_all()
        self._entries = entries
        self.tensors: Mapping[str, TensorInfo] = {n: e.info for n, e in entries.items()}

    def _apply_rope_factors(self, tensors: Mapping[str, _Entry | None]) -> None:
        """Reads the divisors of rotary frequencies, of Llama 3 or LongRoPE, as LongRoPE's."""
        given = {name: self._factors(name, entry) for name, entry in tensors.items() if entry}
        scaling = self.config["rope_scaling"]
        kind = scaling["rope_type"] if scaling else "none"
        if kind == "longrope":
            for key in ("short", "long"):
                name = f"rope_factors_{key}.weight"
                if name not in given:
                    raise CheckpointError(
                        self.path, "missing, though rope.scaling.type is longrope", tensor=name
                    )
                scaling[f"{key}_factor"] = given.pop(name)
        elif kind == "none" and (factors := given.pop(_ROPE_FREQS, None)):
            self.config["rope_scaling"] = {
                "rope_type": "longrope",
                "original_max_position_embeddings": self.config["max_position_embeddings"],
                "attention_factor": 1.0,
                "short_factor": factors,
                "long_factor": factors,
            }
        for name in given:
            raise UnsupportedError(
                f"{shorten(str(self.path))}: {name} together with the rope scaling {kind!r} is not "
                "supported."
            )

    def _factors(self, name: str, entry: _Entry) -> list[float]:
        rotated = round(self.config["head_dim"] * self.config.get("partial_rotary_factor", 1.0))
        if entry.info.shape != (rotated // 2,):
            raise CheckpointError(
                entry.info.file,
                f"has the shape {entry.info.shape}, but {rotated // 2} frequencies need a "
                "divisor each",
                tensor=name,
            )
        factors = _read(entry).float().tolist()
        for factor in factors:
            if not 1e-3 <= factor <= 1e38:
                raise CheckpointError(
                    entry.info.file, f"divides a frequency by {factor}", tensor=name
                )
        return factors

    def read(
        self,
        name: str,
        index: tuple[slice, ...] = (),
        *,
        encoded: bool = False,
        pinned: bool = False,
    ) -> Tensor:
        """Reads one tensor, or a slice of it, into memory of its own.

        F32, F16 and BF16 keep their type. Block formats are dequantized to float32, a chunk at a
        time; with ``encoded`` they are returned as uint8 bytes of whole blocks. Only the rows of
        ``index`` are read; if rows are reordered, all rows of the affected heads; and if rows are
        long, only the columns of ``index``, extended to whole blocks.
        """
        return _read(self._entries[name], index, encoded=encoded, pinned=pinned)

    def close(self) -> None:
        """Closes the files; nothing can be read afterwards."""
        self._opened.close()


def _config_from_tensors(
    entries: Mapping[str, _Entry], model_type: str, path: Path
) -> dict[str, Any]:
    """Returns the keys of ``config.json`` that the metadata does not contain."""
    embedding = entries.get("model.embed_tokens.weight")
    if embedding is None:
        raise CheckpointError(path, "is missing", tensor="token_embd.weight")
    config = {
        "vocab_size": embedding.info.shape[0],
        "tie_word_embeddings": "lm_head.weight" not in entries,
        "torch_dtype": str(embedding.dtype).removeprefix("torch."),
    }
    if model_type in ("llama", "qwen3"):
        config["attention_bias"] = _translate_name("blk.0.attn_q.bias")[0] in entries
    if model_type == "llama":
        config["mlp_bias"] = _translate_name("blk.0.ffn_up.bias")[0] in entries
    return config


def _read_parts(path: Path) -> list[GGUFHeader]:
    """Returns the headers of all files of the model of ``path``, in order."""
    paths = model_parts(path)
    count = len(paths)
    headers: list[GGUFHeader] = []
    for number, part in enumerate(paths):
        if not part.is_file():
            raise CheckpointError(path, f"is one of {count} parts, but {part.name} is missing")
        header = read_gguf_header(part)
        of = header.metadata.get("split.count", count) or 1  # 0 means that it was never split
        at = header.metadata.get("split.no", number)
        if (at, of) != (number, count):
            raise CheckpointError(
                part,
                f"has split.no {shorten_value(at)} (the first is 0) and split.count "
                f"{shorten_value(of)}, which contradict its name: the parts of a model must keep "
                "their original names, NAME-00001-of-00003.gguf",
            )
        headers.append(header)
    n_tensors = sum(len(header.tensors) for header in headers)
    promised = headers[0].metadata.get("split.tensors.count") or n_tensors
    if promised != n_tensors:
        raise CheckpointError(path, f"its parts hold {n_tensors} tensors, not {promised}")
    return headers


def _read_entries(header: GGUFHeader, file: TensorFile, config: Mapping[str, Any]) -> list[_Entry]:
    """Reads the entries of one file, in order of offset, and checks types, shapes and offsets."""
    entries: list[_Entry] = []
    end = 0
    for tensor in sorted(header.tensors, key=lambda tensor: tensor.offset):
        entry = _read_entry(tensor, file, config)
        if tensor.offset < end:
            raise CheckpointError(
                file.path, f"begins at byte {tensor.offset}, within another", tensor=tensor.name
            )
        end = tensor.offset + entry.info.n_bytes
        if end > file.n_bytes:
            raise CheckpointError(
                file.path,
                f"ends at byte {end}, but the file has {file.n_bytes}: it is truncated; download "
                "it again",
                tensor=tensor.name,
            )
        entries.append(entry)
    return entries


def _read_entry(tensor: GGUFTensor, file: TensorFile, config: Mapping[str, Any]) -> _Entry:
    if tensor.type_id not in _TYPES:
        known = {t.value: t.name for t in GGMLQuantizationType}
        raise UnsupportedError(
            f"{shorten(str(file.path))}, tensor {shorten_value(tensor.name)}: GGUF type "
            f"{known.get(tensor.type_id, tensor.type_id)} is not supported. Supported are "
            f"{', '.join(t.name for t in _TYPES.values())}."
        )
    if len(tensor.shape) not in (1, 2):
        raise CheckpointError(file.path, f"has the shape {tensor.shape}", tensor=tensor.name)
    name, declared = _translate_name(tensor.name)
    if name is None:
        raise UnsupportedError(
            f"{shorten(str(file.path))}: no {config['model_type']} model has a tensor "
            f"{shorten_value(tensor.name)}, and leaving it out may change what the model computes."
        )
    head_rows, rotated_rows = 1, 0
    part = declared if isinstance(declared, Part) and declared.rotated else None
    if part and config["model_type"] in ("llama", "mistral"):
        head_rows = config["head_dim"]
        rotated_rows = round(head_rows * config.get("partial_rotary_factor", 1.0))
        key = "num_attention_heads" if part.axis == "heads" else "num_key_value_heads"
        if tensor.shape[0] != config[key] * head_rows:
            raise CheckpointError(
                file.path,
                f"has {tensor.shape[0]} rows, not {config[key]} heads of {head_rows}",
                tensor=tensor.name,
            )
    type_ = _TYPES[tensor.type_id]
    elements, block_bytes = GGML_QUANT_SIZES[type_]
    n_columns = tensor.shape[1] if len(tensor.shape) == 2 else 1
    if n_columns % elements:
        raise CheckpointError(
            file.path,
            f"has rows of {n_columns}, which is not a multiple of {type_.name}'s blocks of "
            f"{elements}",
            tensor=tensor.name,
        )
    info = TensorInfo(
        name=name,
        shape=tensor.shape,
        dtype=type_.name,
        file=file.path,
        n_bytes=tensor.shape[0] * n_columns // elements * block_bytes,
    )
    return _Entry(
        info=info,
        file=file,
        type=type_,
        offset=tensor.offset,
        head_rows=head_rows,
        rotated_rows=rotated_rows,
    )


def _translate_name(name: str) -> tuple[str | None, Part | Norm | None]:
    """Returns a tensor's Hugging Face name, and its declaration in a layer; None if unknown."""
    if name in _FACTORS:
        return name, None
    match = _TENSOR_NAME.fullmatch(name)
    if not match:
        return None, None
    layer, what, kind = match["layer"], match["what"], match["kind"]
    if layer is None:
        whole = names.GGUF_NAMES.get(what)
        return f"{whole}.{kind}" if whole else None, None
    declared = names.gguf_names().get(what)
    if declared is None:
        return None, None
    part = declared.name if isinstance(declared, Part) else declared.part
    return f"{names.layer(layer, part)}.{kind}", declared


def _read(
    entry: _Entry,
    index: tuple[slice, ...] = (),
    *,
    encoded: bool = False,
    pinned: bool = False,
) -> Tensor:
    rows, columns = (*index_ranges(index, entry.info.shape), range(1))[:2]
    elements, n_bytes = entry.block
    # The wanted part, extended to whole heads and whole blocks.
    group = entry.head_rows
    stored = range(rows.start // group * group, -(-rows.stop // group) * group)
    blocks = slice(columns.start // elements, -(-columns.stop // elements))
    kept_columns = slice(
        columns.start - blocks.start * elements, columns.stop - blocks.start * elements
    )

    width, dtype, as_stored = len(columns), entry.dtype, entry.type.name in _FLOATS
    if encoded and not as_stored:
        assert kept_columns == slice(0, len(columns)), "blocks are not cut"
        assert columns.stop % elements == 0, "blocks are not cut"
        width, dtype, as_stored = (blocks.stop - blocks.start) * n_bytes, torch.uint8, True
        kept_columns = slice(width)
    if as_stored and group == 1 and len(columns) == entry.n_columns:
        start, n_stored = entry.offset + rows.start * entry.row_bytes, len(rows) * entry.row_bytes
        data = entry.file.read(start, n_stored, pinned=pinned).view(dtype)
        return data.view(len(rows), width) if len(entry.info.shape) == 2 else data
    out = torch.empty(len(rows), width, dtype=dtype, pin_memory=pinned)
    result = out if len(entry.info.shape) == 2 else out.view(-1)
    if result.numel() == 0:
        return result
    for part in row_chunks(stored, entry.n_columns * entry.dtype.itemsize, group):
        wanted = range(blocks.start * n_bytes, blocks.stop * n_bytes)
        data = entry.file.read_columns(entry.offset, part, entry.row_bytes, wanted)
        if group > 1:  # rope pairs: rows 2i, 2i + 1 of the R rotated ones become i, i + R/2
            heads = data.unflatten(0, (-1, group))
            pairs = heads[:, : entry.rotated_rows].unflatten(1, (-1, 2))
            rotated = pairs.transpose(1, 2).flatten(1, 2)
            data = torch.cat((rotated, heads[:, entry.rotated_rows :]), dim=1).flatten(0, 1)
        data = data.contiguous()
        if entry.type.name in _FLOATS:
            values = data.view(entry.dtype)
        elif encoded:
            values = data
        else:
            shape = (len(part), (blocks.stop - blocks.start) * elements)
            values = _dequantized(data, entry.type.name, shape)
        kept = range(max(part.start, rows.start), min(part.stop, rows.stop))
        out[kept.start - rows.start : kept.stop - rows.start] = values[
            kept.start - part.start : kept.stop - part.start, kept_columns
        ]
    return result


def _dequantized(blocks: Tensor, type_name: str, shape: tuple[int, int]) -> Tensor:
    """Dequantizes blocks to float32."""
    decode = resolve("encoding", ENCODINGS, f"{_PREFIX}{type_name.lower()}").decode
    return decode({BLOCKS: blocks}, shape).dequantize()
