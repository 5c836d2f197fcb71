"""The tables of docs/gpu-tables.md are those of the records that are kept, with their doubts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gpu import speed, tables

from hotloop.bench.record import MEASURED
from hotloop.bench.statistics import mean_figure
from hotloop.report.read import read_records

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/gpu-tables.md").read_text()
FOLDERS = re.findall(r"<!-- tables of ([\w-]+): begin -->", PAGE)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_tables_of_a_gpu_are_those_of_its_records(name):
    found = re.search(
        rf"<!-- tables of {name}: begin -->\n(.*?)\n<!-- tables of {name}: end -->", PAGE, re.DOTALL
    )
    assert found is not None
    assert found[1].strip() == tables(ROOT / "benchmarks/results" / name).strip()


def test_no_part_of_a_step_is_below_0():
    assert FOLDERS
    for name in FOLDERS:
        assert not re.search(r"\| -\d", tables(ROOT / "benchmarks/results" / name))


def test_a_speed_that_is_unstable_or_of_two_repeats_says_so():
    (record, *_) = (
        each
        for each in read_records(ROOT / "benchmarks/results/h200/llama-3.1-8b")
        if each.status in MEASURED
    )

    def shown(status, *samples):
        changed = {"status": status, "decode_tok_s": mean_figure(list(samples))}
        return speed(record.model_copy(update=changed))

    assert "(" not in shown("ok", 9.0, 10.0, 11.0)
    assert shown("ok", 9.0, 11.0).endswith("(2 repeats)")
    assert shown("unstable", 5.0, 10.0, 15.0).endswith("(unstable)")
    assert shown("unstable", 5.0, 15.0).endswith("(unstable, 2 repeats)")
