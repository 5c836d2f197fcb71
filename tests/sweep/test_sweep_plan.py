from __future__ import annotations

import itertools

from sweep_fakes import End, create, planned, predict

from hotloop.baselines import ENGINES, EngineKind
from hotloop.errors import UnsupportedError
from hotloop.sweep.plan import plan
from hotloop.sweep.recipe import recipe_from_flags
from hotloop.types import EngineConfig


def planned_memory(config: EngineConfig):
    if config.seed == End.UNSUPPORTED:
        raise UnsupportedError("no such kernel here")
    return predict(config)


PREDICTED = EngineKind(create=create, predict=planned_memory)
FREE = itertools.count(2**31, -1)
LESS_EACH_TIME = EngineKind(create=create, predict=lambda _: planned(2**30, next(FREE)))
NOT_PREDICTED = EngineKind(create=create)


def test_a_plan_says_of_each_cell_whether_it_fits_or_why_it_cannot_be(monkeypatch):
    recipe = recipe_from_flags(
        "m", matrix={"seed": [int(e) for e in (End.OK, End.PREDICTED_OOM, End.UNSUPPORTED)]}
    )
    monkeypatch.setitem(ENGINES, "hotloop", f"{__name__}:PREDICTED")
    fits, too_big, unsupported = plan(recipe)
    assert (fits.fits, fits.free_bytes) == (True, 2**31)
    assert fits.predicted_bytes["total_bytes"] == 2**30
    assert (too_big.fits, too_big.unsupported) == (False, None)
    assert (unsupported.fits, unsupported.unsupported) == (None, "no such kernel here")
    assert fits.to_dict()["config"]["model"] == "m"


def test_an_engine_without_a_prediction_is_planned_without_one(monkeypatch):
    monkeypatch.setitem(ENGINES, "hotloop", f"{__name__}:NOT_PREDICTED")
    (cell,) = plan(recipe_from_flags("m", matrix={}))
    assert (cell.cell, cell.fits, cell.predicted_bytes) == ("auto/auto", None, None)


def test_cells_are_compared_by_one_look_at_the_free_memory(monkeypatch):
    monkeypatch.setitem(ENGINES, "hotloop", f"{__name__}:LESS_EACH_TIME")
    cells = plan(recipe_from_flags("m", matrix={"quant": ["none", "int8", "fp8"]}))
    assert len({cell.free_bytes for cell in cells}) == 1
