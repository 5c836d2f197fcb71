"""A server's programs are captured before the first request, and padding disturbs nobody.

Captures are emulated on a CPU: a graph is its program, whose results keep their place.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import N_TOKENS, write_random
from torch import Tensor

from hotloop import LLM, Grammar, SamplingParams
from hotloop.engine.core import Features, Step
from hotloop.engine.draft_control import DraftController
from hotloop.engine.forward import TorchForward
from hotloop.engine.graphs import MAX_GRAPHS
from hotloop.engine.memory import predict_memory
from hotloop.engine.programs import SERVED_FEATURES, served_features, serving_steps
from hotloop.engine.service import Service
from hotloop.engine.setup import Setup, prepare
from hotloop.kernels.attention import torch_attention
from hotloop.types import EngineConfig

OPTIONS: Sequence[dict[str, Any]] = (
    {},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 0.8, "seed": 1, "top_k": 9, "top_p": 0.9},
    {"temperature": 0.8, "seed": 1, "top_k": 100},
    {"top_p": 0.5, "temperature": 1.2, "seed": 2, "repetition_penalty": 1.2},
    {"presence_penalty": 0.4, "logprobs": 3},
    {"logit_bias": {4: 1}, "min_new_tokens": 3},
    {"logprobs": 0},
    {"grammar": Grammar(kind="regex", source="(the token )+[a-z]{1,9}")},
    {
        "grammar": Grammar(kind="json_object"),
        "temperature": 0.9,
        "seed": 3,
        "top_k": 30,
        "presence_penalty": 0.3,
        "logprobs": 1,
    },
)


class Graph:
    """A program as a graph: a replay writes to the tensors of the first run."""

    def __init__(self, program: Callable[[], Any], state: Sequence[Tensor]) -> None:
        self.program, saved = program, [tensor.clone() for tensor in state]
        self.result = program()
        for tensor, value in zip(state, saved, strict=True):
            tensor.copy_(value)

    def replay(self) -> None:
        found = self.program()
        if found is not None:
            for name, tensor in vars(self.result).items():
                if tensor is not None:
                    tensor.copy_(getattr(found, name))


@pytest.fixture
def _captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def capture(program: Any, _device: Any, state: Sequence[Tensor] = (), **_: Any) -> Any:
        graph = Graph(program, state)
        return graph, graph.result

    monkeypatch.setattr("hotloop.engine.graphs.capture", capture)
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: "the pool")
    monkeypatch.setattr(Setup, "captures", True)
    return


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("programs"), eos=range(0, N_TOKENS, 29))


PROMPTS = [[5 + i, *range(2, 2 + 9 * i)] for i in range(11)]


def asked(i: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=4 + 3 * i, **OPTIONS[i % len(OPTIONS)])


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[tuple[int, ...]]:
    with LLM(str(folder), dtype="bfloat16", prefill_chunk=16) as llm:
        return [llm.generate([p], asked(i))[0].token_ids for i, p in enumerate(PROMPTS)]


@pytest.mark.parametrize("draft", ["none", "ngram", "itself"])
@pytest.mark.usefixtures("_captures")
def test_nothing_is_captured_in_service_and_padded_rows_disturb_nobody(
    folder, alone, draft, monkeypatch
):
    monkeypatch.setattr("hotloop.engine.llm.n_multi_steps", lambda _: 4)
    draft = str(folder) if draft == "itself" else draft
    options = {"max_batch_size": 6, "draft": draft, "draft_tokens": 2, "prefill_chunk": 16}
    llm = LLM(str(folder), dtype="bfloat16", prefix_cache="tokens", **options)
    assert llm._runner._model.cache.n_seats == 7, "and a scratch seat"
    for i in (10, 9):  # in seats that the captured steps use, too
        assert llm.generate([PROMPTS[i]], asked(i))[0].token_ids == alone[i]
    with Service(llm) as service:
        made = llm._scheduler.n_programs
        again = service.submit(PROMPTS[9], asked(9))
        assert tuple(token for piece in again for token in piece.token_ids) == alone[9]
        for n in (1, 3, 5, 11):  # as many clients at once
            for first in range(0, len(PROMPTS), n):
                together = range(first, min(first + n, len(PROMPTS)))
                tickets = [service.submit(PROMPTS[i], asked(i)) for i in together]
                for i, ticket in zip(together, tickets, strict=True):
                    found = tuple(token for piece in ticket for token in piece.token_ids)
                    assert found == alone[i], (n, i)
        assert service.state().n_captured == 0
        assert llm._scheduler.n_programs == made > 0
    llm.close()


@pytest.mark.parametrize("draft", ["none", "exit-1"])
@pytest.mark.usefixtures("_captures")
def test_nothing_is_captured_in_service_whichever_seats_attention_slices(
    folder, draft, monkeypatch
):
    # PyTorch's attention, as compiled steps on a GPU have it: graphs for seats in order slice the
    # cache, and others copy the seats.
    attention = ("torch", torch_attention, [])
    monkeypatch.setattr("hotloop.engine.runner.choose_attention", lambda *_: attention)
    options = {"dtype": "float32", "max_seq_len": 110, "draft": draft, "draft_tokens": 1}
    prompts, sampling = PROMPTS[:6], [asked(i % 2) for i in range(6)]
    with LLM(str(folder), max_batch_size=3, draft_policy="always", **options) as llm:
        alone = [
            llm.generate([p], each)[0].token_ids for p, each in zip(prompts, sampling, strict=True)
        ]
        with Service(llm) as service:
            list(service.submit(prompts[0], sampling[0]))  # the next is alone in another seat
            for again in range(2):
                tickets = [service.submit(*each) for each in zip(prompts, sampling, strict=True)]
                for i, ticket in enumerate(tickets):
                    found = tuple(token for piece in ticket for token in piece.token_ids)
                    assert found == alone[i], (again, i)
            assert service.state().n_captured == 0


@pytest.mark.parametrize("draft", ["ngram", "exit-1", "self-int4-g32", "itself"])
@pytest.mark.usefixtures("_captures")
def test_several_steps_with_drafts_are_one_program(folder, draft, monkeypatch):
    monkeypatch.setattr("hotloop.engine.llm.n_multi_steps", lambda _: 4)
    draft = str(folder) if draft == "itself" else draft
    options = {"dtype": "float32", "max_seq_len": 90, "prefill_chunk": 16}
    drafting = LLM(str(folder), draft=draft, draft_tokens=2, draft_policy="always", **options)
    graphs = drafting._runner._stepper._graphs._kept

    def captured() -> set[Any]:
        return {program for program in graphs if program.part == "drafting steps"}

    made = captured()
    assert len(made) == 2, "of one draft, and of two"
    steps: list[Any] = []
    run = drafting._runner.run
    monkeypatch.setattr(drafting._runner, "run", lambda c: steps.append(c) or run(c))
    with LLM(str(folder), **options) as plain:
        for i, sampling in enumerate(OPTIONS[:8]):
            for ends in ({"max_new_tokens": 30}, {"ignore_eos": True}, {"max_new_tokens": 5}):
                params = SamplingParams(**sampling | ends)
                found, expected = (
                    llm.generate([PROMPTS[3]], params)[0] for llm in (drafting, plain)
                )
                assert found.token_ids == expected.token_ids
                assert found.text == expected.text
                counted = found.speculation
                assert counted.n_tokens == len(found.token_ids) - 1
                assert counted.n_tokens <= counted.n_steps + sum(counted.accepted)
            if i == 0:
                assert captured() == made, "those of greedy requests were captured before"
    assert (2, 2) in {(s.k, s.n_steps) for s in steps if isinstance(s, Step)}
    if draft == str(folder):
        assert counted.accepted == counted.proposed
    drafting.close()


@pytest.mark.parametrize("draft", ["none", "ngram+exit-1", "itself"])
@pytest.mark.usefixtures("_captures")
def test_nothing_is_captured_while_a_lone_request_decodes(folder, draft, monkeypatch):
    monkeypatch.setattr("hotloop.engine.llm.n_multi_steps", lambda _: 4)
    draft = str(folder) if draft == "itself" else draft
    llm = LLM(str(folder), draft=draft, draft_tokens=4, dtype="float32", max_seq_len=120)
    graphs, made = llm._runner._stepper._graphs, []
    monkeypatch.setattr(llm._runner, "asynchronous", True)  # as where programs are captured
    for options in OPTIONS:
        for i in range(2):
            goes_on = {"max_new_tokens": 60, "ignore_eos": "grammar" not in options}
            params = SamplingParams(**{"min_new_tokens": 0} | options | goes_on)
            n_before = graphs.n_captured
            pieces = llm.stream([PROMPTS[3 + i]], params)
            next(pieces)
            n_captured = graphs.n_captured
            made.append(n_captured - n_before)
            list(pieces)
            assert graphs.n_captured == n_captured, options
            assert made[-1] == 0 or i == 0, options
    assert made[0] == 0, "those of greedy requests were captured before"
    assert llm._scheduler.n_programs == graphs.n_captured
    llm.close()


def test_a_compiled_engine_with_drafts_compiles_before_it_is_ready(folder, monkeypatch):
    sizes: list[tuple[int, ...]] = []  # each is compiled once
    forward = TorchForward.__call__

    def record(self: Any, ids_BT: Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(tuple(ids_BT.shape))
        return forward(self, ids_BT, *args, **options)

    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    monkeypatch.setattr(TorchForward, "__call__", record)
    options = {"dtype": "float32", "draft": "ngram", "draft_tokens": 4}
    with LLM(str(folder), execution="compile", **options) as llm:
        before_ready = set(sizes)
        sizes.clear()
        stepper, controller = llm._runner._stepper, DraftController((0, 1, 2, 4), always=True)
        monkeypatch.setattr(stepper.drafters[0], "propose", lambda n, k, **_: torch.full((n, k), 7))
        monkeypatch.setattr(llm._scheduler, "controller", controller)
        llm.generate([PROMPTS[3]], max_new_tokens=12, ignore_eos=True)
    decoded = {(1, T) for T in (1, 2, 3, 5)}  # near the end there are fewer drafts
    assert decoded <= set(sizes)
    assert decoded <= before_ready


def test_a_compiled_engine_compiles_before_it_is_ready(folder):
    llm = LLM(str(folder), dtype="float32", execution="compile", max_batch_size=2)
    with Service(llm) as service:
        for params in map(asked, range(len(OPTIONS))):
            for ticket in [service.submit([7, i], params) for i in range(3)]:
                list(ticket)
        assert service.state().n_captured == 0
    llm.close()


def test_served_features_are_ascending_and_the_last_ones_are_all(folder):
    features = served_features(prepare(EngineConfig(model=str(folder))))
    *_, everything = features
    for params in (SamplingParams(**options) for options in OPTIONS):
        assert everything.includes(Features.of([params]))
    for i, smaller in enumerate(features):
        assert not any(smaller.includes(larger) for larger in features[i + 1 :])
    for with_grammars in (False, True):
        alike = [each for each in features if each.constrain == with_grammars]
        for i, smaller in enumerate(alike):
            assert all(larger.includes(smaller) for larger in alike[i:])


@pytest.mark.parametrize(("fused", "n_positions"), [(True, 131_072), (False, 8192)])
def test_no_graph_of_a_server_is_evicted(fused, n_positions):
    setup: Any = SimpleNamespace(
        config=SimpleNamespace(max_batch_size=32, draft_tokens=4),
        draft=SimpleNamespace(names=["ngram"]),
        captures=True,
        makes_programs=True,
        has_tokenizer=True,
        fused=fused,
        device=torch.device("cuda"),
        n_positions=n_positions,
    )
    graphs = set()
    for step in serving_steps(setup, 8):
        features, size = step.features, (step.n, step.k)
        if fused:
            features = dataclasses.replace(features, truncate=False, n_candidates=0)
        if step.k and step.n_steps == 1:
            sampling = dataclasses.replace(features, logprobs=False, constrain=False)
            graphs.add(("draft", *size, step.longest, sampling))
        if features.constrain:
            graphs |= {("forward", *size, step.longest), ("choose", *size, features)}
        else:
            graphs.add(("step", *size, step.longest, features, step.n_steps))
    assert 100 < len(graphs) <= MAX_GRAPHS


def test_no_programs_are_made_for_grammars_that_there_cannot_be(folder, monkeypatch):
    setup = prepare(EngineConfig(model=str(folder), weights="random"))
    assert served_features(setup) == SERVED_FEATURES
    monkeypatch.setattr("hotloop.engine.programs.find_spec", lambda _: None)
    assert served_features(prepare(EngineConfig(model=str(folder)))) == SERVED_FEATURES


@pytest.mark.usefixtures("_captures")
def test_programs_and_the_scratch_seat_are_in_the_memory_forecast(folder):
    config = EngineConfig(model=str(folder), device="cpu", max_batch_size=6)
    plan, served = (predict_memory(config, served=served) for served in (False, True))
    with LLM(config) as llm:
        cache = llm._runner._model.cache
        assert plan.cache_bytes == sum(tensor.nbytes for tensor in cache.buffers())
        made_before = llm._scheduler.n_programs
        with Service(llm):
            n_made = llm._scheduler.n_programs - made_before
    assert served.workspace_bytes - plan.workspace_bytes >= n_made * 2**20
    assert served.cache_bytes == plan.cache_bytes


def test_positions_of_unused_rows_begin_again_where_attention_reads_little():
    from hotloop.engine.rows import Rows

    rows = Rows(4, 16, 0, torch.device("cpu"), scratch=4)
    rows.positions[:] = torch.tensor([9, 8, 7, 6])
    rows.place((2, 0))
    assert rows.seats.tolist() == [2, 0, 4, 4]
    assert rows.positions.tolist() == [9, 8, 0, 0]
    rows.positions[2] = 5  # a request is admitted
    rows.place((2, 0, 1))
    assert rows.seats.tolist() == [2, 0, 1, 4]
    assert rows.positions.tolist() == [9, 8, 5, 0]


def test_requests_together_need_what_any_of_them_needs():
    a, b = SamplingParams(temperature=1.0, top_k=5), SamplingParams(temperature=1.0, min_p=0.1)
    c, d = SamplingParams(temperature=1.0, top_p=0.5, logprobs=1), SamplingParams(n=2)
    assert Features.of([a, d]) == Features(draw=True, truncate=True, n_candidates=64)
    assert Features.of([b]) == Features(draw=True, truncate=True)
    assert Features.of([a, c, b]).n_candidates is None
    assert Features.of([d, a, c]) == Features.of([c]) | Features.of([a])
    assert Features.of([SamplingParams(top_k=5, min_p=0.1)]) == Features(), "greedy"
