"""The device's side of an engine: weights, cache, sampler and steps, without requests or text.

A ``Runner`` does what it is told about slots: put a prompt into one, take a step with the first n,
score a window. What that gives comes back as ``Pending``, on its way to the host, so that the next
step can start before the last one's tokens are looked at.

Of several ranks each has a Runner of its own, in a process of its own, and all are told the same
(``ranks``). They differ in what they hold of the weights and of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hotloop.engine.execution import Stepper, compile_cache_state
from hotloop.engine.memory import weights_bytes
from hotloop.engine.sampling import Features, Sampled, Sampler
from hotloop.engine.setup import Setup
from hotloop.engine.vocabulary import Vocabulary
from hotloop.errors import OutOfMemoryError
from hotloop.hardware import device_info
from hotloop.kernels.attention import choose_attention
from hotloop.memory_meter import MemoryMeter
from hotloop.models import names
from hotloop.models.cache import KVCache
from hotloop.models.decoder import Decoder
from hotloop.parallel.collectives import Group
from hotloop.types import SamplingParams, Score, TokenLogprob
from hotloop.weights.load import load_weights
from hotloop.weights.source import CheckpointSource, RandomSource

Progress = Callable[[str, int, int], None]
"""Told of (phase, done, total) while an engine gets ready."""

Tokens = list[list[tuple[int, TokenLogprob | None]]]
"""Of each row, the tokens that it was given, with log-probabilities where some row wants them."""


class Runner:
    """A model on a device, or a rank's part of one.

    Args:
        setup: What to load, and where.
        n_tokens: Token ids that may be chosen are below this.
        progress: Told of layers as they are loaded.
        group: The ranks that have the rest of it.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        n_tokens: int,
        progress: Progress | None = None,
        group: Group | None = None,
    ) -> None:
        self._setup, self._group = setup, group or Group()
        model, device = setup.local, setup.device
        with out_of_memory_in("load"), torch.inference_mode():
            self._attention_name, attention, self._attention_notes = choose_attention(
                device, setup.dtype
            )
            self._decoder = Decoder(
                model,
                n_positions=setup.n_positions,
                attention=attention,
                device=device,
                n_head_rows=len(setup.shard.vocabulary),
                total=self._group.sum,
            )
            self._load_weights(progress)
            self._cache = KVCache(
                n_layers=model.n_layers,
                n_slots=setup.config.max_batch_size,
                n_kv_heads=model.n_kv_heads,
                n_positions=setup.n_positions,
                head_dim=model.head_dim,
                dtype=setup.dtype,
                device=device,
            )
            shares = [shard.vocabulary for shard in setup.shards]
            self._vocabulary = Vocabulary(shares, n_tokens, self._group)
            self._sampler = Sampler(self._cache.n_slots, n_tokens, device, self._vocabulary)
            self._stepper = Stepper(
                self._decoder,
                self._cache,
                self._sampler,
                execution=setup.config.execution,
                reads_whole_cache=self._attention_name == "cpu",
                device=device,
            )

    @torch.inference_mode()
    def admit(
        self, slot: int, params: SamplingParams, seed: int, prompt_ids: Sequence[int]
    ) -> Pending:
        """Prefills a prompt into a slot, and samples its first token: one row."""
        with out_of_memory_in("prefill"):
            ids = torch.tensor(prompt_ids, device=self._setup.device)
            self._sampler.admit(slot, params, seed, ids)
            hidden = self._prefill(ids, slot)
            logits = self._decoder.logits(hidden[None, -1:])
            position = torch.full((1, 1), len(ids), device=self._setup.device)
            features = Features.of([params])
            sampled = self._sampler.sample(logits, position, slot, features)
            if features.penalize:
                self._sampler.remember(sampled.ids, slot)
            self._stepper.ids[slot : slot + 1] = sampled.ids[:, 0]
            self._stepper.positions[slot] = len(ids)
            return Pending(sampled)

    @torch.inference_mode()
    def step(self, n: int, longest: int, features: Features) -> Pending:
        """Starts a decode step of the first ``n`` slots, without waiting for it.

        Args:
            n: Rows.
            longest: Exceeds every position in use.
            features: What the sampler must do.
        """
        with out_of_memory_in("decode"):
            return Pending(self._stepper.step(n, longest, features))

    @torch.inference_mode()
    def score(self, ids: Sequence[int], full: bool) -> Score:
        """Scores one window in the first slot; whole distributions come to rank 0 alone."""
        ids_T, vocabulary = torch.tensor(ids, device=self._setup.device), self._vocabulary
        logprobs, top1, distributions = [], [], []
        for chunk in self._chunks(len(ids) - 1):
            logits = self._decoder.logits(self._forward(ids_T, chunk, 0))
            log_probs = vocabulary.log_softmax(logits)
            labels = ids_T[chunk.start + 1 : chunk.stop + 1]
            logprobs.append(vocabulary.at(log_probs, labels).cpu())
            top1.append(vocabulary.argmax(log_probs).cpu())
            if full and (whole := vocabulary.whole(log_probs)) is not None:
                distributions.append(whole.cpu())
        return Score(
            token_logprobs=torch.cat(logprobs),
            top1=torch.cat(top1),
            log_probs=torch.cat(distributions) if distributions else None,
        )

    def synchronize(self) -> None:
        """Waits until the device has done all that it was told."""
        if self._setup.device.type == "cuda":
            torch.cuda.synchronize(self._setup.device)

    def start_meter(self) -> None:
        """Starts to measure the peak of this process's memory."""
        self._meter = MemoryMeter(str(self._setup.device)).__enter__()

    def stop_meter(self) -> int:
        """Bytes at the peak since ``start_meter``; of several ranks, on the one that has most."""
        self._meter.__exit__(None, None, None)
        peak = torch.tensor([self._meter.peak_bytes], device=self._setup.device)
        return int(self._group.max(peak))

    def describe(self) -> dict[str, Any]:
        """What ``EngineDescription`` says of a device: its name, kernels, notes and bytes."""
        setup, model, decoder = self._setup, self._setup.local, self._decoder
        linears = {name: getattr(decoder.layers[0], name) for name in names.LINEAR_PARTS}
        linears["head"] = decoder.head
        kernels = {name: linear.kernel.name for name, linear in linears.items()}
        notes = dict.fromkeys(note for linear in linears.values() for note in linear.notes)
        norms = (2 * model.n_layers + 1) * model.hidden_size * setup.dtype.itemsize
        blocks = sum(
            getattr(layer, name).nbytes for layer in decoder.layers for name in names.LINEAR_PARTS
        )
        compiled = setup.config.execution == "compile"
        kernels["attention"] = f"attention/{self._attention_name}"
        if self._group.kernel is not None:
            kernels["all_reduce"] = f"all_reduce/{self._group.kernel}"
        return {
            "device": str(setup.device),
            "device_name": device_info(setup.device).name,
            "weight_bytes": weights_bytes(setup),
            "weight_bytes_per_step": blocks + decoder.head.nbytes + norms,
            "kv_bytes_per_token": model.kv_bytes_per_token(setup.dtype.itemsize),
            "kernels": kernels,
            "notes": (*notes, *self._attention_notes, *self._group.notes),
            "compile_cache": compile_cache_state() if compiled else None,
        }

    def close(self) -> None:
        """Frees the device."""
        for name in ("_stepper", "_sampler", "_decoder", "_cache"):
            if hasattr(self, name):
                delattr(self, name)
        if self._setup.device.type == "cuda":
            torch.cuda.empty_cache()

    def _load_weights(self, progress: Progress | None) -> None:
        setup, group, checkpoint = self._setup, self._group, None
        if setup.config.weights == "random":
            source = RandomSource(setup.config.seed, setup.dtype, setup.device)
        else:
            checkpoint = setup.open()
            redundant = names.redundant(setup.model)
            source = CheckpointSource(checkpoint, setup.device, redundant, combine=group.max)
        try:
            load_weights(
                self._decoder,
                setup.model,
                source,
                shard=setup.shard,
                adds_biases=setup.rank == 0,
                scheme=setup.scheme,
                head_scheme=setup.head_scheme,
                dtype=setup.dtype,
                device=setup.device,
                on_layer=None if progress is None else lambda i, n: progress("load", i, n),
            )
        finally:
            if checkpoint is not None:
                checkpoint.close()

    def _prefill(self, ids: Tensor, slot: int) -> Tensor:
        """Runs a prompt through the model in chunks; returns the last chunk's hidden states."""
        hidden = None
        for chunk in self._chunks(len(ids)):
            hidden = self._forward(ids, chunk, slot)
        assert hidden is not None, "prompts are not empty"
        return hidden

    def _forward(self, ids: Tensor, chunk: range, slot: int) -> Tensor:
        """Hidden states [T, D] of one chunk of one sequence."""
        positions = torch.arange(chunk.start, chunk.stop, device=ids.device)
        return self._decoder(
            ids[None, chunk.start : chunk.stop],
            positions[None],
            self._cache,
            first_slot=slot,
            length=chunk.stop,
        )[0]

    def _chunks(self, n: int) -> Iterator[range]:
        size = self._setup.config.prefill_chunk
        for start in range(0, n, size):
            yield range(start, min(start + size, n))


class Pending:
    """Tokens on their way to the host, where ``wait`` gets them."""

    def __init__(self, sampled: Sampled) -> None:
        self._host = sampled.map(_to_host)
        self._ready = None
        if sampled.ids.is_cuda:
            self._ready = torch.cuda.Event()
            self._ready.record()

    def wait(self) -> Tokens:
        """The tokens of every row, once they are there."""
        if self._ready is not None:
            self._ready.synchronize()
        host = self._host
        rows = host.ids.tolist()
        kept = [len(row) for row in rows] if host.n_kept is None else host.n_kept.tolist()
        return [
            [(token, self._logprob(b, t, token)) for t, token in enumerate(row[:n])]
            for b, (row, n) in enumerate(zip(rows, kept, strict=True))
        ]

    def _logprob(self, b: int, t: int, token: int) -> TokenLogprob | None:
        host = self._host
        if host.logprobs is None:
            return None
        assert host.top_ids is not None
        assert host.top_logprobs is not None
        top = zip(host.top_ids[b, t].tolist(), host.top_logprobs[b, t].tolist(), strict=True)
        return TokenLogprob(token_id=token, logprob=float(host.logprobs[b, t]), top=tuple(top))


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, of its own: complete once the device's event is."""
    if not tensor.is_cuda:
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class out_of_memory_in:  # noqa: N801 (reads as a statement)
    """Turns the device's out-of-memory into ours, with the phase it happened in."""

    def __init__(self, phase: str) -> None:
        self.phase = phase

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
            raise OutOfMemoryError(self.phase, free_bytes=free) from error
