"""The text on which quality is measured.

By default it is CPython's own help topics (``pydoc_data.topics``, 0.5 MB of English about Python),
because every machine has them, and nothing needs to be downloaded. Any UTF-8 file can be used.
Figures on different texts cannot be compared, so every record has the text's name and hash.
"""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path

from hotloop.outside import config_error, decode, read_bytes

MAX_TEXT_BYTES = 2**30
"""The most bytes that are read; windows are taken from the beginning of a text."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text, its name in a record, and the SHA-256 of its UTF-8 bytes in hexadecimal."""

    name: str
    content: str
    sha256: str


def load_text(path: Path | None) -> Text:
    """Reads a UTF-8 file, or the default text if ``path`` is None.

    A file's bytes are not changed, including line ends and a byte-order mark.

    Raises:
        ConfigError: The file is missing, not readable, not UTF-8, or empty.
    """
    if path is None:
        return _default_text()
    data = read_bytes(path, limit=MAX_TEXT_BYTES, refuse=config_error)
    content = decode(data, path, config_error)
    if not content.strip():
        raise config_error(path, "holds no text to predict")
    return Text(name=path.name, content=content, sha256=hashlib.sha256(data).hexdigest())


def _default_text() -> Text:
    from pydoc_data.topics import topics

    content = "\n\n".join(topics[name] for name in sorted(topics))
    name = f"pydoc_data.topics ({platform.python_implementation()} {platform.python_version()})"
    return Text(name=name, content=content, sha256=hashlib.sha256(content.encode()).hexdigest())
