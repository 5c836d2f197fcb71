"""Cells as tasks of a local Ray cluster of two nodes."""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from sweep_fakes import End
from waiting import HANG_S, wait_until

from hotloop.baselines import ENGINES
from hotloop.bench.record import Record
from hotloop.errors import HotloopError, UnsupportedError
from hotloop.sweep.cell import base_record
from hotloop.sweep.events import CellSkipped, CellStarted, Notice
from hotloop.sweep.job import Job
from hotloop.sweep.ray_cluster import RayCluster, task_resources
from hotloop.sweep.recipe import Recipe, recipe_from_flags
from hotloop.sweep.runner import run_sweep
from hotloop.sweep.store import read_file
from hotloop.types import EngineConfig


def recipe(*ends: End) -> Recipe:
    return recipe_from_flags(
        "some-shape",
        weights="random",
        matrix={"seed": [int(end) for end in ends]},
        defaults={"device": "cpu"},
        workload={"prompt_tokens": 4, "new_tokens": 8},
        timeout_s=HANG_S,
    )


@pytest.mark.slow
def test_cells_run_on_two_nodes_and_that_of_a_lost_node_is_tried_again(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="the extra ray is not installed")
    from ray.cluster_utils import Cluster

    here = Path(__file__).parent
    monkeypatch.setitem(ENGINES, "hotloop", "sweep_fakes_child:FAKE")
    paths = (here, here.parent, here.parents[1] / "src")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    monkeypatch.setenv("HOTLOOP_CACHE", str(tmp_path / "cache"))
    hanging = tmp_path / "hanging"
    monkeypatch.setenv("HANGING", str(hanging))
    node = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **node}
    )
    try:
        nodes = [cluster.add_node(num_cpus=1, **node) for _ in range(2)]

        def lose_the_node() -> None:
            wait_until(hanging.exists, "the cell hangs")
            raylet = int(hanging.read_text())
            pids = [each.all_processes["raylet"][0].process.pid for each in nodes]
            cluster.remove_node(nodes[pids.index(raylet)], allow_graceful=False)

        losing = threading.Thread(target=lose_the_node)
        losing.start()
        events = []
        ends = (End.HANGS_ONCE, End.OK, End.UNSUPPORTED)
        options = {"ray_address": cluster.address, "on_event": events.append}
        records = run_sweep(recipe(*ends), tmp_path / "out", **options)
        losing.join()
        assert [record.status for record in records] == ["ok", "ok", "unsupported"]
        assert records[0].attempt >= 2
        assert any("was lost" in e.message for e in events if isinstance(e, Notice))
        kept, problems = read_file(tmp_path / "out" / "records.jsonl")
        assert sorted(r.cell for r in kept) == sorted(r.cell for r in records)
        assert problems == []

        events.clear()
        again = run_sweep(recipe(End.OK), tmp_path / "out", resume=True, **options)
        assert again == [records[1]]
        assert [type(event) for event in events] == [CellSkipped]
    finally:
        cluster.shutdown()


def test_without_ray_there_is_one_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'hotloop\[ray\]'"):
        RayCluster("auto")


@pytest.fixture
def asked(monkeypatch):
    """A stand-in for Ray, which is not in the development environment: what ``init`` was given."""
    given = []
    stand_in = SimpleNamespace(init=lambda **options: given.append(options["address"]))
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    return given


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_without_a_cluster_there_is_one_error_at_once_and_ray_does_not_wait_for_it(asked, address):
    with pytest.raises(HotloopError, match=rf"--ray {address}: no cluster answers"):
        RayCluster(address)
    assert asked == []


def test_an_address_that_answers_or_that_ray_finds_itself_is_given_to_ray(asked):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        RayCluster(address)
    RayCluster("auto")
    assert asked == [address, "auto"]


def job(**levers) -> Job:
    config = EngineConfig(model="some-shape", weights="random", **levers)
    return Job(cell=config.name, config=config, source=ENGINES["hotloop"])


@pytest.mark.parametrize(
    ("cpus", "whole_node"), [((8, 8), 8), ((1, 8, 8), 8), ((8, 12, 16), 12), ((0, 4), 4), ((0,), 1)]
)
def test_a_cell_without_gpus_has_a_node_of_its_own_however_unequal_they_are(cpus, whole_node):
    nodes = [{"CPU": n} for n in cpus]
    resources = task_resources(job(device="cpu"), nodes)
    assert resources == {"num_gpus": 0, "num_cpus": whole_node}
    assert all(n < 2 * whole_node for n in cpus), "no node runs two cells"


def test_a_cell_has_a_gpu_for_each_rank():
    nodes = [{"CPU": 4}, {"CPU": 64, "GPU": 2}]
    assert task_resources(job(tensor_parallel=2), nodes) == {"num_gpus": 2, "num_cpus": 1}
    assert task_resources(job(device="cpu"), nodes) == {"num_gpus": 0, "num_cpus": 64}


@pytest.mark.usefixtures("asked")
def test_a_cell_of_more_gpus_than_any_node_has_is_a_row_and_nothing_waits_for_it():
    cluster = RayCluster("auto")
    node = {"Alive": True, "Resources": {"CPU": 64, "GPU": 2}}
    cluster._ray.nodes = lambda: [node, node]
    kept, events = [], []
    options = {"timeout_s": HANG_S, "on_event": events.append, "keep": kept.append}
    (record,) = cluster.measure([job(tensor_parallel=4)], **options)
    assert kept == [record]
    assert [type(event) for event in events] == [CellStarted]
    assert record.status == "unsupported"
    assert record.reason == "needs 4 GPUs on one node, and the largest node has 2"


class PlayedRay:
    """A cluster of one node on which a task ends as ``ends`` says: an error's name, or ``ok``."""

    class RayError(Exception):
        """The base of Ray's errors."""

    def __init__(self, *ends: str) -> None:
        self.ends, self.started, self.cancelled = list(ends), [], []
        kinds = ("NodeDiedError", "WorkerCrashedError", "LocalRayletDiedError")
        kinds += ("OutOfMemoryError", "RayTaskError")
        errors = {kind: type(kind, (self.RayError,), {}) for kind in kinds}
        self.exceptions = SimpleNamespace(RayError=self.RayError, **errors)

    def init(self, **_):
        pass

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 4}}]

    def remote(self, _function):
        def start(job_json, _timeout_s):
            self.started.append(Job.model_validate_json(job_json))
            return len(self.started) - 1

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))

    def wait(self, tasks, num_returns):
        return tasks[:num_returns], tasks[num_returns:]

    def get(self, task):
        if (end := self.ends[task]) != "ok":
            raise getattr(self.exceptions, end)("the reason")
        record = Record(**base_record(self.started[task]), status="ok")
        return record.model_dump_json()

    def cancel(self, task, force):
        self.cancelled.append((task, force))


@pytest.mark.parametrize(
    ("ends", "status", "attempt"),
    [
        (("ok",), "ok", 1),
        (("NodeDiedError", "WorkerCrashedError", "ok"), "ok", 3),
        (("NodeDiedError", "LocalRayletDiedError", "NodeDiedError"), "failed", 3),
        (("RayTaskError",), "failed", 1),
    ],
)
def test_a_lost_node_is_another_attempt_up_to_three_and_any_other_error_is_the_cells_end(
    monkeypatch, ends, status, attempt
):
    ray = PlayedRay(*ends)
    monkeypatch.setitem(sys.modules, "ray", ray)
    kept, events = [], []
    options = {"timeout_s": HANG_S, "on_event": events.append, "keep": kept.append}
    (record,) = RayCluster("auto").measure([job()], **options)
    assert kept == [record]
    assert (record.status, record.attempt) == (status, attempt)
    assert [started.attempt for started in ray.started] == list(range(1, attempt + 1))
    assert len([e for e in events if isinstance(e, Notice)]) == attempt - 1
    if status == "failed":
        assert f"its Ray task ended with {ends[-1]}: the reason" in record.reason


def test_a_sweep_that_is_stopped_takes_its_tasks_with_it(monkeypatch):
    ray = PlayedRay("ok", "ok")
    monkeypatch.setitem(sys.modules, "ray", ray)

    def stop(_record):
        raise KeyboardInterrupt

    options = {"timeout_s": HANG_S, "on_event": lambda _: None, "keep": stop}
    with pytest.raises(KeyboardInterrupt):
        RayCluster("auto").measure([job(), job(seed=1)], **options)
    assert ray.cancelled == [(1, True)]
