"""Text from outside, made safe to print: file headers, recipes, records, paths, templates, answers.

A terminal obeys some characters instead of showing them, and a stream cannot encode others.
``printable`` is applied where text is printed, so that no one before that place has to think of it.
"""

from __future__ import annotations

import re

_OBEYED = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, except tab and newline
    "\u2028\u2029"  # line and paragraph separators
    "\u202a-\u202e\u2066-\u2069"  # bidirectional embeddings, overrides and isolates
    "\ud800-\udfff"  # lone surrogates: bytes of a path or an argument that are not UTF-8
    "]"
)


def printable(text: str) -> str:
    r"""Escapes what a terminal would obey or cannot show, as Python does: ``\x1b``, ``\u202e``.

    Newlines and tabs stay. What is printable already is returned as it is.
    """
    return _OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)
