"""Heavy clients, unmodified, against a server. Each is skipped where it is not installed.

Servers are of a tiny model, and of SmolLM2 where that has been pulled.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import pytest
from serving import HELLO, serving
from waiting import HANG_S

from hotloop import LLM
from hotloop.errors import ModelNotFoundError
from hotloop.serve.lifecycle import HttpServer
from hotloop.weights.hub import resolve_model

pytestmark = pytest.mark.clients

QUESTION = "Say a word."


@pytest.fixture(scope="module", params=["tiny", "smollm2-135m"])
def llm(request: pytest.FixtureRequest, folder: Path) -> Iterator[LLM]:
    try:
        path = folder if request.param == "tiny" else resolve_model(request.param)
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    options = {"max_seq_len": 320, "max_batch_size": 3, "prefix_cache": "chunks"}
    with LLM(str(path), device="cpu", **options) as llm:
        yield llm


@pytest.fixture
def server(llm: LLM) -> Iterator[HttpServer]:
    with serving(llm) as server:
        yield server


def completed(llm: LLM, prompt: list[int], n: int) -> str:
    (answer,) = llm.generate([prompt], max_new_tokens=n, temperature=0)
    return answer.text


def test_lm_eval_gets_the_log_likelihoods_of_the_engines_own_score(llm):
    module = pytest.importorskip(
        "lm_eval.models.openai_completions", reason="lm-eval[api] is not installed"
    )
    from lm_eval.api.instance import Instance

    items = [
        ("The engine decodes", " one token after the other"),
        ("The engine decodes", " letters"),
        ("of", ' "the", "token" and "there"'),
        ("", "The tokenizer learns"),
    ]
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    with serving(llm) as server:
        client = module.LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model="tiny",
            tokenizer_backend="remote",
            max_length=320,
            num_concurrent=2,
        )
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(items)]
        found = client.loglikelihood(requests, disable_tqdm=True)
        encoded = [
            client._encode_pair(*pair)
            if pair[0]
            else ([client.prefix_token_id], client.tok_encode(pair[1]))
            for pair in items
        ]
        until = {"until": ["zz"], "max_gen_toks": 8}
        asked = Instance("generate_until", {}, ("The engine", until), 0)
        (generated,) = client.generate_until([asked], disable_tqdm=True)
    for (context, continuation), (logprob, is_greedy) in zip(encoded, found, strict=True):
        (score,) = llm.score([context + continuation])
        n = len(continuation)
        assert logprob == pytest.approx(float(score.token_logprobs[-n:].sum()), rel=1e-6)
        assert is_greedy == (score.top1[-n:].tolist() == continuation)
    assert generated == completed(llm, tokenizer.encode("The engine"), 8)


def test_langchain_chats_and_streams(server):
    module = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    chat = module.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="tiny", temperature=0, max_tokens=8
    )
    whole = chat.invoke(QUESTION)
    assert whole.content
    assert whole.usage_metadata["output_tokens"] <= 8
    assert "".join(piece.content for piece in chat.stream(QUESTION)) == whole.content
    assert [answer.content for answer in chat.batch([QUESTION] * 3)] == [whole.content] * 3


def test_litellm_chats_and_streams(server):
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    options = {"model": "openai/tiny", "api_base": f"{server.url}/v1", "api_key": "none"}
    options |= {"messages": HELLO, "temperature": 0, "max_tokens": 8}
    whole = litellm.completion(**options)
    text = whole.choices[0].message.content
    assert text
    assert whole.usage.completion_tokens <= 8
    pieces = litellm.completion(**options, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text


@pytest.mark.skipif(find_spec("guidellm") is None, reason="guidellm is not installed")
def test_guidellm_measures(server, folder, tmp_path):
    report = tmp_path / "report.json"
    options = {
        "backend": f"kind=openai_http,target={server.url}",
        "profile": "kind=synchronous",
        "constraint": "kind=max_requests,count=3",
        "tokenizer": f"kind=hf_auto,model={folder}",
        "data": "kind=synthetic_text,prompt_tokens=16,output_tokens=8",
        "output": f"kind=json,path={report}",
    }
    given = itertools.chain.from_iterable((f"--{name}", value) for name, value in options.items())
    command = [sys.executable, "-m", "guidellm", "run", *given, "--disable-console"]
    subprocess.run(command, check=True, timeout=HANG_S)
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    assert benchmark["metrics"]["request_totals"]["successful"] == 3
    assert benchmark["metrics"]["output_token_count"]["successful"]["mean"] == 8


@pytest.mark.skipif(which("aiperf") is None, reason="aiperf is not installed")
def test_aiperf_measures(server, folder, tmp_path):
    options = {
        "url": server.url,
        "endpoint-type": "chat",
        "model": "tiny",
        "tokenizer": f"./{folder.name}",  # an absolute path is taken for a repository's name
        "concurrency": "2",
        "request-count": "4",
        "synthetic-input-tokens-mean": "16",
        "output-tokens-mean": "8",
        "extra-inputs": "ignore_eos:true",
        "ui": "none",
        "output-artifact-dir": str(tmp_path),
    }
    given = itertools.chain.from_iterable((f"--{name}", value) for name, value in options.items())
    command = ["aiperf", "profile", "--streaming", "--use-server-token-count", *given]
    # Offline it takes every tokenizer for a repository's name.
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    subprocess.run(command, check=True, timeout=HANG_S, cwd=folder.parent, env=env)
    found = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert found["request_count"]["avg"] == 4
    assert found["output_sequence_length"]["min"] == found["output_sequence_length"]["max"] == 8
    assert found["time_to_first_token"]["min"] > 0
