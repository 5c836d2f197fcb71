"""The command as a whole: help, exit codes, and who gets to see what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hotloop
from hotloop import errors
from hotloop.bench.record import Record
from hotloop.cli import help_pages
from hotloop.cli.app import COMMANDS, help_page, main
from hotloop.cli.help_pages import PAGES
from hotloop.sweep.store import RECORDS

HEAVY = ("torch", "numpy", "pydantic", "gguf", "transformers", "yaml", "tokenizers")


def run(*args: str, **more) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hotloop", *args], capture_output=True, text=True, **more
    )


def imported_by(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has imported after ``code``."""
    shown = "import sys; print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{shown}"], capture_output=True, text=True, check=True
    )
    return set(done.stderr.split())


@pytest.mark.parametrize("verb", [None, *COMMANDS])
def test_help_pages_are_what_the_command_line_says_of_itself(verb):
    def words(text: str) -> list[str]:  # a newer cyclopts may draw other boxes
        return text.translate(dict.fromkeys(map(ord, "╭╮╰╯─│*"), " ")).split()

    page = help_page([verb, "--help"] if verb else ["--help"])
    assert page is not None
    assert words(page.read_text(encoding="utf-8")) == words(help_pages.render(verb)), (
        "the help pages are stale: python -m hotloop.cli.help_pages"
    )


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_of_a_verb_has_a_summary_and_an_example(verb):
    lines = help_page([verb, "-h"]).read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith(f"Usage: hotloop {verb}")
    assert lines[2].endswith(".")
    assert any(f"hotloop {verb} " in line for line in lines[lines.index("Examples:") :])
    assert max(map(len, lines)) <= 80


def test_help_and_version_import_nothing_but_the_standard_library():
    code = """
from hotloop.cli.app import main
for argv in (['--help'], ['--version'], ['sweep', '--help'], ['chat', 'model', '-h'], []):
    assert main(argv) == 0
"""
    third_party = imported_by(code) - set(sys.stdlib_module_names)
    assert {name for name in third_party if not name.startswith(("_", "sitecustomize"))} == {
        "hotloop"
    }


def test_a_usage_error_of_any_verb_imports_nothing_heavy():
    code = f"""
from hotloop.cli.app import main
for verb in {COMMANDS}:
    assert main([verb, '--no-such-option']) == 2
"""
    assert not imported_by(code) & set(HEAVY)


def test_version_is_the_packages():
    assert run("--version").stdout == f"hotloop {hotloop.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["genrate", "x"], "generate"),
        (["generate", "x", "y", "--quantt", "int8"], "--quant"),
        (["generate", "x", "y", "--execution", "fast"], "eager"),
        (["generate"], "MODEL"),
        (["generate", "x", "y", "z"], "z"),
        (["generate", "x", "y", "--top-k", "many"], "--top-k"),
    ],
)
def test_a_usage_error_is_one_line_that_names_the_fault_and_where_to_read_on(argv, said, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert out == ""
    assert first.startswith("error: ")
    assert said in first
    assert second.startswith("Try: hotloop ")
    assert second.endswith("--help")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("no"), 2),
        (errors.UnknownNameError("scheme", "int9", ["int8"]), 2),
        (errors.ModelNotFoundError("no"), 2),
        (errors.UnsupportedError("no"), 2),
        (errors.CheckpointError("file", "is cut short"), 2),
        (errors.DownloadError("no"), 1),
        (errors.OutOfMemoryError("load"), 1),
    ],
)
def test_errors_for_users_are_one_line_and_say_by_their_code_whose_turn_it_is(
    error, code, monkeypatch, capsys
):
    def failing(_config, **_options):
        raise error

    monkeypatch.setitem(vars(hotloop), "LLM", failing)
    assert main(["generate", "model", "prompt"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: {error}\n"


@pytest.mark.parametrize("kind", ["device", "empty", "pipe", "folder"])
def test_an_invalid_model_ends_with_exit_code_2(kind, tmp_path, capsys):
    path = Path("/dev/null") if kind == "device" else tmp_path / "x.gguf"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    assert main(["info", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


class PanicException(BaseException):
    """A panic of a library in Rust: no Exception."""


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Has every load of a model raise an error."""

    def fail_with(error: BaseException) -> None:
        def fail(_config, **_options):
            raise error

        monkeypatch.setitem(vars(hotloop), "LLM", fail)

    return fail_with


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("a\nb"), RecursionError(), PanicException("index")]
)
def test_an_unexpected_exception_is_one_line_that_says_how_to_see_more(error, failing, capsys):
    failing(error)
    assert main(["generate", "model", "prompt"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"error: {type(error).__name__}")
    assert "please report it with the traceback that HOTLOOP_TRACEBACK=1 prints" in line


@pytest.mark.parametrize("error", [ZeroDivisionError(), errors.ConfigError("no")])
def test_hotloop_traceback_shows_where_whatever_went_wrong(error, failing, capsys, monkeypatch):
    monkeypatch.setenv("HOTLOOP_TRACEBACK", "1")
    failing(error)
    assert main(["generate", "model", "prompt"]) in (1, 2)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "Traceback (most recent call last):"
    assert last.startswith("error: ")


def test_an_error_of_the_system_names_the_file_and_is_no_fault_of_ours(failing, capsys):
    failing(PermissionError(13, "Permission denied", "/closed/x"))
    assert main(["generate", "model", "prompt"]) == 1
    assert capsys.readouterr().err == "error: /closed/x: Permission denied.\n"


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.txt")), ids=lambda page: page.stem)
def test_no_example_of_a_help_page_is_broken_in_two(page):
    _, found, examples = page.read_text().partition("Examples:\n")
    assert all(line.startswith("  hotloop ") or " | " in line for line in examples.splitlines())
    assert found or page.stem == "hotloop"


def test_an_error_message_has_a_bounded_length():
    assert len(str(errors.CheckpointError("f" * 10**6, "p" * 10**6))) <= 2_000


def test_a_reader_that_goes_away_is_no_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "hotloop", "--help"], stdout=write_end, stderr=subprocess.PIPE
    )
    os.close(write_end)
    assert done.returncode == 141
    assert done.stderr == b""


RECORD = {
    "cell": "c",
    "config": {},
    "status": "failed",
    "reason": "Δ ★ …",
    "started_at": "2024-01-01T00:00:00+00:00",
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with a results folder of one record, whose reason is not ASCII."""
    (tmp_path / "results").mkdir()
    line = Record(**RECORD).model_dump_json()
    (tmp_path / "results" / RECORDS).write_text(line + "\n", encoding="utf-8")
    return tmp_path


def test_a_full_disk_behind_stdout_is_one_line(results):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "hotloop", "report", "results"],
            cwd=results,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr == "error: input or output failed: No space left on device.\n"


def test_a_closed_stdout_is_one_line_and_nothing_is_written_in_its_place(results):
    shell = f"exec {sys.executable} -m hotloop report results >&-"
    done = subprocess.run(["sh", "-c", shell], cwd=results, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: standard output is closed")


def test_closed_stdin_and_stderr_do_not_matter(results):
    shell = f"exec {sys.executable} -m hotloop report results <&- 2>&-"
    done = subprocess.run(["sh", "-c", shell], cwd=results, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert "★" in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_that_lacks_a_character_gets_it_escaped(results, encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    data = run("report", "results", "--json", cwd=results, env=environment)
    assert (data.returncode, data.stderr) == (0, "")
    assert json.loads(data.stdout)["reason"] == RECORD["reason"]
    table = run("report", "results", cwd=results, env=environment)
    assert (table.returncode, table.stderr) == (0, "")
    assert r"\u0394 \u2605 \u2026" in table.stdout
