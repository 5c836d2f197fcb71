"""Leaves the tables of a results folder beside its records."""

from __future__ import annotations

from pathlib import Path

from hotloop.report.read import read_records
from hotloop.report.recommend import MAX_DELTA_LN_PPL
from hotloop.report.table import Table, make_table, to_csv, to_markdown


def write_results(folder: Path, *, max_delta_ln_ppl: float = MAX_DELTA_LN_PPL) -> Table:
    """Writes ``table.md`` and ``table.csv`` from ``records.jsonl``, and returns what they show.

    Args:
        folder: A results folder.
        max_delta_ln_ppl: The quality loss that the recommendation tolerates.

    Raises:
        ConfigError: There are no records there, or some are of a newer schema than this reads.
    """
    table = make_table(read_records(folder), max_delta_ln_ppl=max_delta_ln_ppl)
    (folder / "table.md").write_text(to_markdown(table), encoding="utf-8")
    (folder / "table.csv").write_text(to_csv(table), encoding="utf-8")
    return table
