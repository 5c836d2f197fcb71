"""What a recipe would run, and whether it would fit, without loading anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hotloop.errors import ConfigError, UnsupportedError
from hotloop.sweep.job import EngineSource
from hotloop.sweep.models import read_stored_form, settle_schemes
from hotloop.sweep.recipe import Recipe, cell_names, expand
from hotloop.types import EngineConfig
from hotloop.weights.hub import resolve_model


@dataclass(frozen=True, kw_only=True)
class PlannedCell:
    """A cell that has not been run.

    Attributes:
        cell: Its name.
        config: The configuration.
        predicted_bytes: The memory it would take, by purpose; None where that is not known.
        free_bytes: What its device has free now.
        fits: Whether it would fit now; None where that is not known.
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
        """Whether nothing is known that would keep it from running."""
        return self.unsupported is None and self.fits is not False

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return {**vars(self), "config": self.config.to_dict()}


def plan(
    recipe: Recipe,
    *,
    source: EngineSource = EngineSource(),  # noqa: B008 (frozen)
) -> list[PlannedCell]:
    """The cells of a recipe, in the order in which they would run.

    Raises:
        ModelNotFoundError: There is no such model on this machine.
    """
    configs = expand(recipe)
    if source.is_own and recipe.weights == "checkpoint":
        stored = read_stored_form(resolve_model(recipe.model))
        configs = [settle_schemes(config, stored) for config in configs]
    names = cell_names(configs)
    return [_planned(name, config, source) for name, config in zip(names, configs, strict=True)]


def _planned(name: str, config: EngineConfig, source: EngineSource) -> PlannedCell:
    _, predict = source.resolve()
    try:
        memory = predict(config)
    except (UnsupportedError, ConfigError) as error:
        return PlannedCell(cell=name, config=config, unsupported=str(error))
    if memory is None:
        return PlannedCell(cell=name, config=config)
    return PlannedCell(
        cell=name,
        config=config,
        predicted_bytes=memory.to_dict(),
        free_bytes=memory.free_bytes,
        fits=memory.total_bytes <= memory.free_bytes,
    )
