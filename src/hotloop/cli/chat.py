"""``hotloop chat``: a conversation in a terminal, or over a pipe with one turn per line.

The conversation is a separate value (``Conversation``) that does not depend on a terminal.
``Session`` is the loop around it. Code for terminals is in ``terminal``.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

from cyclopts import App

from hotloop.cli.engine import ConversationFormat, Message, loaded
from hotloop.cli.options import (
    DEFAULT_ENGINE,
    DEFAULT_SAMPLING,
    DEFAULT_TEMPLATE,
    MODEL,
    EngineOptions,
    Json,
    Model,
    SamplingOptions,
    TemplateOptions,
    option,
)
from hotloop.cli.output import note, print_error, print_json
from hotloop.cli.stream import SILENT, Answer, relay, speculation_summary, writer_for
from hotloop.cli.terminal import NO_CTRL_C, CtrlC, ReadLine, line_reader
from hotloop.errors import ConfigError, HotloopError, RequestError, shorten
from hotloop.types import Speculation

if TYPE_CHECKING:
    from hotloop.engine.llm import LLM
    from hotloop.types import ChatPrompt, EngineConfig, SamplingParams

app = App(
    name="chat",
    help_epilogue="""\
Examples:
  hotloop chat smollm2-135m
  hotloop chat ./my-model --quant int4-g64 --execution compile --temperature 0.7
  printf 'Hello!\\nAnd in French?\\n' | hotloop chat smollm2-135m""",
)

COMMANDS = {
    "/continue": "continue the last answer, where it was cut",
    "/reset": "forget the conversation; the system message stays",
    "/stats": "show speed and token counts of this session",
    "/system TEXT": "set the system message; without TEXT, show it",
    "/help": "show this list",
    "/quit": "end the chat, as Ctrl-D does",
}
_NAMES = {command.split()[0] for command in COMMANDS} | {"/exit"}

HOW_TO_LEAVE = "Ctrl-C stops an answer. Ctrl-D or /quit ends the chat."

HELP = "\n".join(
    [
        *(f"{name:14}{what}" for name, what in COMMANDS.items()),
        "Every other line is a message, even if it begins with /; //quit sends the message /quit.",
        HOW_TO_LEAVE,
        "Pasted text is one message. A line that ends in \\ continues in the next.",
        'All lines between two lines of """ are one message.',
    ]
)

MIN_ANSWER_TOKENS = 256
"""Tokens that a prompt leaves for its answer by default, if the context is large enough."""


@app.default
def chat(
    model: Model,
    /,
    *,
    system: Annotated[str | None, option(MODEL, "The system message.")] = None,
    template: TemplateOptions = DEFAULT_TEMPLATE,
    engine: EngineOptions = DEFAULT_ENGINE,
    sampling: SamplingOptions = DEFAULT_SAMPLING,
    json: Json = False,
) -> int:
    """Chat with a model.

    In a terminal, /help lists the commands, and Ctrl-C stops an answer.
    From a pipe, each line is a turn, and answers go to standard output.
    --json prints one object per answer.
    Without --max-new-tokens, an answer may fill the context.
    A conversation that outgrows the context loses its oldest turns, with a note.
    A turn prefills only what is new, unless --prefix-cache says otherwise.
    """
    sampling.check(json=json)
    if sampling.n not in (None, 1):
        raise ConfigError(
            f"--n {sampling.n}: a chat generates one answer to each message. Leave --n out."
        )
    interactive = sys.stdin.isatty()
    config, conversation = engine.config(model), ConversationFormat(template)
    if config.prefix_cache == "auto":
        config = replace(config, prefix_cache="tokens")
    first = [{"role": "system", "content": system}] if system else []
    conversation.check(model, [*first, {"role": "user", "content": "Hello"}])
    with loaded(config) as llm:
        params, encode = sampling.params(llm.default_sampling), conversation.encoder(llm.tokenizer)
        session = Session(llm, config, params, encode, system, json=json)
        if interactive:
            session.greet()
            converse_in_terminal(session)
        else:
            with line_reader() as read_line:
                converse(session, read_turns(read_line))
    return 0


def converse(session: Session, turns: Iterator[str]) -> None:
    """Answers turns until there are no more, or the session ends."""
    for text in turns:
        if not session.handle(text):
            break


def converse_in_terminal(session: Session) -> None:
    """Answers turns from a terminal, in which Ctrl-C does not end the program."""
    with CtrlC() as ctrl_c, line_reader() as read_line:
        session.ctrl_c = ctrl_c
        read = ctrl_c.while_reading(read_line)
        converse(session, read_turns(read, on_interrupt=lambda: note(HOW_TO_LEAVE)))


@dataclass
class Conversation:
    """A conversation, cut to fit the context.

    Attributes:
        encode: Makes a prompt from messages, through a chat template.
        limit: The most tokens a prompt may have.
        system: The system message.
        exchanges: Pairs of a user's message and its answer, oldest first.
    """

    encode: Callable[[list[Message]], ChatPrompt]
    limit: int
    system: str | None = None
    exchanges: list[tuple[str, str]] = field(default_factory=list)

    def prompt(self, text: str | None) -> tuple[ChatPrompt, int]:
        """Returns the prompt for ``text``, and how many of the oldest exchanges were dropped.

        If ``text`` is None, it is the prompt that continues the last answer.

        Raises:
            RequestError: ``text`` does not fit even alone, or there is no answer to continue; the
                conversation is unchanged.
        """
        if text is None and not self.exchanges:
            raise RequestError("there is no answer to continue.")
        dropped, last = 0, len(self.exchanges) - (text is None)
        while len(ids := self.encode(self._messages(self.exchanges[dropped:], text))) > self.limit:
            if dropped == last:
                raise RequestError(
                    f"this message takes {len(ids)} tokens, and {self.limit} fit. Shorten it, or "
                    "start with a larger --max-seq-len."
                )
            dropped += 1
        del self.exchanges[:dropped]
        return ids, dropped

    def add(self, text: str | None, answer: str) -> None:
        """Adds the answer to ``text``, or, if that is None, the continuation of the last answer."""
        if text is None:
            asked, begun = self.exchanges[-1]
            self.exchanges[-1] = asked, begun + answer
        else:
            self.exchanges.append((text, answer))

    def _messages(self, exchanges: list[tuple[str, str]], text: str | None) -> list[Message]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for asked, answered in exchanges:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answered})
        return messages if text is None else [*messages, {"role": "user", "content": text}]


class Session:
    """A conversation with one engine, and its commands.

    Args:
        llm: The engine.
        config: Its configuration as given.
        params: Sampling options of every answer.
        encode: Makes a prompt from messages.
        system: The system message.
        json: Print an object per answer, not text.

    Attributes:
        ctrl_c: Handles Ctrl-C in a terminal, where it stops an answer. With None, Ctrl-C ends the
            session.
    """

    ctrl_c: CtrlC | None = None

    def __init__(
        self,
        llm: LLM,
        config: EngineConfig,
        params: SamplingParams,
        encode: Callable[[list[Message]], ChatPrompt],
        system: str | None = None,
        *,
        json: bool = False,
    ) -> None:
        self._llm, self._params = llm, params
        self._json = json
        self._config, self._about = config, llm.describe()
        context = self._about.max_seq_len
        room = min(params.max_new_tokens or MIN_ANSWER_TOKENS, context // 2)
        self._conversation = Conversation(encode, context - room, system)
        self._answers: list[Answer] = []
        self._context_used = 0

    def greet(self) -> None:
        """Prints the model, execution mode and device."""
        about = self._about
        note(f"{self._config.model} · {about.name} on {about.device_name} · /help for help")

    def handle(self, text: str) -> bool:
        """Runs the command of a turn, or answers its message; returns False to end the session."""
        try:
            if (command := parse_command(text)) is not None:
                return self._run_command(*command)
            if text.strip():
                self._reply(message_of(text))
        except HotloopError as error:
            print_error(str(error))
        except KeyboardInterrupt:
            if self.ctrl_c is None:
                raise
            note("Stopped. The conversation is unchanged.")
        return True

    def _run_command(self, name: str, text: str) -> bool:
        match name:
            case "/quit" | "/exit":
                return False
            case "/help":
                note(HELP)
            case "/reset":
                self._conversation.exchanges.clear()
                self._context_used = 0
                kept = "; the system message stays." if self._conversation.system else "."
                note(f"The conversation is forgotten{kept}")
            case "/continue":
                self._reply(None)
            case "/stats":
                note(self._stats())
            case "/system":
                self._conversation.system = text or self._conversation.system
                note(f"System message: {self._conversation.system or 'none'}")
            case _:
                raise AssertionError(f"no command {name!r}")
        return True

    def _reply(self, text: str | None) -> None:
        before = len(self._conversation.exchanges)
        ids, dropped = self._conversation.prompt(text)
        if dropped:
            note(f"The context is full: the oldest {dropped} of {before} exchanges were dropped.")
        writer = SILENT if self._json else writer_for(sys.stdout)
        # A limit on the length of answers never refuses one.
        room = self._about.max_seq_len - len(ids)
        params = replace(
            self._params, max_new_tokens=min(self._params.max_new_tokens or room, room)
        )
        with self.ctrl_c.while_answering() if self.ctrl_c else NO_CTRL_C as stopped:
            answer = relay(self._llm.stream([ids], params), writer, stopped)
        if answer.text:
            self._conversation.add(text, answer.text)
        self._answers.append(answer)
        self._context_used = len(ids) + len(answer.token_ids)
        if self._json:
            print_json({"prompt": text, **answer.to_dict()})
        note(f"{answer.summary()} · context {self._context_used}/{self._about.max_seq_len}")
        if answer.finish_reason == "interrupted" and self.ctrl_c is None:
            raise KeyboardInterrupt

    def _stats(self) -> str:
        timings = [answer.timing for answer in self._answers if answer.timing is not None]
        later_tokens = sum(timing.n_tokens - 1 for timing in timings)
        later_s = sum(timing.e2e_s - timing.ttft_s for timing in timings)
        rows = {
            "model": self._config.model,
            "configuration": self._about.name,
            "device": f"{self._about.device_name}, {self._about.dtype}",
            "weights": f"{(self._about.weight_bytes or 0) / 1e6:,.0f} MB",
            "answers": str(len(self._answers)),
            "tokens": str(sum(len(answer.token_ids) for answer in self._answers)),
            "decode": f"{later_tokens / later_s:.1f} tok/s" if later_s else "-",
            "context": f"{self._context_used} of {self._about.max_seq_len} tokens",
        }
        if drafting := [a.speculation for a in self._answers if a.speculation is not None]:
            rows["speculation"] = speculation_summary(sum(drafting, Speculation()))
        return "\n".join(f"{name:14}{value}" for name, value in rows.items())


def parse_command(text: str) -> tuple[str, str] | None:
    """Returns a command and its argument; None if the line is a message."""
    name, *rest = text.split(maxsplit=1) or [""]
    if name not in _NAMES or (rest and name != "/system"):
        return None
    return name, rest[0].strip() if rest else ""


def message_of(text: str) -> str:
    """Returns the message in a turn: of ``//name``, one slash is removed.

    Notes on stderr if the turn looks like a misspelled command.
    """
    if re.match(r"\s*//\w", text):
        return text.replace("/", "", 1)
    if re.fullmatch(r"\s*/\w+\s*", text):
        nearest = difflib.get_close_matches(shorten(text.strip()), _NAMES, n=1, cutoff=0.75)
        if nearest:
            note(
                f"{text.strip()} is not a command, so it is sent as a message. "
                f"Did you mean {nearest[0]}?"
            )
    return text


def read_turns(
    read_line: ReadLine, on_interrupt: Callable[[], object] | None = None
) -> Iterator[str]:
    r"""Yields messages from lines, until the lines end.

    A line that ends in ``\`` continues in the next; lines between two lines of ``\"\"\"`` are one
    message.

    Args:
        read_line: Reads the next line.
        on_interrupt: Called after a KeyboardInterrupt, which drops the lines of an unfinished
            message; without it, the interrupt ends the program.
    """
    lines: list[str] = []
    quoted = False
    while True:
        try:
            line = read_line("… " if lines or quoted else "> ")
        except EOFError:
            break
        except KeyboardInterrupt:
            if on_interrupt is None:
                raise
            lines, quoted = [], False
            on_interrupt()
            continue
        if line.strip() == '"""':
            quoted = not quoted
        elif line.endswith("\\") and not quoted:
            lines.append(line[:-1])
            continue
        else:
            lines.append(line)
        if not quoted:
            yield "\n".join(lines)
            lines = []
    if lines:
        yield "\n".join(lines)
