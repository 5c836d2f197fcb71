"""``Conversations``: makes prompts with a model's chat template, and parsers for its answers.

It combines a request's messages, tools and answer format, for all routes that take a conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from hotloop.errors import HotloopError, RequestError
from hotloop.serve.answer_grammar import answer_grammar
from hotloop.serve.messages import content_text, template_messages
from hotloop.serve.parts import Parser, PlainText
from hotloop.serve.reasoning import ReasoningParser, is_within_reasoning, reasoning_markers
from hotloop.serve.schemas import Conversation
from hotloop.serve.tool_use import Tool, ToolUse
from hotloop.serve.tools import (
    template_supports_several_calls,
    template_supports_tools,
    tool_parser,
)
from hotloop.text.chat import RESERVED_VARIABLES
from hotloop.text.tokenizer import Tokenizer
from hotloop.types import ChatPrompt, SamplingParams


@dataclass(frozen=True)
class Turn:
    """The model's turn in a conversation.

    Attributes:
        prompt: The conversation.
        params: Sampling options.
        parser: Makes the parser of an answer.
        forced: The tools of which the answer must call one; empty if it need not.
    """

    prompt: ChatPrompt
    params: SamplingParams
    parser: Callable[[], Parser]
    forced: Sequence[Tool] = ()


class Conversations:
    """Formats conversations with a model, and parses its answers.

    Args:
        tokenizer: The model's tokenizer.
        tool_parser_name: The parser of its calls; ``auto`` detects it.
        variables: Variables of its chat template.

    Raises:
        UnknownNameError: There is no such parser.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, tool_parser_name: str, variables: Mapping[str, Any]
    ) -> None:
        self._tokenizer, self._variables = tokenizer, variables
        self._parser = tool_parser(tool_parser_name, tokenizer)
        self._supports_tools = template_supports_tools(tokenizer)
        self._supports_several = template_supports_several_calls(tokenizer)
        self._reasoning = reasoning_markers(tokenizer)

    def prepare(self) -> None:
        """Starts the process of the chat template, so that the first answer does not wait."""
        with suppress(HotloopError):  # there is none, or it refuses a greeting
            greeting = {"role": "user", "content": "Hello"}
            self._tokenizer.chat_prompt([greeting], **self._variables)

    def prompt(self, request_body: Conversation, use: ToolUse) -> ChatPrompt:
        """Formats a conversation as a prompt.

        Args:
            request_body: The conversation.
            use: Its tools.

        Raises:
            ApiError: A message is not valid.
            HotloopError: See ``Tokenizer.chat_prompt``.
        """
        messages = template_messages(
            request_body.messages or (),
            self._parser,
            tools=use.tools,
            as_text=not self._supports_tools,
        )
        variables = {**self._variables, **request_body.chat_template_kwargs}
        if use.tools and self._supports_tools:
            variables["tools"] = [dict(tool.definition) for tool in use.tools]
        for name in RESERVED_VARIABLES:
            if name in variables:
                raise RequestError(f"chat_template_kwargs: the server sets {name}: leave it out.")
        return self._tokenizer.chat_prompt(
            messages,
            add_generation_prompt=request_body.add_generation_prompt,
            continue_final_message=request_body.continue_final_message,
            **variables,
        )

    def turn(self, request_body: Conversation, use: ToolUse, params: SamplingParams) -> Turn:
        """Formats a conversation as a prompt, and makes the parser and options of the answer.

        Args:
            request_body: The conversation.
            use: Its tools.
            params: Sampling options of the request.

        Raises:
            ApiError: As for ``prompt``.
            HotloopError: As for ``prompt``, or the grammar is not valid.
        """
        use = replace(use, parallel=use.parallel and self._supports_several)
        prompt = self.prompt(request_body, use)
        markers, grammar = self._reasoning, params.grammar
        if grammar is not None and grammar.kind == "lark" and not use.forced:
            markers = None  # the grammar describes the whole answer
        in_reasoning = markers is not None and is_within_reasoning(
            self._tokenizer, prompt.token_ids, markers, continued=_continued(request_body)
        )
        visible = self._parser.control_tokens if use.tools else ()
        if markers is not None:
            visible = (*visible, markers.begin, markers.end)
        grammar = answer_grammar(
            grammar,
            use,
            self._parser,
            self._tokenizer,
            reasoning=markers,
            in_reasoning=in_reasoning,
        )

        def parser() -> Parser:
            rest: Parser = PlainText()
            if use.tools:
                names = frozenset(tool.name for tool in use.tools)
                rest = self._parser(names, parallel=use.parallel)
            return (
                rest
                if markers is None
                else ReasoningParser(markers, rest, in_reasoning=in_reasoning)
            )

        if visible != params.visible_tokens or grammar is not params.grammar:
            params = replace(params, visible_tokens=visible, grammar=grammar)
        return Turn(prompt, params, parser, use.forced)


def _continued(request_body: Conversation) -> str:
    """Returns the message that the answer continues; empty if it begins a new one."""
    if not (request_body.continue_final_message and request_body.messages):
        return ""
    return content_text("messages", request_body.messages[-1].get("content") or "")
