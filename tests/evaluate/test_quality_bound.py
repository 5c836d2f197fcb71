"""Quality of an engine that gives the probabilities of a few most likely tokens alone."""

import pytest
import torch

from hotloop.evaluate.quality import measure_quality, write_reference
from hotloop.evaluate.reference import Reference
from hotloop.types import Score

V = 12
WINDOWS = [[1, 5, 3, 2, 9, 11, 0, 4], [2, 2, 7, 8, 1, 6, 10, 3]]


class TopK:
    """Another engine's view of a model: its K most likely tokens."""

    def __init__(self, engine, k):
        self.engine, self.k = engine, k

    def score(self, windows, *, full=False):
        for score in self.engine.score(windows, full=True):
            top = score.log_probs.topk(self.k, dim=-1)
            yield Score(
                token_logprobs=score.token_logprobs,
                top1=score.top1,
                top=(top.indices, top.values) if full else None,
            )


@pytest.fixture
def models(bigram, key_of, tmp_path):
    noise = torch.Generator().manual_seed(3)
    logits_VV = 2 * torch.randn(V, V, generator=noise)
    write_reference(bigram(logits_VV), WINDOWS, tmp_path / "r.safetensors", key_of(WINDOWS, V))
    other = bigram(logits_VV + 0.7 * torch.randn(V, V, generator=noise))
    return other, Reference(tmp_path / "r.safetensors", key_of(WINDOWS, V))


@pytest.mark.parametrize("k", [1, 3, V - 1])
def test_the_bound_of_a_few_tokens_is_below_the_divergence_and_grows_to_it(models, k):
    other, reference = models
    whole = measure_quality(other, WINDOWS, reference=reference)
    partial = measure_quality(TopK(other, k), WINDOWS, reference=reference)
    assert partial.kl_mean is None
    assert partial.kl_max is None
    assert 0 < partial.kl_at_least.mean <= whole.kl_mean.mean * (1 + 1e-6)
    if k == V - 1:  # one token is left: nothing is hidden
        assert partial.kl_at_least.mean == pytest.approx(whole.kl_mean.mean, rel=1e-4)


def test_all_that_needs_no_distribution_is_exact(models):
    other, reference = models
    whole = measure_quality(other, WINDOWS, reference=reference)
    partial = measure_quality(TopK(other, 2), WINDOWS, reference=reference)
    for field in ("perplexity", "delta_ln_ppl", "delta_p", "delta_p_rms", "same_top1"):
        assert getattr(partial, field) == getattr(whole, field), field


def test_the_models_own_top_tokens_have_no_divergence(bigram, key_of, tmp_path):
    engine, key = bigram(torch.randn(V, V, generator=torch.Generator().manual_seed(1))), tmp_path
    reference = write_reference(engine, WINDOWS, key / "r.safetensors", key_of(WINDOWS, V))
    quality = measure_quality(TopK(engine, 3), WINDOWS, reference=reference)
    assert quality.kl_at_least.mean == pytest.approx(0, abs=1e-5)


def test_another_engine_is_compared_with_a_reference_of_any_element_type(models, tmp_path):
    _, reference = models
    key = reference.key.model_copy(update={"dtype": None})
    opened = Reference(tmp_path / "r.safetensors", key)
    assert opened.key == reference.key
