"""Why drafts paid or not: break-even, the best number of drafts, and the curve."""

from __future__ import annotations

import math

import pytest
from report_records import NOISE, drafting, record

from hotloop.bench.record import Record, StepCost
from hotloop.bench.statistics import mean_figure
from hotloop.report.context import RANDOM_ACCEPTANCE
from hotloop.report.html import to_html
from hotloop.report.layout import to_markdown
from hotloop.report.plots import speculation_plot
from hotloop.report.published import make_published_tables
from hotloop.report.recommend import recommend
from hotloop.report.speculation import Drafting, details, expected_tokens
from hotloop.report.speculation import drafting as collect
from hotloop.report.table import make_table


def costs(*steps: tuple[int, float, float]) -> tuple[StepCost, ...]:
    return tuple(
        StepCost(k=k, n_steps=9, draft_s=draft_s, verify_s=verify_s)
        for k, draft_s, verify_s in steps
    )


PLAIN = record("int8/eager", 100.0)
STEPS = costs((0, 0.0, 0.010), (1, 0.002, 0.010), (4, 0.008, 0.012))


def drafted(**figures: object) -> Record:
    figures = {"acceptance": (0.8, 0.64, 0.51, 0.41), "costs": STEPS} | figures
    config = {**PLAIN.config, "draft": "ngram"}
    return record("int8/eager/draft=ngram-4", 150.0, config=config, speculation=drafting(**figures))


def one(*records: Record) -> Drafting:
    (found,) = collect(records)
    return found


def test_a_step_yields_a_token_and_its_accepted_drafts():
    assert expected_tokens(0.0, 4) == 1
    assert expected_tokens(1.0, 4) == 5
    assert expected_tokens(0.5, 2) == 1.75


def test_break_even_is_where_the_tokens_of_a_step_make_up_for_its_time():
    cell = one(drafted())
    assert cell.break_even_of(1) == pytest.approx(0.2)  # 1 + p = 12 / 10
    p = cell.break_even_of(4)
    assert expected_tokens(p, 4) == pytest.approx(2.0)  # 20 / 10
    assert cell.break_even == (cell.break_even_of(1), 1)
    assert cell.gain_at(0.2) == pytest.approx(1.0)


def test_drafts_that_cost_more_than_they_can_yield_never_pay_and_free_ones_always_do():
    never = one(drafted(costs=costs((0, 0.0, 0.010), (1, 0.02, 0.011))))
    assert never.break_even is None
    assert "drafting pays at no acceptance" in never.explanation
    free = one(drafted(costs=costs((0, 0.0, 0.010), (2, 0.0, 0.010))))
    assert free.break_even == (0.0, 2)
    assert "drafting costs nothing" in free.explanation


@pytest.mark.parametrize(
    ("acceptance", "best"),
    [((0.8, 0.64, 0.51, 0.41), 4), ((0.3, 0.09, 0.03, 0.01), 1), ((0.1, 0.01, 0.0, 0.0), 0),
     ((0.3, None, None, None), 1), ((None,), None), ((), None)],
)  # fmt: skip
def test_the_best_number_of_drafts_at_what_was_seen(acceptance, best):
    assert one(drafted(acceptance=acceptance)).best_measured == best


def test_the_speed_at_each_acceptance_is_that_of_the_best_number_of_drafts():
    cell = one(drafted())
    for shown, p in zip(cell.speed_texts, (0.6, 0.7, 0.8, 0.9, 0.95), strict=True):
        speeds = {k: expected_tokens(p, k) / seconds for k, seconds in ((1, 0.012), (4, 0.020))}
        k = max(speeds, key=speeds.get)
        assert shown == f"{speeds[k]:.0f} ({k})"


def test_one_record_says_why_its_drafts_pay_or_not():
    shown = dict(details(drafted()))
    assert shown["drafting"] == one(drafted()).explanation
    times, speeds = shown["ms to draft + verify"], shown["tok/s (drafts)"]
    assert times == "by number of drafts, 0: 0 + 10.0; 1: 2.00 + 10.0; 4: 8.00 + 12.0"
    assert speeds.startswith("by acceptance, 60%: 133 (1), ")
    assert speeds.endswith(", 95%: 226 (4); 100 without drafts")
    assert details(PLAIN) == details(drafted(costs=())) == []


def test_the_gain_is_over_the_same_cell_without_drafts():
    cell = one(PLAIN, drafted())
    assert cell.plain == PLAIN
    assert math.exp(cell.gain.mean) == pytest.approx(1.5, rel=1e-4)
    curve = speculation_plot([PLAIN, drafted()])
    line, mark = curve.series
    assert [(p.x, p.y) for p in line.points][10] == (0.2, pytest.approx(1.0))
    assert (mark.points[0].x, mark.points[0].y) == (0.8, pytest.approx(1.5, rel=1e-4))


@pytest.mark.parametrize("unstable", ["neither", "plain", "drafted"])
def test_a_gain_with_an_unstable_speed_says_so(unstable):
    shaky = {"status": "unstable"}
    plain = PLAIN.model_copy(update=shaky if unstable == "plain" else {})
    with_drafts = drafted().model_copy(update=shaky if unstable == "drafted" else {})
    gain = one(plain, with_drafts).gain_text
    assert gain.endswith(" (unstable)") == (unstable != "neither")


def test_old_records_without_step_times_have_no_curve_and_stay_rows():
    old = drafted(costs=())
    assert speculation_plot([PLAIN, old]) is None
    assert one(old).explanation == "step times were not recorded"
    assert "step times were not recorded" in to_html([PLAIN, old])
    partly = drafted(costs=STEPS[1:])
    assert speculation_plot([PLAIN, partly]) is None


def test_an_assumed_acceptance_is_named_in_every_table_and_never_recommended():
    config = {**PLAIN.config, "weights": "random", "draft": "ngram", "assume_acceptance": 0.8}
    assumed = record(
        "int8/eager/draft=ngram-4-assumed0.8",
        300.0,
        config=config,
        speculation=drafting(costs=STEPS, assumed_acceptance=0.8),
    )
    plain = PLAIN.model_copy(update={"config": {**PLAIN.config, "weights": "random"}})
    records = [plain, assumed]
    assert recommend(records).cell == "int8/eager"
    alone = recommend([assumed])
    assert alone.cell is None
    assert "every measured configuration has an assumed acceptance" in alone.why
    table, (published,) = make_table(records), make_published_tables(records)
    for each in (table, published):
        text = to_markdown(each)
        assert "Assumed acceptance: each draft was accepted with probability 0.8," in text
        assert "assumed0.8" in text
        assert RANDOM_ACCEPTANCE not in text
    html = to_html(records)
    assert "(assumed: 80% of each)" in html
    assert "the assumed acceptance of first drafts is" in html


def test_a_batch_of_samples_of_drafted_speed_keeps_the_html_page_whole():
    many = [
        drafted().model_copy(
            update={
                "cell": f"int8/eager/draft=ngram-{k}",
                "config": {**PLAIN.config, "draft": "ngram", "draft_tokens": k},
                "decode_tok_s": mean_figure([100.0 * k + x for x in NOISE]),
            }
        )
        for k in range(1, 9)
    ]
    assert to_html([PLAIN, *many]).count("When speculation pays") >= 3
