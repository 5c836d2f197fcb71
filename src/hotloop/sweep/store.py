"""``records.jsonl``: one record per line, append-only; lines are validated when read.

A line is written with one call and synced to the disk, so a crash loses at most the line being
written. Reading reports lines that cannot be parsed, and does not change them.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from hotloop.bench.record import SCHEMA_VERSION, Record
from hotloop.errors import ConfigError, shorten, shorten_value
from hotloop.untrusted import config_error, open_file, parse_json, validated
from hotloop.writing import append_line, opened_to_append

RECORDS = "records.jsonl"


MAX_FILE_BYTES = 2**28
"""The largest file of records that is read, in bytes."""

MAX_LINE_BYTES = 2**22
"""The longest line that is read, in bytes; a record has about ten thousand."""


def read_file(path: Path) -> tuple[list[Record], list[str]]:
    """Reads the records of a file in order, and reports invalid lines.

    Returns:
        The records, and a sentence for each line that is skipped because it is incomplete or
        damaged, or has invalid values.

    Raises:
        ConfigError: A record has a newer schema than this version reads, or the file cannot be read
            or is too large.
    """
    records, problems = [], []
    with open_file(path, refuse=config_error) as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_FILE_BYTES:
            raise config_error(path, f"has {size:,} bytes, more than {MAX_FILE_BYTES:,}")
        for number, line in enumerate(_lines(file), start=1):
            place = f"{shorten(str(path))}, line {number}"
            if len(line) > MAX_LINE_BYTES:
                problems.append(f"{place}: has more than {MAX_LINE_BYTES:,} bytes; it is skipped.")
                continue
            if not line.strip():
                continue
            try:
                data = parse_json(line.strip(), place, refuse=config_error)
            except ConfigError as error:
                problems.append(f"{error}; it is incomplete or damaged, and is skipped.")
                continue
            _check_schema(data, place)
            try:
                records.append(validated(Record, data, place, refuse=config_error))
            except ConfigError as error:
                problems.append(f"{error}; it is not a record, and is skipped.")
    return records, problems


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yields the lines of a file; of a line that is too long, only the beginning."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        rest = line
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES + 1)
        yield line


def append(path: Path, record: Record) -> None:
    """Appends a record; see ``append_line``."""
    append_line(path, record.model_dump_json().encode())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a results folder against a second sweep.

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


def _check_schema(data: dict[str, Any], where: str) -> None:
    found = data.get("schema_version")
    if isinstance(found, int) and found > SCHEMA_VERSION:
        raise config_error(
            where,
            f"schema version {shorten_value(found)} is newer than this hotloop reads "
            f"({SCHEMA_VERSION}): upgrade hotloop.",
        )
