"""A sweep's results name the configuration that is served."""

from pathlib import Path

import pytest
from report_records import record

from hotloop.cli.results import measured_config
from hotloop.errors import ConfigError
from hotloop.sweep.store import append
from hotloop.types import EngineConfig


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A sweep's results: int8 is fast and good, int4 faster and worse, one is another engine's."""
    made = [
        record("none/eager", 100.0, loss=0.0),
        record("int8/auto", 200.0, loss=0.001, engine={"execution": "compile"}),
        record("int4-g64/eager", 300.0, loss=0.5),
        record("vllm/x", 900.0, baseline="vllm"),
    ]
    made[1].config.update({"max_seq_len": 96, "max_batch_size": 1, "draft": "ngram"})
    for each in made:
        append(tmp_path / "records.jsonl", each)
    return tmp_path


def test_the_recommended_configuration_is_served_as_it_was_measured(results):
    measured = measured_config(str(results))
    assert measured.name == "int8/auto"
    assert measured.config == EngineConfig(
        model="m", quant="int8", execution="compile", draft="ngram"
    )
    assert "recommended" in measured.why


def test_another_cell_is_served_by_its_name(results):
    measured = measured_config(f"{results}:int4-g64/eager")
    assert measured.config.quant == "int4-g64"
    assert "300" in measured.why
    assert measured_config(f"{results}/records.jsonl:none/eager").config.quant == "none"


def test_what_was_not_measured_is_not_served(results):
    with pytest.raises(ConfigError, match=r"Did you mean 'int8/auto'\?"):
        measured_config(f"{results}:int8/aut")
    (results / "records.jsonl").write_text(record("none/eager").model_dump_json() + "\n")
    with pytest.raises(ConfigError, match="recommends no configuration"):
        measured_config(str(results))


def test_the_row_of_another_engine_is_refused_with_the_rows_that_ran(results):
    append(results / "records.jsonl", record("none/auto/tp64", status="unsupported"))
    can = "that ran: none/eager, int8/auto, int4-g64/eager"
    with pytest.raises(ConfigError, match=rf"vllm/x .* of another engine \(vllm\).*{can}[.]$"):
        measured_config(f"{results}:vllm/x")


def test_a_record_without_a_model_is_refused(results):
    damaged = record("none/eager")
    del damaged.config["model"]
    (results / "records.jsonl").write_text(damaged.model_dump_json() + "\n")
    with pytest.raises(ConfigError, match="none/eager: its record names no model"):
        measured_config(f"{results}:none/eager")


def test_a_name_that_no_file_can_have_is_refused(results):
    with pytest.raises(ConfigError, match="there is no such results folder"):
        measured_config("x" * 5000)
    with pytest.raises(ConfigError, match="unknown configuration"):
        measured_config(f"{results}:{'x' * 5000}")
