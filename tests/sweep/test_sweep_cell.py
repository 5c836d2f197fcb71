"""``run_cell`` with the real measuring, scoring and reference, around a tiny engine."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sweep_fakes import FakeEngine, planned

from hotloop import hardware
from hotloop.baselines import ENGINES, EngineKind
from hotloop.errors import (
    CheckpointError,
    ConfigError,
    HotloopError,
    OutOfMemoryError,
    RankError,
    UnsupportedError,
)
from hotloop.evaluate.reference import FORMAT
from hotloop.sweep.cell import (
    classify_error,
    refuse_cell,
    run_cell,
    score_reference,
    with_instability,
)
from hotloop.sweep.events import CellPhase
from hotloop.sweep.job import Job, make_jobs
from hotloop.sweep.recipe import QualityOptions, Workload
from hotloop.types import EngineConfig, MemoryPlan, Score
from hotloop.weights.identity import identify_checkpoint

V = 7


class ScoringEngine(FakeEngine):
    """Predicts by a fixed table of bigrams, a little off under ``int8``."""

    def score(self, windows, *, full=False, share_prefixes=False):  # noqa: ARG002
        logits_VV = torch.randn(V, V, generator=torch.Generator().manual_seed(0))
        if self.config.quant == "int8":
            logits_VV += 0.1 * torch.randn(V, V, generator=torch.Generator().manual_seed(1))
        for window in windows:
            ids = torch.tensor(window)
            log_probs_TV = logits_VV[ids[:-1]].log_softmax(-1)
            yield Score(
                token_logprobs=log_probs_TV.gather(1, ids[1:, None])[:, 0],
                top1=log_probs_TV.argmax(-1),
                log_probs=log_probs_TV if full else None,
            )


class BrokenEngine(ScoringEngine):
    def score(self, *_windows, **_options):
        raise ZeroDivisionError("a bug")


def roomy(_config: EngineConfig) -> MemoryPlan:
    return planned(1, 2)


SCORING = EngineKind(create=ScoringEngine, predict=roomy)
BROKEN = EngineKind(create=BrokenEngine, predict=roomy)


@pytest.fixture(autouse=True)
def _engines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("hotloop", "other"):
        monkeypatch.setitem(ENGINES, name, f"{__name__}:SCORING")


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Describes the machine."""
    said = {"kind": "cpu", "name": "made up"}
    said |= {"read_bytes_per_s": 1e9, "datasheet_bytes_per_s": 2e9}
    monkeypatch.setattr(hardware, "provenance", lambda _: {"device": said})
    return said


def job(folder: Path, quant: str, *, kind: str = "SCORING", tasks=(), **config) -> Job:
    if not (folder / "model.gguf").exists():  # another time of change is another checkpoint
        (folder / "model.gguf").write_bytes(b"weights")
    (folder / "text.txt").write_text("abcdefg" * 3 + "gfedcba" * 3)
    (made,) = make_jobs(
        [EngineConfig(model=str(folder / "model.gguf"), quant=quant, **config)],
        Workload(prompt_tokens=4, new_tokens=8),
        QualityOptions(window=8, n_windows=9, text=folder / "text.txt", tasks=list(tasks)),
    )
    return made.model_copy(update={"source": f"{__name__}:{kind}"})


def compared(folder: Path, quant: str, **options) -> Job:
    made = job(folder, quant, **options)
    scoring = made.reference_job(folder / ".reference")
    assert score_reference(scoring).status == "ok"
    files = {"reference": scoring.reference, "answers": scoring.answers}
    return made.model_copy(update=files)


def test_tasks_are_answered_by_the_timed_engine_and_compared_with_the_references_answers(tmp_path):
    texts = map(" ".join, itertools.islice(itertools.permutations("abcdf", 4), 80))
    lines = "\n".join(json.dumps({"context": text, "continuation": "c"}) for text in texts)
    (tmp_path / "words.jsonl").write_text(lines)
    made = compared(tmp_path, "int8", tasks=[str(tmp_path / "words.jsonl")])
    events = []
    record = run_cell(made, events.append)
    (task,) = record.tasks
    assert (task.task, task.accuracy.n, task.metric) == ("words", 80, "acc")
    assert record.quality_protocol.tasks == ("words.jsonl",)
    assert task.reference_accuracy is not None
    assert task.at_chance == (record.verdict is None)
    done = [e.done for e in events if isinstance(e, CellPhase) and e.phase == "tasks"]
    assert done == list(range(81))
    itself = run_cell(compared(tmp_path, "none", tasks=[str(tmp_path / "words.jsonl")]))
    assert itself.tasks[0].accuracy.mean == task.reference_accuracy


def test_a_record_says_where_its_reference_was_scored_if_that_is_not_its_own_device(tmp_path):
    made = compared(tmp_path, "int8")
    assert run_cell(made).quality_protocol.reference == "none/eager float32"
    elsewhere = made.model_copy(update={"reference_place": "on the CPU"})
    assert run_cell(elsewhere).quality_protocol.reference == "none/eager float32 on the CPU"


def test_the_answers_of_a_reference_are_kept_apart_from_its_distributions(tmp_path):
    (tmp_path / "words.jsonl").write_text('{"context": "a", "continuation": "b"}')
    plain, asked = (
        job(tmp_path, "int8", tasks=tasks).reference_job(tmp_path)
        for tasks in ([], [str(tmp_path / "words.jsonl")])
    )
    assert plain.reference == asked.reference, "another task costs no new distributions"
    assert plain.answers is None
    assert asked.answers.suffix == ".json"
    (tmp_path / "words.jsonl").write_text('{"context": "a", "continuation": "c"}')
    changed = job(tmp_path, "int8", tasks=[str(tmp_path / "words.jsonl")])
    assert changed.reference_job(tmp_path).answers != asked.answers
    assert changed.key != job(tmp_path, "int8").key


def test_what_the_timed_engine_generates_is_compared_with_its_scores(tmp_path):
    greedy = run_cell(job(tmp_path, "int8")).greedy
    assert greedy.draft == "none"
    assert greedy.agreement.mean < 1, "this engine generates zeros, whatever it scores"
    assert greedy.gap_max > 0


def test_progress_names_the_phase_that_runs_after_the_windows_are_scored(tmp_path, monkeypatch):
    events = []
    generate = ScoringEngine.generate

    def watched(engine, prompts, params):
        events.append(None)
        return generate(engine, prompts, params)

    monkeypatch.setattr(ScoringEngine, "generate", watched)
    run_cell(job(tmp_path, "int8"), events.append)
    phases = [e and e.phase for e in events if e is None or isinstance(e, CellPhase)]
    answers = phases[phases.index("quality") :]
    n = answers.count(None)
    assert answers == ["quality"] * 6 + ["greedy answers"] + [None] * n + ["greedy answers"] * n
    assert n > 1


def test_speed_and_quality_stand_in_one_record(tmp_path):
    events = []
    record = run_cell(compared(tmp_path, "int8"), events.append)
    assert record.status == "ok"
    assert record.cell == "int8/eager"
    assert record.decode_tok_s.mean == pytest.approx(100)
    assert record.mbu.mean == pytest.approx(2 * record.mbu_datasheet.mean)
    assert record.perplexity.n == 5  # the text has no more windows
    assert record.quality_protocol.n_windows == 5
    assert record.delta_ln_ppl.se > 0
    assert record.kl_mean.mean > 0
    assert record.kl_max >= record.kl_p99 >= record.kl_mean.mean
    assert record.same_top1.mean <= 1
    assert "config" not in record.engine
    counted = [e.done for e in events if isinstance(e, CellPhase) and e.phase == "quality"]
    assert counted == [0, 1, 2, 3, 4, 5]


def not_here(_config: EngineConfig) -> MemoryPlan:
    raise UnsupportedError("not on this machine")


REFUSED = EngineKind(create=BrokenEngine, predict=not_here)


def test_what_cannot_run_is_refused_before_the_machine_is_measured(tmp_path, monkeypatch):
    def measured(_):
        raise AssertionError("the machine was measured")

    monkeypatch.setattr(hardware, "provenance", measured)
    events = []
    refused = job(tmp_path, "none", kind="REFUSED")
    for record in (refuse_cell(refused), run_cell(refused, events.append)):
        assert (record.status, record.reason) == ("unsupported", "not on this machine")
    assert events == []
    assert refuse_cell(job(tmp_path, "none")) is None


@pytest.mark.parametrize(("kind", "shared_by"), [("cpu", 4), ("cuda", 1)])
def test_ranks_share_the_bandwidth_of_a_cpu_and_have_a_gpu_each(tmp_path, device, kind, shared_by):
    device["kind"] = kind
    one, four = (run_cell(job(tmp_path, "none", tensor_parallel=n)) for n in (1, 4))
    assert four.mbu.mean == pytest.approx(shared_by * one.mbu.mean)
    assert four.mbu_datasheet.mean == pytest.approx(shared_by * one.mbu_datasheet.mean)


def test_the_reference_compared_with_itself_shows_no_difference(tmp_path):
    record = run_cell(compared(tmp_path, "none"))
    assert record.delta_ln_ppl.mean == 0
    assert abs(record.kl_mean.mean) < 1e-6
    assert record.same_top1.mean == 1


def test_a_reference_is_plain_pytorch_whatever_auto_is(tmp_path):
    scoring = job(tmp_path, "int8").reference_job(tmp_path)
    assert (scoring.cell, scoring.config.execution) == ("none/eager", "eager")


def test_a_reference_of_something_else_is_not_compared_with(tmp_path):
    other = compared(tmp_path, "int8").model_copy(update={"weights_sha256": "other"})
    record = run_cell(other)
    assert record.status == "ok"
    assert record.perplexity is not None
    assert record.delta_ln_ppl is None
    assert "is a reference whose weights" in record.quality_reason


def test_a_text_too_short_costs_the_quality_and_not_the_speed(tmp_path):
    made = job(tmp_path, "none")
    (tmp_path / "text.txt").write_text("abc")
    record = run_cell(made)
    assert (record.status, record.perplexity) == ("ok", None)
    assert "the text has 3 tokens, fewer than a window of 8" in record.quality_reason


def test_a_bug_in_scoring_is_a_failure_that_keeps_the_speed(tmp_path):
    record = run_cell(job(tmp_path, "none", kind="BROKEN"))
    assert record.status == "failed"
    assert record.reason.startswith("ZeroDivisionError in quality: a bug\n")
    assert record.decode_tok_s.mean == pytest.approx(100)
    assert record.quality_reason == "not finished"
    assert record.load_s == 0.5


def test_tasks_that_cannot_be_answered_cost_no_other_figure(tmp_path, monkeypatch):
    def fail(*_):
        raise HotloopError("no answer")

    (tmp_path / "words.jsonl").write_text('{"context": "a", "continuation": "b"}')
    made = compared(tmp_path, "int8", tasks=[str(tmp_path / "words.jsonl")])
    monkeypatch.setattr("hotloop.sweep.cell.answer_tasks", fail)
    record = run_cell(made)
    assert (record.status, record.tasks) == ("ok", ())
    assert record.quality_reason == "HotloopError in tasks: no answer"
    assert record.kl_mean is not None
    assert record.greedy is not None


def test_the_record_of_a_stopped_cell_also_says_why_its_speed_is_unstable():
    spread = "repeats differ"
    assert with_instability(None, spread) == spread
    assert with_instability("crashed", None) == "crashed"
    assert with_instability("crashed\nlog", spread) == "crashed; repeats differ\nlog"


def test_random_weights_carry_no_quality(tmp_path):
    record = run_cell(job(tmp_path, "none", weights="random"))
    assert record.status == "ok"
    assert (record.perplexity, record.quality_protocol) == (None, None)
    assert "random weights" in record.quality_reason
    assert record.provenance["weights_sha256"] is None


def test_the_engine_is_closed_however_the_cell_ends(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(FakeEngine, "close", lambda engine: closed.append(engine))
    run_cell(job(tmp_path, "none"))
    run_cell(job(tmp_path, "none", kind="BROKEN"))
    assert [type(engine).__name__ for engine in closed] == ["ScoringEngine", "BrokenEngine"]


GONE = RankError(1, 2, "closed its connection", "another process: out of memory")


def caused_by(cause: Exception) -> HotloopError:
    error = HotloopError("no step")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (UnsupportedError("no such device"), "unsupported", "no such device"),
        (ConfigError("group size 128 does not divide 576"), "unsupported", "does not divide"),
        (OutOfMemoryError("load", 2**33, 2**30), "oom", "load, needed 8.00 GiB, free 1.00 GiB"),
        (torch.OutOfMemoryError("CUDA out of memory."), "oom", "out of memory in load: CUDA"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "oom", "CPUAllocator"),
        (MemoryError(), "oom", "out of memory in load: MemoryError"),
        (GONE, "failed", "RankError in load: rank 1 of 2 closed its connection"),
        (caused_by(GONE), "failed", "HotloopError in load: no step"),
        (caused_by(MemoryError()), "oom", "out of memory in load: MemoryError"),
        (CheckpointError("a.gguf", "truncated"), "failed", "CheckpointError in load: a.gguf"),
        (KeyError("x"), "failed", "KeyError in load: 'x'"),
    ],
)
def test_every_error_has_its_status(error, status, says):
    found, reason = classify_error(error, "load")
    assert found == status
    assert says in reason


def test_a_damaged_reference_costs_the_comparison_and_not_the_speed(tmp_path):
    made = compared(tmp_path, "none")
    save_file({"top1": torch.zeros(1)}, made.reference, metadata={"format": FORMAT})
    record = run_cell(made)
    assert (record.status, record.kl_mean) == ("ok", None)
    assert record.decode_tok_s is not None
    assert record.perplexity is not None
    assert "not a complete reference" in record.quality_reason


def test_a_draft_models_checkpoint_is_part_of_what_was_measured_and_not_of_its_reference(tmp_path):
    (tmp_path / "draft.gguf").write_bytes(b"draft")
    plain = job(tmp_path, "int8")
    drafted = job(tmp_path, "int8", draft=str(tmp_path / "draft.gguf"))
    sha256 = identify_checkpoint(tmp_path / "draft.gguf")
    assert run_cell(drafted).provenance["draft_sha256"] == sha256
    assert run_cell(plain).provenance["draft_sha256"] is None
    assert plain.reference_job(tmp_path) == drafted.reference_job(tmp_path)

    (tmp_path / "draft.gguf").write_bytes(b"another")
    assert job(tmp_path, "int8", draft=str(tmp_path / "draft.gguf")).key != drafted.key


@pytest.mark.parametrize("draft", ["ngram", "exit-2", "llama-2-13b"])
def test_only_a_draft_model_that_is_read_is_hashed(tmp_path, draft):
    weights = "random" if draft == "llama-2-13b" else "checkpoint"
    assert job(tmp_path, "int8", draft=draft, weights=weights).draft_sha256 is None


def test_a_record_says_which_engine_it_is_of_where_that_is_not_ours(tmp_path):
    ours, theirs = (run_cell(job(tmp_path, "none", engine=e)) for e in ("hotloop", "other"))
    assert (ours.baseline, theirs.baseline) == (None, "other")
    assert (ours.cell, theirs.cell) == ("none/eager", "other/none/eager")


def test_a_checkpoint_is_hashed_by_its_content(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model-1.safetensors").write_bytes(b"1")
    (tmp_path / "a" / "config.json").write_bytes(b"{}")
    before = identify_checkpoint(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_bytes(b"words")
    assert identify_checkpoint(tmp_path / "a") == before
    (tmp_path / "a" / "config.json").write_bytes(b'{"x": 1}')
    assert identify_checkpoint(tmp_path / "a") != before
