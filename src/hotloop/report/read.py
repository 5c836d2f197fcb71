"""Reads records, and selects those that a table shows."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from hotloop.bench.record import Record
from hotloop.sweep.store import RECORDS, read_file
from hotloop.untrusted import config_error


def read_records(
    path: Path, *, on_problem: Callable[[str], object] = warnings.warn
) -> list[Record]:
    """Reads the records of a results folder or of a file, in the order of writing.

    Args:
        path: The folder or the file.
        on_problem: Called with a message about every incomplete or damaged line, which is skipped.

    Raises:
        ConfigError: There are no records, or some have a newer schema than this version reads.
    """
    file = path / RECORDS if path.is_dir() else path
    records, problems = read_file(file)
    for problem in problems:
        on_problem(problem)
    if not records:
        left_out = f": {len(problems)} of its lines are not valid records" if problems else ""
        raise config_error(file, f"holds no records{left_out}")
    return records


def latest(records: Iterable[Record]) -> list[Record]:
    """Returns the last record of each cell: first those of other engines, then hotloop's.

    Each part is in the order of first appearance. Other engines come first because hotloop is
    compared with them; a resumed sweep may have measured them last.

    A cell is identified by its engine and configuration, not by its name, which has the actual
    execution mode in place of ``auto``. ``max_seq_len`` depends on the workload and is ignored, so
    that new figures replace old ones after a change of workload, unless cells differ in it and
    their names contain it.
    """
    cells: dict[tuple[str | None, str], Record] = {}
    for record in records:
        config = dict(record.config)
        if "/max_seq_len=" not in record.cell:
            config.pop("max_seq_len", None)
        cells[record.baseline, json.dumps(config, sort_keys=True)] = record
    return sorted(cells.values(), key=lambda record: record.baseline is None)
