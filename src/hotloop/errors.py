"""Every error a user can meet.

Each says what is wrong, with which value, and what to do about it. All of them descend from
:class:`HotloopError`; the ones a caller can provoke with a bad argument are ``ValueError`` too.
Mistakes of our own are assertions, not these.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class HotloopError(Exception):
    """Base of every error that hotloop raises for its user.

    They can be pickled, whatever their constructors take: ranks report theirs to the caller. A
    message has at most ``MESSAGE_LIMIT`` characters, whatever it repeats of a value.
    """

    MESSAGE_LIMIT = 2_000

    def __str__(self) -> str:
        return shorten(super().__str__(), self.MESSAGE_LIMIT)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


class ConfigError(HotloopError, ValueError):
    """An option, recipe or model configuration holds a value that cannot be used."""


class UnknownNameError(ConfigError):
    """A name that is in none of the places where names of its kind are declared.

    Args:
        kind: What the name names, for the message (``"quantization scheme"``).
        name: The name as given.
        choices: The names that would have been accepted.
    """

    def __init__(self, kind: str, name: str, choices: Iterable[str]) -> None:
        self.kind, self.name, self.choices = kind, name, sorted(choices)
        guess = did_you_mean(name, self.choices)
        listed = ", ".join(self.choices) or "none are defined"
        super().__init__(f"unknown {kind} {shorten_value(name)}.{guess} Choose from: {listed}.")


class UnsupportedError(HotloopError, ValueError):
    """Well-formed, but not something this build or this machine can do."""


class RequestError(HotloopError, ValueError):
    """A prompt or a sampling option that the engine cannot serve."""


class NumericsError(HotloopError):
    """A step's logits are not finite, so that no next token can be chosen.

    Args:
        index: Which prompt of the call was to get the token.
        n_tokens: Tokens that its answer has before it.
        dtype: Element type of activations.
    """

    def __init__(self, index: int, n_tokens: int, dtype: str) -> None:
        self.index, self.n_tokens, self.dtype = index, n_tokens, dtype
        super().__init__(
            f"prompt {index}: after {n_tokens} tokens of its answer the model's logits are not "
            f"finite (NaN or infinity). Either its weights are damaged, or values overflow in "
            f"{dtype}: try another dtype (--dtype float32)."
        )


class CheckpointError(HotloopError, ValueError):
    """A checkpoint that is damaged or does not match its own description.

    Args:
        file: The file at fault.
        problem: What is wrong with it, and the fix where there is one.
        tensor: The tensor at fault, if one is.
    """

    def __init__(self, file: Path | str, problem: str, *, tensor: str | None = None) -> None:
        self.file, self.tensor = Path(file), tensor
        where = shorten(str(file))
        if tensor:
            where += f", tensor {shorten_value(tensor, 200)}"
        super().__init__(f"{where}: {problem}")


class ModelNotFoundError(HotloopError, ValueError):
    """A model name that is neither a local path, nor pulled, nor a built-in shape."""


class DownloadError(HotloopError):
    """A model could not be fetched, or what came was not what was asked for."""


class OutOfMemoryError(HotloopError):
    """The device has too little memory.

    Args:
        phase: What was being done (``"load"``, ``"warmup"``, ``"decode"``).
        needed_bytes: Bytes asked for, if known.
        free_bytes: Bytes that were free, if known.
    """

    def __init__(
        self, phase: str, needed_bytes: int | None = None, free_bytes: int | None = None
    ) -> None:
        self.phase, self.needed_bytes, self.free_bytes = phase, needed_bytes, free_bytes
        needed = f", needed {needed_bytes / 2**30:.2f} GiB" if needed_bytes is not None else ""
        free = f", free {free_bytes / 2**30:.2f} GiB" if free_bytes is not None else ""
        super().__init__(
            f"out of memory in {phase}{needed}{free}. Use a smaller quantization, a shorter "
            "max_seq_len or a smaller max_batch_size."
        )


class RankError(HotloopError):
    """A rank of a tensor-parallel group ended, or raised what is none of hotloop's errors.

    Args:
        rank: Which one.
        n_ranks: Of how many.
        problem: How it ended: its exception, its exit code or the signal that killed it.
        log: The last lines that it wrote to stderr.
    """

    MESSAGE_LIMIT = 20_000  # the log is the part that helps

    def __init__(self, rank: int, n_ranks: int, problem: str, log: str = "") -> None:
        self.rank, self.n_ranks, self.problem, self.log = rank, n_ranks, problem, log
        told = f". It wrote last:\n{log}" if log else ""
        super().__init__(f"rank {rank} of {n_ranks} {problem}{told}")


def did_you_mean(name: str, choices: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Suggests the nearest of some names, as the end of a message; empty if none is near."""
    nearest = difflib.get_close_matches(shorten(name), list(choices), n=1, cutoff=cutoff)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def shorten(text: str, limit: int = 300) -> str:
    """``text`` for a message: of a long one both ends, ``limit`` characters in all."""
    if len(text) <= limit:
        return text
    kept = limit - 1
    return f"{text[: kept - kept // 3]}…{text[-(kept // 3) :]}"


def shorten_value(value: object, limit: int = 80) -> str:
    """The repr of a value from outside, in at most ``limit`` characters.

    Only as much of the value is looked at as is shown: a text of a gigabyte, or lists that contain
    each other over and over, cost nothing.
    """
    if isinstance(value, str) and len(value) > limit:
        value = shorten(value, limit)
    return shorten(_REPR.repr(value), limit)


class _Repr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = 10_000  # shortened before or after

    def repr_bytes(self, x: bytes | bytearray, _level: int) -> str:
        if len(x) > self.maxother:
            half = self.maxother // 2
            x = x[:half] + x[-half:]
        return repr(x)

    repr_bytearray = repr_bytes

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 128:
            return f"an integer of {x.bit_length()} bits"
        return super().repr_int(x, level)


_REPR = _Repr()


def _rebuild(
    kind: type[HotloopError], args: tuple[Any, ...], fields: dict[str, Any]
) -> HotloopError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(fields)
    return error
