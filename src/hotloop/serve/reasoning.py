"""Reasoning in a model's text: the text between ``<think>`` and ``</think>``.

Reasoning is at the beginning of an answer or absent: later markers are content. Some templates
write the first marker themselves, so that the answer begins within the reasoning. Whitespace around
the reasoning is dropped, as templates drop it when they insert the reasoning into a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hotloop.serve.json_scan import SPACE
from hotloop.serve.parts import Parser, Part, Reasoning
from hotloop.text.detokenize import final_length
from hotloop.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Markers:
    """Texts that begin and end a model's reasoning. Both can be control tokens."""

    begin: str
    end: str


MARKERS = (Markers("<think>", "</think>"), Markers("[THINK]", "[/THINK]"))
"""The markers of Qwen, DeepSeek and others, and the markers of Mistral."""

_TAIL_TOKENS = 64
"""How many tokens at the end of a prompt are searched for a template's marker."""


def reasoning_markers(tokenizer: Tokenizer) -> Markers | None:
    """Returns the markers in a model's vocabulary or template; None if it does not reason."""
    vocabulary, template = tokenizer.backend.added_ids, tokenizer.chat_template or ""
    for markers in MARKERS:
        if markers.end in vocabulary or markers.end in template or markers.begin in template:
            return markers
    return None


def is_within_reasoning(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], markers: Markers, *, continued: str = ""
) -> bool:
    """Returns whether the answer to a prompt begins within reasoning.

    Args:
        tokenizer: The model's tokenizer.
        prompt_ids: The prompt; its template may end with the first marker.
        markers: The model's markers.
        continued: The message that the answer continues.
    """
    if continued.lstrip().startswith(markers.begin) and markers.end not in continued:
        return True
    tail = [i for i in prompt_ids[-_TAIL_TOKENS:] if i < tokenizer.vocab_size]
    return tokenizer.decode(tail, skip_special=False).rstrip().endswith(markers.begin)


class ReasoningParser:
    """Separates reasoning from an answer's text; another parser parses the rest.

    Args:
        markers: The markers.
        rest: The parser of the text after the reasoning.
        in_reasoning: The answer begins within reasoning.
    """

    def __init__(self, markers: Markers, rest: Parser, *, in_reasoning: bool) -> None:
        self._begin, self._end, self._rest = markers.begin, markers.end, rest
        self._stage: Literal["before", "reasoning", "after", "rest"] = "before"
        self._in_reasoning = in_reasoning
        self._begun = False  # there has been reasoning
        self._held = ""

    def push(self, text: str) -> Sequence[Part]:
        """Takes more text; returns the parts that are certain now."""
        if self._stage == "rest":
            return self._rest.push(text)
        parts: list[Part] = []
        self._held += text
        if self._stage == "before":
            self._find_begin()
        if self._stage == "reasoning":
            parts += self._reasoning()
        if self._stage == "after":
            self._held = self._held.lstrip(SPACE)
            if self._held:
                self._stage = "rest"
        if self._stage == "rest":
            held, self._held = self._held, ""
            parts += self._rest.push(held)
        return parts

    def end(self) -> Sequence[Part]:
        """Ends the text; returns the parts that were withheld."""
        held, self._held = self._held, ""
        parts: list[Part] = []
        is_reasoning = self._stage == "reasoning" or (
            self._stage == "before" and self._in_reasoning
        )
        if is_reasoning and held.strip(SPACE):
            parts.append(Reasoning(held.rstrip(SPACE)))
        elif held and not is_reasoning:
            parts += self._rest.push(held)
        return [*parts, *self._rest.end()]

    def _find_begin(self) -> None:
        text = self._held.lstrip(SPACE)
        if text.startswith(self._begin):  # some models repeat the template's
            self._held = text[len(self._begin) :].lstrip(SPACE)
            self._stage = "reasoning"
        elif not self._begin.startswith(text):
            if self._in_reasoning:
                self._held = text
            self._stage = "reasoning" if self._in_reasoning else "rest"

    def _reasoning(self) -> Sequence[Part]:
        """Takes reasoning from the withheld text."""
        if not self._begun:
            self._held = self._held.lstrip(SPACE)
        at = self._held.find(self._end)
        n = at if at >= 0 else final_length(self._held, (self._end,))
        text = self._held[:n].rstrip(SPACE)
        self._begun = self._begun or bool(text)
        if at >= 0:
            self._held = self._held[at + len(self._end) :]
            self._stage = "after"
        else:
            self._held = self._held[len(text) :]
        return [Reasoning(text)] if text else []
