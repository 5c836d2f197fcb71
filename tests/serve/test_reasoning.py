"""Reasoning in a model's text, however it is divided."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from text_divisions import divided
from tiny_models import write_random

from hotloop.serve.parts import CallArguments, CallStart, Content, PlainText, Reasoning
from hotloop.serve.reasoning import (
    MARKERS,
    ReasoningParser,
    is_within_reasoning,
    reasoning_markers,
)
from hotloop.serve.tools import HermesParser
from hotloop.text.tokenizer import Tokenizer, load_tokenizer

THINK, _ = MARKERS


def read(parser: ReasoningParser, pieces: Iterable[str]) -> tuple[str, str]:
    reasoning = content = ""
    parts = [part for piece in pieces for part in parser.push(piece)]
    for part in [*parts, *parser.end()]:
        match part:
            case Reasoning(text):
                assert text
                assert not content
                reasoning += text
            case Content(text):
                assert text
                content += text
    return reasoning, content


@pytest.mark.parametrize(
    ("within", "text", "reasoning", "content"),
    [
        (False, "<think>\nwell, 1 < 2\n\nso\n</think>\n\nYes.\n", "well, 1 < 2\n\nso", "Yes.\n"),
        (True, "\nwell\n</think>\n\nYes.", "well", "Yes."),
        (True, "<think>\nwell</think>Yes.", "well", "Yes."),
        (True, "well, <think>", "well, <think>", ""),
        (False, "Yes. <think>no</think>", "", "Yes. <think>no</think>"),
        (False, " Yes.", "", " Yes."),
        (False, "<think>\n\n</think>\n\nYes.", "", "Yes."),
        (False, "<think></think>", "", ""),
        (False, "<thin", "", "<thin"),
        (False, "  ", "", "  "),
        (True, "  ", "", ""),
        (False, "<think>well \n</thi", "well \n</thi", ""),  # cut off
        (True, "<thi", "<thi", ""),
        (True, "well</think>\n</think> <think>", "well", "</think> <think>"),
    ],
)
def test_reasoning_is_told_from_content_wherever_the_pieces_end(
    within: bool, text: str, reasoning: str, content: str
) -> None:
    for pieces in divided(text):
        parser = ReasoningParser(THINK, PlainText(), in_reasoning=within)
        assert read(parser, pieces) == (reasoning, content), pieces


def test_calls_within_reasoning_are_none() -> None:
    call = '<tool_call>{"name": "time"}</tool_call>'
    parser = ReasoningParser(THINK, HermesParser(["time"]), in_reasoning=True)
    parts = [*parser.push(f"I could {call}</think>{call}"), *parser.end()]
    assert parts[0] == Reasoning(f"I could {call}")
    assert [type(part) for part in parts[1:]] == [CallStart, CallArguments]


def tokenizer_with(folder: Path, template: str) -> Tokenizer:
    write_random(folder)
    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


PROMPT = "{% for m in messages %}{{ m.content }}{% endfor %}<begin>"


@pytest.mark.parametrize(
    ("template", "message", "within"),
    [
        (PROMPT + "<think>\n", "hello", True),
        (PROMPT + "<think>\n\n</think>\n", "hello", False),
        (PROMPT, "what is <think>", False),
    ],
)
def test_a_template_can_begin_the_reasoning(
    template: str, message: str, within: bool, tmp_path: Path
) -> None:
    tokenizer = tokenizer_with(tmp_path, template)
    prompt = tokenizer.chat_prompt([{"role": "user", "content": message}])
    assert is_within_reasoning(tokenizer, prompt.token_ids, THINK) == within


def test_an_answer_that_continues_reasoning_is_within_it(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, PROMPT)
    for continued, within in (("<think>\nso", True), ("<think>so</think>\n", False), ("so", False)):
        assert is_within_reasoning(tokenizer, [2], THINK, continued=continued) == within


def test_markers_are_those_of_the_template_or_the_vocabulary(tmp_path: Path) -> None:
    for name, template, markers in (
        ("none", PROMPT, None),
        ("think", PROMPT + "{{ '<think>' }}", THINK),
        ("mistral", PROMPT + "[THINK]", MARKERS[1]),
    ):
        (folder := tmp_path / name).mkdir()
        assert reasoning_markers(tokenizer_with(folder, template)) == markers
