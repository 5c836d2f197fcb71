"""Scripts of trials: a patch's speed and tokens, and the kernels of a step."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import patched
import pytest
import step_kernels

PATCH = """\
diff --git a/docs/numerics.md b/docs/numerics.md
--- a/docs/numerics.md
+++ b/docs/numerics.md
@@ -1 +1 @@
-not there
+at all
diff --git a/src/hotloop/marked.py b/src/hotloop/marked.py
new file mode 100644
--- /dev/null
+++ b/src/hotloop/marked.py
@@ -0,0 +1 @@
+MARKED = True
"""


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    path = tmp_path / "marked.patch"
    path.write_text(PATCH)
    return path


def test_only_a_copy_is_patched_and_only_its_sources_and_tests(patch, tmp_path):
    copy = patched.copy_with(patch, tmp_path)
    assert (copy / "src/hotloop/marked.py").read_text() == "MARKED = True\n"
    assert not (patched.ROOT / "src/hotloop/marked.py").exists()
    assert (copy / "tests/conftest.py").exists()
    patch.write_text(PATCH.replace("@@ -0,0 +1 @@\n+MARKED", "@@ -1 +1 @@\n-OTHER\n+MARKED"))
    with pytest.raises(subprocess.CalledProcessError):
        patched.copy_with(patch, tmp_path / "again")


def test_each_process_gets_one_of_both_sources_in_turn(patch, tmp_path, monkeypatch, capsys):
    ran = []

    def run_here(command: list[str], _limit_s: float) -> bool:
        source = Path(command[1].removeprefix("PYTHONPATH=").split(os.pathsep)[0])
        is_patched = (source / "hotloop/marked.py").exists()
        ran.append(is_patched)
        out, job = (command[command.index(name) + 1] for name in ("--out", "--worker"))
        assert json.loads(job)["rows"] == [1, 8]
        tok_s, ids = (110.0, "b") if is_patched else (100.0, "a")
        samples = {"1": [tok_s], "8": [8 * tok_s]}
        result = {"samples": samples, "tokens": {"1": "a", "8": ids}, "all_reduce": None}
        Path(out, "worker.json").write_text(json.dumps(result))
        return True

    monkeypatch.setattr(patched, "run", run_here)
    with pytest.raises(SystemExit) as ended:
        patched.main([str(patch), "--out", str(tmp_path / "out"), "--rows", "1", "8"])
    assert ended.value.code == 0
    assert ran == [False, True, False, True]
    *_, one, eight = capsys.readouterr().out.strip().splitlines()
    assert one.endswith("| 1 | 100.0 100.0 | 110.0 110.0 | 1.100 | equal |")
    assert eight.endswith("| 8 | 800.0 800.0 | 880.0 880.0 | 1.100 | differ |")
    assert len(json.loads((tmp_path / "out/marked-tp1.json").read_text())) == 4


def test_two_versions_are_imported_beside_each_other(patch, tmp_path):
    copy, before = patched.copy_with(patch, tmp_path), sys.modules["hotloop"]
    versions = [patched.Imported(root / "src") for root in (copy, patched.ROOT)]
    for _ in range(2):
        found = []
        for version in versions:
            with version.active():
                found.append(importlib.import_module("hotloop"))
                if version is versions[0]:
                    assert importlib.import_module("hotloop.marked").MARKED
                else:
                    with pytest.raises(ModuleNotFoundError):
                        importlib.import_module("hotloop.marked")
        assert [Path(module.__file__).parent for module in found] == [
            copy / "src/hotloop",
            patched.ROOT / "src/hotloop",
        ]
    assert sys.modules["hotloop"] is before
    assert "hotloop.marked" not in sys.modules


def test_versions_alternate_and_their_bits_are_compared():
    asked = []

    class Fake:
        n_layers = 2

        def __init__(self, name: str) -> None:
            self.name = name

        def step_us(self, n: int) -> float:
            asked.append(self.name)
            return 50.0 * n if self.name == "b" else 100.0 * n

        def bits(self, n: int) -> str:
            return "other" if self.name == "b" and n == 8 else "same"

        def spans(self, n: int, steps: int) -> list[step_kernels.Span]:
            del n, steps
            return step_kernels.rehearsal()

    versions = {name: Fake(name) for name in "ab"}
    args = argparse.Namespace(rounds=3, steps=2)
    tables = [
        step_kernels.report(step_kernels.compare(versions, n, args)).splitlines() for n in (1, 8)
    ]
    assert "".join(asked) == "abbaabba" * 2
    assert [table[0] for table in tables] == ["| us of a step | a | b |"] * 2
    assert [table[-2] for table in tables] == ["| relative to the first | 100.0% | 50.0% |"] * 2
    assert [table[-1] for table in tables] == [
        "| bits | equal | equal |",
        "| bits | equal | DIFFER |",
    ]
    assert "| qkv | 10.0 | 10.0 |" in tables[0]


def test_engines_of_two_versions_run_in_one_process(patch, tmp_path):
    script = [sys.executable, step_kernels.__file__, "--out", str(tmp_path / "out"), "--rehearse"]
    options = ["--rows", "1", "2", "--rounds", "1", "--patches", str(patch)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run(script + options, env=environment, check=True)
    (path,) = tmp_path.glob("out/*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [list(of_rows) for of_rows in rows.values()] == [["main", "marked"]] * 2
    assert all(of_rows["main"]["bits"] == of_rows["marked"]["bits"] for of_rows in rows.values())
    assert rows["1"]["main"]["bits"] != rows["2"]["main"]["bits"]


def test_spans_of_overlapping_kernels_add_up_to_the_step():
    spans = step_kernels.rehearsal()
    found = step_kernels.parts(spans, n_layers=2)
    assert set(found) == {
        *("first kernels", "qkv", "attention", "o", "gate and up", "down", "head"),
        *("argmax and acceptance", "between steps"),
    }
    assert sum(found.values()) == pytest.approx(100), "a step begins every 100 us"
    assert found["qkv"] == pytest.approx(2 * 5), "10 us, half of them beside the kernel before"


def test_products_of_several_launches_are_one_part():
    spans = step_kernels.rehearsal()
    more = [
        span._replace(name="linear_again") if span.name == "attention" else span for span in spans
    ]
    found = step_kernels.parts(more, n_layers=2)
    assert "products" in found
    assert not {"qkv", "attention", "head"} & set(found)
