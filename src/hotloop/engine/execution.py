"""How a decode step runs: plainly, or compiled, and on a GPU as one CUDA graph.

A step is one program on the device: embed, layers, logits, sample, advance. It reads its tokens
and positions from the slots and leaves the next ones there, so that steps can follow each other
without the host. What the host learns of a step is a ``Sampled`` of its own.

``eager`` runs it operation by operation. ``compile`` hands the model part to torch.compile and, on
a GPU, captures each size of step once in a CUDA graph. The sampler is never compiled: it is small,
it has many variants, and inside the graph it costs no launches.

Shape letters: B rows of a step, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from hotloop.cache import cache_dir
from hotloop.engine.sampling import Features, Sampled, Sampler
from hotloop.models.cache import KVCache
from hotloop.models.decoder import Decoder

SMALLEST_LENGTH = 256
"""Attention reads at least this many cache positions; beyond, the next power of two."""

_COMPILER_OPTIONS: dict[str, dict[str, str | int | bool | Callable[..., Any]]] = {
    # The generated kernels of a step are tiny, and our own ones have threads already.
    "cpu": {"cpp.threads": 1, "size_asserts": False},
    "cuda": {"coordinate_descent_tuning": True},
}

StepKey = tuple[int, int, Features]
"""Rows, length of cache that is read, and sampler features: one CUDA graph each."""


class Stepper:
    """Runs decode steps over the slots of a cache.

    Attributes:
        ids: int64 [S], the newest token of each slot, not yet in the cache.
        positions: int64 [S], where that token belongs.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        sampler: Sampler,
        *,
        execution: Literal["eager", "compile"],
        reads_whole_cache: bool,
        device: torch.device,
    ) -> None:
        self.decoder, self.cache, self.sampler = decoder, cache, sampler
        self.ids = torch.zeros(cache.n_slots, dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.ids)
        self.device, self.execution = device, execution
        self.reads_whole_cache = reads_whole_cache
        self._forward: Callable[[Tensor, Tensor, int], Tensor] = self._logits
        self._graphs: dict[StepKey, tuple[torch.cuda.CUDAGraph, Sampled]] = {}
        if execution == "compile":
            # Without this, artifacts land in a temporary directory: the next boot compiles again.
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))
            options = _COMPILER_OPTIONS[device.type]
            self._forward = torch.compile(self._logits, fullgraph=True, options=options)

    def step(self, n: int, longest: int, features: Features) -> Sampled:
        """One token for each of the first ``n`` slots.

        Args:
            n: Rows; slots among them that hold nothing compute something harmless.
            longest: Exceeds every position in use.
            features: What the sampler must do.

        Returns:
            Tensors that stay as they are until the next step of the same key.
        """
        key = (n, self.length(longest), features)
        if self.execution == "eager" or self.device.type != "cuda":
            return self._step(*key)
        if key not in self._graphs:
            self._graphs[key] = self._capture(key)
        graph, sampled = self._graphs[key]
        graph.replay()
        return sampled

    def length(self, longest: int) -> int:
        """How much of the cache a step reads that must see ``longest`` positions."""
        if self.reads_whole_cache:
            return self.cache.n_positions
        length = max(SMALLEST_LENGTH, 1 << (longest - 1).bit_length())
        return min(length, self.cache.n_positions)

    def _step(self, n: int, length: int, features: Features) -> Sampled:
        ids, positions = self.ids[:n], self.positions[:n]
        logits = self._forward(ids[:, None], positions[:, None], length)
        sampled = self.sampler.sample(logits, positions[:, None] + 1, 0, features)
        if features.penalize:
            self.sampler.remember(sampled.ids, 0)
        ids.copy_(sampled.ids[:, 0])
        # A finished slot may run one step too many: it must not write beyond the cache.
        positions.add_(1).clamp_(max=self.cache.n_positions - 1)
        return sampled

    def _logits(self, ids_BT: Tensor, positions_BT: Tensor, length: int) -> Tensor:
        return self.decoder.logits(self.decoder(ids_BT, positions_BT, self.cache, length=length))

    def _capture(self, key: StepKey) -> tuple[torch.cuda.CUDAGraph, Sampled]:
        # Compilation and lazy handles must come before the capture, and what those runs do to the
        # slots must be undone after them; the cache needs no undoing, they write at positions that
        # the step itself is about to write.
        saved = self.ids.clone(), self.positions.clone(), self.sampler.seen_SV.clone()

        def restore() -> None:
            for tensor, value in zip(
                (self.ids, self.positions, self.sampler.seen_SV), saved, strict=True
            ):
                tensor.copy_(value)

        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step(*key)
                restore()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile: NCCL's, which looks after its work, and a rank's, which
        # waits for the tokens of the step before.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            sampled = self._step(*key)
        return graph, sampled


def compile_unavailable_reason(device: torch.device) -> str | None:
    """Why torch.compile cannot generate code for a device here, or None if it can."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "torch.compile on CUDA needs triton, which is not installed (pip install triton)"
        return None
    if not (os.environ.get("CXX") or any(map(shutil.which, ("g++", "c++", "clang++")))):
        return "torch.compile on a CPU needs a C++ compiler (install g++, or set CXX)"
    return None


def compile_cache_state() -> Literal["cold", "warm"] | None:
    """Whether this process's compiled graphs came from the cache; None if none were compiled."""
    from torch._dynamo.utils import counters

    seen = counters["inductor"]
    if seen["fxgraph_cache_miss"] or seen["fxgraph_cache_bypass"]:
        return "cold"
    # A hit of the outer cache (AOTAutograd's) never asks the inner one.
    if seen["fxgraph_cache_hit"] or counters["aot_autograd"]["autograd_cache_hit"]:
        return "warm"
    return None
