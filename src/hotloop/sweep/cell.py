"""Measures one configuration in one process.

It predicts the memory, loads the model, times and scores it, and makes the record.

A configuration that fails raises no error: its record says how it ended. This code runs in the
caller's process (``hotloop bench``) or in a process of its own (``hotloop sweep``, through
``worker``); ``process`` handles crashes, hangs and kills.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from hotloop import hardware
from hotloop.bench.measure import measure_speed
from hotloop.bench.record import QualityProtocol, Record, Status
from hotloop.errors import (
    CheckpointError,
    ConfigError,
    HotloopError,
    OutOfMemoryError,
    UnsupportedError,
    shorten,
)
from hotloop.evaluate.perplexity import perplexities
from hotloop.evaluate.tasks import (
    AnswersKey,
    answer_tasks,
    compare_tasks,
    load_tasks,
    read_answers,
    without_folder,
    write_answers,
)
from hotloop.evaluate.text import Text, load_text
from hotloop.evaluate.windows import take_windows, windows_per_article
from hotloop.sweep.events import CellPhase, CellSoFar, OnEvent, Phase, ignore
from hotloop.sweep.job import Job
from hotloop.types import OWN_ENGINE

if TYPE_CHECKING:
    from hotloop.evaluate.reference import ReferenceKey
    from hotloop.types import Engine, EngineConfig, MemoryPlan

_log = logging.getLogger(__name__)

MAX_REASON_CHARS = 8_000
"""The most characters of a reason in a record."""

MAX_SCORED_WINDOWS, MAX_SCORED_TOKENS = 8, 8192
"""The most windows, and tokens in them, that an engine scores in one batch if it is not timed."""


def run_cell(job: Job, on_event: OnEvent = ignore) -> Record:
    """Measures one configuration: its speed, then its quality through the same engine.

    Args:
        job: The job.
        on_event: Receives events: phases, repeats, windows, and the facts that are known before
            loading.

    Returns:
        A complete record, whatever happened; only exceptions such as KeyboardInterrupt are raised.
    """
    return _run(job, on_event, _measure)


def score_cell(job: Job, on_event: OnEvent = ignore) -> Record:
    """Measures the quality of one configuration, without its speed.

    Returns:
        As ``run_cell``, without speed and workload.
    """
    return _run(job, on_event, _score)


def refuse_cell(job: Job) -> Record | None:
    """Checks a configuration before its model is loaded.

    Returns:
        The record of a configuration that is unsupported or does not fit; None if it may run.
    """
    attempt = _Attempt(job, ignore)
    try:
        attempt.predict()
        if attempt.predicted_oom_record() is None:
            return None
        attempt.prepare()  # the record names the machine whose memory is too small
    except Exception as error:
        return attempt.failure_record(error)
    return attempt.predicted_oom_record()


def refuse_device(job: Job) -> Record | None:
    """Checks that this machine has the devices of a configuration, without using them.

    Returns:
        The record of a configuration whose devices are missing; None if they exist, or if only the
        interpreter of its engine could tell.
    """
    if job.python is not None:
        return None
    try:
        job.engine.check_device(job.config)
    except (ConfigError, UnsupportedError) as error:
        return _Attempt(job, ignore).failure_record(error)
    return None


def score_reference(job: Job, on_event: OnEvent = ignore) -> Record:
    """Scores the reference, and writes it to the file ``job.reference``.

    Returns:
        A record without figures; ``ok`` if the reference was written.
    """
    return _run(job, on_event, _score_reference)


def base_record(job: Job) -> dict[str, Any]:
    """Returns the fields of a job's record that are known before it runs."""
    inputs = {
        "weights_sha256": job.weights_sha256,
        "draft_sha256": job.draft_sha256,
        "key": job.key,
    }
    if job.reference_model:
        inputs["reference_model"] = job.reference_model
    return {
        "cell": job.cell,
        "baseline": None if job.config.engine == OWN_ENGINE else job.config.engine,
        "attempt": job.attempt,
        "config": job.config.to_dict(),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "workload": job.workload,
        "provenance": {**job.provenance, **inputs},
    }


def gib(n_bytes: float) -> str:
    """Formats bytes in GiB."""
    return f"{n_bytes / 2**30:.2f} GiB"


def with_instability(reason: str | None, instability: str | None) -> str | None:
    """Adds the reason of an unstable speed to the first line of a record's reason."""
    if not (reason and instability):
        return reason or instability
    first, *rest = reason.split("\n")
    return "\n".join([f"{first}; {instability}", *rest])


def as_reason(text: str | None) -> str | None:
    """Shortens a reason for a record; of a long reason it keeps the beginning and the end."""
    if text is None:
        return None
    return shorten(text, MAX_REASON_CHARS).encode(errors="backslashreplace").decode()


class _Attempt:
    """A running attempt: its phase, and the fields of its record so far.

    Attributes:
        config: The configuration that is loaded: the job's, with the seats of ``_with_seats``.
    """

    def __init__(self, job: Job, on_event: OnEvent) -> None:
        self.job, self.on_event = job, on_event
        self.config = job.config
        self.phase: Phase = "predict"
        self.memory: MemoryPlan | None = None
        self.fields = base_record(job)

    def enter(self, phase: Phase) -> None:
        self.phase = phase
        self.progress(0, 0)

    def progress(self, done: int, total: int, decode_tok_s: float | None = None) -> None:
        self.on_event(CellPhase(self.job.cell, self.phase, done, total, decode_tok_s))

    def prepare(self) -> Callable[[EngineConfig], Engine]:
        """Records what is known before anything is loaded; returns the function that loads it.

        A configuration that cannot run is refused before the machine is measured.
        """
        self.predict()
        self.enter("predict")
        device = hardware.resolve_device(self.job.config.device)
        self.keep(provenance=hardware.provenance(device) | self.fields["provenance"])
        return self.job.engine.create

    def keep(self, **fields: Any) -> None:
        """Adds fields to the record, and sends it, in case the process ends before it is complete.

        ``reason``, that of an unstable speed, is added to the reason for the record's status.
        """
        self.fields |= fields
        self.on_event(CellSoFar(self.record("failed")))

    def predict(self) -> None:
        """Records the memory that it would take, by purpose, if that is known."""
        for config in dict.fromkeys((_with_seats(self.job), self.job.config)):
            self.config, self.memory = config, self.job.engine.predict(config)
            if self.memory is None or self.memory.total_bytes <= self.memory.free_bytes:
                break
        self.fields["predicted_bytes"] = self.memory.to_dict() if self.memory else None

    def predicted_oom_record(self) -> Record | None:
        """Returns the record of a configuration that would not fit; None if it may fit."""
        if self.memory is None or self.memory.total_bytes <= self.memory.free_bytes:
            return None
        needs = f"needs {gib(self.memory.total_bytes)}, {gib(self.memory.free_bytes)} free"
        return self.record("predicted-oom", needs)

    def failure_record(self, error: Exception) -> Record:
        """Returns the record of an attempt that an error ended."""
        status, reason = classify_error(error, self.phase, self.memory)
        if status == "failed":
            _log.error("%s failed in %s", self.job.cell, self.phase, exc_info=error)
        return self.record(status, reason)

    def record(self, status: Status, reason: str | None = None, **figures: Any) -> Record:
        fields = self.fields | figures
        reasons: dict[str, Any] = {
            "reason": as_reason(with_instability(reason, fields.get("reason"))),
            "quality_reason": as_reason(fields.get("quality_reason")),
        }
        return Record(**(fields | reasons), status=status)


def _with_seats(job: Job) -> EngineConfig:
    """Returns a job's configuration, with seats for several windows at once if it is not timed.

    More seats do not change the scores of a text. An engine with drafts is not changed, since its
    greedy answers are checked as well.
    """
    config = job.config
    timed = job.task == "measure" and job.workload is not None
    is_plain = config.engine == OWN_ENGINE and config.draft == "none"
    if timed or not is_plain or config.max_batch_size > 1 or config.max_seq_len is None:
        return config
    n = min(MAX_SCORED_WINDOWS, MAX_SCORED_TOKENS // config.max_seq_len)
    return replace(config, max_batch_size=max(1, n))


def _run(job: Job, on_event: OnEvent, work: Callable[[_Attempt, Engine], dict[str, Any]]) -> Record:
    attempt = _Attempt(job, on_event)
    try:
        create = attempt.prepare()
        if (record := attempt.predicted_oom_record()) is not None:
            return record
        attempt.enter("load")
        with closing(create(attempt.config)) as engine:
            description = engine.describe()
            # The cell's name shows what `auto` was resolved to, but not the seats of `_with_seats`.
            named = replace(description.config, max_batch_size=job.config.max_batch_size)
            name = replace(description, config=named).name
            attempt.keep(
                cell=job.cell.replace(job.config.name, name, 1),
                load_s=description.load_s,
                load_gb_s=description.load_gb_s,
                warmup_s=description.warmup_s,
                # the record has the configuration in `config`
                engine={k: v for k, v in asdict(description).items() if k != "config"},
            )
            return attempt.record(**work(attempt, engine))
    except Exception as error:
        return attempt.failure_record(error)


def _measure(attempt: _Attempt, engine: Engine) -> dict[str, Any]:
    assert attempt.job.workload is not None, "a job that times something needs a workload"
    attempt.enter("speed")
    device = attempt.fields["provenance"]["device"]
    # A rank's share of the bandwidth: on GPUs each has a device, on a CPU they share one.
    sharing = attempt.job.config.tensor_parallel if device["kind"] == "cpu" else 1
    datasheet = device["datasheet_bytes_per_s"]
    speed = measure_speed(
        engine,
        attempt.job.workload,
        read_bytes_per_s=device["read_bytes_per_s"] / sharing,
        datasheet_bytes_per_s=datasheet and datasheet / sharing,
        on_repeat=attempt.progress,
    )
    attempt.keep(
        reason=speed.instability,
        decode_tok_s=speed.decode_tok_s,
        e2e_tok_s=speed.e2e_tok_s,
        aggregate_tok_s=speed.aggregate_tok_s,
        ttft_s=speed.ttft_s,
        tpot_s=speed.tpot_s,
        mbu=speed.mbu,
        mbu_datasheet=speed.mbu_datasheet,
        speculation=speed.speculation,
        peak_bytes=speed.peak_bytes,
    )
    status = "ok" if speed.instability is None else "unstable"
    try:
        return {"status": status} | _quality(attempt, engine)
    except Exception as error:
        kind, reason = classify_error(error, attempt.phase, attempt.memory)
        if kind == "failed" and not isinstance(error, HotloopError):
            raise
        return {"status": status, "quality_reason": reason}  # the speed is valid


def _score(attempt: _Attempt, engine: Engine) -> dict[str, Any]:
    return {"status": "ok"} | _quality(attempt, engine)


def _quality(attempt: _Attempt, engine: Engine) -> dict[str, Any]:
    job = attempt.job
    if job.config.weights == "random":
        return {"quality_reason": "random weights have no quality"}
    if job.quality is None:
        return {"quality_reason": "not requested"}

    from hotloop.evaluate.greedy import greedy_agreement
    from hotloop.evaluate.quality import measure_quality  # these import torch
    from hotloop.evaluate.reference import Reference

    attempt.keep(quality_reason="not finished")
    attempt.enter("quality")
    text = load_text(job.quality.text)
    windows, protocol, key = _windows(job, engine, text)
    reference, why_none = None, job.no_reference_reason or "no reference was given"
    if job.reference is not None:
        try:
            reference = Reference(job.reference, key)
        except (ConfigError, CheckpointError) as error:
            why_none = str(error)
    quality = measure_quality(
        engine,
        windows,
        reference=reference,
        articles=protocol.articles,
        on_window=attempt.progress,
    )
    scheme = "as stored" if job.quality.against else "none"
    place = f" {job.reference_place}" if job.reference_place else ""
    model = f" of {job.reference_model}" if job.reference_model else ""
    compared = f"{scheme}/eager {reference.key.dtype}{place}{model}" if reference else None
    attempt.keep(
        quality_protocol=protocol.model_copy(update={"reference": compared}), **vars(quality)
    )
    others = perplexities(
        engine,
        text.content,
        job.quality.protocols,
        size=job.quality.window,
        limit=job.quality.n_windows,
        on_window=attempt.progress,
    )
    attempt.keep(other_perplexities=others)
    attempt.enter("greedy answers")
    attempt.keep(greedy=greedy_agreement(engine, windows, attempt.progress))
    return {"quality_reason": None if reference else why_none, **_answers(attempt, engine)}


def _answers(attempt: _Attempt, engine: Engine) -> dict[str, Any]:
    """Returns the figures of tasks, and the verdict if there is a reference."""
    job = attempt.job
    assert job.quality is not None, "a job that scores nothing answers nothing"
    if not job.quality.tasks:
        return {}
    attempt.enter("tasks")
    tasks = load_tasks(job.quality.tasks, job.quality.n_items)
    answers = answer_tasks(engine, tasks, attempt.progress)
    reference = None
    if job.answers is not None:
        reference = read_answers(job.answers, _answers_key(job, engine))
    figures, verdict = compare_tasks(tasks, answers, reference)
    return {"tasks": figures, "verdict": verdict}


def _answers_key(job: Job, engine: Engine) -> AnswersKey:
    own = job.config.engine == OWN_ENGINE
    return AnswersKey(
        weights=job.compared_sha256 or "",
        dtype=engine.describe().dtype if own else None,
        tasks=job.task_sha256s,
    )


def _score_reference(attempt: _Attempt, engine: Engine) -> dict[str, Any]:
    from hotloop.evaluate.quality import write_reference  # imports torch

    job, file = attempt.job, attempt.job.reference
    assert file is not None, "a reference needs a file"
    assert job.quality is not None, "a reference needs something to score"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        attempt.enter("reference")
        windows, _, key = _windows(job, engine, load_text(job.quality.text))
        write_reference(engine, windows, file, key, on_window=attempt.progress)
    if job.answers is not None and not job.answers.exists():
        attempt.enter("tasks")
        tasks = load_tasks(job.quality.tasks, job.quality.n_items)
        answers = answer_tasks(engine, tasks, attempt.progress)
        write_answers(job.answers, _answers_key(job, engine), answers)
    return {"status": "ok"}


def _windows(
    job: Job, engine: Engine, text: Text
) -> tuple[list[list[int]], QualityProtocol, ReferenceKey]:
    """Makes the windows to score, their entry in the record, and the key of their reference."""
    from hotloop.evaluate.reference import ReferenceKey  # imports torch

    assert job.quality is not None, "a job that scores nothing needs no windows"
    description = engine.describe()
    size = job.quality.window
    windows = take_windows(engine.encode, text.content, size, job.quality.n_windows)
    protocol = QualityProtocol(
        text=text.name,
        text_sha256=text.sha256,
        window=job.quality.window,
        n_windows=len(windows),
        articles=windows_per_article(engine.encode, text.content, text.starts, size, len(windows)),
        tasks=tuple(map(without_folder, job.quality.tasks)),
    )
    own = job.config.engine == OWN_ENGINE
    key = ReferenceKey(
        weights=job.compared_sha256 or "",
        dtype=description.dtype if own else None,
        vocab_size=description.vocab_size,
        text_sha256=text.sha256,
        window=protocol.window,
        n_windows=protocol.n_windows,
    )
    return windows, protocol, key


def classify_error(
    error: Exception, phase: Phase, memory: MemoryPlan | None = None
) -> tuple[Status, str]:
    """Returns the status and the reason for the record of a cell that an error ended."""
    if isinstance(error, UnsupportedError | ConfigError):
        return "unsupported", str(error)
    if isinstance(error, OutOfMemoryError):
        return "oom", str(error)
    cause: BaseException | None = error
    while isinstance(cause, HotloopError):  # not by its text, which can quote a log or a file name
        cause = cause.__cause__
    if cause is not None and (shortage := hardware.find_out_of_memory(cause)) is not None:
        message = str(shortage).partition("\n")[0] or type(shortage).__name__
        sizes = f"; needed {gib(memory.total_bytes)} as predicted" if memory else ""
        sizes += f", {gib(memory.free_bytes)} were free before loading" if memory else ""
        return "oom", f"out of memory in {phase}: {message}{sizes}"
    if isinstance(error, HotloopError):
        return "failed", f"{type(error).__name__} in {phase}: {error}"
    frames = "".join(traceback.format_tb(error.__traceback__)[-3:]).rstrip()
    message = str(error).strip()
    return "failed", f"{type(error).__name__} in {phase}: {message}\n{frames}"
