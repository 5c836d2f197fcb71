"""What lm-eval asks for reaches the engine in as few calls as there can be, which it may batch.

lm-eval itself is played here by the few names that are imported of it; ``test_harness`` compares
with the real one where that is installed.
"""

import itertools
import sys
from types import ModuleType, SimpleNamespace

import pytest
from test_tasks import BOS, LetterEngine

from hotloop.types import Generation, Timing


class Writes(LetterEngine):
    """Writes the beginning of its prompt again, and keeps what it was asked for."""

    def __init__(self, **options):
        super().__init__(**options)
        self.asked = []

    def generate(self, prompts, params):
        self.asked.append((tuple(map(tuple, prompts)), params))
        timing = Timing(n_tokens=1, ttft_s=1.0, e2e_s=1.0)
        return [
            Generation(
                prompt_ids=tuple(prompt),
                token_ids=(prompt[0],),
                text=chr(prompt[0]),
                finish_reason="length",
                timing=timing,
            )
            for prompt in prompts
        ]


@pytest.fixture
def lm_of(monkeypatch):
    """Makes lm-eval's model of an engine, on a stand-in for lm-eval."""
    names = {
        "lm_eval.api.instance": {"Instance": SimpleNamespace},
        "lm_eval.api.model": {"TemplateLM": object},
        "lm_eval.models.utils": {
            "handle_stop_sequences": lambda until, **_: until,
            "normalize_gen_kwargs": lambda given, limit: {"max_gen_toks": limit} | given,
        },
    }
    for name in ("lm_eval", "lm_eval.api", "lm_eval.models", *names):
        module = ModuleType(name)
        vars(module).update(names.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "hotloop.evaluate.harness_model", raising=False)
    from hotloop.evaluate.harness_model import EngineLM

    yield EngineLM
    del sys.modules["hotloop.evaluate.harness_model"]  # it is of the stand-in


def request(*args):
    return SimpleNamespace(args=args)


def sums(engine, window, n_scored):
    pairs = list(itertools.pairwise(window))[-n_scored:]
    return sum(engine.log_probs_VV[a, b].item() for a, b in pairs)


def test_all_log_likelihoods_are_one_call_of_the_engine(lm_of):
    engine = LetterEngine(likes="ab bc")
    asked = [(("a", "b" * n), [ord("a")], [ord("b")] * n) for n in (1, 2, 3)]
    found = lm_of(engine)._loglikelihood_tokens(asked)
    assert len(engine.calls) == 1
    windows = [(*before, *after) for _, before, after in asked]
    assert engine.calls[0] == windows
    for (logprob, _), window in zip(found, windows, strict=True):
        assert logprob == pytest.approx(sums(engine, window, len(window) - 1))
    assert [greedy for _, greedy in found] == [True, False, False]


def test_all_windows_of_all_documents_are_one_call_and_begin_with_bos(lm_of):
    engine = LetterEngine(likes="ab", max_seq_len=8)
    texts = ["abab" * 5, "b"]
    found = lm_of(engine).loglikelihood_rolling([request(text) for text in texts])
    (windows,) = engine.calls
    assert len(windows) == 4, "three of the first document, and one"
    assert windows[0][0] == windows[3][0] == BOS
    for logprob, text in zip(found, texts, strict=True):
        ids = (BOS, *map(ord, text))
        assert logprob == pytest.approx(sums(engine, ids, len(text)))


def test_prompts_of_the_same_options_are_one_call_and_answers_keep_their_order(lm_of):
    engine = Writes(max_seq_len=16)
    one, other = {"until": ["\n"], "max_gen_toks": 3}, {"until": [], "max_gen_toks": 4}
    asked = [request("a", one), request("b", other), request("c", one), request("d" * 40, other)]
    assert lm_of(engine).generate_until(asked) == ["a", "b", "c", "d"]
    (first, params), (second, _) = engine.asked
    assert (len(first), len(second)) == (2, 2)
    assert (params.max_new_tokens, params.stop, params.temperature) == (3, ("\n",), 0.0)
    assert len(second[1]) == 16 - 1 - 4, "a long prompt loses its beginning"
