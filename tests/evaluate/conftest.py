import weakref

import pytest
import torch

from hotloop.evaluate.reference import ReferenceKey
from hotloop.types import EngineConfig, EngineDescription, Score


class BigramEngine:
    """A model that predicts the next token from a table of logits [V, V], by the last token.

    ``alive`` counts, at each score made, the earlier distributions somebody still holds.
    """

    def __init__(self, logits_VV):
        self.log_probs_VV = torch.log_softmax(logits_VV.double(), dim=-1)
        self.alive, self._made = [], []

    def score(self, windows, *, full=False):
        for window in windows:
            self.alive.append(sum(made() is not None for made in self._made))
            yield self._score(window, full)

    def _score(self, window, full):
        given, predicted = torch.tensor(window[:-1]), torch.tensor(window[1:])
        log_probs_TV = self.log_probs_VV[given].float()
        self._made.append(weakref.ref(log_probs_TV))
        return Score(
            token_logprobs=log_probs_TV.gather(1, predicted[:, None]).squeeze(1),
            top1=log_probs_TV.argmax(dim=-1),
            log_probs=log_probs_TV if full else None,
        )

    def generate(self, prompts, params):
        raise NotImplementedError

    def encode(self, text):
        raise NotImplementedError

    def describe(self):
        V = len(self.log_probs_VV)
        return EngineDescription(
            config=EngineConfig(model="bigram"),
            family="bigram",
            device="cpu",
            device_name="fake",
            dtype="float64",
            vocab_size=V,
            max_seq_len=1024,
            n_params=V * V,
            weight_bytes=0,
            weight_bytes_per_step=0,
            kv_bytes_per_token=0,
        )

    def meter(self):
        raise NotImplementedError

    def close(self):
        pass


@pytest.fixture
def bigram():
    return BigramEngine


@pytest.fixture
def key_of():
    def make(windows, vocab_size):
        return ReferenceKey(
            weights="w0",
            dtype="float32",
            vocab_size=vocab_size,
            text_sha256="t0",
            window=len(windows[0]),
            n_windows=len(windows),
        )

    return make
