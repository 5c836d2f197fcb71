"""Shows an answer while it is generated, and then summarizes it in a line or a JSON object.

On a terminal, the current decode speed is shown at the right edge of the line that is being
written, and is erased before the text reaches it. Elsewhere the text is written unchanged.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, TextIO, cast

from hotloop.printable import printable
from hotloop.types import Delta, FinishReason, Generation, Speculation, Timing

_END_LABELS = {
    "stop": "ended at a stop string",
    "length": "ended at the token limit",
    "interrupted": "ended by Ctrl-C",
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer that has ended or was stopped.

    Attributes:
        text: The text that was shown.
        token_ids: The tokens that arrived.
        finish_reason: Why it ended; ``interrupted`` is Ctrl-C.
        timing: The engine's times; for a stopped answer, times measured here. None if no token
            arrived.
        generation: The engine's ``Generation`` of a finished answer.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | Literal["interrupted"]
    timing: Timing | None
    generation: Generation | None

    def summary(self) -> str:
        """Formats one line of figures, each with its name."""
        parts = [f"{len(self.token_ids)} tokens"]
        if self.generation is not None and self.generation.cached_tokens:
            n, n_prompt = self.generation.cached_tokens, len(self.generation.prompt_ids)
            parts.append(f"{n} of {n_prompt} prompt tokens cached")
        if self.timing is not None:
            parts.append(f"TTFT {self.timing.ttft_s:.3f} s")
            if math.isfinite(self.timing.decode_tok_s):
                parts.append(f"decode {self.timing.decode_tok_s:.1f} tok/s")
        if self.speculation is not None:
            parts.append(speculation_summary(self.speculation))
        if self.finish_reason != "eos":
            parts.append(_END_LABELS[self.finish_reason])
        return " · ".join(parts)

    @property
    def speculation(self) -> Speculation | None:
        """Drafting statistics of a finished answer; None without drafts or without any step."""
        if self.generation is None or self.generation.speculation is None:
            return None
        return self.generation.speculation if self.generation.speculation.n_steps else None

    def to_dict(self) -> dict[str, Any]:
        """Returns all figures as JSON values."""
        found: dict[str, Any] = {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "token_ids": self.token_ids,
            "n_tokens": len(self.token_ids),
        }
        if self.timing is not None:
            figures = ("ttft_s", "tpot_s", "e2e_s", "decode_tok_s", "e2e_tok_s")
            found |= {name: getattr(self.timing, name) for name in figures}
        if self.generation is not None:
            found["n_prompt_tokens"] = len(self.generation.prompt_ids)
            found["cached_tokens"] = self.generation.cached_tokens
            if self.generation.logprobs is not None:
                found["logprobs"] = [asdict(logprob) for logprob in self.generation.logprobs]
        if self.speculation is not None:
            found["speculation"] = asdict(self.speculation)
        return found


def speculation_summary(seen: Speculation) -> str:
    """Summarizes drafting: tokens per step, and the acceptance rate at the first draft position."""
    shown = f"{seen.tokens_per_step:.2f} tokens/step"
    return f"{shown}, acceptance {seen.acceptance[0]:.0%}" if seen.acceptance else shown


class Writer(Protocol):
    """A destination of streamed text."""

    def write(self, text: str, figure: str, /) -> None:
        """Adds ``text``; ``figure`` may be shown beside it until the next call."""
        ...

    def end(self) -> None:
        """Ends the last line."""
        ...


class PlainWriter:
    """Passes text on: unchanged to a file or a pipe, printable to a simple terminal."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._shown = _on_screen if out.isatty() else str
        self._open_line = True

    def write(self, text: str, _figure: str, /) -> None:
        """Writes ``text``; there is no place for a figure."""
        self._out.write(self._shown(text))
        self._out.flush()
        if text:
            self._open_line = not text.endswith("\n")

    def end(self) -> None:
        """Writes a newline unless the text ended with one."""
        if self._open_line:
            self._out.write("\n")
            self._out.flush()


class TerminalWriter:
    """Writes text to a terminal, with a figure at the right edge of the current line.

    Control characters in a model's text are escaped, so that it cannot move the cursor.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._column = 0
        self._width = 0
        self._figure_shown = self._resized = False

    def write(self, text: str, figure: str, /) -> None:
        """Writes ``text``, then ``figure`` if the line has room for it."""
        from rich.cells import cell_len

        text = _on_screen(text).expandtabs(4)
        width = shutil.get_terminal_size().columns
        head, newline, tail = text.rpartition("\n")
        # Terminals differ in where the cursor is after a resize, until the next line begins.
        self._resized = not newline and (self._resized or width != self._width != 0)
        self._width = width
        column = (0 if newline else self._column) + cell_len(tail)
        # A full line leaves the cursor on its last column, not on the next line's first.
        self._column = (column - 1) % width + 1 if column else 0
        # To the end of the screen: a narrower terminal has moved the figure to another line.
        wipe = "\033[J" if self._figure_shown else ""
        fits = self._column + len(figure) + 2 <= width
        self._figure_shown = bool(figure) and fits and not self._resized
        shown = ""
        if self._figure_shown:
            # Save the cursor, move to the right edge, write, restore the cursor.
            shown = f"\0337\033[{width - len(figure) + 1}G\033[2m{figure}\033[22m\0338"
        self._out.write(f"{wipe}{head}{newline}{tail}{shown}")
        self._out.flush()

    def end(self) -> None:
        """Wipes the figure, and ends the line unless the text has ended it."""
        self.write("\n" if self._column else "", "")


def _on_screen(text: str) -> str:
    """Escapes generated text for a terminal, without carriage returns."""
    return printable(text.replace("\r", ""))


def writer_for(out: TextIO) -> Writer:
    """Returns the writer for ``out``."""
    terminal = out.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return TerminalWriter(out) if terminal else PlainWriter(out)


class _Silent:
    def write(self, _text: str, _figure: str, /) -> None:
        """Writes nothing."""

    def end(self) -> None:
        """Ends nothing."""


SILENT: Writer = _Silent()
"""The writer of answers that are printed as a whole: it writes nothing."""


def relay(
    deltas: Iterator[Delta],
    writer: Writer,
    stopped: Callable[[], bool] = lambda: False,
    *,
    start: str = "",
) -> Answer:
    """Shows one answer while it arrives.

    Args:
        deltas: The pieces of the answer to one prompt; closed at the end, which cancels the rest.
        writer: Receives its text.
        stopped: Called after every piece; returns whether to stop. KeyboardInterrupt stops too.
        start: The beginning of the answer in the prompt, which is shown before the first piece.
    """
    start_s = time.perf_counter()
    first_s = last_s = 0.0
    pieces: list[str] = []
    token_ids: list[int] = []
    generation: Generation | None = None
    n_first = 0
    try:
        with closing(cast("Generator[Delta]", deltas)):
            for delta in deltas:
                last_s = time.perf_counter() - start_s
                token_ids += delta.token_ids
                pieces.append(delta.text)
                generation = delta.generation
                if not n_first and token_ids:
                    n_first, first_s = len(token_ids), last_s
                n_later = len(token_ids) - n_first
                figure = ""
                if n_later and last_s > first_s:
                    figure = f"decode {n_later / (last_s - first_s):.1f} tok/s"
                writer.write(start + delta.text, figure)
                start = ""
                if stopped():
                    break
    except KeyboardInterrupt:
        pass
    except BaseException:
        if any(pieces):  # the error begins a line of its own
            writer.end()
        raise
    writer.end()
    timing = None
    if token_ids:
        timing = Timing(n_tokens=len(token_ids), ttft_s=first_s, e2e_s=last_s)
    return Answer(
        text="".join(pieces),
        token_ids=tuple(token_ids),
        finish_reason=generation.finish_reason if generation else "interrupted",
        timing=generation.timing if generation else timing,
        generation=generation,
    )
