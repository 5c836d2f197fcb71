"""Damaged records: skipped with file, line and key, without failing a report."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from malformed import Case, check, parametrize
from report_records import drafting, record
from rich.console import Console

from hotloop.errors import ConfigError
from hotloop.report import published
from hotloop.report.layout import to_markdown, to_rich
from hotloop.report.read import read_records
from hotloop.report.table import make_table, to_csv
from hotloop.report.write import write_results
from hotloop.sweep.store import MAX_LINE_BYTES, append

GOOD = record("int8/eager", 50, loss=0.001)
ODD = record("int4/eager", 80, loss=0.01, speculation=drafting(), engine={"dtype": "bfloat16"})


def report(folder: Path, line: bytes) -> None:
    """Everything that is made of a good record and of an odd line."""
    path = folder / "records.jsonl"
    append(path, GOOD)
    path.write_bytes(path.read_bytes() + line + b"\n")
    problems: list[str] = []
    records = read_records(path, on_problem=problems.append)
    assert GOOD in records
    table, tables = make_table(records), published.make_published_tables(records)
    for each in (table, *tables):
        to_markdown(each)
        Console(width=40, file=open(os.devnull, "w")).print(to_rich(each))  # noqa: SIM115
    to_csv(table)
    published.to_csv(tables)
    write_results(folder, records)
    if problems:
        raise ConfigError(problems[0])


def case(name: str, line: bytes | str, *names: str, accepted: bool = False) -> Case:
    data = line if isinstance(line, bytes) else line.encode("utf-8", errors="surrogatepass")
    expected = None if accepted else ("records.jsonl, line 2", *names, "is skipped")
    return Case(name, lambda folder: report(folder, data), expected)


def changed(path: str, value: Any) -> str:
    """The odd record's line with another value at a place."""
    said = json.loads(ODD.model_dump_json())
    *parts, last = path.split(".")
    functools.reduce(dict.__getitem__, parts, said)[last] = value
    return json.dumps(said)


FIGURES = ("decode_tok_s", "ttft_s", "delta_ln_ppl", "speculation.tokens_per_step")
TEXTS = ("cell", "started_at", "config.model", "config.quant", "config.draft", "engine.dtype")
TEXTS += ("provenance.device.name", "provenance.hotloop.git_commit", "quality_protocol.text")
OBJECTS = ("config", "provenance", "provenance.device", "provenance.hotloop", "workload")
OBJECTS += ("decode_tok_s", "speculation", "quality_protocol", "engine", "provenance.versions")
COUNTS = ("attempt", "config.tensor_parallel", "config.draft_tokens", "workload.repeats")
COUNTS += ("decode_tok_s.n", "peak_bytes", "quality_protocol.window")
NUMBERS = ("decode_tok_s.mean", "decode_tok_s.se", "provenance.device.read_bytes_per_s", "kl_p99")
MAY_BE_NULL = ("provenance.hotloop.git_commit", "provenance.device.read_bytes_per_s", "workload")
MAY_BE_NULL += ("decode_tok_s", "delta_ln_ppl", "ttft_s", "speculation", "quality_protocol")
MAY_BE_NULL += ("engine", "peak_bytes", "decode_tok_s.se", "kl_p99")

NO_TEXT = (None, 3, True, ["a"], {"a": 1}, "x" * 5_000)
NO_OBJECT = (None, 3, "text", [1], True)
NO_COUNT = (None, 1.5, "2", True, [1], -1, 10**30)
NO_NUMBER = (None, "1.5", True, [1], 1e300, math.nan, math.inf, -math.inf)


def wrong_values() -> Iterator[Case]:
    kinds = ((TEXTS, NO_TEXT), (OBJECTS, NO_OBJECT), (COUNTS, NO_COUNT), (NUMBERS, NO_NUMBER))
    for paths, values in kinds:
        for path, value in itertools.product(paths, values):
            accepted = value is None and path in MAY_BE_NULL
            odd = isinstance(value, float) and not math.isfinite(value)
            key = "not a number" if odd else path
            yield case(f"{path}={value!r:.16}", changed(path, value), key, accepted=accepted)


def intervals() -> Iterator[Case]:
    for figure in FIGURES:
        yield case(f"{figure} reversed", changed(f"{figure}.ci95", [2, 1]), figure, "reversed")
        yield case(f"{figure} NaN in it", changed(f"{figure}.ci95", [math.nan, 1]), "NaN")
        yield case(f"{figure} of one end", changed(f"{figure}.ci95", [1]), f"{figure}.ci95")
        yield case(f"{figure} as text", changed(f"{figure}.ci95", "1 2"), f"{figure}.ci95")
        yield case(f"{figure} with no samples", changed(f"{figure}.samples", []), figure, "samples")
        yield case(f"{figure} null samples", changed(f"{figure}.samples", [None] * 5), "samples")
    yield case("a speed of 0", changed("decode_tok_s.mean", 0), "decode_tok_s")
    yield case("a negative speed", changed("decode_tok_s.mean", -5), "decode_tok_s")
    yield case("an unknown status", changed("status", "great"), "status", "ok")
    yield case("an unknown key", changed("surprise", 1), "surprise")
    yield case("an unknown key in config", changed("config.surprise", {"a": [1]}), accepted=True)
    cost = {"k": 1, "n_steps": 9, "draft_s": 0.001, "verify_s": 0.01}
    yield case("a step's cost", changed("speculation.costs", [cost]), accepted=True)
    for key, value in {"k": -1, "n_steps": 0, "draft_s": -1, "verify_s": 0, "x": 1}.items():
        odd = changed("speculation.costs", [cost | {key: value}])
        yield case(f"a step's cost with {key}={value}", odd, "speculation.costs", key)
    odd = changed("speculation.assumed_acceptance", 1.5)
    yield case("an acceptance above 1", odd, "speculation.assumed_acceptance")
    yield case(
        "no draft at a position", changed("speculation.acceptance", [1, None]), accepted=True
    )


def lines() -> Iterator[Case]:
    text = ODD.model_dump_json()
    for end in (1, len(text) // 2, len(text) - 1):
        yield case(f"cut at {end}", text[:end], "incomplete")
    for name, line in {
        "a list": "[1]",
        "a number": "3",
        "text": '"a"',
        "null": "null",
        "an object": "{}",
        "no JSON": "cell: a",
        "a zero byte": "\0",
        "half a surrogate": changed("cell", "\ud800"),
        "a key twice": text[:-1] + ',"cell":"b"}',
        "deep lists": "[" * 100_000 + "]" * 100_000,
        "deep in an unknown key": changed("config.x", 0).replace('"x": 0', '"x": ' + "[" * 90),
        "5,000 digits": changed("attempt", 7).replace('"attempt": 7', '"attempt": ' + "7" * 5000),
        "1e999": changed("kl_p99", 7).replace('"kl_p99": 7', '"kl_p99": 1e999'),
        "a line of megabytes": changed("reason", "x" * (MAX_LINE_BYTES + 1)),
        "a reason of 100,000": changed("reason", "x" * 100_000),
    }.items():
        yield case(name, line)
    yield case("not UTF-8", b"\xff\xfe{}", "UTF-8")
    yield case("blank", " \t ", accepted=True)
    yield case("the record itself", text, accepted=True)
    yield case("markup", changed("cell", "x[/b][red]"), accepted=True)
    yield case("no device yet", changed("provenance", {}), accepted=True)
    yield case("no configuration", changed("config", {}), accepted=True)


@parametrize([*wrong_values(), *intervals(), *lines()])
def test_one_odd_record_is_left_out_by_file_and_line_and_stops_no_report(case, tmp_path):
    check(case, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("records.jsonl", "table.md", "table.csv", "published.md", "report.html")
    }
