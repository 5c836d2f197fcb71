"""How a streamed answer is shown on a terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import pytest

from hotloop.cli.stream import PlainWriter, TerminalWriter, relay, writer_for
from hotloop.errors import RankError
from hotloop.types import Delta

FIGURE = "decode 9.9 tok/s"


class Screen(io.StringIO):
    """Enough of a terminal: a grid that knows the four sequences that the writer uses."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, [[" "] * width]
        self.row = self.column = 0
        self.saved = (0, 0)

    def write(self, text: str) -> int:
        for part in re.findall(r"\033\[\d*[JGm]|\033[78]|[\s\S]", text):
            if part == "\0337":
                self.saved = (self.row, self.column)
            elif part == "\0338":
                self.row, self.column = self.saved
            elif part == "\033[J":
                self.rows[self.row][self.column :] = [" "] * (self.width - self.column)
                self.rows[self.row + 1 :] = []
            elif part.endswith("G") and part.startswith("\033"):
                self.column = int(part[2:-1]) - 1
            elif part == "\n":
                self._next_row()
            elif not part.startswith("\033"):
                if self.column == self.width:
                    self._next_row()
                self.rows[self.row][self.column] = part
                self.column += 1
        return len(text)

    def _next_row(self) -> None:
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.rows):
            self.rows.append([" "] * self.width)

    def lines(self) -> list[str]:
        return ["".join(row).rstrip() for row in self.rows]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    monkeypatch.setenv("COLUMNS", "40")
    return Screen(40)


@pytest.mark.parametrize("size", [1, 3, 7, 39, 40, 41, 200])
def test_the_text_stays_whole_whatever_the_figure_covers_meanwhile(screen, size):
    text = "".join(f"{i:03} " for i in range(25)) + "\nend of\n\n" + "x" * 40 + "\nlast line"
    writer = TerminalWriter(screen)
    for start in range(0, len(text), size):
        writer.write(text[start : start + size], FIGURE)
    writer.end()
    folded = [line[i : i + 40] for line in text.split("\n") for i in range(0, len(line) or 1, 40)]
    assert screen.lines() == [*(line.rstrip() for line in folded), ""]


def test_the_figure_stands_at_the_right_edge_while_there_is_room(screen):
    writer = TerminalWriter(screen)
    writer.write("Hello", FIGURE)
    assert screen.lines() == ["Hello" + " " * 19 + FIGURE]
    writer.write(" there, how are you?", FIGURE)
    assert screen.lines() == ["Hello there, how are you?"]


def test_after_a_resize_no_figure_covers_the_line_whose_end_is_not_known(screen, monkeypatch):
    writer = TerminalWriter(screen)
    writer.write("Hello", FIGURE)
    monkeypatch.setenv("COLUMNS", "30")
    screen.rows.append(list(FIGURE.ljust(40)))  # where a narrower terminal moves it
    writer.write(" there", FIGURE)
    writer.write(", you", FIGURE)
    assert screen.lines() == ["Hello there, you"]
    writer.write("\nNext", FIGURE)
    assert screen.lines() == ["Hello there, you", "Next" + " " * 10 + FIGURE]


def test_a_simple_terminal_gets_no_sequences_of_ours_nor_of_the_models(monkeypatch):
    class Dumb(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "dumb")
    out = Dumb()
    writer_for(out).write("a\033[2J", FIGURE)
    assert out.getvalue() == r"a\x1b[2J"


def test_a_pipe_gets_exactly_what_the_model_said():
    out = io.StringIO()
    writer_for(out).write("a\033[2J\r\n", FIGURE)
    assert out.getvalue() == "a\033[2J\r\n"


def test_a_model_cannot_move_the_cursor(screen):
    writer = TerminalWriter(screen)
    writer.write("a\033[2Jb\r\nc\x9bd\u202ee", "")
    assert screen.lines() == [r"a\x1b[2Jb", r"c\x9bd\u202ee"]


def test_outside_a_terminal_the_text_is_unchanged_and_ends_with_a_newline():
    out = io.StringIO()
    writer = writer_for(out)
    assert isinstance(writer, PlainWriter)
    for piece in ("a\033[2J", "", "b"):
        writer.write(piece, FIGURE)
    writer.end()
    assert out.getvalue() == "a\033[2Jb\n"


def failing_answer() -> Iterator[Delta]:
    yield Delta(index=0, text="half of", token_ids=(1,))
    raise RankError(1, 2, "was killed")


def test_an_error_of_the_engine_leaves_the_answers_line_ended(screen):
    plain = io.StringIO()
    for writer in (PlainWriter(plain), TerminalWriter(screen)):
        with pytest.raises(RankError):
            relay(failing_answer(), writer)
    assert plain.getvalue() == "half of\n"
    assert screen.lines() == ["half of", ""]


def test_a_text_that_ends_its_line_gets_no_second_newline():
    out = io.StringIO()
    writer = PlainWriter(out)
    writer.write("one\n", "")
    writer.write("", "")
    writer.end()
    assert out.getvalue() == "one\n"


def test_an_error_before_any_text_leaves_no_empty_line_and_an_empty_answer_has_a_line():
    def failing() -> Iterator[Delta]:
        raise RankError(1, 2, "was killed")
        yield

    plain = io.StringIO()
    with pytest.raises(RankError):
        relay(failing(), PlainWriter(plain))
    assert plain.getvalue() == ""
    relay((delta for delta in ()), PlainWriter(plain))
    assert plain.getvalue() == "\n"
