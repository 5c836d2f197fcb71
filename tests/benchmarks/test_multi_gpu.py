"""The results of ``benchmarks/multi_gpu.py``; ``--rehearse`` runs the whole of it."""

import json
import math
from pathlib import Path

import multi_gpu
import pytest
from gpu import write_between
from multi_gpu import CUT_SHORT, Item, Plan, cells, make_table, results_of, run_section
from rank_steps import covered, summary

from hotloop.bench.record import Figure, Record
from hotloop.sweep.recipe import load_recipe
from hotloop.sweep.store import RECORDS, append
from hotloop.types import EngineConfig

ROOT = Path(__file__).parent.parent.parent


def plan(*sizes: int) -> Plan:
    return Plan(
        recipes=tuple(load_recipe(ROOT / f"recipes/{name}.yaml") for name in multi_gpu.RECIPES),
        executions=("fused", "compile"),
        sizes=sizes,
        all_reduces=("symm_mem", "nccl"),
        device="cuda",
    )


# What there is to do.


def test_every_cell_of_the_recipes_is_measured_on_as_many_gpus_as_there_are():
    configs = [config for _, config in cells(plan(1, 2, 4), drafts=False)]
    assert len(configs) == 2 * 2 * 2 * (1 + 2 * 2)  # models, schemes, executions; degrees, sums
    assert {(c.tensor_parallel, c.all_reduce) for c in configs} == {
        *((n, way) for n in (2, 4) for way in ("symm_mem", "nccl")),
        (1, "auto"),
    }
    assert max(c.tensor_parallel for _, c in cells(plan(1, 2), drafts=False)) == 2
    assert {(c.weights, c.max_seq_len) for c in configs} == {("random", 205)}, "as the sweep has it"


def test_the_most_important_items_run_first():
    first, second, *_ = (config for _, config in cells(plan(1, 2, 4), drafts=False))
    assert (first.model, first.name) == ("llama-2-13b", "int4-g128/fused")
    assert (second.model, second.name) == ("llama-2-70b", "int4-g128/fused")


def test_drafts_are_tried_with_one_way_of_adding_up():
    configs = [config for _, config in cells(plan(1, 2), drafts=True)]
    assert {c.model for c in configs} == {"llama-2-70b"}
    assert {c.draft for c in configs} == {"llama-2-13b"}
    assert {c.all_reduce for c in configs if c.tensor_parallel == 2} == {"symm_mem"}


# Doing it, and going on.


def test_a_section_goes_on_after_failures_and_does_again_only_what_is_not_done(
    tmp_path, monkeypatch
):
    done, broken = [], {"b"}

    def item(key: str) -> Item:
        def run(_: float) -> dict[str, bool]:
            done.append(key)
            if key in broken:
                raise RuntimeError("no luck")
            return {"ok": True}

        return Item(key, 1.0, run)

    monkeypatch.setitem(multi_gpu.SECTIONS, "speed", lambda *_: map(item, "abc"))
    assert run_section("speed", plan(1, 2), tmp_path, math.inf) == 1
    assert done == ["a", "b", "c"]
    rows = json.loads((tmp_path / "speed.json").read_text())
    assert rows["b"]["error"] == "RuntimeError: no luck"
    done.clear(), broken.clear()
    assert run_section("speed", plan(1, 2), tmp_path, math.inf) == 0
    assert done == ["b"]


def test_without_time_left_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setitem(multi_gpu.SECTIONS, "speed", lambda *_: [Item("a", 1.0, pytest.fail)])
    ends = multi_gpu.time.monotonic() + multi_gpu.ENOUGH_S - 1
    assert run_section("speed", plan(1, 2), tmp_path, ends) == CUT_SHORT


def test_items_without_time_left_are_unfinished_and_not_failed(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(multi_gpu.time, "monotonic", lambda: clock[0])

    def run(limit_s: float) -> dict[str, bool]:
        clock[0] += limit_s
        return {"ok": False}

    monkeypatch.setitem(multi_gpu.SECTIONS, "speed", lambda *_: [Item("a", 200.0, run)])
    assert run_section("speed", plan(1, 2), tmp_path, ends=100.0) == CUT_SHORT
    assert not (tmp_path / "speed.json").exists()
    assert run_section("speed", plan(1, 2), tmp_path, ends=500.0) == 1


# What comes of it.


def record(quant: str, n: int, tok_s: float | None, all_reduce: str = "auto") -> Record:
    config = EngineConfig(
        model="llama-2-13b",
        weights="random",
        quant=quant,
        execution="fused",
        tensor_parallel=n,
        all_reduce=all_reduce,
    )
    figure = tok_s and Figure(mean=tok_s, ci95=(tok_s - 1, tok_s + 1), n=5, samples=(tok_s,) * 5)
    return Record(
        cell=config.name,
        config=config.to_dict(),
        status="ok" if tok_s else "oom",
        started_at="2026-11-24",
        decode_tok_s=figure,
        engine={"kernels": {"all_reduce": f"all_reduce/{all_reduce}"}} if n > 1 else {},
    )


def test_the_table_has_gain_efficiency_and_the_share_of_sums(tmp_path):
    assert len(make_table(tmp_path).splitlines()) == 2, "nothing yet"
    folder = tmp_path / "speed" / "asclepius-13b"
    folder.mkdir(parents=True)
    for one in (
        record("int4-g128", 4, 960.0, "symm_mem"),
        record("int4-g128", 2, 500.0, "nccl"),
        record("int4-g128", 1, 400.0),
        record("int8", 1, None),
        record("int8", 2, 300.0, "nccl"),
    ):
        append(folder / RECORDS, one)
    key = "asclepius-13b/int4-g128/fused/tp4/symm_mem"
    (tmp_path / "share.json").write_text(json.dumps({key: {"ok": True, "share": 0.253}}))
    *_, one, two, four, did_not_fit, alone = make_table(tmp_path).split("\n")[:-1]
    assert one == "| llama-2-13b | int4-g128 | fused | 1 | – | – | 400.0 ± 1.0 | – | – | – |"
    assert two.endswith("| fused | 2 | nccl | – | 500.0 ± 1.0 | 1.25 | 62 % | – |")
    assert four.endswith("| 4 | symm_mem | – | 960.0 ± 1.0 | 2.40 | 60 % | 25 % |")
    assert did_not_fit == "| llama-2-13b | int8 | fused | 1 | – | – | oom |  |  |  |"
    assert alone.endswith("| 2 | nccl | – | 300.0 ± 1.0 | – | – | – |"), "nothing to compare with"


def test_the_page_has_a_place_for_the_table(tmp_path):
    page = tmp_path / "performance.md"
    before = (ROOT / "docs/performance.md").read_text()
    page.write_text(before)
    for table in ("an earlier table\n", "a later table\n"):
        write_between(page, multi_gpu.BEGIN, multi_gpu.END, table)
    after = page.read_text()
    assert "a later table" in after
    assert "an earlier table" not in after
    assert after.partition(multi_gpu.BEGIN)[0] == before.partition(multi_gpu.BEGIN)[0]
    assert after.partition(multi_gpu.END)[2] == before.partition(multi_gpu.END)[2]
    (tmp_path / "other.md").write_text("nothing")
    with pytest.raises(AssertionError, match="lacks the marks"):
        write_between(tmp_path / "other.md", multi_gpu.BEGIN, multi_gpu.END, "table")


@pytest.mark.parametrize("page", ["nothing", None])
def test_a_page_without_a_place_is_named_before_anything_is_measured(tmp_path, capsys, page):
    docs, out = tmp_path / "page.md", tmp_path / "out"
    if page is not None:
        docs.write_text(page)
    with pytest.raises(SystemExit, match="2"):
        multi_gpu.main(["--rehearse", "--out", str(out), "--docs", str(docs)])
    assert f"{docs} has no place for the tables" in capsys.readouterr().err
    assert not out.exists()


PROFILE = [  # two steps; the sums overlap each other, and a product
    ("void gemv<int4>", 0.0, 10.0),
    ("void one_shot_all_reduce_kernel<bf16, 16, 2>", 9.0, 14.0),
    ("ncclDevKernel_AllReduce_Max_i64_RING_LL(...)", 12.0, 16.0),
    ("void gemv<int4>", 20.0, 36.0),
    ("hotloop_parallel::sum", 36.0, 40.0),
]


def test_the_share_of_all_reduce_counts_every_moment_once():
    found = summary(PROFILE, n_steps=2)
    assert found["all_reduce_us"] == pytest.approx((7 + 4) / 2)
    assert found["all_reduce_share"] == pytest.approx(11 / 40)
    assert (found["step_us"], found["all_reduces"]) == (20.0, 1.5)
    assert found["us_by_name"]["void gemv<int4>"] == pytest.approx(13.0)
    assert summary([], 2) == {"failed": "the profiler saw nothing"}


def test_overlapping_intervals_are_counted_once():
    assert covered([]) == 0
    assert covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


JUNIT = """<testsuites><testsuite>
<testcase name="right" />
<testcase name="wrong"><failure message="no">Traceback</failure></testcase>
<testcase name="elsewhere"><skipped message="needs 4 GPUs, found 2" /></testcase>
</testsuite></testsuites>"""


def test_tests_are_ok_if_none_failed_and_some_passed():
    found = results_of(JUNIT)
    assert (found["ok"], found["passed"], list(found["failed"])) == (False, 1, ["wrong"])
    assert found["skipped"] == {"elsewhere": "needs 4 GPUs, found 2"}
    skipped = '<t><testcase name="a"><skipped message="m" /></testcase></t>'
    assert not results_of(skipped)["ok"]
    assert results_of('<t><testcase name="a" /></t>')["ok"]
