"""CUDA graphs of programs that run again and again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

MOST_GRAPHS = 64
"""More than the sizes of step that one kind of traffic needs; each holds some megabytes."""


class Graphs:
    """CUDA graphs of programs that run again and again; the least recently used ones go.

    All share one pool of memory. The results of a program are therefore valid until another one
    runs; the copy to the host comes before that in the stream.

    Args:
        device: The device.
        most: The most graphs to keep; None for ``MOST_GRAPHS``.

    Attributes:
        n_captured: Graphs captured so far.
    """

    def __init__(self, device: torch.device, most: int | None = None) -> None:
        self.n_captured = 0
        self._device, self._most = device, most or MOST_GRAPHS
        self._pool: Any = None
        self._kept: OrderedDict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = OrderedDict()

    def run(self, key: Hashable, program: Callable[[], Result], state: Sequence[Tensor]) -> Result:
        """Replays the graph of a program, which is captured first if there is none.

        Args:
            key: Identifies the program.
            program: See ``capture``.
            state: See ``capture``.

        Returns:
            The program's results.
        """
        if key in self._kept:
            self._kept.move_to_end(key)
        else:
            if len(self._kept) >= self._most:
                torch.cuda.synchronize(self._device)  # the one that goes may be running
                self._kept.popitem(last=False)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            self._kept[key] = capture(program, self._device, state, pool=self._pool)
            self.n_captured += 1
        graph, result = self._kept[key]
        graph.replay()
        return result


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
        run: It is called before the capture too, since compilation and lazy handles must come
            first. The cache needs no restoring: the graph writes the same positions again.
        device: The device.
        state: Tensors that those calls change, and that are restored after each.
        runs_before: The number of such calls; 0 where it has run already.
        pool: Memory shared with other graphs: results are there until any of them is replayed.

    Returns:
        The graph, and the tensors that a replay writes its results to.
    """
    saved = [tensor.clone() for tensor in state]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(runs_before):
            run()
            for tensor, value in zip(state, saved, strict=True):
                tensor.copy_(value)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads go on meanwhile: NCCL's, which looks after its work, and a rank's, which waits
    # for the tokens of the step before.
    # On a stream of this device: torch's own for captures is the first device's that had one.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = run()
    return graph, result
