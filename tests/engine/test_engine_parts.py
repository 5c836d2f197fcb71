"""A decoder compiled by parts, as on GPUs, gives what the whole gives, and each part once."""

import collections
import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import N_TOKENS, write_random
from torch._dynamo.utils import counters

from hotloop import LLM
from hotloop.engine.forward import CompileWatch, TorchForward
from hotloop.engine.graphs import Graphs, IfNodes, PaddedGraphs, capture

CPU = torch.device("cpu")
N_LAYERS = 3
N_PARTS = 3  # embedding, block, logits


@pytest.mark.parametrize(("quant", "width"), [("none", 64), ("int8", 96)])
def test_parts_give_the_logits_of_the_whole_and_a_block_is_compiled_once_for_all_layers(
    tmp_path, quant, width
):
    folder = write_random(tmp_path, n_layers=N_LAYERS, hidden_size=width)
    model = LLM(str(folder), dtype="float32", quant=quant)._runner._model
    whole, parts = (
        TorchForward(model.decoder, model.cache, compiled=compiled, by_parts=compiled, device=CPU)
        for compiled in (False, True)
    )
    before = counters["stats"]["unique_graphs"]
    with torch.inference_mode():
        for start, T in ((0, 2), (2, 1), (3, 2), (5, 1)):
            ids_BT = torch.arange(start, start + T)[None] * 37 % N_TOKENS
            positions_BT = torch.arange(start, start + T)[None]
            inputs = (ids_BT, positions_BT, torch.zeros(1, dtype=torch.int64))
            expected, _ = whole(*inputs, first_seat=0, length=64)
            logits, _ = parts(*inputs, first_seat=0, length=64)
            torch.testing.assert_close(logits, expected)
    assert counters["stats"]["unique_graphs"] - before == N_PARTS * len({1, 2})


def test_graphs_share_a_pool_and_the_least_recently_used_goes(monkeypatch):
    captured = []

    class Graph:
        def replay(self) -> None:
            replayed.append(self)

    def capture(program, _device, state, *, pool):
        captured.append((program(), state, pool))
        return Graph(), program()

    replayed: list[Graph] = []
    monkeypatch.setattr("hotloop.engine.graphs.capture", capture)
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: "the pool")
    monkeypatch.setattr("torch.cuda.synchronize", lambda _: None)
    graphs = Graphs(torch.device("cuda", 1), 2)
    for key in "abacab":
        assert graphs.run(key, lambda key=key: key.upper(), ()) == key.upper()
    assert [name for name, _, _ in captured] == ["A", "B", "C", "B"]
    assert {pool for _, _, pool in captured} == {"the pool"}
    assert (len(replayed), graphs.n_captured) == (6, 4)


def test_padded_graphs_share_a_pool_and_the_next_larger_one_is_replayed(monkeypatch):
    ran, pools = [], []

    class Graph:
        def __init__(self, program) -> None:
            self.program = program

        def pool(self) -> str:
            return "the first one's"

        def replay(self) -> None:
            self.program()

    def capture(program, _device, *, runs_before, pool):
        assert runs_before == 1
        pools.append(pool)
        return Graph(program), None

    monkeypatch.setattr("hotloop.engine.graphs.capture", capture)
    graphs = PaddedGraphs({2, 6, 4}, CPU)
    assert not graphs
    pool = graphs.capture(lambda ids_T: ran.append(ids_T.tolist()))
    assert (len(graphs), pools, pool) == (3, [None, *["the first one's"] * 2], "the first one's")
    assert [graphs.padded(n) for n in (1, 2, 5, 7)] == [2, 2, 6, math.inf]
    for n in (3, 2, 5):
        graphs.replay(torch.arange(1, n + 1))
    assert ran == [[1, 2, 3, 0], [1, 2], [1, 2, 3, 4, 5, 0]]


class Driver:
    """The calls of the CUDA driver that make an IF node while a stream is being captured."""

    CUgraphNodeType = SimpleNamespace(CU_GRAPH_NODE_TYPE_CONDITIONAL="conditional")
    CUgraphConditionalNodeType = SimpleNamespace(CU_GRAPH_COND_TYPE_IF="if")
    CUstreamUpdateCaptureDependencies_flags = SimpleNamespace(
        CU_STREAM_SET_CAPTURE_DEPENDENCIES="set"
    )
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL="thread")

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.newest: Any = "kernel before"

    def answer(self, *values: Any) -> tuple[Any, ...]:
        return SimpleNamespace(value=0, name="success"), *values

    def CUgraphNodeParams(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(conditional=SimpleNamespace(phGraph_out=["body"]))

    def cuStreamGetCaptureInfo(self, stream: int) -> Any:  # noqa: N802
        assert stream == 1
        return self.answer("active", 5, "graph", [self.newest], [None], 1)

    def cuCtxGetCurrent(self) -> Any:  # noqa: N802
        return self.answer("context")

    def cuGraphConditionalHandleCreate(self, *of: Any) -> Any:  # noqa: N802
        assert of == ("graph", "context", 0, 0)
        return self.answer(77)

    def cuGraphAddNode(self, graph: str, after: Any, _: Any, n: int, node: Any) -> Any:  # noqa: N802
        made = node.conditional
        assert (graph, node.type, made.type, made.size, n) == ("graph", "conditional", "if", 1, 1)
        assert (made.handle, made.ctx) == (77, "context")
        self.calls.append(("node after", *after))
        return self.answer("node")

    def cuStreamUpdateCaptureDependencies(self, stream: int, nodes: Any, *how: Any) -> Any:  # noqa: N802
        assert (stream, how) == (1, (None, 1, "set"))
        (self.newest,) = nodes
        return self.answer()

    def cuStreamBeginCaptureToGraph(self, stream: int, graph: str, *how: Any) -> Any:  # noqa: N802
        assert how == (None, None, 0, "thread")
        self.calls.append(("begin", stream, graph))
        return self.answer()

    def cuStreamEndCapture(self, stream: int) -> Any:  # noqa: N802
        self.calls.append(("end", stream))
        return self.answer("body")


def test_a_part_of_a_captured_program_is_the_body_of_an_if_node(monkeypatch):
    driver, inside, captures = Driver(), [], True

    @contextmanager
    def entered(what: Any, *_: Any) -> Iterator[None]:
        inside.append(what if isinstance(what, str) else what.cuda_stream)
        try:
            yield
        finally:
            inside.pop()

    monkeypatch.setattr("hotloop.engine.graphs.driver_bindings", lambda: driver)
    monkeypatch.setattr(
        "hotloop.engine.graphs._body_stream", lambda _: SimpleNamespace(cuda_stream=2)
    )
    monkeypatch.setattr("torch.cuda.MemPool", lambda: "pool")
    monkeypatch.setattr("torch.cuda.use_mem_pool", entered)
    monkeypatch.setattr("torch.cuda.stream", entered)
    monkeypatch.setattr("torch.cuda.current_stream", lambda _: SimpleNamespace(cuda_stream=1))
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: captures)
    nodes = IfNodes(CPU)

    def decide(handle: int | None) -> None:
        driver.newest = "deciding kernel"
        driver.calls.append(("decide", handle, *inside))

    def body() -> None:
        driver.calls.append(("body", *inside))

    nodes.run(decide, body)
    assert driver.calls == [
        ("decide", 77),
        ("node after", "deciding kernel"),
        ("begin", 2, "body"),
        ("body", 2, "pool"),
        ("end", 2),
    ]
    assert driver.newest == "node", "what follows waits for it"
    with pytest.raises(ZeroDivisionError):
        nodes.run(decide, lambda: 1 / 0)
    assert driver.calls[-1] == ("end", 2), "before the capture around it ends"
    driver.calls, captures = [], False
    nodes.run(decide, body)
    assert driver.calls == [("decide", None), ("body",)], "a warm-up runs all"


def test_what_other_engines_compiled_does_not_count(monkeypatch):
    counters = collections.defaultdict(collections.Counter)
    monkeypatch.setattr("torch._dynamo.utils.counters", counters)
    counters["inductor"]["fxgraph_cache_miss"] += 1
    watch = CompileWatch()
    assert watch.state() is None
    counters["aot_autograd"]["autograd_cache_hit"] += 1
    assert watch.state() == "warm"
    counters["inductor"]["fxgraph_cache_bypass"] += 1
    assert watch.state() == "cold"


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_garbage_collected_during_a_capture_even_if_it_fails(monkeypatch, enabled):
    stream = SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr("hotloop.engine.graphs._capture_stream", lambda _: stream)
    monkeypatch.setattr("torch.cuda.current_stream", lambda _: stream)
    monkeypatch.setattr("torch.cuda.stream", lambda _: contextmanager(lambda: iter([None]))())
    monkeypatch.setattr("torch.cuda.CUDAGraph", SimpleNamespace)
    inside = []

    @contextmanager
    def recording(*_args: Any, **_options: Any) -> Iterator[None]:
        inside.append(gc.isenabled())
        yield
        inside.append(gc.isenabled())

    monkeypatch.setattr("torch.cuda.graph", recording)
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        capture(lambda: inside.append(gc.isenabled()), CPU, runs_before=0)
        assert inside == [False] * 3
        assert gc.isenabled() is enabled
        with pytest.raises(ZeroDivisionError):
            capture(lambda: 1 / 0, CPU, runs_before=0)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
