"""Stores the unquantized model's predictions on disk, so that other processes can compare theirs.

Every cell of a sweep runs in its own process, and two models rarely fit into memory together. So
the reference is scored once, and its whole distributions are stored in one safetensors file,
memory-mapped when read, with

- ``log_probs`` float16 [n_predictions, V]: log-probabilities minus the row's maximum,
- ``token_logprobs`` float32 [n_predictions] and ``top1`` int64 [n_predictions], exact,
- ``floor`` float32 [n_floor]: the reference's divergence from itself, see ``Reference``,

and, in its metadata, the key of the model and text. Since the row's maximum is subtracted, float16
has its finest resolution at the most probable tokens; normalization after reading restores the
constant. For distributions of language models, the divergence of the file from its source, by
rounding, is below 1e-6 nats; the mildest quantization causes 1e-4 or more.

The file is written under another name and renamed when it is complete, so that an incomplete file
is never read.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hotloop.checked import Count
from hotloop.errors import CheckpointError, ConfigError, HotloopError, shorten_value
from hotloop.safetensors_file import SafetensorsFile
from hotloop.types import Score
from hotloop.untrusted import StrictModel, parse_json, validated
from hotloop.writing import replacing

FORMAT = "hotloop-reference-2"

HEADER_BYTES = 2**12
"""Space for the header of a reference."""

KEPT_FREE_BYTES = 2**28
"""The fewest bytes of a disk that a reference must leave free, for records and logs."""

MAX_FLOOR_WINDOWS = 4
"""The most windows whose first half is scored twice."""

_CHUNK_ELEMENTS = 2**20
"""Elements of distributions that are handled at a time: a few MB for each intermediate result."""


class ReferenceKey(StrictModel):
    """Identifies a reference: two references differ if any field differs.

    Attributes:
        weights: Hash that identifies the checkpoint.
        dtype: Element type of the reference's computation; None matches any, for the comparison of
            other engines.
        vocab_size: Tokens in a distribution.
        text_sha256: Hash of the text.
        window: Tokens in a window.
        n_windows: Windows scored.
    """

    weights: str
    dtype: str | None
    vocab_size: Count
    text_sha256: str
    window: Count
    n_windows: Count

    @property
    def n_predictions(self) -> int:
        """The number of predictions over all windows; the first token of each is not predicted."""
        return self.n_windows * (self.window - 1)

    @property
    def n_floor(self) -> int:
        """The number of windows that are scored twice, for the floor."""
        return min(self.n_windows, MAX_FLOOR_WINDOWS)


class _Metadata(StrictModel):
    """The metadata of a reference's file; ``key`` is a :class:`ReferenceKey` as JSON."""

    format: str
    key: str
    windows_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Reference:
    """A finished reference file, open for reading.

    Args:
        path: The file.
        key: The key that it must have.

    Attributes:
        key: The same key, with the element type of the file.
        windows_sha256: :func:`hash_windows` of the windows that were scored.
        token_logprobs: Log-probability of each token after a window's first, float32
            [n_windows, window - 1].
        top1: The most likely token at each position, int64 [n_windows, window - 1].
        floor: The mean KL divergence of the reference from itself, scored again in shorter windows,
            float32 [n_floor]: the effect of rounding alone.

    Raises:
        ConfigError: The file is a reference with another key; the message names the first
            difference.
        CheckpointError: The file is missing, damaged or not a reference. The content of a file
            causes no other error.
    """

    def __init__(self, path: Path, key: ReferenceKey) -> None:
        if not path.is_file():
            raise CheckpointError(path, "there is no reference here. Score the reference first.")
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise _damaged(path, str(error)) from error
        stored = file.metadata() or {}
        if stored.get("format") != FORMAT:
            raise CheckpointError(
                path,
                f"not a reference of format {FORMAT!r}, but {shorten_value(stored.get('format'))}.",
            )
        metadata = validated(_Metadata, stored, path, refuse=_damaged)
        found = parse_json(metadata.key, path, refuse=_damaged)
        found = validated(ReferenceKey, found, path, prefix="key.", refuse=_damaged)
        if key.dtype is None:
            key = key.model_copy(update={"dtype": found.dtype})
        _check_key(path, found=found, wanted=key)
        _check_tensors(path, file, key)
        self.key = key
        self.windows_sha256 = metadata.windows_sha256
        shape = (key.n_windows, key.window - 1)
        self.token_logprobs: Tensor = file.get_tensor("token_logprobs").view(shape)
        if not self.token_logprobs.isfinite().all():
            raise _damaged(path, "its token_logprobs are not all finite")
        self.top1: Tensor = file.get_tensor("top1").view(shape)
        self.floor: Tensor = file.get_tensor("floor")
        if not self.floor.isfinite().all():
            raise _damaged(path, "its floor is not finite")
        self._log_probs = file.get_slice("log_probs")

    def log_probs(self, window: int, positions: slice) -> Tensor:
        """Reads log-probabilities at some positions of a window, float32 [positions, V].

        Each row is shifted by a constant so that its maximum is 0: see :func:`kl_divergence` in
        ``quality``, which normalizes.
        """
        start, stop, _ = positions.indices(self.key.window - 1)
        first = window * (self.key.window - 1)
        return self._log_probs[first + start : first + stop].float()


class ReferenceWriter:
    """Writes a reference window by window: see :meth:`open`.

    Args:
        path: The file to write. An existing file is replaced at the end.
        key: Its key.
        windows: The windows that will be added, in order.

    Raises:
        ConfigError: ``windows`` do not have the shape of ``key``.
        HotloopError: There is not enough space on the disk.
    """

    def __init__(self, path: Path, key: ReferenceKey, windows: Sequence[Sequence[int]]) -> None:
        if (shape := (len(windows), len(windows[0]))) != (key.n_windows, key.window):
            raise ConfigError(f"windows of shape {list(shape)} are not those of {key}.")
        self._path, self._key = path, key
        n, V = key.n_predictions, key.vocab_size
        self._metadata = {
            "format": FORMAT,
            "key": key.model_dump_json(),
            "windows_sha256": hash_windows(windows),
        }
        self._top1: list[Tensor] = []
        self._token_logprobs: list[Tensor] = []
        self.floor: list[float] = []
        needed, free = reference_bytes(key), shutil.disk_usage(path.parent).free
        if needed + KEPT_FREE_BYTES > free:
            raise HotloopError(
                f"the reference takes {needed / 1e9:.2f} GB ({n} predictions of {V} tokens) and "
                f"{free / 1e9:.2f} GB are free for {path}. Score fewer windows."
            )

    @contextmanager
    def open(self) -> Generator[ReferenceWriter]:
        """Opens the file, which appears under its name when the block ends without an error."""
        with replacing(self._path) as self._file:
            file = SafetensorsFile(self._file, self._metadata, header_bytes=HEADER_BYTES)
            self._at = {
                name: file.place(name, dtype, shape, math.prod(shape) * int(dtype[1:]) // 8)
                for name, (dtype, shape) in _layout(self._key).items()
            }
            self._file.seek(self._at["log_probs"])
            yield self
            self._finish()
            file.finish()

    def add(self, score: Score) -> None:
        """Appends the next window's predictions; ``score`` must have the whole distributions."""
        log_probs = full_log_probs(score, self._key.vocab_size)
        self._top1.append(score.top1.cpu().long())
        self._token_logprobs.append(score.token_logprobs.cpu().float())
        for rows in row_slices(*log_probs.shape):
            self._file.write(shifted_float16(log_probs[rows]).cpu().numpy().data)

    def _finish(self) -> None:
        top1, token_logprobs = torch.cat(self._top1), torch.cat(self._token_logprobs)
        assert len(top1) == self._key.n_predictions, "fewer windows were added than the key has"
        assert len(self.floor) == self._key.n_floor, (
            "the floor was not measured for every window of the key"
        )
        values_of = {
            "top1": top1,
            "token_logprobs": token_logprobs,
            "floor": torch.tensor(self.floor),
        }
        for name, values in values_of.items():
            self._file.seek(self._at[name])
            self._file.write(values.numpy().data)


def reference_bytes(key: ReferenceKey) -> int:
    """Returns the bytes of a reference's tensors."""
    layout = _layout(key).values()
    return sum(math.prod(shape) * int(dtype[1:]) // 8 for dtype, shape in layout)


def hash_windows(windows: Sequence[Sequence[int]]) -> str:
    """Hashes windows of equal length (SHA-256): another tokenizer gives another hash."""
    return hashlib.sha256(np.asarray(windows, dtype=np.int64).data).hexdigest()


def full_log_probs(score: Score, vocab_size: int) -> Tensor:
    """Returns the whole distributions of a score, [T - 1, V]; checks the vocabulary's size.

    Raises:
        ConfigError: The vocabulary is of another size.
    """
    log_probs = score.log_probs
    assert log_probs is not None, "the engine returned no whole distributions, which were requested"
    if (V := log_probs.shape[-1]) != vocab_size:
        raise ConfigError(f"distributions over {V} tokens cannot be compared with {vocab_size}.")
    return log_probs


def shifted_float16(log_probs_TV: Tensor) -> Tensor:
    """Subtracts each row's maximum from log-probabilities [T, V], and rounds to float16."""
    return (log_probs_TV - log_probs_TV.amax(dim=-1, keepdim=True)).half()


def row_slices(T: int, V: int) -> list[slice]:
    """Slices T rows of V so that intermediate results stay in cache and need little memory."""
    n_rows = max(1, _CHUNK_ELEMENTS // V)
    return [slice(i, min(i + n_rows, T)) for i in range(0, T, n_rows)]


def _damaged(file: Path | str, problem: str) -> CheckpointError:
    return CheckpointError(file, f"not a complete reference ({problem}). Delete it.")


def _check_key(path: Path, *, found: ReferenceKey, wanted: ReferenceKey) -> None:
    for name, value in wanted:
        if (other := getattr(found, name)) != value:
            raise ConfigError(
                f"{path} is a reference whose {name} is {shorten_value(other)}, not {value!r}. "
                "Delete it, and it will be written again."
            )


def _check_tensors(path: Path, file: Any, key: ReferenceKey) -> None:
    """Checks that an open safetensors file has the tensors of a reference."""
    stored = set(file.keys())
    for name, (dtype, shape) in _layout(key).items():
        if name not in stored:
            raise _damaged(path, f"its tensor {name} is missing")
        tensor = file.get_slice(name)
        found = tensor.get_dtype(), tuple(tensor.get_shape())
        if found != (dtype, shape):
            raise _damaged(
                path,
                f"its tensor {name} is {found[0]} of shape {shorten_value(found[1])}, "
                f"not {dtype} of shape {shape}",
            )


def _layout(key: ReferenceKey) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns types and shapes of a reference's tensors, in the order of the file.

    The large tensor comes last, so that it can be streamed and the others stay aligned.
    """
    n, V = key.n_predictions, key.vocab_size
    return {
        "top1": ("I64", (n,)),
        "token_logprobs": ("F32", (n,)),
        "floor": ("F32", (key.n_floor,)),
        "log_probs": ("F16", (n, V)),
    }
