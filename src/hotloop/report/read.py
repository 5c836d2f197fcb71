"""Records off the disk, and which of them a table shows."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from hotloop.bench.record import Record
from hotloop.outside import config_error
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
    file = path / RECORDS if path.is_dir() else path
    records, problems = read_file(file)
    for problem in problems:
        on_problem(problem)
    if not records:
        left_out = f": {len(problems)} of its lines are none" if problems else ""
        raise config_error(file, f"holds no records{left_out}")
    return records


def latest(records: Iterable[Record]) -> list[Record]:
    """The last record of each cell, in the order in which cells first appear.

    A cell is told by its engine and its configuration, and not by its name, which says what
    ``auto`` turned out to be where an attempt got so far. ``max_seq_len`` follows the workload:
    after a change of workload the new figures replace the old ones; unless the name has it,
    because cells differ in it.
    """
    cells: dict[tuple[str | None, str], Record] = {}
    for record in records:
        config = dict(record.config)
        if "/max_seq_len=" not in record.cell:
            config.pop("max_seq_len", None)
        cells[record.baseline, json.dumps(config, sort_keys=True)] = record
    return list(cells.values())
