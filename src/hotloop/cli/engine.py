"""Loads an engine for a command, shows its progress, and closes it at the end."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import hotloop
from hotloop.cache import cache_note
from hotloop.cli.output import note, steps

if TYPE_CHECKING:
    from hotloop.cli.options import TemplateOptions
    from hotloop.engine.llm import LLM
    from hotloop.text.tokenizer import Tokenizer
    from hotloop.types import ChatPrompt, EngineConfig


Message = dict[str, str]

PHASE_LABELS = {"load": "loading layers", "warmup": "warming up, compiling"}
"""Progress labels of the phases in which ``hotloop.LLM`` is loaded."""


def note_cache() -> None:
    """Notes a temporary cache folder, and why it replaces the usual one."""
    if text := cache_note():
        note(text)


def note_engine(notes: Sequence[str]) -> None:
    """Prints an engine's notes.

    Kernels that are not used for the same reason share one note. These notes come first, since
    other notes can name the kernels that are used instead.
    """
    names: dict[str, list[str]] = {}
    others = []
    for text in notes:
        name, not_used, reason = text.partition(" not used: ")
        if not_used:
            names.setdefault(reason, []).append(name)
        else:
            others.append(text)
    for reason, passed_over in names.items():
        note(f"{', '.join(passed_over)} not used: {reason}")
    for text in others:
        note(text)


@contextmanager
def loaded(config: EngineConfig) -> Generator[LLM]:
    """Loads an engine, and shows its progress; closes it at the end of the block."""
    note_cache()
    with steps(f"{config.model} as {config.name}") as show:

        def progress(phase: str, done: int, total: int) -> None:
            show(PHASE_LABELS.get(phase, phase), done, total)

        llm = hotloop.LLM(config, progress=progress)
    try:
        note_engine(llm.describe().notes)
        yield llm
    finally:
        llm.close()


class ConversationFormat:
    """Makes prompts from messages, with the user's options of the chat template.

    Args:
        options: The options of the chat template.

    Raises:
        ConfigError: An option's value cannot be used, or its file cannot be read.
    """

    def __init__(self, options: TemplateOptions) -> None:
        from hotloop.untrusted import config_error, read_text

        self._variables, self._file = options.variables(), options.chat_template
        self._own = bool(options.given())
        self._source = read_text(self._file, refuse=config_error) if self._file else None

    def check(self, model: str, messages: Sequence[Message]) -> None:
        """Encodes messages before the model is loaded, if the user gave a template or variables.

        Raises:
            HotloopError: The user's template, its variables or the messages are at fault.
        """
        if self._own:
            self.encoder(early_tokenizer(model))(messages)

    def encoder(self, tokenizer: Tokenizer | None) -> Callable[[Sequence[Message]], ChatPrompt]:
        """Makes the function that formats messages as a prompt.

        If the last message is the assistant's, the model's answer continues it.

        Args:
            tokenizer: The model's tokenizer.
        """
        assert tokenizer is not None, "a checkpoint comes with a tokenizer"
        if self._file is not None:
            tokenizer = replace(
                tokenizer, chat_template=self._source, tool_template=None, source=self._file
            )

        def encode(messages: Sequence[Message]) -> ChatPrompt:
            continued = messages[-1]["role"] == "assistant"
            return tokenizer.chat_prompt(
                messages, continue_final_message=continued, **self._variables
            )

        return encode


def early_tokenizer(model: str) -> Tokenizer:
    """Loads a model's tokenizer, to find mistakes before the model is loaded."""
    from hotloop.text.tokenizer import load_tokenizer
    from hotloop.weights.hub import resolve_model

    return load_tokenizer(resolve_model(model))


def raw_prompt(llm: LLM, text: str, *, special: bool) -> str | list[int]:
    """Returns a prompt without a template; its control tokens are parsed if ``special``."""
    tokenizer = llm.tokenizer
    assert tokenizer is not None, "a checkpoint comes with a tokenizer"
    if special:
        ids = tokenizer.encode(text, parse_special=True)
        # The text begins with BOS, and encoding has added another one before it.
        return ids[1:] if ids[:2] == [tokenizer.bos_id] * 2 else ids
    if spelled := tokenizer.control_tokens_in(text):
        names = ", ".join(spelled)
        note(f"The prompt contains {names} as plain text. Add --special to parse control tokens.")
    return text
