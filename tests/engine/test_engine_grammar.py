"""Answers follow their grammar: whatever drafts, neighbors and options there are beside it."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import BEGIN, END, N_TOKENS, write_random
from tiny_tokenizers import llama_json_folder

from hotloop import LLM, Generation, Grammar, SamplingParams
from hotloop.engine import grammar as module
from hotloop.engine.core import MoveRow, Step
from hotloop.engine.grammar import Grammars, check_syntax
from hotloop.engine.service import Service
from hotloop.engine.setup import Setup
from hotloop.errors import GrammarError, HotloopError, RequestError, UnsupportedError
from hotloop.text.tokenizer import load_tokenizer
from hotloop.types import MAX_GRAMMAR_BYTES

SCHEMA = {
    "type": "object",
    "properties": {
        "the token": {"enum": ["letters", "belong together"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "flags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["the token", "count", "flags"],
    "additionalProperties": False,
}
AS_SCHEMA = Grammar(kind="json_schema", source=SCHEMA)
DATE = Grammar(kind="regex", source=r"[12]\d{3}-[01]\d-[0-3]\d( and [12]\d{3})?")
SUM = Grammar(
    kind="lark", source='start: term ("+" term){1,3}\nterm: /[1-9][0-9]?/ | "(" start ")"'
)
ANY_OBJECT = Grammar(kind="json_object")
PROMPTS = ([7], [5, 6], list(range(2, 19)))
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.3, "seed": 3},
    "truncated": {"temperature": 1.0, "top_k": 5, "top_p": 0.8, "min_p": 0.01, "seed": 4},
    "adjusted": {
        "temperature": 0.7,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.5,
        "logit_bias": {80: 3},
        "seed": 5,
    },
}
ODD = {"device": "cpu", "dtype": "float32", "max_batch_size": 3}


def constrained(
    llm: LLM, grammar: Grammar, prompts: Any = PROMPTS, **options: Any
) -> list[Generation]:
    return llm.generate(list(prompts), SamplingParams(), grammar=grammar, **options)


def ids(generations: list[Generation]) -> list[tuple[int, ...]]:
    return [g.token_ids for g in generations]


def follows_schema(text: str) -> bool:
    found = json.loads(text)
    assert list(found) == list(SCHEMA["properties"])
    assert found["the token"] in ("letters", "belong together")
    assert type(found["count"]) is int
    assert 0 <= found["count"] <= 99
    return 1 <= len(found["flags"]) <= 3 and all(type(flag) is bool for flag in found["flags"])


FOLLOWS = {
    "json_schema": (AS_SCHEMA, follows_schema),
    "regex": (DATE, lambda text: re.fullmatch(DATE.source, text) is not None),
    "lark": (SUM, lambda text: re.fullmatch(r"[0-9+()]+", text) is not None and eval(text) > 0),
}


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("kind", FOLLOWS)
def test_an_answer_follows_its_grammar_to_the_end(llm, kind, sampling):
    grammar, follows = FOLLOWS[kind]
    for g in constrained(llm, grammar, **SAMPLING[sampling]):
        assert g.finish_reason == "eos"
        assert g.token_ids[-1] == END
        assert follows(g.text), g.text
        assert BEGIN not in g.token_ids


def test_an_object_is_any_object_and_begins_as_one_where_it_is_cut(llm):
    whole = [
        g
        for seed in range(4)
        for g in constrained(llm, ANY_OBJECT, temperature=1.5, seed=seed, max_new_tokens=60)
    ]
    for g in whole:
        assert g.text.startswith("{")
        if g.finish_reason == "eos":
            assert isinstance(json.loads(g.text), dict)
        else:
            assert (g.finish_reason, len(g.token_ids)) == ("length", 60)
    assert {g.finish_reason for g in whole} == {"eos", "length"}


def test_a_stop_string_ends_an_answer_within_its_grammar(llm):
    (g,) = constrained(llm, DATE, [[7]], stop="-")
    assert g.finish_reason == "stop"
    assert re.fullmatch(r"[12]\d{3}", g.text)


def test_of_several_answers_each_follows_the_grammar_by_itself(llm):
    found = constrained(llm, SUM, [[7]], n=3, temperature=1.2, seed=8)
    assert len(set(ids(found))) > 1
    for i, g in enumerate(found):
        assert ids([g]) == ids(constrained(llm, SUM, [[7]], temperature=1.2, seed=8 + i))


def test_log_probabilities_are_the_models_own(llm):
    (g,) = constrained(llm, DATE, [[7]], logprobs=2)
    first = g.logprobs[0]
    assert first.token_id not in [token for token, _ in first.top], "the grammar forbids the best"
    (free,) = llm.generate([[7]], SamplingParams(max_new_tokens=1, logprobs=2))
    assert free.logprobs[0].top == first.top


# ------------------------------------------------------------------------------ with drafts


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[tuple[str, str], list[tuple[int, ...]]]:
    llm = LLM(str(folder), **ODD)
    each = [*(("json_schema", name) for name in SAMPLING), ("lark", "drawn"), ("regex", "greedy")]
    return {
        (kind, name): ids(constrained(llm, FOLLOWS[kind][0], **SAMPLING[name]))
        for kind, name in each
    }


@pytest.mark.parametrize("draft", ["ngram", "exit-1", "itself"])
def test_drafts_change_no_token(folder, plain, draft):
    draft = str(folder) if draft == "itself" else draft
    llm = LLM(str(folder), **ODD, draft=draft, draft_policy="always", draft_tokens=3)
    for (kind, name), expected in plain.items():
        found = constrained(llm, FOLLOWS[kind][0], **SAMPLING[name])
        assert ids(found) == expected, (kind, name)
    llm.close()


@pytest.mark.parametrize("draft", ["none", "ngram", "itself"])
def test_where_steps_are_launched_ahead_each_mask_still_follows_the_token_before(
    folder, plain, draft, monkeypatch
):
    monkeypatch.setattr(Setup, "asynchronous", True)  # as on a GPU
    draft = str(folder) if draft == "itself" else draft
    llm = LLM(str(folder), **ODD, draft=draft, draft_policy="always", draft_tokens=3)
    for kind, name in (("json_schema", "drawn"), ("json_schema", "adjusted"), ("lark", "drawn")):
        beside = llm.stream([[9]], SamplingParams(max_new_tokens=20, ignore_eos=True))
        next(beside)
        found = constrained(llm, FOLLOWS[kind][0], **SAMPLING[name])
        assert ids(found) == plain[kind, name], (kind, name)
        beside.close()
    llm.close()


def test_jump_forward_tokens_are_drafts_that_are_accepted(folder):
    text = '"the token decodes the letters and the token decodes"'
    forced = Grammar(kind="lark", source=f'start: "x" | {text}')
    llm = LLM(str(folder), **ODD, draft="ngram", draft_policy="always", draft_tokens=7)
    # The model is random: a bias makes it spell the long text as the tokenizer does.
    expected = llm.tokenizer.encode(json.loads(text))
    bias = {**dict.fromkeys(expected, 60), llm.encode("x")[0]: -100}
    (g,) = constrained(llm, forced, [[7]], logit_bias=bias)
    assert g.text == json.loads(text)
    assert g.speculation.accepted[0] > 0
    assert g.speculation.n_steps < len(g.token_ids) - 1
    llm.close()


def test_a_draft_model_catches_up_with_jump_forward_tokens(folder):
    """Else its cache would keep what it drafted itself, and later drafts would be worse."""
    llm = LLM(str(folder), **ODD, draft=str(folder), draft_policy="always", draft_tokens=3)
    text = "the token decodes the letters"
    bias = dict.fromkeys(llm.encode(text), 60)
    grammar = Grammar(kind="regex", source=text + "[a-z]{30}")
    (g,) = constrained(llm, grammar, [[7]], logit_bias=bias)
    assert g.speculation.accepted[1] > 0
    model, draft = llm._runner._model.cache, llm._runner._draft_model.cache
    n = 1 + len(bias)
    for i in range(2):
        for own, its in zip(model.layer(i), draft.layer(i), strict=True):
            torch.testing.assert_close(own[0, :, :n], its[0, :, :n])
    llm.close()


# ------------------------------------------------------------------------------ with neighbors


def test_neighbors_without_a_grammar_do_not_change_by_a_bit(folder):
    llm = LLM(str(folder), dtype="bfloat16", max_batch_size=3)
    freely = SamplingParams(max_new_tokens=30, ignore_eos=True, logprobs=3)
    for sampling in SAMPLING.values():
        (alone,) = llm.generate([[5, 6]], freely, **sampling)
        beside = [llm.stream([p], grammar=AS_SCHEMA, temperature=0.9, seed=2) for p in ([7], [9])]
        for stream in beside:
            next(stream)
        (among,) = llm.generate([[5, 6]], freely, **sampling)
        assert (among.token_ids, among.logprobs) == (alone.token_ids, alone.logprobs)
        for stream in beside:
            stream.close()


def test_rows_that_move_and_are_used_again_keep_their_grammars(llm, monkeypatch):
    asked = [
        (prompt, SamplingParams(grammar=grammar, temperature=1.0, seed=seed, max_new_tokens=n))
        for prompt in PROMPTS
        for seed, (grammar, n) in enumerate(
            [(SUM, 60), (None, 3), (AS_SCHEMA, 90), (DATE, 40), (None, 50), (SUM, 5)]
        )
    ]
    alone = [llm.generate([prompt], params)[0].token_ids for prompt, params in asked]
    run, commands = llm._runner.run, []
    monkeypatch.setattr(llm._runner, "run", lambda c: commands.append(c) or run(c))
    streams = [llm.stream([prompt], params) for prompt, params in asked]
    found: list[list[int]] = [[] for _ in asked]
    while True:  # each takes a piece, by turns
        pieces = [next(stream, None) for stream in streams]
        if not any(pieces):
            break
        for tokens, piece in zip(found, pieces, strict=True):
            tokens.extend(piece.token_ids if piece else ())
    assert [tuple(tokens) for tokens in found] == alone
    assert any(isinstance(command, MoveRow) for command in commands)
    mixed = {command.features.constrain for command in commands if isinstance(command, Step)}
    assert True in mixed


def test_a_service_refuses_at_once_and_serves_on(llm):
    bad = SamplingParams(grammar=Grammar(kind="regex", source="(a"))
    with Service(llm) as service:
        with pytest.raises(RequestError, match="unclosed group"):
            service.submit([7], bad)
        cancelled = service.submit([7], SamplingParams(grammar=AS_SCHEMA, seed=1))
        service.cancel(cancelled)
        ticket = service.submit([7], SamplingParams(grammar=DATE, n=2, temperature=1.0, seed=4))
        *_, last = [piece for piece in ticket if piece.generation is not None]
        assert re.fullmatch(DATE.source, last.generation.text)
        *_, end = cancelled
        assert end.generation.finish_reason == "cancelled"
        assert service.state().error is None


# ------------------------------------------------------------------------------ refusals and limits


def as_schema(schema: Any) -> Grammar:
    return Grammar(kind="json_schema", source=schema)


REFUSED = {
    "no JSON": (as_schema("{"), "JSON schema .*not valid JSON"),
    "a list": (as_schema("[]"), "JSON schema .*a list"),
    "deep": (as_schema('{"items":' * 80 + "{}" + "}" * 80), "nested more than 64"),
    "unknown type": (as_schema({"type": "bogus"}), "bogus"),
    "unknown keyword": (as_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
    "lenient": (as_schema({"x-guidance": {"lenient": True}, "uniqueItems": True}), "uniqueItems"),
    "unknown format": (as_schema({"type": "string", "format": "weird"}), "weird"),
    "dangling": (as_schema({"$ref": "#/nowhere"}), "nowhere"),
    "unsatisfiable": (as_schema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum"),
    "patterns": (as_schema({"properties": {"a": {"patternProperties": {}}}}), "patternProperties"),
    "look-ahead": (Grammar(kind="regex", source="a(?=b)"), "look-around"),
    "unclosed": (Grammar(kind="regex", source="(a"), "regular expression .*unclosed group"),
    "nothing": (Grammar(kind="regex", source=r"[^\s\S]"), "nothing matches it"),
    "no grammar": (Grammar(kind="lark", source="bogus"), "the grammar cannot be used"),
    "unknown rule": (Grammar(kind="lark", source="start: other"), "unknown name"),
    "unknown control token": (Grammar(kind="lark", source="start: <nope>"), "nope"),
    "patterns in Lark": (
        Grammar(kind="lark", source='start: %json {"patternProperties": {}}'),
        "patternProperties",
    ),
    "lenient in Lark": (
        Grammar(
            kind="lark",
            source='start: %json {"x-guidance": {"lenient": true}, "uniqueItems": true}',
        ),
        "uniqueItems",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_refused_with_the_reason_before_anything_runs(
    llm, name, monkeypatch
):
    grammar, says = REFUSED[name]
    monkeypatch.setattr(llm._runner, "run", lambda _: pytest.fail("nothing runs"))
    with pytest.raises(RequestError, match=says) as refused:
        llm.generate([[7], [8]], SamplingParams(grammar=grammar))
    assert "<state>" not in str(refused.value)
    assert "‧" not in str(refused.value) or name == "unknown control token"
    assert "\n" not in str(refused.value)


def test_a_grammar_that_is_asked_for_again_is_not_compiled_again_also_if_it_is_refused(
    llm, monkeypatch
):
    compiled = []
    compile_ = Grammars._compile
    monkeypatch.setattr(
        Grammars, "_compile", lambda self, grammar: compiled.append(1) or compile_(self, grammar)
    )
    bad = Grammar(kind="json_schema", source={"type": "object", "title": "again", "not": 5})
    good = Grammar(kind="json_schema", source={"type": "object", "title": "again"})
    for _ in range(50):
        with pytest.raises(RequestError, match="the JSON schema cannot be used"):
            llm.generate([[7]], grammar=bad)
    assert len(compiled) == 1
    llm.generate([[7], [8]], grammar=good, max_new_tokens=2)
    assert len(compiled) == 2


def test_a_property_may_be_named_like_the_keyword_that_is_refused(llm):
    schema = {"properties": {"patternProperties": {"const": {"patternProperties": 1}}}}
    llm._grammars.check(as_schema(schema))


@pytest.mark.parametrize("name", ["unclosed", "unknown keyword", "patterns", "no JSON"])
def test_syntax_is_checked_without_a_model(name):
    grammar, says = REFUSED[name]
    with pytest.raises(RequestError, match=says):
        check_syntax(grammar)
    check_syntax(AS_SCHEMA)
    check_syntax(Grammar(kind="lark", source="start: <|of_some_model|>"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "regex", "source": ""}, "regex needs a source"),
        ({"kind": "json_object", "source": "{}"}, "json_object has no source"),
        ({"kind": "regex", "source": "a" * (MAX_GRAMMAR_BYTES + 1)}, "at most 262,144"),
        ({"kind": "json_schema", "source": {"a": {1}}}, "cannot be written as JSON"),
        ({"kind": "regex", "source": 5}, "source must be text"),
        ({"kind": "grammar", "source": "a"}, "unknown kind 'grammar'"),
    ],
)
def test_a_grammar_is_one_of_its_kind(options, says):
    with pytest.raises(HotloopError, match=says):
        Grammar(**options)


@pytest.mark.parametrize("options", [{"ignore_eos": True}, {"min_new_tokens": 2}])
def test_an_option_that_contradicts_a_grammar_is_refused(options):
    with pytest.raises(RequestError, match=next(iter(options))):
        SamplingParams(grammar=DATE, **options)


def test_without_the_library_the_error_says_what_to_install(llm, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'hotloop\[serve\]'"):
        constrained(llm, Grammar(kind="regex", source="not seen before"))


def test_random_weights_have_no_vocabulary_for_a_grammar(folder):
    with (
        LLM(str(folder), weights="random", max_seq_len=32) as llm,
        pytest.raises(UnsupportedError, match="no tokenizer"),
    ):
        constrained(llm, DATE, [[7]])


AMBIGUOUS = Grammar(kind="lark", source='start: s\ns: "a" s "b" | "a" s | s s | "a"')
"""After n letters a, or fewer with letters b among them, its parser has too many items."""


def test_a_grammar_that_exceeds_a_limit_ends_its_answer_and_no_other(llm):
    bias = {llm.encode("a")[0]: 50}
    other = llm.stream([[5, 6]], grammar=DATE)
    next(other)
    with pytest.raises(GrammarError, match=rf"too costly: .*max is {module.MAX_ITEMS}") as raised:
        constrained(llm, AMBIGUOUS, [[7]], logit_bias=bias)
    assert raised.value.n_tokens > 2
    assert "<" not in str(raised.value)
    *_, last = other
    assert re.fullmatch(DATE.source, last.generation.text)
    # What was computed decides, not the time it took: the answer ends there whenever it is asked.
    with Service(llm) as service:
        ticket = service.submit([7], SamplingParams(grammar=AMBIGUOUS, logit_bias=bias))
        with pytest.raises(GrammarError) as again:
            list(ticket)
    assert again.value.n_tokens == raised.value.n_tokens


def test_drafts_do_not_change_where_a_grammar_becomes_too_costly(folder, llm):
    biased = {"logit_bias": {llm.encode(each)[0]: bias for each, bias in (("a", 50), ("b", 48))}}
    with pytest.raises(GrammarError) as plain:
        constrained(llm, AMBIGUOUS, [[7]], **biased)
    options = ODD | {"draft": "ngram", "draft_tokens": 4, "draft_policy": "always"}
    with LLM(str(folder), **options) as drafting, pytest.raises(GrammarError) as raised:
        constrained(drafting, AMBIGUOUS, [[7]], **biased)
    assert (raised.value.n_tokens, str(raised.value)) == (plain.value.n_tokens, str(plain.value))


def test_a_draft_whose_mask_exceeds_a_limit_is_not_verified_and_fails_nothing(llm):
    matcher = llm._grammars.matcher(AMBIGUOUS)
    a = llm.encode("a")[0]
    mask = torch.full((3, -(-matcher._n_tokens // 32)), -1, dtype=torch.int32)
    n_tokens = 0
    while matcher.fill(mask.fill_(-1), [a, a]) == 2:
        matcher.consume([a])
        n_tokens += 1
    assert matcher.failure is None
    assert matcher.fill(mask.fill_(-1), [a, a]) == 1, "the first draft still has a mask"
    assert not (mask[1] == -1).all()
    assert (mask[2] == -1).all()
    matcher.consume([a, a])
    assert matcher.fill(mask.fill_(-1)) == 0
    assert matcher.failure is not None
    alone = llm._grammars.matcher(AMBIGUOUS)
    for _ in range(n_tokens + 2):
        alone.fill(mask[:1])
        assert alone.failure is None
        alone.consume([a])
    alone.fill(mask[:1])
    assert alone.failure == matcher.failure


def test_an_object_may_have_hundreds_of_optional_properties(llm):
    properties = {f"p{i}": {"type": "null"} for i in range(400)}
    grammar = Grammar(kind="json_schema", source=json.dumps({"properties": properties}))
    matcher = llm._grammars.matcher(grammar)
    for text in ("{", '"', "p3", "9", '"', ":"):
        matcher.fill(torch.full((1, -(-matcher._n_tokens // 32)), -1, dtype=torch.int32))
        matcher.consume(llm.encode(text))
    assert matcher.failure is None


# ------------------------------------------------------------------------------ vocabularies


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """A model whose tokenizer puts a space before a text, and removes it again."""
    folder = write_random(tmp_path_factory.mktemp("spaced"), vocab_size=704)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    llama_json_folder(folder)
    with LLM(str(folder), **ODD, draft="ngram", draft_policy="always") as llm:
        assert llm.tokenizer.strips_leading_space
        yield llm


def test_a_space_before_the_first_word_is_part_of_the_text(spaced):
    begins = Grammar(kind="regex", source=" ?(the|that) [a-z]{3,9}é")
    texts = set()
    for seed in range(8):
        prompt = spaced.tokenizer.encode("the")
        params = SamplingParams(grammar=begins, temperature=1.5, seed=seed)
        for start in (prompt, [spaced.tokenizer.bos_id]):
            (g,) = spaced.generate([start], params)
            assert re.fullmatch(begins.source, g.text), g.text
            texts.add(g.text[0])
    assert texts == {" ", "t"}


def test_masks_cover_ids_beyond_a_multiple_of_32_and_no_control_tokens(folder):
    tokenizer = load_tokenizer(folder)
    grammars = Grammars(lambda: tokenizer, N_TOKENS)
    matcher = grammars.matcher(Grammar(kind="regex", source="(?s:.)*"))
    mask = torch.full((3, -(-N_TOKENS // 32)), -1, dtype=torch.int32)
    matcher.fill(mask, [299, N_TOKENS + 5])
    bits = mask.view(torch.uint8)[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    allowed = bits.flatten(1).bool()
    assert allowed[0, END]
    assert not allowed[0, BEGIN]
    assert allowed[0, 2:N_TOKENS].sum() > 200
    assert torch.equal(allowed[0], allowed[1])
    assert allowed[2].all(), "after a draft that is no token nothing is known"
    matcher.consume([299, END, 5, -1])
    assert matcher.failure is None, "tokens after the end do not matter"


def test_a_grammar_whose_second_mask_fails_is_refused_before_anything_runs(llm):
    grammar = Grammar(kind="regex", source="a{1000000}")
    with pytest.raises(RequestError, match="too many expressions"):
        llm.generate([[1]], max_new_tokens=4, grammar=grammar)
