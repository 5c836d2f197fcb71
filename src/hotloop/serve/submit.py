"""Submits requests to the service; long work on prompts is done outside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from starlette.requests import Request

from hotloop.engine.service import Ticket
from hotloop.errors import RequestError, shorten_value
from hotloop.serve.answer_grammar import arguments_grammar
from hotloop.serve.conversations import Turn
from hotloop.serve.errors import ApiError
from hotloop.serve.gate import SALT
from hotloop.serve.served import LoadedModel
from hotloop.serve.tool_use import Tool
from hotloop.types import Prompt, SamplingParams


async def submit(
    request: Request,
    model: LoadedModel,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    large: bool,
) -> Ticket:
    """Submits prompts.

    Args:
        request: The request.
        model: The model.
        prompts: The prompts.
        params: Sampling options. A grammar is compiled in another thread, since that is slow.
        large: Check the prompts in another thread, too, since that is slow.

    Raises:
        HotloopError: See ``Service.submit_all``.
    """

    def submitted() -> Ticket:
        return _submit(request, model, prompts, params)

    slow = large or params.grammar is not None
    return await asyncio.to_thread(submitted) if slow else submitted()


async def submit_turn(
    request: Request, model: LoadedModel, turn: Callable[[], Turn]
) -> tuple[Turn, Ticket]:
    """Submits the prompt of a conversation.

    Args:
        request: The request.
        model: The model.
        turn: Makes the prompt, in another thread: templates take milliseconds.

    Raises:
        ApiError: A message is not valid, or the parameters of a tool cannot be enforced.
        HotloopError: See ``Conversations.turn`` and ``Service.submit_all``.
    """

    def submitted() -> tuple[Turn, Ticket]:
        made = turn()
        try:
            return made, _submit(request, model, [made.prompt], made.params)
        except RequestError:
            _check_tools(model, made.forced)
            raise

    return await asyncio.to_thread(submitted)


def _check_tools(model: LoadedModel, forced: Sequence[Tool]) -> None:
    """Refuses the first tool whose parameters cannot be enforced.

    Raises:
        ApiError: The message names the tool, which an error of the combined grammar would not.
    """
    for tool in forced:
        try:
            model.service.check_grammar(arguments_grammar(tool))
        except RequestError as error:
            problem = f"the parameters of {shorten_value(tool.name)}: {error}"
            raise ApiError(400, f"tools: {problem}", param="tools", code="invalid_value") from error


def _submit(
    request: Request, model: LoadedModel, prompts: Sequence[Prompt], params: SamplingParams
) -> Ticket:
    salt = request.scope.get(SALT, "")
    return model.service.submit_all(prompts, params, salt=salt, clamp=True)
