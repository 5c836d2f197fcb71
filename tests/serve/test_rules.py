"""The rules of OpenAI's API that clients count on, one by one."""

import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from serving import HELLO, TEMPLATE, events, serving
from tiny_models import write_script

from hotloop import LLM, SamplingParams
from hotloop.serve.schemas import CompletionBody
from hotloop.serve.settings import ServerSettings

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASKED = {"messages": HELLO, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
SAMPLED = {**ASKED, "temperature": 1.0}


def choices(client: httpx2.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = client.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    found = response.json()["choices"]
    assert [choice["index"] for choice in found] == list(range(len(found)))
    return found


def answers(client: httpx2.Client, body: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] for choice in choices(client, body)]


def test_null_is_absent_and_unknown_fields_are_ignored(client):
    expected = answers(client, ASKED)
    for more in (
        {"stop": None, "logprobs": None, "top_logprobs": None, "seed": None, "n": None},
        {"user": "me", "service_tier": "auto", "store": False, "metadata": {"a": "b"}},
        {"repetition_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0, "top_k": -1},
        {"max_tokens": None, "max_completion_tokens": 12},
        {"max_tokens": 3, "max_completion_tokens": 12},
        {"model": None, "stream_options": None, "tools": None, "response_format": None},
        {"something": [[[{"deep": None}]]]},
    ):
        assert answers(client, ASKED | more) == expected


@pytest.mark.parametrize(
    ("path", "more"),
    [
        # vLLM's benchmark, GuideLLM, and AIPerf
        (
            COMPLETIONS,
            {"prompt": "Hello", "max_tokens": 12, "logprobs": None, "repetition_penalty": 1.0},
        ),
        (CHAT, {"messages": HELLO, "max_completion_tokens": 12, "max_tokens": 12, "stop": None}),
        (CHAT, {"messages": HELLO, "max_completion_tokens": 12, "extra": {}}),
    ],
)
def test_what_benchmarks_send_is_answered_at_the_length_that_they_ask_for(client, path, more):
    usage = {"include_usage": True, "continuous_usage_stats": False}
    body = {"model": "tiny", "temperature": 0.0, "ignore_eos": True, "stream": True} | more
    headers = {"x-request-id": "bench-7", "Authorization": "Bearer None"}
    answer = client.post(path, json=body | {"stream_options": usage}, headers=headers)
    assert answer.headers["x-request-id"] == "bench-7"
    *chunks, last, done = events(answer)
    assert done == "[DONE]"
    assert last["usage"]["completion_tokens"] == 12
    assert chunks[0]["choices"][0].get("text") or chunks[0]["choices"][0]["delta"]["content"]


def test_a_limit_beyond_the_context_is_clamped_and_ends_with_length(client):
    (choice,) = choices(client, ASKED | {"max_tokens": 10**6})
    assert choice["finish_reason"] == "length"
    usage = client.post(CHAT, json=ASKED | {"max_tokens": 10**6}).json()["usage"]
    assert usage["total_tokens"] == 320


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "x" * 400}]}),
        (COMPLETIONS, {"prompt": [70] * 320}),
        (COMPLETIONS, {"prompt": [70] * 5000, "max_tokens": 10}),
    ],
)
def test_a_prompt_that_is_too_long_is_told_as_agents_expect(client, path, body):
    response = client.post(path, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 320 tokens" in error["message"]


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 1e300},
        {"temperature": "hot"},
        {"top_p": 0},
        {"top_p": 1.5},
        {"min_p": -1},
        {"top_k": -2},
        {"n": 0},
        {"n": 1000},
        {"max_tokens": -1},
        {"max_tokens": 2**40},
        {"max_completion_tokens": 0},
        {"logprobs": True, "top_logprobs": 21},
        {"logit_bias": {"70": 1000}},
        {"logit_bias": {"token": 1}},
        {"logit_bias": {"300": 1}},
        {"presence_penalty": 1e9},
        {"stop": 5},
        {"stop": ["a"] * 17},
        {"messages": [5]},
        {"stream": "perhaps"},
    ],
)
def test_values_out_of_range_are_refused_by_name(client, more):
    response = client.post(CHAT, json=ASKED | more)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert next(reversed(more)) in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_no_part_of_it_is_sent(client, stream):
    (whole,) = answers(client, ASKED)
    for start, end in ((1, 3), (4, 9), (len(whole) - 2, len(whole))):
        stop = whole[start:end]
        response = client.post(CHAT, json=ASKED | {"stop": stop, "stream": stream})
        if stream:
            *chunks, _ = events(response)
            text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
            finish = chunks[-1]["choices"][0]["finish_reason"]
        else:
            (choice,) = response.json()["choices"]
            text, finish = choice["message"]["content"], choice["finish_reason"]
        assert text == whole[: whole.index(stop)]
        assert finish == "stop"


def test_choice_i_is_the_answer_to_the_seed_plus_i_whatever_runs_beside_it(client):
    alone = [answers(client, SAMPLED | {"seed": 5 + i})[0] for i in range(4)]
    assert len(set(alone)) == 4
    assert answers(client, SAMPLED | {"seed": 5, "n": 4}) == alone
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda i: answers(client, SAMPLED | {"seed": 5 + i % 4}), range(12)))
    assert found == [[alone[i % 4]] for i in range(12)]


def test_without_a_seed_answers_differ(client):
    assert len(set(answers(client, SAMPLED | {"n": 4, "seed": None}))) == 4
    assert len(set(answers(client, SAMPLED | {"n": 2, "seed": -1}))) == 2


def test_the_pieces_of_several_answers_have_their_index(client):
    asked = SAMPLED | {"seed": 1, "n": 3}
    *chunks, _ = events(client.post(CHAT, json=asked | {"stream": True}))
    texts, roles, ends = ["", "", ""], [0, 0, 0], [0, 0, 0]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        i = choice["index"]
        texts[i] += choice["delta"].get("content", "")
        roles[i] += "role" in choice["delta"]
        ends[i] += choice["finish_reason"] is not None
    assert texts == answers(client, asked)
    assert roles == ends == [1, 1, 1]


def test_interleaved_conversations_are_answered_as_each_alone(client):
    talks = [[{"role": "user", "content": f"{name} " * 40}] for name in ("one", "two", "six")]
    alone = [answers(client, ASKED | {"messages": talk}) for talk in talks]
    again = [
        [*talk, {"role": "assistant", "content": said[0]}, {"role": "user", "content": "go on"}]
        for talk, said in zip(talks, alone, strict=True)
    ]
    expected = [answers(client, ASKED | {"messages": talk}) for talk in again]
    with ThreadPoolExecutor(6) as pool:
        bodies = [ASKED | {"messages": talk} for talk in (*talks, *again)] * 3
        assert list(pool.map(lambda body: answers(client, body), bodies)) == [*alone, *expected] * 3


def test_the_usage_so_far_is_on_each_chunk_if_asked_for(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    for path, body in ((CHAT, ASKED), (COMPLETIONS, {"prompt": "The", "max_tokens": 12})):
        asked = body | {"stream": True, "stream_options": options, "ignore_eos": True}
        *chunks, last, _ = events(client.post(path, json=asked))
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts)
        assert 1 <= counts[0] < 12
        assert counts[-1] == last["usage"]["completion_tokens"] == 12


@pytest.fixture
def drafting(tmp_path) -> Iterator[httpx2.Client]:
    """A server of a model that goes round ten tokens, so that its drafts are right."""
    folder = write_script(tmp_path, range(70, 80), max_position=320)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with (
        LLM(str(folder), dtype="float32", draft="ngram", draft_policy="always") as llm,
        serving(llm) as server,
        httpx2.Client(base_url=server.url, timeout=600) as client,
    ):
        yield client


def test_each_token_has_its_own_log_probability_in_chunks_of_several_tokens(drafting):
    asked = {"prompt": [70], "max_tokens": 60, "temperature": 0, "logprobs": 1}
    (whole,) = drafting.post(COMPLETIONS, json=asked).json()["choices"]
    *chunks, _ = events(drafting.post(COMPLETIONS, json=asked | {"stream": True}))
    pieces = [chunk["choices"][0] for chunk in chunks]
    streamed = [piece["logprobs"] for piece in pieces if piece["logprobs"]]
    assert max(len(each["tokens"]) for each in streamed) > 1, "some chunks have several tokens"
    for name, values in whole["logprobs"].items():
        assert [value for each in streamed for value in each[name]] == values
        assert len(values) == 60
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    drafted, accepted = draft_counts(drafting)
    assert 0 < accepted <= drafted


@pytest.mark.parametrize("details", [False, True])
def test_log_probabilities_of_a_chat_are_those_of_the_tokens_of_each_chunk(drafting, details):
    begun = [*HELLO, {"role": "assistant", "content": "e"}]  # one of the ten
    asked = ASKED | {"messages": begun, "continue_final_message": True, "max_tokens": 60}
    asked |= {"logprobs": True, "top_logprobs": 1, "hotloop": {"details": details}}
    (whole,) = choices(drafting, asked)
    *chunks, _ = events(drafting.post(CHAT, json=asked | {"stream": True}))
    pieces = [chunk["choices"][0] for chunk in chunks]
    streamed = [piece["logprobs"]["content"] for piece in pieces if piece["logprobs"]]
    assert max(map(len, streamed)) > 1, "some chunks have several tokens"
    assert [entry for entries in streamed for entry in entries] == whole["logprobs"]["content"]
    for piece in pieces:
        if piece["logprobs"]:
            said = "".join(entry["token"] for entry in piece["logprobs"]["content"])
            assert piece["delta"]["content"] == said
    assert len(whole["logprobs"]["content"]) == 60


def draft_counts(client: httpx2.Client) -> tuple[float, float]:
    """Returns how many tokens were drafted, and accepted."""
    counted = {
        line.partition("{")[0]: float(line.rpartition(" ")[2])
        for line in client.get("/metrics").text.splitlines()
        if line.startswith("hotloop:spec_decode")
    }
    names = ("draft", "accepted")
    drafted, accepted = (counted[f"hotloop:spec_decode_num_{name}_tokens_total"] for name in names)
    return drafted, accepted


def test_a_request_can_ask_for_no_drafts_on_every_route(drafting):
    prompt = [*range(70, 80)] * 2
    asked = {"prompt": prompt, "max_tokens": 30, "temperature": 0}
    (whole,) = drafting.post(COMPLETIONS, json=asked).json()["choices"]
    before = draft_counts(drafting)
    assert before > (0, 0)
    off = {"hotloop": {"speculate": False}}
    for path, body in (
        (COMPLETIONS, asked),
        (CHAT, ASKED),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 30, "temperature": 0}),
    ):
        assert drafting.post(path, json=body | off).status_code == 200
    (plain,) = drafting.post(COMPLETIONS, json=asked | off).json()["choices"]
    assert plain == whole
    assert draft_counts(drafting) == before
    refused = drafting.post(COMPLETIONS, json=asked | {"hotloop": {"speculate": "perhaps"}})
    assert refused.status_code == 400
    assert "hotloop.speculate" in refused.json()["error"]["message"]


def test_a_model_without_a_tokenizer_continues_token_ids(folder):
    with (
        LLM(str(folder), weights="random", dtype="float32") as llm,
        serving(llm) as server,
        httpx2.Client(base_url=server.url, timeout=600) as client,
    ):
        asked = {"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
        assert client.post(COMPLETIONS, json=asked).json()["usage"]["completion_tokens"] == 4
        for path, body in (
            (CHAT, ASKED),
            (COMPLETIONS, asked | {"prompt": "text"}),
            ("/tokenize", {"prompt": "text"}),
        ):
            response = client.post(path, json=body)
            assert response.status_code == 400
            assert "no tokenizer" in response.json()["error"]["message"]


def sampling(**options: Any) -> SamplingParams:
    body = CompletionBody.model_validate({"prompt": "Hello", **options})
    return body.params(SamplingParams(), ServerSettings())


def test_options_that_compare_equal_keep_their_types_whichever_comes_first():
    for value in (0, 1):
        for one in ({"temperature": value}, {"temperature": float(value)}, {"temperature": "1"}):
            assert type(sampling(**one).temperature) is float
        assert type(sampling(top_k=float(value)).top_k) is int
        assert type(sampling(logprobs=bool(value)).logprobs) is int
        assert sampling(ignore_eos=value).ignore_eos is bool(value)
        assert sampling(logit_bias={"5": bool(value)}).logit_bias == ((5, float(value)),)


def test_long_stop_strings_are_not_kept_once_their_request_is_gone():
    tracemalloc.start()
    try:
        for i in range(8):
            assert len(sampling(stop=[f"{i}" * 2**20]).stop[0]) == 2**20
        assert tracemalloc.get_traced_memory()[0] < 2**20
    finally:
        tracemalloc.stop()
