"""Scripts of trials: a patch's speed and tokens, and the kernels of a step."""

import json
import os
import subprocess
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
