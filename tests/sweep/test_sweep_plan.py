from __future__ import annotations

from sweep_fakes import End, create, predict

from hotloop.errors import UnsupportedError
from hotloop.sweep.job import EngineSource
from hotloop.sweep.plan import plan
from hotloop.sweep.recipe import recipe_from_flags
from hotloop.types import EngineConfig

__all__ = ["create"]


def planned_memory(config: EngineConfig):
    if config.seed == End.UNSUPPORTED:
        raise UnsupportedError("no such kernel here")
    return predict(config)


def test_a_plan_says_of_each_cell_whether_it_fits_or_why_it_cannot_be():
    recipe = recipe_from_flags(
        "m", matrix={"seed": [int(e) for e in (End.OK, End.PREDICTED_OOM, End.UNSUPPORTED)]}
    )
    source = EngineSource(create=f"{__name__}:create", predict=f"{__name__}:planned_memory")
    fits, too_big, unsupported = plan(recipe, source=source)
    assert (fits.fits, fits.free_bytes) == (True, 2**31)
    assert fits.predicted_bytes == {"total_bytes": 2**30, "free_bytes": 2**31}
    assert (too_big.fits, too_big.unsupported) == (False, None)
    assert (unsupported.fits, unsupported.unsupported) == (None, "no such kernel here")
    assert fits.to_dict()["config"]["model"] == "m"


def test_an_engine_without_a_prediction_is_planned_without_one():
    source = EngineSource(create=f"{__name__}:create", predict=None)
    (cell,) = plan(recipe_from_flags("m", matrix={}), source=source)
    assert (cell.cell, cell.fits, cell.predicted_bytes) == ("none/auto", None, None)
