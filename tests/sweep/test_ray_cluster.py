"""Cells as tasks of a local Ray cluster of two nodes."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
from sweep_fakes import End
from waiting import HANG_S, wait_until

from hotloop.baselines import ENGINES
from hotloop.errors import HotloopError, UnsupportedError
from hotloop.sweep.events import CellSkipped, Noticed
from hotloop.sweep.ray_cluster import RayCluster
from hotloop.sweep.recipe import Recipe, recipe_from_flags
from hotloop.sweep.runner import run_sweep
from hotloop.sweep.store import read_file

pytest.importorskip("ray", reason="the extra ray is not installed")


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
        assert any("was lost" in e.message for e in events if isinstance(e, Noticed))
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


@pytest.mark.slow
def test_without_a_cluster_there_is_one_error():
    with pytest.raises(HotloopError, match=r"--ray 127.0.0.1:1: no cluster answers"):
        RayCluster("127.0.0.1:1")
