"""Caches what tests build, so that the next run need not build it again."""

import hashlib
import os
import shutil
import time
from pathlib import Path

from hotloop.cache import cache_dir

CACHE = cache_dir()
"""Resolved before tests set another cache folder."""

UNUSED_S = 14 * 24 * 3600.0
"""Folders that no test has used for this long are deleted."""


def kept_folder(kind: str, *texts: str) -> Path:
    """Makes a folder for what is built of ``texts``, which name all that it depends on."""
    folder = CACHE / kind / digest(*texts)
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    for other in folder.parent.iterdir():
        if time.time() - other.stat().st_mtime > UNUSED_S:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
