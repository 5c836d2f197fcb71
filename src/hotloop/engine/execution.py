"""How a decode step runs: plainly, or compiled, and on a GPU as CUDA graphs.

A step is one program on the device: embed, layers, logits, sample, advance. It reads its tokens
and positions from the slots and leaves the next ones there, so that steps can follow each other
without the host. What the host learns of a step is a ``Sampled`` of its own.

With speculative decoding a step is two programs: a drafter proposes k tokens for every slot, and
the model looks at k + 1 positions at once. At each it chooses a token as it would have done without
drafts; the drafts that equal its choices were right, and so are the choices up to the first that
was not. Every token is thus the model's own: greedy or drawn, with whatever options, speculation
changes when tokens come and never which (see ``speculation``).

``eager`` runs a program operation by operation. ``compile`` hands the model part to torch.compile;
``fused`` runs it on kernels of our own (``fused``), and draws with one. Both, on a GPU, capture
each size of program once in a CUDA graph: what the host does between kernels then costs nothing,
and torch.compile is given the decoder by parts, of which a block serves all layers. On a CPU it is
given the whole. The sampler is never compiled: it has many variants.

Shape letters: B rows of a step, T positions of each, S slots, C cache positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
import shutil
import time
import types
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from hotloop.cache import writable_cache_dir
from hotloop.engine.core import Features, Step, StepTimes
from hotloop.engine.sampling import Sampled, Sampler
from hotloop.kernels.cuda.launch import Call, Launcher
from hotloop.kernels.cuda.step import accept, next_tokens
from hotloop.models.cache import KVCache
from hotloop.models.decoder import Block, Decoder, Run, call

SMALLEST_LENGTH = 256
"""Attention reads at least this many cache positions; beyond, the next power of two."""

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


Result = TypeVar("Result")


class Slots:
    """Where every slot is: the tokens of its sequence, and the position of the newest.

    Args:
        n_slots: Of the cache.
        n_positions: Of the cache.
        spare: The most drafts in a step.
        device: Where the model is.
        launcher: What the kernels that begin and end a step run on; None does so in plain PyTorch.

    Attributes:
        history: int64 [S, more than C]: the token at each position, up to the newest; beyond it,
            anything.
        positions: int64 [S]: of the newest token, which is not in the cache yet.
    """

    def __init__(
        self,
        n_slots: int,
        n_positions: int,
        spare: int,
        device: torch.device,
        *,
        launcher: Launcher | None = None,
    ) -> None:
        self._launcher = launcher
        width = n_positions + spare + 1  # a finished slot may run a step too many
        self.history = torch.zeros(n_slots, width, dtype=torch.int64, device=device)
        self.positions = torch.zeros(n_slots, dtype=torch.int64, device=device)
        self.last = n_positions - 1

    def admit(self, slot: int, prompt_ids: Tensor, first_id: Tensor) -> None:
        """Puts a prompt and the first token of its answer [1] into a slot."""
        n = len(prompt_ids)
        self.history[slot, :n] = prompt_ids
        self.history[slot, n : n + 1] = first_id
        self.positions[slot] = n

    def tokens(self, positions_BT: Tensor) -> Tensor:
        """The tokens at some positions of the first B slots."""
        return self.history[: len(positions_BT)].gather(1, positions_BT)

    def upcoming(self, n: int, T: int) -> Tensor:
        """Positions [n, T] of the newest token and those after it, none beyond the cache."""
        first = self.positions[:n, None]
        if T == 1:
            return first
        return (first + torch.arange(T, device=first.device)).clamp(max=self.last)

    def next_tokens(self, n: int, drafts_BD: Tensor | None) -> tuple[Tensor, Tensor]:
        """What a step of the first ``n`` slots looks at.

        Args:
            n: B.
            drafts_BD: int64, negative for none; or None.

        Returns:
            int64 [B, T] for T = D + 1, the newest token of each and its drafts (0 for none), and
            int64 [B, T], their positions.
        """
        T = 1 if drafts_BD is None else drafts_BD.shape[1] + 1
        if self._launcher is not None:
            ids_BT, positions_BT = (self.positions.new_empty(n, T) for _ in range(2))
            state, given = (self.history, self.positions), (drafts_BD, ids_BT, positions_BT)
            self._launch(next_tokens(*state, *given, last_position=self.last))
            return ids_BT, positions_BT
        positions_BT = self.upcoming(n, T)
        ids_BT = self.tokens(positions_BT[:, :1])
        if drafts_BD is not None:
            ids_BT = torch.cat((ids_BT, drafts_BD.clamp(min=0)), dim=1)
        return ids_BT, positions_BT

    def accept(
        self, ids_BT: Tensor, drafts_BD: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Appends what the model chose after each token of ``next_tokens``, as far as that counts.

        Args:
            ids_BT: int64.
            drafts_BD: As for ``next_tokens``.

        Returns:
            int64 [B], how many choices count: those up to the first that is not its draft; and
            int64 [B], how many drafts there were. None of both without drafts: all count.
        """
        B, T = ids_BT.shape
        n_kept_B = n_drafts_B = None
        if self._launcher is not None:
            if drafts_BD is not None:
                n_kept_B, n_drafts_B = (self.positions.new_empty(B) for _ in range(2))
            counts = {"n_kept_B": n_kept_B, "n_drafts_B": n_drafts_B}
            state = (self.history, self.positions)
            self._launch(
                accept(ids_BT.contiguous(), drafts_BD, *state, **counts, last_position=self.last)
            )
            return n_kept_B, n_drafts_B
        if drafts_BD is not None:
            right_BD = ids_BT[:, :-1] == drafts_BD
            n_kept_B = right_BD.long().cumprod(dim=1).sum(dim=1) + 1
            n_drafts_B = (drafts_BD >= 0).sum(dim=1)
        positions_B = self.positions[:B]
        after_BT = positions_B[:, None] + torch.arange(1, T + 1, device=positions_B.device)
        self.history[:B].scatter_(1, after_BT, ids_BT)
        positions_B.add_(1 if n_kept_B is None else n_kept_B).clamp_(max=self.last)
        return n_kept_B, n_drafts_B

    def _launch(self, call: Call) -> None:
        assert self._launcher is not None, "there is nothing to launch on"
        self._launcher.prepare(call, dependent=False)()  # on what torch did before


class Forward(Protocol):
    """The model part of a program."""

    def __call__(
        self, ids_BT: Tensor, positions_BT: Tensor, length: int
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [B, T, V] of tokens of the first B slots, through their cache.

        Args:
            ids_BT: The tokens.
            positions_BT: Their positions.
            length: Exceeds every position.

        Returns:
            The logits, and with them the token ids [B, T] of the largest among those that may be
            chosen, where they have been found on the way.
        """
        ...


class TorchForward:
    """The decoder as a ``Forward``, in plain PyTorch.

    torch.compile traces what it is given operation by operation: 80 layers take it many seconds for
    each size of step, even where it makes code of the first alone (a nested region). By parts, it
    traces one layer, and the host calls its code 80 times: right where a CUDA graph holds the
    calls, too slow where each step makes them.

    Args:
        decoder: The model.
        cache: Its cache.
        compiled: Whether torch.compile makes code of it.
        by_parts: Of its parts, rather than of the whole.
        device: Where it runs.
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
        def through(run: Run) -> Callable[[Tensor, Tensor, int], Tensor]:
            def logits(ids_BT: Tensor, positions_BT: Tensor, length: int) -> Tensor:
                hidden = decoder(
                    ids_BT, positions_BT, cache, length=length, n_layers=n_layers, run=run
                )
                return run(Decoder.logits, decoder, hidden)

            return logits

        if not compiled:
            self._one = self._several = through(call)
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
        self, ids_BT: Tensor, positions_BT: Tensor, length: int
    ) -> tuple[Tensor, Tensor | None]:
        """See ``Forward``."""
        logits = self._one if ids_BT.shape[1] == 1 else self._several
        return logits(ids_BT, positions_BT, length), None


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


class Drafter(ABC):
    """Guesses what comes next in every slot, from what the slots know."""

    @abstractmethod
    def propose(self, n: int, k: int, length: int, features: Features) -> Tensor:
        """Guesses for the first ``n`` slots, int64 [n, k]; negative where there are none.

        Device-side only: it is captured in a CUDA graph.
        """

    def admit(self, slot: int) -> None:  # noqa: B027 (most have nothing to do)
        """Is told that a slot holds another sequence now."""

    def skip(self, n: int) -> None:  # noqa: B027
        """Is told of a step of the first ``n`` slots without drafts."""

    def catch_up(self, known: Mapping[int, int], slack: int) -> None:  # noqa: B027
        """Learns what it was not there for, before it proposes.

        Args:
            known: By slot, a position that its newest token has reached.
            slack: How far beyond that it may be.
        """


Marks = Sequence[Any]
"""Clock readings in seconds, or events on the device: where a step began, and its parts ended."""


def step_times(marks: Marks) -> StepTimes:
    """What lies between marks, once the device has passed the last one."""
    spans = [
        end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3
        for begin, end in itertools.pairwise(marks)
    ]
    catch_up_s, draft_s, model_s = spans
    return StepTimes(catch_up_s=catch_up_s, draft_s=draft_s, model_s=model_s)


@dataclasses.dataclass(frozen=True)
class _Program:
    """One size of a program: what a CUDA graph is captured for."""

    drafting: bool
    n: int
    k: int
    length: int
    features: Features
    n_steps: int = 1


class Stepper:
    """Runs decode steps over the slots of a cache.

    Args:
        forward: The model.
        slots: What to advance.
        sampler: Chooses tokens.
        drafter: Makes drafts, if anybody does.
        max_drafts: The most drafts in a step.
        n_positions: Of the cache.
        captures: Whether programs become CUDA graphs.
        reads_whole_cache: Whether attention itself reads no more than each row needs.
    """

    def __init__(
        self,
        forward: Forward,
        slots: Slots,
        sampler: Sampler,
        *,
        drafter: Drafter | None,
        max_drafts: int,
        n_positions: int,
        captures: bool,
        reads_whole_cache: bool,
    ) -> None:
        self.forward, self.slots, self.sampler, self.drafter = forward, slots, sampler, drafter
        self.n_positions = n_positions
        self.reads_whole_cache = reads_whole_cache
        self._device = slots.positions.device
        self._drafts = slots.positions.new_full((len(slots.positions), max(1, max_drafts)), -1)
        self._graphs = Graphs(self._device) if captures else None
        self._ran: set[_Program] = set()  # those without graphs

    def step(self, step: Step) -> tuple[Sampled, Marks | None]:
        """One token or more for each row.

        On a CPU, where looking at drafts costs nothing, a step in which nobody had one is plain.

        Returns:
            Tensors that stay as they are until the next step of the same size; and, where there is
            a drafter and nothing had to be compiled, the marks of its parts.
        """
        n, k, length = step.n, step.k, self.length(step.longest)
        wanted = self.sampler.relevant(step.features)
        if self._graphs is not None:  # fewer sizes to compile and to capture
            n = min(1 << (n - 1).bit_length(), len(self.slots.positions))
        if self.drafter is None:
            program = _Program(False, n, 0, length, wanted, step.n_steps)
            return self._run(program, self._steps), None
        n_made = self._n_made
        marks = [self._mark()]
        if k:
            self.drafter.catch_up(step.known, step.slack)
            marks.append(self._mark())
            features = dataclasses.replace(wanted, logprobs=False)
            self._run(_Program(True, n, k, length, features), self._draft)
            if self._device.type == "cpu" and (self._drafts[:n, 0] < 0).all():
                k = 0
        else:
            self.drafter.skip(n)
            marks.append(self._mark())
        marks.append(self._mark())
        program = _Program(False, n, k, length, wanted, step.n_steps)
        sampled = self._run(program, self._steps)
        marks.append(self._mark())
        return sampled, marks if self._n_made == n_made else None

    def length(self, longest: int) -> int:
        """How much of the cache a step reads that must see ``longest`` positions."""
        if self.reads_whole_cache:
            return self.n_positions
        length = max(SMALLEST_LENGTH, 1 << (longest - 1).bit_length())
        return min(length, self.n_positions)

    def _draft(self, program: _Program) -> None:
        assert self.drafter is not None, "there is nobody to draft"
        n, k = program.n, program.k
        drafts = self.drafter.propose(n, k, program.length, program.features)
        self._drafts[:n, :k].copy_(drafts)

    def _steps(self, program: _Program) -> Sampled:
        """Plain steps that follow each other on the device."""
        return Sampled.joined([self._model(program) for _ in range(program.n_steps)])

    def _model(self, program: _Program) -> Sampled:
        n, k, features = program.n, program.k, program.features
        drafts_BD = self._drafts[:n, :k] if k else None
        ids_BT, positions_BT = self.slots.next_tokens(n, drafts_BD)
        logits_BTV, best_BT = self.forward(ids_BT, positions_BT, program.length)
        after_BT = positions_BT + 1 if features.draw else None
        sampled = self.sampler.sample(logits_BTV, after_BT, 0, features, drafts_BD, best_BT=best_BT)
        n_kept_B, n_drafts_B = self.slots.accept(sampled.ids, drafts_BD)
        sampled = dataclasses.replace(sampled, n_kept=n_kept_B, n_drafts=n_drafts_B)
        if features.penalize:
            kept_BT = sampled.ids
            if n_kept_B is not None:
                kept = torch.arange(k + 1, device=n_kept_B.device) < n_kept_B[:, None]
                kept_BT = kept_BT.where(kept, kept_BT[:, :1])
            self.sampler.remember(kept_BT, 0)
        return sampled

    def _run(self, program: _Program, run: Callable[[_Program], Result]) -> Result:
        if self._graphs is None:
            self._ran.add(program)
            return run(program)
        state = (self.slots.history, self.slots.positions, self.sampler.seen_SV)
        return self._graphs.run(program, lambda: run(program), state)

    @property
    def _n_made(self) -> int:
        """How many programs there have been whose first run compiled or captured something."""
        return len(self._ran) if self._graphs is None else self._graphs.n_captured

    def _mark(self) -> Any:
        """This moment: on a GPU, the one at which it has done what it was told so far."""
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


MOST_GRAPHS = 64
"""More than the sizes of step that one kind of traffic needs; each holds some megabytes."""


class Graphs:
    """CUDA graphs of programs that run again and again; the least recently used ones go.

    All have one pool of memory. What a program gives is therefore there until another one runs:
    the stream, in which the copy to the host stands between the two, keeps that order.

    Args:
        device: The device.
        most: The most graphs to keep; None for ``MOST_GRAPHS``.

    Attributes:
        n_captured: How many there have been.
    """

    def __init__(self, device: torch.device, most: int | None = None) -> None:
        self.n_captured = 0
        self._device, self._most = device, most or MOST_GRAPHS
        self._pool: Any = None
        self._kept: OrderedDict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = OrderedDict()

    def run(self, key: Hashable, program: Callable[[], Result], state: Sequence[Tensor]) -> Result:
        """Runs what ``key`` stands for, which ``program`` does where there is no graph of it yet.

        Args:
            key: Stands for one program.
            program: It; see ``capture``.
            state: What it changes; see ``capture``.
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
    """What ``run`` has the device do, as a CUDA graph, and the tensors that its results will be in.

    Args:
        run: It is called before the capture too, since compilation and lazy handles must come
            first. The cache does not mind: positions are written that the graph writes again.
        device: The device.
        state: What those calls change, and what is to be as it was.
        runs_before: How many such calls; none where it has run already.
        pool: Memory shared with other graphs: results are there until any of them is replayed.
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
