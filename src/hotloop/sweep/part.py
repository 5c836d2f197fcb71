"""Selects a part of a sweep's cells, so that machines can share a sweep without a job scheduler."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from hotloop.errors import ConfigError, shorten_value

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Part ``index`` of the ``count`` parts of a sweep, counted from 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Reads a part such as ``2/4``.

        Raises:
            ConfigError: The text is not a part.
        """
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text.strip())
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ConfigError(
                f"--cells {shorten_value(text)} is not a part: give i/n, such as 1/4 to 4/4."
            )
        return cls(index=int(found[1]), count=int(found[2]))

    def of(self, cells: Sequence[T]) -> list[T]:
        """Returns every ``count``-th cell, so that all parts take about the same time."""
        return list(cells[self.index - 1 :: self.count])

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}"
