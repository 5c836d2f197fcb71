"""``hotloop compare``: verdicts are shown by intervals, or not given."""

from __future__ import annotations

import json
import random

import pytest
from report_records import NOISE, drafting, record

from hotloop.bench.record import Record, TaskFigures, Workload
from hotloop.bench.statistics import answers_figure, mean_figure
from hotloop.cli.app import main
from hotloop.errors import ConfigError
from hotloop.report.compare import Comparison, compare, read_set
from hotloop.report.differences import loss_difference, speed_difference
from hotloop.sweep.store import append


def compared(before: list[Record], after: list[Record], slowdown: float = 0.02) -> Comparison:
    return compare(before, after, max_slowdown=slowdown, max_delta_ln_ppl=0.02)


def with_ppl(cell: str, factor: float, *, odd: float = 0.0, **fields) -> Record:
    """A record whose windows all have this factor times the perplexity, but for some noise."""
    windows = [20.0 + 3 * x for x in NOISE]
    samples = [factor * w * (1 + odd * x) for w, x in zip(windows, reversed(NOISE), strict=True)]
    made = record(cell, 100.0, loss=0.0, **fields)
    return made.model_copy(update={"perplexity": mean_figure(samples)})


def answering(right: dict[str, list[bool]], *, chance: float = 0.0, items: str = "") -> Record:
    """A record whose speed is known well, and its answers to tasks."""
    tasks = tuple(
        TaskFigures(
            task=name,
            sha256=name + items,
            metric="acc",
            chance=chance,
            accuracy=answers_figure(answers),
        )
        for name, answers in right.items()
    )
    return record("a/eager", 100.0, tasks=tasks)


def answers(n: int, *, worse: int = 0, better: int = 0) -> list[bool]:
    """Answers to ``n`` items, four in five of them right at first, with these flips."""
    return [i >= worse for i in range(n * 4 // 5)] + [i < better for i in range(n // 5)]


@pytest.mark.parametrize(
    ("tok_s", "spread", "verdict"),
    [
        (100.0, 0.1, "no worse"),
        (130.0, 9.0, "no worse"),
        (99.0, 0.1, "no worse"),  # 1 % slower, with certainty: within the margin
        (95.0, 0.1, "worse"),
        (97.9, 1.0, "undecided"),
        (100.0, 9.0, "undecided"),
    ],
)
def test_a_speed_is_no_worse_worse_or_undecided(tok_s, spread, verdict):
    found = compared([record("a/eager", 100.0)], [record("a/eager", tok_s, spread=spread)])
    assert found.verdict == verdict
    (cell,) = found.cells
    assert ("needed" in cell.quantities[0].why) == (verdict == "undecided")


@pytest.mark.parametrize(
    ("factor", "odd", "verdict"),
    [(1.0, 0.0, "no worse"), (0.9, 0.0, "no worse"), (1.01, 0.001, "no worse"),
     (1.05, 0.001, "worse"), (1.02, 0.05, "undecided")],
)  # fmt: skip
def test_a_quality_is_paired_by_window_of_text(factor, odd, verdict):
    found = compared([with_ppl("a/eager", 1.0)], [with_ppl("a/eager", factor, odd=odd)])
    (cell,) = found.cells
    assert [j.verdict for j in cell.quantities] == ["no worse", verdict]
    assert cell.quantities[1].paired
    assert found.verdict == verdict


@pytest.mark.parametrize(
    ("worse", "better", "verdict"),
    [(0, 0, "no worse"), (20, 22, "no worse"), (400, 100, "worse"), (90, 40, "undecided")],
)
def test_accuracy_is_paired_by_item(worse, better, verdict):
    a = answering({"t": answers(5000)})
    found = compared([a], [answering({"t": answers(5000, worse=worse, better=better)})])
    (cell,) = found.cells
    speed, accuracy = cell.quantities
    assert (speed.verdict, accuracy.verdict, found.verdict) == ("no worse", verdict, verdict)
    assert accuracy.change == (better - worse) / 5000
    assert accuracy.ci95[0] < accuracy.change < accuracy.ci95[1]
    assert accuracy.margin == 0.01 * 0.8
    assert ("items" in accuracy.why) == (verdict == "undecided")
    assert f"{worse} worse and {better} better of 5,000 items of t; McNemar p = " in cell.notes[0]
    said = found.to_dict()["cells"][0]["quantities"][1]
    assert said["answers"]["worse"] == worse
    assert json.loads(json.dumps(said)) == said


def test_the_tolerated_loss_of_accuracy_is_the_users():
    a = answering({"t": answers(5000)})
    b = answering({"t": answers(5000, worse=90, better=40)})
    given = {"max_slowdown": 0.02, "max_delta_ln_ppl": 0.02}
    assert compare([a], [b], **given).verdict == "undecided"
    assert compare([a], [b], **given, max_accuracy_loss=0.03).verdict == "no worse"


def test_accuracy_is_over_all_tasks_of_the_same_items():
    a = answering({"s": answers(500), "t": answers(1000), "only-a": [True]})
    b = answering({"s": answers(500), "t": answers(1000, worse=9, better=4)})
    (cell,) = compared([a], [b]).cells
    assert (cell.quantities[1].answers.n, cell.quantities[1].answers.tasks) == (1500, ("s", "t"))
    assert "the items of only-a differ, so they are left out" in cell.notes


def test_a_task_that_b_did_not_answer_leaves_the_verdict_undecided():
    a = answering({"s": answers(5000), "t": answers(50)})
    found = compared([a], [answering({"s": answers(5000)})])
    assert found.verdict == "undecided"
    assert found.cells[0].quantities[1].why == "B did not answer the same items of t"
    assert compared([answering({"s": answers(5000)})], [a]).verdict == "no worse"
    worse = answering({"s": answers(5000, worse=400, better=100)})
    assert compared([a], [worse]).verdict == "worse"


def test_answers_that_cannot_be_compared_are_undecided_with_the_reason():
    a = answering({"t": answers(1000)})
    guessing = answering({"t": answers(1000)}, chance=0.9)
    for before, after, why in (
        (a, record("a/eager", 100.0), "B answered no tasks"),
        (record("a/eager", 100.0), a, "A answered no tasks"),
        (a, answering({"t": answers(1000)}, items="others"), "they answered different items"),
        (guessing, guessing, "A is not shown to be better than guessing"),
    ):
        found = compared([before], [after])
        assert found.verdict == "undecided"
        assert found.cells[0].quantities[1].why == why
    assert found.cells[0].notes == (
        "t: A is not shown to be better than guessing, so no loss can be shown",
    )


def test_what_cannot_be_compared_is_undecided_with_its_reason():
    one = with_ppl("a/eager", 1.0)
    other_text = one.quality_protocol.model_copy(update={"text_sha256": "y"})
    for changed, why in (
        ({"workload": Workload(prompt_tokens=1, new_tokens=2)}, "the workloads differ"),
        ({"decode_tok_s": mean_figure([100.0])}, "a single repeat has no interval"),
        ({"perplexity": None}, "B was not scored"),
        ({"quality_protocol": other_text}, "different windows"),
        ({"perplexity": mean_figure([20.0, 21.0])}, "too few windows"),
    ):
        found = compared([one], [one.model_copy(update=changed)])
        assert found.verdict == "undecided"
        (cell,) = found.cells
        assert any(why in each.why for each in cell.quantities), why


def test_a_cell_that_was_stopped_while_it_was_scored_is_compared_by_its_speed():
    a = with_ppl("a/eager", 1.0)
    stopped = record("a/eager", 100.0, status="timeout", reason="was in tasks\nlog")
    found = compared([a], [stopped])
    (cell,) = found.cells
    assert [each.verdict for each in cell.quantities] == ["no worse", "undecided"]
    assert cell.notes == ("B ended as timeout: was in tasks",)
    assert found.verdict == "undecided"


def test_records_of_eval_are_compared_without_a_speed():
    untimed = {"workload": None, "decode_tok_s": None}
    good, bad = (with_ppl("a/eager", f).model_copy(update=untimed) for f in (1.0, 1.05))
    for after, verdict in ((good, "no worse"), (bad, "worse")):
        found = compared([good], [after])
        assert [each.quantity for each in found.cells[0].quantities] == ["quality"]
        assert found.verdict == verdict
    unscored = good.model_copy(update={"perplexity": None})
    assert compared([unscored], [unscored]).verdict == "undecided", "nothing is shown"
    assert compared([good], [with_ppl("a/eager", 1.0)]).verdict == "undecided", "A has no speed"
    broken = record("a/eager", status="failed", reason="it crashed", workload=None)
    assert compared([good], [broken]).verdict == "worse"


def test_a_cell_that_no_longer_runs_is_worse_and_one_that_never_did_is_undecided():
    gone = record("a/eager", status="oom", reason="needs 2 GiB\nmore")
    found = compared([record("a/eager", 100.0)], [gone])
    assert found.verdict == "worse"
    assert found.cells[0].quantities[0].why == "B ended as oom: needs 2 GiB"
    assert compared([gone], [gone]).verdict == "undecided"


def test_cells_are_matched_by_configuration_then_by_name_and_the_others_named():
    auto = {"quant": "a", "execution": "auto"}
    before = [record("a/fused", 100.0, config=auto), record("b/eager", 50.0), record("c/eager", 9)]
    after = [record("b/eager", 50.0), record("a/eager", 100.0, config=auto), record("d/eager", 9)]
    found = compared(before, after)
    assert [cell.name for cell in found.cells] == ["a/fused → a/eager", "b/eager"]
    assert found.missing == ("c/eager: only in A", "d/eager: only in B")
    assert found.verdict == "undecided", "B may have lost c/eager"
    assert compared(before[:2], after).verdict == "no worse"
    assert compared([*before, record("e", status="oom")], [*after, before[2]]).verdict == "no worse"
    with pytest.raises(ConfigError, match="no cell in common"):
        compared([before[0], before[2]], [after[0], after[2]])


def test_one_worse_cell_decides_and_one_undecided_cell_leaves_it_open():
    good, slow = record("a/eager", 100.0), record("b/eager", 90.0)
    noisy = record("c/eager", 100.0, spread=9.0)
    base = [good, record("b/eager", 100.0), record("c/eager", 100.0)]
    assert compared(base, [good, slow, noisy]).verdict == "worse"
    assert compared(base, [good, base[1], noisy]).verdict == "undecided"


def test_repeats_with_drafts_are_paired_by_their_prompts_and_others_are_not():
    by_text = [100.0, 140.0, 80.0, 120.0, 60.0]
    drafted = record("a/eager", 1.0, speculation=drafting())
    a = drafted.model_copy(update={"decode_tok_s": mean_figure(by_text)})
    b = drafted.model_copy(update={"decode_tok_s": mean_figure([0.95 * x for x in by_text])})
    assert speed_difference(a, b).paired
    assert compared([a], [b]).verdict == "worse"
    plain = [r.model_copy(update={"speculation": None}) for r in (a, b)]
    assert not speed_difference(*plain).paired
    assert compared(plain[:1], plain[1:]).verdict == "undecided"


def test_an_unstable_figure_and_another_machine_are_noted():
    unstable = record(
        "a/eager", 100.0, status="unstable", reason="it grew", provenance={"device": {"name": "B"}}
    )
    (cell,) = compared([record("a/eager", 100.0)], [unstable]).cells
    assert cell.notes == ("B is unstable: it grew", "different device: A Processor and B")


def test_equal_sets_are_called_worse_no_more_often_than_the_level():
    draw = random.Random(3)

    def measured() -> list[Record]:
        return [
            record(f"{cell}/eager", 1.0).model_copy(
                update={"decode_tok_s": mean_figure([draw.gauss(98.0, 2.0) for _ in range(5)])}
            )
            for cell in "abcd"
        ]

    # B is slower by exactly the margin: the least that is not worse.
    def slower(records: list[Record]) -> list[Record]:
        return [
            r.model_copy(
                update={"decode_tok_s": mean_figure([0.98 * x for x in r.decode_tok_s.samples])}
            )
            for r in records
        ]

    verdicts = [compared(measured(), slower(measured())).verdict for _ in range(400)]
    assert verdicts.count("worse") / 400 <= 0.06
    assert verdicts.count("no worse") / 400 <= 0.06


def test_differences_need_two_samples_above_0():
    one = record("a/eager", 100.0)
    odd = one.model_copy(update={"decode_tok_s": one.decode_tok_s.model_copy(
        update={"samples": (-1.0, 1.0, 1.0, 1.0, 1.0)})})  # fmt: skip
    assert speed_difference(one, odd) is None
    assert loss_difference(one, one) is None


def test_exit_codes_and_json(tmp_path, capsys):
    for name, tok_s, spread in (("a", 100, 0.1), ("slow", 90, 0.1), ("noisy", 100, 9)):
        (tmp_path / name).mkdir()
        append(tmp_path / name / "records.jsonl", record("x/eager", tok_s, spread=spread))
    a, slow, noisy = (str(tmp_path / name) for name in ("a", "slow", "noisy"))
    assert main(["compare", a, a]) == 0
    assert capsys.readouterr().out.endswith("\nB is no worse.\n")
    assert main(["compare", a, slow]) == 1
    assert main(["compare", a, slow, "--max-slowdown", "20%"]) == 0
    assert main(["compare", a, noisy]) == 2
    capsys.readouterr()
    assert main(["compare", f"{a}:x/eager", f"{slow}/records.jsonl:x/eager", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["verdict"] == "worse"
    assert said["cells"][0]["quantities"][0]["quantity"] == "speed"


def test_lost_accuracy_has_an_exit_code_and_a_margin(tmp_path, capsys):
    for name, worse in (("a", 0), ("broken", 80)):
        (tmp_path / name).mkdir()
        made = answering({"t": answers(1000, worse=worse)})
        append(tmp_path / name / "records.jsonl", made)
    a, broken = (str(tmp_path / name) for name in ("a", "broken"))
    assert main(["compare", a, a]) == 0
    assert main(["compare", a, broken]) == 1
    assert "points of accuracy" in capsys.readouterr().out
    assert main(["compare", a, broken, "--max-accuracy-loss", "15%"]) == 0
    assert main(["compare", a, broken, "--max-accuracy-loss", "0"]) == 2
    assert "no number of items rules out a loss of 0" in capsys.readouterr().err


@pytest.mark.parametrize("share", ["100%", "-1%", "nan", "two", "inf"])
def test_a_slowdown_is_a_share(share, tmp_path, capsys):
    append(tmp_path / "records.jsonl", record("x/eager", 1.0))
    assert main(["compare", str(tmp_path), str(tmp_path), f"--max-slowdown={share}"]) == 2
    assert "is not a share" in capsys.readouterr().err


def test_margins_that_mean_nothing_are_refused(tmp_path, capsys):
    append(tmp_path / "records.jsonl", record("x/eager", 1.0))
    for option, problem in (
        ("--max-loss=-1", "is not a loss"),
        ("--max-loss=nan", "is not a loss"),
        ("--max-loss=inf", "is not a loss"),
        ("--max-accuracy-loss=1e-300", "is not a share"),
    ):
        assert main(["compare", str(tmp_path), str(tmp_path), option]) == 2
        assert problem in capsys.readouterr().err


def test_a_cell_is_named_after_a_colon_which_its_name_may_hold_too(tmp_path):
    one, other = record("a/eager", 1.0), record("a/draft=b:int4-4", 1.0, config={"draft": "b"})
    for each in (one, other):
        append(tmp_path / "records.jsonl", each)
    warn = pytest.fail
    assert read_set(f"{tmp_path}:a/draft=b:int4-4", on_problem=warn) == [other]
    assert read_set(str(tmp_path), on_problem=warn) == [one, other]
    with pytest.raises(ConfigError, match=r"has no cell 'c'. Its cells are a/eager, a/draft"):
        read_set(f"{tmp_path}:c", on_problem=warn)
    with pytest.raises(ConfigError, match="no such file"):
        read_set(f"{tmp_path}/gone:c", on_problem=warn)
