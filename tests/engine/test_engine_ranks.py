"""Ranks that are processes: they start, agree, are pipelined, measured, refused, and end."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_random
from waiting import HANG_S, alive, wait_until

from hotloop import LLM, Grammar, SamplingParams
from hotloop.baselines.hotloop import ENGINE
from hotloop.engine.memory import predict_memory
from hotloop.engine.setup import prepare
from hotloop.errors import (
    CheckpointError,
    ConfigError,
    RankError,
    RequestError,
    UnsupportedError,
)
from hotloop.types import EngineConfig

pytestmark = pytest.mark.usefixtures("forked_processes")

PROMPTS = ([7], [5, 6], list(range(2, 19)), [260, 3] * 30, [299, 150, 2, 40, 41])
FREELY = SamplingParams(max_new_tokens=12, ignore_eos=True)


def tokens(llm: LLM, **options: object) -> list[tuple[int, ...]]:
    return [g.token_ids for g in llm.generate(PROMPTS, FREELY, **options)]


def pids(llm: LLM) -> list[int]:
    return [rank.process.pid for rank in llm._runner._ranks._ranks]


def listening() -> set[int]:
    """The ports that this process serves, as the rendezvous of ranks does."""
    connections = psutil.Process().net_connections()
    return {each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}


def write_nine(folder: Path, n_layers: int = 2) -> Path:
    """SmolLM2's heads, untied, with every bias."""
    return write_random(
        folder,
        n_layers=n_layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        hidden_size=576,
        intermediate_size=256,
        attention_bias=True,
        mlp_bias=True,
        embedding_std=0.3,
    )


@pytest.fixture(scope="module")
def nine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nine(tmp_path_factory.mktemp("nine"))


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of it, since layers take most of the time of compiling."""
    return write_nine(tmp_path_factory.mktemp("shallow"), n_layers=1)


@pytest.fixture(scope="module")
def two(shallow: Path) -> Iterator[LLM]:
    """Two compiled ranks in float32, quantized as they load."""
    config = EngineConfig(
        model=str(shallow),
        quant="int8",
        dtype="float32",
        execution="compile",
        max_batch_size=2,
        tensor_parallel=2,
    )
    llm = LLM(config)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def one(shallow: Path) -> LLM:
    return LLM(str(shallow), quant="int8", dtype="float32", max_batch_size=2)


def test_greedy_tokens_of_two_compiled_ranks_are_those_of_one(one, two):
    assert tokens(two) == tokens(one)


def test_sampled_tokens_of_two_compiled_ranks_are_those_of_one(one, two):
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 3}
    assert tokens(two, **options) == tokens(one, **options)


def test_a_grammar_leaves_two_compiled_ranks_the_tokens_of_one(one, two):
    grammar = Grammar(kind="json_schema", source={"enum": ["the token", "letters", 100]})
    params = SamplingParams(grammar=grammar, temperature=0.9, seed=3)
    answers = [[g.text for g in llm.generate(PROMPTS, params)] for llm in (one, two)]
    assert answers[0] == answers[1]
    assert set(answers[0]) <= {'"the token"', '"letters"', "100"}


def test_scores_of_two_ranks_are_those_of_one(one, two):
    window = [*range(2, 60), 299]
    windows = [window, [*window[:30], 7, 8], [*window[:30], 9], [260, 3] * 6]  # two at once
    for expected, score in zip(*(llm.score(windows, full=True) for llm in (one, two)), strict=True):
        torch.testing.assert_close(score.log_probs, expected.log_probs, rtol=1e-4, atol=1e-4)
        assert score.top1.equal(expected.top1)
    shared = (llm.score(windows, share_prefixes=True) for llm in (one, two))
    for expected, score in zip(*shared, strict=True):
        theirs = expected.token_logprobs
        torch.testing.assert_close(score.token_logprobs, theirs, rtol=1e-4, atol=1e-4)
        assert score.top1.equal(expected.top1)


def test_a_description_is_of_one_rank_and_says_how_sums_are_made(one, two):
    alone, shared = one.describe(), two.describe()
    assert shared.kernels["all_reduce"] == "all_reduce/shm"
    assert "all_reduce" not in alone.kernels
    assert shared.config.name == "int8/compile/tp2/float32/batch2"
    assert shared.n_params == alone.n_params
    assert shared.compile_cache == "cold"
    assert shared.weight_bytes == predict_memory(two.config).weights_bytes
    assert shared.weight_bytes_per_step < 0.7 * alone.weight_bytes_per_step
    assert shared.kv_bytes_per_token == alone.kv_bytes_per_token * 2 // 3


def test_memory_that_ranks_share_has_no_name_that_could_outlive_them(two):
    for pid in pids(two):
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        assert sum("memfd:hotloop ranks (deleted)" in line for line in maps) == 1


def test_sums_by_gloo_give_two_ranks_the_same_bits(nine):
    params = SamplingParams(max_new_tokens=12, ignore_eos=True, logprobs=1)
    answers = []
    for all_reduce in ("gloo", "shm"):
        options = {"dtype": "bfloat16", "quant": "int8", "all_reduce": all_reduce}
        with LLM(str(nine), tensor_parallel=2, **options) as llm:
            assert llm.describe().kernels["all_reduce"] == f"all_reduce/{all_reduce}"
            answers.append(llm.generate(PROMPTS, params))
    for gloo, shared in zip(*answers, strict=True):
        assert (shared.token_ids, shared.logprobs) == (gloo.token_ids, gloo.logprobs)


def test_ranks_that_run_a_step_ahead_verify_every_draft(nine):
    grammar = Grammar(kind="regex", source="(the token |letters){2,9}[0-9]{1,3}")
    answers = []
    for n in (1, 2):
        options = {"tensor_parallel": n, "draft": "ngram", "draft_policy": "always"}
        with LLM(str(nine), dtype="float32", max_batch_size=2, **options) as llm:
            assert llm._runner.asynchronous == (n > 1)
            freely = tokens(llm)
            bound = llm.generate(PROMPTS, SamplingParams(grammar=grammar, max_new_tokens=40))
            answers.append((freely, [g.token_ids for g in bound]))
    assert answers[0] == answers[1]


def test_peak_memory_is_that_of_the_largest_rank(two):
    with two.meter() as memory:
        tokens(two)
    residents = [psutil.Process(pid).memory_info().rss for pid in pids(two)]
    assert memory.peak_bytes == pytest.approx(max(residents), rel=0.2)


def test_an_abandoned_stream_leaves_the_ranks_in_step(one, two):
    expected = tokens(one)
    stream = two.stream([[7]], FREELY)
    next(stream)
    stream.close()
    assert tokens(two) == expected


def test_a_rank_killed_while_it_generates_ends_the_run_with_its_error(nine):
    llm = LLM(str(nine), dtype="float32", tensor_parallel=3, max_seq_len=300)
    ranks = pids(llm)
    stream = llm.stream([[7]], SamplingParams(max_new_tokens=290, ignore_eos=True))
    next(stream)

    # Stopped first, so that the others wait for it in the middle of a step.
    os.kill(ranks[1], signal.SIGSTOP)
    threading.Timer(0.1, os.kill, (ranks[1], signal.SIGKILL)).start()
    with pytest.raises(RankError, match="rank 1 of 3 was killed by SIGKILL in decode"):
        list(stream)
    wait_until(lambda: not any(map(alive, ranks)), "no rank is left")
    with pytest.raises(RankError, match="rank 1 of 3"):
        llm.generate([[7]], FREELY)
    llm.close()


def test_ranks_that_were_closed_within_a_stream_keep_nobody_waiting(nine):
    before = listening()
    with LLM(str(nine), dtype="float32", tensor_parallel=2) as llm:
        stream = llm.stream([[7]], FREELY)
        next(stream)
    assert listening() == before  # although the engine is still referenced
    for call in (
        lambda: list(stream),
        lambda: llm.generate([[7]], FREELY),
        lambda: next(llm.score([[7, 8]])),
        lambda: llm.describe(),
    ):
        with pytest.raises(RequestError, match="is closed"):
            call()


def test_a_rank_killed_while_it_loads_ends_the_run_with_its_error(nine):
    before, ranks = set(psutil.Process().children()), []

    def kill(*_: object) -> None:
        if not ranks:
            started = set(psutil.Process().children()) - before
            leaders = [c for c in started if os.getsid(c.pid) == c.pid]
            ranks[:] = [c.pid for c in sorted(leaders, key=lambda c: (c.create_time(), c.pid))]
            os.kill(ranks[-1], signal.SIGKILL)

    # Or in warm-up, where the others wait for it, if it had loaded its part by then.
    where = r"rank 1 of 2 was killed by SIGKILL in (load|prefill|decode)\b"
    with pytest.raises(RankError, match=where):
        LLM(str(nine), dtype="float32", tensor_parallel=2, progress=kill)
    assert len(ranks) == 2
    wait_until(lambda: not any(map(alive, ranks)), "no rank is left")


def test_ranks_end_when_their_caller_is_killed_in_the_middle_of_a_step(nine):
    code = (
        "from hotloop import LLM\n"
        f"llm = LLM({str(nine)!r}, dtype='float32', tensor_parallel=2, max_seq_len=300)\n"
        "stream = llm.stream([[7]], max_new_tokens=290, ignore_eos=True)\n"
        "next(stream)\n"
        "print(*(r.process.pid for r in llm._runner._ranks._ranks), flush=True)\n"
        "list(stream)\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    ranks = [int(pid) for pid in caller.stdout.readline().split()]
    assert len(ranks) == 2
    assert all(map(alive, ranks))
    caller.kill()
    caller.wait()
    wait_until(lambda: not any(map(alive, ranks)), "the ranks end by themselves")


def test_the_error_of_the_rank_that_reads_damaged_weights_comes_out(nine, tmp_path):
    for file in nine.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 250] = float("inf")  # the last rank's
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj.* the first at \[3, 250\]"):
        LLM(str(tmp_path), quant="int4-g32", dtype="float32", tensor_parallel=2)


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["right", "wrong"])
def test_torchrun_starts_the_ranks(nine, asked):
    degree = 2 if asked == "right" else 3
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
        *("-m", "hotloop", "generate", str(nine), "one", "--tp", str(degree)),
        *("--dtype", "float32", "-n", "5", "--json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)
    if asked == "wrong":
        assert done.returncode != 0
        assert "torchrun started 2 processes, but tensor_parallel is 3" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    llm = LLM(str(nine), dtype="float32")
    expected = llm.generate("one", max_new_tokens=5)
    assert json.loads(line)["token_ids"] == list(expected.token_ids)


# What is refused before anything starts.


def test_more_gpus_than_there_are_is_refused(nine, monkeypatch):
    monkeypatch.setattr("hotloop.engine.setup.resolve_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = EngineConfig(model=str(nine), tensor_parallel=4)
    with pytest.raises(UnsupportedError) as caught:
        prepare(config)
    assert str(caught.value) == "needs 4 GPUs, found 1"
    with pytest.raises(UnsupportedError, match=r"^needs 4 GPUs, found 1$"):
        ENGINE.check_device(config)  # as a sweep asks
    ENGINE.check_device(replace(config, tensor_parallel=1))


def test_one_named_gpu_for_several_ranks_is_refused(nine, monkeypatch):
    monkeypatch.setattr("hotloop.engine.setup.resolve_device", lambda _: torch.device("cuda", 1))
    config = EngineConfig(model=str(nine), tensor_parallel=2, device="cuda:1")
    with pytest.raises(ConfigError, match="'cuda:1' is one GPU, but tensor_parallel 2 needs one"):
        prepare(config)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tensor_parallel": 0}, ConfigError, "tensor_parallel must be 1 or more, not 0"),
        (
            {"all_reduce": "nccl"},
            ConfigError,
            "all_reduce 'nccl' chooses the all-reduce backend of several ranks, but",
        ),
        (
            {"all_reduce": "symm_mem", "tensor_parallel": 2},
            UnsupportedError,
            "all_reduce 'symm_mem' is a GPU backend, and those of CPUs are gloo and shm: leave it",
        ),
        ({"tensor_parallel": 10}, UnsupportedError, "cannot split 9 query heads.*9 work"),
        (
            {"tensor_parallel": 3, "quant": "int4-g64", "model": "narrow"},
            UnsupportedError,
            "in groups of 64 that share a scale; only 1 works",
        ),
    ],
)
def test_ranks_that_cannot_work_are_refused_with_what_does(nine, folder, options, error, message):
    model = str(folder if options.pop("model", None) else nine)
    with pytest.raises(error, match=message):
        LLM(model, **options)
