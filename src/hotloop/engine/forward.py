"""The forward of a step in PyTorch: plain, or compiled by torch.compile.

On a GPU torch.compile compiles the decoder by parts, and all layers share the code of one block; on
a CPU it compiles the whole. The sampler is never compiled: it has too many variants.

Shape letters: B rows of a step, T positions of each, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hotloop.cache import writable_cache_dir
from hotloop.engine.cpu_blocks import eager_run
from hotloop.models.cache import KVCache
from hotloop.models.decoder import Block, Decoder, Run

_Options = dict[str, Any]

_CPU_OPTIONS: _Options = {"cpp.threads": 1, "size_asserts": False}
"""The kernels that Inductor generates for a step are too small for threads; our own kernels use
their own threads."""

_CUDA_OPTIONS: tuple[_Options, _Options] = ({"coordinate_descent_tuning": True}, {})
"""Options of Inductor for steps with one token of each sequence, and with several.

Tuning compiles and times many variants of each kernel during warm-up. It pays with one row only:
there Inductor generates the GEMVs itself.
"""

_MAX_SPECIALIZATIONS = 64
"""The most shapes (rows, positions, cache lengths) that one function is compiled for."""


class Forward(Protocol):
    """The model's forward in a step."""

    def __call__(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor,
        seats_B: Tensor,
        *,
        first_seat: int | None,
        length: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes logits [B, T, V] of tokens, with the KV cache.

        Args:
            ids_BT: int64, the tokens.
            positions_BT: int64, their positions.
            seats_B: int64, the seats of their sequences; see ``Decoder.forward``.
            first_seat: See ``Decoder.forward``.
            length: A number above every position.

        Returns:
            The logits, float32, and their argmax, int64 [B, T], over the ids that can be selected;
            None instead of the argmax if the forward does not compute it.
        """
        ...


class TorchForward:
    """The decoder as a ``Forward``, in PyTorch.

    torch.compile traces a function operation by operation: tracing 80 layers takes many seconds for
    each size of step, even if code is generated for one layer only (a nested region). Compiled by
    parts, it traces one layer, and the host calls the code 80 times. That suits a CUDA graph, which
    captures the calls once, but is too slow if the host repeats the calls in each step.

    Args:
        decoder: The model.
        cache: Its cache.
        compiled: Compile with torch.compile.
        by_parts: Compile the decoder's parts (embedding, blocks, head) separately, not the whole.
        device: The device of the model.
        n_layers: Number of first layers to run; None runs all.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        *,
        compiled: bool,
        by_parts: bool,
        device: torch.device,
        n_layers: int | None = None,
    ) -> None:
        def logits_with(run: Run) -> Callable[[Tensor, Tensor, Tensor, int | None, int], Tensor]:
            """Returns the function from tokens to logits whose parts ``run`` calls."""

            def logits(
                ids_BT: Tensor,
                positions_BT: Tensor,
                seats_B: Tensor,
                first_seat: int | None,
                length: int,
            ) -> Tensor:
                hidden = decoder(
                    ids_BT,
                    positions_BT,
                    cache,
                    seats_B=seats_B,
                    first_seat=first_seat,
                    length=length,
                    n_layers=n_layers,
                    run=run,
                )
                return run(Decoder.logits, decoder, hidden)

            return logits

        if not compiled:
            self._single_token = self._several_tokens = logits_with(eager_run(decoder))
            return
        # By default, artifacts go to a temporary directory, which a reboot may empty.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(writable_cache_dir() / "inductor"))
        single, several = _CUDA_OPTIONS if device.type == "cuda" else (_CPU_OPTIONS, _CPU_OPTIONS)
        if by_parts:
            self._single_token = logits_with(_Parts(single))
            self._several_tokens = logits_with(_Parts(several))
        else:
            self._single_token = _compiled(logits_with(_nested), single)
            self._several_tokens = _compiled(logits_with(_nested), several)

    def __call__(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor,
        seats_B: Tensor,
        *,
        first_seat: int | None,
        length: int,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``Forward``."""
        logits = self._single_token if ids_BT.shape[1] == 1 else self._several_tokens
        return logits(ids_BT, positions_BT, seats_B, first_seat, length), None


class _Parts:
    """A ``Run`` that compiles each part separately."""

    def __init__(self, options: _Options) -> None:
        self._options = options
        self._code: dict[Callable[..., Any], Callable[..., Any]] = {}

    def __call__(self, part: Callable[..., Any], /, *args: Any) -> Any:
        if part not in self._code:
            self._code[part] = _compiled(part, self._options)
        return self._code[part](*args)


_block_region = torch.compiler.nested_compile_region(Block.forward)


def _nested(part: Callable[..., Any], /, *args: Any) -> Any:
    """Runs parts while torch.compile traces: blocks are one nested region, compiled once."""
    return _block_region(*args) if part is Block.forward else part(*args)


def _compiled(function: Callable[..., Any], options: _Options) -> Callable[..., Any]:
    """Compiles a function with torch.compile, separately for each number of rows and tokens."""
    # torch.compile caches by code object: a copy gives each model its own cache.
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        closure=function.__closure__,
    )
    guarded = {"", *own.__code__.co_varnames[: own.__code__.co_argcount]} - {"self"}

    def guards_kept(guards: Sequence[Any]) -> list[bool]:
        # Keeps guards on arguments and global state. A loaded model does not change and its layers
        # are alike; guards on its hundreds of tensors take a tenth of a step on a CPU.
        return [guard.name in guarded for guard in guards]

    options = options | {"guard_filter_fn": guards_kept}
    code = torch.compile(own, fullgraph=True, options=options)

    def run(*args: Any) -> Any:
        # Static shapes give faster code; only the cache length is dynamic.
        for arg in args:
            if isinstance(arg, Tensor):
                torch._dynamo.mark_static(arg)
        # A float that differs between models, such as a norm's epsilon, would otherwise become an
        # input, which nested regions do not support.
        with torch._dynamo.config.patch(
            recompile_limit=_MAX_SPECIALIZATIONS, specialize_float=True
        ):
            return code(*args)

    return run


def compile_unavailable_reason(device: torch.device) -> str | None:
    """Returns why torch.compile cannot generate code for a device here; None if it can."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "torch.compile on CUDA needs triton, which is not installed (pip install triton)"
        return None
    if not (os.environ.get("CXX") or any(map(shutil.which, ("g++", "c++", "clang++")))):
        return "torch.compile on a CPU needs a C++ compiler (install g++, or set CXX)"
    return None


class CompileWatch:
    """Observes whether graphs compiled since its creation came from the compile cache."""

    def __init__(self) -> None:
        self._before = self._counts()

    def state(self) -> Literal["cold", "warm"] | None:
        """Returns ``cold`` if any graph missed the cache, else ``warm``; None without graphs."""
        made, found = (n - before for n, before in zip(self._counts(), self._before, strict=True))
        return "cold" if made else "warm" if found else None

    @staticmethod
    def _counts() -> tuple[int, int]:
        """Counts this process's misses and hits of the compile cache."""
        from torch._dynamo.utils import counters

        inner, outer = counters["inductor"], counters["aot_autograd"]
        made = inner["fxgraph_cache_miss"] + inner["fxgraph_cache_bypass"]
        # A hit of the outer cache (AOTAutograd's) does not look into the inner one.
        return made, inner["fxgraph_cache_hit"] + outer["autograd_cache_hit"]
