"""One call at a time, and none after the end: what would corrupt a stream is refused by name."""

import gc

import pytest

from hotloop import LLM, SamplingParams
from hotloop.errors import RequestError
from hotloop.types import EngineConfig

FREELY = SamplingParams(max_new_tokens=8, ignore_eos=True)
IN_A_STREAM = "in the middle of a stream"
CLOSED = "is closed: make a new LLM"


def test_a_live_stream_is_not_disturbed_by_other_requests_which_are_refused(llm):
    expected = llm.generate([[5, 6]], FREELY)[0].token_ids
    stream = llm.stream([[5, 6]], FREELY)
    waiting = llm.stream([[9]], FREELY)  # asks for the engine when its first piece is taken
    ids = [*next(stream).token_ids]
    for other in (
        lambda: llm.generate([[7]], FREELY),
        lambda: llm.stream([[7]], FREELY),
        lambda: next(waiting),
        lambda: next(llm.score([[5, 6, 7]])),
    ):
        with pytest.raises(RequestError, match=IN_A_STREAM):
            other()
    ids += [i for delta in stream for i in delta.token_ids]
    assert tuple(ids) == expected


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
    assert len(llm.generate([[5]], FREELY)[0].token_ids) == 8
    assert len(list(llm.score([[5, 6, 7]]))) == 1


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
            with pytest.warns(UserWarning, match=r"2 prompts .* max_batch_size is 1") as caught:
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
        )
        again = llm.config
    with LLM(again) as llm:
        assert llm.config == again
