"""Imports only the implementation that a name selects.

A registry is a literal dict ``name -> "module:attribute"``: model families (``models.families``),
quantization schemes (``quant``), encodings (``quant.encodings``), engines (``baselines``) and eval
tasks (``evaluate.tasks``). In these places, a string from outside selects an implementation whose
imports are heavy; everything else is a plain function call.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from hotloop.errors import UnknownNameError


def resolve(kind: str, registry: Mapping[str, str], name: str) -> Any:
    """Imports and returns the implementation of ``name``.

    Args:
        kind: The kind of the registry's entries, for the error message.
        registry: ``name -> "module:attribute"``.
        name: The name to look up.

    Raises:
        UnknownNameError: ``name`` is not in ``registry``; the message has the nearest name and all
            choices.
    """
    if name not in registry:
        raise UnknownNameError(kind, name, registry)
    return load(registry[name])


def load(place: str) -> Any:
    """Imports and returns the attribute that ``module:attribute`` names."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)
