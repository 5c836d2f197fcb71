"""The command of a row, as the command line takes it, is of the row's configuration."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_records import record

from hotloop.bench.record import Record, TaskFigures
from hotloop.bench.statistics import answers_figure, mean_figure
from hotloop.cli.app import main
from hotloop.errors import ConfigError
from hotloop.report.commands import measure_command
from hotloop.report.read import read_records
from hotloop.sweep import job, runner
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
                    by_command.setdefault(measure_command(one), one)
    yield from (pytest.param(one, id=command) for command, one in by_command.items())


@pytest.mark.parametrize("record", list(kept()))
def test_a_rows_command_measures_its_configuration_and_workload_and_no_other(monkeypatch, record):
    asked = []

    def not_run(configs, workload, quality, **_):
        asked.append((*configs, workload, quality))
        raise ConfigError("known already")

    for module in (job, runner):
        monkeypatch.setattr(module, "make_jobs", not_run)
    assert main(shlex.split(measure_command(record))[1:]) == 2
    ((config, workload, quality),) = asked
    assert workload == record.workload
    if (protocol := record.quality_protocol) is None:
        assert quality is None
    else:
        assert (quality.window, quality.n_windows) == (protocol.window, protocol.n_windows)
        assert quality.text is None, "these records are of the default text"
    filled_in = {"max_seq_len", "max_batch_size"}  # from the workload, and what is scored beside it
    unused = set() if is_draft_model(record.config["draft"]) else {"draft_quant"}
    for name in record.config.keys() - filled_in - unused:
        assert getattr(config, name) == record.config[name], name


def test_a_cell_that_was_only_scored_has_a_command_that_scores_it_and_nothing_else(monkeypatch):
    asked = []

    def not_run(configs, workload, quality):
        asked.append((*configs, workload, quality))
        raise ConfigError("known already")

    monkeypatch.setattr(job, "make_jobs", not_run)
    scored = record(
        "int8/eager",
        loss=0.1,
        workload=None,
        tasks=(
            TaskFigures(task="arc", sha256="0", metric="acc", accuracy=answers_figure([True] * 9)),
        ),
        other_perplexities={"lm-eval word": mean_figure([9.0, 9.1])},
        provenance={"reference_model": "base"},
    )
    protocol = scored.quality_protocol.model_copy(update={"tasks": ("arc.jsonl",)})
    scored = scored.model_copy(update={"quality_protocol": protocol})
    command = measure_command(scored)
    assert command == (
        "hotloop eval m --quant int8 --execution eager --window 256 --n-windows 5 --text 'a text' "
        "--reference base --tasks arc.jsonl --items 9 --protocols gptq,lm-eval"
    )
    stored = protocol.model_copy(update={"reference": "as stored/eager bfloat16 of base"})
    against = scored.model_copy(update={"quality_protocol": stored})
    assert " --against base " in measure_command(against)
    assert main(shlex.split(command)[1:]) == 2
    ((config, workload, quality),) = asked
    assert (config.quant, workload) == ("int8", None)
    assert (quality.reference, quality.n_items) == ("base", 9)
    assert quality.tasks == [str(Path("arc.jsonl").resolve())]
    assert quality.protocols == ["gptq", "lm-eval"]
