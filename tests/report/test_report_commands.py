"""The command of a row, as the command line takes it, is of the row's configuration."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hotloop.bench.record import Record
from hotloop.cli.app import main
from hotloop.errors import ConfigError
from hotloop.report.commands import bench_command
from hotloop.report.read import read_records
from hotloop.sweep import job
from hotloop.types import is_draft_model

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FOLDERS = (
    "demo-2-core-x86_64",
    "demo-full-2-core-x86_64",
    "h100-llama-2-70b",
    "h200-asclepius-13b",
    "h200-self-drafts",
)


def kept() -> Iterator[Any]:
    """The records in the repository, one for each command."""
    by_command: dict[str, Record] = {}
    for folder in FOLDERS:
        for file in sorted((RESULTS / folder).rglob("records.jsonl")):
            for one in read_records(file):
                if one.baseline is None:
                    by_command.setdefault(bench_command(one), one)
    yield from (pytest.param(one, id=command) for command, one in by_command.items())


@pytest.mark.parametrize("record", list(kept()))
def test_a_rows_command_measures_its_configuration_and_workload_and_no_other(monkeypatch, record):
    asked = []

    def not_run(configs, workload, _quality):
        asked.append((*configs, workload))
        raise ConfigError("known already")

    monkeypatch.setattr(job, "make_jobs", not_run)
    assert main(shlex.split(bench_command(record))[1:]) == 2
    ((config, workload),) = asked
    assert workload == record.workload
    filled_in = {"max_seq_len", "max_batch_size"}  # from the workload, and what is scored beside it
    unused = set() if is_draft_model(record.config["draft"]) else {"draft_quant"}
    for name in record.config.keys() - filled_in - unused:
        assert getattr(config, name) == record.config[name], name
