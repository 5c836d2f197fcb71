"""Malformed recipes: refused by file and key, or rightly accepted, whatever is in them."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from malformed import Case, check, parametrize

from hotloop.baselines import ENGINES, EngineKind
from hotloop.errors import HotloopError
from hotloop.sweep.bounded_yaml import MAX_DEPTH
from hotloop.sweep.events import from_line
from hotloop.sweep.plan import plan
from hotloop.sweep.recipe import MAX_CELLS, MAX_RECIPE_BYTES, load_recipe

NO_MODEL = EngineKind(create=lambda _: pytest.fail("nothing is loaded"))


@pytest.fixture(autouse=True)
def _without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "hotloop", f"{__name__}:NO_MODEL")


def load(folder: Path, data: bytes) -> None:
    """All that happens to a recipe before something is run."""
    path = folder / "recipe.yaml"
    path.write_bytes(data)
    plan(load_recipe(path))


def case(name: str, text: str | bytes, *names: str, accepted: bool = False) -> Case:
    data = text if isinstance(text, bytes) else text.encode()
    expected = None if accepted else ("recipe.yaml", *names)
    return Case(name, lambda folder: load(folder, data), expected)


# --- wrong values, by the kind of value that is right

INTEGERS = {
    **dict.fromkeys(("tensor_parallel", "draft_tokens", "max_batch_size"), "defaults"),
    **dict.fromkeys(("max_seq_len", "prefill_chunk", "seed"), "defaults"),
    **dict.fromkeys(("prompt_tokens", "new_tokens", "batch", "repeats"), "workload"),
    **dict.fromkeys(("window", "n_windows"), "quality"),
}
TEXTS = dict.fromkeys(("quant", "head", "draft", "draft_quant", "device"), "defaults")
CHOICES = dict.fromkeys(("execution", "all_reduce", "draft_policy", "dtype"), "defaults")

NO_INTEGER = ("true", "1.5", "'2'", "[1]", "{a: 1}", ".nan", ".inf", f"{10**30}", f"-{10**30}")
NO_TEXT = ("3", "true", "1.5", "[a]", "{a: b}", "null", "2020-01-02")
NO_CHOICE = ("fastest", "3", "no", "[auto]", "null", "''")
NO_SECONDS = ("true", "'60'", ".nan", ".inf", "-1", "0", "1e300", "[60]", "null")

REST = {"workload": {"prompt_tokens": 8, "new_tokens": 8}, "defaults": {}, "quality": {}}


def wrong_values() -> Iterator[Case]:
    kinds = ((INTEGERS, NO_INTEGER), (TEXTS, NO_TEXT), (CHOICES, NO_CHOICE))
    for keys, values in kinds:
        for (key, part), value in itertools.product(keys.items(), values):
            rest = "".join(f"{k}: {v}, " for k, v in REST[part].items() if k != key)
            text = f"model: m\n{part}: {{{rest}{key}: {value}}}"
            yield case(f"{part}.{key}={value:.12}", text, f"{part}.{key}")
    for key, value in itertools.product(("name", "model"), NO_TEXT):
        text = f"{'' if key == 'model' else 'model: m'}\n{key}: {value}"
        yield case(f"{key}={value}", text, key)
    for value in NO_SECONDS:
        yield case(f"timeout_s={value}", f"model: m\ntimeout_s: {value}", "timeout_s")
    for key in ("defaults", "matrix", "workload", "quality"):
        for value in ("[1]", "text", "3", "{3: 4}"):
            yield case(f"{key}={value}", f"model: m\n{key}: {value}")
    for key, value in itertools.product(("cells", "matrix"), ("{quant: [3]}", "[null]", "[[]]")):
        yield case(f"{key}={value}", f"model: m\n{key}: {value}", key)


# --- names that lead elsewhere

NAMES = ("../../mine", "..", ".", "/tmp/mine", "a/b", "a\\b", "", "\0", "\x1b[2J", "x" * 300)


def names() -> Iterator[Case]:
    for name in NAMES:
        quoted = '"' + name.replace("\\", "\\\\").replace("\0", "\\0").replace("\x1b", "\\e") + '"'
        yield case(f"name={name!r:.16}", f"model: m\nname: {quoted}", "name")


# --- sizes

DEEP = MAX_DEPTH + 1


def laughs(levels: int, use: str) -> str:
    lines = ["a0: &a0 {quant: int8}"]
    for level in range(1, levels):
        before = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} " + use.format(before))
    return "\n".join(lines)


def sizes() -> Iterator[Case]:
    for levels in (6, 9):
        yield case(f"anchors {levels} deep", laughs(levels, "[{}]"), "anchors expanded")
        yield case(f"merges {levels} deep", laughs(levels, "{{<<: [{}]}}"), "anchors expanded")
    yield case("an anchor in itself", "model: &m [*m]", "contains itself")
    for n in (4, 6, 12):
        axes = "\n".join(f"  {axis}: [{', '.join(values)}]" for axis, values in AXES[: n // 2])
        yield case(f"10^{n} cells", f"model: m\nmatrix:\n{axes}", f"{10**n:,} cells")
    cells = ", ".join(f"{{seed: {seed}}}" for seed in range(MAX_CELLS + 1))
    yield case("too many listed cells", f"model: m\ncells: [{cells}]", "cells")
    cells = ", ".join(f"{{seed: {seed}}}" for seed in range(MAX_CELLS - 1))
    yield case("as many cells as there may be", f"model: m\ncells: [{cells}]", accepted=True)
    for opening, closing in (("[", "]"), ("{a: ", "}")):
        for depth in (DEEP, 50_000):
            text = f"model: {opening * depth}1{closing * depth}"
            yield case(f"{opening}x{depth}", text, "deep" if depth == DEEP else "")
    yield case("- x5000", "- " * 5000 + "1", "deep")
    yield case("a long file", "#" * MAX_RECIPE_BYTES + "\nmodel: m", "bytes")
    for n in (5_000, 200_000):
        yield case(f"{n} digits", f"model: m\ntimeout_s: {'9' * n}", "characters")
        yield case(f"a name of {n}", f"model: {'m' * n}", "characters")
        yield case(f"a key of {n}", f"model: m\n? {'k' * n}\n: 1", "characters")
        yield case(f"a draft of {n} layers", f"model: m\ndefaults: {{draft: exit-{'9' * n}}}")
    many = "\n".join(f"key{i}: 1" for i in range(5_000))
    yield case("many unknown keys", f"model: m\n{many}", "key0", "more")


AXES = [
    ("seed", [str(i) for i in range(100)]),
    ("max_batch_size", [str(i) for i in range(1, 101)]),
    ("draft_tokens", [str(i) for i in range(1, 101)]),
    ("prefill_chunk", [str(i) for i in range(1, 101)]),
    ("max_seq_len", [str(i) for i in range(1000, 1100)]),
    ("tensor_parallel", [str(i) for i in range(1, 101)]),
]


# --- not YAML, or not a recipe's

TEXT_OF_NO_RECIPE = {
    "empty": "",
    "null": "null",
    "a list": "- model",
    "a number": "3",
    "two documents": "model: m\n---\nmodel: n",
    "a key twice": "model: m\nmodel: n",
    "a number for a key": "model: m\n3: 4",
    "a list for a key": "model: m\n? [a]\n: 4",
    "a date that is none": "model: m\nname: 2020-13-77",
    "base 60": "model: m\ndefaults: {seed: 9:99:99:99}\nworkload: {}",
    "a tag": "model: !!python/object/apply:os.system ['true']",
    "an unknown tag": "model: !mine m",
    "a tag that does not fit": "model: !!int m",
    "binary": "model: !!binary gA==",
    "a set": "model: m\ncells: !!set {a, b}",
    "a control character": "model: \x07",
    "an alias of nothing": "model: *nothing",
    "a tab": "model:\n\t- m",
    "open quotes": 'model: "m',
    "half a surrogate": 'model: "\\ud800"',
}


NO_FILES = {
    "pipe": "is a pipe",
    "folder": "is a folder",
    "link to itself": "cannot be read",
    "nothing": "there is no such file",
    "under a file": "cannot be read",
}


def others() -> Iterator[Case]:
    for name, text in TEXT_OF_NO_RECIPE.items():
        yield case(name, text)
    yield case("no UTF-8", b"model: \xff\xfe", "UTF-8")
    yield case("UTF-16", "model: m".encode("utf-16"))
    yield case("a byte order mark", b"\xef\xbb\xbfmodel: m", accepted=True)
    yield case("spaces", 'model: m\nmatrix: {quant: " none , int8 "}', accepted=True)
    for kind, says in NO_FILES.items():
        run = functools.partial(no_file, kind=kind)
        yield Case(f"recipe is a {kind}", run, (f"r.yaml: {says}",))


def no_file(folder: Path, kind: str) -> None:
    path = folder / "r.yaml"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "link to itself":
            path.symlink_to(path)
        case "under a file":
            path.write_text("model: m")
            path /= "r.yaml"
    load_recipe(path)


@parametrize([*wrong_values(), *names(), *sizes(), *others()])
def test_malformed_recipes_are_refused_by_file_and_key(case, tmp_path):
    check(case, tmp_path)
    left = {path.name for path in tmp_path.iterdir()} - {"recipe.yaml", "r.yaml"}
    assert not left, "a recipe that was refused has written something"


LINES = (b"", b"{", b"[]", b"3", b"null", b'{"CellPhase": 3}', b'{"Nothing": {}}', b"\xff\xfe")
LINES += (b'{"CellPhase": {"cell": "c", "phase": "dancing"}}', b"[" * 100_000)
LINES += (b'{"CellSoFar": {"record": {"cell": "c", "status": "failed", "provenance": null}}}',)


@pytest.mark.parametrize("line", LINES, ids=lambda line: repr(line[:24]))
def test_what_a_cells_process_tells_is_an_event_or_refused(line):
    with pytest.raises(HotloopError, match="not an event") as error:
        from_line(line)
    assert len(str(error.value)) < 300
