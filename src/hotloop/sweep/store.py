"""``records.jsonl``: one record a line, appended for good, read with suspicion.

A line is written with one call and forced to the disk, so whatever ends the machine loses at most
the line being written. What a reader cannot parse it reports and leaves alone.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from hotloop.bench.record import SCHEMA_VERSION, Record
from hotloop.errors import ConfigError
from hotloop.writing import append_line, opened_to_append

RECORDS = "records.jsonl"


def read_file(path: Path) -> tuple[list[Record], list[str]]:
    """The records of a file in the order they were written, and its lines that are none.

    Returns:
        The records, and a sentence for each line that was not understood: half-written because
        something ended its writer, or damaged since.

    Raises:
        ConfigError: A record is of a newer schema than this hotloop knows, or the file cannot be
            read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read the records {path}: {error}") from error
    records, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            said = json.loads(line)
            _check_schema(said, f"{path}, line {number}")
            records.append(Record.model_validate_json(line))
        except (UnicodeDecodeError, json.JSONDecodeError):
            problems.append(f"{path}, line {number}, is half-written or damaged; it is ignored.")
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            problems.append(
                f"{path}, line {number}, is no record ({place}: {first['msg']}); it is ignored."
            )
    return records, problems


def append(path: Path, record: Record) -> None:
    """Adds a record; see ``append_line``."""
    append_line(path, record.model_dump_json().encode())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second sweep out of a results folder.

    Raises:
        ConfigError: Another sweep is writing there.
        HotloopError: The folder cannot be written to; see ``opened_to_append``.
    """
    with opened_to_append(folder / ".lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another sweep is writing to {folder}: wait for it, or choose another folder."
            ) from error
        yield


def _check_schema(said: object, where: str) -> None:
    found = said.get("schema_version") if isinstance(said, dict) else None
    if isinstance(found, int) and found > SCHEMA_VERSION:
        raise ConfigError(
            f"{where}: schema version {found} is newer than this hotloop reads "
            f"({SCHEMA_VERSION}): upgrade hotloop."
        )
