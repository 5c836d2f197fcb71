"""Whatever a Python caller gives is taken as it is or refused by name: fields × wrong values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from malformed import Case, check, parametrize

from hotloop import LLM, EngineConfig, SamplingParams
from hotloop.engine.setup import prepare
from hotloop.errors import RequestError, UnknownNameError

NOT_COUNTS: dict[str, object] = {
    "half": 2.5,
    "whole_float": 2.0,
    "nan": math.nan,
    "infinity": math.inf,
    "huge": 10**30,
    "5000_digits": 10**5000,
    "negative": -1,
    "very_negative": -(10**30),
    "true": True,
    "numpy_true": np.True_,
    "torch_true": torch.tensor(True),
    "digits": "3",
    "bytes": b"3",
    "list": [3],
    "array": np.array([3]),
    "tensor": torch.tensor([3]),
    "dict": {3: 3},
    "complex": 3j,
    "type": int,
}

NOT_NUMBERS: dict[str, object] = {
    name: value
    for name, value in NOT_COUNTS.items()
    if name not in ("half", "whole_float", "huge", "negative")
} | {"negative": -0.5, "minus_infinity": -math.inf, "decimal": Decimal("0.5"), "10**400": 10**400}

NOT_TEXTS: dict[str, object] = {
    "number": 5,
    "float": 0.5,
    "true": True,
    "bytes": b"none",
    "list": ["none"],
    "dict": {},
    "nothing": None,
}

NOT_BOOLEANS: dict[str, object] = {"one": 1, "text": "false", "nothing": None, "numpy": np.False_}

NOT_STOPS: dict[str, object] = {
    "number": 5,
    "bytes": b"stop",
    "empty": "",
    "list_of_numbers": [5],
    "list_with_an_empty_text": ["stop", ""],
    "list_with_nothing": [None],
    "dict": {"stop": 1},
    "set": {"stop"},
    "nothing": None,
}

NOT_BIASES: dict[str, object] = {
    "number": 5,
    "text": "5=1",
    "nothing": None,
    "list_of_ids": [5],
    "id_is_a_float": {5.0: 1},
    "id_is_a_word": {"five": 1},
    "id_is_true": {True: 1},
    "id_is_negative": {-1: 1},
    "id_is_huge": {10**30: 1},
    "bias_is_text": {5: "1"},
    "bias_is_nan": {5: math.nan},
    "bias_is_large": {5: 100.5},
    "bias_is_nothing": {5: None},
    "pair_of_three": [(5, 1, 1)],
    "too_many": dict.fromkeys(range(1025), 1),
    "set": {(5, 1)},
}

CHOICES = ("weights", "execution", "all_reduce", "dtype", "draft_policy")


def wrong_values(of: type, name: str, default: object) -> dict[str, object]:
    """Values that a field does not take."""
    if of is SamplingParams and name in ("stop", "logit_bias"):
        return NOT_STOPS if name == "stop" else NOT_BIASES
    if name == "visible_tokens":
        return {kind: value for kind, value in NOT_TEXTS.items() if kind != "list"} | {
            "list_of_numbers": [5],
        }
    if name in ("presence_penalty", "frequency_penalty"):
        return NOT_NUMBERS | {"negative": -100.5}
    if isinstance(default, bool):
        return NOT_BOOLEANS
    if isinstance(default, float):
        return NOT_NUMBERS
    if isinstance(default, int) or default is None:
        return NOT_COUNTS
    misspelled = {"misspelled": "no such", "long": "x" * 10**6, "control": "\x1b[31m\u202e"}
    return NOT_TEXTS | (misspelled if name in CHOICES else {})


def field_cases() -> Iterator[Case]:
    for of in (EngineConfig, SamplingParams):
        for field in dataclasses.fields(of):
            default = "m" if field.name == "model" else field.default
            for kind, value in wrong_values(of, field.name, default).items():
                options: dict[str, Any] = {field.name: value}
                if of is EngineConfig:
                    options = {"model": "m"} | options
                yield Case(
                    f"{of.__name__}-{field.name}-{kind}",
                    lambda _, of=of, options=options: of(**options),
                    (field.name,),
                )


EDGES = (
    ("top_p", 0),
    ("top_p", 1.0001),
    ("min_p", 1.5),
    ("repetition_penalty", 0),
    ("repetition_penalty", 1e39),
    ("repetition_penalty", 1e-39),
    ("presence_penalty", 101),
    ("frequency_penalty", -101),
    ("n", 0),
    ("n", 129),
    ("min_new_tokens", -1),
    ("logprobs", 21),
    ("seed", 2**63),
    ("temperature", 1e31),
    ("max_new_tokens", 0),
    ("max_new_tokens", 2**31),
)


def edge_cases() -> Iterator[Case]:
    for name, value in EDGES:
        options: dict[str, Any] = {name: value}
        yield Case(f"edge-{name}-{value}", lambda _, o=options: SamplingParams(**o), (name,))


def accepted_cases() -> Iterator[Case]:
    """Numbers of other libraries, and other spellings of the same thing."""
    same: list[tuple[str, object, object]] = [
        ("max_new_tokens", np.int64(3), 3),
        ("max_new_tokens", torch.tensor(3), 3),
        ("top_k", np.uint8(3), 3),
        ("temperature", 1, 1.0),
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", 10**30, 1e30),
        ("seed", np.int32(0), 0),
        ("stop", "five", ("five",)),
        ("stop", ["five", "six"], ("five", "six")),
    ]
    for name, given, held in same:

        def run(_: Path, name: str = name, given: Any = given, held: object = held) -> None:
            value = getattr(SamplingParams(**{name: given}), name)
            assert (value, type(value)) == (held, type(held))

        yield Case(f"accepted-{name}-{type(given).__name__}", run, None)


ODD_TEXTS = {
    "null_character": "a\0b",
    "megabyte": "x" * 10**6,
    "control": "\x1b[31m\u202e",
    "surrogate": "\ud800",
    "5000_digits": "exit-" + "9" * 5000,
    "path": "/" + "n" * 5000,
}


def name_cases() -> Iterator[Case]:
    """Texts where a name is expected: of a model, a scheme, a draft, a device."""
    whole = {"model": "llama-2-7b", "weights": "random", "device": "cpu"}
    for field in ("model", "quant", "head", "draft", "draft_quant", "device"):
        says = {"quant": "quantization scheme", "head": "quantization scheme"}.get(field, field)
        for kind, text in ODD_TEXTS.items():
            options: dict[str, Any] = whole | {field: text}
            if field == "draft_quant":
                options["draft"] = "llama-2-7b"

            def run(_: Path, options: dict[str, Any] = options) -> None:
                prepare(EngineConfig(**options))

            shown = () if kind == "path" and field == "model" else (says.removesuffix("_quant"),)
            yield Case(f"name-{field}-{kind}", run, shown)


@parametrize([*field_cases(), *edge_cases(), *accepted_cases(), *name_cases()])
def test_a_field_takes_its_kind_of_value_alone(case, tmp_path):
    check(case, tmp_path)


# ------------------------------------------------------------------------------ prompts and ids


@pytest.fixture(scope="module")
def small(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), dtype="float32", max_seq_len=32, max_batch_size=2) as llm:
        yield llm


NOT_IDS: dict[str, object] = {
    "float": 5.0,
    "nan": math.nan,
    "true": True,
    "numpy_true": np.True_,
    "torch_true": torch.tensor(True),
    "digits": "5",
    "bytes": b"5",
    "nothing": None,
    "list": [5],
    "negative": -1,
    "vocabulary": 300,
    "huge": 10**30,
    "5000_digits": 10**5000,
    "beyond_int64": 2**63,
}

NOT_LISTS: dict[str, object] = {
    "number": 5,
    "float": 0.5,
    "nothing": None,
    "bytes": b"abc",
    "bytearray": bytearray(b"abc"),
    "dict": {5: 6},
    "set": {5, 6},
    "generator": (i for i in (5, 6)),
    "scalar": torch.tensor(5),
}

Ask = Callable[[LLM, Any], object]

ASKED: dict[str, Ask] = {
    "generate": lambda llm, ids: llm.generate([ids], max_new_tokens=1),
    "stream": lambda llm, ids: llm.stream([[5], ids], max_new_tokens=1),
    "score": lambda llm, ids: list(llm.score([ids])),
}


def prompt_cases() -> Iterator[tuple[str, Ask, object]]:
    for verb, ask in ASKED.items():
        for kind, value in NOT_IDS.items():
            yield f"{verb}-id-{kind}", ask, [5, value]
        for kind, value in NOT_LISTS.items():
            yield f"{verb}-prompt-{kind}", ask, value
        yield f"{verb}-long", ask, range(10**15)
        yield f"{verb}-floats", ask, np.array([5.0, 6.0])
        yield f"{verb}-float_tensor", ask, torch.tensor([5.0, 6.0])
        yield f"{verb}-booleans", ask, torch.tensor([True, False])
        yield f"{verb}-two_dimensions", ask, np.array([[5, 6], [7, 8]])
    for kind, value in NOT_LISTS.items():
        yield f"generate-prompts-{kind}", lambda llm, p: llm.generate(p), value
    for kind, value in ("list", [5, 6]), ("array", np.array([5, 6])), ("range", range(10**15)):
        yield f"generate-one-list-{kind}", lambda llm, p: llm.generate(p), value
    for kind, value in ("dict", {"temperature": 1}), ("number", 5), ("text", "greedy"):
        yield f"generate-params-{kind}", lambda llm, p: llm.generate("a", p), value
    for kind, value in NOT_TEXTS.items():
        yield f"encode-{kind}", lambda llm, text: llm.encode(text), value


PROMPT_CASES = list(prompt_cases())


@pytest.mark.parametrize(
    ("name", "ask", "value"), PROMPT_CASES, ids=[name for name, _, _ in PROMPT_CASES]
)
def test_what_is_no_prompt_is_refused_by_name(small, name, ask, value, tmp_path):
    culprits = {"id": "token id", "params": "params", "encode": "text"}
    says = [culprit for part, culprit in culprits.items() if part in name.split("-")]
    check(Case(name, lambda _: ask(small, value), tuple(says)), tmp_path)


def test_whole_numbers_of_any_library_are_token_ids(small):
    given = ([5, 6, 7], (5, 6, 7), range(5, 8), np.array([5, 6, 7]), torch.tensor([5, 6, 7]))
    mixed = [np.int32(5), torch.tensor(6), 7]
    answers = [small.generate([ids], max_new_tokens=3)[0] for ids in (*given, mixed)]
    assert len({(g.prompt_ids, g.token_ids) for g in answers}) == 1
    assert all(type(i) is int for g in answers for i in g.prompt_ids)
    both = small.generate(np.array([[5, 6, 7]] * 2), max_new_tokens=3)
    assert [g.token_ids for g in both] == [answers[0].token_ids] * 2


def test_an_option_that_there_is_not_is_answered_with_the_nearest(small):
    with pytest.raises(UnknownNameError, match=r"unknown option 'quantt'\. Did you mean 'quant'"):
        LLM("m", quantt="int8")
    with pytest.raises(UnknownNameError, match=r"'temprature'\. Did you mean 'temperature'"):
        small.generate("a", temprature=1)


def test_one_list_of_ids_is_answered_with_how_to_write_it(small):
    with pytest.raises(RequestError, match=r"\[\[5, 6, 7\]\]"):
        small.generate([5, 6, 7])
