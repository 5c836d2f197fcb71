"""Where hotloop keeps what it can make or fetch again: models, built kernels, compiled graphs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``$HOTLOOP_CACHE``, else ``$XDG_CACHE_HOME/hotloop``, else ``~/.cache/hotloop``."""
    if explicit := os.environ.get("HOTLOOP_CACHE"):
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "hotloop"
