"""Every command that the docs show is one that the command line takes."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from hotloop.cli.app import cyclopts_app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_ENDS = ("|", ">", "2>", "||", "&&", "&", ";")


def blocks(page: Path) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text.replace("\\\n", " ") for kind, text in found if kind in ("", "sh", "yaml")]


def words_of(page: Path) -> Iterator[list[str]]:
    """The arguments of each hotloop command of a page, without what a shell takes."""
    lines = [line for block in blocks(page) for line in block.splitlines()]
    lines += re.findall(r"(?<!`)`(hotloop [^`]+)`(?!`)", page.read_text())
    for line in lines:
        line = line.replace("--entrypoint hotloop ", "")  # of a container, named before its image
        _, found, rest = re.sub(r'^\s*\w+="(hotloop .*)"$', r"\1", line).partition("hotloop ")
        if not found or not re.match(r"[a-z]+\s", rest):
            continue
        words = shlex.split(rest, comments=True)
        yield words[: next((i for i, word in enumerate(words) if word in _ENDS), None)]


WITH_COMMANDS = [page for page in PAGES if any(words_of(page))]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.stem)
def test_the_command_line_takes_every_command_of_a_page(page):
    app = cyclopts_app()
    for words in words_of(page):
        app.parse_args(words, exit_on_error=False, print_error=False)


def test_the_pages_with_commands_are_found():
    assert {"README", "ci", "clusters", "quality", "speculation"} <= {p.stem for p in WITH_COMMANDS}


@pytest.mark.parametrize(("code", "ends_with"), [(0, 0), (1, 1), (2, 0)])
def test_the_workflow_fails_if_the_branch_is_worse_and_warns_if_that_is_open(
    tmp_path, code, ends_with
):
    (workflow,) = [block for block in blocks(ROOT / "docs/ci.md") if block.startswith("name:")]
    steps = yaml.safe_load(workflow)["jobs"]["compare"]["steps"]
    (compare,) = [step["run"] for step in steps if step.get("name") == "compare"]
    (tmp_path / "hotloop").write_text(f"#!/bin/sh\nexit {code}\n")
    (tmp_path / "hotloop").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RUNNER_TEMP": str(tmp_path)}
    done = subprocess.run(  # as GitHub runs a step
        ["bash", "-e", "-c", compare], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == ends_with
    assert ("::warning::" in done.stdout) == (code == 2)
