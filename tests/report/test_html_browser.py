"""The report in a real browser: what is wide scrolls by itself, and everything fits on paper."""

from __future__ import annotations

import pytest
from browser import started_browser
from report_records import record

from hotloop.bench.paired import PairedTask, compare_over_tasks
from hotloop.bench.record import Record
from hotloop.bench.statistics import mean_figure
from hotloop.report.html import to_html

pytestmark = pytest.mark.browser

A4_PX = 688
"""The width of A4 less the page's margins, in CSS pixels."""


def with_verdict(made: Record, worse: int) -> Record:
    right = [i % 5 < 3 for i in range(480)]
    tested = [x and i >= 2 * worse for i, x in enumerate(right)]
    task = PairedTask(name="facts", chance=0.0, reference=right, tested=tested)
    return made.model_copy(update={"verdict": compare_over_tasks([task])})


RECORDS = [
    with_verdict(record("none/eager", 30.3, loss=0.0), 0),
    with_verdict(record("int8/compile", 78.9, loss=0.0021), 2),
    with_verdict(record("int4-g64/compile", 97.3, loss=0.234), 60),
    record("transformers", 20.1, loss=0.0003, baseline="transformers"),
    record(
        "vllm/a-checkpoint-of-some-length-awq",
        90.0,
        loss=0.001,
        baseline="vllm",
        kl_mean=None,
        kl_at_least=mean_figure([0.02, 0.03, 0.02]),
    ),
    record("llama-cpp", status="unsupported", reason="it is not installed", baseline="llama-cpp"),
]


def test_print_shows_what_is_folded_on_the_screen_but_for_samples_and_settings(tmp_path):
    file = tmp_path / "report.html"
    faster = [with_verdict(record(f"int4-g{n}/compile", 99.0, loss=0.3), 60) for n in (32, 128)]
    file.write_text(to_html([*RECORDS, *faster]))
    shown = "s => [...document.querySelectorAll(s)].some(element => element.checkVisibility())"
    folded = [".facts details dd", ".verdict details li", ".cells details dd"]
    with started_browser() as browser:
        page = browser.new_page()
        page.goto(file.as_uri())
        on_screen = [page.evaluate(shown, selector) for selector in folded]
        page.emulate_media(media="print")
        on_paper = [page.evaluate(shown, selector) for selector in folded]
    assert on_screen == [False, False, False]
    assert on_paper == [True, True, False]


def test_no_page_is_wider_than_its_screen_and_no_table_than_a_desktop_or_paper(tmp_path):
    file = tmp_path / "report.html"
    file.write_text(to_html(RECORDS))
    widths = "[document.documentElement.scrollWidth, innerWidth]"
    too_wide = """[...document.querySelectorAll(".scroll")]
        .filter(part => part.clientWidth && part.scrollWidth > part.clientWidth)
        .map(part => part.innerText)"""
    with started_browser() as browser:
        page = browser.new_page()
        page.goto(file.as_uri())
        for width in (400, 1200, 3840):
            page.set_viewport_size({"width": width, "height": 900})
            scrolled, there = page.evaluate(widths)
            assert scrolled <= there, f"at {width} pixels the whole page scrolls"
        page.set_viewport_size({"width": 1200, "height": 900})
        page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true })")
        assert page.evaluate(too_wide) == []
        page.emulate_media(media="print")
        page.set_viewport_size({"width": A4_PX, "height": 900})
        assert page.evaluate(too_wide) == []
