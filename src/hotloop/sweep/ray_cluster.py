"""Runs the cells of a sweep as tasks of a Ray cluster, which the extra ``ray`` installs.

A task has its node's GPUs, or all CPUs of a node, as resources, so that cells do not share what
they measure. In the task the cell runs as in any sweep, in a process of its own with its time
limit; each node keeps references in its own cache. Records come back to the results folder of the
machine that started the sweep. A cell whose node is lost is tried again.
"""

from __future__ import annotations

import importlib
import logging
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hotloop.bench.record import Record
from hotloop.checked import MAX_COUNT
from hotloop.errors import HotloopError, UnsupportedError
from hotloop.evaluate.reference_store import ReferenceStore
from hotloop.sweep.cell import as_reason, base_record
from hotloop.sweep.events import CellStarted, Noticed, OnEvent, ignore
from hotloop.sweep.job import Job

MOST_LOSSES = 3
"""Nodes that a cell may lose before it is recorded as failed."""


def run_on_node(job_json: str, timeout_s: float) -> str:
    """Runs a job on the node that executes this task; returns its record as JSON."""
    from hotloop.sweep.runner import SingleMachine

    job = Job.model_validate_json(job_json)
    with tempfile.TemporaryDirectory() as folder, ReferenceStore() as store:
        machine = SingleMachine(Path(folder), store, timeout_s, ignore)
        return machine.run(machine.with_reference(job, None)).model_dump_json()


class RayCluster:
    """A running Ray cluster.

    Args:
        address: As ``ray.init`` takes it: ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT``.

    Raises:
        UnsupportedError: Ray is not installed.
        HotloopError: There is no such cluster.
    """

    def __init__(self, address: str) -> None:
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise UnsupportedError(
                f"--ray: ray cannot be imported ({error}): pip install 'hotloop[ray]'."
            ) from error
        self._ray = ray
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise HotloopError(f"--ray {address}: no cluster answers ({error}).") from error

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def measure(
        self,
        jobs: list[Job],
        *,
        timeout_s: float,
        on_event: OnEvent,
        keep: Callable[[Record], object],
    ) -> list[Record]:
        """Runs jobs, as many at once as the cluster has room for; returns records in their order.

        Args:
            jobs: The jobs.
            timeout_s: Seconds that each may take.
            on_event: Receives the events.
            keep: Called with each record as soon as it is there.
        """
        ray = self._ray
        records: dict[int, Record] = {}
        running = {self._start(job, timeout_s): (i, job, 0) for i, job in enumerate(jobs)}
        for i, job in enumerate(jobs, start=1):
            on_event(CellStarted(job.cell, i, len(jobs), job.attempt))
        try:
            while running:
                (done,), _ = ray.wait(list(running), num_returns=1)
                i, job, losses = running.pop(done)
                try:
                    record = Record.model_validate_json(ray.get(done))
                except ray.exceptions.RayError as error:
                    losses += 1
                    if losses < MOST_LOSSES and _is_loss(ray, error):
                        attempt = min(job.attempt + 1, MAX_COUNT)
                        job = job.model_copy(update={"attempt": attempt})
                        on_event(Noticed(f"the node of {job.cell} was lost: it is tried again."))
                        running[self._start(job, timeout_s)] = (i, job, losses)
                        continue
                    reason = as_reason(f"its Ray task ended with {type(error).__name__}: {error}")
                    record = Record(**base_record(job), status="failed", reason=reason)
                records[i] = record
                keep(record)
        finally:
            for task in running:
                with suppress(ray.exceptions.RayError):
                    ray.cancel(task, force=True)
        return [records[i] for i in range(len(jobs))]

    def _start(self, job: Job, timeout_s: float) -> Any:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        n_gpus = 0
        if job.config.device != "cpu" and any(node.get("GPU") for node in nodes):
            n_gpus = job.config.tensor_parallel
        whole_node = min((node["CPU"] for node in nodes if node.get("CPU")), default=1)
        options = {"num_gpus": n_gpus, "num_cpus": 1 if n_gpus else whole_node, "max_retries": 0}
        task = self._ray.remote(run_on_node).options(**options)
        return task.remote(job.model_dump_json(), timeout_s)


def _is_loss(ray: Any, error: Exception) -> bool:
    """Tells whether a task ended because its node or its worker did."""
    kinds = ("NodeDiedError", "WorkerCrashedError", "LocalRayletDiedError", "OutOfMemoryError")
    return isinstance(error, tuple(getattr(ray.exceptions, kind) for kind in kinds))
