"""The reference that a job is compared with: whether there is one, and how a job gets it."""

from __future__ import annotations

from collections.abc import Callable

from hotloop.bench.record import Record
from hotloop.evaluate.reference_store import ReferenceStore
from hotloop.sweep.events import OnEvent, ReferenceFinished, ReferenceStarted
from hotloop.sweep.job import Job


def is_reference(job: Job) -> bool:
    """Tells whether a job would be compared with itself.

    Raises:
        HotloopError: The configuration cannot work.
    """
    config = job.config
    if (
        job.reference_model
        or config.draft != "none"
        or config.quant != "none"
        or config.head not in ("auto", "none")
    ):
        return False

    from hotloop.engine.setup import prepare  # imports torch

    return config.tensor_parallel == 1 and prepare(config).execution == "eager"


def held_reference_job(job: Job, store: ReferenceStore) -> Job:
    """Makes the job that scores a job's reference, whose files the store holds from now on."""
    scoring = job.reference_job(store.folder)
    for file in (scoring.reference, scoring.answers):
        if file is not None:
            store.hold(file)
    return scoring


def with_reference(job: Job, store: ReferenceStore, on_event: OnEvent) -> Job:
    """Scores a job's reference in this process; adds its files, or why there are none, to the job.

    Args:
        job: The job.
        store: Keeps the files.
        on_event: Receives the events.
    """
    from hotloop.sweep.cell import score_reference  # imports torch

    scoring = held_reference_job(job, store)
    reason = ensure_reference(scoring, lambda job: score_reference(job, on_event), on_event)
    if reason:
        return job.model_copy(update={"no_reference": reason})
    return job.model_copy(update={"reference": scoring.reference, "answers": scoring.answers})


def ensure_reference(scoring: Job, score: Callable[[Job], Record], on_event: OnEvent) -> str | None:
    """Scores a reference unless its files exist.

    Args:
        scoring: The job that scores it.
        score: Runs that job.
        on_event: Receives the events.

    Returns:
        The reason where there is no reference.
    """
    file, reason = scoring.reference, None
    assert file is not None, "a reference job names its file"
    reused = all(made.exists() for made in (file, scoring.answers) if made is not None)
    on_event(ReferenceStarted(scoring.cell, reused))
    if not reused:
        record = score(scoring)
        if record.status != "ok":
            why = (record.reason or "").partition("\n")[0]
            reason = f"the reference {scoring.cell} ended as {record.status}: {why}"
    n_bytes = 0 if reason else file.stat().st_size
    on_event(ReferenceFinished(scoring.cell, reason, n_bytes, str(file.parent)))
    return reason
