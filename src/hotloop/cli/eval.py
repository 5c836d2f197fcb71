"""``hotloop eval``: the quality of one configuration."""

from __future__ import annotations

from typing import Annotated

from cyclopts import App

from hotloop.cli.engine import note_cache
from hotloop.cli.options import (
    DEFAULT_ENGINE,
    DEFAULT_QUALITY,
    QUALITY,
    EngineOptions,
    Json,
    Model,
    QualityOptions,
    option,
)
from hotloop.cli.output import show_record

app = App(
    name="eval",
    help_epilogue="""\
Examples:
  hotloop eval smollm2-135m --quant int4-g64
  hotloop eval smollm2-135m --quant int8 --text book.txt --json
  hotloop eval smollm2-135m --quant int8 --tasks topics,arc.jsonl --items 1000
  hotloop eval ./my-model --against ./its-base-model --window 8192 --n-windows 4
  hotloop eval ./my-model --window 1024 --no-reference""",
)


@app.default
def evaluate(
    model: Model,
    /,
    *,
    engine: EngineOptions = DEFAULT_ENGINE,
    quality: QualityOptions = DEFAULT_QUALITY,
    no_reference: Annotated[
        bool, option(QUALITY, "Measure perplexity alone, without a comparison.")
    ] = False,
    json: Json = False,
) -> int:
    """Score one configuration: perplexity, tasks, and the loss due to quantization.

    The reference is the unquantized model in the same element type. It is scored
    first, on the same windows of text and the same tasks, and cached.
    Where the model's file is quantized, the comparison is with its weights as they
    are stored, unless --reference names an unquantized model; --against names any
    other. With --tasks there is a verdict on accuracy: pass, fail, or underpowered.
    Windows longer than 1,024 tokens also get figures by position. --json prints a record, as
    a sweep writes it, without speed. The exit code is 0 if it was scored, whatever
    the figures; 2 if the configuration is refused; and 1 if it failed or did not fit.
    """
    from hotloop.evaluate.reference_store import ReferenceStore
    from hotloop.sweep.cell import refuse_cell, score_cell
    from hotloop.sweep.events import CellFinished, CellStarted
    from hotloop.sweep.job import make_jobs
    from hotloop.sweep.progress import SweepProgress
    from hotloop.sweep.recipe import expand, recipe_from_flags
    from hotloop.sweep.reference import is_reference, with_reference

    note_cache()
    recipe = recipe_from_flags(
        model,
        matrix={},
        defaults=engine.given(),
        workload={"prompt_tokens": 1, "new_tokens": 2},  # the windows decide what must fit
        quality=quality.fields(),
    )
    (job,) = make_jobs(expand(recipe), None, recipe.quality_options)
    if (record := refuse_cell(job)) is None:
        with SweepProgress() as progress, ReferenceStore() as store:
            if no_reference:
                job = job.model_copy(update={"no_reference_reason": "not requested"})
            elif is_reference(job):
                why = "it is the unquantized reference itself"
                job = job.model_copy(update={"no_reference_reason": why})
            elif job.no_reference_reason is None:
                job = with_reference(job, store, progress)
            progress(CellStarted(job.cell, 1, 1))
            record = score_cell(job, progress)
            progress(CellFinished(record))
    return show_record(record, json=json)
