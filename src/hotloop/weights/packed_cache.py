"""Caches packed weights in the cache folder, so that the next start need not pack them.

An entry is one file, named by a hash of everything that determines its bytes (``entry_key``). It
has the packed weights, then their index, then the index's length and hash. Every 16 MiB have a
checksum, so that a damaged entry is detected; it is then removed and made again.

Entries are written under another name and renamed, so that another process sees a whole entry or
none. Their total size has a limit: the least recently used entries are removed first.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import torch
from pydantic import Field
from torch import Tensor, nn

from hotloop.cache import cache_dir, code_hash, writable_cache_dir
from hotloop.errors import CheckpointError, ConfigError, HotloopError, shorten_value
from hotloop.kernels.cpu.huge_pages import in_huge_pages
from hotloop.kernels.linear import KernelFormat, LinearSpec
from hotloop.models.linear import Embedding, Linear
from hotloop.untrusted import StrictModel, parse_json, read_json, validated
from hotloop.weights.identity import checkpoint_files, hash_checkpoint
from hotloop.weights.read_ahead import ReadAhead
from hotloop.weights.tensor_file import TensorFile, reading_threads
from hotloop.writing import errors_named, replacing, write_whole

LIMIT_VARIABLE = "HOTLOOP_PACKED_GB"
"""The environment variable of the limit, in GB."""

DEFAULT_LIMIT_GB = 100.0

CHUNK_BYTES = 16 * 2**20
"""Bytes that are read and checked at once."""

_BYTES_AHEAD = 4 * CHUNK_BYTES
_FOOTER = b"hotloop packed 1"
_FOOTER_BYTES = 8 + 32 + len(_FOOTER)
_MAX_INDEX_BYTES = 10**8
_ALIGNMENT = 4096
_ABANDONED_S = 3600.0
_SETTLED_S = 2.0
"""A file that was changed less than this time ago may change again without a new modification time.
"""

_CODE = ("kernels", "models", "quant", "weights")
"""The packages on whose code packed bytes may depend."""

_Whole = Annotated[int, Field(ge=0, le=2**62)]
_DTYPES = {
    str(dtype): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not dtype.is_complex
}


class _Storage(StrictModel):
    """Memory of which one tensor or several are views."""

    offset: _Whole
    n_bytes: _Whole
    checksums: list[int]


class _View(StrictModel):
    """A tensor: its view of a storage, in elements."""

    storage: _Whole
    dtype: str
    shape: list[_Whole]
    stride: list[_Whole]
    offset: _Whole


class _Piece(StrictModel):
    """A piece of a projection: its ``LinearSpec``, and its number of packed tensors."""

    format: dict[str, Any]
    n: _Whole
    dtype: str
    fused: bool
    plain_rows: bool
    paired: bool
    n_packed: _Whole


class _Index(StrictModel):
    """The tensors of a decoder."""

    storages: list[_Storage]
    views: dict[str, _View]
    linears: dict[str, list[_Piece]]


def entry_key(checkpoint: Path, facts: Mapping[str, Any]) -> str:
    """Returns the name of an entry.

    Args:
        checkpoint: The file or folder of the weights; its content identifies it.
        facts: Everything else that determines the packed bytes: schemes, kernels, shard, types.
    """
    determining = {
        "checkpoint": _content_hash(checkpoint),
        "versions": [torch.__version__, code_hash(*_CODE)],
        "facts": facts,
    }
    return hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()


def load_packed(key: str, decoder: nn.Module, device: torch.device) -> int | None:
    """Assigns all weights of a decoder from an entry.

    A damaged entry is removed.

    Args:
        key: The name of the entry.
        decoder: The decoder without weights.
        device: Its device.

    Returns:
        The bytes that were read; None if there is no such entry, or it was damaged.
    """
    path = _folder(cache_dir()) / f"{key}.packed"
    threads = reading_threads()
    try:
        file = TensorFile(path, threads)
    except CheckpointError:
        return None
    try:
        index = _read_index(file)
        storages = _read_storages(file, index, device)
        tensors = {name: _view(index, each, storages) for name, each in index.views.items()}
        _assign(decoder, index, tensors, device)
    except (_DamagedError, HotloopError, ValueError, KeyError, TypeError):
        with suppress(OSError):
            path.unlink()
        return None
    finally:
        file.close()
        threads.shutdown()
    with suppress(OSError):  # another process has removed it
        os.utime(path)
    return sum(each.n_bytes for each in index.storages)


def store_packed(key: str, decoder: nn.Module, before: Mapping[str, Tensor]) -> str | None:
    """Stores the weights of a decoder as an entry.

    Args:
        key: The name of the entry.
        decoder: The decoder, with its weights.
        before: Its buffers before the weights were assigned: buffers that are unchanged are not
            weights.

    Returns:
        The reason why they are not stored; None if they are.
    """
    if (_folder(cache_dir()) / f"{key}.packed").exists():
        return None  # of the same bytes, with another drafter or none
    limit = limit_bytes()
    named = dict(decoder.named_buffers(remove_duplicate=False))
    weights = {name: t for name, t in named.items() if before.get(name) is not t}
    storages = {_address(t): t.untyped_storage() for t in weights.values()}
    needed = sum(storage.nbytes() for storage in storages.values())
    not_kept = "packed weights are not kept for the next start"
    if needed > limit:
        return (
            f"{not_kept}: they take {needed / 1e9:.1f} GB, and {LIMIT_VARIABLE} allows "
            f"{limit / 1e9:g} GB."
        )
    try:
        folder = _folder(writable_cache_dir())
        with errors_named(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder):
                _make_room(folder, limit - needed)
            free = shutil.disk_usage(folder).free
        if free < needed * 1.05:
            return f"{not_kept}: they take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free."
        with replacing(folder / f"{key}.packed") as file:
            _write(file, decoder, weights, storages)
        with errors_named(folder), _locked(folder):  # another process may have written meanwhile
            _make_room(folder, limit)
    except (HotloopError, OSError) as error:
        return f"{not_kept}: {error}"
    return None


def limit_bytes() -> float:
    """Returns the bytes that all entries may take.

    Raises:
        ConfigError: The environment variable is not a number of GB.
    """
    text = os.environ.get(LIMIT_VARIABLE) or str(DEFAULT_LIMIT_GB)
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < 10**9:
        raise ConfigError(
            f"{LIMIT_VARIABLE} is {shorten_value(text)}: give a number of GB, such as "
            f"{DEFAULT_LIMIT_GB:g}, or leave it out."
        )
    return limit * 1e9


class _DamagedError(Exception):
    """The entry is damaged."""


def _folder(cache: Path) -> Path:
    return cache / "packed"


@contextmanager
def _locked(folder: Path) -> Generator[None]:
    """Excludes other processes that remove entries."""
    with (folder / ".lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_room(folder: Path, limit: float) -> None:
    """Removes the least recently used entries until the rest takes at most ``limit`` bytes."""
    for path in folder.glob(".*.partial"):  # a process that was killed has left it
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_S:
                path.unlink()
    entries = []
    for path in folder.glob("*.packed"):
        with suppress(OSError):
            found = path.stat()
            entries.append((found.st_mtime_ns, path, found.st_size))
    total = sum(size for _, _, size in entries)
    for _, path, size in sorted(entries):
        if total <= limit:
            return
        with suppress(OSError):
            path.unlink()
        total -= size


def _address(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _write(
    file: BinaryIO,
    decoder: nn.Module,
    weights: Mapping[str, Tensor],
    storages: Mapping[tuple[int, int], torch.UntypedStorage],
) -> None:
    places = {address: i for i, address in enumerate(storages)}
    written = [_write_storage(file, storage) for storage in storages.values()]
    index = _Index(
        storages=written,
        views={
            name: _View(
                storage=places[_address(t)],
                dtype=str(t.dtype),
                shape=list(t.shape),
                stride=list(t.stride()),
                offset=int(t.storage_offset()),
            )
            for name, t in weights.items()
        },
        linears={
            name: [_piece(spec, n_packed) for spec, n_packed in module.layout]
            for name, module in decoder.named_modules()
            if isinstance(module, Linear | Embedding)
        },
    )
    text = index.model_dump_json().encode()
    file.write(text + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest() + _FOOTER)


def _write_storage(file: BinaryIO, storage: torch.UntypedStorage) -> _Storage:
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
    offset = file.tell()
    data = torch.empty(0, dtype=torch.uint8, device=storage.device)
    data.set_(storage, 0, (storage.nbytes(),), (1,))
    checksums = []
    for start in range(0, len(data), CHUNK_BYTES):
        chunk = data[start : start + CHUNK_BYTES].cpu()
        checksums.append(_checksum(chunk))
        file.write(chunk.numpy().data)
    return _Storage(offset=offset, n_bytes=len(data), checksums=checksums)


def _checksum(data: Tensor) -> int:
    """Returns the sum of the 64-bit words of uint8 [bytes], and of the remaining bytes."""
    whole = len(data) // 8 * 8
    return int(data[:whole].view(torch.int64).sum()) + int(data[whole:].sum())


def _piece(spec: LinearSpec, n_packed: int) -> _Piece:
    fields = dataclasses.asdict(spec.format)
    return _Piece(
        format={k: str(v) if isinstance(v, torch.dtype) else v for k, v in fields.items()},
        n=spec.n,
        dtype=str(spec.dtype),
        fused=spec.fused,
        plain_rows=spec.plain_rows,
        paired=spec.paired,
        n_packed=n_packed,
    )


def _spec(piece: _Piece, k: int, device: torch.device) -> LinearSpec:
    fields = {name: _from_json(value) for name, value in piece.format.items()}
    return LinearSpec(
        format=KernelFormat(**fields),
        n=piece.n,
        k=k,
        dtype=_DTYPES[piece.dtype],
        device=device.type,
        fused=piece.fused,
        plain_rows=piece.plain_rows,
        paired=piece.paired,
    )


def _from_json(value: Any) -> Any:
    if isinstance(value, str):
        return _DTYPES.get(value, value)
    return tuple(value) if isinstance(value, list) else value


def _read_index(file: TensorFile) -> _Index:
    if file.n_bytes < _FOOTER_BYTES:
        raise _DamagedError
    footer = file.read(file.n_bytes - _FOOTER_BYTES, _FOOTER_BYTES).numpy().tobytes()
    n_bytes = int.from_bytes(footer[:8], "little")
    if footer[40:] != _FOOTER or n_bytes > min(file.n_bytes - _FOOTER_BYTES, _MAX_INDEX_BYTES):
        raise _DamagedError
    text = file.read(file.n_bytes - _FOOTER_BYTES - n_bytes, n_bytes).numpy().tobytes()
    if hashlib.sha256(text).digest() != footer[8:40]:
        raise _DamagedError
    index = validated(_Index, parse_json(text, file.path), file.path)
    for each in index.storages:
        whole = each.offset + each.n_bytes <= file.n_bytes
        if not whole or len(each.checksums) != -(-each.n_bytes // CHUNK_BYTES):
            raise _DamagedError
    return index


def _read_storages(file: TensorFile, index: _Index, device: torch.device) -> list[Tensor]:
    """Reads all bytes, a thread ahead of their checks and of their copies to a GPU."""
    on_host = device.type == "cpu"
    storages = [
        in_huge_pages(torch.empty(each.n_bytes, dtype=torch.uint8, device=device))
        for each in index.storages
    ]

    def read(i: int, start: int) -> tuple[int, int, Tensor]:
        offset = index.storages[i].offset + start
        stop = min(start + CHUNK_BYTES, index.storages[i].n_bytes)
        if on_host:
            chunk = storages[i][start:stop]
        else:
            chunk = torch.empty(stop - start, dtype=torch.uint8, pin_memory=True)
        file.read_into(chunk, offset)
        return i, start, chunk

    def jobs() -> Iterator[Callable[[], tuple[int, int, Tensor]]]:
        for i, each in enumerate(index.storages):
            for start in range(0, each.n_bytes, CHUNK_BYTES):
                yield partial(read, i, start)

    ahead = ReadAhead(jobs(), lambda result: result[2].nbytes, _BYTES_AHEAD)
    try:
        for each in index.storages:
            for expected in each.checksums:
                i, start, chunk = ahead.next()
                if _checksum(chunk) != expected:
                    raise _DamagedError
                if not on_host:
                    storages[i][start : start + len(chunk)].copy_(chunk, non_blocking=True)
    finally:
        ahead.close()
    return storages


def _view(index: _Index, view: _View, storages: list[Tensor]) -> Tensor:
    dtype, storage = _DTYPES[view.dtype], storages[view.storage]
    if 0 in view.shape:
        return torch.empty(view.shape, dtype=dtype, device=storage.device)
    last = view.offset + sum(
        (size - 1) * step for size, step in zip(view.shape, view.stride, strict=True)
    )
    if (last + 1) * dtype.itemsize > index.storages[view.storage].n_bytes:
        raise _DamagedError
    return storage.view(dtype).as_strided(view.shape, view.stride, view.offset)


def _assign(
    decoder: nn.Module,
    index: _Index,
    tensors: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    modules = dict(decoder.named_modules())
    linears = {name: m for name, m in modules.items() if isinstance(m, Linear | Embedding)}
    if linears.keys() != index.linears.keys():
        raise _DamagedError
    for name, linear in linears.items():
        packed, at = [], 0
        for piece in index.linears[name]:
            parts = [tensors[f"{name}.packed{at + i}"] for i in range(piece.n_packed)]
            packed.append((_spec(piece, linear.k, device), parts))
            at += piece.n_packed
        linear.restore(packed)
    for name, tensor in tensors.items():
        place, _, attribute = name.rpartition(".")
        module = modules[place]
        if place not in linears or not attribute.startswith("packed"):
            setattr(module, attribute, tensor)


class _Seen(StrictModel):
    """The states of a checkpoint's files when they were hashed, and the hash."""

    files: dict[str, list[int]]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _content_hash(checkpoint: Path) -> str:
    """Returns ``hash_checkpoint``; for unchanged files, the previous result."""
    checkpoint = checkpoint.absolute()  # not resolved: the names of links identify the parts
    files = _states(checkpoint)
    folder = _folder(writable_cache_dir()) / "sources"
    name = hashlib.sha256(os.fsencode(checkpoint)).hexdigest()
    with errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):  # several ranks start at once: one hashes
            if (known := _read_seen(folder / name)) is not None and known.files == files:
                return known.sha256
            sha256 = hash_checkpoint(checkpoint)
            changed = max(max(state[1:3]) for state in files.values()) / 1e9
            if time.time() - changed > _SETTLED_S and _states(checkpoint) == files:
                seen = _Seen(files=files, sha256=sha256)
                write_whole(folder / name, seen.model_dump_json())
            return sha256


def _read_seen(path: Path) -> _Seen | None:
    try:
        return validated(_Seen, read_json(path), path)
    except HotloopError:  # there is none, or it is damaged
        return None


def _states(checkpoint: Path) -> dict[str, list[int]]:
    """Returns for each file of a checkpoint its state, which changes with its content."""
    found = {str(path): path.stat() for path in checkpoint_files(checkpoint)}
    return {
        path: [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
        for path, state in found.items()
    }
