"""``hotloop report``: the table of a results folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App

from hotloop.cli.options import OUTPUT, Json, Tolerance, option
from hotloop.cli.output import note, print_json, print_rich, print_text
from hotloop.errors import ConfigError
from hotloop.types import MAX_DELTA_LN_PPL

if TYPE_CHECKING:
    from hotloop.report.layout import Table

app = App(
    name="report",
    help_epilogue="""\
Examples:
  hotloop report results/demo
  hotloop report results/demo --html
  hotloop report results/demo --format markdown > table.md
  hotloop report results/demo --json | jq .decode_tok_s.mean
  hotloop report results/13b results/70b --layout published""",
)


@app.default
def report(
    results: Annotated[Path, option(OUTPUT, "A results folder, or a file of records.")],
    /,
    *more: Annotated[
        Path,
        option(
            OUTPUT,
            "Further results folders to combine, with --html, --png or --layout published.",
        ),
    ],
    layout: Annotated[
        Literal["full", "published"],
        option(OUTPUT, "full shows every figure; published shows tokens/s, in a table per model."),
    ] = "full",
    form: Annotated[
        Literal["table", "markdown", "csv", "json"],
        option(OUTPUT, "json prints the records themselves, one per line.", name="--format"),
    ] = "table",
    html: Annotated[
        bool,
        option(
            OUTPUT,
            "Write one HTML page with plots, tables and every sample, which needs no other file "
            "and no network, and print its path.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        option(OUTPUT, "With --html: the page's file.", "report.html in the first folder"),
    ] = None,
    png: Annotated[
        bool,
        option(
            OUTPUT,
            "Write each plot of --html as a PNG file, beside that page, and print their paths. "
            "Needs the extra png.",
        ),
    ] = False,
    write: Annotated[
        bool,
        option(
            OUTPUT,
            "Also write table.md, table.csv, published.md and report.html into the folders.",
        ),
    ] = False,
    tolerance: Tolerance = MAX_DELTA_LN_PPL,
    json: Json = False,
) -> int:
    """Print the table of a sweep, and its recommendation.

    The last attempt of each configuration counts. Lines that are damaged or
    incomplete are skipped, with a note on standard error. --layout published
    is the layout of published tables of decoding speed.
    """
    from hotloop.report import published, table
    from hotloop.report.html import to_html
    from hotloop.report.layout import to_markdown, to_rich
    from hotloop.report.png import check_library
    from hotloop.report.read import read_records
    from hotloop.report.write import REPORT, write_plots, write_results
    from hotloop.writing import write_whole

    if more and layout == "full" and not (html or png):
        raise ConfigError(
            f"{1 + len(more)} results folders were given, but only --html, --png and "
            "--layout published combine several. Give one."
        )
    if out is not None and not (html or png):
        raise ConfigError("--out is the file of --html: add --html, or redirect the output.")
    if png:
        check_library()
    paths = (results, *more)
    if write and (files := [path for path in paths if path.is_file()]):
        raise ConfigError(f"--write needs a results folder, and {files[0]} is a file.")
    experiments = [read_records(path, on_problem=note) for path in paths]
    if write:
        for folder, records in zip(paths, experiments, strict=True):
            write_results(folder, records, max_delta_ln_ppl=tolerance)
    if html or png:
        page_file = out or (results.parent if results.is_file() else results) / REPORT
        written = []
        if html:
            write_whole(page_file, to_html(*experiments, max_delta_ln_ppl=tolerance))
            written.append(page_file)
        if png:
            written += write_plots(page_file.parent, experiments, max_delta_ln_ppl=tolerance)
        if json:
            print_json({"files": list(map(str, written))})
        else:
            print_text("\n".join(map(str, written)))
        return 0
    tables: list[Table]
    if layout == "full":
        tables = [table.make_table(experiments[0], max_delta_ln_ppl=tolerance)]
    else:
        tables = published.make_published_tables(*experiments)
    if json or form == "json":
        for row in (row for each in tables for row in each.rows):
            print_json(row.record.model_dump(mode="json"))
        return 0
    match form:
        case "markdown":
            print_text("\n".join(map(to_markdown, tables)), end="")
        case "csv":
            full = layout == "full"
            print_text(table.to_csv(tables[0]) if full else published.to_csv(tables), end="")
        case _:
            for each in tables:
                print_rich(to_rich(each))
    return 0
