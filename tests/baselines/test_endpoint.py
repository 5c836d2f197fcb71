"""Servers with all kinds of habits, measured from outside."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from fake_server import Habits, serve
from tiny_models import write_random

from hotloop.baselines import completions
from hotloop.baselines.completions import CompletionsClient, ServerError
from hotloop.baselines.endpoint import ENGINE
from hotloop.bench.measure import measure_speed
from hotloop.bench.record import Workload
from hotloop.errors import ConfigError, HotloopError, UnknownNameError, UnsupportedError
from hotloop.types import EngineConfig, SamplingParams

FIXED = SamplingParams(max_new_tokens=5, ignore_eos=True)
WORKLOAD = Workload(prompt_tokens=3, new_tokens=6, batch=2, repeats=2)


def complete(habits, prompt=(1, 2, 3), n=5, **options):
    with serve(habits) as url, CompletionsClient(url, **options) as client:
        return client.complete(prompt, n, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_random(tmp_path_factory.mktemp("model")))


@pytest.fixture
def engine_of(folder):
    """Connects an engine to a server with some habits."""
    opened = []

    def connect(**habits):
        server = serve(Habits(**habits))
        url = server.__enter__()
        opened.append(server.__exit__)
        config = EngineConfig(
            model=folder, engine="endpoint", url=url, device="cpu", max_batch_size=2
        )
        engine = ENGINE.create(config)
        opened.append(lambda *_: engine.close())
        return engine

    yield connect
    for close in reversed(opened):
        close(None, None, None)


@pytest.mark.parametrize(
    ("habits", "pieces"),
    [
        ({}, 5),
        ({"role_first": True}, 5),
        ({"pings": True}, 5),
        ({"per_piece": 2}, 3),
        ({"sends_ids": True}, 5),
        ({"sends_ids": True, "usage": False, "per_piece": 3}, 2),
        ({"refuses": ("return_token_ids",)}, 5),
        ({"refuses": ("ignore_eos", "return_token_ids")}, 5),
        ({"busy": 2}, 5),
        ({"busy": 1, "retry_after": "Mon, 30 Nov 2026 05:00:00 GMT"}, 5),
        ({"busy": 1, "retry_after": "nan"}, 5),
    ],
)
def test_tokens_are_counted_by_the_server_and_pieces_timed(habits, pieces):
    answer = complete(Habits(**habits))
    assert answer.n_tokens == 5
    assert len(answer.times) == pieces
    assert list(answer.times) == sorted(answer.times)
    assert answer.times[0] > 0
    assert answer.text == " one two three one two"
    assert answer.finish_reason == "length"
    assert (answer.token_ids is not None) == habits.get("sends_ids", False)


def test_what_a_server_refused_once_is_not_sent_again():
    habits = Habits(refuses=("ignore_eos",))
    with serve(habits) as url, CompletionsClient(url) as client:
        for _ in range(2):
            client.complete([1], 2, ignore_eos=True)
        assert client.refused == ("ignore_eos",)
    assert ["ignore_eos" in body for body in habits.asked] == [True, False, False]
    assert all("stream_options" in body for body in habits.asked)


def test_the_wait_of_a_busy_server_is_not_part_of_its_time(monkeypatch):
    waited = []
    clock = SimpleNamespace(
        sleep=waited.append, perf_counter=lambda: time.perf_counter() + sum(waited)
    )
    monkeypatch.setattr(completions, "time", clock)
    answer = complete(Habits(busy=2, retry_after="700"))
    assert waited == [completions.MAX_WAIT_S] * 2
    assert answer.times[0] < sum(waited)


def test_a_server_without_counts_says_so():
    assert complete(Habits(usage=False)).n_tokens is None


@pytest.mark.parametrize(
    ("habits", "error", "said"),
    [
        ({"takes_ids": False}, UnsupportedError, "takes no token ids"),
        ({"fails_with": 500}, ServerError, "status 500: .*a fault"),
        ({"fails_with": 400}, ServerError, "status 400"),
        ({"busy": 99}, ServerError, "status 429"),
        ({"error_within": True}, ServerError, "the engine died"),
        ({"raw": b"data: {not json}\n\n"}, ServerError, "JSON"),
        ({"raw": b"data: [1]\n\n"}, ServerError, "v1: "),
        ({"raw": b'data: {"choices": [{"text": 5}]}\n\n'}, ServerError, "text"),
        ({"raw": b"data: [DONE]\n\n"}, ServerError, "without text"),
        ({"models": ("a", "b")}, UnknownNameError, "#NAME"),
    ],
)
def test_a_server_that_cannot_be_measured_is_named_with_the_reason(habits, error, said):
    with pytest.raises(error, match=said):
        complete(Habits(**habits))


def test_a_stalled_answer_ends():
    with pytest.raises(ServerError, match="sent nothing for too long"):
        complete(Habits(stalls=True), read_timeout_s=0.3)


def test_an_answer_without_end_is_cut_off(monkeypatch):
    monkeypatch.setattr(completions, "MAX_LINE_BYTES", 1000)
    with pytest.raises(ServerError, match="an answer of more than"):
        complete(Habits(raw=b"data: " + b"x" * 5000))


def test_one_of_several_models_is_chosen_behind_the_url():
    habits = Habits(models=("a", "b"))
    with serve(habits) as url, CompletionsClient(f"{url}#b") as client:
        client.complete("text", 1)
    assert habits.asked[0]["model"] == "b"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("localhost:8000", "is not the URL of a server"),
        ("file:///etc/passwd", "is not the URL of a server"),
        ("http://me:secret@host/v1", "password"),
    ],
)
def test_an_invalid_server_url_is_refused(url, said):
    with pytest.raises(ConfigError, match=said) as refused:
        CompletionsClient(url)
    assert "secret" not in str(refused.value)


def test_nobody_there_is_one_error():
    with serve(Habits()) as url:
        pass
    with pytest.raises(ServerError, match="cannot be reached"):
        CompletionsClient(url)


def test_the_key_is_sent_and_in_no_record(engine_of, monkeypatch):
    monkeypatch.setenv(completions.API_KEY, "sesame")
    keys = set()
    assert "sesame" not in str(engine_of(keys=keys).describe())
    assert keys == {"Bearer sesame"}


@pytest.mark.usefixtures("small_reads")
def test_a_server_is_timed_like_any_engine(engine_of):
    engine = engine_of(pause_s=0.002, role_first=True)
    speed = measure_speed(engine, WORKLOAD, read_bytes_per_s=1e9, datasheet_bytes_per_s=None)
    assert speed.mbu is None
    assert speed.peak_bytes is None
    assert speed.decode_tok_s.mean > 0
    assert speed.ttft_s.mean >= 0.002


def test_a_server_that_sends_several_tokens_per_event_has_a_note(engine_of):
    engine = engine_of(per_piece=3)
    engine.generate([[1, 2]], FIXED)
    assert any("several tokens per event" in note for note in engine.describe().notes)
    assert engine.describe().version == "played/1.0, model m"


def test_another_number_of_tokens_than_asked_for_is_not_a_figure(engine_of):
    engine = engine_of(ends_early=4)
    with pytest.raises(HotloopError, match="instead of"):
        measure_speed(engine, WORKLOAD, read_bytes_per_s=None, datasheet_bytes_per_s=None)


def test_a_server_that_does_not_count_is_unsupported(engine_of):
    with pytest.raises(UnsupportedError, match="the number of generated tokens"):
        engine_of(usage=False)


def test_log_probabilities_of_prompts_are_scores_with_the_most_likely_tokens(engine_of):
    (score,) = engine_of().score([[7, 3, 50]], full=True)
    assert score.log_probs is None
    assert score.token_logprobs.tolist() == [-4.0, -9.0]
    assert score.top1.tolist() == [0, 0]
    ids, log_probs = score.top
    assert ids.shape == log_probs.shape == (2, 20)
    assert torch.equal(log_probs[0], -1.0 - torch.arange(20.0))


def test_without_log_probabilities_there_is_no_quality(engine_of):
    with pytest.raises(UnsupportedError, match="quality cannot be measured"):
        list(engine_of(has_logprobs=False).score([[1, 2]]))


@pytest.mark.parametrize(
    ("levers", "error", "said"),
    [
        ({}, ConfigError, "needs the URL"),
        ({"url": "http://x/v1", "quant": "int8"}, UnsupportedError, "does not support quant"),
        (
            {"url": "http://x/v1", "execution": "eager"},
            UnsupportedError,
            "support the option execution",
        ),
    ],
)
def test_a_cell_that_cannot_work_is_refused_before_it_runs(levers, error, said):
    with pytest.raises(error, match=said):
        ENGINE.predict(EngineConfig(model="m", engine="endpoint", **levers))
