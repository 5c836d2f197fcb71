"""Captures and replays CUDA graphs."""

from __future__ import annotations

import gc
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from hotloop.kernels.cuda.launch import checked, driver_bindings

Result = TypeVar("Result")

MAX_GRAPHS = 1536
"""The most captured graphs that are kept. It exceeds the number of programs (``programs``) that a
server of 32 rows needs, with drafts and a context of 8,192 tokens in ``compile``, or any context in
``fused``. Each graph takes some megabytes."""


class Graphs:
    """An LRU cache of captured CUDA graphs, keyed by program.

    All graphs share one memory pool. The results of a program are therefore valid until another
    program runs; their copy to the host precedes that in the stream.

    Args:
        device: The device.
        most: The most graphs to keep; None for ``MAX_GRAPHS``.

    Attributes:
        n_captured: Graphs captured so far.
    """

    def __init__(self, device: torch.device, most: int | None = None) -> None:
        self.n_captured = 0
        self._device, self._most = device, most or MAX_GRAPHS
        self._pool: Any = None
        self._kept: OrderedDict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = OrderedDict()

    def run(self, key: Hashable, program: Callable[[], Result], state: Sequence[Tensor]) -> Result:
        """Replays the graph of a program, capturing it first if there is none.

        Args:
            key: Identifies the program.
            program: See ``capture``.
            state: See ``capture``.

        Returns:
            The program's results.
        """
        self.make(key, program, state)
        graph, result = self._kept[key]
        graph.replay()
        return result

    def make(self, key: Hashable, program: Callable[[], object], state: Sequence[Tensor]) -> None:
        """Captures a program unless there is a graph of it, which becomes the newest.

        The arguments are those of ``run``.
        """
        if key in self._kept:
            self._kept.move_to_end(key)
        else:
            if len(self._kept) >= self._most:
                torch.cuda.synchronize(self._device)  # the evicted graph may be running
                self._kept.popitem(last=False)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            self._kept[key] = capture(program, self._device, state, pool=self._pool)
            self.n_captured += 1


class PaddedGraphs:
    """CUDA graphs of a program that takes T tokens, captured for some values of T.

    Args:
        sizes: The values of T.
        device: The device.
    """

    def __init__(self, sizes: Collection[int], device: torch.device) -> None:
        self._sizes, self._device = sorted(sizes), device
        self._ids = torch.zeros(self._sizes[-1], dtype=torch.int64, device=device)
        self._captured: dict[int, torch.cuda.CUDAGraph] = {}

    def capture(self, run: Callable[[Tensor], object], pool: Any = None) -> Any:
        """Captures a program for every size.

        Args:
            run: Runs the program on token ids [T].
            pool: Memory pool shared with other graphs; None for a new one.

        Returns:
            The pool.
        """
        for size in reversed(self._sizes):
            program = partial(run, self._ids[:size])
            graph, _ = capture(program, self._device, runs_before=1, pool=pool)
            pool = graph.pool()
            self._captured[size] = graph
        return pool

    def padded(self, n: int) -> float:
        """Returns the size that ``n`` tokens are padded to; infinity above the largest."""
        return next((size for size in self._sizes if size >= n), math.inf)

    def __len__(self) -> int:
        return len(self._captured)

    def replay(self, ids_T: Tensor) -> None:
        """Replays the graph of the smallest size that holds these ids, padded by arbitrary ids."""
        size = self.padded(len(ids_T))
        self._ids[: len(ids_T)] = ids_T
        self._captured[int(size)].replay()


class IfNodes:
    """Conditional parts of a CUDA graph: a replay runs them only if a kernel has decided so.

    Each becomes the body of an IF node (a *conditional node*, CUDA 12.4). torch has no API for such
    nodes, so a body is a separate capture on a stream of its own. The tensors that torch allocates
    in bodies come from a memory pool of their own, not from that of the graph around them. That
    pool's memory is never released to others; within the pool, later bodies can reuse the memory of
    earlier ones, as in a single capture.

    A body can contain kernels, copies and memsets of device memory, and other IF nodes. It cannot
    contain collectives of NCCL, nor can the graph around it.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.MemPool()

    def run(self, decide: Callable[[int | None], None], body: Callable[[], None]) -> None:
        """Adds an IF node to the graph that is being captured.

        If no graph is being captured, it calls ``decide`` and runs the body unconditionally.

        Args:
            decide: Launches a kernel that sets the condition of the node with this handle; None if
                no graph is being captured. Neither that kernel nor the body may overlap with
                neighboring kernels, since an IF node has no programmatic edges.
            body: The conditional work.

        Raises:
            LaunchError: A call of the driver failed.
        """
        if not torch.cuda.is_current_stream_capturing():
            decide(None)
            body()
            return
        driver, outer = driver_bindings(), torch.cuda.current_stream(self._device).cuda_stream
        _, _, graph, *_ = checked(driver.cuStreamGetCaptureInfo(outer))
        context = checked(driver.cuCtxGetCurrent())
        handle = checked(driver.cuGraphConditionalHandleCreate(graph, context, 0, 0))
        decide(int(handle))
        _, _, _, after, _, n_after = checked(driver.cuStreamGetCaptureInfo(outer))
        node = driver.CUgraphNodeParams()
        node.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        node.conditional.handle, node.conditional.ctx = handle, context
        node.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_IF
        node.conditional.size = 1
        added = checked(driver.cuGraphAddNode(graph, after, None, n_after, node))
        replaces = driver.CUstreamUpdateCaptureDependencies_flags.CU_STREAM_SET_CAPTURE_DEPENDENCIES
        checked(driver.cuStreamUpdateCaptureDependencies(outer, [added], None, 1, replaces))
        self._capture(node.conditional.phGraph_out[0], outer, body)

    def _capture(self, graph: Any, outer: int, body: Callable[[], None]) -> None:
        """Captures a body into its graph."""
        driver, stream = driver_bindings(), _body_stream(self._device)
        assert stream.cuda_stream != outer, "this stream captures the outer graph"
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        checked(driver.cuStreamBeginCaptureToGraph(stream.cuda_stream, graph, None, None, 0, mode))
        try:
            with torch.cuda.stream(stream), torch.cuda.use_mem_pool(self._pool, self._device):
                body()
        finally:  # after errors too, before the outer capture ends
            ended = driver.cuStreamEndCapture(stream.cuda_stream)
        checked(ended)


def capture(
    run: Callable[[], Result],
    device: torch.device,
    state: Sequence[Tensor] = (),
    *,
    runs_before: int = 2,
    pool: Any = None,
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Captures the work of ``run`` in a CUDA graph.

    Args:
        run: The work. Warm-up calls before the capture trigger compilation and the creation of
            library handles. The KV cache is not restored after them: a replay rewrites the same
            positions.
        device: The device.
        state: Tensors that ``run`` changes; they are restored after each warm-up call.
        runs_before: Number of warm-up calls; 0 if ``run`` has run before.
        pool: Memory pool shared with other graphs: results are valid until one of them is replayed.

    Returns:
        The graph, and the tensors that a replay writes its results to.
    """
    saved = [tensor.clone() for tensor in state]
    stream = _capture_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(runs_before):
            run()
            for tensor, value in zip(state, saved, strict=True):
                tensor.copy_(value)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # thread_local: NCCL's watchdog, and a rank's thread that waits for the previous step's tokens,
    # make CUDA calls during the capture. The stream is given, since torch's default capture stream
    # belongs to the first device that captured.
    recording = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
    with no_garbage_collection(), recording:
        result = run()
    return graph, result


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keeps Python's garbage collector from running by itself.

    It may find an earlier engine that was not closed, and destroy its graphs: a call that CUDA
    refuses in a thread that captures, and that invalidates the capture.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the stream of all captures on a device: cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream(device)


@cache
def _body_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the stream on which bodies of IF nodes are captured."""
    return torch.cuda.Stream(device)
