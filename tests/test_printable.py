"""Printed text from outside: shown, and never interpreted by the terminal."""

from __future__ import annotations

import io
import json
import unicodedata

import pytest
from rich.table import Table

from hotloop.cli import output
from hotloop.console import SafeConsole
from hotloop.printable import printable
from hotloop.report.layout import Column, to_markdown, to_rich
from hotloop.report.layout import Table as Report
from hotloop.sweep.events import CellStarted, Notice, ReferenceFinished, ReferenceStarted
from hotloop.sweep.progress import SweepProgress

CONTROLS = [chr(i) for i in (*range(0x20), *range(0x7F, 0xA0)) if chr(i) not in "\n\t"]
BIDIRECTIONAL = list("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
SURROGATES = ["\ud800", "\udc80", "\udfff"]
SEPARATORS = ["\u2028", "\u2029"]
OBEYED = [*CONTROLS, *BIDIRECTIONAL, *SURROGATES, *SEPARATORS]

HOSTILE = "a\x1b]0;title\x1b\\[/b][red]:boom:\x9b2J\u202e\udc80b"
SHOWN = r"a\x1b]0;title\x1b\[/b][red]:boom:\x9b2J\u202e\udc80b"


@pytest.mark.parametrize("character", OBEYED, ids=ascii)
def test_characters_that_a_terminal_interprets_are_escaped(character):
    assert printable(f"a{character}b") == f"a{ascii(character)[1:-1]}b"


def test_text_of_every_language_newlines_and_tabs_stay():
    text = "naïve\t日本語\n\u200fעברית\u200f क्\u200dष 👩\u200d🚀 \\x1b"
    assert printable(text) is text


def test_no_other_control_character_is_left():
    every = "".join(map(chr, range(0x11000)))
    left = {c for c in printable(every) if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")}
    assert left == {"\n", "\t"}


def on_console(renderable: object) -> str:
    out = io.StringIO()
    SafeConsole(file=out, width=200).print(renderable)
    return out.getvalue()


def test_a_console_shows_markup_and_controls_of_text_as_text():
    assert on_console(HOSTILE) == SHOWN + "\n"
    table = Table(HOSTILE)
    table.add_row(HOSTILE)
    assert on_console(table).count(SHOWN[:18]) == 2


def test_a_console_keeps_its_own_colors_on_a_terminal():
    out = io.StringIO()
    console = SafeConsole(file=out, width=20, force_terminal=True, color_system="standard")
    console.print("x\x1b[2J", style="bold")
    assert out.getvalue() == "\x1b[1mx\\x1b[2J\x1b[0m\n"


def test_a_report_shows_names_of_cells_and_of_what_was_measured_as_text():
    report = Report(
        title=HOSTILE,
        columns=(Column(title="configuration", text=lambda _: "", is_label=True),),
        rows=(),
        notes=(HOSTILE,),
        advice=(HOSTILE, HOSTILE),
        remarks=(HOSTILE,),
        context=((HOSTILE, HOSTILE),),
    )
    shown = on_console(to_rich(report))
    assert shown.count(SHOWN[:18]) == 7
    assert printable(shown) == shown
    assert "\x1b" in to_markdown(report), "a file is no terminal: it is escaped where it is printed"


def test_progress_of_a_sweep_shows_what_a_recipe_says_as_text():
    for is_terminal in (False, True):
        out = io.StringIO()
        console = SafeConsole(file=out, width=300, force_terminal=is_terminal, color_system=None)
        with SweepProgress(console) as progress:
            for event in (
                Notice(HOSTILE),
                ReferenceStarted(HOSTILE),
                ReferenceFinished(HOSTILE, HOSTILE),
                CellStarted(HOSTILE, 1, 1),
            ):
                progress(event)
        assert SHOWN in out.getvalue()
        assert not set(HOSTILE) & set(out.getvalue()) & set("\x9b\u202e\udc80")


def test_every_way_to_print_shows_outside_text_as_text(capsys):
    output.print_text(HOSTILE)
    output.print_pairs([(HOSTILE, HOSTILE)])
    output.print_memory(HOSTILE, [(HOSTILE, {}, None, HOSTILE)])
    output.print_rich(HOSTILE)
    out = capsys.readouterr().out
    assert out.count(SHOWN[:18]) == 8
    assert printable(out) == out
    output.print_error(HOSTILE)
    output.note(HOSTILE)
    assert capsys.readouterr().err.count(SHOWN) == 2


def test_spinners_and_bars_take_any_label(capsys):
    with output.spinner(HOSTILE) as show:
        show(HOSTILE)
    with output.progress_bar(HOSTILE) as progress:
        progress(1, 2)
    err = capsys.readouterr().err
    assert printable(err) == err
    assert not any(not line for line in err.splitlines()), "no empty lines in a log"


@pytest.mark.parametrize("character", [*OBEYED, "é", "\n", "\t"], ids=ascii)
def test_json_is_exact_and_what_a_terminal_would_obey_is_escaped_in_it(character, capsys):
    value = {character: [f"a{character}b"]}
    output.print_json(value)
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == value
    assert printable(line) == line
