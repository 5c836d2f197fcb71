"""``hotloop report``: the table of a results folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App

from hotloop.cli.options import DEFAULT_TOLERANCE, OUTPUT, Json, Tolerance, option
from hotloop.cli.output import note, print_json, print_rich

app = App(
    name="report",
    help_epilogue="""\
Examples:
  hotloop report results/demo
  hotloop report results/demo --format markdown > table.md
  hotloop report results/demo --json | jq .decode_tok_s.mean""",
)


@app.default
def report(
    results: Annotated[Path, option(OUTPUT, "A results folder, or a file of records.")],
    /,
    *,
    form: Annotated[
        Literal["table", "markdown", "csv", "json"],
        option(OUTPUT, "json is the records themselves, one a line.", name="--format"),
    ] = "table",
    tolerance: Tolerance = DEFAULT_TOLERANCE,
    json: Json = False,
) -> int:
    """Print the table of a sweep, and its recommendation.

    Of each configuration the last attempt counts. Lines that are damaged or
    half-written are named on standard error and left out.
    """
    from hotloop.report.read import latest, read_records
    from hotloop.report.table import make_table, to_csv, to_markdown, to_rich

    records = read_records(results, on_problem=note)
    if json or form == "json":
        for record in latest(records):
            print_json(record.model_dump(mode="json"))
        return 0
    table = make_table(records, max_delta_ln_ppl=tolerance)
    match form:
        case "markdown":
            sys.stdout.write(to_markdown(table))
        case "csv":
            sys.stdout.write(to_csv(table))
        case _:
            print_rich(to_rich(table))
    return 0
