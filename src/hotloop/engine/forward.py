"""The model part of a step in PyTorch: plain, or compiled by torch.compile.

On a GPU torch.compile is given the decoder by parts, of which a block serves all layers; on a CPU
it is given the whole. The sampler is never compiled: it has many variants.

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
"""The generated kernels of a step are tiny, and our own ones have threads already."""

_CUDA_OPTIONS: tuple[_Options, _Options] = ({"coordinate_descent_tuning": True}, {})
"""For one token of each sequence, and for several.

Tuning compiles and times many variants of each kernel, one after the other, while a model gets
ready. Products with one row need it, which only then are kernels that torch.compile writes.
"""

_MAX_SPECIALIZATIONS = 64
"""Numbers of rows and positions, and lengths, for which one function may be compiled anew."""


class Forward(Protocol):
    """The model part of a program."""

    def __call__(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor,
        seats_B: Tensor,
        *,
        first_seat: int | None,
        length: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [B, T, V] of tokens, through their cache.

        Args:
            ids_BT: The tokens.
            positions_BT: Their positions.
            seats_B: The seats of their sequences; see ``Decoder.forward``.
            first_seat: See ``Decoder.forward``.
            length: Exceeds every position.

        Returns:
            The logits, and the token ids [B, T] of the largest among those that may be chosen; None
            for those, unless computing the logits has found them.
        """
        ...


class TorchForward:
    """The decoder as a ``Forward``, in plain PyTorch.

    torch.compile traces a function operation by operation: 80 layers take it many seconds for each
    size of step, even if it generates code for the first alone (a nested region). By parts, it
    traces one layer, and the host calls the code 80 times: right where a CUDA graph captures the
    calls, too slow where the host repeats them in each step.

    Args:
        decoder: The model.
        cache: Its cache.
        compiled: Whether it is compiled by torch.compile.
        by_parts: Whether parts are compiled, rather than the whole.
        device: The device it runs on.
        n_layers: Stop after so many layers; None takes all.
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
        def through(run: Run) -> Callable[[Tensor, Tensor, Tensor, int | None, int], Tensor]:
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
            self._one = self._several = through(eager_run(decoder))
            return
        # Without this, artifacts land in a temporary directory: the next boot compiles again.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(writable_cache_dir() / "inductor"))
        one, several = _CUDA_OPTIONS if device.type == "cuda" else (_CPU_OPTIONS, _CPU_OPTIONS)
        if by_parts:
            self._one, self._several = through(_Parts(one)), through(_Parts(several))
        else:
            self._one = _compiled(through(_nested), one)
            self._several = _compiled(through(_nested), several)

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
        logits = self._one if ids_BT.shape[1] == 1 else self._several
        return logits(ids_BT, positions_BT, seats_B, first_seat, length), None


class _Parts:
    """A ``Run`` on compiled code of each part."""

    def __init__(self, options: _Options) -> None:
        self._options = options
        self._code: dict[Callable[..., Any], Callable[..., Any]] = {}

    def __call__(self, part: Callable[..., Any], /, *args: Any) -> Any:
        if part not in self._code:
            self._code[part] = _compiled(part, self._options)
        return self._code[part](*args)


_block_region = torch.compiler.nested_compile_region(Block.forward)


def _nested(part: Callable[..., Any], /, *args: Any) -> Any:
    """A ``Run`` for torch.compile to trace, in which blocks are one region, compiled once."""
    return _block_region(*args) if part is Block.forward else part(*args)


def _compiled(function: Callable[..., Any], options: _Options) -> Callable[..., Any]:
    """Code that torch.compile makes of a function, anew for each number of rows and tokens."""
    # Code for one model is not told from code for another: its cache must be its own.
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        closure=function.__closure__,
    )
    guarded = {"", *own.__code__.co_varnames[: own.__code__.co_argcount]} - {"self"}

    def guards_kept(guards: Sequence[Any]) -> list[bool]:
        # Those on arguments and global state: a loaded model does not change, and its layers are
        # alike. Checking its hundreds of tensors and modules takes a tenth of a step on a CPU.
        return [guard.name in guarded for guard in guards]

    options = options | {"guard_filter_fn": guards_kept}
    code = torch.compile(own, fullgraph=True, options=options)

    def run(*args: Any) -> Any:
        # Code for a given number of rows is better than code for any; only length varies.
        for arg in args:
            if isinstance(arg, Tensor):
                torch._dynamo.mark_static(arg)
        # A float that another model has otherwise, such as a norm's epsilon, would become an input,
        # which the regions compiled once for all layers cannot take.
        with torch._dynamo.config.patch(
            recompile_limit=_MAX_SPECIALIZATIONS, specialize_float=True
        ):
            return code(*args)

    return run


def compile_unavailable_reason(device: torch.device) -> str | None:
    """Why torch.compile cannot generate code for a device here, or None if it can."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "torch.compile on CUDA needs triton, which is not installed (pip install triton)"
        return None
    if not (os.environ.get("CXX") or any(map(shutil.which, ("g++", "c++", "clang++")))):
        return "torch.compile on a CPU needs a C++ compiler (install g++, or set CXX)"
    return None


class CompileWatch:
    """Tells whether the graphs compiled since it was made came from the cache."""

    def __init__(self) -> None:
        self._before = self._counts()

    def state(self) -> Literal["cold", "warm"] | None:
        """``cold`` if any was compiled anew, ``warm`` if all were found; None if there is none."""
        made, found = (n - before for n, before in zip(self._counts(), self._before, strict=True))
        return "cold" if made else "warm" if found else None

    @staticmethod
    def _counts() -> tuple[int, int]:
        """How many this process has compiled, and how many it has found."""
        from torch._dynamo.utils import counters

        inner, outer = counters["inductor"], counters["aot_autograd"]
        made = inner["fxgraph_cache_miss"] + inner["fxgraph_cache_bypass"]
        # A hit of the outer cache (AOTAutograd's) never asks the inner one.
        return made, inner["fxgraph_cache_hit"] + outer["autograd_cache_hit"]
