"""``/v1/completions``: a prompt, or several, and what follows them."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hotloop.serve.answers import event, respond
from hotloop.serve.bodies import LARGE_BYTES, read
from hotloop.serve.errors import ApiError
from hotloop.serve.schemas import CompletionBody
from hotloop.serve.served import Served
from hotloop.serve.submit import submit
from hotloop.types import Delta, Generation, Prompt

_as_json = json.encoder.encode_basestring


async def completions(request: Request) -> Response:
    """Continues a prompt, or several."""
    served: Served = request.app.state.served
    asked = await read(request, CompletionBody, served.settings)
    served.check_name(asked.model)
    model = served.model
    if asked.suffix:
        raise ApiError(400, "suffix: this model cannot fill in the middle.", param="suffix")
    params = asked.params(model.sampling, served.settings)
    prompts = _prompts(asked, served)
    large = sum(map(len, prompts)) > LARGE_BYTES
    ticket = await submit(request, model, lambda: prompts, params, large=large)
    shape = CompletionShape(served)
    return await respond(model.service, ticket, shape, asked, request.receive, served.settings)


def _prompts(asked: CompletionBody, served: Served) -> list[Prompt]:
    given = asked.prompt
    if isinstance(given, str):
        return [given]
    if not given:
        raise ApiError(400, "prompt: there must be at least one.", param="prompt")
    prompts: list[Any] = [given] if isinstance(given[0], int) else list(given)
    n = len(prompts) * (asked.n or 1)
    if n > served.settings.max_choices:
        raise ApiError(
            400,
            f"{len(prompts)} prompts with n {asked.n or 1} are {n} answers; a request may have "
            f"{served.settings.max_choices}.",
            param="prompt",
        )
    return prompts


class CompletionShape:
    """The shape of completions.

    Args:
        served: The model.
    """

    def __init__(self, served: Served) -> None:
        self._about = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.settings.name,
        }
        self._chunk = f"data: {json.dumps(self._about)[:-1]}, "

    def events(self, delta: Delta) -> str:
        """See ``Shape``."""
        text = self._event(delta.index, delta.text, "null") if delta.text else ""
        if delta.generation is not None:
            text += self._event(delta.index, "", f'"{_finish(delta.generation)}"')
        return text

    def last_events(self, usage: dict[str, Any] | None) -> str:
        """See ``Shape``."""
        return "" if usage is None else event({**self._about, "choices": [], "usage": usage})

    def body(self, deltas: Sequence[Delta], usage: dict[str, Any]) -> dict[str, Any]:
        """See ``Shape``."""
        ended = {delta.index: delta.generation for delta in deltas if delta.generation is not None}
        choices = [
            {
                "index": i,
                "text": ended[i].text,
                "logprobs": None,
                "finish_reason": _finish(ended[i]),
            }
            for i in sorted(ended)
        ]
        return {**self._about, "choices": choices, "usage": usage}

    def _event(self, index: int, text: str, finish: str) -> str:
        return (
            f'{self._chunk}"choices":[{{"index":{index},"text":{_as_json(text)},'
            f'"logprobs":null,"finish_reason":{finish}}}]}}\n\n'
        )


def _finish(generation: Generation) -> str:
    return "length" if generation.finish_reason == "length" else "stop"
