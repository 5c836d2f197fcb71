"""Paired accuracy: the published limits, the three outcomes, and how often they are wrong."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from hotloop.bench.paired import (
    Flips,
    compare_answers,
    holm,
    items_for_power,
    mcnemar_p,
    needed_items,
    score_limits,
    score_statistic,
)


def test_mcnemars_exact_test_is_the_published_one_and_scipys():
    assert mcnemar_p(28, 12) == pytest.approx(0.0166, abs=5e-5)
    assert mcnemar_p(0, 0) == mcnemar_p(3, 3) == 1.0
    for worse, better in ((0, 6), (7, 2), (100, 140)):
        expected = scipy.stats.binomtest(worse, worse + better).pvalue
        assert mcnemar_p(worse, better) == mcnemar_p(better, worse) == pytest.approx(expected)


def test_tangos_upper_limit_is_the_published_one():
    _, upper = score_limits([Flips(worse=28, better=12, n=1000)])
    assert upper == pytest.approx(0.0271, abs=5e-5)
    lower, upper = score_limits([Flips(worse=0, better=0, n=500)])
    assert upper == pytest.approx(0.0054, abs=5e-5)
    assert lower == pytest.approx(-upper)


def test_limits_are_mirrored_where_the_two_models_are_exchanged():
    low, high = score_limits([Flips(worse=28, better=12, n=1000)])
    mirrored = score_limits([Flips(worse=12, better=28, n=1000)])
    assert mirrored == pytest.approx((-high, -low))


def test_the_statistic_is_that_of_the_restricted_maximum_of_the_likelihood():
    flips, loss = Flips(worse=9, better=4, n=120), 0.03

    def minus_log_likelihood(q):
        p, rest = q + loss, 120 - 13
        return -(9 * math.log(p) + 4 * math.log(q) + rest * math.log(1 - p - q))

    q = scipy.optimize.minimize_scalar(
        minus_log_likelihood, bounds=(1e-9, 0.4), method="bounded", options={"xatol": 1e-12}
    ).x
    expected = (5 - 120 * loss) / math.sqrt(120 * (2 * q + loss - loss**2))
    assert score_statistic([flips], loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("rate", "n"), [(0.02, 1237), (0.05, 3092), (0.10, 6183)], ids=["2 %", "5 %", "10 %"]
)
def test_the_items_that_80_percent_power_needs(rate, n):
    assert items_for_power(rate, 0.01) == n


def test_the_items_that_are_said_to_be_needed_do_pass_four_times_in_five():
    generator, margin, rate = np.random.default_rng(0), 0.01, 0.05
    n = items_for_power(rate, margin)
    differing = generator.binomial(n, rate, 300)
    worse = generator.binomial(differing, 0.5)
    passed = [
        score_limits([Flips(worse=int(w), better=int(d - w), n=n)])[1] < margin
        for w, d in zip(worse, differing, strict=True)
    ]
    assert np.mean(passed) == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize(
    ("worse", "better", "n", "outcome"),
    [
        (20, 22, 5000, "pass"),
        (400, 100, 5000, "fail"),
        (3, 2, 100, "underpowered"),
        (0, 0, 100, "underpowered"),
        (0, 0, 300, "pass"),
    ],
)
def test_an_outcome_follows_from_both_limits(worse, better, n, outcome):
    result = compare_answers([Flips(worse=worse, better=better, n=n)], margin=0.01)
    lower, upper = result.limits
    assert result.outcome == outcome
    assert result.loss == (worse - better) / n
    assert (upper < 0.01, lower > 0.01) == (outcome == "pass", outcome == "fail")
    assert (result.p < 0.05) == (outcome == "pass"), "the p-value and the limit agree"
    assert (result.needed is not None) == (outcome == "underpowered")


def test_needed_items_are_more_than_there_are_or_not_said():
    assert needed_items(Flips(worse=0, better=0, n=100), 0.01) == 268
    assert needed_items(Flips(worse=5, better=5, n=1000), 0.01) > 600
    small_loss = Flips(worse=70, better=30, n=8000)
    assert needed_items(small_loss, 0.01) > 8000 or needed_items(small_loss, 0.01) is None
    assert needed_items(Flips(worse=120, better=10, n=10000), 0.01) is None


def test_one_stratum_is_tangos_test_and_two_alike_are_one_of_both():
    one = Flips(worse=28, better=12, n=1000)
    both = Flips(worse=56, better=24, n=2000)
    assert score_limits([one, one]) == pytest.approx(score_limits([both]))


def test_strata_that_differ_more_often_do_not_hide_in_the_sum():
    easy, hard = Flips(worse=0, better=0, n=5000), Flips(worse=90, better=40, n=500)
    pooled = compare_answers([easy, hard], margin=0.01)
    assert pooled.n == 5500
    assert pooled.loss == 50 / 5500
    assert pooled.mcnemar_p == mcnemar_p(90, 40)
    lower, upper = pooled.limits
    assert lower < pooled.loss < upper


def simulated(rate_of, loss, n_items, runs):
    """Flips of ``runs`` comparisons over two tasks, in which accuracy drops by ``loss``."""
    generator = np.random.default_rng(23)
    for _ in range(runs):
        strata = []
        for n, rate in zip(n_items, rate_of, strict=True):
            worse, better, _ = generator.multinomial(
                n, [(rate + loss) / 2, (rate - loss) / 2, 1 - rate]
            )
            strata.append(Flips(worse=int(worse), better=int(better), n=n))
        yield strata


def test_a_thousand_comparisons_of_a_model_with_itself_alarm_no_more_than_they_may():
    """Items flip either way alike, at the rates of two tasks, as between equal models."""
    failed = differs = 0
    for strata in simulated((0.03, 0.08), 0.0, (800, 500), 1000):
        lower, _ = score_limits(strata)
        failed += lower > 0.005
        differs += mcnemar_p(*(sum(getattr(s, w) for s in strata) for w in ("worse", "better"))) < (
            0.05
        )
    assert failed <= 50
    assert differs <= 50


def test_a_loss_of_the_margin_passes_no_more_than_one_time_in_twenty():
    passed = sum(
        score_limits(strata)[1] < 0.01 for strata in simulated((0.04, 0.09), 0.01, (900, 600), 1000)
    )
    assert 25 <= passed <= 65, "nominal 50, by a score test that is neither loose nor useless"


def test_stored_answers_reshuffled_between_the_models_alarm_no_more_than_they_may():
    """The A/A test of a user's own items: each difference could as well be the other way round."""
    generator = np.random.default_rng(5)
    reference = generator.random(600) < 0.6
    tested = np.where(generator.random(600) < 0.07, ~reference, reference)
    alarms = 0
    for _ in range(1000):
        swap = generator.random(600) < 0.5
        flips = Flips.of(
            np.where(swap, tested, reference).tolist(), np.where(swap, reference, tested).tolist()
        )
        alarms += mcnemar_p(flips.worse, flips.better) < 0.05
    assert alarms <= 50


def test_holm_adjusts_for_choosing_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_flips_are_counted_by_item():
    flips = Flips.of([True, True, False, False, True], [True, False, True, False, False])
    assert flips == Flips(worse=2, better=1, n=5)
    with pytest.raises(ValueError, match="zip"):
        Flips.of([True], [True, False])
