"""Chat templates: the program, in Jinja, by which a model turns messages into one prompt.

A template comes with the model and is not trusted: it runs in Jinja's immutable sandbox, which
lets it neither reach into Python nor change what it is given. What it finds around itself
(functions, filters, whitespace rules) is what Hugging Face's transformers gives it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hotloop.errors import CheckpointError, RequestError


class _GenerationBlock(Extension):
    """Lets ``{% generation %}``, which marks the assistant's text for training, pass."""

    tags = {"generation"}  # noqa: RUF012 (the name and type are Jinja's)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _to_json(value: Any, *, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def compile_template(source: str, file: Path) -> jinja2.Template:
    """Compiles a chat template.

    Args:
        source: The template.
        file: Where it came from, for error messages.

    Raises:
        CheckpointError: It is not valid Jinja.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    functions = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    try:
        return environment.from_string(source, globals=functions)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(file, f"its chat template is not valid Jinja: {error}") from error


def render(
    template: jinja2.Template,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
) -> str:
    """The prompt that a template makes of ``messages``.

    Raises:
        RequestError: The template refuses the messages, or fails on them.
    """
    given = {"tools": None, "documents": None, **variables}
    try:
        return template.render(
            **given,
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
        )
    except jinja2.TemplateError as error:
        raise RequestError(f"the model's chat template refuses these messages: {error}") from error
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise RequestError(f"the model's chat template fails on these messages: {error}") from error
