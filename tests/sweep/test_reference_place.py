"""A reference that does not fit the cell's device is scored by ranks or by the CPU, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from hotloop import hardware
from hotloop.baselines import ENGINES
from hotloop.bench.record import Record
from hotloop.evaluate.reference_store import ReferenceStore
from hotloop.sweep.cell import base_record
from hotloop.sweep.events import ReferenceFinished, ReferenceStarted, ignore
from hotloop.sweep.job import Job
from hotloop.sweep.recipe import QualityOptions
from hotloop.sweep.reference import find_reference
from hotloop.types import OWN_ENGINE, EngineConfig

GIB_OF_ONE_GPU, GIB_OF_THE_HOST = 80, 1000


@pytest.fixture(autouse=True)
def _four_gpus(monkeypatch):
    monkeypatch.setattr(hardware, "machine", lambda: {"gpus": ["H"] * 4})


@pytest.fixture
def store(tmp_path):
    with ReferenceStore(tmp_path / "references", 10**9) as store:
        yield store


def job(**levers) -> Job:
    return Job(
        cell="int4-g128/auto",
        config=EngineConfig(model="m", quant="int4-g128", **levers),
        source=ENGINES[OWN_ENGINE],
        quality=QualityOptions(window=8, n_windows=2),
        weights_sha256="w",
    )


class Scorer:
    """Scores a model of some GiB where it fits."""

    def __init__(self, gib: int, status: str = "predicted-oom") -> None:
        self.gib, self.status, self.asked = gib, status, []

    def __call__(self, scoring: Job) -> Record:
        config = scoring.config
        self.asked.append((config.device, config.tensor_parallel))
        room = GIB_OF_THE_HOST if config.device == "cpu" else GIB_OF_ONE_GPU
        if self.gib > room * config.tensor_parallel:
            fields = base_record(scoring)
            return Record(**fields, status=self.status, reason=f"{room} GiB free\nmore")
        Path(scoring.reference).write_bytes(b"distributions")
        return Record(**base_record(scoring), status="ok")


@pytest.mark.parametrize(
    ("gib", "asked", "place"),
    [
        (70, [("auto", 1)], None),
        (140, [("auto", 1), ("auto", 2)], "by 2 ranks"),
        (300, [("auto", 1), ("auto", 2), ("auto", 4)], "by 4 ranks"),
        (800, [("auto", 1), ("auto", 2), ("auto", 4), ("cpu", 1)], "on the CPU"),
    ],
)
@pytest.mark.parametrize("status", ["predicted-oom", "oom"])
def test_the_first_place_that_has_room_scores_it(store, gib, asked, place, status):
    scorer = Scorer(gib, status)
    found = find_reference(job(), store, scorer, ignore)
    assert scorer.asked == asked
    assert found["reference_place"] == place
    assert found["reference"].read_bytes() == b"distributions"
    again = Scorer(gib)
    assert find_reference(job(), store, again, ignore) == found
    assert again.asked == [], "one that was scored elsewhere is kept, too"


def test_every_place_has_a_file_of_its_own(store):
    files = {
        find_reference(job(), store, Scorer(gib), ignore)["reference"] for gib in (800, 300, 70)
    }
    assert len(files) == 1, "a kept one serves"
    for file in files:
        file.unlink()
    files |= {find_reference(job(), store, Scorer(70), ignore)["reference"]}
    assert len(files) == 2


def test_where_it_fits_nowhere_each_place_is_in_the_reason(store):
    events = []
    found = find_reference(job(), store, Scorer(5000), events.append)
    assert found == {
        "no_reference_reason": "the reference none/eager ended as predicted-oom: 80 GiB free; "
        "none/eager/tp2 ended as predicted-oom: 80 GiB free; "
        "none/eager/tp4 ended as predicted-oom: 80 GiB free; "
        "none/eager on the CPU ended as predicted-oom: 1000 GiB free"
    }
    started = [e.cell for e in events if isinstance(e, ReferenceStarted)]
    assert started[-1] == "none/eager on the CPU"
    assert all(e.reason for e in events if isinstance(e, ReferenceFinished))


def test_another_failure_is_not_tried_elsewhere(store):
    scorer = Scorer(5000, status="failed")
    assert "ended as failed" in find_reference(job(), store, scorer, ignore)["no_reference_reason"]
    assert scorer.asked == [("auto", 1)]


def test_a_reference_on_the_cpu_has_nowhere_else_to_go(store, monkeypatch):
    scorer = Scorer(5000)
    assert "no_reference_reason" in find_reference(job(device="cpu"), store, scorer, ignore)
    monkeypatch.setattr(hardware, "machine", lambda: {"gpus": []})
    assert "no_reference_reason" in find_reference(job(), store, scorer, ignore)
    assert scorer.asked == [("cpu", 1), ("auto", 1)]
