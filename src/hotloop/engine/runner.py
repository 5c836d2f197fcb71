"""The device side of an engine: weights, cache, sampler and steps, without requests or text.

A ``Runner`` is the ``EngineCore`` of one device. With several ranks, each rank has a Runner in a
process of its own, with its shard of the weights and of the cache; all get the same commands
(``ranks``).

Shape letters: B sequences, T tokens of one sequence, N tokens of several sequences, D model width,
V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from hotloop.engine import packed
from hotloop.engine.chains import ChainEnd, EndOnDevice, EndOnHost, unavailable_reason
from hotloop.engine.constraints import Constraints
from hotloop.engine.core import (
    Admit,
    Command,
    CopySeat,
    Describe,
    Done,
    Features,
    MoveRow,
    Pending,
    Prefill,
    PrefillBatching,
    QueryPrefillBatching,
    QueryScoreBatching,
    ScoreBatching,
    ScoreWindows,
    StartMeter,
    Step,
    StepResult,
    StepTimes,
    StopMeter,
    Synchronize,
)
from hotloop.engine.cpu_blocks import eager_run
from hotloop.engine.draft_control import sizes_up_to
from hotloop.engine.forward import CompileWatch, Forward, TorchForward
from hotloop.engine.fused import FusedForward, Peers
from hotloop.engine.grammar import Grammars
from hotloop.engine.graphs import IfNodes
from hotloop.engine.memory import weights_bytes
from hotloop.engine.prompt import (
    PASS_TOKENS,
    Chunk,
    FusedPrefill,
    Spans,
    pass_prompts,
    split_tokens,
)
from hotloop.engine.rows import Rows, to_device
from hotloop.engine.sampling import Sampled, Sampler
from hotloop.engine.setup import Setup
from hotloop.engine.speculation import (
    BroadcastDrafter,
    Drafter,
    ModelDrafter,
    NgramDrafter,
    SelfDrafter,
)
from hotloop.engine.steps import Stepper, Timestamps, step_times
from hotloop.engine.vocabulary import VocabularyShard
from hotloop.errors import OutOfMemoryError
from hotloop.hardware import device_info, find_out_of_memory, free_bytes, requested_bytes
from hotloop.kernels import cpu
from hotloop.kernels.attention import choose_attention
from hotloop.kernels.cuda.launch import device_of
from hotloop.memory_meter import MemoryMeter
from hotloop.models import names
from hotloop.models.cache import KVCache
from hotloop.models.decoder import Decoder, RMSNorm, call
from hotloop.models.linear import Linear
from hotloop.parallel.collectives import Group
from hotloop.types import EXACT_CPU_CHUNK, Score, TokenLogprob, exit_layers

Result = TypeVar("Result")

BREAK_EVEN_ROWS = 8
"""The number of rows that a CPU multiplies by an 8-bit weight in the time that it takes to read the
weight. With other weights it is proportional to their bits. Prompts of at most so many tokens are
prefilled together: the first prompt of a batch then waits less for the other prompts than these
would wait for it (measured on 2 cores of a Xeon: int4 4 to 6 tokens, int8 6, bfloat16 16)."""

OnProgress = Callable[[str, int, int], None]
"""Called with (phase, done, total) while an engine loads and warms up."""


class Runner:
    """Runs commands on one device, with a model, or a rank's shard of one, and its drafter.

    Args:
        setup: The configuration to load.
        n_tokens: Token ids below this can be selected.
        progress: Called as layers are loaded.
        group: The ranks that hold the model; None for a single rank.
        grammars: Compiles grammars; None reads the tokenizer at the first grammar.

    Attributes:
        asynchronous: Whether ``run`` returns before the device has completed a step.
        captures: Whether programs become CUDA graphs.
        ends_chains: See ``EngineCore``.
        batch_invariant: See ``EngineCore``.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        n_tokens: int,
        progress: OnProgress | None = None,
        group: Group | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self._setup, self._group = setup, group or Group()
        self.asynchronous, self.captures = setup.asynchronous, setup.captures
        config, device = setup.config, setup.device
        with working_on(device, "load"):
            self._model = _Model(
                setup,
                self._group,
                n_tokens,
                progress,
                n_seats=setup.n_seats,
                n_prompts=config.max_batch_size,
            )
            shards = [shard.vocabulary for shard in setup.shards]
            self._vocabulary = VocabularyShard(shards, n_tokens, self._group)
            self._sampler = Sampler(
                config.max_batch_size,
                n_tokens,
                device,
                self._vocabulary,
                launcher=self._model.launcher if self._group.size == 1 else None,
            )
            max_drafts = config.draft_tokens if setup.draft else 0
            self._rows = Rows(
                config.max_batch_size,
                setup.n_positions,
                max_drafts,
                device,
                scratch=setup.n_seats - 1,
                launcher=self._model.launcher,
            )
            self._constraints = Constraints(
                grammars or Grammars(setup.load_tokenizer, n_tokens),
                n_rows=config.max_batch_size,
                max_drafts=max_drafts,
                device=device,
            )
            self._draft_model: _Model | None = None
            self._drafters = self._make_drafters(progress)
            chain_end, self._chain_notes = self._make_chain_end()
            self.ends_chains = chain_end is not None
            self._stepper = Stepper(
                self._model.forward(),
                self._rows,
                self._sampler,
                self._constraints,
                drafters=self._drafters,
                max_drafts=max_drafts,
                verified=(
                    sizes_up_to(max_drafts) if setup.makes_programs else range(max_drafts + 1)
                ),
                chain_end=chain_end,
                assumed_acceptance=config.assume_acceptance,
                n_positions=setup.n_positions,
                captures=self.captures,
                compiles=setup.execution == "compile",
                indexes_seats=self._model.attention_name in ("cpu", "fused"),
            )
            models = [self._model, *([self._draft_model] if self._draft_model else [])]
            ours = all(model.on_cpu_kernels for model in models)
            self._step_threads = cpu.single_threaded_torch if ours else nullcontext
            longest = max(setup.prefill_chunk, 1 + max_drafts)
            exact = longest <= EXACT_CPU_CHUNK and self._group.sums_in_one_order
            self.batch_invariant = ours and exact
        with working_on(device, "warmup"):
            for model in models:
                model.warm_up()

    def run(self, command: Command[Result]) -> Pending[Result]:
        """See ``EngineCore``."""
        with working_on(self._setup.device, command.phase):
            return self._dispatch(command)

    def _dispatch(self, command: Any) -> Any:
        match command:
            case Step():
                return self._step(command)
            case Prefill():
                return self._prefill(command)
            case Admit():
                return self._admit(command)
            case CopySeat():
                return Done(self._copy(command))
            case MoveRow():
                return Done(self._move(command))
            case ScoreWindows():
                return self._score(command)
            case Synchronize():
                return Done(self._synchronize())
            case QueryPrefillBatching():
                return Done(self._model.prefill_batching)
            case QueryScoreBatching():
                return Done(self._model.score_batching)
            case StartMeter():
                return Done(self._start_meter())
            case StopMeter():
                return Done(self._stop_meter())
            case Describe():
                return Done(self._describe())
            case _:
                raise AssertionError(f"unknown command: {command}")

    def _prefill(self, command: Prefill) -> Pending[None]:
        ids = to_device(command.ids, self._setup.device)
        self._model.prefill(ids, command.start, command.seat)
        return _PendingChunk(self._setup.device, None)

    def _admit(self, command: Admit) -> Pending[StepResult]:
        row, prompts, device = command.row, command.prompts, self._setup.device
        for i, each in enumerate(prompts, row):
            self._sampler.admit(i, each.params, each.seed, each.prompt_ids, each.eos_ids)
        masks_B1W = self._constraints.admit(row, [each.params.grammar for each in prompts])
        lengths = [len(each.prompt_ids) for each in prompts]
        flat = [token for each in prompts for token in each.prompt_ids]
        ids = to_device(flat, device).split(lengths)
        logits_BV = self._model.prefill_batch(
            [
                Chunk(ids_T[each.start :], each.start, each.seat)
                for each, ids_T in zip(prompts, ids, strict=True)
            ]
        )
        positions_B1 = to_device(lengths, device)[:, None]
        features = Features.of(each.params for each in prompts)
        sampled = self._sampler.sample(
            logits_BV[:, None], positions_B1, row, features, masks_BTW=masks_B1W
        )
        if features.adjust:
            self._sampler.update_penalties(sampled.ids, row)
        self._rows.admit(row, ids, sampled.ids[:, 0])
        for drafter in self._drafters:
            for each in prompts:
                drafter.admit(each.seat, each.n_cached)
        pending = _PendingStepResult(sampled)
        self._constraints.expect(pending, range(row, row + len(prompts)))
        return pending

    def _copy(self, copy: CopySeat) -> None:
        for model in filter(None, (self._model, self._draft_model)):
            model.cache.copy(copy.source, copy.target, copy.n)
        for drafter in self._drafters:
            drafter.copy(copy.source, copy.target, copy.n)

    def _move(self, move: MoveRow) -> None:
        for part in (self._rows, self._sampler, self._constraints):
            part.move(move.source, move.target)

    def _step(self, step: Step) -> Pending[StepResult]:
        with self._step_threads():
            sampled, timestamps, failures = self._stepper.step(step)
            n_programs = self._stepper.n_programs if self._setup.makes_programs else 0
            pending = _PendingStepResult(sampled, timestamps, n_programs, failures)
            self._constraints.expect(pending, range(step.n))
            return pending

    def _score(self, command: ScoreWindows) -> Pending[Sequence[Score]]:
        """Scores chunks of windows.

        Whole distributions are gathered on rank 0 only, and the host waits for them.
        """
        lengths = [len(chunk.ids) for chunk in command.chunks]
        flat = [token for chunk in command.chunks for token in chunk.ids]
        ids = to_device(flat, self._setup.device).split(lengths)
        chunks = [
            Chunk(ids_T[:-1], chunk.start, chunk.seat)
            for ids_T, chunk in zip(ids, command.chunks, strict=True)
        ]
        vocabulary = self._vocabulary
        spans: list[Spans] = []
        logprobs, top1, top1_logprobs, distributions = [], [], [], []
        top_ids, top_logprobs = [], []
        for parts, logits_NV in self._model.logits(chunks):
            spans.append(parts)
            log_probs = vocabulary.log_softmax(logits_NV)
            labels = torch.cat([ids[i][part.start + 1 : part.stop + 1] for i, part in parts])
            best = vocabulary.argmax(log_probs)
            logprobs.append(vocabulary.gather_at(log_probs, labels))
            top1.append(best)
            top1_logprobs.append(vocabulary.gather_at(log_probs, best))
            if command.full and (whole := vocabulary.gather_to_first(log_probs)) is not None:
                distributions.append(whole.cpu())
            if command.n_top:
                k = min(command.n_top, vocabulary.n_tokens)
                values, indices = vocabulary.topk(log_probs, k)
                top_ids.append(indices)
                top_logprobs.append(values)
        values = [_by_window(spans, each) for each in (logprobs, top1, top1_logprobs)]
        tops = [_by_window(spans, each) for each in (top_ids, top_logprobs) if each]
        wholes = _by_window(spans, distributions) if distributions else {}
        scores = [
            Score(
                token_logprobs=_to_host(values[0][i]),
                top1=_to_host(values[1][i]),
                top1_logprobs=_to_host(values[2][i]),
                log_probs=wholes.get(i),
                top=(_to_host(tops[0][i]), _to_host(tops[1][i])) if tops else None,
            )
            for i in range(len(chunks))
        ]
        return _PendingChunk(self._setup.device, scores)

    def _synchronize(self) -> None:
        if self._setup.device.type == "cuda":
            torch.cuda.synchronize(self._setup.device)

    def _start_meter(self) -> None:
        self._meter = MemoryMeter(str(self._setup.device)).__enter__()

    def _stop_meter(self) -> int:
        self._meter.__exit__(None, None, None)
        peak = torch.tensor([self._meter.peak_bytes], device=self._setup.device)
        return int(self._group.max(peak))

    def _describe(self) -> dict[str, Any]:
        setup, model = self._setup, self._model
        kernels, notes = model.kernels(), model.notes()
        if self._draft_model is not None:
            kernels |= {f"draft/{name}": k for name, k in self._draft_model.kernels().items()}
            notes |= {_of_draft(note): None for note in self._draft_model.notes()}
        if self._group.kernel is not None:
            used = self._group.kernel if model.peers is None else "fused"
            kernels["all_reduce"] = f"all_reduce/{used}"
        return {
            "device": str(setup.device),
            "device_name": device_info(setup.device).name,
            "weight_bytes": weights_bytes(setup),
            "weight_bytes_per_step": model.bytes_per_step,
            "kv_bytes_per_token": setup.local.kv_bytes_per_token(setup.dtype.itemsize),
            "kernels": kernels,
            "notes": (*notes, *self._chain_notes, *self._group.notes),
            "compile_cache": self._model.compile_cache(),
            "read_bytes": model.loaded.read_bytes,
            "read_s": model.loaded.read_s,
        }

    def close(self) -> None:
        """Frees the memory on the device."""
        parts = ("_stepper", "_drafters", "_draft_model", "_constraints", "_sampler", "_rows")
        for name in (*parts, "_model"):
            if hasattr(self, name):
                delattr(self, name)
        if self._setup.device.type == "cuda":
            with working_on(self._setup.device, "close"):
                torch.cuda.empty_cache()

    def _make_chain_end(self) -> tuple[ChainEnd | None, Sequence[str]]:
        """Makes the ``ChainEnd``, or returns why chains cannot end early."""
        setup, launcher = self._setup, self._model.launcher
        assumed = setup.config.assume_acceptance
        if setup.ends_on_host:
            return EndOnHost(assumed), ()
        makes_chains = any(not isinstance(drafter, NgramDrafter) for drafter in self._drafters)
        if launcher is None or not makes_chains or self._group.size > 1:
            return None, ()
        n_rows, device = setup.config.max_batch_size, setup.device
        end = EndOnDevice(IfNodes(device), launcher, n_rows, device, assumed)
        if reason := unavailable_reason(end, launcher, device):
            return None, (f"chains of drafts do not end early: {reason}",)
        return end, ()

    def _make_drafters(self, progress: OnProgress | None) -> list[Drafter]:
        draft = self._setup.draft
        if draft is None:
            return []
        if draft.setup is not None:
            return [self._make_model_drafter(draft.setup, progress)]
        return list(map(self._make_drafter, draft.names))

    def _make_drafter(self, name: str) -> Drafter:
        if name == "ngram":
            return NgramDrafter(self._rows, launcher=self._model.launcher)
        # A drafter without a number of layers is the model under another scheme.
        n_layers = exit_layers(name)
        forward = self._model.forward(
            n_layers, self._model.draft_decoder if n_layers is None else None
        )
        return SelfDrafter(forward, self._rows, self._sampler)

    def _make_model_drafter(self, setup: Setup, progress: OnProgress | None) -> Drafter:
        drafter = None
        if self._group.rank == 0:
            model = self._draft_model = _Model(
                setup,
                Group(),
                self._model.n_tokens,
                progress,
                n_seats=self._setup.n_seats,
            )
            drafter = ModelDrafter(
                model.forward(),
                model.prefill,
                self._rows,
                self._sampler,
                chunk=setup.prefill_chunk,
            )
        if drafter is not None and self._group.size == 1:
            return drafter
        return BroadcastDrafter(drafter, self._group, self._setup.device)


class _Model:
    """A decoder, or a rank's shard of one, with its weights and its cache.

    Args:
        setup: The configuration to load.
        group: The ranks that hold the model.
        n_tokens: Token ids below this can be selected.
        progress: Called as layers are loaded.
        n_seats: Seats of its cache.
        n_prompts: The most prompts that are prefilled together.

    Attributes:
        prefill_batching: Limits of batched prefill; None if prompts are prefilled one by one.
        score_batching: Limits of batched scoring.
        on_cpu_kernels: Our CPU kernels compute all matrix products, and attention.
        draft_decoder: The decoder of a drafter that is the model under another scheme, or consists
            of the high planes of its weights; None without such a drafter.
    """

    def __init__(
        self,
        setup: Setup,
        group: Group,
        n_tokens: int,
        progress: OnProgress | None,
        *,
        n_seats: int,
        n_prompts: int = 1,
    ) -> None:
        self.setup, self.n_tokens, self._sharded = setup, n_tokens, group.size > 1
        model, device = setup.local, setup.device
        name, attention, self._attention_notes = choose_attention(device, setup.dtype)
        self.attention_name = "fused" if setup.fused else name
        self.launcher = device_of(device) if setup.fused else None
        self._compile_s_before = 0.0 if self.launcher is None else self.launcher.compile_seconds
        self._compiles = CompileWatch() if setup.execution == "compile" else None
        make_decoder = partial(
            Decoder,
            model,
            n_positions=setup.n_positions,
            attention=attention,
            device=device,
            n_head_rows=len(setup.shard.vocabulary),
            all_reduce=group.sum,
        )
        self.decoder, self.draft_decoder = make_decoder(), None
        if setup.draft and (setup.draft.nested or setup.draft.schemes):
            shares_head = names.head(model) not in setup.draft.schemes
            self.draft_decoder = make_decoder(target=self.decoder, shares_head=shares_head)
        on_layer = None if progress is None else lambda i, n: progress("load", i, n)
        self.loaded = packed.load(
            setup, self.decoder, group, on_layer, draft_decoder=self.draft_decoder
        )
        self.cache = KVCache(
            kv_heads=model.kv_heads,
            n_seats=n_seats,
            n_positions=setup.n_positions,
            dtype=setup.dtype,
            device=device,
        )
        self.peers = None
        if setup.fused:
            drafts = setup.config.draft_tokens if setup.draft else 0
            rows = max(
                PASS_TOKENS * pass_prompts(n_prompts), setup.config.max_batch_size * (1 + drafts)
            )
            self.peers = Peers.of(group, self.decoder, setup.shard.vocabulary.start, rows)
        self._fused, self._fused_prefill = self._fused_forward(), None
        if self._fused is not None and self.launcher is not None:
            self._fused_prefill = FusedPrefill(
                self._fused,
                self.decoder,
                self.cache,
                self.launcher,
                chunk=setup.prefill_chunk,
                sharded=self._sharded,
                n_prompts=n_prompts,
            )
        self.on_cpu_kernels = all(name.endswith("/cpu") for name in self.kernels().values())
        self._run_short = eager_run(self.decoder) if self.on_cpu_kernels else call
        # None where the bits of a row depend on the number of rows.
        self.prefill_batching: PrefillBatching | None = None
        if self._fused_prefill is not None:
            self.prefill_batching = self._fused_prefill.prefill_batching
        elif self.on_cpu_kernels:
            linears = [linear for block in self.decoder.blocks for linear in block.linears.values()]
            n_weights = sum(linear.n * linear.k for linear in linears)
            longest = math.ceil(
                BREAK_EVEN_ROWS * sum(linear.nbytes for linear in linears) / n_weights
            )
            self.prefill_batching = PrefillBatching(
                max_prompts=n_prompts,
                max_prompt_tokens=min(longest, EXACT_CPU_CHUNK),
                max_tokens=EXACT_CPU_CHUNK,
                max_forward_tokens=EXACT_CPU_CHUNK,
            )
        self.score_batching = self._score_batching(n_prompts)

    def _score_batching(self, n_windows: int) -> ScoreBatching:
        chunk = self.setup.prefill_chunk
        if self._fused_prefill is not None:
            return self._fused_prefill.score_batching
        # With CPU kernels, the bits of a row do not depend on the others in chunks of up to
        # ``EXACT_CPU_CHUNK`` tokens.
        return ScoreBatching(
            chunk=min(chunk, EXACT_CPU_CHUNK) if self.on_cpu_kernels else chunk,
            max_windows=n_windows,
            max_tokens=min(chunk, self.setup.n_positions),  # memory is reserved for their logits
            exact=self.on_cpu_kernels,
        )

    def warm_up(self) -> None:
        """Captures prefill graphs and warms caches of libraries; overwrites seat 0."""
        if self._fused_prefill is not None:
            self._fused_prefill.warm_up()

    def forward(self, n_layers: int | None = None, decoder: Decoder | None = None) -> Forward:
        """Returns the forward of steps: of the model, its first layers, or another decoder."""
        is_plain = n_layers is None and decoder is None
        fused = self._fused if is_plain else self._fused_forward(n_layers, decoder)
        if fused is not None:
            return fused
        return TorchForward(
            decoder or self.decoder,
            self.cache,
            compiled=self.setup.execution == "compile",
            by_parts=self.setup.device.type == "cuda",
            device=self.setup.device,
            n_layers=n_layers,
        )

    def _fused_forward(
        self, n_layers: int | None = None, decoder: Decoder | None = None
    ) -> FusedForward | None:
        if self.launcher is None:
            return None
        return FusedForward(
            decoder or self.decoder,
            self.cache,
            self.launcher,
            n_tokens=self.n_tokens,
            sharded=self._sharded,
            peers=self.peers,
            n_layers=n_layers,
        )

    def compile_cache(self) -> Literal["cold", "warm"] | None:
        """Returns ``warm`` if all compiled code was cached, else ``cold``; None without any."""
        if self.launcher is not None:
            compiled = self.launcher.compile_seconds > self._compile_s_before
            return "cold" if compiled else "warm"
        return None if self._compiles is None else self._compiles.state()

    def prefill(self, ids_T: Tensor, start: int, seat: int) -> Callable[[], Tensor]:
        """Prefills a seat with a chunk from position ``start`` on.

        Returns:
            A function that returns the last token's logits [1, V]. It must be called before the
            next prefill.
        """
        if self._fused_prefill is not None:
            return self._fused_prefill(ids_T, start, seat)
        ((_, hidden_TD),) = self._chunks(ids_T, start, seat)
        return lambda: self.decoder.logits(hidden_TD[-1:])

    def prefill_batch(self, chunks: Sequence[Chunk]) -> Tensor:
        """Prefills seats with the last chunks of prompts; several only within ``prefill_batching``.

        Returns:
            The logits [B, V] of the last token of each.
        """
        if len(chunks) == 1:
            return self.prefill(*chunks[0])()
        if self._fused_prefill is not None:
            return self._fused_prefill.prefill_batch(chunks)
        ends = list(itertools.accumulate(len(chunk.ids) for chunk in chunks))
        with cpu.single_threaded_torch():
            hidden_ND = self._run_as_rows(chunks)
            return self.decoder.logits(hidden_ND[[end - 1 for end in ends]])

    def logits(self, chunks: Sequence[Chunk]) -> Iterator[tuple[Spans, Tensor]]:
        """Prefills seats with chunks of windows, with logits of every token.

        Several chunks share a forward if ``score_batching`` allows it.

        Yields:
            Parts of chunks, and the logits [N, V] of their tokens, concatenated.
        """
        if self._fused_prefill is not None:
            yield from self._fused_prefill.logits(chunks)
        elif len(chunks) == 1:
            for part, hidden_TD in self._chunks(*chunks[0]):
                yield [(0, part)], self.decoder.logits(hidden_TD)
        else:
            run = self._run_as_rows if self.on_cpu_kernels else self._run_padded
            hidden_ND = run(chunks)
            spans = [(i, range(len(chunk.ids))) for i, chunk in enumerate(chunks)]
            yield spans, self.decoder.logits(hidden_ND)

    def _run_as_rows(self, chunks: Sequence[Chunk]) -> Tensor:
        """Runs chunks through CPU kernels, each token as a row of its own.

        Returns:
            The hidden states of their tokens [N, D].
        """
        device = self.decoder.device
        # A token can attend to others of its chunk: a layer stores all keys and values before it
        # attends to any.
        positions, seats = [], []
        for ids_T, start, seat in chunks:
            positions += range(start, start + len(ids_T))
            seats += [seat] * len(ids_T)
        hidden_N1D = self.decoder(
            torch.cat([chunk.ids for chunk in chunks])[:, None],
            to_device(positions, device)[:, None],
            self.cache,
            seats_B=to_device(seats, device),
            length=1 + max(positions),
            run=self._run_short,
        )
        return hidden_N1D[:, 0]

    def _run_padded(self, chunks: Sequence[Chunk]) -> Tensor:
        """Runs chunks as sequences that are padded to one length.

        Padding repeats the last token of a chunk at its position, so it stores the same keys and
        values again.

        Returns:
            The hidden states of the chunks' tokens, without padding [N, D].
        """
        device, lengths = self.decoder.device, [len(chunk.ids) for chunk in chunks]
        T = max(lengths)
        at = [min(t, n - 1) for n in lengths for t in range(T)]
        at_BT = to_device(at, device).view(-1, T)
        starts = [chunk.start for chunk in chunks]
        hidden_BTD = self.decoder(
            torch.stack([ids_T[at_T] for (ids_T, *_), at_T in zip(chunks, at_BT, strict=True)]),
            at_BT + to_device(starts, device)[:, None],
            self.cache,
            seats_B=to_device([chunk.seat for chunk in chunks], device),
            length=max(start + n for start, n in zip(starts, lengths, strict=True)),
        )
        return torch.cat([x[:n] for x, n in zip(hidden_BTD, lengths, strict=True)])

    def _chunks(self, ids_T: Tensor, start: int, seat: int) -> Iterator[tuple[range, Tensor]]:
        """Runs tokens through the decoder by chunks; yields ranges and hidden states [T, D]."""
        seats_B = torch.full((1,), seat, device=ids_T.device)
        for chunk, positions_T in split_tokens(ids_T, start, self.setup.prefill_chunk):
            short = self.on_cpu_kernels and len(chunk) <= EXACT_CPU_CHUNK
            with cpu.single_threaded_torch() if short else nullcontext():
                hidden_BTD = self.decoder(
                    ids_T[None, chunk.start : chunk.stop],
                    positions_T[None],
                    self.cache,
                    seats_B=seats_B,
                    first_seat=seat,
                    length=start + chunk.stop,
                    run=self._run_short if short else call,
                )
            yield chunk, hidden_BTD[0]

    def kernels(self) -> dict[str, str]:
        """Returns the kernels that each matrix uses, by its name in a layer."""
        used: dict[str, dict[str, None]] = {}
        for name, linear in (*self._linears(), *self._draft_linears()):
            assert linear.kernel is not None, "no weight was assigned"
            used.setdefault(name, {})[linear.kernel.name] = None
        kernels = {name: ", ".join(each) for name, each in used.items()}
        return kernels | {"attention": f"attention/{self.attention_name}"}

    def notes(self) -> dict[str, None]:
        """Returns notes of the setup, and why faster kernels are not used, each once."""
        notes = [*self.setup.notes, *self.loaded.notes]
        notes += [note for _, linear in self._linears() for note in linear.notes]
        notes += [f"draft/{note}" for _, linear in self._draft_linears() for note in linear.notes]
        if self.launcher is not None:
            notes += sorted(self.launcher.notes)
        return dict.fromkeys((*notes, *self._attention_notes))

    @property
    def bytes_per_step(self) -> int:
        """Bytes of weights that a decode step reads."""
        norms = [module for module in self.decoder.modules() if isinstance(module, RMSNorm)]
        weights = sum(linear.nbytes for _, linear in self._linears())
        return weights + sum(norm.weight.nbytes for norm in norms)

    def _linears(self) -> Iterator[tuple[str, Linear]]:
        """Yields every matrix of every layer by its name in the layer, and the head."""
        for block in self.decoder.blocks:
            yield from block.linears.items()
        yield "head", self.decoder.head

    def _draft_linears(self) -> Iterator[tuple[str, Linear]]:
        """Yields every matrix of ``draft_decoder``, without a shared head."""
        if self.draft_decoder is None:
            return
        for block in self.draft_decoder.blocks:
            for name, linear in block.linears.items():
                yield f"draft/{name}", linear
        if self.draft_decoder.head is not self.decoder.head:
            yield "draft/head", self.draft_decoder.head


def _by_window(spans: Sequence[Spans], parts: Sequence[Tensor]) -> dict[int, Tensor]:
    """Concatenates the results of each window.

    Args:
        spans: For each tensor of ``parts``, the parts of windows that its rows belong to.
        parts: Tensors [N, ...].

    Returns:
        For each window, by its index, a tensor [its tokens, ...].
    """
    pieces: dict[int, list[Tensor]] = {}
    for part_spans, part in zip(spans, parts, strict=True):
        lengths = [len(tokens) for _, tokens in part_spans]
        for (i, _), piece in zip(part_spans, part.split(lengths), strict=True):
            pieces.setdefault(i, []).append(piece)
    return {i: torch.cat(each) for i, each in pieces.items()}


class _PendingChunk(Generic[Result]):
    """The ``Pending`` result of a prefill chunk, with the tensors that are copied to the host."""

    def __init__(self, device: torch.device, result: Result) -> None:
        self._done, self._result = None, result
        if device.type == "cuda":
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> Result:
        """See ``Pending``."""
        if self._done is not None:
            self._done.synchronize()
        return self._result


class _PendingStepResult:
    """The ``Pending`` result of a step, which is being copied to the host."""

    def __init__(
        self,
        sampled: Sampled,
        timestamps: Timestamps | None = None,
        n_programs: int = 0,
        failures: Mapping[int, str] | None = None,
    ) -> None:
        self._host, self._timestamps = sampled.map(_to_host), timestamps
        self._n_programs, self._failures = n_programs, failures or {}
        self._ready = None
        if sampled.ids.is_cuda:
            self._ready = torch.cuda.Event()
            self._ready.record()

    def tokens(self) -> list[list[int]]:
        """Waits for the accepted tokens of each row."""
        if self._ready is not None:
            self._ready.synchronize()
        return [[token for _, token in row] for row in self._accepted(0)]

    def wait(self) -> StepResult:
        """See ``Pending``."""
        if self._ready is not None:
            self._ready.synchronize()
        n = self._n_drafting_steps
        times = None if self._timestamps is None else step_times(self._timestamps) / n
        first, *others = [self._result(i, times) for i in range(n)]
        return replace(first, later=others)

    @property
    def _n_drafting_steps(self) -> int:
        """The number of steps with drafts: each has its own result; plain steps share one."""
        n_kept = self._host.n_kept
        return 1 if n_kept is None or n_kept.dim() == 1 else n_kept.shape[1]

    def _accepted(self, i: int) -> list[list[tuple[int, int]]]:
        """Returns the accepted tokens of each row in step ``i``, each after its index."""
        host = self._host
        T = host.ids.shape[1] // self._n_drafting_steps
        rows = [list(enumerate(row))[i * T : (i + 1) * T] for row in host.ids.tolist()]
        if host.n_kept is None:
            return rows
        n_kept = host.n_kept.view(len(rows), -1)[:, i].tolist()
        return [row[:n] for row, n in zip(rows, n_kept, strict=True)]

    def _result(self, i: int, times: StepTimes | None) -> StepResult:
        host, rows = self._host, self._accepted(i)
        n_drafts = [0] * len(rows)
        if host.n_drafts is not None:
            n_drafts = host.n_drafts.view(len(rows), -1)[:, i].tolist()
        return StepResult(
            rows=[
                [(token, self._logprob(b, t, token)) for t, token in row]
                for b, row in enumerate(rows)
            ],
            n_drafts=n_drafts,
            k=0 if host.n_kept is None else host.ids.shape[1] // self._n_drafting_steps - 1,
            times=times,
            n_programs=self._n_programs,
            failures=self._failures,
        )

    def _logprob(self, b: int, t: int, token: int) -> TokenLogprob | None:
        host = self._host
        if host.logprobs is None:
            return None
        assert host.top_ids is not None
        assert host.top_logprobs is not None
        top = zip(host.top_ids[b, t].tolist(), host.top_logprobs[b, t].tolist(), strict=True)
        return TokenLogprob(token_id=token, logprob=float(host.logprobs[b, t]), top=tuple(top))


def _of_draft(note: str) -> str:
    """Marks a note as one of the draft model; names of its kernels begin with ``draft/``."""
    return f"draft/{note}" if " not used: " in note else f"draft: {note}"


def _to_host(tensor: Tensor) -> Tensor:
    """Copies a tensor to host memory; complete once the device has passed a later event."""
    if not tensor.is_cuda:
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


@contextmanager
def working_on(device: torch.device, phase: str) -> Generator[None]:
    """Makes a device current, for torch and for the driver, and disables gradients.

    Streams, events and graphs belong to the current device.

    Raises:
        OutOfMemoryError: Any out-of-memory error of torch, CUDA or NCCL, converted.
    """
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with current, torch.inference_mode():
        try:
            yield
        except OutOfMemoryError:
            raise
        except Exception as error:
            shortage = find_out_of_memory(error)
            if shortage is None:
                raise
            needed = requested_bytes(shortage)
            raise OutOfMemoryError(phase, needed, free_bytes(device)) from error
