"""Writes the tables of a results folder beside its records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from hotloop.bench.record import Record
from hotloop.report import png
from hotloop.report.html import charts_of, to_html
from hotloop.report.layout import Table, to_markdown
from hotloop.report.published import make_published_tables
from hotloop.report.table import make_table, to_csv
from hotloop.types import MAX_DELTA_LN_PPL
from hotloop.writing import replacing, write_whole

REPORT = "report.html"
"""The file name of a results folder's HTML report."""


def write_results(
    folder: Path, records: Sequence[Record], *, max_delta_ln_ppl: float = MAX_DELTA_LN_PPL
) -> Table:
    """Writes ``table.md``, ``table.csv``, ``published.md`` and ``report.html``, or replaces them.

    Args:
        folder: A results folder.
        records: The records of its ``records.jsonl``.
        max_delta_ln_ppl: The quality loss that the recommendation tolerates.

    Returns:
        The table of ``table.md``.

    Raises:
        HotloopError: A file cannot be written.
    """
    table = make_table(records, max_delta_ln_ppl=max_delta_ln_ppl)
    published = "\n".join(map(to_markdown, make_published_tables(records)))
    write_whole(folder / "table.md", to_markdown(table))
    write_whole(folder / "table.csv", to_csv(table))
    write_whole(folder / "published.md", published)
    write_whole(folder / REPORT, to_html(records, max_delta_ln_ppl=max_delta_ln_ppl))
    return table


def write_plots(
    folder: Path,
    experiments: Iterable[Iterable[Record]],
    *,
    max_delta_ln_ppl: float = MAX_DELTA_LN_PPL,
) -> list[Path]:
    """Writes every plot of the records' HTML page as a PNG file.

    Args:
        folder: The folder to write into.
        experiments: As for ``to_html``.
        max_delta_ln_ppl: The quality loss that the recommendation tolerates.

    Returns:
        The files.

    Raises:
        HotloopError: A file cannot be written.
    """
    charts = charts_of(*experiments, max_delta_ln_ppl=max_delta_ln_ppl)
    files = [folder / name for name in png.file_names(charts)]
    for path, chart in zip(files, charts, strict=True):
        with replacing(path) as file:
            png.write_png(chart, file)
    return files
