"""Finds the reference of a job, or scores it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hotloop import hardware
from hotloop.bench.record import Record, Status
from hotloop.evaluate.reference_store import ReferenceStore
from hotloop.sweep.events import OnEvent, ReferenceFinished, ReferenceStarted
from hotloop.sweep.job import Job

N_RANKS = (2, 4, 8)
"""Numbers of ranks to try, one GPU each, for a reference that does not fit one GPU."""

DID_NOT_FIT: tuple[Status, ...] = ("predicted-oom", "oom")


def is_reference(job: Job) -> bool:
    """Returns whether a job would be compared with itself.

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


def with_reference(job: Job, store: ReferenceStore, on_event: OnEvent) -> Job:
    """Scores a job's reference in this process, and adds its files, or a reason, to the job.

    Args:
        job: The job.
        store: Keeps the files.
        on_event: Receives the events.
    """
    from hotloop.sweep.cell import score_reference  # imports torch

    def score(scoring: Job) -> Record:
        return score_reference(scoring, on_event)

    return job.model_copy(update=find_reference(job, store, score, on_event))


def find_reference(
    job: Job, store: ReferenceStore, score: Callable[[Job], Record], on_event: OnEvent
) -> dict[str, Any]:
    """Finds a job's reference in the store, or scores it.

    If it does not fit the job's device, ranks on several GPUs score it, or else the CPU.

    Args:
        job: The job.
        store: Stores the files, and locks the returned files.
        score: Runs the job that scores a reference.
        on_event: Receives the events.

    Returns:
        The fields of ``Job`` with the reference, or with the reason why there is none.
    """
    first = job.reference_job(store.folder)
    if _is_stored(first):
        places = [(first, None)]
    else:
        others = list(_other_places(job, store.folder))
        stored = [place for place in others if _is_stored(place[0])]
        places = stored[:1] or [(first, None), *others]
    reasons = []
    for scoring, place in places:
        record = _score_if_missing(scoring, store, score, on_event)
        if record is None:
            files = {"reference": scoring.reference, "answers": scoring.answers}
            return files | {"reference_place": place}
        why = (record.reason or "").partition("\n")[0]
        reasons.append(f"{scoring.cell} ended as {record.status}: {why}")
        if place is None and record.status not in DID_NOT_FIT:
            break  # another place helps only if memory was lacking
    return {"no_reference_reason": f"the reference {'; '.join(reasons)}"}


def _other_places(job: Job, folder: Path) -> Iterator[tuple[Job, str]]:
    """Makes the jobs that score a reference elsewhere, each with the name of the place."""
    if job.config.device == "cpu" or not (gpus := hardware.machine()["gpus"]):
        return
    for n in N_RANKS:
        if n <= len(gpus):
            yield job.reference_job(folder, tensor_parallel=n), f"by {n} ranks"
    yield job.reference_job(folder, device="cpu"), "on the CPU"


def _is_stored(scoring: Job) -> bool:
    return all(file.exists() for file in (scoring.reference, scoring.answers) if file is not None)


def _score_if_missing(
    scoring: Job, store: ReferenceStore, score: Callable[[Job], Record], on_event: OnEvent
) -> Record | None:
    """Scores a reference unless its files exist; returns its record if that failed, else None."""
    file = scoring.reference
    assert file is not None, "a reference job names its file"
    for each in (file, scoring.answers):
        if each is not None:
            store.hold(each)
    record = None
    if not (reused := _is_stored(scoring)):
        on_event(ReferenceStarted(scoring.cell))
        record = score(scoring)
    reason = None
    if record is not None and record.status != "ok":
        why = (record.reason or "").partition("\n")[0]
        reason = f"the reference {scoring.cell} ended as {record.status}: {why}"
    n_bytes = 0 if reason else file.stat().st_size
    on_event(ReferenceFinished(scoring.cell, reason, n_bytes, str(file.parent), reused))
    return record if reason else None
