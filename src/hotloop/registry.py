"""From a name to an implementation, without importing the others.

A registry is a literal dict ``name -> "module:attribute"``. There are four: model families
(``models.families``), quantization schemes (``quant``), baselines and evaluation tasks. They exist
because there a string from outside picks an implementation whose imports are heavy; everything
else is a plain function call.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from hotloop.errors import UnknownNameError


def resolve(kind: str, registry: Mapping[str, str], name: str) -> Any:
    """Imports and returns what ``name`` stands for.

    Args:
        kind: What the registry holds, for the error message.
        registry: ``name -> "module:attribute"``.
        name: The name to look up.

    Raises:
        UnknownNameError: ``name`` is not in ``registry``; the nearest and all choices are named.
    """
    if name not in registry:
        raise UnknownNameError(kind, name, registry)
    module, _, attribute = registry[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
