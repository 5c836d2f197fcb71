"""The errors that hotloop raises for its users.

Each message names the problem, the value and the fix. All derive from :class:`HotloopError`; those
that a caller can cause by a bad argument are ``ValueError`` too. Bugs of hotloop are assertions.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class HotloopError(Exception):
    """Base of every error that hotloop raises for its user.

    Errors can be pickled, whatever the arguments of their constructors, since ranks report errors
    to the caller. A message has at most ``MESSAGE_LIMIT`` characters, however long the values in it
    are.
    """

    MESSAGE_LIMIT = 2_000

    def __str__(self) -> str:
        return shorten(super().__str__(), self.MESSAGE_LIMIT)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


class ConfigError(HotloopError, ValueError):
    """An option, recipe or model configuration holds a value that cannot be used."""


class UnknownNameError(ConfigError):
    """A name that is not among the known names of its kind.

    Args:
        kind: The kind of name, for the message (``"quantization scheme"``).
        name: The name as given.
        choices: The known names.
        hint: A sentence that follows them.
    """

    def __init__(self, kind: str, name: str, choices: Iterable[str], hint: str = "") -> None:
        self.kind, self.name, self.choices = kind, name, sorted(choices)
        guess = did_you_mean(name, self.choices)
        listed = ", ".join(self.choices) or "none are defined"
        problem = f"unknown {kind} {shorten_value(name)}.{guess} Choose from: {listed}."
        super().__init__(f"{problem} {hint}".rstrip())


class UnsupportedError(HotloopError, ValueError):
    """A valid request that this build or this machine does not support."""


class RequestError(HotloopError, ValueError):
    """A prompt or a sampling option that the engine cannot serve."""


class ContextLengthError(RequestError):
    """A prompt, or a prompt and its answer, exceeds the context.

    Args:
        problem: The problem, and the fix.
        context: Tokens that the context holds.
    """

    def __init__(self, problem: str, context: int) -> None:
        self.context = context
        super().__init__(problem)


class QueueFullError(HotloopError):
    """Too many requests are waiting.

    Args:
        limit: The most that may wait.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"the queue is full: {limit} requests are waiting. Try again later.")


class SlowClientError(HotloopError):
    """A client read its answer too slowly, and was cancelled.

    Args:
        limit: The most bytes of the answer that a client may leave unread.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(
            f"the client left more than {limit} bytes of its answer unread, so the answer was "
            "cancelled."
        )


class ServiceClosedError(HotloopError):
    """A request to a service that has been closed, or is draining."""

    def __init__(self) -> None:
        super().__init__("the service is closing and takes no more requests.")


class NumericsError(HotloopError):
    """A step's logits are not finite, so no next token can be chosen.

    Args:
        index: Index of the answer, see :class:`~hotloop.types.Delta`.
        n_tokens: Its tokens before the failure.
        dtype: Element type of activations.
    """

    def __init__(self, index: int, n_tokens: int, dtype: str) -> None:
        self.index, self.n_tokens, self.dtype = index, n_tokens, dtype
        super().__init__(
            f"answer {index}: after {n_tokens} tokens the model's logits are not "
            f"finite (NaN or infinity). Either its weights are damaged, or values overflow in "
            f"{dtype}: try another dtype (--dtype float32)."
        )


class GrammarError(HotloopError):
    """A grammar became too costly in the middle of an answer, which ended the answer.

    Args:
        index: Index of the answer, see :class:`~hotloop.types.Delta`.
        n_tokens: Its tokens before the failure.
        problem: The limit that was exceeded.
    """

    def __init__(self, index: int, n_tokens: int, problem: str) -> None:
        self.index, self.n_tokens, self.problem = index, n_tokens, problem
        super().__init__(
            f"answer {index}: after {n_tokens} tokens the grammar is too costly: {problem}"
        )


class CheckpointError(HotloopError, ValueError):
    """A checkpoint that is damaged or does not match its own description.

    Args:
        file: The file at fault.
        problem: The problem, and the fix if there is one.
        tensor: The tensor at fault, if there is one.
    """

    def __init__(self, file: Path | str, problem: str, *, tensor: str | None = None) -> None:
        self.file, self.tensor = Path(file), tensor
        where = shorten(str(file))
        if tensor:
            where += f", tensor {shorten_value(tensor, 200)}"
        super().__init__(f"{where}: {problem}")


class PackingError(HotloopError):
    """A packed weight differs from the weight from which it was packed.

    Args:
        tensor: The weight, by the names of its tensors in a checkpoint.
        kernel: The kernel whose packing is at fault.
        number_format: The weight's number format, in words.
    """

    def __init__(self, tensor: str, kernel: str, number_format: str) -> None:
        self.tensor, self.kernel, self.number_format = tensor, kernel, number_format
        super().__init__(
            f"{shorten(tensor)}: packing the weight ({number_format}) for the kernel {kernel} "
            "changed its values. The weight was not used. This is a bug of hotloop, and the "
            "checkpoint is not damaged: please report it with this message."
        )


class ModelNotFoundError(HotloopError, ValueError):
    """A model name that is neither a local path, nor pulled, nor a built-in shape."""


class DownloadError(HotloopError):
    """A model could not be fetched, or the fetched file is not the expected one."""


class OutOfMemoryError(HotloopError):
    """The device has too little memory.

    Args:
        phase: The phase (``"load"``, ``"warmup"``, ``"decode"``).
        needed_bytes: Bytes of the failed allocation, if known.
        free_bytes: Bytes that were free, if known.
    """

    def __init__(
        self, phase: str, needed_bytes: int | None = None, free_bytes: int | None = None
    ) -> None:
        self.phase, self.needed_bytes, self.free_bytes = phase, needed_bytes, free_bytes
        needed = f", needed {needed_bytes / 2**30:.2f} GiB" if needed_bytes is not None else ""
        free = f", free {free_bytes / 2**30:.2f} GiB" if free_bytes is not None else ""
        super().__init__(
            f"out of memory in {phase}{needed}{free}. Use a quantization with fewer bits, a "
            "shorter max_seq_len or a smaller max_batch_size."
        )


class RankError(HotloopError):
    """A rank of a tensor-parallel group ended, or raised an error that is not hotloop's.

    Args:
        rank: The rank.
        n_ranks: The number of ranks.
        problem: How it ended: its exception, its exit code or the signal that killed it.
        log: The last lines that it wrote to stderr.
    """

    MESSAGE_LIMIT = 20_000  # so that the log fits

    def __init__(self, rank: int, n_ranks: int, problem: str, log: str = "") -> None:
        self.rank, self.n_ranks, self.problem, self.log = rank, n_ranks, problem, log
        log_lines = f". It wrote last:\n{log}" if log else ""
        super().__init__(f"rank {rank} of {n_ranks} {problem}{log_lines}")


def did_you_mean(name: str, choices: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Suggests the nearest of some names, as the end of a message; empty if none is near."""
    nearest = difflib.get_close_matches(shorten(name), list(choices), n=1, cutoff=cutoff)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def shorten(text: str, limit: int = 300) -> str:
    """Shortens ``text`` to its beginning and end, at most ``limit`` characters."""
    if len(text) <= limit:
        return text
    kept = limit - 1
    return f"{text[: kept - kept // 3]}…{text[-(kept // 3) :]}"


def shorten_value(value: object, limit: int = 80) -> str:
    """Returns the repr of a value from outside, in at most ``limit`` characters.

    Only the shown part is read, so a text of a gigabyte or deeply nested lists take no time.
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
