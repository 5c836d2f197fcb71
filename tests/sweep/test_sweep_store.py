from __future__ import annotations

import json

import pytest

from hotloop.bench.record import SCHEMA_VERSION, Record
from hotloop.errors import ConfigError
from hotloop.sweep.store import append, locked, read_file


def record(cell: str) -> Record:
    return Record(cell=cell, config={}, status="failed", started_at="2025-01-02T03:04:05")


def test_what_is_appended_is_read_back_in_order(tmp_path):
    path = tmp_path / "records.jsonl"
    for cell in "abc":
        append(path, record(cell))
    records, problems = read_file(path)
    assert [r.cell for r in records] == ["a", "b", "c"]
    assert problems == []


def test_a_torn_line_costs_only_itself(tmp_path):
    path = tmp_path / "records.jsonl"
    append(path, record("a"))
    append(path, record("b"))
    path.write_bytes(path.read_bytes()[:-3])
    append(path, record("c"))
    records, problems = read_file(path)
    assert [r.cell for r in records] == ["a", "c"]
    assert len(problems) == 1
    assert "line 2: is not valid JSON" in problems[0]


def test_lines_that_are_no_records_are_reported_and_left_out(tmp_path):
    path = tmp_path / "records.jsonl"
    append(path, record("a"))
    with path.open("ab") as file:
        file.write(b'{"cell": "b"}\n[1]\n\xff\xfe\n\n')
    records, problems = read_file(path)
    assert [r.cell for r in records] == ["a"]
    assert [problem.partition("line ")[2][0] for problem in problems] == ["2", "3", "4"]
    assert "config: is missing" in problems[0]


def test_records_of_a_newer_schema_are_refused_and_not_misread(tmp_path):
    path = tmp_path / "records.jsonl"
    newer = json.loads(record("a").model_dump_json()) | {"schema_version": SCHEMA_VERSION + 1}
    path.write_text(json.dumps(newer) + "\n")
    with pytest.raises(ConfigError, match=r"line 1: schema version 2 is newer .* upgrade hotloop"):
        read_file(path)


def test_a_folder_has_one_sweep_at_a_time(tmp_path):
    with locked(tmp_path), pytest.raises(ConfigError, match="another sweep"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass
