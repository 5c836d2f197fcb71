from __future__ import annotations

import csv
import io
import json
import math

import pytest
from report_records import NOISE, drafting, record
from rich.console import Console

from hotloop.bench.record import Record, Workload
from hotloop.bench.statistics import mean_figure, t_critical
from hotloop.errors import ConfigError
from hotloop.report.context import RANDOM_ACCEPTANCE
from hotloop.report.layout import to_markdown, to_rich
from hotloop.report.numbers import divergence, memories, memory, percent, significant, uncertain
from hotloop.report.published import make_published_tables
from hotloop.report.read import latest, read_records
from hotloop.report.recommend import recommend
from hotloop.report.table import make_table, to_csv
from hotloop.report.write import write_results
from hotloop.sweep.store import append

REFERENCE = record("none/eager", 30, loss=0.0, loss_spread=0.0)


# --- numbers


@pytest.mark.parametrize(
    ("mean", "half_width", "shown"),
    [
        (61.234, 0.82, "61.2 ± 0.8"),
        (61.234, 0.123, "61.23 ± 0.12"),
        (1234.5, 56.0, "1234 ± 56"),
        (1234.5, 12.3, "1234 ± 12"),
        (12.345, None, "12.35"),
        (0.0, 0.0, "0"),
        (0.00001, 0.000002, "0.0000 ± 0.0000"),
    ],
)
def test_a_mean_has_the_digits_that_its_uncertainty_leaves(mean, half_width, shown):
    assert uncertain(mean, half_width) == shown


def test_numbers_show_no_more_than_is_known():
    assert uncertain(0.0123, 0.0011, signed=True) == "+0.0123 ± 0.0011"
    assert uncertain(-0.0123, 0.003, signed=True) == "-0.012 ± 0.003"
    assert [significant(x, 3) for x in (12.345, 0.012345, 12345.6)] == ["12.3", "0.0123", "12346"]
    assert percent(0.99996, 1) == "99.9%"  # not all is never shown as all
    assert percent(1.0, 1) == "100%"
    assert memory(600 * 2**20) == "600 MiB"
    assert memory(12.34 * 2**30) == "12.3 GiB"


def test_bytes_of_a_column_are_in_one_unit():
    mib, gib = 2**20, 2**30
    assert memories([600 * mib, 2 * gib, None]) == ["600 MiB", "2048 MiB", ""]
    assert memories([12.34 * gib, 2 * gib]) == ["12.3 GiB", "2.0 GiB"]
    assert memories([None, 12.34 * gib, 60 * mib]) == ["", "12.34 GiB", "0.06 GiB"]
    assert memories([None]) == [""]


def test_a_divergence_below_the_stored_precision_is_a_bound():
    assert divergence(-3e-10) == "< 1e-6"


# --- reading


def test_records_are_read_from_a_folder_or_a_file_and_bad_lines_reported(tmp_path):
    append(tmp_path / "records.jsonl", REFERENCE)
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"cell": "int')
    problems = []
    assert read_records(tmp_path, on_problem=problems.append) == [REFERENCE]
    assert len(problems) == 1
    with pytest.warns(UserWarning, match="incomplete or damaged"):
        assert read_records(tmp_path / "records.jsonl") == [REFERENCE]
    with pytest.raises(ConfigError, match="no such file"):
        read_records(tmp_path / "nothing")


def test_a_file_without_a_record_is_refused(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"records.jsonl: holds no records$"):
        read_records(tmp_path)
    path.write_text("{\n[]\n")
    with pytest.raises(ConfigError, match="holds no records: 2 of its lines are not valid records"):
        read_records(path, on_problem=lambda _: None)


def test_the_latest_attempt_counts_and_cells_keep_their_place():
    first = record("a/eager", status="timeout")
    again = record("a/eager", 10, attempt=2)
    other = record("b/eager", 20)
    assert latest([first, other, again]) == [again, other]


def test_an_attempt_that_knew_what_auto_is_takes_the_place_of_one_that_did_not():
    config = {"quant": "a", "execution": "auto"}
    lost = record("a/auto", config=config, status="timeout")
    known = record("a/eager", 10, config=config, attempt=2)
    asked_for = record("a/eager", 20, config=config | {"execution": "eager"})
    assert latest([lost, asked_for, known]) == [known, asked_for]


def test_cells_that_differ_in_their_length_alone_are_several():
    cells = [record(f"a/eager/max_seq_len={n}", 1, config={"max_seq_len": n}) for n in (64, 128)]
    assert latest(cells) == cells


def test_a_new_workload_replaces_the_old_figures_and_another_device_does_not():
    def on(device: str, max_seq_len: int) -> Record:
        return record("a/eager", 1, config={"device": device, "max_seq_len": max_seq_len})

    records = [on("cpu", 64), on("cpu", 128), on("cuda", 64)]
    assert latest(records) == records[1:]


# --- recommending


def test_the_fastest_within_the_tolerance_is_recommended_and_the_faster_explained():
    int8 = record("int8/compile", 60, loss=0.002)
    int4 = record("int4-g64/compile", 78.6, loss=0.08, loss_spread=0.01)
    found = recommend([REFERENCE, int8, int4])
    assert found.cell == "int8/compile"
    assert found.quality_known
    assert "2.0 × none/eager" in found.why
    assert found.not_chosen == (
        "int4-g64/compile is 31% faster, but Δ ln ppl +0.080 ± 0.004 exceeds 0.02.",
    )
    assert recommend([REFERENCE, int8, int4], max_delta_ln_ppl=0.1).cell == "int4-g64/compile"


def test_a_loss_must_be_shown_to_be_small_and_not_merely_look_small():
    figure = mean_figure([0.015 + 0.01 * x for x in NOISE])
    upper = figure.mean + t_critical(4, confidence=0.9) * figure.se
    assert figure.mean < 0.02 < upper  # within the tolerance, but not with confidence
    unsure = record("int4-g64/compile", 90, loss=0.015, loss_spread=0.01)
    found = recommend([REFERENCE, unsure])
    assert found.cell == "none/eager"
    windows = math.ceil(5 * ((upper - 0.015) / 0.005) ** 2)
    assert "is not shown to be within 0.02" in found.not_chosen[0]
    assert f"about {windows} windows are needed" in found.not_chosen[0]

    assert recommend([REFERENCE, unsure], max_delta_ln_ppl=upper + 1e-9).cell == "int4-g64/compile"


def test_between_speeds_that_differ_by_noise_the_better_quality_is_picked():
    good = record("int8/compile", 60.0, spread=2, loss=0.001)
    fast = record("int4-g32/compile", 60.5, spread=2, loss=0.010)
    found = recommend([REFERENCE, fast, good])
    assert found.cell == "int8/compile"
    assert ", within noise of the fastest whose quality loss is within 0.02: " in found.why
    (why,) = found.not_chosen
    assert why.startswith("int4-g32/compile is as fast within noise, but it loses more quality, ")
    assert why.endswith("Δ ln ppl +0.0100 ± 0.0004.")


def test_of_equal_quality_and_speeds_that_differ_by_noise_the_faster_on_average_is_picked():
    slower = record("none/compile", 29.5, spread=3, loss=0.0)
    found = recommend([record("none/eager", 30.0, spread=3, loss=0.0), slower])
    assert found.cell == "none/eager"
    assert found.not_chosen == (
        "none/compile is as fast within noise, but slower on average, 29.5 tok/s.",
    )


def test_without_quality_it_is_speed_alone_and_says_so():
    why = "random weights have no quality"
    found = recommend(
        [
            record("none/eager", 30, quality_reason=why),
            record("int4-g64/compile", 90, quality_reason=why),
        ]
    )
    assert (found.cell, found.quality_known) == ("int4-g64/compile", False)
    assert "Only speed is considered" in found.why
    assert why in found.why


def test_an_unscored_cell_is_not_recommended_over_scored_ones():
    unscored = record("int8/compile", 90, quality_reason="out of memory in quality")
    found = recommend([REFERENCE, unscored])
    assert found.cell == "none/eager"
    assert "its quality is unknown (out of memory in quality)" in found.not_chosen[0]


def test_nothing_is_recommended_where_nothing_can_be():
    assert recommend([]).cell is None
    assert recommend([record("a/eager", status="oom", reason="x")]).cell is None
    bad = recommend([record("int4-g64/eager", 30, loss=0.5)])
    assert bad.cell is None
    assert "int4-g64/eager: Δ ln ppl" in bad.not_chosen[0]


def test_records_that_do_not_compare_are_not_compared():
    elsewhere = record("int8/eager", 60, provenance={"device": {"name": "Another"}})
    found = recommend([record("none/eager", 30), elsewhere])
    assert found.cell is None
    assert "different devices" in found.why


def test_rows_of_several_models_name_their_model():
    small, large = (
        record("none/eager", speed, config={"model": model})
        for model, speed in (("small", 60), ("large", 30))
    )
    table = make_table([small, large])
    assert [row.cells[:3] for row in table.rows] == [
        ("none/eager", "ok", "small"),
        ("none/eager", "ok", "large"),
    ]
    assert "model" not in [column.heading for column in make_table([small]).columns]


def test_a_comparison_with_an_unstable_speed_says_that_it_is_unstable():
    shaky = {"status": "unstable", "reason": "r"}
    plain = record("none/eager", 30, loss=0.0, **shaky)
    fast = record("int4-g64/eager", 90, loss=0.5, **shaky)
    theirs = record("vllm/eager", 40, baseline="vllm", **shaky)
    found = recommend([plain, fast, theirs, record("int8/eager", 60, loss=0.001)])
    assert found.cell == "int8/eager"
    assert "(2.0 × none/eager, whose speed was unstable), the fastest whose" in found.why
    assert found.not_chosen[0].startswith("int4-g64/eager (unstable) is 50% faster, but")
    assert found.other_engines[0].startswith("vllm/eager decodes 40.00 ± 0.10 tok/s (unstable): ")
    steady = recommend([REFERENCE, record("int8/eager", 60, loss=0.001)])
    assert "unstable" not in steady.why


def on_device(cell: str, mbu: float, **device: float | str) -> Record:
    machine = {"name": "A Processor", "n_threads": 2, "read_bytes_per_s": 40e9, **device}
    engine = {"weight_bytes_per_step": 128 * 2**20}
    made = record(cell, 60, provenance={"device": machine}, engine=engine)
    return made.model_copy(update={"mbu": mean_figure([mbu] * 5)})


def test_an_mbu_above_100_percent_has_a_note_with_its_cause_and_no_other_has():
    cached = on_device("a/eager", 1.09, last_level_cache_bytes=32 * 2**20)
    slowed = on_device("b/eager", 1.2, read_bytes_per_s=30e9)
    unknown = on_device("c/eager", 1.003)
    below = on_device("d/eager", 0.999)
    first = (
        "MBU above 100%: a step reads more bytes per second than the read bandwidth that was "
        "measured before,"
    )
    (note,) = make_table([cached, below]).notes
    held = "The last-level cache (32 MiB) can hold 25% of these weights."
    assert note == f"{first} 40.0 GB/s. {held}"
    (note,) = make_table([slowed, below]).notes
    more = "Before other cells 40.0 GB/s were measured; MBU is 90% of that."
    assert note == f"{first} 30.0 GB/s. {more}"
    table = make_table([unknown, below])
    (note,) = table.notes
    may = "A cache may hold a part of the weights, or other work slowed that measurement."
    assert note == f"{first} 40.0 GB/s. {may}"
    of_mbu = [column.heading for column in table.columns].index("MBU")
    assert [row.cells[of_mbu] for row in table.rows] == ["100% [1]", "99%"]
    assert f"[1] {note}" in to_markdown(table)
    assert f"[1] {note}" in printed([unknown, below], 400)


def test_ranks_of_a_cpu_share_its_cache():
    shared = on_device("a/eager", 1.09, last_level_cache_bytes=32 * 2**20, kind="cpu")
    shared.config["tensor_parallel"] = 2
    (note,) = make_table([shared]).notes
    assert note.endswith("The last-level cache (32 MiB) can hold 12% of these weights.")


def test_an_mbu_above_100_percent_of_the_datasheet_has_a_note_too():
    made = on_device("a/eager", 0.9).model_copy(update={"mbu_datasheet": mean_figure([1.5] * 5)})
    (note,) = make_table([made]).notes
    said = "a step reads more bytes per second than the memory bandwidth in the datasheet."
    assert note == f"MBU above 100%: {said} A cache may hold a part of the weights."


def test_an_unstable_speed_is_recommended_with_the_note():
    found = recommend([record("none/eager", 30, loss=0.0, status="unstable", reason="r")])
    assert found.cell == "none/eager"
    assert "unstable" in found.why


def repeated(cell: str, speeds: list[float], **fields) -> Record:
    return record(cell, 1.0, **fields).model_copy(update={"decode_tok_s": mean_figure(speeds)})


@pytest.mark.parametrize(
    ("speeds", "says"),
    [
        ([50.0], "1 repeat is too few to know its speed, 50.00 tok/s"),
        ([49.0, 51.0], "2 repeats are too few to know its speed, 50 ± 13 tok/s"),
        ([4.0, 5.0, 60.0], "its repeats differ too much to know its speed, 23 ± 80 tok/s of 3"),
    ],
)
def test_a_speed_that_is_not_known_is_not_recommended(speeds, says):
    unknown = repeated("int8/eager", speeds, loss=0.001)
    found = recommend([REFERENCE, unknown])
    assert found.cell == "none/eager"
    assert any(sentence.startswith(f"int8/eager: {says}") for sentence in found.not_chosen)
    alone = recommend([unknown])
    assert alone.cell is None
    assert "no configuration's speed is known" in alone.why
    unscored = recommend([repeated("int8/eager", speeds)])
    assert unscored.cell is None


def test_notes_of_an_engine_are_said_once_in_a_table_and_beside_the_verdict_of_the_html_page():
    note = "int8/cpu not used: there is no C++ compiler"
    sentence = "210 matrices are quantized again as int8."
    slow = record("int8/eager", 50, loss=0.001, engine={"notes": [note, sentence]})
    table = make_table([REFERENCE, slow])
    (row,) = (row for row in table.rows if row.recommended)
    assert row.record == slow
    assert row.cells[2] == "50.00 ± 0.10 [1] [2]"
    assert table.notes == (note, sentence)
    assert not any(sentence in advice for advice in table.advice)
    assert recommend([REFERENCE, slow]).note == f"Notes on int8/eager: {note}. {sentence}"
    (published,) = make_published_tables([slow])
    assert note in published.notes


def test_other_engines_come_first_wherever_they_were_measured():
    theirs = record("vllm", 40, baseline="vllm")
    records = [REFERENCE, theirs, record("int8/eager", 50)]
    assert [one.cell for one in latest(records)] == ["vllm", "none/eager", "int8/eager"]
    for table in (make_table(records), *make_published_tables(records)):
        assert table.rows[0].record == theirs


def test_a_gpu_is_named_with_its_host():
    gpu = {"kind": "cuda", "name": "A GPU", "n_threads": None}
    host = {"cpu": "A Processor", "n_cpus_allowed": 16}
    on_gpu = record("int8/eager", 50, provenance={"device": gpu, "host": host})
    assert dict(make_table([on_gpu]).context)["device"] == "A GPU, host A Processor, 16 CPUs"
    assert make_published_tables([on_gpu])[0].title.endswith("on A GPU")


def test_a_batch_has_the_speed_of_one_sequence_and_that_of_all():
    workload = Workload(prompt_tokens=32, new_tokens=64, batch=4, repeats=1)
    of_all = mean_figure([190.0] * 5)
    table = make_table([record("int8/eager", 50, workload=workload, aggregate_tok_s=of_all)])
    shown = {
        column.heading: cell
        for column, cell in zip(table.columns, table.rows[0].cells, strict=True)
    }
    assert (shown["decode tok/s"], shown["total tok/s"]) == ("50.00 ± 0.10", "190")
    assert any("total is the number of tokens of all" in remark for remark in table.remarks)
    assert dict(table.context)["workload"].endswith("64 new tokens, 1 repeat")
    alone = make_table([record("int8/eager", 50, aggregate_tok_s=of_all)])
    assert "total tok/s" not in [column.heading for column in alone.columns]


def test_a_model_that_is_stored_quantized_is_said_to_be():
    stored = {"stored": {"summary": "Q4_1 for 210 of 272 tensors", "is_quantized": True}}
    table = make_table([record("int8/eager", 50, loss=0.001, provenance=stored)])
    assert ("weights stored as", "Q4_1 for 210 of 272 tensors") in table.context
    assert any("weights are quantized, as they are stored" in remark for remark in table.remarks)
    other = {**stored, "reference_model": "unquantized"}
    table = make_table([record("int8/eager", 50, loss=0.001, provenance=other)])
    assert not any(
        "weights are quantized, as they are stored" in remark for remark in table.remarks
    )


# --- tables

EVERYTHING = [
    REFERENCE,
    record("int8/eager", 42, loss=0.002, status="unstable", reason="the clock changed"),
    record("int8/compile", status="failed", reason="KeyError in load: 'x'\n  File y"),
    record("int4-g64/eager", status="predicted-oom", reason="needs 12.00 GiB, 8.00 GiB free"),
    record("int4-g64/compile", 100.3, loss=0.08, loss_spread=0.01),
]


def printed(records: list[Record], width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(to_rich(make_table(records)))
    return out.getvalue()


def test_a_120_column_terminal_shows_every_number_in_one_row_each():
    lines = printed(EVERYTHING, 120).splitlines()
    row = next(line for line in lines if line.startswith("  int4-g64/compile"))
    shown = (
        "int4-g64/compile ok 100.30 ± 0.10 12.3 100 600 MiB 62% 20.50 +0.080 ± 0.004 0.012 97.1%"
    )
    assert row.split() == shown.split()
    assert "…" not in "".join(lines)


@pytest.mark.parametrize("width", [40, 60, 80, 100, 119])
def test_a_narrow_terminal_gets_the_table_in_pieces_and_loses_nothing(width):
    text = printed(EVERYTHING, width)
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    for shown in ("100.30 ± 0.10", "600 MiB", "+0.080 ± 0.004", "97.1%", "predicted-oom [3]"):
        assert shown in text


def test_a_terminal_of_40_columns_shows_configuration_and_decode_speed_side_by_side():
    first = printed(EVERYTHING, 40).partition("\n\n")[0]
    assert ["int4-g64/compile", "100.30", "±", "0.10"] in [x.split() for x in first.splitlines()]
    long = record("none/auto/draft=small:int4-g128-2/draft=a/small", 100.3)
    text = printed([REFERENCE, long], 30)
    assert "100.30 ± 0.10" in text
    assert "…" not in text


def test_the_published_layout_is_narrow_too():
    (table,) = make_published_tables(EVERYTHING)
    out = io.StringIO()
    Console(file=out, width=40).print(to_rich(table))
    assert "100.30 ± 0.10" in out.getvalue()
    assert "…" not in out.getvalue()


def test_every_row_that_needs_one_has_a_note_and_the_recommended_one_is_marked():
    table = make_table(EVERYTHING)
    assert [row.cells[1] for row in table.rows] == [
        "ok",
        "unstable [1]",
        "failed [2]",
        "predicted-oom [3]",
        "ok",
    ]
    assert table.notes == (
        "unstable: the clock changed",
        "failed: KeyError in load: 'x'",
        "predicted-oom: needs 12.00 GiB, 8.00 GiB free",
    )
    assert [row.recommended for row in table.rows] == [False, True, False, False, False]
    assert "★ int8/eager" in printed(EVERYTHING, 120)
    assert "★ Recommended: int8/eager, because" in printed(EVERYTHING, 120)


def test_random_weights_have_no_quality_columns_and_the_table_says_why():
    text = to_markdown(make_table([record("none/eager", 30, quality_reason="random weights")]))
    assert "ppl" not in text
    assert "No quality: random weights." in text
    assert "Only speed is considered" in text


def test_a_row_without_quality_among_others_says_why():
    table = make_table([REFERENCE, record("int8/eager", 42, quality_reason="out of memory")])
    perplexity = [column.field for column in table.columns].index("perplexity")
    assert table.rows[1].cells[perplexity] == "[1]"
    assert table.notes == ("quality: out of memory",)


def test_a_cell_that_was_stopped_while_it_was_scored_shows_its_speed_and_is_not_recommended():
    stopped = {"status": "timeout", "reason": "was in tasks", "quality_reason": "not finished"}
    fast = record("int8/eager", 90, loss=0.0, **stopped)
    table = make_table([REFERENCE, fast])
    row = next(row for row in table.rows if row.record == fast)
    assert row.cells[1:3] == ("timeout [1]", "90.00 ± 0.10")
    assert table.notes[:2] == ("timeout: was in tasks", "quality: not finished")
    advice = recommend([REFERENCE, fast])
    assert advice.cell == "none/eager"
    sentence = (
        "int8/eager: it decodes 90.00 ± 0.10 tok/s, but ended as timeout before its quality was "
        "measured to the end."
    )
    assert sentence in advice.not_chosen
    nothing = recommend([fast])
    assert (nothing.cell, nothing.not_chosen) == (None, (sentence,))
    partly = record("int8/eager", 90, loss=0.0, quality_reason="no answer")
    (why,) = recommend([REFERENCE, partly]).not_chosen
    assert why.endswith("but not all of its quality is known (no answer).")


def test_markdown_is_a_table_with_all_that_stands_below_it():
    text = to_markdown(make_table([*EVERYTHING, record("a|b/eager", status="oom", reason="x")]))
    heading, rule, *rows = text.split("\n\n")[0].splitlines()
    assert len({len(line) for line in (heading, rule, *rows)}) == 1
    assert {line.replace("\\|", "").count("|") for line in (heading, rule, *rows)} == {12}
    assert "| **int8/eager** ★ |" in text
    for below in (
        "- model: m",
        "- device: A Processor, 2 threads",
        "- measured read bandwidth: 28.0 GB/s",
        "- versions: hotloop 0.1.0, torch 2.13.0, commit cccccccccc",
        "- workload: 32 prompt tokens, 64 new tokens, 5 repeats",
        "- text: a text, 5 windows of 256 tokens, against none/eager bf16",
        "- date: 2025-01-02",
    ):
        assert f"\n{below}\n" in text


def test_context_that_differs_between_rows_names_the_rows():
    other = record("int8/eager", 1, workload=Workload(prompt_tokens=8, new_tokens=8))
    context = make_table([REFERENCE, other]).context
    assert ("workload", "8 prompt tokens, 8 new tokens, 5 repeats (int8/eager)") in context


def test_csv_has_the_numbers_as_recorded():
    rows = list(csv.DictReader(io.StringIO(to_csv(make_table(EVERYTHING)))))
    assert [row["cell"] for row in rows] == [r.cell for r in EVERYTHING]
    assert [row["model"] for row in rows] == [r.config["model"] for r in EVERYTHING]
    assert [row["recommended"] for row in rows] == ["false", "true", "false", "false", "false"]
    speed = EVERYTHING[4].decode_tok_s
    assert float(rows[4]["decode_tok_s"]) == speed.mean
    assert float(rows[4]["decode_tok_s_ci95_high"]) == speed.ci95[1]
    assert int(rows[4]["decode_tok_s_n"]) == 5
    assert float(rows[4]["kl_p99"]) == 0.2
    assert rows[2]["decode_tok_s"] == rows[2]["decode_tok_s_ci95_low"] == ""
    assert rows[3]["reason"] == "needs 12.00 GiB, 8.00 GiB free"


def test_speculation_has_columns_if_any_cell_used_it():
    drafted = record("int8/compile", 50, speculation=drafting(), mbu=None)
    table = make_table([record("none/eager", 30), drafted])
    headings = [column.heading for column in table.columns]
    places = [headings.index(name) for name in ("tokens per step", "acceptance", "MBU")]
    assert [[row.cells[i] for i in places] for row in table.rows] == [
        ["", "", "62%"],
        ["2.50", "75%", ""],
    ]
    assert any("share of first drafts" in remark for remark in table.remarks)
    assert RANDOM_ACCEPTANCE not in table.remarks
    plain = make_table([record("none/eager", 30)])
    assert "acceptance" not in [column.heading for column in plain.columns]

    _, row = csv.DictReader(io.StringIO(to_csv(table)))
    assert float(row["speculation_tokens_per_step"]) == 2.5
    assert float(row["speculation_tokens_per_step_se"]) > 0
    assert row["speculation_acceptance"] == "0.75 0.25"
    assert row["speculation_proposed"] == "8 4"
    assert float(row["speculation_off_share"]) == 0.2


def test_drafting_that_never_came_to_a_draft_has_no_acceptance():
    off = drafting(proposed=(), accepted=(), acceptance=(), off_share=1.0)
    table = make_table([record("none/eager", 30, speculation=off)])
    assert "–" in table.rows[0].cells


def test_acceptance_of_random_weights_is_said_to_mean_nothing():
    config = {"model": "m", "weights": "random"}
    table = make_table([record("none/eager", 30, config=config, speculation=drafting())])
    assert RANDOM_ACCEPTANCE in table.remarks


def test_another_engine_is_in_the_table_and_is_not_recommended():
    theirs = record("none/eager", 90, baseline="another", loss=0.0)
    table = make_table([REFERENCE, theirs])
    assert [row.recommended for row in table.rows] == [False, True]
    assert "none/eager decodes 90.00 ± 0.10 tok/s: none/eager is 0.33 × as fast." in table.advice
    split = REFERENCE.model_copy(update={"config": REFERENCE.config | {"tensor_parallel": 2}})
    assert (
        recommend([split, theirs]).other_engines[0].endswith("0.33 × as fast, over 2 ranks to 1.")
    )
    elsewhere = record("vllm", 90, baseline="vllm", provenance={"device": {"name": "Another"}})
    assert recommend([REFERENCE, elsewhere]).other_engines == ()


def test_a_results_folder_gets_its_tables_from_its_records_alone(tmp_path):
    for one in EVERYTHING:
        append(tmp_path / "records.jsonl", one)
    table = write_results(tmp_path, read_records(tmp_path))
    assert (tmp_path / "table.md").read_text() == to_markdown(table)
    assert (tmp_path / "table.csv").read_text() == to_csv(table)
    (published,) = make_published_tables(EVERYTHING)
    assert (tmp_path / "published.md").read_text() == to_markdown(published)
    assert json.loads((tmp_path / "records.jsonl").read_text().splitlines()[0])["cell"]


def test_no_records_make_an_empty_table_and_no_error():
    assert "No recommendation" in printed([], 80)
    assert "No recommendation" in to_markdown(make_table([]))


def test_notes_are_numbered_in_the_order_in_which_a_row_mentions_them():
    slow = record("int8/eager", 42, quality_reason="out of memory", engine={"notes": ["slow path"]})
    table = make_table([REFERENCE, slow])
    perplexity = [column.field for column in table.columns].index("perplexity")
    cells = table.rows[1].cells
    assert cells[2].endswith("[1]")
    assert cells[perplexity] == "[2]"
    assert table.notes == ("slow path", "quality: out of memory")
