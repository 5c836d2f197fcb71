import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from hotloop.errors import ConfigError, HotloopError
from hotloop.evaluate import quality as quality_module
from hotloop.evaluate.quality import kl_divergence, measure_quality, write_reference
from hotloop.evaluate.reference import MAX_FLOOR_WINDOWS

V, N, T = 64, 6, 40
QUANTILES = {"kl_median": 0.5, "kl_p90": 0.9, "kl_p95": 0.95, "kl_p99": 0.99, "kl_p99_9": 0.999}


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def windows():
    return torch.randint(V, (N, T), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture
def logits():
    return 2 * randn(V, V, seed=1)


@pytest.fixture
def compare(tmp_path, bigram, windows, logits, key_of):
    """Quality of a model with the given logits against one with the fixture's."""

    def against_reference(changed):
        key = key_of(windows, V)
        reference = write_reference(bigram(logits), windows, tmp_path / "ref", key)
        return measure_quality(bigram(changed), windows, reference=reference)

    return against_reference


def test_perplexity_of_a_uniform_model_is_the_vocabulary(bigram, windows):
    quality = measure_quality(bigram(torch.zeros(V, V)), windows)
    assert quality.perplexity.mean == pytest.approx(V, rel=1e-6)
    assert quality.perplexity.se == pytest.approx(0, abs=1e-6)
    assert quality.kl_mean is quality.delta_ln_ppl is quality.same_top1 is None


def test_perplexity_and_its_uncertainty_are_clustered_by_window(bigram, windows, logits):
    engine = bigram(logits)
    nll = [-s.token_logprobs.double().mean().item() for s in engine.score(windows)]
    figure = measure_quality(engine, windows).perplexity
    assert figure.mean == pytest.approx(math.exp(np.mean(nll)))
    assert figure.se == pytest.approx(figure.mean * scipy.stats.sem(nll))
    low, high = scipy.stats.t.interval(0.95, N - 1, np.mean(nll), scipy.stats.sem(nll))
    assert figure.ci95 == pytest.approx((math.exp(low), math.exp(high)))
    assert scipy.stats.gmean(figure.samples) == pytest.approx(figure.mean)
    assert figure.n == N


def test_differences_are_paired_by_window(bigram, windows, logits, compare):
    changed = logits + 0.3 * randn(V, V, seed=2)
    delta = compare(changed).delta_ln_ppl

    def nll(engine):
        return np.array([-s.token_logprobs.double().mean().item() for s in engine.score(windows)])

    differences = nll(bigram(changed)) - nll(bigram(logits))
    assert delta.samples == pytest.approx(differences.tolist())
    assert delta.mean == pytest.approx(differences.mean())
    assert delta.se == pytest.approx(scipy.stats.sem(differences))
    unpaired = math.hypot(
        scipy.stats.sem(nll(bigram(changed))), scipy.stats.sem(nll(bigram(logits)))
    )
    assert delta.se < unpaired / 2


def test_divergence_and_agreement_match_scipy(bigram, windows, logits, compare):
    changed = logits + 0.3 * randn(V, V, seed=2)
    quality = compare(changed)
    p, q = bigram(logits).log_probs_VV.exp().numpy(), bigram(changed).log_probs_VV.exp().numpy()
    kl_by_token = scipy.special.rel_entr(p, q).sum(axis=1)
    given = np.array(windows)[:, :-1]
    kl = kl_by_token[given]
    assert quality.kl_mean.mean == pytest.approx(kl.mean(), rel=1e-3)
    assert quality.kl_mean.samples == pytest.approx(kl.mean(axis=1).tolist(), rel=1e-3)
    for name, share in QUANTILES.items():
        assert getattr(quality, name) == pytest.approx(np.quantile(kl, share), rel=1e-3)
    assert quality.kl_max == pytest.approx(kl.max(), rel=1e-3)
    same = (p.argmax(axis=1) == q.argmax(axis=1))[given]
    assert quality.same_top1.mean == pytest.approx(same.mean())
    assert quality.same_top1.samples == pytest.approx(same.mean(axis=1).tolist())


def test_changes_of_the_texts_tokens_probabilities_are_those_of_both_models(
    bigram, windows, logits, compare
):
    changed = logits + 0.3 * randn(V, V, seed=2)
    quality = compare(changed)

    def p(engine):
        return np.array([s.token_logprobs.double().exp().numpy() for s in engine.score(windows)])

    delta = p(bigram(changed)) - p(bigram(logits))
    assert quality.delta_p.samples == pytest.approx(delta.mean(axis=1).tolist(), abs=1e-6)
    assert quality.delta_p_rms == pytest.approx(math.sqrt((delta**2).mean()), rel=1e-4)


def test_a_model_compared_with_itself_shows_nothing(logits, compare):
    quality = compare(logits)
    assert quality.delta_ln_ppl.samples == (0.0,) * N
    assert abs(quality.kl_max) < 1e-6
    assert quality.same_top1.mean == 1.0
    assert quality.same_top1.ci95 == pytest.approx((0.97, 1.0), abs=0.01), "trials are finite"
    assert quality.delta_p.samples == (0.0,) * N
    assert quality.delta_p_rms == 0


def test_divergence_is_the_closed_form_and_has_a_direction():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    backward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert kl_divergence(p.log(), q.log()).item() == pytest.approx(forward, rel=1e-6)
    assert kl_divergence(q.log(), p.log()).item() == pytest.approx(backward, rel=1e-6)


def test_divergence_does_not_depend_on_a_rows_constant():
    log_p, log_q = randn(3, 50, seed=4).log_softmax(-1), randn(3, 50, seed=5).log_softmax(-1)
    torch.testing.assert_close(
        kl_divergence(log_p + 0.7, log_q - 1.3), kl_divergence(log_p, log_q), rtol=1e-5, atol=1e-6
    )


def test_divergence_counts_impossible_tokens_as_nothing_and_missed_ones_as_infinite():
    half, sure = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()
    assert kl_divergence(sure, sure).item() == 0
    assert kl_divergence(sure, half).item() == pytest.approx(math.log(2))
    assert kl_divergence(half, sure).item() == math.inf


def test_only_one_windows_distributions_are_held_at_a_time(
    tmp_path, bigram, windows, logits, key_of
):
    engine = bigram(logits)
    reference = write_reference(engine, windows, tmp_path / "ref", key_of(windows, V))
    measure_quality(engine, windows, reference=reference)
    assert engine.alive == [0] * (2 * N + MAX_FLOOR_WINDOWS)


def test_progress_is_told_after_each_window(bigram, windows):
    told = []
    measure_quality(
        bigram(torch.zeros(V, V)), windows, on_window=lambda *progress: told.append(progress)
    )
    assert told == [(i, N) for i in range(1, N + 1)]


def test_a_reference_of_other_tokens_is_refused(tmp_path, bigram, windows, logits, key_of):
    engine = bigram(logits)
    reference = write_reference(engine, windows, tmp_path / "ref", key_of(windows, V))
    others = [windows[0][::-1], *windows[1:]]
    with pytest.raises(ConfigError, match="scored on other tokens"):
        measure_quality(engine, others, reference=reference)


def test_overflow_is_an_error_and_not_a_figure(bigram, windows, logits, compare):
    nan = logits.clone()
    nan[windows[2][0]] = math.nan
    with pytest.raises(HotloopError, match=r"log-probabilities in window \d are infinite or not"):
        measure_quality(bigram(nan), windows)
    unseen = next(t for t in range(V) if all(t not in window for window in [windows[0]]))
    impossible = logits.clone()
    impossible[:, unseen] = -math.inf
    with pytest.raises(HotloopError, match=f"{T - 1} of {T - 1} divergences in window 1"):
        compare(impossible)


@pytest.mark.parametrize("ragged", [[], [[1, 2, 3], [1, 2]], [[1], [2]]])
def test_windows_of_unequal_length_are_refused(bigram, ragged):
    with pytest.raises(ConfigError, match="windows of one length"):
        measure_quality(bigram(torch.zeros(V, V)), ragged)


def test_predictions_so_broken_that_no_perplexity_holds_them_are_an_error(bigram):
    logits = torch.full((4, 4), -1000.0).fill_diagonal_(0.0)
    with pytest.raises(HotloopError, match=r"perplexity of a window is exp\(\d+\)"):
        measure_quality(bigram(logits), [[0, 1, 2, 3], [3, 2, 1, 0]])


def test_the_floor_is_the_references_divergence_from_itself_scored_again(
    tmp_path, bigram, windows, logits, key_of
):
    class Drifts(bigram):
        """Rounds otherwise in windows of another length."""

        def _score(self, window, full):
            table, changed = self.log_probs_VV, logits + 0.05 * randn(V, V, seed=7)
            if len(window) < T:
                self.log_probs_VV = torch.log_softmax(changed.double(), dim=-1)
            score = super()._score(window, full)
            self.log_probs_VV = table
            return score

    exact = write_reference(bigram(logits), windows, tmp_path / "a", key_of(windows, V))
    assert exact.floor.abs().max() < 1e-6
    drifting = write_reference(Drifts(logits), windows, tmp_path / "b", key_of(windows, V))
    quality = measure_quality(bigram(logits), windows, reference=drifting)
    assert quality.kl_floor.mean == pytest.approx(drifting.floor.mean().item(), rel=1e-5)
    assert quality.kl_floor.mean > 1e-4 > abs(quality.kl_max)
    assert quality.kl_floor.n == MAX_FLOOR_WINDOWS


def test_long_windows_have_the_same_figures_by_depth(
    monkeypatch, tmp_path, bigram, windows, logits, key_of
):
    monkeypatch.setattr(quality_module, "DEPTHS", (8, 30, 1000))
    reference = write_reference(bigram(logits), windows, tmp_path / "ref", key_of(windows, V))
    changed = bigram(logits + 0.3 * randn(V, V, seed=2))
    quality = measure_quality(changed, windows, reference=reference)
    assert [(d.start, d.end) for d in quality.by_depth] == [(1, 8), (8, 30), (30, T)]
    sizes = [d.end - d.start for d in quality.by_depth]
    for name in ("delta_ln_ppl", "kl_mean", "same_top1"):
        parts = [getattr(d, name).mean for d in quality.by_depth]
        assert np.average(parts, weights=sizes) == pytest.approx(getattr(quality, name).mean)
    nll = [math.log(d.perplexity.mean) for d in quality.by_depth]
    assert np.average(nll, weights=sizes) == pytest.approx(math.log(quality.perplexity.mean))


def test_depths_are_1024_8192_and_32768_positions(bigram, logits):
    for size, parts in ((1024, []), (1100, [(1, 1024), (1024, 1100)])):
        windows = torch.randint(V, (2, size), generator=torch.Generator().manual_seed(0)).tolist()
        found = measure_quality(bigram(logits), windows).by_depth
        assert [(d.start, d.end) for d in found] == parts
    assert quality_module.DEPTHS[1:] == (8192, 32768)


def test_short_windows_have_no_figures_by_depth(bigram, windows, logits):
    assert measure_quality(bigram(logits), windows).by_depth == ()
