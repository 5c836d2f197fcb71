"""``hotloop bench``: the speed of one configuration."""

from __future__ import annotations

from typing import Annotated

from cyclopts import App

from hotloop.cli.engine import note_cache
from hotloop.cli.options import (
    DEFAULT_ENGINE,
    DEFAULT_WEIGHTS,
    DEFAULT_WORKLOAD,
    MODEL,
    EngineOptions,
    Json,
    WeightOptions,
    WorkloadOptions,
    option,
)
from hotloop.cli.output import print_json, print_record

app = App(
    name="bench",
    help_epilogue="""\
Examples:
  hotloop bench smollm2-135m --quant int8 --execution compile
  hotloop bench --weights random --shape llama-2-13b --quant int4-g128
  hotloop bench smollm2-135m --prompt-tokens 5 --new-tokens 200 --json""",
)


@app.default
def bench(
    model: Annotated[str | None, option(MODEL, "The model, unless --shape names one.")] = None,
    /,
    *,
    engine: EngineOptions = DEFAULT_ENGINE,
    weights: WeightOptions = DEFAULT_WEIGHTS,
    workload: WorkloadOptions = DEFAULT_WORKLOAD,
    json: Json = False,
) -> int:
    """Time one configuration.

    --json prints the record, as a sweep writes it. hotloop eval measures quality,
    and hotloop sweep compares configurations.
    """
    from hotloop.bench.record import MEASURED
    from hotloop.sweep.cell import refuse_cell, run_cell
    from hotloop.sweep.events import CellFinished, CellStarted
    from hotloop.sweep.job import make_jobs
    from hotloop.sweep.progress import SweepProgress
    from hotloop.sweep.recipe import expand, recipe_from_flags

    note_cache()
    recipe = recipe_from_flags(
        weights.model(model),
        weights=weights.weights,
        matrix={},
        defaults={**engine.given(), "seed": weights.weights_seed},
        workload=workload.fields(),
        quality=False,
    )
    (job,) = make_jobs(expand(recipe), recipe.workload, None)
    if (record := refuse_cell(job)) is None:
        with SweepProgress() as progress:
            progress(CellStarted(job.cell, 1, 1))
            record = run_cell(job, progress)
            progress(CellFinished(record))
    if json:
        print_json(record.model_dump(mode="json"))
    else:
        print_record(record)
    return 0 if record.status in MEASURED else 1
