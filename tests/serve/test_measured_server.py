"""hotloop's own server, measured from outside like any other server."""

from __future__ import annotations

import pytest

from hotloop import LLM
from hotloop.baselines.completions import CompletionsClient
from hotloop.baselines.endpoint import ENGINE
from hotloop.baselines.server_behavior import measure_server
from hotloop.bench.measure import measure_speed
from hotloop.bench.record import Workload
from hotloop.types import EngineConfig, SamplingParams

PROMPTS = [[7, 20, 33, 41, 5], [9, 9, 250, 3, 77]]


@pytest.fixture
def engine(server, folder):
    config = EngineConfig(
        model=str(folder), engine="endpoint", url=f"{server.url}/v1", device="cpu", max_batch_size=2
    )
    engine = ENGINE.create(config)
    yield engine
    engine.close()


def test_it_writes_what_its_model_writes(engine, folder):
    params = SamplingParams(max_new_tokens=9, ignore_eos=True)
    found = engine.generate(PROMPTS, params)
    assert [answer.timing.n_tokens for answer in found] == [9, 9]
    assert all(0 < answer.timing.ttft_s <= answer.timing.e2e_s for answer in found)
    with LLM(str(folder), dtype="float32") as own:
        expected = [own.generate([prompt], params)[0] for prompt in PROMPTS]
    assert [answer.text for answer in found] == [answer.text for answer in expected]


@pytest.mark.usefixtures("small_reads")
def test_it_is_timed_in_batches_with_the_number_of_tokens_asked_for(engine):
    workload = Workload(prompt_tokens=5, new_tokens=6, batch=2, repeats=2)
    speed = measure_speed(engine, workload, read_bytes_per_s=None, datasheet_bytes_per_s=None)
    assert speed.decode_tok_s.n == 2
    assert speed.decode_tok_s.mean > 0
    assert engine.describe().settings["refused_fields"] == []


def test_how_it_behaves_is_found_out(server):
    workload = Workload(prompt_tokens=6, new_tokens=8, repeats=2)
    with CompletionsClient(f"{server.url}/v1") as client:
        found = measure_server(client, workload, "the quick brown fox jumps over the dog " * 3)
    assert found.n_tokens.samples == (8.0,) * 4
    assert found.repeated.n_equal == found.repeated.n == 2, "greedy answers do not vary"
    assert found.refused_fields == ()
