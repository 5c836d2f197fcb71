"""The chat page, at ``/``: a self-contained HTML response, without build step or other downloads.

Its parts are files beside this one: a document, a style sheet and JavaScript modules. This module
joins them. JavaScript modules are joined in the order in which they import each other, so that the
page has one script; the content security policy has its hash. That policy allows nothing else: no
other script or style, only connections to this server, and, by Trusted Types, no string that is
parsed as HTML.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent

MODULES = (
    "dom",
    "notices",
    "sse",
    "api",
    "markdown",
    "store",
    "answer",
    "messages",
    "sidebar",
    "server",
    "settings",
    "main",
)
"""The modules of the script; each imports only from earlier ones."""

_IMPORT = re.compile(r"^import \{[^}]*\} from \"[^\"]*\";\n", re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(async )?function|const|class)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Page:
    """The page and its headers.

    Attributes:
        body: The document, in UTF-8.
        headers: Headers of the response.
        tag: The entity tag (ETag) of this version.
    """

    body: bytes
    headers: dict[str, str]
    tag: str


@cache
def page() -> Page:
    """Joins the parts of the page."""
    css = (FOLDER / "page.css").read_text("utf-8")
    script = "\n".join(_without_imports(name) for name in MODULES)
    document = (FOLDER / "page.html").read_text("utf-8")
    for slot, text in (("{{ css }}", css), ("{{ script }}", script)):
        assert document.count(slot) == 1, f"the document has one {slot}"
        document = document.replace(slot, text)
    body = document.encode()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": _policy(script, css),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
        "ETag": tag,
    }
    return Page(body=body, headers=headers, tag=tag)


async def chat_page(request: Request) -> Response:
    """Sends the page, or only 304 if the browser has this version."""
    shown = page()
    if request.headers.get("if-none-match") == shown.tag:
        return Response(status_code=304, headers=shown.headers)
    return Response(shown.body, headers=shown.headers)


def _without_imports(name: str) -> str:
    source = (FOLDER / f"{name}.js").read_text("utf-8")
    return _EXPORT.sub("", _IMPORT.sub("", source))


def _policy(script: str, css: str) -> str:
    rules = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(css),
        "connect-src": "'self'",
        "img-src": "data:",  # the icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
