"""Safetensors folders: ``config.json`` and one file, or shards with an index.

The header is read and checked here. The safetensors package is not used, because it memory-maps
files (see ``tensor_file``) and its errors do not name file and tensor. The format is a length, a
JSON object ``name -> {dtype, shape, data_offsets}``, and the tensors' bytes without a gap.

A folder may come from an untrusted source, so an index may name only ``*.safetensors`` files that
are directly in it, and pickles are never opened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hotloop.errors import CheckpointError, UnsupportedError, shorten, shorten_value
from hotloop.untrusted import config_error, parse_json, read_json, unnest
from hotloop.weights.identity import DESCRIPTION_KEYS, QUANTIZATION_FILES, SINGLE_FILE
from hotloop.weights.tensor_file import (
    TensorFile,
    TensorInfo,
    index_ranges,
    reading_threads,
    row_chunks,
)

INDEX_FILE = "model.safetensors.index.json"
TIED_HEAD = "lm_head.weight"
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

MAX_DIMS = 8
"""Dimensions of a tensor; no weight of a language model has more than four."""

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of element types."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, kw_only=True)
class _Entry:
    info: TensorInfo
    file: TensorFile
    offset: int  # bytes from the start of the file


class SafetensorsCheckpoint:
    """A folder of safetensors. See :class:`hotloop.weights.checkpoint.Checkpoint`.

    Every header is checked on opening; no tensor is read.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.config_file = folder / "config.json"
        if not self.config_file.exists():
            _refuse_other_layouts(folder)
            raise CheckpointError(
                self.config_file, "is missing: a model folder needs it beside its weights"
            )
        self.config = unnest(read_json(self.config_file), self.config_file)
        self.quantization_config = _quantization_config(self.config, self.config_file)
        placed = _place_tensors(folder)
        with ExitStack() as opened:
            threads = opened.enter_context(reading_threads())
            files = [opened.enter_context(closing(TensorFile(path, threads))) for path in placed]
            tied = self.config.get("tie_word_embeddings") is True
            entries = [
                entry
                for file in files
                for entry in _read_header(file, expected=placed[file.path], tied=tied)
            ]
            self._opened = opened.pop_all()
        # An index names each tensor once, and every shard holds the tensors of the index: names are
        # unique.
        self._entries = {entry.info.name: entry for entry in entries}
        self.tensors: Mapping[str, TensorInfo] = {n: e.info for n, e in self._entries.items()}

    def read(
        self,
        name: str,
        index: tuple[slice, ...] = (),
        *,
        encoded: bool = False,  # noqa: ARG002 (a tensor is what is stored)
        pinned: bool = False,
    ) -> Tensor:
        """Reads a tensor, or a slice of it, in its stored type, into memory of its own.

        A slice of the first dimension reads only its own bytes. A slice of a later dimension does
        so too if rows are long; otherwise it reads whole rows, a chunk at a time, and keeps the
        slice.
        """
        entry = self._entries[name]
        dtype = DTYPES[entry.info.dtype]
        scalar = entry.info.shape == ()
        shape = entry.info.shape or (1,)
        row_shape = shape[1:]
        row_bytes = math.prod(row_shape) * dtype.itemsize
        rows, *inner = index_ranges(index, shape)

        if all(len(cut) == size for cut, size in zip(inner, row_shape, strict=True)):
            start, n_bytes = entry.offset + rows.start * row_bytes, len(rows) * row_bytes
            data = entry.file.read(start, n_bytes, pinned=pinned)
            whole = data.view(dtype).view(len(rows), *row_shape)
            return whole.view(()) if scalar else whole
        # The bytes of the rows from the first to the last element of the slice in dimension 1.
        column_bytes = row_bytes // row_shape[0]
        columns = range(inner[0].start * column_bytes, inner[0].stop * column_bytes)
        out = torch.empty(len(rows), *map(len, inner), dtype=dtype, pin_memory=pinned)
        deeper = tuple(slice(cut.start, cut.stop) for cut in inner[1:])
        for part in row_chunks(rows, row_bytes):
            data = entry.file.read_columns(entry.offset, part, row_bytes, columns)
            cut = data.contiguous().view(dtype).view(len(part), len(inner[0]), *row_shape[1:])
            at = part.start - rows.start
            out[at : at + len(part)] = cut[:, :, *deeper]
        return out

    def close(self) -> None:
        """Closes the files; nothing can be read afterwards."""
        self._opened.close()


def _quantization_config(
    config: Mapping[str, Any], file: Path
) -> tuple[str, Mapping[str, Any]] | None:
    """Finds the description that a quantizer wrote: in ``config.json``, or in a file beside it."""
    for key in DESCRIPTION_KEYS:
        if (found := config.get(key)) is not None:
            if not isinstance(found, dict):
                raise config_error(file, f"{key}: must be an object, not {shorten_value(found)}")
            return f"{file}, {key}", found
    for name in QUANTIZATION_FILES:
        if (beside := file.with_name(name)).exists():
            return str(beside), read_json(beside)
    return None


def _place_tensors(folder: Path) -> dict[Path, set[str] | None]:
    """Returns the files of ``folder`` with weights, each with its tensors by the index.

    Without an index, None stands for all tensors of a file.
    """
    if (folder / SINGLE_FILE).exists():
        return {folder / SINGLE_FILE: None}
    index = folder / INDEX_FILE
    if index.exists():
        return _read_index(index)
    found = sorted(folder.glob("*.safetensors"))
    # The same weights in the layout of their publisher.
    found = [path for path in found if not path.name.startswith("consolidated")] or found
    if len(found) == 1:
        return {found[0]: None}
    if found:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(
            folder, f"holds {names} but no {INDEX_FILE} that says how they belong together"
        )
    _refuse_other_layouts(folder)
    raise CheckpointError(folder, f"has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def _refuse_other_layouts(folder: Path) -> None:
    """Refuses a folder in another known layout than Hugging Face's, and names that layout."""
    ggufs = sorted(path.name for path in folder.glob("*.gguf") if path.is_file())
    if ggufs:
        listed = shorten(", ".join(ggufs))
        raise CheckpointError(folder, f"holds GGUF files; give the path of one: {listed}")
    if (folder / "params.json").exists():
        raise UnsupportedError(
            f"{shorten(str(folder))} holds weights in their makers' own layout (params.json, "
            "consolidated.*), which is not read. Fetch the same model in Hugging Face's layout "
            "(config.json, model*.safetensors): hotloop pull ORG/MODEL."
        )
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UnsupportedError(
            f"{shorten(str(folder))} holds its weights as pickles only ({pickles[0]}), which are "
            "never loaded: opening a pickle runs the code in it. Where you trust it, convert it "
            "with transformers: AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(DST) "
            "writes safetensors; copy the tokenizer's files along."
        )


def _read_index(index: Path) -> dict[Path, set[str] | None]:
    weight_map = read_json(index, limit=MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(index, "has no 'weight_map' of tensor names to files")
    files: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(
                index, f"puts it in {shorten_value(name)}, not in a file", tensor=tensor
            )
        files.setdefault(name, set()).add(tensor)

    placed: dict[Path, set[str] | None] = {}
    for name, tensors in files.items():
        path, tensor = index.parent / name, min(tensors)
        # A link in the folder was made by whoever owns it; a name in the index was not. Files of
        # any other name are no part of the identity of a checkpoint.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                index,
                f"puts it in {shorten_value(name)}, which is not the name of a *.safetensors file "
                "in the index's own folder: move the file there, and correct the index",
                tensor=tensor,
            )
        if not path.is_file():
            raise CheckpointError(
                index,
                f"puts it in {shorten_value(name)}, which is missing: download it too",
                tensor=tensor,
            )
        placed[path] = tensors
    return placed


def _read_header(file: TensorFile, *, expected: set[str] | None, tied: bool) -> list[_Entry]:
    """Reads the tensors of one file, in order; checks types, shapes and places.

    Args:
        file: The file.
        expected: The tensors of the file by the index; None if there is no index.
        tied: The head is the embedding, so the index may list a head that is not stored.
    """
    header, data_start = _parse_header(file)
    header.pop("__metadata__", None)
    if expected is not None:
        for name in sorted(expected - header.keys() - ({TIED_HEAD} if tied else set())):
            raise CheckpointError(
                file.path, f"is missing, though {INDEX_FILE} puts it here", tensor=name
            )
        for name in sorted(header.keys() - expected):
            raise CheckpointError(
                file.path, f"is here, though {INDEX_FILE} does not put it here", tensor=name
            )

    entries: list[_Entry] = []
    end = 0
    for name, (begin, stop), shape, dtype in sorted(
        (_parse_entry(file.path, name, entry) for name, entry in header.items()),
        key=lambda entry: entry[1],
    ):
        if begin != end:
            problem = "overlaps the tensor before it" if begin < end else "follows a gap"
            raise CheckpointError(
                file.path,
                f"begins at byte {begin} of the data, not at {end}: {problem}",
                tensor=name,
            )
        if data_start + stop > file.n_bytes:
            raise CheckpointError(
                file.path,
                f"ends at byte {data_start + stop}, but the file has {file.n_bytes}: it is "
                "truncated; download it again",
                tensor=name,
            )
        end = stop
        info = TensorInfo(name=name, shape=shape, dtype=dtype, file=file.path, n_bytes=stop - begin)
        entries.append(_Entry(info=info, file=file, offset=data_start + begin))
    if data_start + end != file.n_bytes:
        raise CheckpointError(
            file.path, f"{file.n_bytes - data_start - end} bytes follow the last tensor"
        )
    return entries


def _parse_header(file: TensorFile) -> tuple[dict[str, Any], int]:
    """Returns the header object, and the offset of the data in the file."""
    if file.n_bytes < 8:
        raise CheckpointError(file.path, f"has {file.n_bytes} bytes: it is truncated")
    n_bytes = int.from_bytes(file.read(0, 8).numpy().tobytes(), "little")
    if n_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(
            file.path, f"claims a header of {n_bytes} bytes: it is damaged or no safetensors file"
        )
    if 8 + n_bytes > file.n_bytes:
        raise CheckpointError(file.path, "ends within its header: it is truncated")
    return parse_json(file.read(8, n_bytes).numpy().tobytes(), file.path), 8 + n_bytes


def _parse_entry(
    path: Path, name: str, entry: Any
) -> tuple[str, tuple[int, int], tuple[int, ...], str]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise CheckpointError(
                path, f"has a malformed entry {shorten_value(entry, 100)}", tensor=name
            )
    if dtype not in DTYPES:
        raise UnsupportedError(
            f"{path}, tensor {shorten_value(name)}: elements of type {shorten_value(dtype)} are "
            "not supported. "
            f"Supported are {', '.join(DTYPES)}."
        )
    sizes_fit = all(type(size) is int and 0 <= size < 2**63 for size in (*shape, begin, end))
    if len(shape) > MAX_DIMS or not sizes_fit:
        raise CheckpointError(
            path, f"has a malformed entry {shorten_value(entry, 100)}", tensor=name
        )
    n_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != n_bytes:
        raise CheckpointError(
            path,
            f"takes bytes {begin} to {end}, but {dtype} of shape {shape} needs {n_bytes} of them",
            tensor=name,
        )
    return name, (begin, end), tuple(shape), dtype
