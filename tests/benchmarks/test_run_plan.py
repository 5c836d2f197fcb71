"""``benchmarks/plan.py``: jobs end, are explained and are packed, whatever else happens."""

import os
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import plan
import pytest
import yaml
from waiting import HANG_S, alive, wait_until

from hotloop.errors import ConfigError

PLANS = sorted((plan.ROOT / "benchmarks/plans").glob("*.yaml"))


def write(folder: Path, *jobs: dict[str, Any]) -> Path:
    """Writes a plan of jobs with names and limits that do not matter."""
    common = {"expected_s": 1, "limit_s": HANG_S}
    named = [{"name": f"job{i}", **common, **job} for i, job in enumerate(jobs)]
    path = folder / "some.yaml"
    path.write_text(yaml.safe_dump({"jobs": named}))
    return path


def run(folder: Path, *jobs: dict[str, Any], options: tuple[str, ...] = ()) -> Any:
    """Runs a plan, and returns its exit status: a message, or 0."""
    out = folder / "out"
    with pytest.raises(SystemExit) as ended:
        plan.main([str(write(folder, *jobs)), "--out", str(out), *options])
    return ended.value.code


def packed(folder: Path) -> dict[str, str]:
    with tarfile.open(folder / "out/results.tgz") as tar:
        return {name: tar.extractfile(name).read().decode() for name in tar.getnames()}


def test_a_failure_is_shown_and_the_other_jobs_run(tmp_path, capsys):
    failing = {"run": "for i in $(seq 100); do echo line $i; done; echo bad >&2; exit 7"}
    assert run(tmp_path, failing, {"run": "echo fine"}) == "not ok: some/job0"
    said = capsys.readouterr().out
    assert re.search(r"^== some/job0: exit status 7, \d+ s \(1 expected\)$", said, re.MULTILINE)
    assert re.search(r"^== some/job1: ok, \d+ s", said, re.MULTILINE)
    assert "line 100\nbad\n" in said
    assert "line 50\n" not in said, "only its end"
    assert "fine" not in said
    log = packed(tmp_path)["logs/some/job0.log"]
    assert all(f"line {i}\n" in log for i in range(1, 101)), "all of it is kept"


def test_after_each_job_all_files_so_far_are_packed_and_they_stay(tmp_path):
    first = {"run": "mkdir -p $OUT/a/b && echo raw > $OUT/a/b/raw.json"}
    second = {"run": "tar xzf $OUT/results.tgz -O a/b/raw.json; cat $OUT/a/b/raw.json; exit 1"}
    run(tmp_path, first, second)
    files = packed(tmp_path)
    assert files.keys() == {"a/b/raw.json", "logs/some/job0.log", "logs/some/job1.log"}
    assert "\nraw\nraw\n" in files["logs/some/job1.log"]
    assert (tmp_path / "out/a/b/raw.json").read_text() == "raw\n"


def test_an_archive_can_be_elsewhere(tmp_path):
    archive = tmp_path / "elsewhere.tgz"
    assert run(tmp_path, {"run": "true"}, options=("--archive", str(archive))) == 0
    with tarfile.open(archive) as tar:
        assert tar.getnames() == ["logs/some/job0.log"]
    assert not (tmp_path / "out/results.tgz").exists()


def test_a_job_is_killed_at_its_limit_with_what_it_started(tmp_path, capsys):
    hangs = {"run": "echo begun; sleep 1000 & echo $! > $OUT/pid; wait", "limit_s": 1.5}
    assert run(tmp_path, hangs, {"run": "echo fine"}) == "not ok: some/job0"
    assert "== some/job0: killed at its limit of 2 s" in capsys.readouterr().out
    child = int((tmp_path / "out/pid").read_text())
    wait_until(lambda: not alive(child), "the end of the job's child")
    assert "begun" in packed(tmp_path)["logs/some/job0.log"]


def test_a_job_that_ignores_the_signal_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "GRACE_S", 0.1)
    stubborn = {"run": "trap '' TERM; echo $$ > $OUT/pid; while true; do sleep 0.1; done"}
    assert run(tmp_path, stubborn | {"limit_s": 1.5}) == "not ok: some/job0"
    assert not alive(int((tmp_path / "out/pid").read_text()))


MEET = "touch $OUT/{}; until [ -e $OUT/{} ]; do sleep 0.02; done"


def test_jobs_with_different_gpus_run_side_by_side(tmp_path):
    one, other = ({"run": MEET.format(a, b), "gpus": [i]} for i, (a, b) in enumerate(("ab", "ba")))
    assert run(tmp_path, one, other) == 0


@pytest.mark.parametrize("gpus", [([0], [0]), ([0, 1], [1]), (None, [0]), ([0], None)])
def test_jobs_that_share_a_gpu_run_one_after_the_other(tmp_path, gpus):
    alone = "mkdir $OUT/busy && sleep 0.2 && rmdir $OUT/busy"
    jobs = [{"run": alone} | ({} if each is None else {"gpus": each}) for each in gpus]
    assert run(tmp_path, *jobs) == 0


def test_a_job_of_all_gpus_is_not_overtaken_by_later_ones(tmp_path):
    first = {"run": "sleep 0.3; echo first >> $OUT/order", "gpus": [0]}
    of_all = {"run": "echo all >> $OUT/order"}
    last = {"run": "echo last >> $OUT/order", "gpus": [1]}
    assert run(tmp_path, first, of_all, last) == 0
    assert (tmp_path / "out/order").read_text().split() == ["first", "all", "last"]


def test_a_job_gets_its_gpus_and_environment(tmp_path):
    shown = "echo $CUDA_VISIBLE_DEVICES $WORD; $PYTHON -c 'import sys; print(sys.executable)'; pwd"
    assert run(tmp_path, {"run": shown, "gpus": [1, 3], "env": {"WORD": "given"}}) == 0
    log = packed(tmp_path)["logs/some/job0.log"]
    assert f"\n1,3 given\n{sys.executable}\n{plan.ROOT.resolve()}\n" in log


def test_what_comes_after_a_failed_job_is_not_begun(tmp_path, capsys):
    jobs = [
        {"run": "false"}, {"run": "true", "after": ["job0"]}, {"run": "true", "after": ["job1"]},
        {"run": "true"},
    ]  # fmt: skip
    assert run(tmp_path, *jobs) == "not ok: some/job0, some/job1, some/job2"
    assert "== some/job2: not begun (some/job1 is not ok)" in capsys.readouterr().out


def test_only_chosen_jobs_run_and_the_others_are_taken_for_done(tmp_path, capsys):
    jobs = [{"run": "true"}, {"run": "true", "after": ["job0"]}, {"run": "true"}]
    assert run(tmp_path, *jobs, options=("--only", "job1", "some/job2")) == 0
    assert re.findall("^-- (.*) begins$", capsys.readouterr().out, re.MULTILINE) == [
        "some/job1",
        "some/job2",
    ]
    assert run(tmp_path, *jobs, options=("--only", "job7")) == 2
    assert "unknown job 'job7'" in capsys.readouterr().err


def test_no_job_begins_that_cannot_end_within_the_limit(tmp_path, capsys):
    jobs = [{"run": "true", "expected_s": 700}, {"run": "true", "expected_s": 300}]
    assert run(tmp_path, *jobs, options=("--limit-s", "600")) == "not ok: some/job0"
    said = capsys.readouterr().out
    assert re.search(r"== some/job0: not begun \((600|599) s are left\)", said)
    assert "== some/job1: ok" in said


def test_the_whole_limit_kills_too(tmp_path, capsys):
    assert run(tmp_path, {"run": "sleep 1000"}, options=("--limit-s", "1.5")) != 0
    assert re.search("some/job0: killed at its limit of [12] s", capsys.readouterr().out)


def test_a_rehearsal_has_no_gpu_and_adds_an_option_unless_the_plan_says_how(tmp_path):
    shown = {"run": "echo [$CUDA_VISIBLE_DEVICES] $TINY_MODEL", "gpus": [0]}
    other = {"run": "false", "rehearse": "echo not {run}"}
    assert run(tmp_path, shown, other, options=("--rehearse",)) == 0
    files = packed(tmp_path)
    tiny = tmp_path / "out/rehearsal-model"
    assert f"\n[] {tiny} --rehearse\n" in files["logs/some/job0.log"]
    assert "\nnot false\n" in files["logs/some/job1.log"]
    assert (tiny / "config.json").exists()


def test_a_run_that_is_ended_ends_its_jobs_and_packs_them(tmp_path):
    path = write(tmp_path, {"run": "echo begun; echo $$ > $OUT/pid; sleep 1000"})
    pid_file = tmp_path / "out/pid"
    command = [sys.executable, plan.__file__, str(path), "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment)
    wait_until(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"), "a job begins")
    process.send_signal(signal.SIGTERM)
    assert process.wait(HANG_S) == 128 + signal.SIGTERM
    assert not alive(int(pid_file.read_text()))
    assert "begun" in packed(tmp_path)["logs/some/job0.log"]


@pytest.mark.parametrize(
    ("job", "problem"),
    [
        ({}, "jobs[0].run: is missing"),
        (
            {"run": "true", "limit": 3},
            "jobs[0].limit: there is no such key. Did you mean 'limit_s'",
        ),
        ({"run": "true", "limit_s": 0.5}, "job0: expected_s is above limit_s"),
        ({"run": "true", "after": ["job1"]}, "job0: no job 'job1' is before it"),
        ({"run": "true", "name": "../other"}, "jobs[0].name"),
    ],
)
def test_a_plan_that_cannot_run_is_refused_by_its_place(tmp_path, job, problem):
    with pytest.raises(ConfigError, match=re.escape(problem)):
        plan.load_plan(write(tmp_path, job, {"run": "true"}))


def test_two_jobs_of_one_name_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="two jobs have the name 'a'"):
        plan.load_plan(write(tmp_path, {"run": "true", "name": "a"}, {"run": "true", "name": "a"}))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_plans_are_valid_and_name_files_that_there_are(path):
    for job in plan.load_plan(path):
        files = re.findall(r"(?:benchmarks|tests|recipes)/[\w./-]+", job.run)
        assert [name for name in files if not (plan.ROOT / name).exists()] == []
        assert job.command(rehearse=True) != job.command(rehearse=False)
        assert "$PYTHON" in job.run


def test_there_are_plans():
    assert {"tests", "serving"} <= {path.stem for path in PLANS}
