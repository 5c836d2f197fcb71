"""Several ranks compute what one computes, from every encoding; what cannot be cut is refused.

Ranks are threads here, as in ``test_engine_shards``.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from every_encoding import ENCODINGS
from stored_models import assert_ranks_hold_slices
from thread_group import ranks_as_threads

from hotloop import LLM, EngineConfig, SamplingParams
from hotloop.engine.memory import predict_memory
from hotloop.engine.setup import prepare
from hotloop.errors import UnsupportedError

DIVIDED = {"hidden_size": 256, "head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
DIVIDED |= {"intermediate_size": 1024, "num_hidden_layers": 1}
"""Blocks of 128 input features are divided by up to four ranks, and super-blocks of 256 cut apart.
"""

SMALL = {"hidden_size": 256, "head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": 4}
SMALL |= {"intermediate_size": 512, "num_hidden_layers": 1}
"""Not every degree works, and which do depends on the format."""

PERMUTED = "gptq, act-order"
FREELY = SamplingParams(max_new_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    with ranks_as_threads():
        yield


@pytest.fixture(scope="module", params=ENCODINGS)
def encoding(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def divided(encoding: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ENCODINGS[encoding](tmp_path_factory.mktemp("divided"), **DIVIDED)


def engine(model: Path, n: int, quant: str = "auto") -> LLM:
    config = EngineConfig(
        model=str(model),
        quant=quant,
        device="cpu",
        dtype="float32",
        max_seq_len=32,
        tensor_parallel=n,
    )
    return LLM(config)


def answers(llm: LLM) -> tuple[tuple[int, ...], torch.Tensor]:
    """Greedy tokens, and log-probabilities [T, V] of a window."""
    (score,) = llm.score([list(range(5, 29))], full=True)
    assert score.log_probs is not None
    (answer,) = llm.generate([[5, 6, 200, 31]], FREELY)
    return answer.token_ids, score.log_probs


def test_two_three_and_four_ranks_compute_in_float32_what_one_computes(encoding, divided):
    with engine(divided, 1) as llm:
        tokens, log_probs = answers(llm)
    quant = "auto"
    if encoding == PERMUTED:
        with pytest.raises(UnsupportedError, match=r"are permuted .*; only 1 works"):
            engine(divided, 2)
        quant = "none"  # dequantized it is a matrix like any other
    for n in (2, 3, 4):
        with engine(divided, n, quant) as llm:
            ours, log_probs_of_ranks = answers(llm)
            described = llm.describe()
            assert described.weight_bytes == predict_memory(llm.config).weights_bytes
        assert ours == tokens
        torch.testing.assert_close(log_probs_of_ranks, log_probs)
        assert log_probs_of_ranks.argmax(dim=1).equal(log_probs.argmax(dim=1))


def test_a_degree_works_or_is_refused_with_the_degrees_that_do(encoding, tmp_path):
    model = ENCODINGS[encoding](tmp_path, **SMALL)
    config = EngineConfig(model=str(model), device="cpu")
    works, named = [], set()
    for n in range(1, 10):
        try:
            prepare(dataclasses.replace(config, tensor_parallel=n))
            works.append(n)
        except UnsupportedError as error:
            listed = str(error).rpartition("; ")[2]  # such as "1, 2 and 4 work."
            named.add(tuple(map(int, re.findall("[0-9]+", listed))))
    assert named == {tuple(works)}
    assert works[0] == 1


def test_the_fused_step_is_planned_and_packed_for_ranks(encoding, divided, monkeypatch):
    if encoding == PERMUTED:
        pytest.skip("refused for several ranks")
    monkeypatch.setattr("hotloop.engine.setup.fused_unavailable_reason", lambda _: None)
    config = EngineConfig(model=str(divided), device="cpu", execution="fused", max_seq_len=16)
    for n in (2, 4):
        setup = prepare(dataclasses.replace(config, tensor_parallel=n))
        kinds = {piece.kind for _, pieces in setup.specs(setup.schemes) for piece in pieces}
        assert setup.execution == "fused"
        assert kinds != {"dense"}
    assert_ranks_hold_slices(divided, fused=True, dtype=torch.bfloat16)
