"""The text on which quality is measured.

By default it is CPython's own help topics (``pydoc_data.topics``, 0.5 MB of English about Python),
because every machine has them, and nothing needs to be downloaded. Any UTF-8 file can be used.
Figures on different texts cannot be compared, so every record has the text's name and hash.

Article boundaries are known for three kinds of text: the default one, whose topics are articles; a
``.jsonl`` file, each line of which is an article, ``{"text": ...}``; and a text with titles as in
WikiText, ``= Title =`` on a line of its own.
"""

from __future__ import annotations

import hashlib
import itertools
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hotloop.untrusted import config_error, decode, parse_json, read_bytes

MAX_TEXT_BYTES = 2**30
"""The largest file that is read; windows are taken from the beginning of a text."""

DEFAULT_TEXT = "pydoc_data.topics"
"""The beginning of the default text's name, before the version of Python."""

_TITLE = re.compile(r"^ ?= [^=\n]+ = ?$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text.

    Attributes:
        name: Its name in a record.
        content: The text.
        sha256: SHA-256 of its file in hexadecimal.
        starts: The offsets in characters at which its articles begin, ascending; empty if that is
            not known.
    """

    name: str
    content: str
    sha256: str
    starts: tuple[int, ...] = ()


def load_text(path: Path | None) -> Text:
    """Reads a UTF-8 file, or the default text if ``path`` is None.

    A file is not normalized: line ends and a byte-order mark are not changed. The texts
    of a ``.jsonl`` file are joined by empty lines.

    Raises:
        ConfigError: The file is missing, not readable, not UTF-8, or holds no text; or a line of a
            ``.jsonl`` file is not ``{"text": ...}``.
    """
    if path is None:
        return _default_text()
    data = read_bytes(path, limit=MAX_TEXT_BYTES, refuse=config_error)
    content = decode(data, path, config_error)
    starts = [title.start() for title in _TITLE.finditer(content)]
    if path.suffix == ".jsonl":
        content, starts = _join(list(_articles(content, path)))
    if not content.strip():
        raise config_error(path, "holds no text to score")
    sha256 = hashlib.sha256(data).hexdigest()
    return Text(name=path.name, content=content, sha256=sha256, starts=tuple(starts))


def _articles(content: str, path: Path) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            text = parse_json(line, place, refuse=config_error).get("text")
            if not isinstance(text, str):
                raise config_error(place, 'an article of a .jsonl text is {"text": "..."}')
            yield text


def _join(articles: Sequence[str]) -> tuple[str, list[int]]:
    """Joins articles by empty lines; also returns where they begin."""
    ends = itertools.accumulate(len(article) + 2 for article in articles)
    return "\n\n".join(articles), [0, *ends][:-1]


def _default_text() -> Text:
    from pydoc_data.topics import topics

    content, starts = _join([topics[name] for name in sorted(topics)])
    name = f"{DEFAULT_TEXT} ({platform.python_implementation()} {platform.python_version()})"
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    return Text(name=name, content=content, sha256=sha256, starts=tuple(starts))
