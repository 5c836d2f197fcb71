"""Makes text from outside safe to print: file headers, recipes, records, paths, templates, answers.

Terminals interpret some characters instead of showing them, and streams cannot encode others.
``printable`` is applied at the single place where text is printed, and to names that are stored in
a copy of a model, since JSON cannot have lone surrogates.
"""

from __future__ import annotations

import re

_UNPRINTABLE = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, except tab and newline
    "\u2028\u2029"  # line and paragraph separators
    "\u202a-\u202e\u2066-\u2069"  # bidirectional embeddings, overrides and isolates
    "\ud800-\udfff"  # lone surrogates: bytes of a path or an argument that are not UTF-8
    "]"
)


def printable(text: str) -> str:
    r"""Escapes characters that a terminal interprets or cannot show: ``\x1b``, ``\u202e``.

    Newlines, tabs and printable characters are unchanged.
    """
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)
