"""A server with OpenAI's completions API, such as vLLM, SGLang, llama-server, Ollama or hotloop.

Times are measured at the client: they include the server's own time, its queue and the transport.
Prompts are token ids, and the server counts tokens; a server that does not support both is
unsupported.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from hotloop.baselines import EngineKind
from hotloop.baselines.common import (
    Tokens,
    UnknownMemory,
    check_levers,
    check_window,
    prepare_own,
    score_of_top,
    tokenizer_of,
)
from hotloop.baselines.completions import Completion, CompletionsClient
from hotloop.errors import ConfigError, UnsupportedError
from hotloop.types import (
    EngineConfig,
    EngineDescription,
    Generation,
    PeakMemory,
    Prompt,
    SamplingParams,
    Score,
    Timing,
)

if TYPE_CHECKING:
    from hotloop.engine.setup import Setup

TOP_K = 20
"""The number of most likely tokens at each position that scores use."""


class EndpointEngine:
    """A server, as an engine of the ``Engine`` protocol.

    Args:
        config: The configuration.
        client: A connected client.
        setup: The recipe's model, as resolved by hotloop.
    """

    def __init__(self, config: EngineConfig, client: CompletionsClient, setup: Setup) -> None:
        started = time.perf_counter()
        self._config, self._client, self._setup = config, client, setup
        self._threads = ThreadPoolExecutor(config.max_batch_size)
        self._several_tokens_per_event = False
        self._tokens = Tokens(
            engine="endpoint",
            tokenizer=tokenizer_of(config),
            vocab_size=setup.model.vocab_size,
            max_seq_len=setup.n_positions,
        )
        self.generate([[0]], SamplingParams(max_new_tokens=2, ignore_eos=True))
        self._warmup_s = time.perf_counter() - started

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Generation]:
        """Answers every prompt by a separate request; all requests run at the same time."""
        ids = self._tokens.prompts(prompts, params)
        n = self._tokens.new_tokens(params)

        def complete(prompt: tuple[int, ...]) -> Completion:
            return self._client.complete(prompt, n, ignore_eos=params.ignore_eos)

        answers = self._threads.map(complete, ids)
        return [
            self._generation(prompt, answer) for prompt, answer in zip(ids, answers, strict=True)
        ]

    def _generation(self, prompt: tuple[int, ...], answer: Completion) -> Generation:
        if answer.n_tokens is None:
            raise UnsupportedError(
                "the server does not report the number of generated tokens (usage), so its speed "
                "cannot be measured."
            )
        self._several_tokens_per_event |= answer.n_tokens > len(answer.times)
        return Generation(
            prompt_ids=prompt,
            token_ids=answer.token_ids or (),
            text=answer.text,
            finish_reason="length" if answer.finish_reason == "length" else "eos",
            timing=Timing(n_tokens=answer.n_tokens, ttft_s=answer.times[0], e2e_s=answer.times[-1]),
        )

    def score(
        self,
        windows: Iterable[Sequence[int]],
        *,
        full: bool = False,
        share_prefixes: bool = False,  # noqa: ARG002
    ) -> Iterator[Score]:
        """Scores windows by the server's log-probabilities of prompts; never whole distributions.

        Raises:
            UnsupportedError: The server does not return them.
        """
        for window in windows:
            check_window(window, self._setup.n_positions)
            entries = self._client.prompt_logprobs(window, TOP_K)
            yield score_of_top(entries, window, TOP_K, top=full)

    def encode(self, text: str) -> list[int]:
        """Tokenizes plain text, with no special tokens added."""
        return self._tokens.encode(text)

    def describe(self) -> EngineDescription:
        """Describes the server, as far as the API reports it."""
        notes = ["TTFT and decode tok/s of a server include its queue and the transport."]
        if self._several_tokens_per_event:
            notes.append(
                "The server sends several tokens per event. TTFT ends with the first event, and "
                "decode tok/s is too high, since it counts this event's other tokens but not "
                "their time."
            )
        client = self._client
        return EngineDescription(
            config=self._config,
            family=self._setup.model.family,
            device="server",
            device_name="server",
            dtype="as served",
            vocab_size=self._setup.model.vocab_size,
            max_seq_len=self._setup.n_positions,
            n_params=None,
            weight_bytes=None,
            weight_bytes_per_step=None,
            kv_bytes_per_token=None,
            notes=tuple(notes),
            warmup_s=self._warmup_s,
            version=f"{client.server or 'server'}, model {client.model}",
            settings={"refused_fields": list(client.refused), "top_logprobs": TOP_K},
        )

    def meter(self) -> AbstractContextManager[PeakMemory]:
        """Measures nothing, since the server is another process, perhaps on another machine."""
        return UnknownMemory()

    def close(self) -> None:
        """Closes the connections."""
        self._threads.shutdown()
        self._client.close()


def create(config: EngineConfig) -> EndpointEngine:
    """Connects to the server, and sends one request.

    Raises:
        ConfigError: The cell has no URL of a server.
        UnsupportedError: The server lacks a feature that measurements need.
        ServerError: The server fails.
    """
    check(config)
    assert config.url is not None, "a cell was checked for its url"
    setup = prepare_own(config, quant="auto")
    client = CompletionsClient(config.url)
    try:
        return EndpointEngine(config, client, setup)
    except BaseException:
        client.close()
        raise


def check(config: EngineConfig) -> None:
    """Refuses a cell without a URL, or with options that only the server can set."""
    check_levers(config, supported=("url", "device", "dtype"), choices={"quant": ("auto", "none")})
    if config.url is None:
        raise ConfigError(
            "the engine endpoint needs the URL of a server: set url in its cell, such as "
            "http://localhost:8000/v1."
        )


ENGINE = EngineKind(create=create, predict=check, reads_checkpoints=True)
