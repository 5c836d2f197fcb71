"""``LLM``: a model, ready to generate, stream and score.

Sequences live in the slots of a cache. A free slot takes the next waiting prompt: it is prefilled
in chunks, and from then on takes part in every decode step, whose rows are the slots up to the
highest one in use. The host runs one step behind the device: while a step computes, the tokens of
the one before it are looked at, so that the device never waits for Python.

Not thread-safe: one call at a time.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor

from hotloop.engine.execution import Stepper, compile_cache_state
from hotloop.engine.memory import weights_bytes
from hotloop.engine.sampling import Features, Sampled, Sampler
from hotloop.engine.sequence import Sequence as Request
from hotloop.engine.setup import prepare
from hotloop.errors import OutOfMemoryError, RequestError, UnsupportedError
from hotloop.hardware import device_info
from hotloop.kernels.attention import choose_attention
from hotloop.models import names
from hotloop.models.cache import KVCache
from hotloop.models.decoder import Decoder
from hotloop.text.generation_config import generation_defaults
from hotloop.text.tokenizer import Tokenizer, load_tokenizer
from hotloop.types import (
    Delta,
    EngineConfig,
    EngineDescription,
    Generation,
    Prompt,
    SamplingParams,
    Score,
    TokenLogprob,
)
from hotloop.weights.load import load_weights
from hotloop.weights.source import CheckpointSource, RandomSource

Progress = Callable[[str, int, int], None]
"""Told of (phase, done, total) while an engine gets ready."""


class LLM:
    """A loaded model.

    >>> llm = LLM("smollm2-135m", quant="int4-g64", execution="compile")
    >>> llm.generate("Once upon a time", max_new_tokens=20, temperature=0.8).text

    Args:
        model: A local path, a pulled name or a built-in shape's name; or a whole EngineConfig.
        progress: Told of (phase, done, total) while it gets ready.
        **options: Fields of EngineConfig.

    Raises:
        HotloopError: The model cannot be found, is damaged, or does not fit; each says why.

    Attributes:
        config: As asked for, with what was left to hotloop filled in.
        tokenizer: The model's own; None for random weights of a built-in shape.
    """

    def __init__(
        self, model: str | EngineConfig, *, progress: Progress | None = None, **options: Any
    ) -> None:
        if isinstance(model, EngineConfig):
            config = dataclasses.replace(model, **options)
        else:
            config = EngineConfig(model=model, **options)
        started = time.perf_counter()
        with _out_of_memory_in("load"), torch.inference_mode():
            self._setup = prepare(config)
            self._load(progress)
        self.config = self._setup.config
        self._load_s = time.perf_counter() - started
        started = time.perf_counter()
        with _out_of_memory_in("warmup"):
            if progress:
                progress("warmup", 0, 0)
            self._warm_up()
        self._warmup_s = time.perf_counter() - started
        self._compile_cache = compile_cache_state() if self.config.execution == "compile" else None

    # ------------------------------------------------------------------------------ generating

    @overload
    def generate(
        self, prompts: str, params: SamplingParams | None = None, **options: Any
    ) -> Generation: ...

    @overload
    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None, **options: Any
    ) -> list[Generation]: ...

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        params: SamplingParams | None = None,
        **options: Any,
    ) -> Generation | list[Generation]:
        """Answers a prompt, or several at once.

        Args:
            prompts: Text, or a list whose items are texts or lists of token ids.
            params: How to sample; None takes the model's own suggestions.
            **options: Fields of SamplingParams, over those of ``params``.

        Returns:
            One Generation for one text, a list in the order of ``prompts`` for a list.

        Raises:
            RequestError: A prompt that cannot be served; nothing is generated then.
        """
        single = isinstance(prompts, str)
        listed: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
        done = {
            delta.index: delta.generation
            for delta in self.stream(listed, params, **options)
            if delta.generation is not None
        }
        generations = [done[i] for i in range(len(listed))]
        return generations[0] if single else generations

    def stream(
        self,
        prompts: str | Sequence[Prompt],
        params: SamplingParams | None = None,
        **options: Any,
    ) -> Generator[Delta]:
        """As ``generate``, piece by piece. Closing the iterator abandons what is unfinished.

        Raises:
            RequestError: At once, not at the first piece.
        """
        submitted_s = time.perf_counter()
        params = dataclasses.replace(params or self.default_sampling, **options)
        listed: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
        requests = [
            self._request(i, prompt, params, submitted_s) for i, prompt in enumerate(listed)
        ]
        return self._run(requests)

    def score(self, windows: Iterable[Sequence[int]], *, full: bool = False) -> Iterator[Score]:
        """Scores windows of token ids, through the same weights, kernels and cache.

        Args:
            windows: Each at least two tokens, and at most the context.
            full: Also give the whole distribution at each position.

        Yields:
            A Score per window, on the CPU.
        """
        for window in windows:
            ids = list(window)
            if len(ids) < 2:
                raise RequestError(f"a window to score needs 2 tokens or more, not {len(ids)}.")
            self._check_ids(ids)
            if len(ids) > self._setup.n_positions:
                raise RequestError(
                    f"a window of {len(ids)} tokens is beyond the context of "
                    f"{self._setup.n_positions}; use a smaller window or a larger max_seq_len."
                )
            yield self._score(torch.tensor(ids), full)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with no special tokens added."""
        return self._tokenizer_or_refuse().encode(text, add_special=False)

    @cached_property
    def default_sampling(self) -> SamplingParams:
        """What the model's makers suggest; greedy where they suggest nothing."""
        path = self._setup.path
        if path is None or self.config.weights == "random":
            return SamplingParams()
        return SamplingParams(**generation_defaults(path))

    def describe(self) -> EngineDescription:
        """What is really running."""
        setup, model = self._setup, self._setup.model
        decoder = self._decoder
        block = decoder.layers[0]
        linears = {name: getattr(block, name) for name in names.LINEAR_PARTS}
        linears["head"] = decoder.head
        kernels = {name: linear.kernel.name for name, linear in linears.items()}
        notes = dict.fromkeys(note for linear in linears.values() for note in linear.notes)
        norms = (2 * model.n_layers + 1) * model.hidden_size * setup.dtype.itemsize
        blocks = sum(
            getattr(layer, name).nbytes for layer in decoder.layers for name in names.LINEAR_PARTS
        )
        return EngineDescription(
            config=self.config,
            family=model.family,
            device=str(setup.device),
            device_name=device_info(setup.device).name,
            dtype=str(setup.dtype).removeprefix("torch."),
            vocab_size=model.vocab_size,
            max_seq_len=setup.n_positions,
            n_params=model.n_params,
            weight_bytes=weights_bytes(setup),
            weight_bytes_per_step=blocks + decoder.head.nbytes + norms,
            kv_bytes_per_token=model.kv_bytes_per_token(setup.dtype.itemsize),
            kernels=kernels | {"attention": f"attention/{self._attention_name}"},
            notes=(*notes, *self._attention_notes),
            load_s=self._load_s,
            warmup_s=self._warmup_s,
            compile_cache=self._compile_cache,
        )

    def close(self) -> None:
        """Frees the device."""
        cuda = self._setup.device.type == "cuda"
        for name in ("_stepper", "_sampler", "_decoder", "_cache"):
            if hasattr(self, name):
                delattr(self, name)
        if cuda:
            torch.cuda.empty_cache()

    # ------------------------------------------------------------------------------ getting ready

    def _load(self, progress: Progress | None) -> None:
        setup, model = self._setup, self._setup.model
        self.tokenizer: Tokenizer | None = None
        if setup.path is not None and setup.config.weights == "checkpoint":
            self.tokenizer = load_tokenizer(setup.path)
        self._attention_name, attention, self._attention_notes = choose_attention(
            setup.device, setup.dtype
        )
        self._decoder = Decoder(
            model, n_positions=setup.n_positions, attention=attention, device=setup.device
        )
        checkpoint = None
        if setup.config.weights == "random":
            source = RandomSource(setup.config.seed, setup.dtype, setup.device)
        else:
            checkpoint = setup.open()
            tied = frozenset({f"{names.HEAD}.weight"} if model.tie_embeddings else ())
            source = CheckpointSource(checkpoint, setup.device, ignored=tied)
        try:
            load_weights(
                self._decoder,
                model,
                source,
                scheme=setup.scheme,
                head_scheme=setup.head_scheme,
                dtype=setup.dtype,
                device=setup.device,
                on_layer=None if progress is None else lambda i, n: progress("load", i, n),
            )
        finally:
            if checkpoint is not None:
                checkpoint.close()
        self._cache = KVCache(
            n_layers=model.n_layers,
            n_slots=setup.config.max_batch_size,
            n_kv_heads=model.n_kv_heads,
            n_positions=setup.n_positions,
            head_dim=model.head_dim,
            dtype=setup.dtype,
            device=setup.device,
        )
        # Rows of the embedding beyond the tokenizer's vocabulary are padding: never chosen.
        n_tokens = self.tokenizer.vocab_size if self.tokenizer else model.vocab_size
        self._sampler = Sampler(self._cache.n_slots, min(n_tokens, model.vocab_size), setup.device)
        self._stepper = Stepper(
            self._decoder,
            self._cache,
            self._sampler,
            execution=setup.config.execution,
            reads_whole_cache=self._attention_name == "cpu",
            device=setup.device,
        )

    def _warm_up(self) -> None:
        """Compiles and captures what a greedy run with one prompt needs, and touches the rest."""
        prompt = [i % self._setup.model.vocab_size for i in range(1, 4)]
        n = min(4, self._setup.n_positions - len(prompt))
        if n >= 1:
            self.generate([prompt], SamplingParams(max_new_tokens=n, ignore_eos=True))
        if self._setup.device.type == "cuda":
            torch.cuda.synchronize(self._setup.device)

    # ------------------------------------------------------------------------------ requests

    def _tokenizer_or_refuse(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UnsupportedError(
                f"{self.config.model} with random weights has no tokenizer: give token ids."
            )
        return self.tokenizer

    def _check_ids(self, ids: Sequence[int]) -> None:
        vocab_size = self._setup.model.vocab_size
        for i in ids:
            if not 0 <= i < vocab_size:
                raise RequestError(
                    f"token id {i} is outside the vocabulary: ids are 0 to {vocab_size - 1}."
                )

    def _request(
        self, index: int, prompt: Prompt, params: SamplingParams, submitted_s: float
    ) -> Request:
        if isinstance(prompt, str):
            ids = self._tokenizer_or_refuse().encode(prompt)
        else:
            ids = list(prompt)
            self._check_ids(ids)
        if not ids:
            raise RequestError("the prompt is empty: give at least one token.")
        if params.stop and self.tokenizer is None:
            self._tokenizer_or_refuse()
        room = self._setup.n_positions - len(ids)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, and the context of {self._setup.n_positions} "
                "must hold at least one more: shorten it, or raise max_seq_len."
            )
        wanted = params.max_new_tokens
        if wanted is not None and wanted > room:
            raise RequestError(
                f"the prompt has {len(ids)} tokens and max_new_tokens is {wanted}, together more "
                f"than the context of {self._setup.n_positions}: shorten either, or raise "
                "max_seq_len."
            )
        return Request(
            index,
            ids,
            params,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            max_new_tokens=wanted or room,
            eos_ids=self.tokenizer.eos_ids if self.tokenizer else frozenset(),
            tokenizer=self.tokenizer,
            submitted_s=submitted_s,
        )

    def _run(self, requests: list[Request]) -> Generator[Delta]:
        waiting = deque(requests)
        slots: list[Request | None] = [None] * self._cache.n_slots
        launched: _Launched | None = None
        while waiting or launched or any(slots):
            for slot in range(len(slots)):
                if waiting and slots[slot] is None:
                    request = slots[slot] = waiting.popleft()
                    yield from self._deliver(slots, self._admit(request, slot))
            # The next step starts before the last one's tokens are looked at.
            previous, launched = launched, self._launch(slots, launched)
            if previous is not None:
                yield from self._deliver(slots, previous)

    @torch.inference_mode()
    def _admit(self, request: Request, slot: int) -> _Launched:
        """Prefills a prompt into a slot, and samples its first token."""
        request.slot = slot
        with _out_of_memory_in("prefill"):
            ids = torch.tensor(request.prompt_ids, device=self._setup.device)
            self._sampler.admit(slot, request.params, request.seed, ids)
            hidden = self._prefill(ids, slot)
            logits = self._decoder.logits(hidden[-1:])
            position = torch.full((1,), len(ids), device=self._setup.device)
            features = Features.of([request.params])
            sampled = self._sampler.sample(logits, position, slot, features)
            self._stepper.ids[slot : slot + 1] = sampled.ids
            self._stepper.positions[slot] = len(ids)
        return _Launched.of(sampled, [request], slot)

    def _prefill(self, ids: Tensor, slot: int) -> Tensor:
        """Runs a prompt through the model in chunks; returns the last chunk's hidden states."""
        hidden = None
        for chunk in _chunks(len(ids), self.config_chunk):
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

    @torch.inference_mode()
    def _launch(self, slots: list[Request | None], previous: _Launched | None) -> _Launched | None:
        """Starts a decode step for whoever will need one, without waiting for it."""
        coming = set() if previous is None else {id(r) for r in previous.requests}
        active = [
            r
            for r in slots
            if r is not None and len(r.token_ids) + (id(r) in coming) < r.max_new_tokens
        ]
        if not active:
            return None
        n = max(r.slot for r in active if r.slot is not None) + 1
        longest = max(len(r.prompt_ids) + len(r.token_ids) for r in active) + 1
        with _out_of_memory_in("decode"):
            sampled = self._stepper.step(n, longest, Features.of(r.params for r in active))
        return _Launched.of(sampled, active, 0)

    def _deliver(self, slots: list[Request | None], launched: _Launched) -> Iterator[Delta]:
        """Hands a step's tokens to their requests, and frees the slots of those that end."""
        for request, token_id, logprob in launched.tokens():
            if request.finish_reason is not None:
                continue  # ended a step ago, when this one was already on its way
            text = request.accept(token_id, logprob)
            ended = request.finish_reason is not None
            if ended:
                assert request.slot is not None
                slots[request.slot] = None
            yield Delta(
                index=request.index,
                text=text,
                token_ids=(token_id,),
                generation=request.generation() if ended else None,
            )

    @torch.inference_mode()
    def _score(self, ids: Tensor, full: bool) -> Score:
        ids = ids.to(self._setup.device)
        logprobs, top1, distributions = [], [], []
        for chunk in _chunks(len(ids) - 1, self.config_chunk):
            logits = self._decoder.logits(self._forward(ids, chunk, 0))
            log_probs = logits.log_softmax(dim=-1)
            labels = ids[chunk.start + 1 : chunk.stop + 1]
            logprobs.append(log_probs.gather(1, labels[:, None])[:, 0].cpu())
            top1.append(log_probs.argmax(dim=-1).cpu())
            if full:
                distributions.append(log_probs.cpu())
        return Score(
            token_logprobs=torch.cat(logprobs),
            top1=torch.cat(top1),
            log_probs=torch.cat(distributions) if full else None,
        )

    @property
    def config_chunk(self) -> int:
        """The most prompt tokens in one forward."""
        return self._setup.config.prefill_chunk


@dataclass(frozen=True, kw_only=True)
class _Launched:
    """A step on its way to the host, and whose tokens it brings."""

    requests: list[Request]
    rows: list[int]
    ids: Tensor
    logprobs: tuple[Tensor, Tensor, Tensor] | None
    ready: torch.cuda.Event | None

    @classmethod
    def of(cls, sampled: Sampled, requests: list[Request], first_slot: int) -> _Launched:
        """Starts copying a step's results to the host; row b is slot ``first_slot + b``."""
        logprobs = None
        if sampled.logprobs is not None:
            assert sampled.top_ids is not None
            assert sampled.top_logprobs is not None
            logprobs = (
                _to_host(sampled.logprobs),
                _to_host(sampled.top_ids),
                _to_host(sampled.top_logprobs),
            )
        ids = _to_host(sampled.ids)
        ready = None
        if sampled.ids.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        rows = [r.slot - first_slot for r in requests if r.slot is not None]
        return cls(requests=requests, rows=rows, ids=ids, logprobs=logprobs, ready=ready)

    def tokens(self) -> Iterator[tuple[Request, int, TokenLogprob | None]]:
        """Waits for the step; every request with its token."""
        if self.ready is not None:
            self.ready.synchronize()
        ids = self.ids.tolist()
        for request, row in zip(self.requests, self.rows, strict=True):
            logprob = None
            if request.params.logprobs is not None and self.logprobs is not None:
                chosen, top_ids, top = self.logprobs
                k = request.params.logprobs
                pairs = zip(top_ids[row, :k].tolist(), top[row, :k].tolist(), strict=True)
                logprob = TokenLogprob(
                    token_id=ids[row], logprob=float(chosen[row]), top=tuple(pairs)
                )
            yield request, ids[row], logprob


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, of its own: complete once the device's event is."""
    if not tensor.is_cuda:
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _chunks(n: int, size: int) -> Iterator[range]:
    for start in range(0, n, size):
        yield range(start, min(start + size, n))


class _out_of_memory_in:  # noqa: N801 (reads as a statement)
    """Turns the device's out-of-memory into ours, with the phase it happened in."""

    def __init__(self, phase: str) -> None:
        self.phase = phase

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
            raise OutOfMemoryError(self.phase, free_bytes=free) from error
