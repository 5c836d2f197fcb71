"""Runs the cells of a sweep as tasks of a Ray cluster, which the extra ``ray`` installs.

The resources of a task are GPUs of its node, or all CPUs of a node, so that cells do not share the
hardware that they measure. In the task, the cell runs as in any sweep, in a process of its own with
a time limit; each node stores references in its own cache. Records return to the results folder of
the machine that started the sweep. A cell whose node is lost is tried again.
"""

from __future__ import annotations

import importlib
import logging
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hotloop.bench.record import Record
from hotloop.checked import MAX_COUNT
from hotloop.errors import HotloopError, UnsupportedError
from hotloop.evaluate.reference_store import ReferenceStore
from hotloop.sweep.cell import as_reason, base_record
from hotloop.sweep.events import CellStarted, Notice, OnEvent, ignore
from hotloop.sweep.job import Job

CONNECT_S = 10.0
"""Seconds to wait for a cluster's address; Ray itself tries for many minutes."""

MAX_LOST_NODES = 3
"""The number of lost nodes after which a cell is recorded as failed."""


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
        address: An address for ``ray.init``: ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT``.

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
            _connect(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (OSError, OverflowError, RuntimeError, ValueError) as error:
            raise HotloopError(
                f"--ray {address}: no cluster answers ({error}). Check the address, or start Ray "
                "there."
            ) from error

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
        """Runs as many jobs at once as the cluster has room for; returns records in order of jobs.

        Args:
            jobs: The jobs.
            timeout_s: Seconds that each may take.
            on_event: Receives the events.
            keep: Stores a record; called as soon as the record arrives.
        """
        ray = self._ray
        records: dict[int, Record] = {}
        running: dict[Any, tuple[int, Job, int]] = {}

        def end(i: int, record: Record) -> None:
            records[i] = record
            keep(record)

        def start(i: int, job: Job, losses: int) -> None:
            try:
                running[self._start(job, timeout_s)] = (i, job, losses)
            except UnsupportedError as error:
                end(i, Record(**base_record(job), status="unsupported", reason=str(error)))

        try:
            for i, job in enumerate(jobs):
                on_event(CellStarted(job.cell, i + 1, len(jobs), job.attempt))
                start(i, job, 0)
            while running:
                (done,), _ = ray.wait(list(running), num_returns=1)
                i, job, losses = running.pop(done)
                try:
                    record = Record.model_validate_json(ray.get(done))
                except ray.exceptions.RayError as error:
                    losses += 1
                    if losses < MAX_LOST_NODES and _is_node_loss(ray, error):
                        attempt = min(job.attempt + 1, MAX_COUNT)
                        job = job.model_copy(update={"attempt": attempt})
                        on_event(
                            Notice(
                                f"the node of {job.cell} was lost: the cell runs again on "
                                "another node."
                            )
                        )
                        start(i, job, losses)
                        continue
                    reason = as_reason(f"its Ray task ended with {type(error).__name__}: {error}")
                    record = Record(**base_record(job), status="failed", reason=reason)
                end(i, record)
        finally:
            for task in running:
                with suppress(ray.exceptions.RayError):
                    ray.cancel(task, force=True)
        return [records[i] for i in range(len(jobs))]

    def _start(self, job: Job, timeout_s: float) -> Any:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        options = task_resources(job, nodes) | {"max_retries": 0}
        return (
            self._ray.remote(run_on_node)
            .options(**options)
            .remote(job.model_dump_json(), timeout_s)
        )


def task_resources(job: Job, nodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the resources of a job's task: GPUs for its ranks, or else a node of its own.

    Ray cannot request a whole node. So the request is a number of CPUs that no node has twice, and
    no node runs two cells. Nodes with fewer CPUs, such as a small head node, run none.

    Args:
        job: The job.
        nodes: The resources of each node.

    Raises:
        UnsupportedError: No node has as many GPUs as the job has ranks; Ray would wait for one.
    """
    most_gpus = int(max((node.get("GPU", 0) for node in nodes), default=0))
    if job.config.device != "cpu" and most_gpus:
        if (needed := job.config.tensor_parallel) > most_gpus:
            raise UnsupportedError(
                f"needs {needed} GPUs on one node, and the largest node has {most_gpus}"
            )
        return {"num_gpus": needed, "num_cpus": 1}
    cpus = [node.get("CPU", 0) for node in nodes]
    whole_node = min((n for n in cpus if 2 * n > max(cpus)), default=1)
    return {"num_gpus": 0, "num_cpus": whole_node}


def _connect(address: str) -> None:
    """Connects to the address of a cluster, if it is HOST:PORT, and closes the connection.

    Raises:
        OSError: Nothing answers at the address.
        OverflowError: The port does not exist.
        ValueError: It is not a host name.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()


def _is_node_loss(ray: Any, error: Exception) -> bool:
    """Returns whether a task ended because its node or its worker process did.

    Ray's ``OutOfMemoryError`` means that Ray killed the worker, because its node had little memory.
    """
    kinds = ("NodeDiedError", "WorkerCrashedError", "LocalRayletDiedError", "OutOfMemoryError")
    return isinstance(error, tuple(getattr(ray.exceptions, kind) for kind in kinds))
