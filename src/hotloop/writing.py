"""Writing files of our own: whole, where they belong, and never through a link.

A results folder can come from somebody else. A link in it could lead a write anywhere, so the last
component of every path that is written is opened or replaced as itself and not followed. The
folders above it are the caller's choice.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from hotloop.errors import ConfigError, HotloopError, shorten, shorten_value

TAIL_BYTES = 2**16
"""Bytes of a log in which its last lines are looked for."""

MAX_NAME_BYTES = 200
"""The longest file name that is made of a text: file systems allow 255, and suffixes follow."""


def write_whole(path: Path, text: str) -> None:
    """Writes a UTF-8 file; readers see the old one or the new one, and nothing between.

    Raises:
        HotloopError: As for ``replacing``.
    """
    with replacing(path) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))


def remove_unfinished(folder: Path) -> None:
    """Removes what ``replacing`` has left in a folder where its process was killed."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Generator[BinaryIO]:
    """A file to write that takes the place of ``path`` when the block ends well.

    It is written beside ``path`` and renamed: a link there is replaced and not followed, and a
    block that raises leaves ``path`` as it was. The block's own errors pass unchanged.

    Raises:
        HotloopError: The file cannot be made or written.
    """
    with errors_named(path):
        unfinished = path.with_name(f".{uuid.uuid4().hex}.partial")
        raw = _Unfinished(unfinished, path)
    try:
        with raw:  # closed without its buffer: what the block left there is not written
            file = io.BufferedWriter(raw)
            yield file
            file.flush()
            with errors_named(path):
                os.fsync(raw.fileno())
                unfinished.replace(path)
    finally:
        with suppress(OSError):  # remove_unfinished removes what stays
            unfinished.unlink(missing_ok=True)


class _Unfinished(io.FileIO):
    """A new file whose errors of writing name the one that it will take the place of."""

    def __init__(self, path: Path, target: Path) -> None:
        super().__init__(path, "x")
        self._target = target

    def write(self, data: Any, /) -> int:
        with errors_named(self._target):
            return super().write(data)


@contextmanager
def opened_to_append(path: Path) -> Generator[BinaryIO]:
    """A file to read and to append to, unbuffered, made if it is not there.

    Raises:
        ConfigError: ``path`` is a link, or no regular file.
        HotloopError: The file cannot be opened.
    """
    with errors_named(path):
        if path.is_symlink():
            raise ConfigError(f"{path} is a link: it is not followed. Remove it.")
        # What is no regular file must not make open() wait, and a link made meanwhile fails.
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
        lines: How many lines to return at most.
        start: The position at which to begin; what is before it is left out.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(start, size - TAIL_BYTES))
    text = file.read(TAIL_BYTES).decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()][-lines:]


def append_line(path: Path, line: bytes) -> None:
    """Adds a line to a file: one write, on the disk when this returns.

    A half-written last line stays by itself: the new one begins on a line of its own.

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
    """Makes a folder of the user's choice, and those above it, where they are missing.

    Raises:
        HotloopError: It cannot be made.
    """
    with errors_named(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def make_subfolder(folder: Path, name: str) -> Path:
    """Makes a folder within another one, unless it is there.

    Raises:
        ConfigError: A link has its name.
        HotloopError: It cannot be made.
    """
    path = folder / name
    if path.is_symlink():
        raise ConfigError(f"{path} is a link: it is not followed. Remove it.")
    return make_folder(path)


def check_component(name: str) -> str:
    """A name that is one component of a path, and so stays in the folder that it is joined to.

    Raises:
        ConfigError: It is empty, too long, leads elsewhere, or holds control characters.
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
    """A file name, without a suffix, for a text such as the name of a cell.

    Unusual characters become underscores; of a long text its beginning and a hash are taken.
    """
    name = re.sub(r"[^\w.+=-]+", "_", text, flags=re.ASCII).lstrip(".")
    if len(name) <= MAX_NAME_BYTES // 2:
        return name or "_"
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return f"{name[: MAX_NAME_BYTES // 2]}-{digest[:12]}"


@contextmanager
def errors_named(path: Path) -> Generator[None]:
    """Turns the system's errors about a path into ours."""
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
