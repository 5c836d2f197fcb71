"""Parses YAML with bounds on depth and size, which count expanded anchors.

This stops the attack "billion laughs": if every anchor is used ten times by the next one, nine
levels are a few hundred characters and 10^9 values, which every copy, comparison and message would
visit one by one. So the graph of nodes is counted as a tree while it is composed, before any value
is built.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml

from hotloop.errors import shorten, shorten_value
from hotloop.untrusted import Refuse, config_error

MAX_DEPTH = 20
"""The most levels of nested lists and mappings."""

MAX_NODES = 50_000
"""The most keys, values, lists and mappings, each counted as often as it is used."""

MAX_SCALAR_CHARS = 4_096
"""The most characters of a single text or number: the longest path on Linux (PATH_MAX)."""


def parse_yaml(text: str, file: object, *, refuse: Refuse = config_error) -> Any:
    """Returns the single document of a YAML text, as Python's own types.

    Args:
        text: The document.
        file: Its file, for the error.
        refuse: Makes the error.

    Raises:
        HotloopError: It is not valid YAML, exceeds a bound of this module, or gives a key twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        message = ", ".join(filter(None, (error.context, error.problem)))
        raise refuse(str(file), f"is not valid YAML: {shorten(message)}{place}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an invalid date or number
        message = shorten(" ".join(str(error).split()))
        raise refuse(str(file), f"is not valid YAML: {message}") from error


class _Loader(yaml.SafeLoader):
    """A loader with bounds. Keys must be strings, and a repeated key is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}  # the expanded size of each finished node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> Any:
        """Composes a node, and counts the nodes of its expansion."""
        event = self.peek_event()
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _yaml_error(f"nested more than {MAX_DEPTH} levels deep", event)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if node not in self._sizes:
                anchor = shorten_value(event.anchor)
                raise _yaml_error(f"the anchor {anchor} contains itself", event)
            return node
        self._sizes[node] = self._size(node, event)
        if max(self._sizes[node], len(self._sizes)) > MAX_NODES:
            raise _yaml_error(f"more than {MAX_NODES:,} values, anchors expanded", event)
        return node

    def _size(self, node: yaml.Node, event: yaml.Event) -> int:
        match node:
            case yaml.MappingNode():
                return 1 + sum(self._sizes[part] for pair in node.value for part in pair)
            case yaml.SequenceNode():
                return 1 + sum(self._sizes[part] for part in node.value)
        if (length := len(node.value)) > MAX_SCALAR_CHARS:
            message = f"{shorten_value(node.value)} has {length:,} characters"
            raise _yaml_error(f"{message}, more than {MAX_SCALAR_CHARS:,}", event)
        return 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Makes a dict of a mapping; refuses keys that are not text or are repeated."""
        for key, _ in node.value:
            if key.tag not in (_TEXT, _MERGE):
                raise _yaml_error("a key must be text", key)
        keys = Counter(key.value for key, _ in node.value if key.tag == _TEXT)
        for key, count in keys.items():
            if count > 1:
                raise _yaml_error(f"the key {shorten_value(key)} is given {count} times", node)
        return super().construct_mapping(node, deep)


_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


def _yaml_error(message: str, where: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=message, problem_mark=where.start_mark)
