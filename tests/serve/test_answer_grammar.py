"""Grammars of answers: whatever follows one is read by the parser as what was asked for."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from scripted import write_answers

from hotloop.engine.grammar import Grammars
from hotloop.errors import RequestError
from hotloop.serve.answer_grammar import answer_grammar
from hotloop.serve.parts import CallArguments, CallStart, Content, Parser, PlainText, Reasoning
from hotloop.serve.reasoning import MARKERS, Markers, ReasoningParser
from hotloop.serve.tool_use import ToolUse, read_tool_use
from hotloop.serve.tools import PARSERS, MistralParser
from hotloop.text.detokenize import Detokenizer
from hotloop.text.tokenizer import Tokenizer, load_tokenizer
from hotloop.types import Grammar

THINK, MISTRAL_THINK = MARKERS
CONTROL = ("<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]")
WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Köln"]}, "days": {"$ref": "#/$defs/days"}},
        "required": ["city", "days"],
        "additionalProperties": False,
        "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 3}},
    },
}
TIME = {"type": "function", "name": 'ti"me'}
TOOLS = [WEATHER, TIME]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """One with the control tokens of all formats, one of older Mistral, and a plain one."""

    def made(name: str, tokens: tuple[str, ...]) -> Tokenizer:
        folder: Path = tmp_path_factory.mktemp(name)
        return load_tokenizer(write_answers(folder, {"A": tokens}, control_tokens=CONTROL))

    return {
        "all": made("all", ("<tool_call>", "</think>", *CONTROL)),
        "older": made("older", ("[TOOL_CALLS]",)),
        "plain": made("plain", ("nothing else",)),
    }


def follow(
    tokenizer: Tokenizer, grammar: Grammar, rng: random.Random, *, short: float, begin: str = ""
) -> str:
    """Some text that follows a grammar, as an engine detokenizes it.

    Tokens that end a text are preferred with a probability, so that it comes to an end.
    """
    begins = tokenizer.encode(begin, add_special=False, parse_special=True)
    import torch

    n = tokenizer.vocab_size
    matcher = Grammars(lambda: tokenizer, n).matcher(grammar)
    shown = Detokenizer(tokenizer, visible=[*CONTROL, "<think>", "</think>"])
    ending = {
        i for i in range(n) if set(tokenizer.token_bytes(i, skip_special=False)) & set(b'"<[}')
    }
    text = ""
    for _ in range(600):
        mask = torch.full((1, -(-n // 32)), -1, dtype=torch.int32)
        matcher.fill(mask)
        words = mask[0].tolist()
        allowed = [i for i in range(n) if words[i // 32] >> (i % 32) & 1]
        ends = sorted(ending & set(allowed))
        if set(allowed) & tokenizer.eos_ids and (len(allowed) == 1 or rng.random() < 0.5):
            return text + shown.flush()
        token = rng.choice(ends if ends and rng.random() < short else allowed)
        if begins:
            token = begins.pop(0)
            assert token in allowed, tokenizer.token_bytes(token, skip_special=False)
        if token in tokenizer.eos_ids:
            return text + shown.flush()
        text += shown.push(token)
        matcher.consume([token])
    return text


def read(parser: Parser, text: str) -> tuple[str, str, list[tuple[str, Any]]]:
    reasoning, content, names, arguments = "", "", [], []
    for part in [*parser.push(text), *parser.end()]:
        match part:
            case Reasoning(more):
                reasoning += more
            case Content(more):
                content += more
            case CallStart(_, _, name):
                names.append(name)
                arguments.append("")
            case CallArguments(index, more):
                arguments[index] += more
    return reasoning, content, list(zip(names, map(json.loads, arguments), strict=True))


def check_call(name: str, arguments: Any) -> None:
    if name == "weather":
        assert arguments["city"] in ("Rome", "Köln")
        assert arguments["days"] in (1, 2, 3)
        assert len(arguments) == 2
    else:
        assert (name, arguments) == ('ti"me', {})


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize(
    ("name", "vocabulary"),
    [
        *((name, vocabulary) for name in PARSERS for vocabulary in ("all", "plain")),
        ("mistral", "older"),
    ],
)
def test_forced_calls_are_read_as_calls_of_the_tools(
    name: str, vocabulary: str, parallel: bool, tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer, parser, rng = tokenizers[vocabulary], PARSERS[name], random.Random(0)
    tools = [{**tool, "name": tool["name"].replace('"', "")} for tool in TOOLS]
    use = read_tool_use(tools, "required", parallel=parallel)
    grammar = answer_grammar(None, use, parser, tokenizer, reasoning=None, in_reasoning=False)
    assert grammar is not None
    seen = set()
    for _ in range(8):
        text = follow(tokenizer, grammar, rng, short=0.5)
        reasoning, content, calls = read(parser([tool.name for tool in use.tools]), text)
        assert (reasoning, content) == ("", ""), text
        assert len(calls) == 1 if not parallel else calls
        for called, arguments in calls:
            seen.add(called)
            check_call(called.replace("time", 'ti"me'), arguments)
    assert seen == {"weather", "time"}


def test_a_named_tool_is_the_only_one_that_can_be_called(tokenizers: dict[str, Tokenizer]) -> None:
    use = read_tool_use(TOOLS, {"type": "function", "name": 'ti"me'})
    parser, tokenizer = PARSERS["hermes"], tokenizers["plain"]
    grammar = answer_grammar(None, use, parser, tokenizer, reasoning=None, in_reasoning=False)
    assert grammar is not None
    for seed in range(5):
        text = follow(tokenizer, grammar, random.Random(seed), short=0.5)
        _, content, calls = read(parser([]), text)
        assert content == ""
        assert {name for name, _ in calls} == {'ti"me'}


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize(
    ("markers", "vocabulary"),
    [(THINK, "plain"), (THINK, "all"), (MISTRAL_THINK, "all"), (MISTRAL_THINK, "plain")],
)
@pytest.mark.parametrize(
    "grammar",
    [
        None,
        Grammar(kind="json_object"),
        Grammar(
            kind="json_schema", source='{"type": "array", "items": {"const": 5}, "minItems": 1}'
        ),
        Grammar(kind="regex", source="a//b\\/c\\\\/[\n]x"),
    ],
    ids=["calls", "object", "schema", "regex"],
)
def test_reasoning_is_allowed_before_what_is_forced(
    within: bool,
    markers: Markers,
    vocabulary: str,
    grammar: Grammar | None,
    tokenizers: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers[vocabulary]
    use = read_tool_use(TOOLS, "required") if grammar is None else ToolUse()
    whole = answer_grammar(
        grammar, use, PARSERS["hermes"], tokenizer, reasoning=markers, in_reasoning=within
    )
    assert whole is not None
    rng = random.Random(0)
    for begin in (f"so 1 < 2\n{markers.end}\n\n", f"{markers.end}"):
        begins = begin if within else f"{markers.begin}{begin}"
        text = follow(tokenizer, whole, rng, short=0.9, begin=begins)
        rest: Parser = PARSERS["hermes"]([]) if grammar is None else PlainText()
        reasoning, content, calls = read(ReasoningParser(markers, rest, in_reasoning=within), text)
        assert reasoning == begin.partition(markers.end)[0].strip()
        if grammar is None:
            assert calls
            assert content == ""
        elif grammar.kind == "regex":
            assert content == "a//b/c\\/\nx"
        else:
            value = json.loads(content)
            assert isinstance(value, dict if grammar.kind == "json_object" else list)


def test_an_answer_may_call_a_tool_or_follow_its_schema(tokenizers: dict[str, Tokenizer]) -> None:
    use = read_tool_use(TOOLS, "auto")
    schema = Grammar(kind="json_schema", source='{"enum": ["yes", "no"]}')
    parser, tokenizer = PARSERS["hermes"], tokenizers["plain"]
    grammar = answer_grammar(schema, use, parser, tokenizer, reasoning=None, in_reasoning=False)
    assert grammar is not None
    kinds = set()
    for seed in range(12):
        text = follow(tokenizer, grammar, random.Random(seed), short=0.3)
        _, content, calls = read(parser([]), text)
        assert bool(calls) != (content in ('"yes"', '"no"')), text
        kinds.add(bool(calls))
    assert kinds == {True, False}


def test_a_grammar_that_is_all_that_is_asked_for_is_left_as_it_is(
    tokenizers: dict[str, Tokenizer],
) -> None:
    schema = Grammar(kind="json_schema", source="{}")
    lark = Grammar(kind="lark", source='start: "a"')
    options: dict[str, Any] = {"parser": MistralParser, "tokenizer": tokenizers["plain"]}
    for given in (None, schema, lark):
        assert (
            answer_grammar(given, ToolUse(), **options, reasoning=None, in_reasoning=False) is given
        )
    tools = read_tool_use(TOOLS, "auto")
    assert answer_grammar(lark, tools, **options, reasoning=THINK, in_reasoning=False) is lark
    assert answer_grammar(None, tools, **options, reasoning=THINK, in_reasoning=False) is None


def test_a_schema_that_is_not_json_is_refused(tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(RequestError, match="JSON"):
        answer_grammar(
            Grammar(kind="json_schema", source="{"),
            ToolUse(),
            MistralParser,
            tokenizers["plain"],
            reasoning=THINK,
            in_reasoning=False,
        )
