"""Calls may overlap, in one thread or several, and none is served after the end."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from hotloop import LLM, SamplingParams
from hotloop.errors import RequestError
from hotloop.types import EngineConfig

FREELY = SamplingParams(max_new_tokens=8, ignore_eos=True)
CLOSED = "is closed: make a new LLM"


@pytest.fixture(scope="module")
def alone(llm) -> list[tuple[int, ...]]:
    return [llm.generate([[5, i]], FREELY)[0].token_ids for i in range(12)]


def test_streams_of_one_thread_take_turns_and_each_gets_its_own_answer(llm, alone):
    streams = [llm.stream([[5, i]], FREELY) for i in range(6)]
    ids = [[] for _ in streams]
    for _ in range(5):
        for mine, stream in zip(ids, streams, strict=True):
            mine += next(stream).token_ids
    (score,) = llm.score([[5, 6, 7]])  # takes a seat like a request
    assert len(score.token_logprobs) == 2
    assert llm.generate([[5, 7]], FREELY)[0].token_ids == alone[7]
    for mine, stream in zip(ids, streams, strict=True):
        mine += [i for delta in stream for i in delta.token_ids]
    assert [tuple(mine) for mine in ids] == alone[:6]


def test_threads_share_an_engine_and_each_gets_its_own_answer(llm, alone):
    together = threading.Barrier(12)

    def answer(i: int) -> tuple[int, ...]:
        together.wait()
        if i % 3 == 0:
            return tuple(t for delta in llm.stream([[5, i]], FREELY) for t in delta.token_ids)
        if i % 3 == 1:
            next(llm.stream([[9]], FREELY))  # and goes away
        return llm.generate([[5, i]], FREELY)[0].token_ids

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(answer, range(12))) == alone
    assert llm._scheduler.idle


def test_an_error_of_the_device_ends_every_stream_with_it(llm, monkeypatch):
    streams = [llm.stream([[5, i]], FREELY) for i in range(2)]
    for stream in streams:
        next(stream)

    def broken(_: object) -> None:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(llm._runner, "run", broken)
        for stream in streams:
            with pytest.raises(RuntimeError, match="the device is gone"):
                list(stream)
    assert llm._scheduler.idle
    assert len(llm.generate([[5]], FREELY)[0].token_ids) == 8


@pytest.mark.parametrize("end", ["taken to its end", "closed", "garbage"])
def test_a_stream_that_has_ended_frees_the_engine(llm, end):
    stream = llm.stream([[5, 6], [7]], FREELY)
    next(stream)
    if end == "closed":
        stream.close()
    elif end == "garbage":
        del stream
        gc.collect()
    else:
        list(stream)
    assert llm._scheduler.idle
    assert len(llm.generate([[5]], FREELY)[0].token_ids) == 8


def test_a_stream_that_was_never_begun_holds_nothing_up(llm):
    first, second = llm.stream([[5]], FREELY), llm.stream([[6]], FREELY)
    assert [len(list(stream)) for stream in (second, first)] == [8, 8]


def test_windows_can_be_scored_between_calls_that_generate(llm):
    (whole,) = llm.score([[5, 6, 7]])
    scores = llm.score([[5, 6, 7]] * 2)
    for _ in range(2):
        assert next(scores).token_logprobs.tolist() == whole.token_logprobs.tolist()
        llm.generate([[9, 9]], FREELY)


def test_a_refused_request_does_not_hold_the_engine(llm):
    with pytest.raises(RequestError, match="empty"):
        llm.generate([[5], []], FREELY)
    assert len(llm.generate([[5]], FREELY)[0].token_ids) == 8


def test_a_closed_engine_says_so_whatever_it_is_asked(folder):
    with LLM(str(folder), dtype="float32") as llm:
        stream = llm.stream([[5]], FREELY)
        next(stream)
    llm.close()  # twice does no harm
    for call in (
        lambda: llm.generate([[5]]),
        lambda: llm.stream([[5]]),
        lambda: next(llm.score([[5, 6]])),
        lambda: llm.encode("text"),
        lambda: llm.describe(),
        lambda: llm.meter().__enter__(),
        lambda: list(stream),
    ):
        with pytest.raises(RequestError, match=CLOSED):
            call()


def test_prompts_that_wait_for_one_another_are_said_to(folder):
    with LLM(str(folder), dtype="float32") as llm:
        for call in (llm.generate, llm.stream):
            with pytest.warns(UserWarning, match=r"2 answers .* max_batch_size is 1") as caught:
                call([[5], [6]], FREELY)
            assert [warning.filename for warning in caught] == [__file__]


def test_the_engines_configuration_has_the_values_that_were_left_to_hotloop(folder):
    with LLM(str(folder), quant="int8", device="cpu") as llm:
        assert llm.describe().config == EngineConfig(model=str(folder), quant="int8", device="cpu")
        assert llm.config == EngineConfig(
            model=str(folder),
            quant="int8",
            head="int8",
            execution="eager",
            device="cpu",
            dtype="bfloat16",
            max_seq_len=320,
            prefix_cache="none",
        )
        again = llm.config
    with LLM(again) as llm:
        assert llm.config == again
