"""Intervals of shares and of skewed means, against published values and simulation."""

import math
import random

import numpy as np
import pytest

from hotloop.bench.statistics import (
    answers_figure,
    clustered_mean_figure,
    mean_figure,
    positive_mean_figure,
    share_figure,
    wilson_interval,
)


def test_wilsons_interval_is_the_published_one():
    assert wilson_interval(0.949, 1000) == pytest.approx((0.9336, 0.9610), abs=5e-5)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=5e-5)


def test_clusters_that_differ_more_than_chance_widen_the_interval():
    alike = share_figure([90] * 20, [100] * 20)
    apart = share_figure([80, 100] * 10, [100] * 20)
    assert apart.mean == pytest.approx(alike.mean)
    low, high = alike.ci95
    assert apart.ci95[0] < low < 0.9 < high < apart.ci95[1]
    assert alike.ci95 == pytest.approx(wilson_interval(0.9, 2000, critical=2.093), abs=1e-4)


def test_the_interval_covers_a_correlated_share_as_often_as_it_says():
    seeded = random.Random(0)
    covered, runs, share = 0, 400, 0.95
    for _ in range(runs):
        clusters = [seeded.betavariate(share * 40, (1 - share) * 40) for _ in range(12)]
        successes = [sum(seeded.random() < p for _ in range(60)) for p in clusters]
        low, high = share_figure(successes, [60] * len(clusters)).ci95
        covered += low <= share <= high
    assert 0.92 <= covered / runs <= 0.99


def test_a_skewed_mean_has_an_interval_of_its_logarithm():
    samples = [0.001, 0.002, 0.004, 0.016]
    figure = positive_mean_figure(samples)
    low, high = figure.ci95
    mean, se = np.mean(samples), np.std(samples, ddof=1) / 2
    assert figure.mean == pytest.approx(mean)
    assert math.sqrt(low * high) == pytest.approx(mean)
    assert math.log(high / mean) == pytest.approx(3.182 * se / mean, rel=1e-3)


@pytest.mark.parametrize("samples", [[0.0, 0.0], [-1e-9, 1e-9], [1e-300, 1.0]])
def test_means_at_zero_and_wild_ones_have_finite_intervals(samples):
    low, high = positive_mean_figure(samples).ci95
    assert 0 <= low <= high < 1e30


def test_a_single_cluster_has_no_interval():
    assert share_figure([5], [10]).ci95 is None
    assert positive_mean_figure([0.5]).ci95 is None


def test_means_of_unequal_clusters_have_the_standard_error_of_a_ratio_of_sums():
    generator = np.random.default_rng(1)
    clusters = [generator.normal(2, 1, size) + generator.normal() for size in (3, 40, 7, 12, 90)]
    sums, sizes = [c.sum() for c in clusters], [len(c) for c in clusters]
    figure = clustered_mean_figure(sums, sizes)
    every = np.concatenate(clusters)
    residuals = [(c - every.mean()).sum() for c in clusters]
    expected = math.sqrt(5 / 4 * np.square(residuals).sum()) / len(every)
    assert figure.mean == pytest.approx(every.mean())
    assert figure.se == pytest.approx(expected)
    low, high = figure.ci95
    assert high - low == pytest.approx(2 * 2.7764 * expected, rel=1e-4)
    assert figure.samples == pytest.approx([c.mean() for c in clusters])


def test_equal_clusters_have_the_standard_error_of_their_means():
    clusters = np.random.default_rng(2).random((6, 11))
    figure = clustered_mean_figure(clusters.sum(axis=1).tolist(), [11] * 6)
    assert figure.se == pytest.approx(mean_figure(clusters.mean(axis=1).tolist()).se)


def test_shares_of_unequal_clusters_count_trials_and_not_clusters():
    figure = share_figure([9, 40], [10, 100])
    assert figure.mean == pytest.approx(49 / 110)
    assert figure.samples == pytest.approx((0.9, 0.4))


def test_answers_have_wilsons_interval_and_keep_every_item():
    figure = answers_figure([True] * 949 + [False] * 51)
    assert figure.ci95 == pytest.approx((0.9336, 0.9610), abs=5e-5)
    assert sum(figure.samples) == 949
