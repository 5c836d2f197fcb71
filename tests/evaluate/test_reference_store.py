"""References in the cache: found again, limited in size, never removed while in use."""

import os
import subprocess
import sys

import pytest

from hotloop.errors import ConfigError
from hotloop.evaluate.reference_store import LIMIT, ReferenceStore


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "references"


def write(folder, name, n_bytes, used):
    file = folder / name
    file.write_bytes(bytes(n_bytes))
    os.utime(file, ns=(used, used))
    return file


def names(folder):
    return sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))


def test_the_longest_unused_go_first_until_the_limit_is_met(folder):
    with ReferenceStore(folder, limit_bytes=250):
        write(folder, "a.safetensors", 100, used=3)
        write(folder, "b.safetensors", 100, used=1)
        write(folder, "c.json", 100, used=2)
    assert names(folder) == ["a.safetensors", "c.json"]


def test_using_a_file_makes_it_the_last_to_go(folder):
    with ReferenceStore(folder, limit_bytes=150) as store:
        write(folder, "old.safetensors", 100, used=1)
        write(folder, "new.safetensors", 100, used=2)
        store.hold(folder / "old.safetensors")
    assert names(folder) == ["old.safetensors"]


def test_one_beyond_the_limit_goes_before_those_within_it(folder):
    with ReferenceStore(folder, limit_bytes=250) as store:
        write(folder, "a.safetensors", 100, used=1)
        store.hold(folder / "huge.safetensors")
        write(folder, "huge.safetensors", 1000, used=2)
    assert names(folder) == ["a.safetensors"]


def test_a_file_that_another_process_uses_stays(folder):
    folder.mkdir()
    write(folder, "a.safetensors", 100, used=1)
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from hotloop.evaluate.reference_store import ReferenceStore\n"
        "folder = Path(sys.argv[1])\n"
        "with ReferenceStore(folder, limit_bytes=1000) as store:\n"
        "    store.hold(folder / 'a.safetensors')\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    other = [sys.executable, "-c", program, str(folder)]
    with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with ReferenceStore(folder, limit_bytes=0):
            pass
        assert names(folder) == ["a.safetensors"]
        process.stdin.close()
    with ReferenceStore(folder, limit_bytes=0):
        pass
    assert names(folder) == []


def test_the_limit_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOTLOOP_CACHE", str(tmp_path))
    monkeypatch.setenv(LIMIT, "0.5")
    store = ReferenceStore()
    assert (store.folder, store.limit_bytes) == (tmp_path / "references", 500_000_000)
    for bad in ("much", "-1", "nan"):
        monkeypatch.setenv(LIMIT, bad)
        with pytest.raises(ConfigError, match=f"{LIMIT} must be a number of GB"):
            ReferenceStore()
