import math

import numpy as np
import pytest
import scipy.stats

from hotloop.bench.statistics import (
    mean_figure,
    positive_mean_figure,
    share_figure,
    t_critical,
)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 9, 30, 99, 1000])
def test_t_critical_is_scipys(df, confidence):
    expected = scipy.stats.t.ppf((1 + confidence) / 2, df)
    assert t_critical(df, confidence=confidence) == pytest.approx(expected, rel=1e-9)


def test_figure_is_scipys_t_interval():
    samples = [10.1, 9.7, 10.4, 9.9, 12.0]
    figure = mean_figure(samples)
    low, high = scipy.stats.t.interval(
        0.95, 4, loc=np.mean(samples), scale=scipy.stats.sem(samples)
    )
    assert figure.mean == pytest.approx(np.mean(samples))
    assert figure.se == pytest.approx(scipy.stats.sem(samples))
    assert figure.ci95 == pytest.approx((low, high))
    assert (figure.n, figure.samples) == (5, tuple(samples))


def test_a_single_sample_claims_no_certainty():
    figure = mean_figure([3.0])
    assert (figure.mean, figure.ci95, figure.se, figure.n) == (3.0, None, None, 1)


def test_interval_is_cut_to_the_values_that_are_possible():
    assert mean_figure([0.99, 1.0, 1.0], within=(0, 1)).ci95[1] == 1.0


@pytest.mark.parametrize("n", [2, 5])
def test_interval_covers_the_truth_95_times_in_100(n):
    draws = np.random.default_rng(0).normal(7, 2, size=(2000, n))
    intervals = [mean_figure(row).ci95 for row in draws.tolist()]
    covered = np.mean([low <= 7 <= high for low, high in intervals])
    assert covered == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 2000))


def test_interval_over_windows_covers_where_one_over_tokens_would_not():
    rng = np.random.default_rng(1)
    n_runs, n_windows, n_tokens = 1500, 8, 50
    # Tokens of a window share its difficulty, as real ones do.
    shared = rng.normal(0, 1, size=(n_runs, n_windows, 1))
    nll = 3 + shared + rng.normal(0, 1, size=(n_runs, n_windows, n_tokens))

    def coverage(samples_per_run):
        intervals = [mean_figure(row).ci95 for row in samples_per_run.tolist()]
        return np.mean([low <= 3 <= high for low, high in intervals])

    assert coverage(nll.mean(axis=2)) == pytest.approx(0.95, abs=0.017)
    assert coverage(nll[:100].reshape(100, -1)) < 0.5


def share_covered(clusters_known: bool) -> float:
    """How often the 95 % interval holds the mean of texts whose articles differ, as windows do."""
    random, covered, n = np.random.default_rng(5), 0, 600
    for _ in range(n):
        sizes = random.integers(1, 9, size=24).tolist()
        of_articles = np.repeat(random.normal(0, 1, len(sizes)), sizes)
        samples = 3 + of_articles + random.normal(0, 1, sum(sizes))
        figure = mean_figure(samples.tolist(), clusters=sizes if clusters_known else None)
        covered += figure.ci95[0] <= 3 <= figure.ci95[1]
    return covered / n


def test_intervals_that_are_clustered_by_article_hold_the_mean_95_times_in_100():
    assert share_covered(clusters_known=True) == pytest.approx(0.945, abs=0.02)
    assert share_covered(clusters_known=False) < 0.85


@pytest.mark.parametrize("make", [mean_figure, positive_mean_figure])
def test_clusters_change_the_interval_and_neither_mean_nor_samples(make):
    samples = [1.0, 1.2, 3.0, 3.1, 2.9, 0.4]
    plain, clustered = make(samples), make(samples, clusters=[2, 3, 1])
    assert clustered.mean == pytest.approx(plain.mean)
    assert (clustered.n, clustered.samples) == (plain.n, plain.samples)
    residuals = np.array([2.2, 9.0, 0.4]) - np.array([2, 3, 1]) * np.mean(samples)
    assert clustered.se == pytest.approx(math.sqrt(3 / 2 * (residuals**2).sum()) / 6)
    assert make(samples, clusters=[1] * 6) == plain


def test_shares_are_clustered_likewise():
    won, of = [3, 4, 9, 9], [10, 10, 10, 10]
    plain, clustered = share_figure(won, of), share_figure(won, of, clusters=[2, 2])
    assert (clustered.mean, clustered.samples) == (plain.mean, plain.samples)
    assert clustered.ci95[0] < plain.ci95[0] < plain.mean < plain.ci95[1] < clustered.ci95[1]
