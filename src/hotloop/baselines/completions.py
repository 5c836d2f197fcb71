"""A client for OpenAI's completions API that records the arrival time of each streamed event.

Servers differ: some take token ids as a prompt, some report the number of tokens, some send an
empty event first, or several tokens in one event. A field that a server refuses is left out of
later requests, and ``refused`` lists it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self
from urllib.parse import urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, Field

from hotloop.errors import (
    ConfigError,
    HotloopError,
    UnknownNameError,
    UnsupportedError,
    shorten,
    shorten_value,
)
from hotloop.untrusted import parse_json, validated

if TYPE_CHECKING:
    import httpx2

API_KEY = "HOTLOOP_ENDPOINT_KEY"
"""The environment variable with the server's API key, which is never recorded."""

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 120.0
"""Seconds to wait for a connection, and for the next bytes of an answer."""

MAX_ATTEMPTS, MAX_WAIT_S = 5, 30.0
"""The most attempts at a request that a busy server refuses, and the most seconds between two."""

MAX_LINE_BYTES, MAX_ANSWER_BYTES = 2**24, 2**30

OPTIONAL = ("ignore_eos", "stream_options", "return_token_ids")
"""Fields of a request that some servers refuse, and that are then left out."""


class ServerError(HotloopError):
    """A server's answer is an error, or cannot be used."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class _Model(_Part):
    id: str = Field(max_length=4096)


class _Models(_Part):
    data: list[_Model]


class _Choice(_Part):
    text: str | None = None
    token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    finish_reason: str | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class _Usage(_Part):
    prompt_tokens: Annotated[int, Field(ge=0)] | None = None
    completion_tokens: Annotated[int, Field(ge=0)] | None = None


class _Completion(_Part):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None
    system_fingerprint: str | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """An answer, with the arrival times of its events.

    Attributes:
        text: Its text.
        times: Seconds from submit to each event that had text or tokens.
        token_ids: Its tokens, if the server sends them.
        n_tokens: The number of its tokens, if the server reports it.
        n_prompt_tokens: Tokens of the prompt, if the server reports it.
        finish_reason: Why it ended, as the server names it.
    """

    text: str
    times: tuple[float, ...]
    token_ids: tuple[int, ...] | None
    n_tokens: int | None
    n_prompt_tokens: int | None
    finish_reason: str | None

    @property
    def intervals_s(self) -> tuple[float, ...]:
        """Seconds between consecutive events."""
        return tuple(b - a for a, b in zip(self.times, self.times[1:], strict=False))


class CompletionsClient:
    """A client of one server, which threads can share.

    Args:
        url: Its base URL, such as ``http://localhost:8000/v1``; ``#NAME`` after it chooses one of
            several models.
        read_timeout_s: Seconds to wait for the next bytes of an answer.

    Attributes:
        model: The served model's name.
        server: The server's own name, if it reports one.

    Raises:
        ConfigError: The URL cannot be used.
        ServerError: The server cannot be reached, or does not speak the protocol.
        UnknownNameError: It serves several models, or not the chosen model.
    """

    def __init__(self, url: str, *, read_timeout_s: float = READ_TIMEOUT_S) -> None:
        import httpx2

        self.url, chosen = _checked_url(url)
        self._refused: set[str] = set()
        key = os.environ.get(API_KEY)
        self._http = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(read_timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
        )
        try:
            self.model, self.server = self._choose_model(chosen)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes all connections."""
        self._http.close()

    @property
    def refused(self) -> tuple[str, ...]:
        """The optional fields that the server has refused."""
        return tuple(sorted(self._refused))

    def complete(
        self, prompt: str | Sequence[int], max_tokens: int, *, ignore_eos: bool = False
    ) -> Completion:
        """Completes a prompt greedily, streamed.

        Raises:
            UnsupportedError: The server does not take token ids.
            ServerError: It fails, sends nothing for too long, or sends data that cannot be read.
        """
        body = self._body(prompt, max_tokens) | {
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        if ignore_eos:
            body["ignore_eos"] = True
        texts, times, finish = list[str](), list[float](), None
        tokens: list[int] | None = []
        usage = _Usage()
        for at_s, part in self._streamed(body):
            usage = part.usage or usage
            for choice in part.choices[:1]:
                finish = choice.finish_reason or finish
                if not choice.text and not choice.token_ids:
                    continue  # an event without tokens: the first one of some servers, or the last
                times.append(at_s)
                texts.append(choice.text or "")
                if choice.token_ids is None:
                    tokens = None
                elif tokens is not None:
                    tokens += choice.token_ids
        if not times:
            raise ServerError(f"{self.url} sent an answer without text.")
        return Completion(
            text="".join(texts),
            times=tuple(times),
            token_ids=tuple(tokens) if tokens else None,
            n_tokens=len(tokens) if tokens else usage.completion_tokens,
            n_prompt_tokens=usage.prompt_tokens,
            finish_reason=finish,
        )

    def prompt_logprobs(self, ids: Sequence[int], k: int) -> list[dict[int, float]]:
        """Returns log-probabilities of a prompt's tokens after the first.

        Args:
            ids: The prompt.
            k: The number of most likely tokens at each position.

        Returns:
            For each token after the first, log-probabilities by token id: of the token, and of the
            ``k`` most likely tokens.

        Raises:
            UnsupportedError: The server does not return them, or does not take token ids.
        """
        body = self._body(ids, 1) | {"prompt_logprobs": k}
        with self._opened(body) as (_, response):
            answer = self._parsed(response.read())
        found = answer.choices[0].prompt_logprobs if answer.choices else None
        if found is None:
            raise UnsupportedError(
                "the server returns no log-probabilities of prompts (prompt_logprobs, as vLLM "
                "does), "
                "so its quality cannot be measured."
            )
        if len(found) != len(ids):
            raise ServerError(f"{self.url} scored {len(found)} tokens of {len(ids)}.")
        return [_logprobs(entry, token) for entry, token in zip(found[1:], ids[1:], strict=True)]

    def _body(self, prompt: str | Sequence[int], max_tokens: int) -> dict[str, Any]:
        given = prompt if isinstance(prompt, str) else list(prompt)
        return {"model": self.model, "prompt": given, "max_tokens": max_tokens, "temperature": 0}

    def _choose_model(self, chosen: str) -> tuple[str, str]:
        with self._transport():
            response = self._http.get(f"{self.url}/models")
        if response.status_code != 200:
            raise self._refusal(response.status_code, response.content)
        parsed = parse_json(response.content, f"{self.url}/models", refuse=_refuse)
        listed = validated(_Models, parsed, f"{self.url}/models", refuse=_refuse)
        names = [model.id for model in listed.data]
        if not chosen and len(names) == 1:
            chosen = names[0]
        if chosen not in names:
            raise UnknownNameError(
                "model of the server", chosen, names, hint="Choose one with #NAME after the URL."
            )
        return chosen, shorten(response.headers.get("server", ""), 100)

    def _streamed(self, body: dict[str, Any]) -> Iterator[tuple[float, _Completion]]:
        """Yields the chunks of a streamed answer, each with the seconds from submit."""
        for at_s, line in self._lines(body):
            name, _, data = line.partition(b":")
            if name != b"data" or data.strip() in (b"", b"[DONE]"):
                continue  # a comment, an event's name, or the end
            yield at_s, self._parsed(data)

    def _lines(self, body: dict[str, Any]) -> Iterator[tuple[float, bytes]]:
        rest, size, at_s = b"", 0, 0.0
        with self._opened(body) as (started, response):
            for chunk in response.iter_bytes():
                at_s = time.perf_counter() - started
                size += len(chunk)
                *lines, rest = (rest + chunk).split(b"\n")
                if len(rest) > MAX_LINE_BYTES or size > MAX_ANSWER_BYTES:
                    raise ServerError(
                        f"{self.url} sent an answer of more than {MAX_ANSWER_BYTES:,} bytes, or a "
                        f"line of more than {MAX_LINE_BYTES:,}."
                    )
                for line in lines:
                    yield at_s, line.strip()
        yield at_s, rest.strip()

    @contextmanager
    def _opened(self, body: dict[str, Any]) -> Generator[tuple[float, httpx2.Response]]:
        """Sends a request; repeats it if the server is busy or refuses a field.

        Yields:
            The time at which it was sent, and its response, which is closed after the block.
        """
        attempts = 0
        while True:
            kept = {name: value for name, value in body.items() if name not in self._refused}
            request = self._http.build_request("POST", f"{self.url}/completions", json=kept)
            with self._transport():
                started = time.perf_counter()
                with closing(self._http.send(request, stream=True)) as response:
                    status = response.status_code
                    if status == 200:
                        yield started, response
                        return
                    content = response.read()
            refusal = self._refusal(status, content)
            attempts += 1
            if status in (429, 503) and attempts < MAX_ATTEMPTS:
                time.sleep(_wait_s(response.headers.get("retry-after"), attempts))
            elif status in (400, 422):
                self._leave_out(kept, content, refusal)
            else:
                raise refusal

    @contextmanager
    def _transport(self) -> Generator[None]:
        """Converts the HTTP client's errors to hotloop's."""
        import httpx2

        try:
            yield
        except httpx2.TimeoutException as error:
            raise ServerError(
                f"{self.url} sent nothing for too long ({type(error).__name__})."
            ) from error
        except httpx2.HTTPError as error:
            message = shorten(str(error)) or type(error).__name__
            raise ServerError(f"{self.url} cannot be reached: {message}.") from error

    def _leave_out(self, body: Mapping[str, Any], content: bytes, refusal: ServerError) -> None:
        """Records the fields that the server refuses, so that later requests leave them out."""
        text = content.decode(errors="replace")
        present = [name for name in OPTIONAL if name in body]
        named = [name for name in present if name in text]
        if not named and not isinstance(body["prompt"], str) and "prompt" in text:
            raise UnsupportedError(f"the server takes no token ids as a prompt. {refusal}")
        if not present:
            raise refusal
        self._refused.update(named or present)

    def _parsed(self, data: bytes) -> _Completion:
        parsed = parse_json(data, self.url, refuse=_refuse)
        part = validated(_Completion, parsed, self.url, refuse=_refuse)
        if part.error is not None:
            raise ServerError(f"{self.url} ended its answer with {shorten_value(part.error, 300)}.")
        return part

    def _refusal(self, status: int, content: bytes) -> ServerError:
        message = shorten(" ".join(content[:2000].decode(errors="replace").split()))
        return ServerError(f"{self.url} answers with status {status}: {message}")


def _wait_s(retry_after: str | None, attempt: int) -> float:
    """Returns the seconds to wait: as the server asks, or else growing with each attempt."""
    backoff_s = 0.5 * 2**attempt
    try:
        asked_s = backoff_s if retry_after is None else float(retry_after)
    except ValueError:  # a date
        asked_s = backoff_s
    return min(max(backoff_s if math.isnan(asked_s) else asked_s, 0.0), MAX_WAIT_S)


def _logprobs(entry: dict[str, Any] | None, token: int) -> dict[int, float]:
    """Reads one position of ``prompt_logprobs``: by token id, an object with ``logprob``."""
    try:
        found = {int(key): float(value["logprob"]) for key, value in (entry or {}).items()}
    except (TypeError, ValueError, KeyError) as error:
        raise ServerError(
            f"prompt_logprobs cannot be read: {shorten_value(entry, 200)}."
        ) from error
    if token not in found:
        raise ServerError(f"prompt_logprobs have no entry for the prompt's token {token}.")
    return found


def _refuse(where: object, problem: str) -> ServerError:
    return ServerError(f"{where}: {problem}")


def _checked_url(url: str) -> tuple[str, str]:
    """Returns a base URL without its fragment, and the fragment."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"{shorten_value(url)} is not the URL of a server: give one such as "
            "http://localhost:8000/v1."
        )
    if "@" in parts.netloc or parts.query:
        raise ConfigError(
            "the URL must not have a password or a query, since records contain it: give the "
            f"server's API key in {API_KEY}."
        )
    return urlunsplit((*parts[:3], "", "")).rstrip("/"), parts.fragment
