"""``/v1/completions``: continues a prompt, or several."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from hotloop.engine.service import Ticket
from hotloop.serve.answers import (
    STREAM_HEADERS,
    ChunkFormatter,
    Chunks,
    as_string,
    cancelled_if_gone,
    compact,
    respond,
    usage,
)
from hotloop.serve.bodies import LARGE_BYTES, read
from hotloop.serve.errors import ApiError
from hotloop.serve.logprobs import CompletionLogprobs, ScoredToken, scored_prompt
from hotloop.serve.metrics import Tally
from hotloop.serve.schemas import CompletionBody
from hotloop.serve.served import LoadedModel, ServedModel
from hotloop.serve.submit import submit
from hotloop.text.tokenizer import Tokenizer
from hotloop.types import Delta, Generation, Score, Timing


async def completions(request: Request) -> Response:
    """Continues a prompt, or several."""
    served: ServedModel = request.app.state.served
    request_body = await read(request, CompletionBody, served.settings)
    served.check_name(request_body.model)
    model = served.model
    _check(request_body, served.settings.max_choices)
    large = len(request_body.prompts) * max(map(len, request_body.prompts)) > LARGE_BYTES
    prompts = (
        await asyncio.to_thread(_encoded, request_body, model)
        if large
        else _encoded(request_body, model)
    )
    if not all(prompts):
        raise ApiError(400, "prompt: a prompt is empty: give at least one token.", param="prompt")
    params = None  # if prompts are only echoed
    if not (request_body.echo and request_body.max_tokens == 0):
        params = request_body.params(model.sampling, served.settings)
    scored: list[list[ScoredToken]] = []
    if request_body.echo and request_body.logprobs is not None:
        scored = [await _scored(request, served, ids, request_body.logprobs) for ids in prompts]
    ticket = None
    if params is not None:
        ticket = await submit(request, model, prompts, params, large=large)
    formatter = CompletionFormatter(served, request_body, model.tokenizer, prompts, scored)
    if ticket is None:
        return _only_echoed(served, request_body, formatter, prompts)
    return await respond(served, ticket, formatter, request_body, request.receive)


def _check(request_body: CompletionBody, max_choices: int) -> None:
    """Refuses combinations of fields that are not supported.

    Raises:
        ApiError: A field is not supported, or a combination of fields; ``param`` names it.
    """
    if request_body.suffix:
        raise ApiError(
            400, "suffix: fill-in-the-middle is not supported: leave suffix out.", param="suffix"
        )
    n = request_body.n or 1
    if request_body.best_of is not None and request_body.best_of != n:
        raise ApiError(
            400,
            f"best_of is {request_body.best_of}, but this server does not rank answers: leave it "
            "out.",
            param="best_of",
        )
    if not request_body.prompts:
        raise ApiError(400, "prompt: the list is empty: give at least one prompt.", param="prompt")
    if len(request_body.prompts) * n > max_choices:
        raise ApiError(
            400,
            f"{len(request_body.prompts)} prompts with n {n} are {len(request_body.prompts) * n} "
            "answers, more "
            f"than {max_choices}: send several requests.",
            param="prompt",
        )


def _encoded(request_body: CompletionBody, model: LoadedModel) -> list[list[int]]:
    return [
        model.required_tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        for prompt in request_body.prompts
    ]


async def _scored(
    request: Request, served: ServedModel, ids: list[int], n_alternatives: int
) -> list[ScoredToken]:
    """Scores a prompt: log-probabilities of its tokens after the first, and alternatives."""
    if len(ids) < 2:
        return scored_prompt(ids, None, 0)
    ticket: Ticket = served.service.score(ids, n_top=n_alternatives if n_alternatives > 1 else 0)
    async with cancelled_if_gone(served, ticket, request.receive):
        while not ticket.done:
            await ticket.arrived()
            for score in ticket.take():
                assert isinstance(score, Score)
                return scored_prompt(ids, score, n_alternatives)
    raise ClientDisconnect


def _only_echoed(
    served: ServedModel,
    request_body: CompletionBody,
    formatter: CompletionFormatter,
    prompts: Sequence[list[int]],
) -> Response:
    """Returns the response of ``max_tokens`` 0, for which nothing is generated."""
    tally = Tally(served.metrics, sum(map(len, prompts)))
    deltas = [
        Delta(
            index=i * (request_body.n or 1) + j,
            text="",
            token_ids=(),
            logprobs=(),
            generation=Generation(
                prompt_ids=tuple(ids),
                token_ids=(),
                text="",
                finish_reason="length",
                timing=Timing(n_tokens=0, ttft_s=0.0, e2e_s=0.0),
                logprobs=(),
            ),
        )
        for i, ids in enumerate(prompts)
        for j in range(request_body.n or 1)
    ]
    if not request_body.stream:
        return JSONResponse(formatter.body(deltas, usage(tally)))
    text = "".join(formatter.events(delta, "") for delta in deltas)
    text += formatter.last_events(
        usage(tally), wanted=bool(request_body.stream_options.include_usage)
    )
    return Response(text, headers=STREAM_HEADERS)


class CompletionFormatter(ChunkFormatter):
    """Formats answers as text completions.

    Args:
        served: The served model.
        request_body: The request.
        tokenizer: The model's tokenizer.
        prompts: The prompts.
        scored: The tokens of each prompt with their log-probabilities; empty if they were not
            requested.
    """

    def __init__(
        self,
        served: ServedModel,
        request_body: CompletionBody,
        tokenizer: Tokenizer | None,
        prompts: Sequence[list[int]],
        scored: Sequence[list[ScoredToken]],
    ) -> None:
        self._about = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.settings.name,
        }
        self._chunks = Chunks(self._about)
        self._request_body, self._tokenizer = request_body, tokenizer
        self._prompts, self._scored = prompts, scored
        self._choices: dict[int, _Choice] = {}

    def events(self, delta: Delta, usage: str) -> str:
        """See ``Formatter``."""
        choice, events = self._choices.get(delta.index), ""
        if choice is None:
            choice = self._choice(delta.index)
            if self._request_body.echo:
                events = self._event(delta.index, choice.echoed, choice.echoed_logprobs, usage)
        logprobs = choice.logprobs(delta) if delta.logprobs else None
        ids = delta.token_ids if self._request_body.return_token_ids else ()
        if delta.text or logprobs is not None or ids:
            events += self._event(delta.index, delta.text, logprobs, usage, ids=ids)
        if delta.generation is not None:
            finish = f'"{_finish(delta.generation)}"'
            events += self._event(delta.index, "", None, usage, finish)
        return events

    def body(self, deltas: Sequence[Delta], usage: dict[str, Any]) -> dict[str, Any]:
        """See ``Formatter``."""
        ended = {delta.index: delta for delta in deltas if delta.generation is not None}
        choices = []
        for i in sorted(ended):
            choice, generation = self._choice(i), ended[i].generation
            assert generation is not None
            lists = [choice.echoed_logprobs, choice.logprobs(generation)]
            choices.append(
                {
                    "index": i,
                    "text": choice.echoed + generation.text,
                    "logprobs": _joined([each for each in lists if each is not None]),
                    "finish_reason": _finish(generation),
                }
                | (
                    {"token_ids": generation.token_ids}
                    if self._request_body.return_token_ids
                    else {}
                )
            )
        return {**self._about, "choices": choices, "usage": usage}

    def _choice(self, index: int) -> _Choice:
        i = index // (self._request_body.n or 1)
        scored = self._scored[i] if self._scored else []
        choice = _Choice(self._request_body, self._tokenizer, i, self._prompts[i], scored)
        self._choices[index] = choice
        return choice

    def _event(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None,
        usage: str,
        finish: str = "null",
        ids: Sequence[int] = (),
    ) -> str:
        listed = "null" if logprobs is None else compact(logprobs)
        with_ids = f',"token_ids":[{",".join(map(str, ids))}]' if ids else ""
        return self._chunks.event(
            f'{{"index":{index},"text":{as_string(text)},'
            f'"logprobs":{listed},"finish_reason":{finish}{with_ids}}}',
            usage,
        )


class _Choice:
    """One answer of a request."""

    def __init__(
        self,
        request_body: CompletionBody,
        tokenizer: Tokenizer | None,
        i: int,
        ids: list[int],
        scored: list[ScoredToken],
    ) -> None:
        self.echoed, self.echoed_logprobs = "", None
        self._lists: CompletionLogprobs | None = None
        given = request_body.prompts[i]
        if request_body.echo:
            if isinstance(given, str):
                self.echoed = given
            elif tokenizer is not None:
                self.echoed = tokenizer.decode(given)
        if request_body.logprobs is not None and tokenizer is not None:
            self._lists = CompletionLogprobs(tokenizer)
            self.echoed_logprobs = self._lists.of_prompt(ids, scored)

    def logprobs(self, piece: Delta | Generation) -> dict[str, Any] | None:
        """Returns the ``logprobs`` lists of a delta's tokens; None if they were not requested."""
        if self._lists is None or not piece.logprobs:
            return None
        return self._lists.of_answer(piece.logprobs)


def _joined(parts: list[dict[str, list[Any]]]) -> dict[str, list[Any]] | None:
    if not parts:
        return None
    return {name: [item for part in parts for item in part[name]] for name in parts[0]}


def _finish(generation: Generation) -> str:
    return "length" if generation.finish_reason == "length" else "stop"
