"""Sweeps of real child processes around fake engines."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from sweep_fakes import End
from waiting import HANG_S, alive, wait_until

from hotloop import hardware
from hotloop.baselines import ENGINES
from hotloop.bench.record import Record
from hotloop.errors import ConfigError
from hotloop.sweep import runner
from hotloop.sweep.events import (
    CellFinished,
    CellPhase,
    CellSkipped,
    CellSoFar,
    CellStarted,
    Notice,
    ReferenceFinished,
    ReferenceStarted,
    from_line,
    to_line,
)
from hotloop.sweep.part import Part
from hotloop.sweep.process import run_isolated
from hotloop.sweep.recipe import Recipe, recipe_from_flags, replace_models
from hotloop.sweep.runner import run_sweep
from hotloop.sweep.store import read_file
from hotloop.weights.identity import identify_checkpoint

FAKE = "sweep_fakes_child:FAKE"


@pytest.fixture(autouse=True)
def _the_engine_is_a_fake_that_children_find(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(ENGINES, "hotloop", FAKE)
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here}{os.pathsep}{here.parent}", prepend=os.pathsep)
    monkeypatch.setenv("HOTLOOP_CACHE", str(tmp_path / "cache"))


CIRCUMSTANCES = {
    "code": "c" * 64,
    "packages": "p" * 16,
    "driver": None,
    "gpus": [],
    "free_bytes": {"cpu": 2**34, "cuda": None},
}


@pytest.fixture
def circumstances(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The machine as a test can change it, without other processes' memory."""
    now = copy.deepcopy(CIRCUMSTANCES)
    monkeypatch.setattr(hardware, "circumstances", lambda: copy.deepcopy(now))
    return now


@pytest.mark.filterwarnings("error")
def test_what_a_cell_knows_before_it_loads_is_sent_without_a_warning_in_its_log():
    provenance = {"circumstances": CIRCUMSTANCES | {"gpus": ["A GPU", "A GPU"]}}
    record = Record(
        cell="int8/eager", config={}, status="failed", started_at="2025", provenance=provenance
    )
    assert from_line(to_line(CellSoFar(record))) == CellSoFar(record)


def recipe(*ends: End, timeout_s: float = HANG_S) -> Recipe:
    return recipe_from_flags(
        "some-shape",
        weights="random",
        matrix={"seed": [int(end) for end in ends]},
        workload={"prompt_tokens": 4, "new_tokens": 8},
        timeout_s=timeout_s,
    )


def sweep(results: Path, *ends: End, **options) -> list[Record]:
    timeout_s = options.pop("timeout_s", HANG_S)
    return run_sweep(recipe(*ends, timeout_s=timeout_s), results, **options)


def test_a_cell_becomes_a_complete_record(tmp_path):
    events = []
    (record,) = sweep(tmp_path, End.OK, on_event=events.append)
    assert (record.cell, record.status, record.attempt) == ("auto/eager", "ok", 1)
    assert record.reason is None
    assert record.decode_tok_s.mean == pytest.approx(100)
    assert record.decode_tok_s.n == 5
    assert record.load_s == 0.5
    assert record.warmup_s == 0.25
    assert record.predicted_bytes["total_bytes"] == 2**30
    assert record.engine["family"] == "fake"
    assert record.mbu.mean == pytest.approx((28 + 2 * 8) / 0.01 / 1e9)
    assert "random weights" in record.quality_reason
    assert record.provenance["recipe"]["sha256"] == recipe(End.OK).sha256
    assert read_file(tmp_path / "records.jsonl") == ([record], [])

    assert events[0] == CellStarted("auto/auto", 1, 1)
    phases = [(e.phase, e.done, e.total) for e in events if isinstance(e, CellPhase)]
    assert phases[:3] == [("predict", 0, 0), ("load", 0, 0), ("speed", 0, 0)]
    assert phases[3:] == [("speed", done, 5) for done in range(1, 6)]
    assert events[-1] == CellFinished(record)


def test_a_cell_of_more_gpus_than_there_are_is_a_row_without_a_process(tmp_path, monkeypatch):
    monkeypatch.setitem(ENGINES, "hotloop", "sweep_fakes_child:ON_ONE_GPU")
    started = []

    def run(job, **options):
        started.append(job.config.tensor_parallel)
        return run_isolated(job, **options)

    monkeypatch.setattr(runner, "run_isolated", run)
    asked = {
        "weights": "random",
        "matrix": {"tensor_parallel": [1, 2, 4]},
        "workload": {"prompt_tokens": 4, "new_tokens": 8},
    }
    events = []
    records = run_sweep(
        recipe_from_flags("some-shape", **asked), tmp_path / "here", on_event=events.append
    )
    assert started == [1]
    assert [(record.status, record.reason) for record in records] == [
        ("ok", None),
        ("unsupported", "needs 2 GPUs, found 1"),
        ("unsupported", "needs 4 GPUs, found 1"),
    ]
    assert read_file(tmp_path / "here" / "records.jsonl") == (records, [])
    assert [e for e in events if isinstance(e, CellFinished)] == list(map(CellFinished, records))

    # What another interpreter sees of the machine, only it can tell.
    there = replace_models(
        recipe_from_flags("some-shape", **asked), pythons={"hotloop": Path(sys.executable)}
    )
    run_sweep(there, tmp_path / "there")
    assert started[1:] == [1, 2, 4]


def test_whatever_ends_a_cell_is_a_row_and_not_the_end(tmp_path):
    ends = [
        End.RAISES,
        End.SEGFAULTS,
        End.OOM,
        End.WRAPPED_OOM,
        End.UNSUPPORTED,
        End.PREDICTED_OOM,
        End.EXITS,
        End.KILLED,
        End.OK,
    ]
    records = dict(zip(ends, sweep(tmp_path, *ends), strict=True))
    assert {end: record.status for end, record in records.items()} == {
        End.RAISES: "failed",
        End.SEGFAULTS: "failed",
        End.OOM: "oom",
        End.WRAPPED_OOM: "oom",
        End.UNSUPPORTED: "unsupported",
        End.PREDICTED_OOM: "predicted-oom",
        End.EXITS: "failed",
        End.KILLED: "failed",
        End.OK: "ok",
    }
    reasons = {end: record.reason for end, record in records.items()}
    assert reasons[End.RAISES].startswith("KeyError in load: 'no such layer'\n")
    assert "in create" in reasons[End.RAISES]
    assert "crashed in load with SIGSEGV" in reasons[End.SEGFAULTS]
    assert "about to fall over" in reasons[End.SEGFAULTS]
    assert "out of memory in load, needed 8.00 GiB, free 1.00 GiB" in reasons[End.OOM]
    assert "out of memory in load" in reasons[End.WRAPPED_OOM]
    assert "needed 1.00 GiB as predicted, 2.00 GiB" in reasons[End.WRAPPED_OOM]
    assert reasons[End.UNSUPPORTED] == "no such kernel here"
    assert reasons[End.PREDICTED_OOM] == "needs 4.00 GiB, 2.00 GiB free"
    assert "exit code 3" in reasons[End.EXITS]
    assert "killed from outside by SIGKILL in load" in reasons[End.KILLED]
    for record in records.values():  # known before the end, so kept in spite of it
        assert record.provenance["device"]["name"] == "auto"
        assert record.predicted_bytes is not None


def test_a_hang_ends_at_the_limit_with_everything_it_started(tmp_path, monkeypatch):
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    events = []

    def time_s() -> float:
        """Stands still until the cell hangs, with everything it started."""
        loads = any(isinstance(event, CellPhase) and event.phase == "load" for event in events)
        return 2.0 if loads and running(tmp_path / "pids") else 0.0

    monkeypatch.setattr("hotloop.sweep.process.time", SimpleNamespace(monotonic=time_s))
    (record,) = sweep(tmp_path, End.HANGS, timeout_s=1.5, on_event=events.append)
    assert record.status == "timeout"
    assert record.reason.startswith(
        "took longer than timeout_s, 1.5 s, and was in load: raise it in the recipe or, "
        "without a recipe, with --timeout-s"
    )
    assert not running(tmp_path / "pids")


@pytest.mark.usefixtures("circumstances")
def test_resume_measures_what_is_missing_or_failed_and_nothing_else(tmp_path):
    sweep(tmp_path, End.OK, End.RAISES, End.OOM)
    events = []
    records = sweep(
        tmp_path, End.OK, End.RAISES, End.OOM, End.UNSUPPORTED, resume=True, on_event=events.append
    )
    assert [record.attempt for record in records] == [1, 2, 1, 1]
    assert len([event for event in events if isinstance(event, CellSkipped)]) == 2
    assert len(read_file(tmp_path / "records.jsonl")[0]) == 5


@pytest.mark.parametrize(
    ("change", "tried_again"),
    [
        ({}, []),
        ({"free_bytes": {"cpu": 2**34 + 1, "cuda": 2**40}}, []),
        ({"free_bytes": {"cpu": 2**35, "cuda": None}}, ["oom", "predicted-oom"]),
        ({"code": "d" * 64}, ["oom", "unsupported", "predicted-oom"]),
        ({"packages": "q" * 16}, ["oom", "unsupported", "predicted-oom"]),
        ({"gpus": ["A GPU"], "driver": "1"}, ["oom", "unsupported", "predicted-oom"]),
    ],
)
def test_resume_tries_again_what_may_run_now(tmp_path, circumstances, change, tried_again):
    ends = (End.OOM, End.UNSUPPORTED, End.PREDICTED_OOM)
    first = sweep(tmp_path, *ends)
    circumstances |= change
    again = sweep(tmp_path, *ends, resume=True)
    assert [r.status for r in again if r.attempt == 2] == tried_again
    assert [r for r in again if r.attempt == 1] == [r for r in first if r.status not in tried_again]


def test_a_reference_that_other_code_scored_is_not_used(tmp_path, monkeypatch):
    scored = []

    def sweep_with(code: str) -> None:
        monkeypatch.setattr("hotloop.sweep.job.code_hash", lambda: code)
        scored.append(0)

        def count(event: object) -> None:
            scored[-1] += isinstance(event, ReferenceStarted)

        run_sweep(scored_recipe(tmp_path, End.OK), tmp_path / str(len(scored)), on_event=count)

    for code in ("old", "old", "new"):
        sweep_with(code)
    assert scored == [1, 0, 1]


@pytest.mark.usefixtures("circumstances")
def test_resume_keeps_cells_of_other_code_and_says_how_many_of_which_and_how_to_measure_them(
    tmp_path, monkeypatch
):
    ends = (End.OK, End.OOM, End.RAISES)
    (of_old, *_) = sweep(tmp_path, *ends)

    def resumed() -> tuple[list[Record], list[str]]:
        events = []
        records = sweep(tmp_path, *ends, resume=True, on_event=events.append)
        return records, [event.message for event in events if isinstance(event, Notice)]

    assert resumed()[1] == []
    monkeypatch.setattr(runner, "code_hash", lambda: "new")
    (kept, *_), (note,) = resumed()
    assert kept == of_old
    of_code = of_old.provenance["hotloop"]["code"][:10]
    said = f"1 cell was measured by other code of hotloop (code {of_code}) and not measured again."
    assert note == f"{said} Another results folder (--out) measures all cells with this code."


@pytest.mark.parametrize(
    ("by", "name"),
    [
        ({}, "version not known"),
        ({"version": "0.0.1"}, "version 0.0.1"),
        ({"code": "c" * 64, "git_commit": "d" * 40}, "commit dddddddddd"),
        ({"git_commit": "d" * 40, "git_dirty": True}, "commit dddddddddd with local changes"),
    ],
)
def test_code_is_named_by_what_a_record_has(by, name):
    assert runner._name_of_code(by) == name


@pytest.mark.usefixtures("circumstances")
def test_a_part_is_every_nth_cell_and_all_parts_are_the_whole(tmp_path):
    ends = (End.UNSUPPORTED, End.OOM, End.PREDICTED_OOM)
    parts = [sweep(tmp_path / text[0], *ends, part=Part.parse(text)) for text in ("1/2", "2/2")]
    assert [[r.status for r in part] for part in parts] == [
        ["unsupported", "predicted-oom"],
        ["oom"],
    ]
    (again,) = sweep(tmp_path / "2", *ends, part=Part.parse("2/2"), resume=True)
    assert again == parts[1][0]


@pytest.mark.parametrize("text", ["", "0/2", "3/2", "1", "1/0", "-1/2", "1/2/3", "a/b", "1.5/2"])
def test_an_invalid_part_is_refused(text):
    with pytest.raises(ConfigError, match=r"--cells .* give i/n"):
        Part.parse(text)


def test_resume_goes_by_the_whole_configuration_and_workload_and_not_by_the_name(tmp_path):
    sweep(tmp_path, End.OK)
    other = recipe(End.OK).model_copy(
        update={"workload": recipe(End.OK).workload.model_copy(update={"new_tokens": 4})}
    )
    (record,) = run_sweep(other, tmp_path, resume=True)
    assert record.workload.new_tokens == 4
    assert len(read_file(tmp_path / "records.jsonl")[0]) == 2


def test_results_are_not_mixed_unless_asked_for(tmp_path):
    sweep(tmp_path, End.UNSUPPORTED)
    with pytest.raises(ConfigError, match=r"--resume.*--out"):
        sweep(tmp_path, End.UNSUPPORTED)


def test_a_half_written_line_is_reported_and_neither_trusted_nor_continued(tmp_path):
    sweep(tmp_path, End.UNSUPPORTED)
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    events = []
    (record,) = sweep(tmp_path, End.UNSUPPORTED, resume=True, on_event=events.append)
    message = next(e.message for e in events if isinstance(e, Notice))
    assert "records.jsonl, line 1: is not valid JSON" in message
    assert "incomplete" in message
    assert len(path.read_bytes().splitlines()) == 2
    assert json.loads(path.read_bytes().splitlines()[1])["status"] == "unsupported"
    assert read_file(path)[0] == [record]


def test_foreign_records_never_stop_a_resume(tmp_path):
    (record,) = sweep(tmp_path, End.UNSUPPORTED)
    own = record.model_dump(mode="json")
    foreign = [
        own | {"attempt": 2**31 - 1, "status": "failed"},
        own | {"provenance": own["provenance"] | {"key": ["a", "list"]}},
        own | {"provenance": None},
        own | {"provenance": {}},
        own | {"status": "ok", "decode_tok_s": {"mean": 1, "n": 3, "samples": [1]}},
        [own],
        None,
    ]
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, foreign)) + "\n{")
    events = []
    (resumed,) = sweep(tmp_path, End.UNSUPPORTED, resume=True, on_event=events.append)
    assert (resumed.status, resumed.attempt) == ("unsupported", 2**31 - 1)
    assert len([event for event in events if isinstance(event, Notice)]) == 6
    path.write_text("".join(json.dumps(own | {"status": "ok"}) + "\n" for _ in range(2)))
    (skipped,) = sweep(tmp_path, End.UNSUPPORTED, resume=True, on_event=events.append)
    assert skipped.status == "ok"  # finished, as its record says


@pytest.mark.parametrize("name", ["records.jsonl", ".lock", "logs"])
def test_links_in_a_results_folder_are_refused_before_anything_is_written(tmp_path, name):
    results, outside = tmp_path / "results", tmp_path / "outside"
    results.mkdir()
    outside.mkdir()
    target = outside if name == "logs" else outside / "file"
    (results / name).symlink_to(target)
    with pytest.raises(ConfigError, match=f"{name} is a link"):
        sweep(results, End.UNSUPPORTED)
    assert list(outside.iterdir()) == []


def test_ctrl_c_ends_the_child_keeps_what_is_done_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    parent = start_parent(tmp_path, End.UNSUPPORTED, End.HANGS)
    parent.send_signal(signal.SIGINT)
    assert parent.wait(HANG_S) == 130
    assert not running(tmp_path / "pids")
    records, _ = read_file(tmp_path / "records.jsonl")
    assert [record.status for record in records] == ["unsupported", "interrupted"]

    resumed = sweep(tmp_path, End.UNSUPPORTED, End.HANGS, resume=True, timeout_s=1.5)
    assert [(r.status, r.attempt) for r in resumed] == [("unsupported", 1), ("timeout", 2)]


def test_a_child_ends_with_its_parent(tmp_path, monkeypatch):
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    parent = start_parent(tmp_path, End.HANGS)
    parent.kill()
    parent.wait()
    wait_until(lambda: not running(tmp_path / "pids"), "the child ends with its parent")


def scored_recipe(folder: Path, *ends: End) -> Recipe:
    if not (folder / "model.gguf").exists():  # another time of change is another checkpoint
        (folder / "model.gguf").write_bytes(b"weights")
    (folder / "text.txt").write_text("some words " * 20)
    return recipe_from_flags(
        str(folder / "model.gguf"),
        matrix={"seed": [int(end) for end in ends]},
        workload={"prompt_tokens": 4, "new_tokens": 8},
        quality={"window": 16, "n_windows": 4, "text": folder / "text.txt"},
    )


def test_the_reference_is_scored_once_and_cells_are_compared_with_it(tmp_path):
    events = []
    recipe = scored_recipe(tmp_path, End.OK, End.OOM_IN_QUALITY)
    records = run_sweep(recipe, tmp_path / "out", on_event=events.append)
    about_it = [e for e in events if isinstance(e, ReferenceStarted | ReferenceFinished)]
    started, finished = about_it
    assert started == ReferenceStarted("none/eager")
    assert (finished.cell, finished.reason) == ("none/eager", None)
    assert finished.n_bytes > 0
    compared, unscored = records
    assert compared.status == "ok", compared.reason
    assert compared.delta_ln_ppl.samples == (0.01, 0.02)
    assert compared.quality_reason is None
    assert compared.quality_protocol.reference == "none/eager float32"
    assert compared.quality_protocol.n_windows == 4
    expected = identify_checkpoint(tmp_path / "model.gguf")
    assert compared.provenance["weights_sha256"] == expected

    assert unscored.status == "ok"  # what could not be scored keeps its speed
    assert unscored.decode_tok_s is not None
    assert "out of memory in quality: no room for the logits" in unscored.quality_reason


@pytest.mark.parametrize(
    ("stop", "status", "says"),
    [
        (
            "hang",
            "timeout",
            "took longer than timeout_s, 120 s, and was in greedy answers: raise it",
        ),
        ("crash", "failed", "crashed in greedy answers with SIGSEGV"),
        ("ctrl-c", "interrupted", "stopped by the user in greedy answers"),
    ],
)
def test_a_cell_that_is_stopped_while_it_is_scored_keeps_what_it_measured_and_is_tried_again(
    tmp_path, monkeypatch, stop, status, says
):
    recipe = scored_recipe(tmp_path, End.STOPS_AFTER_WINDOWS).model_copy(update={"timeout_s": 120})
    now_s = 0.0

    def listen(event: object) -> None:
        nonlocal now_s
        if isinstance(event, CellPhase) and event.phase == "greedy answers":
            now_s = 121.0 if stop == "hang" else 0.0
            if stop == "ctrl-c":
                raise KeyboardInterrupt

    clock = SimpleNamespace(monotonic=lambda: now_s)
    monkeypatch.setattr("hotloop.sweep.process.time", clock)
    monkeypatch.setenv("STOP", "crash" if stop == "crash" else "hang")
    with suppress(KeyboardInterrupt):
        run_sweep(recipe, tmp_path / "out", on_event=listen)
    ((record,), _) = read_file(tmp_path / "out" / "records.jsonl")
    assert (record.cell, record.status, record.attempt) == ("auto/eager", status, 1)
    assert record.reason.startswith(says)
    assert record.decode_tok_s.mean == pytest.approx(100)
    assert record.delta_ln_ppl.samples == (0.01, 0.02)
    assert record.quality_reason == "not finished"

    monkeypatch.setenv("STOP", "no")
    (again,) = run_sweep(recipe, tmp_path / "out", resume=True)
    assert (again.status, again.attempt, again.quality_reason) == ("ok", 2, None)


def test_a_reference_is_kept_for_other_sweeps_within_the_limit(tmp_path, monkeypatch):
    kept = tmp_path / "cache/references"

    def events(out: str):
        seen = []
        run_sweep(scored_recipe(tmp_path, End.OK), tmp_path / out, on_event=seen.append)
        return seen

    first = events("a")
    (finished,) = (e for e in first if isinstance(e, ReferenceFinished))
    assert finished.folder == str(kept)
    assert [file.suffix for file in kept.glob("[!.]*")] == [".safetensors"]
    (kept / ".0.partial").write_text("what a killed process has left")
    again = events("b")
    assert replace(finished, reused=True) in again
    assert not any(isinstance(event, ReferenceStarted) for event in again)
    assert not (kept / ".0.partial").exists()
    monkeypatch.setenv("HOTLOOP_REFERENCES_GB", "0")
    assert replace(finished, reused=True) in events("c")
    assert not list(kept.glob("*.safetensors"))


def test_without_a_reference_cells_run_say_why_and_are_compared_once_there_is_one(
    tmp_path, monkeypatch
):
    recipe = scored_recipe(tmp_path, End.OK)
    monkeypatch.setenv("NO_REFERENCE", "1")
    for record in run_sweep(recipe, tmp_path / "out"):
        assert record.status == "ok"
        assert record.perplexity is not None
        assert record.delta_ln_ppl is None
        assert record.quality_reason == (
            "the reference none/eager ended as failed: HotloopError in reference: made to fail"
        )
    events = []
    run_sweep(recipe, tmp_path / "out", resume=True, on_event=events.append)
    assert any(isinstance(event, CellSkipped) for event in events)

    monkeypatch.delenv("NO_REFERENCE")
    for record in run_sweep(recipe, tmp_path / "out", resume=True):
        assert record.attempt == 2
        assert record.delta_ln_ppl is not None


def test_another_checkpoint_under_the_same_name_is_measured_again(tmp_path):
    recipe = scored_recipe(tmp_path, End.UNSUPPORTED)
    run_sweep(recipe, tmp_path / "out")
    (tmp_path / "model.gguf").write_bytes(b"other weights")
    run_sweep(recipe, tmp_path / "out", resume=True)
    assert len(read_file(tmp_path / "out" / "records.jsonl")[0]) == 2


def test_two_sweeps_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    parent = start_parent(tmp_path, End.HANGS)
    with pytest.raises(ConfigError, match="another sweep"):
        sweep(tmp_path, End.OK)
    parent.send_signal(signal.SIGINT)
    parent.wait(HANG_S)


PARENT = """
import sys
from pathlib import Path
from test_sweep_runner import ENGINES, FAKE, End, sweep
ENGINES["hotloop"] = FAKE
try:
    sweep(Path(sys.argv[1]), *(End(int(end)) for end in sys.argv[2:]))
except KeyboardInterrupt:
    sys.exit(130)
"""


def start_parent(results: Path, *ends: End) -> subprocess.Popen:
    """A sweep in a process of its own, once its hanging cell hangs."""
    arguments = [str(results), *(str(int(end)) for end in ends)]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *arguments], env={**os.environ})

    def cell_hangs() -> bool:
        assert parent.poll() is None, "the sweep ended"
        return bool(running(results / "pids"))

    wait_until(cell_hangs, "the cell starts")
    return parent


def running(pids: Path) -> list[int]:
    """Which of the processes that a hanging engine wrote down run."""
    written = pids.read_text().split() if pids.exists() else []
    return [pid for pid in map(int, written) if alive(pid)]
