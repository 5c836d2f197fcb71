"""Runs the README's commands as they are, on the real small model."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from waiting import HANG_S

from hotloop.errors import DownloadError
from hotloop.report.context import CONTEXT
from hotloop.report.table import FIGURES, LABELS
from hotloop.weights.hub import pull

README = Path(__file__).parents[1] / "README.md"
BIN = Path(sys.executable).parent


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def commands(where: str) -> list[list[str]]:
    """The hotloop commands of the README's shell blocks that run on ``where``."""
    found = []
    for block in blocks("sh"):
        words = [shlex.split(line, comments=True) for line in block.splitlines()]
        gpu = "llama-2-13b" in block
        found += [w for w in words if w and w[0] == "hotloop" and gpu == (where == "gpu")]
    return [words for words in found if words[1] != "serve"]  # which does not end by itself


@pytest.fixture(scope="module")
def _model() -> None:
    try:
        pull("smollm2-135m")
    except DownloadError as error:
        pytest.skip(f"the demo model is neither here nor to be had: {error}")


def run(words: list[str], folder: Path, **options: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, **options
    )


def test_the_readme_has_commands_to_run() -> None:
    verbs = {words[1] for words in commands("cpu")}
    assert verbs >= {"pull", "info", "sweep", "generate", "chat", "bench", "eval", "quantize"}


def test_the_sample_table_has_what_a_table_says_today() -> None:
    _, _, sample = README.read_text().partition("<!-- demo table: begin -->")
    sample, _, _ = sample.partition("<!-- demo table: end -->")
    labels = re.findall(r"^- ([a-z ]+): ", sample, re.MULTILINE)
    assert [label for label in labels if label != "measured read bandwidth"] == list(CONTEXT)
    headings = [cell.strip() for cell in sample.strip().splitlines()[0].strip("| ").split("|")]
    shown = [column.heading for column in (*LABELS, *FIGURES)]
    assert headings == [heading for heading in shown if heading in headings]


@pytest.mark.slow
@pytest.mark.usefixtures("_model")
@pytest.mark.parametrize("words", commands("cpu"), ids=lambda words: " ".join(words[1:3]))
def test_command_does_what_it_says(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(README.parent / "recipes")
    done = run(words, tmp_path, input="What is 2 + 2?\n/quit\n", timeout=HANG_S)
    if "--dry-run" in words and "no cell can run here" in done.stderr:
        assert done.returncode == 1, "a plan of which nothing fits this machine"
        return
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.slow
@pytest.mark.usefixtures("_model")
def test_the_served_model_answers_until_it_is_told_to_stop() -> None:
    (serve,) = re.findall(r"^(hotloop serve smollm2-135m) ", README.read_text(), re.MULTILINE)
    (curl,) = [block for block in blocks("sh") if block.startswith("curl ")]
    path, body = re.fullmatch(r"curl http://127.0.0.1:8000(\S+) -d '(.*)'\n", curl).groups()
    with subprocess.Popen(
        [BIN / "hotloop", *shlex.split(serve)[1:], "--port", "0"], stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            said = ""
            while "curl " not in said:
                line = server.stderr.readline()
                assert line, f"the server has ended: {said}"
                said += line
            url = re.search(r"http://127.0.0.1:\d+", said)[0]
            answer = httpx2.post(url + path, content=body, timeout=HANG_S)
            assert answer.json()["choices"][0]["message"]["content"]
        finally:
            server.terminate()
        assert server.wait(HANG_S) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("_model")
def test_python_examples_run(tmp_path: Path) -> None:
    one, several = (
        run([sys.executable, "-c", b], tmp_path, timeout=HANG_S) for b in blocks("python")
    )
    assert one.returncode == 0, one.stderr
    answer, speed, conversation = re.split(r" (\d+\.\d+)\n", one.stdout, maxsplit=1)
    assert "Paris" in answer
    assert float(speed) > 0
    assert conversation.strip()
    assert several.returncode == 0, several.stderr
    colors, _, person = several.stdout.partition("\n")
    assert len(ast.literal_eval(colors)) == 3
    assert isinstance(json.loads(person)["age"], int)


def test_every_variable_of_the_environment_is_documented() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (README.parent / "src").rglob("*.py")]
    ours = {name for text in sources for name in re.findall(r"HOTLOOP_[A-Z_]+", text)}
    internal = {"HOTLOOP_CELL"}
    assert {name for name in ours - internal if f"| `{name}` |" not in README.read_text()} == set()


@pytest.mark.gpu
@pytest.mark.parametrize("words", commands("gpu"), ids=lambda words: " ".join(words[1:3]))
def test_gpu_command_does_what_it_says(words: list[str], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    done = run(words, tmp_path, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
