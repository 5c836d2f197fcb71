"""Records off the disk, and which of them a table shows."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from hotloop.bench.record import Record
from hotloop.sweep.store import RECORDS, read_file


def read_records(
    path: Path, *, on_problem: Callable[[str], object] = warnings.warn
) -> list[Record]:
    """The records of a results folder or of a file of records, in the order they were written.

    Args:
        path: The folder or the file.
        on_problem: Is told of every line that is half-written or damaged; those are left out.

    Raises:
        ConfigError: There are no records there, or some are of a newer schema than this reads.
    """
    records, problems = read_file(path / RECORDS if path.is_dir() else path)
    for problem in problems:
        on_problem(problem)
    return records


def latest(records: Iterable[Record]) -> list[Record]:
    """The last record of each cell, in the order in which cells first appear.

    A cell is told by its name, its engine and its configuration, but for ``max_seq_len``, which
    follows the workload: after a change of workload the new figures replace the old ones.
    """
    cells: dict[tuple[str, str | None, str], Record] = {}
    for record in records:
        config = {k: v for k, v in record.config.items() if k != "max_seq_len"}
        cells[record.cell, record.baseline, json.dumps(config, sort_keys=True)] = record
    return list(cells.values())
