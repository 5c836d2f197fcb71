"""Writes files atomically, and never through a link.

A results folder may come from another user, and a link in it could redirect a write to any place.
So a link as the last component of a path is never followed; the folders above it are the caller's
choice.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import stat
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from hotloop.errors import ConfigError, HotloopError, shorten, shorten_value

TAIL_BYTES = 2**16
"""Bytes at the end of a log in which the last lines are searched."""

MAX_NAME_BYTES = 200
"""The longest file name to make: file systems allow 255 bytes, and suffixes need some of them."""


def write_whole(path: Path, text: str) -> None:
    """Writes a UTF-8 file atomically: readers see the old file or the new one.

    Raises:
        HotloopError: As for ``replacing``.
    """
    with replacing(path) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))


def write_json(file: Path, value: Mapping[str, Any]) -> Path:
    """Writes an object as indented JSON, and returns the file.

    It follows a link and is not atomic, so use it only in a folder that hotloop has just made.
    """
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def remove_unfinished(folder: Path) -> None:
    """Removes files that ``replacing`` left in a folder when its process was killed.

    Files that a process is still writing are locked, and stay.
    """
    for path in folder.glob(".*.partial"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Generator[BinaryIO]:
    """Opens a new file, which replaces ``path`` when the block ends without an error.

    It is written beside ``path`` and renamed: a link at ``path`` is replaced and not followed, and
    if the block raises, ``path`` is unchanged. Errors of the block are raised unchanged.

    Raises:
        HotloopError: The file cannot be created or written.
    """
    with errors_named(path):
        raw = _Unfinished.beside(path)
    unfinished = Path(os.fsdecode(raw.name))
    try:
        with raw:  # if the block raises, the buffer is not flushed
            file = io.BufferedWriter(raw)
            yield file
            file.flush()
            with errors_named(path):
                os.fsync(raw.fileno())
                unfinished.replace(path)
    finally:
        with suppress(OSError):  # remove_unfinished removes it later
            unfinished.unlink(missing_ok=True)


class _Unfinished(io.FileIO):
    """A new file, locked, whose errors name the file that it will replace."""

    def __init__(self, path: Path, target: Path) -> None:
        super().__init__(path, "x")
        self._target = target

    @classmethod
    def beside(cls, target: Path) -> _Unfinished:
        """Makes an unfinished file in the folder of its target."""
        while True:
            file = cls(target.with_name(f".{uuid.uuid4().hex}.partial"), target)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:  # remove_unfinished came before the lock
                return file
            file.close()

    def write(self, data: Any, /) -> int:
        with errors_named(self._target):
            return super().write(data)


@contextmanager
def opened_to_append(path: Path) -> Generator[BinaryIO]:
    """Opens or creates a file to read and to append to, unbuffered.

    Raises:
        ConfigError: ``path`` is a link, or not a regular file.
        HotloopError: The file cannot be opened.
    """
    with errors_named(path):
        if path.is_symlink():
            raise ConfigError(f"{path} is a link: it is not followed. Remove it.")
        # O_NONBLOCK: open() must not wait for a pipe. O_NOFOLLOW: a link made meanwhile fails.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ConfigError(f"{path} is not a regular file: it cannot be written. Remove it.")
        yield file


def tail(file: BinaryIO, lines: int, start: int = 0) -> list[str]:
    """Returns the last lines of a log that are not blank, from its last ``TAIL_BYTES``.

    Args:
        file: The log, open for reading.
        lines: The most lines to return.
        start: The position at which to begin.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(start, size - TAIL_BYTES))
    text = file.read(TAIL_BYTES).decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()][-lines:]


def append_line(path: Path, line: bytes) -> None:
    """Appends a line to a file in one write, and syncs it to the disk.

    If the last line is incomplete, the new line still begins on a line of its own.

    Raises:
        HotloopError: As for ``opened_to_append``, or the disk is full.
    """
    with opened_to_append(path) as file, errors_named(path):
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        if file.write(line + b"\n") <= len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())


def make_folder(path: Path) -> Path:
    """Creates a folder of the user's choice, and its parents, unless they exist.

    Raises:
        HotloopError: It cannot be created.
    """
    with errors_named(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def make_subfolder(folder: Path, name: str) -> Path:
    """Creates a folder within another one, unless it exists.

    Raises:
        ConfigError: A link with its name exists.
        HotloopError: It cannot be created.
    """
    path = folder / name
    if path.is_symlink():
        raise ConfigError(f"{path} is a link: it is not followed. Remove it.")
    return make_folder(path)


def check_component(name: str) -> str:
    """Returns ``name`` if it is one component of a path, and so cannot leave a folder.

    Raises:
        ConfigError: It is empty, too long, leads to another folder, or has control characters. The
            message begins with "must be": the caller puts the name of the field before it.
    """
    if not name or name in (".", "..") or re.search(r"[/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]", name):
        raise ConfigError(
            f"must be the name of one folder, without slashes and control characters, not "
            f"{shorten_value(name)}."
        )
    if (n_bytes := len(name.encode())) > MAX_NAME_BYTES:
        raise ConfigError(
            f"must be a name of at most {MAX_NAME_BYTES} bytes, not of {n_bytes}: "
            f"{shorten_value(name)}."
        )
    return name


def file_name(text: str) -> str:
    """Makes a file name, without a suffix, from a text such as the name of a cell.

    Unusual characters become underscores; a long text is cut, and a hash is appended.
    """
    name = re.sub(r"[^\w.+=-]+", "_", text, flags=re.ASCII).lstrip(".")
    if len(name) <= MAX_NAME_BYTES // 2:
        return name or "_"
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return f"{name[: MAX_NAME_BYTES // 2]}-{digest[:12]}"


@contextmanager
def errors_named(path: Path) -> Generator[None]:
    """Turns OSErrors about a path into HotloopErrors."""
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:  # a lone surrogate
        possible = False
    if not possible:
        raise HotloopError(f"cannot write {shorten_value(str(path))}: no file can have this name.")
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise HotloopError(f"cannot write {shorten(str(path))}: {why}.") from error
