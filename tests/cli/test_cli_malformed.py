"""Options with values that are none: one line that names the option, whatever the verb."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest

from hotloop.cli import options
from hotloop.cli.app import main

pytestmark = pytest.mark.usefixtures("fake_llm")

DIGITS = "9" * 5000

NO_INTEGER = (
    "",
    "many",
    "1.5",
    "nan",
    "1e3",
    "1,2",
    DIGITS,
    "1" + "0" * 30,
    "-1" + "0" * 30,
    "\x1b[2J",
)
NO_NUMBER = ("", "many", "1,5", "\x1b[2J")
NO_CHOICE = ("", "fastest", "\udcff", "n" * 5000)

VERBS: dict[str, tuple[list[str], tuple[type, ...]]] = {
    "generate": (["m", "text"], (options.EngineOptions, options.SamplingOptions)),
    "chat": (["m"], (options.EngineOptions, options.SamplingOptions)),
    "bench": (["m"], (options.EngineOptions, options.WeightOptions, options.WorkloadOptions)),
    "eval": (["m"], (options.EngineOptions, options.QualityOptions)),
    "sweep": (
        ["m", "--dry-run"],
        (
            options.MatrixOptions,
            options.WeightOptions,
            options.WorkloadOptions,
            options.QualityOptions,
        ),
    ),
    "info": (["m"], (options.FitOptions,)),
}

RESOLVED_LATER = ("quant", "head", "draft_quant", "max_seq_len", "tensor_parallel")
"""Options whose values the engine looks at, and a fake one does not."""

NOT_POSSIBLE: dict[str, tuple[str, ...]] = {
    "max_seq_len": ("0", "-1", "9" * 18),
    "max_batch_size": ("0", "-1"),
    "prefill_chunk": ("0", "-1"),
    "tensor_parallel": ("0", "-1", "two"),
    "draft_tokens": ("0", "-1"),
    "quant": ("", "int9", "int4-g7", "int4-g", "none;int8", "n" * 5000, "\x1b[2J"),
    "head": ("", "int9", "n" * 5000),
    "draft_quant": ("int9",),
    "temperature": ("-1", "nan", "inf", "-inf", "1e999"),
    "top_k": ("-1",),
    "top_p": ("-0.1", "1.1", "nan"),
    "min_p": ("-0.1", "1.1", "nan"),
    "repetition_penalty": ("0", "-1", "nan", "inf"),
    "max_new_tokens": ("0", "-1"),
    "stop": ("",),
    "prompt_tokens": ("0", "-1"),
    "new_tokens": ("0", "1", "-1"),
    "batch": ("0", "-1"),
    "repeats": ("0", "-1"),
    "workload_seed": ("-1",),
    "window": ("0", "1", "-1"),
    "n_windows": ("0", "-1"),
    "shape": ("nope", ""),
}
"""Values of the right type that are refused all the same."""

Case = tuple[list[str], tuple[str, ...]]
"""A command line, and texts of which the error must hold one."""


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def wrong_values(name: str, kind: Any) -> tuple[str, ...]:
    kinds = get_args(kind) or (kind,)
    if int in kinds:
        values = NO_INTEGER
    elif float in kinds:
        values = NO_NUMBER
    else:
        values = NO_CHOICE if all(isinstance(kind, str) for kind in kinds) else ()
    return (*values, *NOT_POSSIBLE.get(name, ()))


def cases() -> Iterator[Case]:
    """Every wrong value of an option, given to one of the verbs that have it, in turn."""
    holders: dict[tuple[str, str], list[str]] = {}
    kinds: dict[tuple[str, str], Any] = {}
    for verb, (_, groups) in VERBS.items():
        for group in groups:
            hints = get_type_hints(group)
            for field in dataclasses.fields(group):
                key = (field.name, str(hints[field.name]))
                holders.setdefault(key, []).append(verb)
                kinds[key] = hints[field.name]
    turn = 0
    for (name, kind), verbs in holders.items():
        for value in wrong_values(name, kinds[name, kind]):
            real = [verb for verb in verbs if verb not in ("generate", "chat")]
            having = real if real and name in RESOLVED_LATER else verbs
            verb = having[turn % len(having)]
            turn += 1
            names = (flag(name), name, name.removeprefix("workload_").removeprefix("weights_"))
            yield [verb, *VERBS[verb][0], f"{flag(name)}={value}"], names


OTHERS: list[Case] = [
    (["generate"], ("MODEL",)),
    (["generate", "m", "text", "--no-such"], ("--no-such",)),
    (["generate", "m", "text", "--quant"], ("--quant",)),
    (["generate", "m", "text", "--special", "--chat"], ("--special",)),
    (["generate", "m", "text", "--answer-start", "x"], ("--answer-start",)),
    (["generate", "m", "--prompt-file", "/"], ("/",)),
    (["generate", "m", "--prompt-file", "/dev/null/x"], ("/dev/null/x",)),
    (["generate", "m", "--prompt-file", "n" * 5000], ("nnn",)),
    (["generate", "m", "--prompt-file", "\udcff"], (r"\udcff",)),
    (["generate", "m", "text", "--logprobs", "1"], ("--logprobs",)),
    (["generate", "m", "text", "--grammar", "/"], ("/",)),
    (["generate", "m", "text", "--json-schema", "gone.json"], ("gone.json",)),
    (["generate", "m", "text", "--json-schema", "/dev/null"], ("/dev/null",)),
    (["generate", "m", "text", "--json-schema", "a", "--grammar", "b"], ("--grammar",)),
    (["chat", "m", "--chat-template", "/"], ("/",)),
    (["chat", "m", "--chat-template", "gone.jinja"], ("gone.jinja",)),
    (["chat", "m", "--template-arg", "no-sign"], ("no-sign", "--template-arg")),
    (["bench"], ("MODEL", "--shape")),
    (["bench", "m", "--shape", "llama-2-7b"], ("--shape",)),
    (["bench", "--weights", "random", "--shape", "lama-2-7b"], ("llama-2-7b",)),
    (["eval", "m", "--text", "/"], ("/",)),
    (["sweep", "gone.yaml"], ("gone.yaml",)),
    (["sweep", "m", "--model", "x"], ("--model",)),
    (["sweep", "m", "--dry-run", "--max-batch-size", DIGITS], ("--max-batch-size",)),
    (["sweep", "m", "--timeout-s", "x"], ("--timeout-s",)),
    (["sweep", "m", "--tolerance", "x"], ("--tolerance",)),
    (["report"], ("RESULTS",)),
    (["report", "gone"], ("gone",)),
    (["report", "/dev/null/x"], ("/dev/null/x",)),
    (["report", "n" * 5000], ("nnn",)),
    (["report", "\x1b[2J"], (r"\x1b[2J",)),
    (["report", "x[/b]"], ("x[/b]",)),
    (["report", ".", "--format", "xml"], ("--format",)),
    (["report", ".", "--layout", "xml"], ("--layout",)),
    (["report", ".", ".", "--layout", "full"], ("--layout",)),
    (["pull", ""], ("''",)),
    (["pull", "no-such-model"], ("no-such-model",)),
    (["pull", "x" * 5000], ("xxx",)),
    (["pull", "\x1b[2J"], (r"\x1b[2J",)),
    (["info", "/dev/null"], ("/dev/null",)),
    (["info", "x[/b]"], ("x[/b]",)),
    (["info", "\x1b[2J"], (r"\x1b[2J",)),
    (["info", "\udcff"], (r"\udcff",)),
    (["info", "~nobody-is-called-this/m"], ("~nobody-is-called-this",)),
    (["quantize", "gone.gguf", "out", "--quant", "int8"], ("gone.gguf",)),
    (["quantize", "m", "out"], ("--quant",)),
    (["no-such-verb"], ("no-such-verb",)),
    (["\x1b[2J"], (r"\x1b[2J",)),
]

CASES = [*cases(), *OTHERS]


def test_there_are_cases_of_every_option_that_can_be_wrong():
    assert len(CASES) >= 200


@pytest.mark.parametrize(
    ("argv", "names"), CASES, ids=[ascii(" ".join(argv))[:60] for argv, _ in CASES]
)
def test_a_wrong_value_is_one_line_that_names_the_option(
    argv, names, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    code = main(argv)
    out, err = capsys.readouterr()
    assert (code, out) in ((1, ""), (2, "")), (out, err)
    errors = [line for line in err.splitlines() if not line.startswith("Try: hotloop")]
    assert len(errors) == 1, err
    (error,) = errors
    assert error.startswith("error: ")
    assert any(name in error for name in names), error
    assert "bug in hotloop" not in error
    assert len(error) < 2_100
    assert not any(not character.isprintable() for character in error)
    assert list(tmp_path.iterdir()) == [], "nothing is written"
