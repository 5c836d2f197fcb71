"""The identity of a checkpoint, its stored types, and its unquantized origin.

A checkpoint can have hundreds of gigabytes, so commands do not read all of it to identify it:
``identify_checkpoint`` detects a change in place, and ``sample_checkpoint`` recognizes a copy.

Quality is measured against an unquantized reference, so a measurement must know whether a
checkpoint is quantized. That follows from the types of its tensors, and from the description that
``hotloop quantize`` writes into ``config.json``:

    "hotloop_quantization": {
      "version": 3,
      "scheme": "int4-g64-cal",              the projections of the blocks
      "head": "int8",                        the output head
      "source": {                            the reference it was made from
        "name": "smollm2-135m",              as the user named it
        "sample": "b179c952..."              sample_checkpoint of it
      },
      "calibration": {                       only if a text was given
        "name": "notes.txt",
        "sha256": "2c26b46b..."
      }
    }

torch is not imported here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from hotloop.errors import UnsupportedError
from hotloop.gguf_header import model_parts
from hotloop.untrusted import StrictModel, config_error, open_file, validated

SINGLE_FILE = "model.safetensors"
"""The file with all of a model's weights. Other safetensors files beside it are other layouts of
them."""

DESCRIPTION_KEYS = ("quantization_config", "compression_config")
"""Keys of ``config.json`` in which other tools describe their quantization."""

QUANTIZATION_FILES = ("quant_config.json", "quantize_config.json")
"""Files beside ``config.json`` in which AutoAWQ and AutoGPTQ described their quantization."""

QUANTIZATION_KEY = "hotloop_quantization"
QUANTIZATION_VERSION = 3

HEAD_BYTES = 2**20
"""Bytes at the beginning of a file that identify it: its header, or most of its header."""

N_BLOCKS, BLOCK_BYTES = 64, 2**16
"""The number and size of the blocks of a file that are hashed as samples of its content."""

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


class SourceModel(StrictModel):
    """The unquantized reference from which a quantized copy was made.

    Attributes:
        name: The name or path that the user gave.
        sample: Its :func:`sample_checkpoint`; None in copies of version 1.
        sha256: In copies of version 1, the hash of the whole content, which is not compared.
    """

    name: str
    sample: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None


class CalibrationText(StrictModel):
    """The text with which calibrated scales were fitted: its file's name and SHA-256 in hex."""

    name: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Quantization(StrictModel):
    """The description that ``hotloop quantize`` writes into a copy.

    Attributes:
        version: The version of this description.
        scheme: The scheme of the projections.
        head: The scheme of the output head.
        source: The model from which it was made; None in copies without it.
        calibration: The text with which calibrated scales were fitted; None for random tokens, and
            in copies of version 2.
    """

    version: Annotated[int, Field(ge=1, le=QUANTIZATION_VERSION)] = QUANTIZATION_VERSION
    scheme: Annotated[str, Field(max_length=80)]
    head: Annotated[str, Field(max_length=80)]
    source: SourceModel | None = None
    calibration: CalibrationText | None = None


def read_quantization(config: Mapping[str, Any], file: Path | str) -> Quantization | None:
    """Returns the description in a ``config.json``; None for a model that hotloop did not quantize.

    Args:
        config: The keys of ``config.json``.
        file: Their file, for errors.

    Raises:
        UnsupportedError: A later version wrote it.
        ConfigError: The description is damaged.
    """
    description = config.get(QUANTIZATION_KEY)
    if description is None:
        return None
    version = description.get("version") if isinstance(description, dict) else None
    if type(version) is int and version > QUANTIZATION_VERSION:
        raise UnsupportedError(
            f"{file}: the checkpoint is quantized in format {version}; this hotloop reads format "
            f"{QUANTIZATION_VERSION}. Update hotloop, or quantize again."
        )
    where = f"{file}, {QUANTIZATION_KEY}"
    return validated(Quantization, description, where, refuse=config_error)


def identify_checkpoint(path: Path) -> str:
    """Hashes facts that identify a checkpoint on this machine, without reading all of it.

    For each file of weights, these are its name, size, modification time and beginning, which has
    the header; for a file in the cache of the Hugging Face hub, the hash of its content that is its
    name there. Small files, such as ``config.json``, are hashed entirely.

    Args:
        path: The result of ``resolve_model``.
    """

    def identity(file: Path) -> Any:
        if (etag := _etag(file)) is not None:
            return etag
        status = file.stat()
        return [status.st_size, status.st_mtime_ns, _hash_parts(file, [(0, HEAD_BYTES)])]

    return _hash_model(path, identity)


def hash_checkpoint(path: Path) -> str:
    """Hashes the whole content of a checkpoint, for a cache whose entries depend on every byte.

    Args:
        path: The result of ``resolve_model``.
    """
    return _hash_model(path, hash_file)


def sample_checkpoint(path: Path) -> str:
    """Hashes samples of a checkpoint's content, independent of its place and modification time.

    For each file of weights, it hashes the name, the size, the beginning, and blocks at equal
    distances. Two different models, or two training stages of a model, differ in every block.

    Args:
        path: The result of ``resolve_model``.
    """

    def sample(file: Path) -> Any:
        size = file.stat().st_size
        starts = (size * i // N_BLOCKS for i in range(N_BLOCKS))
        parts = [(0, HEAD_BYTES), *((start, BLOCK_BYTES) for start in starts)]
        return [size, _hash_parts(file, [*parts, (max(0, size - BLOCK_BYTES), BLOCK_BYTES)])]

    return _hash_model(path, sample)


def _hash_model(path: Path, of_weights: Callable[[Path], Any]) -> str:
    """Hashes the names and contents of the files that make up a model.

    If the model is a single file, its name is left out.
    """
    files = checkpoint_files(path)
    facts = {
        "" if len(files) == 1 else file.name: hash_file(file)
        if file.suffix == ".json"
        else of_weights(file)
        for file in files
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _etag(file: Path) -> str | None:
    """Returns the content hash that is the name of a file in the Hugging Face cache."""
    blob = file.resolve()
    is_blob = file.is_symlink() and blob.parent.name == "blobs"
    return blob.name if is_blob and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name) else None


def _hash_parts(path: Path, parts: Iterable[tuple[int, int]]) -> str:
    """Hashes parts of a file: (offset, length) each; a part may extend beyond the end."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        for start, n_bytes in parts:
            file.seek(start)
            digest.update(file.read(n_bytes))
    return digest.hexdigest()


def checkpoint_files(path: Path) -> list[Path]:
    """Returns the files that define a model."""
    if not path.is_dir():
        return model_parts(path)
    described = (path / name for name in ("config.json", *QUANTIZATION_FILES))
    return [*sorted(path.glob("*.safetensors")), *filter(Path.is_file, described)]


def hash_file(path: Path) -> str:
    """Hashes a file's bytes (SHA-256)."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True)
class StoredType:
    """The tensors of a checkpoint that are stored in one type.

    Attributes:
        dtype: The type, by the format's own name: ``BF16``, ``I8``, ``Q4_K``.
        n_tensors: The number of these tensors.
        n_bytes: Bytes that they take.
    """

    dtype: str
    n_tensors: int
    n_bytes: int


@dataclass(frozen=True, kw_only=True)
class StoredForm:
    """The storage of a checkpoint's weights.

    Attributes:
        types: The stored types, those with the most bytes first.
        quantization: The description by ``hotloop quantize``, if it made the checkpoint.
        method: The method of another tool that quantized it, such as ``awq``, if it is known.
    """

    types: tuple[StoredType, ...]
    quantization: Quantization | None
    method: str | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether some of its tensors have fewer bits than those of the original model."""
        return self.quantization is not None or any(t.dtype not in _FLOATS for t in self.types)

    @property
    def summary(self) -> str:
        """A text such as ``Q4_1 for 210 of 272 tensors, 87 % of bytes; F32 for 62, 13 %``."""
        n_tensors = sum(t.n_tensors for t in self.types)
        n_bytes = max(sum(t.n_bytes for t in self.types), 1)
        first, *others = self.types
        shares = [
            f"{first.dtype} for {first.n_tensors} of {n_tensors} tensors, "
            f"{first.n_bytes / n_bytes:.0%} of bytes".replace("%", " %")
        ]
        shares += [
            f"{t.dtype} for {t.n_tensors}, {t.n_bytes / n_bytes:.0%}".replace("%", " %")
            for t in others
        ]
        text = "; ".join(shares)
        if self.quantization is None:
            return f"{self.method} ({text})" if self.method else text
        how = f"{self.quantization.scheme}, head {self.quantization.head}"
        source = self.quantization.source
        return f"{how}{f', made from {source.name}' if source else ''} ({text})"

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON, for records and ``hotloop info --json``."""
        return {
            "summary": self.summary,
            "is_quantized": self.is_quantized,
            "types": [vars(t) for t in self.types],
            "quantization": self.quantization and self.quantization.model_dump(),
        }
