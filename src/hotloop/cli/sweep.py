"""``hotloop sweep``: measures speed and quality of many configurations of a model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App

from hotloop.cli.engine import note_cache
from hotloop.cli.options import (
    DEFAULT_MATRIX,
    DEFAULT_QUALITY,
    DEFAULT_REPLACEMENT,
    DEFAULT_WEIGHTS,
    DEFAULT_WORKLOAD,
    EXECUTION,
    MODEL,
    OUTPUT,
    QUALITY,
    Json,
    MatrixOptions,
    QualityOptions,
    ReplacementOptions,
    Tolerance,
    WeightOptions,
    WorkloadOptions,
    option,
)
from hotloop.cli.output import note, print_json, print_memory, print_rich, print_text
from hotloop.errors import ConfigError, HotloopError
from hotloop.types import MAX_DELTA_LN_PPL
from hotloop.writing import file_name

if TYPE_CHECKING:
    from hotloop.bench.record import Status
    from hotloop.sweep.plan import PlannedCell
    from hotloop.sweep.recipe import Recipe

app = App(
    name="sweep",
    help_epilogue="""\
Examples:
  hotloop sweep smollm2-135m
  hotloop sweep smollm2-135m --quant none,int8 --batch 4 --out results/batch4
  hotloop sweep recipe.yaml --resume
  hotloop sweep recipe.yaml --model ./my-model --draft-model ./my-draft
  hotloop sweep --weights random --shape llama-2-13b --dry-run""",
)

FAILURES: tuple[Status, ...] = ("failed", "timeout", "interrupted")


@app.default
def sweep(
    model: Annotated[
        str | None,
        option(
            MODEL,
            "A model, or a recipe (.yaml). A recipe sets all options below; only its models, "
            "interpreters and --weights can be replaced here.",
        ),
    ] = None,
    /,
    *,
    weights: WeightOptions = DEFAULT_WEIGHTS,
    replacement: ReplacementOptions = DEFAULT_REPLACEMENT,
    matrix: MatrixOptions = DEFAULT_MATRIX,
    workload: WorkloadOptions = DEFAULT_WORKLOAD,
    quality: QualityOptions = DEFAULT_QUALITY,
    no_quality: Annotated[bool, option(QUALITY, "Measure speed alone.")] = False,
    tolerance: Tolerance = MAX_DELTA_LN_PPL,
    timeout_s: Annotated[
        float | None,
        option(EXECUTION, "Time limit of a configuration, in seconds: for hangs.", "1800"),
    ] = None,
    out: Annotated[
        Path | None,
        option(
            OUTPUT,
            "The results folder: records and tables.",
            "results/ and the name of the recipe or the model",
        ),
    ] = None,
    resume: Annotated[
        bool,
        option(
            OUTPUT,
            "Skip configurations that the results folder already has. Those that could not run "
            "are tried again if hotloop, packages, driver, GPUs or free memory have changed; "
            "a note counts those that other code of hotloop has measured.",
        ),
    ] = False,
    cells: Annotated[
        str | None,
        option(
            OUTPUT,
            "Measure part i of n of the cells, given as i/n, into a folder of its own, so that n "
            "machines can share a matrix.",
            "all",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        option(
            OUTPUT,
            "Run the cells on the Ray cluster of this address, such as auto. Needs the extra ray.",
            "on this machine",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        option(OUTPUT, "Print the cells and the memory that each would take, and measure nothing."),
    ] = False,
    json: Json = False,
) -> int:
    """Measure every combination of options, and recommend one.

    Each runs in a process of its own, so that one that does not fit or crashes
    is a row of the table like the others. A quantized copy is measured in its own
    scheme, unless --quant says otherwise. Ctrl-C keeps finished configurations,
    and --resume skips them. The exit code is 1 if no configuration could be
    measured or shown not to fit.
    """
    from hotloop.report.layout import to_rich
    from hotloop.report.read import read_records
    from hotloop.report.write import REPORT, write_results
    from hotloop.sweep.models import is_quantized_copy
    from hotloop.sweep.part import Part
    from hotloop.sweep.plan import plan
    from hotloop.sweep.progress import SweepProgress
    from hotloop.sweep.recipe import recipe_from_flags
    from hotloop.sweep.runner import run_sweep
    from hotloop.sweep.store import RECORDS

    if model is not None and model.endswith((".yaml", ".yml")):
        given = [*weights.given(), *matrix.given(), *workload.given(), *quality.given()]
        given += ["no_quality"] * no_quality + ["timeout_s"] * (timeout_s is not None)
        if fixed := [name for name in given if name not in ("weights", "shape")]:
            raise ConfigError(f"{_flags(fixed)} cannot be given with a recipe: set it in {model}.")
        recipe = _recipe(model, weights, replacement)
    else:
        if replaced := replacement.given():
            raise ConfigError(
                f"{_flags(replaced)} can be given only with a recipe. Without one, give "
                "MODEL, and the draft model to --draft."
            )
        name, axes = weights.model(model), matrix.matrix()

        def recipe_with(axes: dict[str, list[Any]]) -> Recipe:
            return recipe_from_flags(
                name,
                name=results_name(name),
                weights=weights.weights,
                matrix=axes,
                defaults={**matrix.defaults(), "seed": weights.weights_seed},
                workload=workload.fields(),
                quality=False if no_quality else quality.fields(),
                timeout_s=timeout_s,
            )

        recipe = recipe_with(axes)
        by_default = "quant" not in matrix.given()
        if by_default and recipe.weights == "checkpoint" and is_quantized_copy(name):
            del axes["quant"]  # it has its own scheme and can have no other
            recipe = recipe_with(axes)
    part = None if cells is None else Part.parse(cells)
    if dry_run:
        planned = plan(recipe) if part is None else part.of(plan(recipe))
        _show_plan(planned, json=json)
        if not any(cell.may_run for cell in planned):
            raise HotloopError("no cell can run here: see above.")
        return 0

    note_cache()
    results = out or Path("results", recipe.name if part is None else f"{recipe.name}-{part}")
    note(f"Records and tables go to {results}.")
    stopped = False
    records = []
    try:
        with SweepProgress() as progress:
            records = run_sweep(
                recipe, results, resume=resume, part=part, ray_address=ray, on_event=progress
            )
    except KeyboardInterrupt:
        stopped = True
        note("Stopped. The same command with --resume continues.")
        path = results / RECORDS
        if not path.exists() or path.stat().st_size == 0:
            return 130
    written = read_records(results, on_problem=note)
    table = write_results(results, written, max_delta_ln_ppl=tolerance)
    if json:
        for row in table.rows:
            print_json(row.record.model_dump(mode="json"))
    else:
        print_rich(to_rich(table))
    note(f"Records and tables are in {results}, and the report is {results / REPORT}.")
    if stopped:
        return 130
    return int(all(record.status in FAILURES for record in records))


def results_name(model: str) -> str:
    """Returns a model's name for a folder: the name of its own folder or file."""
    name = os.path.basename(os.path.abspath(model)) or model
    return file_name(name.removesuffix(".gguf"))


def _recipe(path: str, weights: WeightOptions, replacement: ReplacementOptions) -> Recipe:
    """Reads a recipe, with the models and interpreters that the command line gives instead."""
    from hotloop.sweep.recipe import load_recipe, replace_models

    recipe = load_recipe(path)
    if weights.shape is not None and replacement.model is not None:
        raise ConfigError("give either --model or --shape.")
    return replace_models(
        recipe,
        weights=weights.weights,
        model=replacement.model or weights.shape,
        draft_model=replacement.draft_model,
        pythons={e: Path(path) for e, path in replacement.by_engine("python").items()},
        checkpoints=replacement.by_engine("checkpoint"),
    )


def _flags(names: Iterable[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


def _show_plan(cells: list[PlannedCell], *, json: bool) -> None:
    if json:
        for cell in cells:
            print_json(cell.to_dict())
        return
    shared = any(cell.config.tensor_parallel > 1 for cell in cells)
    per = "Memory per rank" if shared else "Memory"
    print_text(f"{per} of each cell; weights include rotary tables for the tokens of cache:\n")
    print_memory(
        "configuration", ((c.cell, c.predicted_bytes or {}, c.fits, c.unsupported) for c in cells)
    )
