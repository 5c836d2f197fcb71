"""The cache folder, for data that can be made or fetched again: models, kernels, compiled graphs.

The user chooses it; by default it is in the user's home. If there is no home (as for some users of
containers) or it cannot be written (a read-only file system, another user's folder, a file), a
temporary folder replaces it, and ``cache_note`` says so. Files in a read-only cache folder are
still used.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

from hotloop.errors import shorten

PRESENTATION = ("cli", "serve", "report")
"""The packages above ``sweep``: they start or show measurements, and cannot change a figure."""


def cache_dir() -> Path:
    """Returns ``$HOTLOOP_CACHE``, else ``$XDG_CACHE_HOME/hotloop``, else ``~/.cache/hotloop``.

    If the user has no home, it is the folder that ``writable_cache_dir`` returns.
    """
    return _configured() or _temporary_dir()


def writable_cache_dir() -> Path:
    """Returns the cache folder, which it creates; a temporary folder if it is not writable.

    Raises:
        OSError: There is no place for temporary files either.
    """
    configured = _configured()
    if configured is None or _why_not_writable(configured) is not None:
        return _temporary_dir()
    return configured


def cache_path(*parts: str) -> Path:
    """Returns the path of a cached file, if it exists, and else a path where it can be written.

    Raises:
        OSError: It does not exist, and there is no place to write it.
    """
    found = cache_dir().joinpath(*parts)
    return found if os.path.exists(found) else writable_cache_dir().joinpath(*parts)


@functools.cache
def code_hash(*packages: str) -> str:
    """Hashes hotloop's own source files: the same code has the same hash wherever it is installed.

    A version does not identify code between two releases.

    Args:
        *packages: The packages whose files are hashed. Without any, these are all files that a
            measurement can run: those of every package but ``PRESENTATION``.
    """
    package, code = Path(__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*")):
        name = path.relative_to(package)
        counts = name.parts[0] in packages if packages else name.parts[0] not in PRESENTATION
        if counts and "__pycache__" not in name.parts and path.is_file():
            content = path.read_bytes()
            code.update(f"{name.as_posix()} {len(content)}\n".encode() + content)
    return code.hexdigest()


def cache_note() -> str | None:
    """Returns why a temporary folder replaces the cache folder; None if none does."""
    configured = _configured()
    if configured is None:
        why = "no home directory is known"
    elif (problem := _why_not_writable(configured)) is not None:
        why = f"{shorten(str(configured))} cannot be written: {problem}"
    else:
        return None
    return f"{why}; the cache is {_temporary_dir()}. To choose another folder, set HOTLOOP_CACHE."


def expand_home(path: str | Path) -> Path | None:
    """Expands ``~`` in a path; returns None if no home directory is known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return None


def _configured() -> Path | None:
    if explicit := os.environ.get("HOTLOOP_CACHE"):
        return expand_home(explicit)
    base = expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return base / "hotloop" if base is not None else None


def _why_not_writable(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        return "it is not a folder"
    except OSError as error:
        return error.strerror or str(error)
    # os.access, not the mode: it accounts for read-only file systems and the superuser.
    return None if os.access(folder, os.W_OK | os.X_OK) else "Permission denied"


def _temporary_dir() -> Path:
    """Returns this user's temporary folder, the same for every process."""
    return _private_dir(Path(tempfile.gettempdir(), f"hotloop-{os.getuid()}"))


@functools.cache
def _private_dir(folder: Path) -> Path:
    """Returns ``folder`` if only this user can write to it, or else a new temporary folder.

    The cache holds compiled code, which hotloop runs. The new folder is removed at exit.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        pass
    else:
        private = found.st_uid == os.getuid() and not found.st_mode & 0o022
        if stat.S_ISDIR(found.st_mode) and private:
            return folder
    made = Path(tempfile.mkdtemp(prefix="hotloop-"))
    atexit.register(_remove, made, os.getpid())
    return made


def _remove(folder: Path, owner: int) -> None:
    """Removes a process's folder when that process ends, but not when a fork of it ends."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
