"""The tables of docs/quality.md are those of the records that are kept."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from quality import SCHEMES, command, quality_table

from hotloop.report.read import read_records

ROOT = Path(__file__).parents[2]
FOLDERS = sorted((ROOT / "benchmarks/results").glob("quality-*"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_table_of_the_page_is_that_of_its_records(folder):
    page = (ROOT / "docs/quality.md").read_text()
    mark = re.escape(folder.name)
    found = re.search(rf"<!-- {mark}: begin -->\n(.*?)\n<!-- {mark}: end -->", page, re.DOTALL)
    assert found is not None, "the page has no place for these records"
    assert found[1].strip() == quality_table(read_records(folder)).strip()


def test_every_scheme_is_measured_by_the_command_that_the_page_names():
    for scheme in SCHEMES:
        words = command("m", scheme, window=256, windows=24, items=0)
        assert words[3:7] == ["eval", "m", "--quant", scheme]
