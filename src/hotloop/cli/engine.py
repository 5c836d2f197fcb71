"""The engine as verbs use it: loaded behind a spinner, closed at the end."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import hotloop
from hotloop.cli.output import spinner

if TYPE_CHECKING:
    from hotloop.engine.llm import LLM
    from hotloop.types import ChatPrompt, EngineConfig


@contextmanager
def loaded(config: EngineConfig) -> Generator[LLM]:
    """The engine of ``config``."""
    label = f"{config.model} as {config.name}"
    with spinner(f"{label}: starting") as show:

        def progress(phase: str, done: int, total: int) -> None:
            show(f"{label}: {phase}" + (f" {done}/{total}" if total else ""))

        llm = hotloop.LLM(config, progress=progress)
    try:
        yield llm
    finally:
        llm.close()


def chat_prompt(llm: LLM, messages: Sequence[dict[str, str]]) -> ChatPrompt:
    """A conversation, up to where the model's answer begins."""
    assert llm.tokenizer is not None, "a checkpoint comes with a tokenizer"
    return llm.tokenizer.chat_prompt(messages)
