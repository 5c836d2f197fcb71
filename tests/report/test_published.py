"""The published layout: levers, tokens per second, and notes for missing or doubtful figures."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from report_records import drafting, record
from rich.console import Console

from hotloop.bench.record import Record, Workload
from hotloop.report.context import RANDOM_ACCEPTANCE
from hotloop.report.layout import Table, to_markdown, to_rich
from hotloop.report.published import make_published_tables, to_csv
from hotloop.report.read import read_records
from hotloop.types import EngineConfig

ROOT = Path(__file__).parents[2]

GPU = {"device": {"name": "A GPU", "kind": "cuda"}}
CPU = {"device": {"name": "A Processor", "kind": "cpu"}}
NOWHERE: dict = {}

LEVERS = EngineConfig(model="big", weights="random", quant="none", execution="eager").to_dict()
del LEVERS["engine"]  # a record's own field of that name is its engine's description


def cell(tok_s: float | None = None, *, on: dict = GPU, **fields) -> Record:
    """A record whose configuration has those of ``fields`` that are levers."""
    config = LEVERS | {name: fields.pop(name) for name in list(fields) if name in LEVERS}
    name = "/".join([config["quant"], config["execution"], fields.pop("suffix", "")]).rstrip("/")
    return record(name, tok_s, config=config, provenance=on, **fields)


def published(*records: Record) -> Table:
    (table,) = make_published_tables(records)
    return table


def shown(*records: Record) -> list[tuple[str, ...]]:
    return [row.cells for row in published(*records).rows]


def test_a_row_is_the_levers_and_both_speeds_with_their_uncertainty():
    one = cell(90, quant="int8", execution="compile", tensor_parallel=2, draft="ngram")
    (row,) = shown(one)
    assert row == ("int8", "yes", "2", "ngram-4", "90.00 ± 0.10", "90.00 ± 0.10")
    headings = [column.heading for column in published(one).columns]
    assert headings == [
        "Quantization",
        "Compiled",
        "Tensor parallel",
        "Speculative decoding",
        "decode tokens/s",
        "end-to-end tokens/s",
    ]
    assert "as gpt-fast does" in published(one).remarks[0]


def test_rows_are_in_the_references_order_whatever_order_they_were_run_in():
    by_draft = [
        {},
        {"draft": "exit-2"},
        {"draft": "ngram"},
        {"draft": "a", "draft_quant": "int4-g128"},
        {"draft": "a", "draft_quant": "int8"},
    ]
    expected = [
        *({"quant": "none", "execution": "eager", **draft} for draft in by_draft),
        {"quant": "int8", "execution": "eager", "tensor_parallel": 1},
        {"quant": "int8", "execution": "eager", "tensor_parallel": 2},
        {"quant": "int8", "execution": "eager", "tensor_parallel": 10},
        {"quant": "int8", "execution": "compile"},
        {"quant": "int8", "execution": "fused"},
        {"quant": "int4-g128", "execution": "compile"},
        {"quant": "int4-g64", "execution": "eager"},
        {"quant": "nf4", "execution": "eager"},
    ]
    found = published(*(cell(9, **levers) for levers in reversed(expected)))
    assert [row.record.config for row in found.rows] == [LEVERS | levers for levers in expected]


def test_another_execution_is_shown_by_its_own_name():
    assert [row[1] for row in shown(*(cell(9, execution=e) for e in ("eager", "fused")))] == [
        "no",
        "fused",
    ]


@pytest.mark.parametrize(
    ("fields", "decode", "note"),
    [
        (
            {"status": "predicted-oom", "reason": "needs 66.50 GiB, 40.00 GiB free"},
            "did not fit [1]",
            "did not fit on a single GPU: needs 66.50 GiB, 40.00 GiB free",
        ),
        (
            {"status": "oom", "reason": "out of memory in load\nFile x", "tensor_parallel": 2},
            "did not fit [1]",
            "did not fit on 2 GPUs: out of memory in load",
        ),
        (
            {"status": "predicted-oom", "reason": "needs 2.00 GiB, 1.00 GiB free", "on": CPU},
            "did not fit [1]",
            "did not fit in memory: needs 2.00 GiB, 1.00 GiB free",
        ),
        (
            {"status": "unsupported", "reason": "needs 4 GPUs, found 1", "tensor_parallel": 4},
            "unsupported [1]",
            "unsupported: needs 4 GPUs, found 1",
        ),
        ({"status": "failed", "reason": "KeyError: x"}, "failed [1]", "failed: KeyError: x"),
        ({"status": "timeout", "reason": "too long"}, "timeout [1]", "timeout: too long"),
        (
            {"tok_s": 50, "status": "unstable", "reason": "it grew steadily"},
            "50.00 ± 0.10 [1]",
            "lots of variance: it grew steadily",
        ),
        (
            {"tok_s": 50, "status": "timeout", "reason": "was in tasks"},
            "50.00 ± 0.10 [1]",
            "timeout: was in tasks",
        ),
        (
            {"tok_s": 50, "status": "oom", "reason": "killed in tasks"},
            "50.00 ± 0.10 [1]",
            "oom: killed in tasks",
        ),
    ],
)
def test_a_number_that_is_missing_or_doubtful_has_a_note(fields, decode, note):
    table = published(cell(**fields))
    assert table.rows[0].cells[4] == decode
    assert table.notes == (note,)


def test_auto_is_shown_and_sorted_as_the_execution_that_ran():
    fused, eager = (
        cell(9, execution="auto", engine={"execution": name}, quant=quant)
        for name, quant in (("fused", "none"), ("eager", "int8"))
    )
    compiled = cell(8, execution="compile"), cell(8, execution="compile", quant="int8")
    never = cell(execution="auto", tensor_parallel=2, status="unsupported", reason="one GPU")
    rows = shown(fused, eager, *compiled, never)
    assert [row[:3] for row in rows] == [
        ("none", "yes", "1"),
        ("none", "auto", "2"),
        ("none", "fused", "1"),
        ("int8", "no", "1"),
        ("int8", "yes", "1"),
    ]


def test_acceptance_of_random_weights_is_not_taken_for_that_of_a_trained_model():
    drafted = {"draft": "small", "speculation": drafting(draft="small-4")}
    table = published(cell(90), cell(95, **drafted), cell(95, draft_quant="int8", **drafted))
    assert [row.cells[3] for row in table.rows] == ["–", "small-4 [1]", "small:int8-4 [1]"]
    assert table.notes == (RANDOM_ACCEPTANCE,)
    assert "not quality" in table.remarks[-1]

    trained = published(cell(95, weights="checkpoint", **drafted))
    assert trained.notes == ()
    assert not any("andom" in remark for remark in trained.remarks)


def test_a_configuration_that_differs_in_what_the_layout_does_not_show_is_named():
    table = published(cell(9), cell(8, dtype="float32", suffix="float32"), cell(7, quant="int8"))
    assert [row.cells[0] for row in table.rows] == ["none [1]", "none [2]", "int8"]
    assert table.notes == ("none/eager", "none/eager/float32")


def test_another_engine_is_a_row_at_the_top_and_none_of_ours():
    theirs = cell(60, quant="awq", execution="auto", baseline="vllm")
    table = published(cell(9), theirs)
    assert table.rows[0].cells[:4] == ("vllm, awq", "–", "1", "–")
    assert len(published(cell(9), cell(60, baseline="vllm")).rows) == 2
    compiled = cell(60, quant="auto", execution="compile", baseline="transformers")
    assert published(compiled).rows[0].cells[:2] == ("transformers", "yes")


def test_records_that_cannot_be_compared_are_in_separate_tables():
    longer = Workload(prompt_tokens=32, new_tokens=640)
    tables = make_published_tables(
        [cell(9), cell(8, quant="int8")],
        [cell(1, on=CPU)],
        [cell(2, workload=longer)],
        [cell(7, model="small"), cell(6, weights="checkpoint")],
    )
    assert [(table.title, len(table.rows)) for table in tables] == [
        ("big, random weights on A GPU", 2),
        ("big, random weights on A Processor", 1),
        ("big, random weights on A GPU", 1),
        ("small, random weights on A GPU", 1),
        ("big on A GPU", 1),
    ]


def test_several_folders_are_joined_and_the_last_attempt_at_a_cell_counts():
    first = [cell(status="timeout"), cell(9), cell(8, quant="int8")]
    second = [cell(10), cell(7, execution="compile")]
    (table,) = make_published_tables(first, second)
    assert [row.record.decode_tok_s.mean for row in table.rows] == [10, 7, 8]


def test_a_record_that_ended_before_its_device_was_known_stays_with_its_model():
    lost = cell(status="failed", reason="exit code 3", on=NOWHERE, quant="int8")
    table = published(lost, cell(9))
    assert [row.record.status for row in table.rows] == ["ok", "failed"]
    assert published(lost).title == "big, random weights"


def test_an_old_record_without_the_newest_levers_is_a_row():
    old = record("int8/eager", 9)
    assert shown(old)[0][:4] == ("int8", "no", "1", "–")


def test_markdown_has_a_heading_and_a_table_for_each_model():
    tables = make_published_tables([cell(9), cell(7, model="small", status="failed", reason="x")])
    first, second = (to_markdown(table) for table in tables)
    assert first.startswith("## big, random weights on A GPU\n\n| Quantization | Compiled |")
    assert "| none         | no       | 1               | –                    |" in first
    assert "\n[1] failed: x\n" in second
    assert "\n- workload: 32 prompt tokens, 64 new tokens, 5 repeats\n" in first
    assert "- model:" not in first  # the heading says it


def test_the_layout_in_the_docs_is_that_of_the_records_that_are_kept():
    folder = ROOT / "benchmarks/results/h200-asclepius-13b"
    (made,) = make_published_tables(read_records(folder))
    docs = (ROOT / "docs/performance.md").read_text()
    _, _, after = docs.partition(f"<!-- published layout of {folder.name}: begin -->\n\n")
    shown, _, _ = after.partition(f"\n\n<!-- published layout of {folder.name}: end -->")
    assert shown
    assert f"\n\n{shown}\n\n" in to_markdown(made)


@pytest.mark.parametrize("width", [90, 120])
def test_a_terminal_shows_every_cell(width):
    out = io.StringIO()
    drafted = cell(90, quant="int4-g128", draft="llama-2-13b", draft_quant="int4-g128")
    Console(file=out, width=width).print(to_rich(published(drafted)))
    lines = out.getvalue().splitlines()
    assert lines[0].strip() == "big, random weights on A GPU"
    (row,) = (line for line in lines if line.startswith("int4-g128"))
    levers = "int4-g128 no 1 llama-2-13b:int4-g128-4"
    assert row.split() == [*levers.split(), "90.00", "±", "0.10", "90.00", "±", "0.10"]
    assert "…" not in out.getvalue()


def test_csv_has_the_levers_and_the_numbers_as_recorded_over_all_tables():
    tables = make_published_tables(
        [cell(90, draft="ngram", speculation=drafting()), cell(1, model="small", on=CPU)]
    )
    first, second = csv.DictReader(io.StringIO(to_csv(tables)))
    assert (first["model"], first["weights"], first["device"]) == ("big", "random", "A GPU")
    assert (first["speculative_decoding"], first["tensor_parallel"]) == ("ngram-4", "1")
    assert float(first["decode_tok_s"]) == 90
    assert float(first["speculation_tokens_per_step"]) == 2.5
    assert first["speculation_acceptance"] == "0.75 0.25"
    assert (second["model"], second["speculation_acceptance"]) == ("small", "")


def test_no_records_make_no_table():
    assert make_published_tables([]) == []
