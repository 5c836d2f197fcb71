"""From a request to a ticket: prompts are made off the event loop where that takes long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from starlette.requests import Request

from hotloop.engine.service import Ticket
from hotloop.serve.gate import SALT
from hotloop.serve.served import Model
from hotloop.types import Prompt, SamplingParams


async def submit(
    request: Request,
    model: Model,
    prompts: Callable[[], Sequence[Prompt]],
    params: SamplingParams,
    *,
    large: bool,
) -> Ticket:
    """Submits prompts.

    Args:
        request: The request.
        model: The model.
        prompts: Makes the prompts: of a chat by its template.
        params: Sampling options.
        large: Making the prompts or tokenizing them takes long: another thread does it.

    Raises:
        HotloopError: See ``Service.submit``.
    """
    salt = request.scope.get(SALT, "")

    def submitted() -> Ticket:
        return model.service.submit_all(prompts(), params, salt=salt, clamp=True)

    return await asyncio.to_thread(submitted) if large else submitted()
