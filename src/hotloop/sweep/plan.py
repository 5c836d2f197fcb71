"""Plans a recipe without loading anything: lists its cells, and whether each would fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hotloop.errors import ConfigError, UnsupportedError
from hotloop.sweep.job import Cell, make_cells
from hotloop.sweep.models import Models
from hotloop.sweep.recipe import Recipe, expand
from hotloop.types import EngineConfig


@dataclass(frozen=True, kw_only=True)
class PlannedCell:
    """A cell that has not been run.

    Attributes:
        cell: Its name.
        config: The configuration.
        predicted_bytes: The memory that it would take, by purpose; None if that is not known.
        free_bytes: Bytes that its device has free now.
        fits: Whether it would fit now; None if that is not known.
        unsupported: Why this machine or this model does not allow it.
    """

    cell: str
    config: EngineConfig
    predicted_bytes: dict[str, int] | None = None
    free_bytes: int | None = None
    fits: bool | None = None
    unsupported: str | None = None

    @property
    def may_run(self) -> bool:
        """Whether it can run, as far as that is known."""
        return self.unsupported is None and self.fits is not False

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields, as JSON can hold them."""
        return {**vars(self), "config": self.config.to_dict()}


def plan(recipe: Recipe) -> list[PlannedCell]:
    """Plans the cells of a recipe, in the order in which they would run.

    Raises:
        ModelNotFoundError: There is no such model on this machine.
    """
    free: dict[tuple[str, int], int] = {}
    return [_planned(cell, free) for cell in make_cells(expand(recipe), Models())]


def _planned(cell: Cell, free: dict[tuple[str, int], int]) -> PlannedCell:
    """Plans a cell.

    Args:
        cell: The cell.
        free: Free bytes by device and number of ranks: the first cell adds its value, and all later
            cells are compared with that.
    """
    try:
        memory = cell.engine.predict(cell.config)
    except (UnsupportedError, ConfigError) as error:
        return PlannedCell(cell=cell.name, config=cell.config, unsupported=str(error))
    if memory is None:
        return PlannedCell(cell=cell.name, config=cell.config)
    where = memory.device, cell.config.tensor_parallel
    memory = replace(memory, free_bytes=free.setdefault(where, memory.free_bytes))
    return PlannedCell(
        cell=cell.name,
        config=cell.config,
        predicted_bytes=memory.to_dict(),
        free_bytes=memory.free_bytes,
        fits=memory.total_bytes <= memory.free_bytes,
    )
