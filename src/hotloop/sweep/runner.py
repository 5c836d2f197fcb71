"""Runs a recipe: first the references, then each cell, one after the other in its own process.

Cells run one at a time, because cells that share a machine disturb each other's measurements. A
record is on the disk before the next cell starts, so a sweep can be stopped and resumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hotloop import hardware
from hotloop.bench.record import MEASURED, Record, RecordedHotloop, Status
from hotloop.cache import code_hash
from hotloop.checked import MAX_COUNT
from hotloop.errors import ConfigError
from hotloop.evaluate.reference_store import ReferenceStore
from hotloop.sweep.cell import refuse_device
from hotloop.sweep.events import (
    CellFinished,
    CellSkipped,
    CellStarted,
    Notice,
    OnEvent,
    ignore,
)
from hotloop.sweep.job import Job, make_jobs
from hotloop.sweep.part import Part
from hotloop.sweep.process import Interrupted, run_isolated
from hotloop.sweep.ray_cluster import RayCluster
from hotloop.sweep.recipe import Recipe, expand
from hotloop.sweep.reference import find_reference
from hotloop.sweep.store import RECORDS, append, locked, read_file
from hotloop.types import OWN_ENGINE
from hotloop.writing import (
    file_name,
    make_folder,
    make_subfolder,
    opened_to_append,
)

COULD_NOT_RUN: tuple[Status, ...] = ("unsupported", "predicted-oom", "oom")
"""Statuses of cells that ``resume`` runs again only if the circumstances have changed."""

FINISHED: tuple[Status, ...] = (*MEASURED, *COULD_NOT_RUN)
"""Statuses of cells that ``resume`` skips, since they would end in the same way again; those of
``COULD_NOT_RUN`` only while the circumstances are the same."""

MIN_MEMORY_GROWTH = 1.1
"""The factor by which free memory must have grown before a cell that did not fit is tried again."""


def run_sweep(
    recipe: Recipe,
    results: Path,
    *,
    resume: bool = False,
    part: Part | None = None,
    ray_address: str | None = None,
    on_event: OnEvent = ignore,
) -> list[Record]:
    """Measures every cell of a recipe.

    Args:
        recipe: The recipe.
        results: The results folder, created if needed: ``records.jsonl`` and ``logs/``.
        resume: Allow a folder that has records, and skip the cells that it has finished; see
            ``measurement_key``. A cell that could not run is tried again if hotloop's code, the
            packages, the GPUs or their driver differ, or if more memory is free. A cell that other
            code measured is kept, and a note says so.
        part: The part of the cells to measure; None for all.
        ray_address: The Ray cluster that runs the cells; None for this machine.
        on_event: Receives events.

    Returns:
        The latest record of each of the recipe's cells, in the recipe's order. Cells with
        equivalent configurations count as one.

    Raises:
        ConfigError: The folder has records without ``resume``, another sweep is writing there, or
            the text cannot be read.
        KeyboardInterrupt: After Ctrl-C, once the running process has ended and its cell is recorded
            as ``interrupted``.
    """
    jobs = make_jobs(
        expand(recipe),
        recipe.workload,
        recipe.quality_options,
        pythons=recipe.pythons,
        provenance={
            "recipe": {"name": recipe.name, "sha256": recipe.sha256},
            "circumstances": hardware.circumstances(),
        },
    )
    if part is not None:
        jobs = part.of(jobs)
    make_folder(results)
    with locked(results), ReferenceStore() as store:
        earlier = _earlier(results, resume, on_event)
        if note := _note_of_other_code(jobs, earlier):
            on_event(Notice(note))
        sweep = SingleMachine(results, store, recipe.timeout_s, on_event)
        if ray_address is not None:
            with RayCluster(ray_address) as cluster:
                return sweep.measure_on(cluster, jobs, earlier)
        # All references come first, so that kernels that they share with cells are already built.
        jobs = [sweep.with_reference(job, earlier.get(job.key)) for job in jobs]
        return [
            sweep.measure(job, earlier.get(job.key), index=index, total=len(jobs))
            for index, job in enumerate(jobs, start=1)
        ]


def _earlier(results: Path, resume: bool, on_event: OnEvent) -> dict[str, Record]:
    """Returns the latest record of each job in this folder, by the job's key."""
    path = results / RECORDS
    with opened_to_append(path):
        pass  # a file that cannot be written is refused before the first cell runs
    records, problems = read_file(path)
    if records and not resume:
        raise ConfigError(
            f"{results} already has records ({len(records)}): add --resume to skip finished cells, "
            "or choose another results folder (--out)."
        )
    for problem in problems:
        on_event(Notice(problem))
    return {record.provenance.get("key", ""): record for record in records}


def _is_finished(job: Job, earlier: Record | None) -> bool:
    """Returns whether another attempt at a job would have the same result."""
    if earlier is None or earlier.status not in FINISHED:
        return False
    if earlier.status in COULD_NOT_RUN and _may_run_now(earlier, job.provenance):
        return False
    if earlier.status == "unsupported" and job.config.engine != OWN_ENGINE:
        return False  # its library may have been installed since
    lacks_reference = earlier.status in MEASURED and "reference" not in earlier.provenance
    return not (lacks_reference and job.reference)


def _may_run_now(earlier: Record, provenance: Mapping[str, Any]) -> bool:
    """Returns whether a cell that could not run may run now, since circumstances have changed."""
    was, now = earlier.provenance.get("circumstances"), provenance["circumstances"]
    if was is None:
        return True  # not known: records of older versions lack them
    if any(was.get(name) != now[name] for name in ("code", "packages", "driver")):
        return True
    if was.get("gpus", []) != now["gpus"]:
        return True
    if earlier.status == "unsupported":
        return False
    kind = "cuda" if earlier.provenance.get("device", {}).get("kind") == "cuda" else "cpu"
    free_before, free_now = was.get("free_bytes", {}).get(kind), now["free_bytes"][kind]
    if free_before is None or free_now is None:
        return False
    return free_now >= MIN_MEMORY_GROWTH * free_before


def _note_of_other_code(jobs: Iterable[Job], earlier: Mapping[str, Record]) -> str | None:
    """Returns a note on finished cells that other code of hotloop measured; None without any."""
    kept = (r for job in jobs if _is_finished(job, r := earlier.get(job.key)) and r is not None)
    measured = [r.provenance.get("hotloop", {}) for r in kept if r.status in MEASURED]
    if not (others := [by for by in measured if by.get("code") != code_hash()]):
        return None
    cells = "1 cell was" if len(others) == 1 else f"{len(others)} cells were"
    names = ", ".join(dict.fromkeys(map(_name_of_code, others)))
    return (
        f"{cells} measured by other code of hotloop ({names}) and not measured again. "
        "Another results folder (--out) measures all cells with this code."
    )


def _name_of_code(hotloop: RecordedHotloop) -> str:
    if commit := hotloop.get("git_commit"):
        return f"commit {commit[:10]}{' with local changes' if hotloop.get('git_dirty') else ''}"
    code = hotloop.get("code")
    return f"code {code[:10]}" if code else f"version {hotloop.get('version') or 'not known'}"


class SingleMachine:
    """Runs the jobs of a sweep on this machine.

    Args:
        results: The results folder.
        store: Stores references.
        timeout_s: The time limit of a job, in seconds.
        on_event: Receives events.
    """

    def __init__(
        self, results: Path, store: ReferenceStore, timeout_s: float, on_event: OnEvent
    ) -> None:
        self.results, self.timeout_s, self.on_event = results, timeout_s, on_event
        self.store = store
        # By the reference's file name if this job's own device scored it.
        self.references: dict[Path, dict[str, Any]] = {}

    def with_reference(self, job: Job, earlier: Record | None) -> Job:
        """Adds the reference to a job, and scores the reference first if it is missing."""
        compared = earlier is not None and "reference" in earlier.provenance
        if job.quality is None or job.no_reference_reason:
            return job
        if compared and _is_finished(job, earlier):
            return job
        default = job.reference_job(self.store.folder).reference
        assert default is not None, "a reference job names its file"
        if default not in self.references:
            self.references[default] = find_reference(job, self.store, self.run, self.on_event)
        found = self.references[default]
        if (file := found.get("reference")) is not None:
            found = found | {"provenance": {**job.provenance, "reference": file.stem}}
        return job.model_copy(update=found)

    def measure(self, job: Job, earlier: Record | None, *, index: int, total: int) -> Record:
        """Returns the earlier record of a finished job, or measures it."""
        if earlier is not None and _is_finished(job, earlier):
            self.on_event(CellSkipped(earlier))
            return earlier
        if earlier is not None:
            attempt = min(earlier.attempt + 1, MAX_COUNT)
            job = job.model_copy(update={"attempt": attempt})
        self.on_event(CellStarted(job.cell, index, total, job.attempt))
        try:
            return self.keep(self.run(job))
        except Interrupted as stop:
            self.keep(stop.record)
            raise

    def measure_on(
        self, cluster: RayCluster, jobs: Sequence[Job], earlier: Mapping[str, Record]
    ) -> list[Record]:
        """Runs unfinished jobs on a cluster; returns the records of all jobs, in their order."""
        records: dict[str, Record] = {}
        waiting = []
        for job in jobs:
            before = earlier.get(job.key)
            if before is not None and _is_finished(job, before):
                self.on_event(CellSkipped(before))
                records[job.key] = before
                continue
            attempt = min(before.attempt + 1, MAX_COUNT) if before is not None else 1
            waiting.append(job.model_copy(update={"attempt": attempt}))
        measured = cluster.measure(
            waiting, timeout_s=self.timeout_s, on_event=self.on_event, keep=self.keep
        )
        records |= {job.key: record for job, record in zip(waiting, measured, strict=True)}
        return [records[job.key] for job in jobs]

    def run(self, job: Job) -> Record:
        """Runs a job in a process of its own on this machine, unless its devices are missing."""
        if (record := refuse_device(job)) is not None:
            return record
        prefix = "reference-" if job.task == "reference" else ""
        log = make_subfolder(self.results, "logs") / f"{prefix}{file_name(job.cell)}.log"
        return run_isolated(job, log=log, timeout_s=self.timeout_s, on_event=self.on_event)

    def keep(self, record: Record) -> Record:
        """Writes a record into the results folder."""
        append(self.results / RECORDS, record)
        self.on_event(CellFinished(record))
        return record
