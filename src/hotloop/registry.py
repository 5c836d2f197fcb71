"""Imports the implementation of a name, and no other.

A registry is a literal dict ``name -> "module:attribute"``: model families (``models.families``),
quantization schemes (``quant``), encodings (``quant.encodings``), engines (``baselines``) and eval
tasks (``evaluate.tasks``). They exist because there a string from outside picks an implementation
whose imports are heavy; everything else is a plain function call.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from hotloop.errors import UnknownNameError


def resolve(kind: str, registry: Mapping[str, str], name: str) -> Any:
    """Imports and returns the implementation that ``name`` stands for.

    Args:
        kind: The word for what the registry holds, for the error message.
        registry: ``name -> "module:attribute"``.
        name: The name to look up.

    Raises:
        UnknownNameError: ``name`` is not in ``registry``; the nearest and all choices are named.
    """
    if name not in registry:
        raise UnknownNameError(kind, name, registry)
    return load(registry[name])


def load(place: str) -> Any:
    """Imports and returns the attribute that ``module:attribute`` names."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)
