"""``LLM``: a loaded model that generates, streams and scores.

It turns prompts into requests and drives the ``Scheduler``, which owns the requests. The
``Scheduler`` sends commands to an ``EngineCore``, which owns the device.

Calls may overlap, in one thread or several: their requests share the scheduler (``streams``).
"""

from __future__ import annotations

import secrets
import time
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, overload

from hotloop.checked import MAX_SEED, check_names, replace_fields
from hotloop.engine.core import (
    Describe,
    EngineCore,
    QueryPrefillBatching,
    QueryScoreBatching,
    StartMeter,
    StopMeter,
    Synchronize,
)
from hotloop.engine.draft_control import DraftController, StepTimer, sizes_up_to
from hotloop.engine.grammar import Grammars
from hotloop.engine.inputs import as_ids, as_prompts, n_items
from hotloop.engine.memory import check_fits
from hotloop.engine.programs import served_features, serving_steps
from hotloop.engine.ranks import RankGroup
from hotloop.engine.request import Request, Scoring
from hotloop.engine.runner import OnProgress, Runner
from hotloop.engine.scheduler import Job, Scheduler, n_multi_steps
from hotloop.engine.setup import prepare
from hotloop.engine.streams import Piece, Streams
from hotloop.errors import (
    CheckpointError,
    ContextLengthError,
    GrammarError,
    HotloopError,
    NumericsError,
    OutOfMemoryError,
    RequestError,
    UnsupportedError,
    shorten_value,
)
from hotloop.text.generation_config import generation_defaults
from hotloop.text.tokenizer import Tokenizer
from hotloop.types import (
    DEFAULT_NEW_TOKENS,
    ChatPrompt,
    Delta,
    EngineConfig,
    EngineDescription,
    Generation,
    Grammar,
    PeakMemory,
    PrefixReuse,
    Prompt,
    SamplingParams,
    Score,
    StepCost,
    Timing,
)

MAX_FULL_BYTES = 2**28
"""The most bytes that the whole distributions of windows scored together can take."""


class LLM:
    """A loaded model.

    >>> llm = LLM("smollm2-135m", quant="int4-g64", execution="compile")
    >>> llm.generate("Once upon a time", max_new_tokens=20, temperature=0.8).text

    As a context manager it closes itself at the end of the ``with`` block.

    Args:
        model: A local path, a pulled name or a built-in shape's name; or a whole EngineConfig.
        progress: Called with (phase, done, total) while it loads and warms up.
        **options: Fields of EngineConfig.

    Raises:
        HotloopError: The model cannot be found, is damaged, or does not fit; the message says why.
        SystemExit: In a process that torchrun started as a rank other than 0, when the model is
            closed: such a process only serves rank 0.

    Attributes:
        config: The configuration as given; ``head``, ``execution``, ``device``, ``dtype``,
            ``max_seq_len`` and ``prefix_cache`` are filled in if they were left to hotloop.
        tokenizer: The model's tokenizer; None for random weights of a built-in shape.
    """

    def __init__(
        self, model: str | EngineConfig, *, progress: OnProgress | None = None, **options: Any
    ) -> None:
        if isinstance(model, EngineConfig):
            config = replace_fields(model, options, "option")
        else:
            check_names(EngineConfig, options, "option")
            config = EngineConfig(model=model, **options)
        started = time.perf_counter()
        setup = self._setup = prepare(config)
        self.config = setup.resolved
        self.tokenizer: Tokenizer | None = None
        if setup.has_tokenizer:
            self.tokenizer = setup.load_tokenizer()
        # Rows of the embedding beyond the tokenizer's vocabulary are padding, never selected.
        n_tokens = self.tokenizer.vocab_size if self.tokenizer else setup.model.vocab_size
        n_tokens = min(n_tokens, setup.model.vocab_size)
        check_fits(setup)
        self._grammars = Grammars(self._tokenizer_or_refuse, n_tokens)
        runner: EngineCore
        if config.tensor_parallel > 1:
            runner = RankGroup(setup, n_tokens=n_tokens, progress=progress)
        else:
            runner = Runner(setup, n_tokens=n_tokens, progress=progress, grammars=self._grammars)
        self._open_runner: EngineCore | None = runner
        self._load_s = time.perf_counter() - started
        started = time.perf_counter()
        if progress:
            progress("warmup", 0, 0)
        try:
            self._prefill_batching = self._runner.run(QueryPrefillBatching()).wait()
            self._score_batching = self._runner.run(QueryScoreBatching()).wait()
            self._scheduler = self._warm_up()
        except BaseException as error:  # KeyboardInterrupt too: ranks must not outlive it
            self._open_runner = None
            runner.close()
            if isinstance(error, OutOfMemoryError):
                needed, free = error.needed_bytes, error.free_bytes
                raise OutOfMemoryError("warmup", needed, free) from error
            raise
        self._streams = Streams(self._scheduler)
        self._warmup_s = time.perf_counter() - started
        self._facts = self._runner.run(Describe()).wait()

    # ------------------------------------------------------------------------------ generating

    @overload
    def generate(
        self, prompts: str | ChatPrompt, params: SamplingParams | None = None, **options: Any
    ) -> Generation: ...

    @overload
    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None, **options: Any
    ) -> list[Generation]: ...

    def generate(
        self,
        prompts: str | ChatPrompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        **options: Any,
    ) -> Generation | list[Generation]:
        """Generates the answers to one prompt or several.

        Args:
            prompts: Text, a conversation (``tokenizer.chat_prompt``), or a list whose items are
                texts, conversations or lists of token ids.
            params: Sampling options; None takes the model's own defaults.
            **options: Fields of SamplingParams, which override those of ``params``.

        Returns:
            A Generation if ``prompts`` is one text or conversation; for a list, a list in the same
            order. With several answers (``n``), the answers to a prompt are adjacent in the list.

        Raises:
            RequestError: A prompt cannot be served; nothing is generated then.
            NumericsError: The model's logits were not finite for one of the prompts. ``stream``
                yields the answers to the other prompts.
            GrammarError: A grammar became too costly for one of the prompts. ``stream`` yields the
                answers to the other prompts.
        """
        deltas = self._stream(prompts, params, options)
        done = {d.index: d.generation for d in deltas if d.generation is not None}
        generations = [done[i] for i in range(len(done))]
        return generations[0] if isinstance(prompts, str | ChatPrompt) else generations

    def stream(
        self,
        prompts: str | ChatPrompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        **options: Any,
    ) -> Generator[Delta]:
        """Generates like ``generate``, piece by piece. Closing the iterator cancels its requests.

        Requests are submitted when the first piece is taken. Other calls may run at the same time,
        in this thread or another, and then decode in the same steps, if ``max_batch_size`` allows.

        Raises:
            RequestError: As ``generate``; raised by the call, not at the first piece.
        """
        return self._stream(prompts, params, options)

    def score(
        self,
        windows: Iterable[Sequence[int]],
        *,
        full: bool = False,
        share_prefixes: bool = False,
    ) -> Iterator[Score]:
        """Scores windows of token ids, through the same weights, kernels and cache.

        Up to ``max_batch_size`` windows are taken from the iterable in advance and scored together.

        Args:
            windows: Windows of at least two tokens and at most the context.
            full: Also return the whole distribution at each position. Several windows are scored
                together only if their distributions take at most ``MAX_FULL_BYTES``.
            share_prefixes: Compute the prefix that consecutive windows have in common once, as that
                of the answers to a question. It cannot be combined with ``full``. Without it, a
                window is prefilled in the chunks of a prompt, and its scores have the same bits
                whatever else is requested and however many windows are scored together.

        Yields:
            A Score per window, on the CPU.

        Raises:
            RequestError: A window is too short or too long, or has tokens outside the vocabulary;
                it is raised after the scores of the earlier windows. Or ``full`` and
                ``share_prefixes`` are both given.
        """
        if full and share_prefixes:
            raise RequestError(
                "full and share_prefixes cannot be combined, since the distributions of a shared "
                "prefix are not kept: leave one of them out."
            )
        group = object() if share_prefixes else None
        scorings = (self.scoring(window, full=full, group=group) for window in windows)
        self._check_open()
        stream, error, done = self._streams.open([]), None, False
        ahead: deque[Scoring] = deque()
        try:
            while True:
                while not done and self._has_room(ahead):
                    try:
                        following = next(scorings)
                        self._streams.add(stream, following)
                        ahead.append(following)
                    except StopIteration:
                        done = True
                    except Exception as raised:  # of a window, or the caller's own
                        error, done = raised, True
                if not ahead:
                    break
                piece, scoring = self._streams.next(stream), ahead.popleft()
                assert piece is not None, "a window that is not scored has its stream open"
                assert piece[0] is scoring, "windows end in their order"
                del piece
                yield scoring.score()
            if error is not None:
                raise error
        finally:
            self._streams.close(stream)

    def _has_room(self, ahead: Sequence[Scoring]) -> bool:
        """Returns whether another window can be scored together with these."""
        if len(ahead) < 1 or not ahead[0].full:
            return len(ahead) < self.config.max_batch_size
        n_tokens = sum(len(scoring.ids) for scoring in ahead) + len(ahead[-1].ids)
        n_bytes = 4 * n_tokens * self._setup.model.vocab_size
        return len(ahead) < self.config.max_batch_size and n_bytes <= MAX_FULL_BYTES

    def encode(self, text: str) -> list[int]:
        """Encodes plain text as token ids, without adding special tokens."""
        self._check_open()
        if not isinstance(text, str):
            raise RequestError(f"the argument of encode must be text, not {shorten_value(text)}.")
        return self._tokenizer_or_refuse().encode(text, add_special=False)

    @property
    def default_sampling(self) -> SamplingParams:
        """The sampling options of the model's generation config; greedy if it has none.

        ``max_new_tokens`` is None here: a suggested length (``default_new_tokens``) is clamped to
        the context, while an explicit one that exceeds it is refused.
        """
        return SamplingParams(**self._suggestions | {"max_new_tokens": None})

    @property
    def default_new_tokens(self) -> int:
        """The most tokens of an answer without ``max_new_tokens``; the context can allow fewer."""
        return self._suggestions.get("max_new_tokens") or DEFAULT_NEW_TOKENS

    @cached_property
    def _suggestions(self) -> dict[str, Any]:
        path = self._setup.path
        if path is None or self.config.weights == "random":
            return {}
        return generation_defaults(path)

    def describe(self) -> EngineDescription:
        """Describes the running engine."""
        self._check_open()
        setup, model = self._setup, self._setup.model
        tokenizer = self.tokenizer
        read = tokenizer.notes if tokenizer else ()
        return EngineDescription(
            config=setup.config,
            family=model.family,
            dtype=str(setup.dtype).removeprefix("torch."),
            execution=setup.execution,
            vocab_size=model.vocab_size,
            max_seq_len=setup.n_positions,
            n_params=model.n_params,
            load_s=self._load_s,
            warmup_s=self._warmup_s,
            bos_id=tokenizer.bos_id if tokenizer else None,
            adds_bos=tokenizer.adds_bos if tokenizer else False,
            eos_ids=tokenizer.ordered_eos_ids if tokenizer else (),
            **self._facts | {"notes": (*self._facts["notes"], *read)},
        )

    def step_costs(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> tuple[StepCost, ...]:
        """See ``DraftingEngine``; empty without a drafter, and with several.

        The answers are greedy.
        """
        if self._setup.draft is None or len(self._setup.draft.names) > 1:
            return ()
        params = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)
        costs = []
        for k in sizes_up_to(self.config.draft_tokens):
            timer = StepTimer(len(prompts), k)
            requests = [
                self._request(i, prompt, params, time.perf_counter(), speculates=True)
                for i, prompt in enumerate(prompts)
            ]
            with self._streams.hold():
                scheduler = self._new_scheduler(timer, self._scheduler.n_steps)
                _answer(requests, scheduler)
                self._scheduler.forget()  # its seats have been overwritten
            self._check_failures(requests)
            costs.append(timer.cost())
        return tuple(cost for cost in costs if cost is not None)

    @contextmanager
    def meter(self) -> Iterator[PeakMemory]:
        """Measures peak memory in the ``with`` block: the maximum over ranks."""
        self._streams.check_not_held()
        peak = _Peak()
        with self._streams.exclusive():
            self._runner.run(StartMeter()).wait()
        try:
            yield peak
        finally:
            with self._streams.exclusive():
                peak.peak_bytes = self._runner.run(StopMeter()).wait()

    def close(self) -> None:
        """Frees the memory on the device. Later calls are refused, and unfinished streams fail.

        Raises:
            RequestError: The engine has a service, which must be closed first.
        """
        self._streams.check_not_held()
        runner, self._open_runner = self._open_runner, None
        if runner is None:
            return
        with self._streams.exclusive():
            self._streams.fail(self._closed())
            runner.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _runner(self) -> EngineCore:
        """The device side.

        Raises:
            RequestError: The engine is closed.
        """
        if self._open_runner is None:
            raise self._closed()
        return self._open_runner

    def _closed(self) -> RequestError:
        return RequestError(f"this engine of {self.config.model} is closed: make a new LLM.")

    def _check_open(self) -> None:
        """Refuses calls of a closed engine."""
        _ = self._runner

    # ------------------------------------------------------------------------------ warm-up

    def _new_controller(self) -> DraftController | None:
        if self._setup.draft is None:
            return None
        sizes, n = sizes_up_to(self.config.draft_tokens), len(self._setup.draft.names)
        return DraftController(
            sizes,
            n_drafters=n,
            always=self.config.draft_policy == "always",
            ends_early=self._runner.ends_chains,
        )

    def _new_scheduler(
        self,
        controller: DraftController | None,
        n_steps: int = 1,
        prefix_cache: PrefixReuse = "none",
    ) -> Scheduler:
        return Scheduler(
            self._runner,
            n_rows=self.config.max_batch_size,
            n_positions=self._setup.n_positions,
            chunk=self._setup.prefill_chunk,
            controller=controller,
            n_steps=n_steps,
            prefix_cache=prefix_cache,
            prefill_batching=self._prefill_batching,
            score_batching=self._score_batching,
        )

    def _warm_up(self) -> Scheduler:
        """Compiles and captures the programs of one greedy request, by running it.

        If programs are captured, it also chooses the number of steps of multi-step programs from a
        measurement, and captures the programs of a request with the sampling options of the model's
        generation config. With speculative decoding, steps of every number of drafts are run and
        timed.

        Returns:
            A scheduler whose draft controller knows the times of these steps.
        """
        prompt = [i % self._setup.model.vocab_size for i in range(1, 4)]
        most = self._setup.n_positions - len(prompt)

        def answer(scheduler: Scheduler, n: int, sampling: SamplingParams) -> Timing:
            """Generates ``n`` tokens, or as many as the context holds."""
            if most < 1:
                return Timing(n_tokens=0, ttft_s=0.0, e2e_s=0.0)
            options = {"max_new_tokens": min(n, most), "ignore_eos": True}
            params = replace_fields(sampling, options, "sampling option")
            request = self._request(
                0, prompt, params, time.perf_counter(), speculates=scheduler.controller is not None
            )
            _answer([request], scheduler)
            return request.generation().timing

        # Enough tokens for three steps of every kind, even if each accepts all of its drafts.
        n_tokens, greedy = 3, SamplingParams()
        if self._setup.draft is not None:
            per_drafter = sum(1 + k for k in sizes_up_to(self.config.draft_tokens))
            n_tokens = 3 * per_drafter * len(self._setup.draft.names)
        speculative, plain = self._new_scheduler(self._new_controller()), self._new_scheduler(None)
        last = speculative
        answer(speculative, 1 + n_tokens, greedy)
        if self._runner.captures:
            timing = answer(plain, 9, greedy)
            if timing.n_tokens > 1:
                speculative.n_steps = plain.n_steps = n_multi_steps(timing.tpot_s)
            # Captures multi-step programs, whose number of steps is known now.
            answer(speculative, 1 + plain.n_steps, greedy)
            suggested = greedy
            with suppress(CheckpointError):  # raised where the suggestion is used
                suggested = self.default_sampling
            if suggested.temperature > 0:
                last = self._new_scheduler(self._new_controller(), plain.n_steps)
                answer(last, 1 + n_tokens, suggested)
        self._runner.run(Synchronize()).wait()
        reuse = self._setup.prefix_reuse
        if reuse == "chunks" and self._runner.batch_invariant:
            reuse = "tokens"  # which has the same bits here
        if speculative.controller is not None:
            speculative.controller.forget_texts()
        scheduler = self._new_scheduler(speculative.controller, speculative.n_steps, reuse)
        scheduler.n_programs = last.n_programs
        return scheduler

    # ------------------------------------------------------------------------------ service

    def held_by_service(self) -> AbstractContextManager[None]:
        """Keeps the engine for a service, which alone uses its scheduler in the ``with`` block.

        Raises:
            RequestError: The engine is closed, is generating, or has a service.
        """
        self._check_open()
        return self._streams.hold()

    def prepare_to_serve(self) -> Scheduler:
        """Captures or compiles all programs that requests can need, before the first request.

        Returns:
            The scheduler; its ``n_programs`` counts these programs.
        """
        scheduler = self._scheduler
        self._grammars.prepare()
        steps = serving_steps(self._setup, scheduler.n_steps)
        if steps:
            scheduler.feature_sets = served_features(self._setup)
            *_, last = [self._runner.run(step) for step in steps]
            scheduler.n_programs = last.wait().n_programs
            self._runner.run(Synchronize()).wait()
            scheduler.forget()  # its seats have been overwritten
        return scheduler

    # ------------------------------------------------------------------------------ requests

    def requests(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None,
        *,
        salt: str = "",
        clamp: bool = False,
    ) -> list[Request]:
        """Makes requests for ``Service``: ``params.n`` for each prompt, one after the other.

        Raises:
            RequestError: See ``Service.submit``.
        """
        submitted_s = time.perf_counter()
        self._check_open()
        return self._requests(prompts, self._params(params, {}), submitted_s, salt, clamp=clamp)

    def scoring(
        self,
        window: Sequence[int],
        *,
        full: bool,
        n_top: int = 0,
        group: object | None = None,
    ) -> Scoring:
        """Makes the job that scores a window; see ``Service.score`` and ``Scoring``.

        Raises:
            RequestError: The window is too short or too long, or has tokens outside the vocabulary.
        """
        self._check_open()
        n = n_items(window, "a window to score must be a list of token ids")
        if n < 2:
            raise RequestError(f"a window to score needs 2 tokens or more, not {n}.")
        context = self._setup.n_positions
        if n > context:
            raise ContextLengthError(
                f"a window of {n} tokens is beyond the context of {context}; use a smaller window "
                "or a larger max_seq_len (--max-seq-len).",
                context,
            )
        ids = as_ids(window, self._setup.model.vocab_size)
        return Scoring(ids, full=full, n_top=n_top, group=group)

    def check_grammar(self, grammar: Grammar) -> None:
        """Refuses a grammar that cannot be used; see ``Service.check_grammar``.

        Raises:
            RequestError: It is invalid, too costly, not supported, or matches nothing.
        """
        self._grammars.check(grammar)

    def _tokenizer_or_refuse(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UnsupportedError(
                f"{self.config.model} with random weights has no tokenizer: give token ids."
            )
        return self.tokenizer

    def _stream(
        self,
        prompts: str | ChatPrompt | Sequence[Prompt],
        params: SamplingParams | None,
        options: dict[str, Any],
    ) -> Generator[Delta]:
        submitted_s = time.perf_counter()
        self._check_open()
        params = self._params(params, options)
        if params.n > 1 and isinstance(prompts, str | ChatPrompt):
            raise RequestError(
                f"n is {params.n}, but a prompt by itself has one answer: give it in a list, as in "
                "[prompt]."
            )
        requests = self._requests(as_prompts(prompts), params, submitted_s)
        if len(requests) > 1 == self.config.max_batch_size:
            warnings.warn(
                f"{len(requests)} answers are made one after another, since max_batch_size is "
                f"1: LLM(..., max_batch_size={min(len(requests), 8)}) makes several at once.",
                stacklevel=3,  # the caller of generate or stream
            )
        return self._run(requests)

    def _params(self, params: SamplingParams | None, options: dict[str, Any]) -> SamplingParams:
        if params is None:
            params = self.default_sampling
        elif not isinstance(params, SamplingParams):
            raise RequestError(f"params must be SamplingParams, not {shorten_value(params)}.")
        return replace_fields(params, options, "sampling option")

    def _requests(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        submitted_s: float,
        salt: str = "",
        *,
        clamp: bool = False,
    ) -> list[Request]:
        answers = _params_of_answers(params)
        speculates = self._setup.draft is not None
        return [
            self._request(
                i * params.n + j,
                prompt,
                each,
                submitted_s,
                speculates=speculates,
                salt=salt,
                clamp=clamp,
            )
            for i, prompt in enumerate(prompts)
            for j, each in enumerate(answers)
        ]

    def _request(
        self,
        index: int,
        prompt: Prompt,
        params: SamplingParams,
        submitted_s: float,
        *,
        speculates: bool,
        salt: str = "",
        clamp: bool = False,
    ) -> Request:
        if isinstance(prompt, str):
            prompt = self._tokenizer_or_refuse().encode(prompt)
        given = prompt.token_ids if isinstance(prompt, ChatPrompt) else prompt
        n = n_items(given, "a prompt must be text or a list of token ids")
        if n == 0:
            raise RequestError("the prompt is empty: give at least one token.")
        if params.stop:
            self._tokenizer_or_refuse()
        context = self._setup.n_positions
        if n >= context:
            raise ContextLengthError(
                f"the prompt has {n} tokens, but the context of {context} must hold at least one "
                "more: shorten it, or raise max_seq_len (--max-seq-len).",
                context,
            )
        ids = as_ids(given, self._setup.model.vocab_size)
        self._check_biases(params)
        if params.grammar is not None:
            self._grammars.check(params.grammar)
        wanted = params.max_new_tokens
        if wanted is None:  # a default length is clamped, not refused
            wanted = min(self.default_new_tokens, context - n)
        elif wanted > context - n and clamp:
            wanted = context - n
        elif wanted > context - n:
            raise ContextLengthError(
                f"the prompt has {n} tokens and max_new_tokens is {wanted}, together more than the "
                f"context of {context}: shorten either, or raise max_seq_len (--max-seq-len).",
                context,
            )
        if params.min_new_tokens > wanted:
            raise RequestError(
                f"min_new_tokens is {params.min_new_tokens}, more than the {wanted} tokens that "
                "the answer can have: lower it, or raise max_new_tokens."
            )
        return Request(
            index,
            ids,
            params,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            max_new_tokens=wanted,
            eos_ids=self.tokenizer.eos_ids if self.tokenizer else frozenset(),
            tokenizer=self.tokenizer,
            starts_text=isinstance(prompt, ChatPrompt) and prompt.starts_text,
            submitted_s=submitted_s,
            speculates=speculates,
            salt=salt,
        )

    def _check_biases(self, params: SamplingParams) -> None:
        """Refuses biases of tokens that the model cannot produce."""
        vocab_size = self._setup.model.vocab_size
        for token_id, _ in params.logit_bias:
            if token_id >= vocab_size:
                raise RequestError(
                    f"logit_bias has token id {token_id}, which is outside the vocabulary: ids are "
                    f"0 to {vocab_size - 1}."
                )

    def _run(self, requests: list[Request]) -> Generator[Delta]:
        for _, delta in self._pieces(requests):
            assert delta is not None, "a request has deltas"
            yield delta
        self._check_failures(requests)

    def _check_failures(self, requests: Sequence[Request]) -> None:
        """Raises the error of the first request that has failed."""
        for request in requests:
            if request.failed:
                raise self.failure(request)

    def failure(self, request: Request) -> HotloopError:
        """Returns the error of a request that has failed."""
        where = request.index, len(request.token_ids)
        if request.grammar_failure is not None:
            return GrammarError(*where, request.grammar_failure)
        return NumericsError(*where, self.config.dtype)

    def _pieces(self, jobs: Sequence[Job]) -> Generator[Piece]:
        """Submits jobs and yields their pieces; cancels unfinished jobs at the end."""
        self._check_open()
        stream = self._streams.open(jobs)
        try:
            while (piece := self._streams.next(stream)) is not None:
                yield piece
        finally:
            self._streams.close(stream)


def _answer(requests: Sequence[Request], scheduler: Scheduler) -> None:
    """Runs requests to their end with a scheduler that nobody else uses."""
    for request in requests:
        scheduler.submit(request)
    while not scheduler.idle:
        scheduler.iterate()


def _params_of_answers(params: SamplingParams) -> list[SamplingParams]:
    """Returns the sampling options of each answer to a prompt."""
    if params.seed is None:
        return [params] * params.n
    seeds = [(params.seed + i) % (MAX_SEED + 1) for i in range(params.n)]
    return [replace(params, seed=seed) for seed in seeds]


@dataclass
class _Peak:
    peak_bytes: int = 0
