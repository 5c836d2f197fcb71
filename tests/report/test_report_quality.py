"""Quality in tables and records: verdicts, floors, details."""

from dataclasses import replace

from hotloop.bench.paired import Flips, compare_answers
from hotloop.bench.record import DepthFigures, GreedyFigures, Record, TaskFigures, Verdict
from hotloop.bench.statistics import answers_figure, mean_figure
from hotloop.report.layout import to_markdown
from hotloop.report.quality import details
from hotloop.report.recommend import recommend
from hotloop.report.table import make_table, to_csv
from hotloop.types import EngineConfig

MODEL = EngineConfig(model="m", execution="eager")


def verdict(worse, better, n, tasks=("arc",)):
    compared = compare_answers([Flips(worse=worse, better=better, n=n)], 0.01)
    return Verdict(**dict(compared), tasks=tasks)


def record(quant="int8", *, speed=10.0, **fields):
    config = replace(MODEL, quant=quant)
    known = {
        "perplexity": mean_figure([20.0, 20.1, 20.2]),
        "delta_ln_ppl": mean_figure([0.001, 0.0011, 0.0012]),
    }
    return Record(
        cell=config.name,
        config=config.to_dict(),
        status="ok",
        started_at="2026-11-30T00:00:00+00:00",
        decode_tok_s=mean_figure([speed, speed + 0.1, speed - 0.1, speed, speed]),
        **known | fields,
    )


def test_a_verdict_has_columns_with_what_a_pass_would_take():
    table = make_table([record(verdict=verdict(3, 2, 200)), record("int4-g64")])
    text = to_markdown(table)
    assert "accuracy lost" in text
    assert "0.5% (at most " in text
    assert "underpowered [1]" in text
    assert "[1] underpowered: needs" in text
    assert "is the share of 200 items of arc" in text


def test_a_pass_that_is_not_significant_after_holms_correction_has_a_note():
    weak = verdict(7, 6, 2500)
    assert weak.outcome == "pass"
    alone = make_table([record(verdict=weak)])
    assert not any("Holm" in note for note in alone.notes)
    others = [record(q, verdict=verdict(30, 20, 2500)) for q in ("int4-g32", "int4-g64", "fp8")]
    borderline = verdict(16, 8, 2500)
    assert borderline.outcome == "pass"
    chosen = make_table([record(verdict=borderline), *others])
    assert any("from 4 configurations" in note and "Holm" in note for note in chosen.notes)


def test_the_reference_and_other_engines_are_no_candidates_of_a_choice():
    borderline = verdict(16, 8, 2500)
    others = [record(q, verdict=verdict(30, 20, 2500)) for q in ("none", "int4-g32", "int4-g64")]
    theirs = [each.model_copy(update={"baseline": "vllm"}) for each in others[1:]]
    table = make_table([record(verdict=borderline), others[0], *theirs])
    assert not any("Holm" in note for note in table.notes)


def test_a_failing_verdict_is_never_recommended():
    fast = record("int4-g64", speed=20.0, verdict=verdict(300, 50, 2000))
    slow = record("int8", speed=10.0, verdict=verdict(5, 5, 2000))
    advice = recommend([fast, slow])
    assert advice.cell == slow.cell
    assert any("12.5% of the tasks' 2000 items" in reason for reason in advice.not_chosen)


def test_few_windows_the_floor_and_tasks_at_chance_are_told():
    guess = TaskFigures(
        task="guess", sha256="0", metric="acc", accuracy=answers_figure([True]), at_chance=True
    )
    said = make_table([record(kl_floor=mean_figure([2e-5, 2e-5]), tasks=(guess,))]).remarks
    assert any(line.startswith("Only 3 windows") for line in said)
    assert any("floor of KL" in line and "2.0e-05" in line for line in said)
    (line,) = [line for line in said if line.startswith("guess: ")]
    assert "the reference is not shown to be better than guessing, so no loss" in line


def test_generated_tokens_that_scoring_would_not_choose_are_told():
    off = GreedyFigures(draft="ngram-4", agreement=mean_figure([0.9, 1.0]), gap_max=0.25)
    exact = off.model_copy(update={"agreement": mean_figure([1.0, 1.0]), "gap_max": 0.0})
    (line,) = [t for t in make_table([record(greedy=off)]).remarks if "greedy answers" in t]
    assert "95.0% of their tokens are the most likely ones" in line
    assert "at most 0.25 nats lower" in line
    assert not any("greedy answers" in t for t in make_table([record(greedy=exact)]).remarks)


def test_details_show_tasks_depths_protocols_and_quantiles():
    task = TaskFigures(
        task="arc",
        sha256="0",
        metric="acc",
        accuracy=answers_figure([True] * 90 + [False] * 10),
        reference_accuracy=0.92,
        compared=compare_answers([Flips(worse=3, better=1, n=100)], 0.0092),
    )
    depth = DepthFigures(start=1, end=1024, perplexity=mean_figure([9.0, 9.0]))
    guess = task.model_copy(update={"task": "guess", "at_chance": True})
    shown = dict(
        details(
            record(
                tasks=(task, guess),
                by_depth=(depth,),
                other_perplexities={"llama.cpp": mean_figure([11.0, 12.0])},
                kl_mean=mean_figure([0.006, 0.007, 0.008]),
                kl_median=0.001,
                kl_p95=0.25,
                kl_max=0.5,
            )
        )
    )
    assert shown["arc"].startswith("90.0% right of 100, reference 92.0%; 3 worse, 1 better")
    assert "McNemar p = 0.62" in shown["arc"]
    assert shown["guess"].endswith("; reference not shown to be better than guessing")
    assert shown["positions 1 to 1,023"] == "ppl 9.000"
    assert shown["ppl (llama.cpp)"].startswith("11.5")
    assert shown["mean KL ± SE"] == "0.0070 ± 0.00058"
    assert shown["KL quantiles"] == "median 0.0010, 95% 0.25, max 0.50"


def test_the_csv_has_the_verdict_in_numbers():
    header, row = to_csv(make_table([record(verdict=verdict(3, 2, 200))])).splitlines()[:2]
    values = dict(zip(header.split(","), row.split(","), strict=False))
    assert values["verdict_outcome"] == "underpowered"
    assert float(values["verdict_loss"]) == 0.005
    assert int(values["verdict_worse"]) == 3
