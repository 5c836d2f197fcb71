"""The HTML page: valid, alone, accessible, and every number in it is a record's."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import html5lib
import pytest
from report_records import NOISE, drafting, record

from hotloop import quant
from hotloop.bench.record import Figure, Record, TaskFigures, Workload
from hotloop.bench.statistics import mean_figure
from hotloop.cli.app import main
from hotloop.report.commands import measure_command
from hotloop.report.fields import value_of
from hotloop.report.glossary import explain_names
from hotloop.report.html import TEMPLATES, charts_of, to_html
from hotloop.report.labels import Box, place_labels
from hotloop.report.plots import step_parts
from hotloop.report.read import read_records
from hotloop.report.write import write_plots
from hotloop.sweep.recipe import expand, load_recipe
from hotloop.sweep.store import append

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

MEMORY = {"weight_bytes_per_step": 135_000_000, "kv_bytes_per_token": 23_040, "notes": []}


def cell(quant: str, execution: str, tok_s: float, *, loss: float | None, **fields: Any) -> Record:
    levers = {
        name: fields.pop(name) for name in list(fields) if name in ("tensor_parallel", "draft")
    }
    config = {
        "model": "m",
        "weights": "checkpoint",
        "quant": quant,
        "execution": execution,
    } | levers
    return record(
        f"{quant}/{execution}" + "".join(f"/{k}={v}" for k, v in levers.items()),
        tok_s,
        loss=loss,
        config=config,
        engine=MEMORY | {"execution": execution},
        tpot_s=mean_figure([1 / (tok_s + 0.1 * x) for x in NOISE]),
        **fields,
    )


RECORDS = [
    cell("none", "eager", 30.3, loss=0.0, loss_spread=0.0),
    cell("none", "compile", 45.6, loss=0.0, loss_spread=0.0),
    cell("int8", "compile", 78.9, loss=0.0021),
    cell("int8", "compile", 131.7, loss=0.0021, tensor_parallel=2),
    cell("int4-g64", "compile", 97.3, loss=0.234, status="unstable", reason="it grew steadily"),
    cell("int8", "compile", 85.1, loss=0.0021, draft="ngram", speculation=drafting(), mbu=None),
    record("fp8/eager", status="predicted-oom", reason="needs 2.00 GiB, 1.00 GiB free"),
]


def parsed(text: str) -> Element:
    """The page, by a parser that refuses any fault."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)


def elements(root: Element, name: str) -> list[Element]:
    return [e for e in root.iter() if isinstance(e.tag, str) and e.tag.rpartition("}")[2] == name]


def text_of(element: Element) -> str:
    return "".join(element.itertext())


PAGE = to_html(RECORDS)


def real_records() -> Iterator[Any]:
    for folder in ("demo-2-core-x86_64", "demo-full-2-core-x86_64", "h100-llama-2-70b", "h200"):
        for file in sorted((RESULTS / folder).rglob("records.jsonl")):
            yield pytest.param(read_records(file), id=str(file.parent.relative_to(RESULTS)))


@pytest.mark.parametrize("records", list(real_records()))
def test_the_page_of_real_records_is_valid_and_has_every_cell(records):
    root = parsed(to_html(records))
    headings = " ".join(text_of(h) for h in elements(root, "h3"))
    assert all(one.cell in headings for one in records)


def test_the_page_is_valid_and_its_ids_are_unique_and_its_anchors_lead_somewhere():
    root = parsed(PAGE)
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    labels = [e.get("aria-labelledby") for e in root.iter() if e.get("aria-labelledby")]
    links = [e.get("href").removeprefix("#") for e in root.iter() if e.get("href")]
    assert links
    assert {each for label in labels for each in label.split()} | set(links) <= set(ids)


def test_the_page_needs_no_other_file_and_no_network():
    root = parsed(PAGE)
    for element in root.iter():
        for name, value in element.attrib.items():
            assert not re.search(r"(^|})(src|srcset|action|data|poster|manifest|style)$", str(name))
            if str(name).rpartition("}")[2] == "href":
                assert value.startswith("#")
    assert not {"link", "iframe", "object", "embed", "base", "img", "image", "use"} & {
        str(e.tag).rpartition("}")[2] for e in root.iter()
    }
    for loads in ("@import", "url(", "http:", "https:", "fetch(", "import(", "XMLHttpRequest"):
        assert loads not in PAGE


def test_every_number_of_a_table_and_every_mark_of_a_plot_is_the_records():
    root = parsed(PAGE)
    cells = {one.cell: one for one in RECORDS}
    by_number = dict(enumerate(RECORDS, start=1))
    figures = [td for td in elements(root, "td") if td.get("data-field")]
    assert len(figures) > 50
    for td in figures:
        one = by_number[int(td.get("data-row").rpartition("-")[2])]
        value = value_of(one, td.get("data-field"))
        assert float(td.get("data-value")) == (value.mean if isinstance(value, Figure) else value)
    marks = [g for g in elements(root, "g") if g.get("data-x")]
    names = {g.get("data-cell") for g in marks}
    assert names == {one.cell for one in RECORDS if one.decode_tok_s}
    for g in marks:
        one = cells[g.get("data-cell")]
        at = float(g.get("data-x")), float(g.get("data-y"))
        assert at in {
            (one.decode_tok_s.mean, one.delta_ln_ppl.mean),
            (one.config.get("tensor_parallel", 1), one.decode_tok_s.mean),
        }


def numbers_in(value: Any) -> Iterator[float]:
    match value:
        case bool() | None:
            return
        case int() | float():
            yield float(value)
        case str():
            yield from map(float, re.findall(r"\d+(?:\.\d+)?", value))
        case dict():
            for held in value.values():
                yield from numbers_in(held)
        case list() | tuple():
            for held in value:
                yield from numbers_in(held)


def test_a_number_that_a_table_shows_is_a_recorded_one_rounded():
    recorded = set(numbers_in([one.model_dump(mode="json") for one in RECORDS]))
    for one in RECORDS:
        for figure in filter(None, (getattr(one, name) for name in ("decode_tok_s", "e2e_tok_s"))):
            recorded.add((figure.ci95[1] - figure.ci95[0]) / 2)
    scaled = [n * by for n in recorded for by in (1, 100, 1e3, 2**-20, 2**-30)]
    root = parsed(PAGE)
    shown = [text_of(td) for td in elements(root, "td") if td.get("data-field")]
    for text in shown:
        for number in re.findall(r"\d+(?:\.\d+)?", re.sub(r"\[\d+\]", "", text)):
            places = len(number.partition(".")[2])
            allowed = 0.5000001 * 10**-places
            assert any(abs(abs(n) - float(number)) <= allowed for n in scaled), text


def test_every_sample_and_every_setting_is_behind_a_fold():
    root = parsed(PAGE)
    folds = " ".join(text_of(each) for each in elements(root, "details"))
    for one in RECORDS:
        for name in type(one).model_fields:
            figure = getattr(one, name)
            if isinstance(figure, Figure):
                assert ", ".join(map(str, figure.samples)) in folds
    for setting in ("tensor_parallel", "git_commit", "n_threads", "prompt_tokens", "proposed"):
        assert setting in folds


def test_parts_of_a_record_in_lists_are_settings_by_their_numbers():
    task = {"task": "t", "sha256": "s", "metric": "acc", "accuracy": mean_figure([1.0, 0.0])}
    root = parsed(to_html([record("int8/eager", 50, tasks=(TaskFigures(**task),))]))
    pairs = {
        text_of(elements(each, "dt")[0]): text_of(elements(each, "dd")[0])
        for fold in elements(root, "details")
        for each in elements(fold, "div")
        if elements(each, "dt")
    }
    assert (pairs["1.task"], pairs["1.accuracy.samples"]) == ("t", "1.0, 0.0")


def test_every_plot_has_a_text_alternative_with_its_values():
    root = parsed(PAGE)
    drawings = [e for e in elements(root, "svg") if e.get("role") == "img"]
    assert len(drawings) == 2 * 3, "two widths of speed and quality, of scaling, of a step's time"
    for drawing in drawings:
        title, summary = (text_of(elements(drawing, name)[0]) for name in ("title", "desc"))
        assert title
        assert "int8/compile" in summary
        assert re.search(r"\d", summary)
    for swatch in (e for e in elements(root, "svg") if e.get("role") != "img"):
        assert swatch.get("aria-hidden") == "true"


def test_the_verdict_is_two_sentences_and_comes_with_its_command():
    root = parsed(PAGE)
    (verdict,) = (e for e in elements(root, "div") if "verdict" in e.get("class", "").split())
    first, second = (text_of(p) for p in elements(verdict, "p"))
    assert first.startswith("Recommended: int8/compile/tensor_parallel=2, because it decodes 131.7")
    assert second.startswith("No measured configuration")
    (command,) = elements(verdict, "code")
    assert text_of(command) == "hotloop chat m --quant int8 --execution compile --tp 2"


def test_each_row_has_a_command_that_can_be_copied():
    commands = [text_of(e) for e in elements(parsed(PAGE), "code")][1:]
    assert len(commands) == len(RECORDS)
    assert commands[5] == (
        "hotloop sweep m --quant int8 --execution compile --draft ngram "
        "--prompt-tokens 32 --new-tokens 64 --window 256 --n-windows 5 --text 'a text' "
        "--out results/int8_compile_draft=ngram"
    )


def test_the_command_of_another_engines_row_writes_its_recipe_and_measures_it(tmp_path):
    said = {"quant": "int4-g128-asym", "weights": "random", "model": "llama-2-13b"}
    theirs = record("vllm/int4-g128-asym", 40, baseline="vllm", config={"engine": "vllm"} | said)
    command = measure_command(theirs)
    written, _, measured = command.partition(" && ")
    assert measured == "hotloop sweep cell.yaml"
    subprocess.run(["sh", "-c", written], cwd=tmp_path, check=True)
    recipe = load_recipe(tmp_path / "cell.yaml")
    (config,) = expand(recipe)
    assert {name: getattr(config, name) for name in said} == said
    assert (recipe.workload, recipe.quality) == (theirs.workload, None)

    scored = record("vllm/int4-g128-asym", 40, loss=0.1, baseline="vllm", config=theirs.config)
    protocol = scored.quality_protocol.model_copy(update={"tasks": ("topics", "arc.jsonl")})
    scored = scored.model_copy(update={"quality_protocol": protocol})
    written, _, _ = measure_command(scored).partition(" && ")
    subprocess.run(["sh", "-c", written], cwd=tmp_path, check=True)
    quality = load_recipe(tmp_path / "cell.yaml").quality
    assert (quality.window, quality.n_windows, quality.text) == (256, 5, Path("a text"))
    assert quality.tasks == ["topics", "arc.jsonl"]


def test_what_the_tool_calls_unstable_or_too_few_says_so_wherever_it_stands():
    two = cell("int8", "eager", 40, loss=0.001).model_copy(
        update={"decode_tok_s": mean_figure([39.0, 41.0])}
    )
    page = to_html([*RECORDS, two])
    assert page.count("2 repeats are too few to know its speed") >= 2, "both tables have a note"
    root = parsed(page)
    hollow = [
        g.get("data-cell")
        for g in elements(root, "g")
        if any("hollow" in path.get("class", "") for path in elements(g, "path"))
    ]
    assert set(hollow) == {"int4-g64/compile", "int8/eager"}
    assert "int8/eager" not in text_of(elements(root, "polyline")[0])
    rows = [text_of(row) for row in elements(root, "tr") if "(unstable)" in text_of(row)]
    assert rows, "the comparison with the recommended cell says it too"
    assert all("int4-g64/compile" in row for row in rows)
    (compared,) = (t for t in elements(root, "table") if "baseline of this table" in text_of(t))
    (row,) = (tr for tr in elements(compared, "tr") if "int8/eager" in text_of(tr))
    assert text_of(elements(row, "td")[-1]) == "–", "it is neither on nor off the Pareto front"


def test_equal_qualities_do_not_differ_and_noise_is_said_to_be_noise():
    slower = cell("int8", "eager", 78.85, loss=0.0021)
    root = parsed(to_html([RECORDS[2], slower]))
    (table,) = (t for t in elements(root, "table") if "baseline of this table" in text_of(t))
    (row,) = (tr for tr in elements(table, "tr") if "int8/eager" in text_of(tr))
    cells = [text_of(td) for td in elements(row, "td")]
    assert cells[1] == "not significantly different"
    assert cells[2:4] == ["0", "no difference"]
    assert cells[4] == "within noise of it"


def test_without_quality_no_column_is_about_it_and_the_first_row_is_what_is_compared_with():
    page = to_html([cell("int8", name, tok_s, loss=None) for name, tok_s in SPEEDS.items()])
    (table,) = (
        t for t in elements(parsed(page), "table") if "baseline of this table" in text_of(t)
    )
    assert [text_of(th) for th in elements(elements(table, "thead")[0], "th")] == [
        "configuration",
        "decode speed",
        "speed",
    ]
    assert "baseline of this table" in text_of(elements(elements(table, "tbody")[0], "tr")[0])
    assert "paired by window" not in page


SPEEDS = {"eager": 20.0, "compile": 50.0}


def test_a_reader_finds_what_the_parts_of_a_name_mean_and_only_of_those_that_occur():
    theirs = record("vllm/int4-g128-asym", 40, baseline="vllm", config={"quant": "int4-g128-asym"})
    split = cell("int8", "compile", 60, loss=None, tensor_parallel=2, draft="ngram")
    explained = dict(explain_names([split, theirs]))
    parts = ["int8", "int4", "g128", "asym", "compile", "tp2", "draft=…", "vllm"]
    assert [part for part in explained if part != "a/b/…"] == parts
    page = text_of(parsed(to_html([split, theirs])))
    assert all(meaning in page for meaning in explained.values())


@pytest.mark.parametrize("scheme", quant.WITH_OPTIONS)
def test_each_part_of_a_scheme_is_explained(scheme):
    named = cell(scheme.replace("gN", "g64"), "eager", 60, loss=None)
    explained = dict(explain_names([named]))
    assert set(named.config["quant"].split("-")) <= explained.keys()


def test_parts_of_a_step_add_up_to_it_and_none_is_negative_even_beyond_the_bandwidth():
    slow = cell("int8", "eager", 20.0, loss=None, mbu=mean_figure([0.1] * 5))
    fast = cell("int8", "compile", 120.0, loss=None, mbu=mean_figure([1.2] * 5))
    first, last = step_parts([slow, fast])
    assert (first.record, last.record, last.fastest) == (fast, slow, "int8/compile")
    for part in (first, last):
        parts = (part.weights_s, part.cache_s, part.execution_s, part.rest_s)
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(part.step_s)
    assert first.limit_s == pytest.approx(first.step_s), "never more than the step"
    assert last.limit_s == pytest.approx(0.1 * last.step_s)
    assert last.execution_s == pytest.approx(last.step_s - first.step_s)


def test_scaling_is_relative_to_the_fewest_ranks_and_beside_the_ideal():
    speeds = {1: 50.0, 2: 90.0, 4: 150.0}
    made = [cell("int8", "compile", s, loss=None, tensor_parallel=n) for n, s in speeds.items()]
    (chart,) = (chart for chart in charts_of(made) if chart.name == "scaling")
    ideal, measured = chart.series
    assert [(p.x, round(p.y)) for p in ideal.points] == [(1, 50), (2, 100), (4, 200)]
    assert [round(p.y) for p in measured.points] == list(speeds.values())
    assert [p.label for p in measured.points[1:]] == ["1.80 ×", "3.00 ×"]


def test_eager_on_a_gpu_is_said_to_wait_for_its_host():
    def caption(kind: str) -> str:
        place = {"device": {"kind": kind, "name": "A device"}}
        page = to_html([cell("int8", "eager", 20, loss=None, provenance=place)])
        return text_of(elements(parsed(page), "main")[0])

    assert "waits for the host" in caption("cuda")
    assert "waits for the host" not in caption("cpu")


HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">\'"&\u202e\x1b[2J\x00'


def test_text_of_records_is_shown_and_never_obeyed():
    odd = record(
        HOSTILE,
        50,
        loss=0.5,
        config={"model": HOSTILE, "quant": HOSTILE, HOSTILE: HOSTILE},
        status="unstable",
        reason=HOSTILE,
        engine={"notes": [HOSTILE], HOSTILE: [HOSTILE]},
        provenance={"device": {"name": HOSTILE}, HOSTILE: {HOSTILE: HOSTILE}},
    )
    page = to_html([odd, RECORDS[0]])
    root = parsed(page)
    assert not elements(root, "img")
    assert len(elements(root, "script")) == 2, "the records and the buttons"
    for element in root.iter():
        assert not [name for name in element.attrib if str(name).lower().startswith("on")]
    for character in "\u202e\x1b\x00":
        assert character not in page
    assert "alert(1)" in "".join(text_of(h) for h in elements(root, "h3"))


def test_the_page_carries_its_records():
    root = parsed(PAGE)
    data, _ = elements(root, "script")
    import json

    assert [Record.model_validate_json(json.dumps(one)) for one in json.loads(data.text)] == RECORDS


def test_records_that_cannot_be_compared_are_sections_of_one_page():
    longer = [
        one.model_copy(update={"workload": Workload(prompt_tokens=9, new_tokens=9)})
        for one in RECORDS
    ]
    root = parsed(to_html(RECORDS, longer))
    assert len(elements(root, "h1")) == 2


@pytest.mark.parametrize("n", [1, 2, 60])
def test_a_page_of_few_and_of_many_cells(n):
    records = [cell(f"int{i}", "eager", 10.0 + i, loss=0.001 * i) for i in range(n)]
    assert len(elements(parsed(to_html(records)), "article")) == n


@pytest.mark.parametrize("tolerance", [0.0, 1e-9, 0.02, 5.0])
def test_a_page_for_every_tolerance(tolerance):
    parsed(to_html(RECORDS, max_delta_ln_ppl=tolerance))


def test_each_plot_is_a_picture_too(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra png is not installed")
    hostile = RECORDS[0].model_copy(update={"cell": "$\\frac{ \x1b $"})
    files = write_plots(tmp_path, [RECORDS, [hostile]])
    names = ["speed-quality.png", "scaling.png", "step-time.png"]
    assert [file.name for file in files] == names
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG")
    unscored = [one.model_copy(update={"delta_ln_ppl": None}) for one in [hostile, *RECORDS[1:3]]]
    assert [file.name for file in write_plots(tmp_path, [unscored])] == [
        "speed.png",
        "step-time.png",
    ]


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    append(tmp_path / "records.jsonl", RECORDS[0])
    assert main(["report", str(tmp_path), "--png"]) == 2
    assert "pip install 'hotloop[png]'" in capsys.readouterr().err


def test_labels_cover_neither_marks_nor_each_other():
    marks = [(100.0 + 3 * i, 100.0 + i, f"cell {i}", i == 4) for i in range(9)]
    bounds = Box(0, 0, 300, 200)
    labels = place_labels(marks, bounds, size=13)
    assert labels[0].text == "cell 4"
    boxes = []
    for label in labels:
        width = 0.56 * 13 * len(label.text)
        left = {"start": label.x, "end": label.x - width, "middle": label.x - width / 2}
        at = left[label.anchor]
        boxes.append(Box(at, label.y - 10, at + width, label.y + 3))
    for box, other in itertools.combinations(boxes, 2):
        assert not box.overlaps(other)
    for box in boxes:
        assert bounds.holds(box)
        assert not any(box.overlaps(Box(x - 5, y - 5, x + 5, y + 5)) for x, y, *_ in marks)


def test_nothing_measured_is_a_page_too():
    page = to_html([RECORDS[-1]])
    assert "no configuration was measured" in text_of(parsed(page))
    parsed(to_html([]))


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_parts_of_a_bar_differ_in_grayscale_and_text_has_contrast():
    style = (TEMPLATES / "report.css").read_text()
    palettes = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(palettes) == 3, "light, dark, print"
    for palette in palettes:
        colors = dict(re.findall(r"--(\w[\w-]*): (#[0-9a-f]{6});", palette))

        def contrast(a: str, b: str, of: dict[str, str] = colors) -> float:
            low, high = sorted(luminance(of[name]) for name in (a, b))
            return (high + 0.05) / (low + 0.05)

        for a, b in itertools.pairwise(("p0", "p1", "p2", "p3")):
            assert contrast(a, b) >= 1.3
        for ink in ("ink", "dim", "accent", "warn"):
            assert contrast(ink, "paper") >= 4.5
            assert contrast(ink, "soft") >= 4.5
        for mark in (f"s{i}" for i in range(6)):
            assert contrast(mark, "paper") >= 3
