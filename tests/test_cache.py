"""The cache folder on machines without a writable home."""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest

from hotloop import cache


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    """No cache is configured, and the machine's temporary files are in ``tmp_path``."""
    monkeypatch.delenv("HOTLOOP_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    cache._private_dir.cache_clear()
    yield
    cache._private_dir.cache_clear()


@pytest.fixture
def nobody(monkeypatch) -> None:
    """A user without HOME and without an entry in the system's list of users."""

    def getpwuid(uid: int):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", getpwuid)


def temporary(tmp_path: Path) -> Path:
    return tmp_path / "tmp" / f"hotloop-{os.getuid()}"


@pytest.mark.usefixtures("nobody")
def test_without_a_home_the_cache_is_a_private_temporary_folder(tmp_path):
    assert cache.cache_dir() == cache.writable_cache_dir() == temporary(tmp_path)
    assert stat.S_IMODE(temporary(tmp_path).stat().st_mode) == 0o700
    note = cache.cache_note()
    assert "no home directory is known" in note
    assert str(temporary(tmp_path)) in note


@pytest.mark.usefixtures("nobody")
def test_without_a_home_a_folder_that_is_named_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("HOTLOOP_CACHE", str(tmp_path / "mine"))
    assert cache.writable_cache_dir() == tmp_path / "mine"
    assert cache.cache_note() is None


def test_the_home_of_a_user_who_is_not_there_is_not_made_in_the_current_folder(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOTLOOP_CACHE", "~no-such-user/cache")
    assert cache.writable_cache_dir() == temporary(tmp_path)
    assert not list(tmp_path.glob("~*"))


@pytest.mark.parametrize("name", ["file", "file/below", "n" * 300, "/proc/hotloop"])
def test_a_folder_that_cannot_be_made_is_replaced_and_named(name, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOTLOOP_CACHE", str(tmp_path / name))
    assert cache.writable_cache_dir() == temporary(tmp_path)
    note = cache.cache_note()
    assert str(tmp_path / name)[:100] in note
    assert len(note) < 700


def test_files_in_a_read_only_cache_are_found(tmp_path, monkeypatch):
    shared = tmp_path / "shared"
    (shared / "models").mkdir(parents=True)
    (shared / "models" / "m.gguf").write_text("")
    monkeypatch.setenv("HOTLOOP_CACHE", str(shared))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cache.cache_path("models", "m.gguf") == shared / "models" / "m.gguf"
    assert cache.cache_path("models", "other.gguf").is_relative_to(temporary(tmp_path))


@pytest.mark.parametrize("kind", ["file", "link", "open to others"])
def test_a_temporary_folder_that_others_can_write_is_not_trusted(kind, tmp_path, monkeypatch):
    theirs = temporary(tmp_path)
    if kind == "file":
        theirs.write_text("")
    elif kind == "link":
        theirs.symlink_to(tmp_path)
    else:
        theirs.mkdir()
        theirs.chmod(0o777)
    monkeypatch.setenv("HOTLOOP_CACHE", "/proc/hotloop")
    ours = cache.writable_cache_dir()
    assert ours.parent == theirs.parent
    assert ours != theirs
    assert cache.writable_cache_dir() == ours, "one for the whole process"


def test_a_folder_of_one_process_goes_with_it(tmp_path):
    """In a process of its own, whose end it is about."""
    (tmp_path / "tmp").mkdir(exist_ok=True)
    temporary(tmp_path).write_text("what is not ours")
    code = "from hotloop import cache; print(cache.writable_cache_dir())"
    environment = {"HOTLOOP_CACHE": "/proc/hotloop", "TMPDIR": str(tmp_path / "tmp")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).parent == tmp_path / "tmp"
    assert list((tmp_path / "tmp").iterdir()) == [temporary(tmp_path)]


def test_a_command_without_a_home_ends_in_one_line(tmp_path):
    """In a process of its own: libraries look for the home folder when they are imported."""
    code = """
import os, pwd, sys
def getpwuid(uid): raise KeyError(uid)
pwd.getpwuid = getpwuid
del os.environ["HOME"]
from hotloop.cli.app import main
sys.exit(main(sys.argv[1:]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "generate", "some/model", "text"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k not in ("HOTLOOP_CACHE", "XDG_CACHE_HOME")}
        | {"HOME": "/", "TMPDIR": str(tmp_path / "tmp")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    note, error = done.stderr.splitlines()
    assert note.startswith("no home directory is known")
    assert error.startswith("error: there is no folder 'some/model'")
    assert {path.name for path in tmp_path.iterdir()} == {"tmp"}, "no folder ~ is made"


CODE = {
    "__init__.py": "version",
    "kernels/gemv.cu": "kernel",
    "engine/llm.py": "engine",
    "report/table.py": "table",
    "serve/page/main.js": "page",
}


def hash_of(package: Path, monkeypatch, *packages: str) -> str:
    monkeypatch.setattr(cache, "__file__", str(package / "cache.py"))
    return cache.code_hash.__wrapped__(*packages)


def write_code(package: Path, code: dict[str, str] = CODE) -> Path:
    for name, content in code.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(content)
    return package


def test_the_same_code_has_the_same_hash_wherever_it_is_and_whatever_has_run(tmp_path, monkeypatch):
    one, other = (write_code(tmp_path / place / "hotloop") for place in ("src", "site-packages"))
    write_code(other, {"engine/__pycache__/llm.cpython-311.pyc": "compiled"})
    assert hash_of(one, monkeypatch) == hash_of(other, monkeypatch)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("__init__.py", True),
        ("kernels/gemv.cu", True),
        ("engine/llm.py", True),
        ("engine/new.py", True),
        ("report/table.py", False),
        ("serve/page/main.js", False),
    ],
)
def test_another_hash_is_of_other_code_that_a_measurement_can_run(
    tmp_path, monkeypatch, name, counts
):
    before = hash_of(write_code(tmp_path), monkeypatch)
    assert (hash_of(write_code(tmp_path, {name: "changed"}), monkeypatch) != before) == counts


def test_a_hash_of_some_packages_is_of_these_alone(tmp_path, monkeypatch):
    before = hash_of(write_code(tmp_path), monkeypatch, "kernels")
    write_code(tmp_path, {"engine/llm.py": "changed"})
    assert hash_of(tmp_path, monkeypatch, "kernels") == before
    write_code(tmp_path, {"kernels/gemv.cu": "changed"})
    assert hash_of(tmp_path, monkeypatch, "kernels") != before


def test_no_measurement_can_import_what_the_hash_leaves_out():
    contracts = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    (layers,) = (c for c in contracts["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    above = layers["layers"][: layers["layers"].index("sweep")]
    assert set(above) == set(cache.PRESENTATION)
