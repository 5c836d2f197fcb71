"""Reads the answer format of a request, as a grammar.

``response_format`` is OpenAI's field, ``text.format`` the field of its other API, and
``structured_outputs`` is vLLM's, whose older fields begin with ``guided_``. A format is enforced or
refused, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hotloop.errors import shorten_value
from hotloop.serve.errors import invalid_value
from hotloop.types import Grammar

_KINDS = "text, json_object, json_schema, regex or lark"
_VLLM_FIELDS = ("json", "json_object", "regex", "grammar", "choice")
_VLLM_OPTIONS = ("disable_any_whitespace", "disable_fallback", "whitespace_pattern")
"""Further fields of vLLM, which are ignored: they choose whitespace, or another backend."""


def format_grammar(place: str, given: Mapping[str, Any] | None) -> Grammar | None:
    """Returns the grammar of a ``response_format``, or of a ``text.format``.

    In addition to OpenAI's types there are ``regex``, with the field ``regex``, and ``lark``, with
    the field ``grammar``.

    Args:
        place: The field.
        given: Its value; None if it is absent.

    Raises:
        ApiError: Its type is unknown, or its source is missing.
        RequestError: The source is too large.
    """
    match given:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return Grammar(kind="json_object")
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return _schema(schema)
        case {"type": "json_schema", "schema": dict(schema)}:
            return _schema(schema)
        case {"type": "regex", "regex": str(source)} if source:
            return Grammar(kind="regex", source=source)
        case {"type": "lark", "grammar": str(source)} if source:
            return Grammar(kind="lark", source=source)
        case {"type": "json_schema" | "regex" | "lark" as kind}:
            field = {"json_schema": "schema", "regex": "regex", "lark": "grammar"}[kind]
            raise invalid_value(place, f"{kind} needs a {field}.")
        case _:
            raise invalid_value(place, f"must be of the type {_KINDS}, not {shorten_value(given)}.")


def vllm_grammar(place: str, given: Mapping[str, Any]) -> Grammar | None:
    """Returns the grammar of vLLM's fields: ``json``, ``regex``, ``grammar``, ``choice``.

    Args:
        place: The field that holds them, or the prefix of their names.
        given: The fields.

    Raises:
        ApiError: There are several fields, or one has no grammar or is not supported.
        RequestError: The source is too large.
    """
    asked = {
        k: v
        for k, v in given.items()
        if v is not None and v is not False and k not in _VLLM_OPTIONS
    }
    for kind in asked:
        if kind not in _VLLM_FIELDS:
            fields = ", ".join(_VLLM_FIELDS)
            raise invalid_value(
                place, f"{shorten_value(kind)} is not supported. Supported fields: {fields}."
            )
    if len(asked) > 1:
        raise invalid_value(place, f"{', '.join(asked)} were given: give one.")
    for kind, value in asked.items():
        match kind, value:
            case "json_object", True:
                return Grammar(kind="json_object")
            case "json", dict():
                return _schema(value)
            case "json", str() if value:
                return Grammar(kind="json_schema", source=value)
            case "regex", str() if value:
                return Grammar(kind="regex", source=value)
            case "grammar", str() if value:
                return Grammar(kind="lark", source=value)
            case "choice", [_, *_] if all(isinstance(one, str) and one for one in value):
                choices = " | ".join(map(quoted, value))
                return Grammar(kind="lark", source=f"start: {choices}")
            case _:
                raise invalid_value(place, f"{kind} cannot have the value {shorten_value(value)}.")
    return None


def quoted(text: str) -> str:
    """Writes a text as a string of Lark: a string of JSON, except for one control character."""
    return json.dumps(text).replace("\x7f", r"\u007f")


def _schema(schema: Mapping[str, Any]) -> Grammar:
    return Grammar(kind="json_schema", source=json.dumps(schema, ensure_ascii=False))
