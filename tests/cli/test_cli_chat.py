"""``hotloop chat``: over a pipe, and in a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_fakes import CONTEXT
from waiting import HANG_S

from hotloop.cli.app import main
from hotloop.cli.chat import Conversation, read_turns
from hotloop.errors import RequestError
from hotloop.types import Speculation

pytestmark = pytest.mark.usefixtures("fake_llm")


def lines_of(*lines: str) -> list[str]:
    """The turns in these lines."""
    left: Iterator[str] = iter(lines)

    def read_line(_prompt: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return list(read_turns(read_line))


def test_a_line_is_a_turn():
    assert lines_of("one", "", "two") == ["one", "", "two"]


def test_a_backslash_at_the_end_continues_the_turn():
    assert lines_of("one\\", "two\\", "three", "four") == ["one\ntwo\nthree", "four"]


def test_triple_quotes_make_one_turn_of_many_lines_and_leave_backslashes_alone():
    assert lines_of('"""', "def f():", "", "    pass \\", '"""', "next") == [
        "def f():\n\n    pass \\",
        "next",
    ]


def test_an_end_inside_a_block_still_gives_the_turn():
    assert lines_of('"""', "one", "two") == ["one\ntwo"]


def conversation(limit: int) -> Conversation:
    def encode(messages):
        return [ord(c) for m in messages for c in m["content"]]

    talk = Conversation(encode, limit, system="S")
    talk.exchanges += [("aaa", "AAA"), ("bbb", "BBB")]
    return talk


def test_a_conversation_is_sent_whole_while_it_fits():
    assert "".join(map(chr, conversation(14).prompt("c")[0])) == "SaaaAAAbbbBBBc"


def test_the_oldest_exchanges_go_first_and_the_system_message_never():
    talk = conversation(10)
    ids, dropped = talk.prompt("c")
    assert ("".join(map(chr, ids)), dropped) == ("SbbbBBBc", 1)
    assert talk.exchanges == [("bbb", "BBB")]


def test_a_message_that_cannot_fit_is_refused_and_nothing_is_forgotten():
    talk = conversation(10)
    with pytest.raises(RequestError, match=r"takes 11 tokens, and 10 fit"):
        talk.prompt("c" * 10)
    assert len(talk.exchanges) == 2


def test_turns_over_a_pipe_get_an_answer_each_and_carry_the_history(fake_llm, piped, capsys):
    piped("Hi\nMore\n")
    assert main(["chat", "m"]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello world.\nHello world.\n"
    assert err.count("decode 4.0 tok/s") == 2
    (llm,) = fake_llm.made
    assert [asked.prompt for asked in llm.asked] == [
        "<user>Hi<assistant>",
        "<user>Hi<assistant>Hello world.<user>More<assistant>",
    ]
    assert llm.closed


@pytest.mark.parametrize("options", [[], ["--prefix-cache", "none"]])
def test_turns_reuse_every_token_before_them_unless_something_else_is_asked(
    fake_llm, piped, options
):
    piped("Hi\n")
    assert main(["chat", "m", *options]) == 0
    (llm,) = fake_llm.made
    assert llm.config.prefix_cache == (options[-1] if options else "tokens")


def test_lines_before_one_that_is_not_text_are_answered(fake_llm, monkeypatch, capsys):
    stdin = io.TextIOWrapper(io.BytesIO(b"Hi\r\n\xff\nMore\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["chat", "m"]) == 2
    assert "not text in utf-8" in capsys.readouterr().err
    (llm,) = fake_llm.made
    assert len(llm.asked) == 1
    assert "Hi" in str(llm.asked[0])


@pytest.mark.parametrize("options", [[], ["--max-new-tokens", "1000"]])
def test_an_answer_can_take_what_the_context_has_left_and_is_never_refused(
    fake_llm, piped, options
):
    piped("Hi\n")
    assert main(["chat", "m", *options]) == 0
    (asked,) = fake_llm.made[0].asked
    assert asked.params.max_new_tokens == CONTEXT - len(asked.prompt)


def test_reset_forgets_and_system_is_set_for_what_follows(fake_llm, piped):
    piped("Hi\n/reset\n/system Be brief.\nAgain\n")
    assert main(["chat", "m", "--system", "Old"]) == 0
    assert [asked.prompt for asked in fake_llm.made[0].asked] == [
        "<system>Old<user>Hi<assistant>",
        "<system>Be brief.<user>Again<assistant>",
    ]


def test_quit_ends_before_the_lines_that_follow(fake_llm, piped):
    piped("/quit\nHi\n")
    assert main(["chat", "m"]) == 0
    assert fake_llm.made[0].asked == []


def test_stats_and_help_say_what_there_is_without_touching_stdout(piped, capsys):
    piped("Hi\n/stats\n/help\n")
    main(["chat", "some-model", "--quant", "int8"])
    out, err = capsys.readouterr()
    assert out == "Hello world.\n"
    for said in ("some-model", "int8/eager", "Fake CPU", "tokens        4", "4.0 tok/s"):
        assert said in err
    for command in ("/reset", "/stats", "/system TEXT", "/help", "/quit"):
        assert command in err


def test_stats_say_what_drafting_did_in_all_answers(fake_llm, piped, capsys, monkeypatch):
    seen = Speculation(n_steps=2, n_tokens=3, proposed=(2,), accepted=(1,))
    monkeypatch.setattr(fake_llm, "speculation", seen)
    piped("Hi\nAgain\n/stats\n")
    main(["chat", "m", "--draft", "ngram"])
    assert "speculation   1.50 tokens/step, acceptance 50%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/no_think what is 2+2?", "/no_think what is 2+2?"),
        ("/no_think", "/no_think"),
        ("/etc/hosts: what is it?", "/etc/hosts: what is it?"),
        ("/reset the router: how?", "/reset the router: how?"),
        ("/", "/"),
        ("//reset", "/reset"),
        ("//system Be brief.", "/system Be brief."),
        ("// is what kind of comment?", "// is what kind of comment?"),
    ],
)
def test_only_its_own_commands_are_commands_and_a_second_slash_makes_a_message(
    line, message, fake_llm, piped
):
    piped(f"{line}\n")
    assert main(["chat", "m"]) == 0
    assert [asked.prompt for asked in fake_llm.made[0].asked] == [f"<user>{message}<assistant>"]


def test_a_mistyped_command_is_a_message_with_a_note(fake_llm, piped, capsys):
    piped("/rest\n")
    assert main(["chat", "m"]) == 0
    assert (
        "/rest is not a command, so it is sent as a message. Did you mean /reset?"
        in capsys.readouterr().err
    )
    assert len(fake_llm.made[0].asked) == 1


def test_reset_keeps_the_system_message_and_says_so(fake_llm, piped, capsys):
    piped("Hi\n/reset\n/help\nAgain\n")
    assert main(["chat", "m", "--system", "Old"]) == 0
    assert fake_llm.made[0].asked[1].prompt == "<system>Old<user>Again<assistant>"
    err = capsys.readouterr().err
    assert "The conversation is forgotten; the system message stays." in err
    assert "forget the conversation; the system message stays" in err


def test_input_that_is_not_utf_8_is_one_line():
    done = subprocess.run(
        [sys.executable, "-c", TERMINAL_CHAT],
        input=b"Hi \xff\n",
        capture_output=True,
        env=os.environ | WITH_FAKES | {"PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 2
    assert (
        done.stderr.decode()
        .splitlines()[-1]
        .startswith("error: standard input is not text in utf-8")
    )


def test_the_last_answer_can_be_continued_and_stays_one_answer(fake_llm, piped):
    piped("Hi\n/continue\nAnd?\n")
    assert main(["chat", "m"]) == 0
    (llm,) = fake_llm.made
    assert [asked.prompt for asked in llm.asked] == [
        "<user>Hi<assistant>",
        "<user>Hi<assistant>Hello world.",
        "<user>Hi<assistant>Hello world.Hello world.<user>And?<assistant>",
    ]


def test_without_an_answer_there_is_nothing_to_continue(fake_llm, piped, capsys):
    piped("/continue\nHi\n")
    assert main(["chat", "m"]) == 0
    assert "there is no answer to continue" in capsys.readouterr().err
    assert len(fake_llm.made[0].asked) == 1


def test_a_refused_turn_does_not_end_the_session(piped, capsys):
    piped("x" * 300 + "\nHi\n")
    assert main(["chat", "m"]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello world.\n"
    assert "error: this message takes 317 tokens" in err


def test_old_turns_are_dropped_with_a_note_when_the_context_is_full(fake_llm, piped, capsys):
    piped("".join(f"{'abc'[i] * 40}\n" for i in range(3)))
    assert main(["chat", "m", "-n", "30"]) == 0
    assert "the oldest 1 of 2 exchanges were dropped" in capsys.readouterr().err
    assert fake_llm.made[0].asked[2].prompt.startswith("<user>b")


def test_json_is_one_object_an_answer(piped, capsys):
    piped("Hi\nMore\n")
    main(["chat", "m", "--json"])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(a["prompt"], a["text"]) for a in answers] == [
        ("Hi", "Hello world."),
        ("More", "Hello world."),
    ]


def test_ctrl_c_over_a_pipe_ends_the_session(fake_llm, piped, capsys, monkeypatch):
    monkeypatch.setattr(fake_llm, "interrupt_after", 2)
    piped("Hi\nMore\n")
    assert main(["chat", "m"]) == 130
    assert capsys.readouterr().out == "Hello wor\n"


TERMINAL_CHAT = """
import sys, time
from pathlib import Path
import hotloop
from cli_fakes import FakeLLM
from hotloop.types import Delta

class Terminal(FakeLLM):
    made = []

    def stream(self, prompts, params):
        text = self.text_of(prompts[0])
        if "second" in text:
            self.words = ("History: " + text.replace("\\n", "|"),)
            yield from super().stream(prompts, params)
            return
        for i in range(10):
            yield Delta(index=0, text=f"w{i} ", token_ids=(i,))
        while not ("paced" in text and Path(sys.argv[1], "go").exists()):
            time.sleep(0.01)  # for ever, unless it is cancelled; nothing is shown
            yield Delta(index=0, text="", token_ids=(10,))
        self.words = tuple(f"w{i} " for i in range(10, 40))
        yield from super().stream(prompts, params)

vars(hotloop)["LLM"] = Terminal
from hotloop.cli.app import main
sys.exit(main(["chat", "some-model"]))
"""
"""Answers ``second`` with the conversation, ``paced`` with words of which the last ones come when
there is a file ``go`` in the folder that it is given, and all else with words without an end."""


PATHS = (str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))
WITH_FAKES = {"PYTHONPATH": os.pathsep.join(filter(None, PATHS))}


class Terminal:
    """A program in a pseudo-terminal, 120 columns wide, which is given a folder."""

    def __init__(self, code: str, folder: Path) -> None:
        self.folder = folder
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ |= WITH_FAKES | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
            os.environ.pop("COLUMNS", None)
            os.execv(sys.executable, [sys.executable, "-c", code, str(folder)])
        self.seen = self.before = ""
        self.resize(120)

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))

    def wait_for(self, text: str) -> None:
        """Reads until ``text`` was shown, and forgets what came before its end."""
        self._wait_for(re.compile(re.escape(text)))

    def wait_for_prompt(self) -> None:
        """Reads until a line can be typed; ``<role>`` in an answer is no prompt."""
        self._wait_for(re.compile(r"(?<=\x1b\[0m)>"))

    def _wait_for(self, pattern: re.Pattern[str]) -> None:
        deadline = time.monotonic() + HANG_S
        while (found := pattern.search(self.seen)) is None:
            assert time.monotonic() < deadline, f"{pattern} never came: {self.seen!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                self.seen += os.read(self._fd, 65536).decode(errors="replace")
        self.before, self.seen = self.seen[: found.start()], self.seen[found.end() :]

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def exit_code(self) -> int:
        """Returns the exit code of the program, which should be about to end; reads its output."""
        deadline = time.monotonic() + HANG_S
        while (ended := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
            assert time.monotonic() < deadline, f"the program did not end: {self.seen!r}"
            if select.select([self._fd], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):  # the terminal is gone before the process is
                    self.seen += os.read(self._fd, 65536).decode(errors="replace")
        self.pid = None
        return os.waitstatus_to_exitcode(ended[1])

    def close(self) -> None:
        """Ends the program if a test did not."""
        os.close(self._fd)
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


@pytest.fixture
def terminal(tmp_path) -> Iterator[Terminal]:
    with contextlib.closing(Terminal(TERMINAL_CHAT, tmp_path)) as opened:
        opened.wait_for_prompt()
        yield opened


def leave(terminal: Terminal) -> None:
    terminal.wait_for_prompt()
    terminal.type("\x04")
    assert terminal.exit_code() == 0


def test_in_a_terminal_ctrl_c_stops_the_answer_and_never_the_session(terminal):
    terminal.type("first\r")
    terminal.wait_for("w5 ")
    terminal.wait_for("tok/s")  # the speed is shown while the answer comes
    terminal.type("\x03")
    terminal.wait_for("ended by Ctrl-C")
    terminal.wait_for_prompt()
    terminal.type("half a line\x03")  # a moment late
    terminal.wait_for("Ctrl-D or /quit ends the chat.")
    terminal.wait_for_prompt()
    terminal.type("second\r")
    terminal.wait_for("History: <user>first<assistant>w0 w1 w2 w3 w4 w5 ")
    terminal.wait_for("<user>second<assistant>")
    leave(terminal)


@pytest.mark.parametrize("mark", [("", ""), ("\x1b[200~", "\x1b[201~")], ids=["typed", "pasted"])
def test_what_is_typed_while_an_answer_comes_is_hidden_until_the_next_prompt(mark, terminal):
    terminal.type("paced\r")
    terminal.wait_for("w9 ")
    terminal.type(f"{mark[0]}second{mark[1]}")
    (terminal.folder / "go").touch()
    terminal.wait_for_prompt()
    assert "second" not in terminal.before
    terminal.wait_for("second")
    terminal.type("\r")
    terminal.wait_for("<user>second<assistant>")
    leave(terminal)


def test_a_pasted_text_of_several_lines_is_one_message(terminal):
    terminal.type("\x1b[200~second\r    two\r\r/quit\x1b[201~\r")
    terminal.wait_for("History: <user>second|    two||/quit<assistant>")
    leave(terminal)


def test_a_resize_while_an_answer_comes_leaves_its_text_whole(terminal):
    terminal.type("paced\r")
    terminal.wait_for("w9 ")
    terminal.resize(50)
    (terminal.folder / "go").touch()
    terminal.wait_for("TTFT")
    figure = r"\x1b7\x1b\[\d+G\x1b\[2m.*?\x1b8"
    shown = re.sub(rf"{figure}|\x1b\[J", "", terminal.before)
    assert " ".join(f"w{i}" for i in range(10, 40)) in shown
    leave(terminal)


def test_the_terminal_is_as_it_was_afterwards(tmp_path):
    code = f"""
import termios
before = termios.tcgetattr(0)
{TERMINAL_CHAT.replace("sys.exit(", "code = (")}
print("SAME", termios.tcgetattr(0) == before)
"""
    with contextlib.closing(Terminal(code, tmp_path)) as terminal:
        terminal.wait_for_prompt()
        terminal.type("/quit\r")
        terminal.wait_for("SAME True")


def test_in_a_terminal_ctrl_d_leaves_kindly(terminal):
    terminal.type("\x04")
    assert terminal.exit_code() == 0


def test_chat_works_where_stdout_is_no_terminal():
    done = subprocess.run(
        [sys.executable, "-c", TERMINAL_CHAT],
        input="second\n",
        capture_output=True,
        text=True,
        env=os.environ | WITH_FAKES,
    )
    assert done.stdout == "History: <user>second<assistant>\n"
    assert "\033" not in done.stdout + done.stderr
