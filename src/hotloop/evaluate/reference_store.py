"""Stores references in the cache folder, up to a limit, for all later commands.

The name of a reference has a hash of everything that determines it: the identity of the weights,
the text and its windows, the element type, hotloop's code (``cache.code_hash``), torch's version
and the machine. So an existing file can be used, whichever sweep or evaluation made it. If the
limit is exceeded, the least recently used references are removed first. A reference that a command
uses is never removed; one that alone exceeds the limit is removed when the command that made it
ends.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

from hotloop.cache import writable_cache_dir
from hotloop.errors import ConfigError, shorten_value
from hotloop.writing import make_folder, opened_to_append, remove_unfinished

LIMIT = "HOTLOOP_REFERENCES_GB"
"""The environment variable with the limit, in GB."""

DEFAULT_LIMIT_GB = 20.0

FOLDER = "references"


class ReferenceStore:
    """The folder of references, in a ``with`` block whose end enforces the limit.

    Args:
        folder: The folder; None for the default in the cache folder.
        limit_bytes: The limit; None for the user's setting.

    Raises:
        ConfigError: The user's limit is not a number of GB.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int | None = None) -> None:
        self.folder = folder or writable_cache_dir() / FOLDER
        self.limit_bytes = _limit() if limit_bytes is None else limit_bytes
        self._held = ExitStack()

    def __enter__(self) -> ReferenceStore:
        make_folder(self.folder)
        remove_unfinished(self.folder)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()
        self.trim()

    def hold(self, file: Path) -> None:
        """Locks a file, which need not exist yet, until the block ends; updates its use time."""
        lock = self._held.enter_context(opened_to_append(_lock_of(file)))
        fcntl.flock(lock, fcntl.LOCK_SH)
        with suppress(FileNotFoundError):
            os.utime(file)

    def trim(self) -> None:
        """Removes unused files, the least recently used first, until the limit is met."""
        found = []
        for file in self._files():
            with suppress(FileNotFoundError):
                status = file.stat()
                found.append((status.st_size <= self.limit_bytes, status.st_mtime_ns, file))
        sizes = {file: file.stat().st_size for *_, file in found if file.exists()}
        total = sum(sizes.values())
        # A file that alone exceeds the limit sorts first: removing others would not help.
        for _, _, file in sorted(found):
            if total <= self.limit_bytes:
                break
            with _locked_if_unused(file) as unused:
                if unused:
                    file.unlink(missing_ok=True)
                    total -= sizes.get(file, 0)

    def _files(self) -> list[Path]:
        return [*self.folder.glob("*.safetensors"), *self.folder.glob("*.json")]


def _lock_of(file: Path) -> Path:
    return file.with_name(f".{file.name}.lock")


@contextmanager
def _locked_if_unused(file: Path) -> Iterator[bool]:
    """Locks a file for the block if no command uses it; yields whether it did."""
    with opened_to_append(_lock_of(file)) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _limit() -> int:
    value = os.environ.get(LIMIT)
    try:
        gb = DEFAULT_LIMIT_GB if value is None else float(value)
    except ValueError:
        gb = -1.0
    if not 0 <= gb < 1e9:
        raise ConfigError(f"{LIMIT} must be a number of GB, 0 or more, not {shorten_value(value)}.")
    return int(gb * 1e9)
