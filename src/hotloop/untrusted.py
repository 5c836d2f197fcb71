"""Reads and validates files that hotloop did not write.

There are three steps. Each fails with a one-line message that names the file. A file must be a
regular file of limited size (:func:`read_bytes`, :func:`read_text`), contain JSON of limited depth
(:func:`read_json`, :func:`parse_json`), and match a :class:`StrictModel` (:func:`validated`). Raw
dicts are not passed on.

The caller chooses the class of errors: ``CheckpointError`` for files of a model,
:func:`config_error` for files of a user, such as a recipe.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hotloop.checked import MAX_COUNT
from hotloop.errors import (
    CheckpointError,
    ConfigError,
    HotloopError,
    did_you_mean,
    shorten,
    shorten_value,
)

DEFAULT_LIMIT_BYTES = 16 * 2**20
"""The default size limit of :func:`read_bytes`: the largest configurations and indexes in use have
less than a megabyte."""

MAX_DEPTH = 64
"""The most levels of nested lists and objects in JSON."""

MAX_NUMBER_CHARS = 400
"""The most characters of a number in JSON. Python has a limit of its own, 4,300 digits."""

Refuse = Callable[[Path | str, str], HotloopError]
"""Makes the error to raise, from a file and its problem: ``CheckpointError``, ``config_error``."""


def config_error(file: Path | str, problem: str) -> ConfigError:
    """Makes the error for a file of the user: a recipe, a template, a text."""
    return ConfigError(f"{shorten(str(file))}: {problem}")


TEXT_CONFIG = "text_config"
"""The key of ``config.json`` under which some writers nest the keys of the language model."""

_WRAPPER_KEYS = frozenset({"architectures", "model_type", "transformers_version"})
"""Keys that may have one value in ``text_config`` and another around it."""


def unnest(config: Mapping[str, Any], file: Path | str) -> dict[str, Any]:
    """Joins the keys of ``text_config`` with those around it, which name the architecture.

    Args:
        config: The keys of a ``config.json``.
        file: Their file, for errors.

    Raises:
        ConfigError: A key has one value in ``text_config``, and another around it.
    """
    nested = config.get(TEXT_CONFIG)
    if not isinstance(nested, dict):
        return dict(config)
    around = {
        key: value
        for key, value in config.items()
        if key != TEXT_CONFIG and not (value is None and key in nested)
    }
    for key in sorted(nested.keys() & around.keys() - _WRAPPER_KEYS):
        if nested[key] not in (None, around[key]) and not key.startswith("_"):
            raise config_error(
                file,
                f"{key} is {shorten_value(around[key])}, but {shorten_value(nested[key])} in "
                f"{TEXT_CONFIG}: remove the one that is wrong",
            )
    return nested | around


def file_kind(path: Path, *, refuse: Refuse = CheckpointError) -> Literal["file", "folder"]:
    """Tells regular files from folders, and follows symbolic links.

    Raises:
        HotloopError: It does not exist, cannot be reached, or is a pipe, a socket or a device.
    """
    with _system_errors(path, refuse):
        return _kind(path.stat(), path, refuse)


def open_file(path: Path, *, refuse: Refuse = CheckpointError) -> BufferedReader:
    """Opens a regular file for reading; never blocks, whatever ``path`` is.

    Raises:
        HotloopError: It cannot be opened, is not a regular file, or is a pointer to a file that
            git-lfs has not fetched.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC)

    with contextlib.ExitStack() as opened, _system_errors(path, refuse):
        _require_file(path.stat(), path, refuse)
        file = opened.enter_context(open(path, "rb", opener=opener))
        _require_file(os.fstat(file.fileno()), path, refuse)
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise refuse(
                path,
                "is a git-lfs pointer and not the file itself: run `git lfs pull` in its folder, "
                "or download the file again",
            )
        file.seek(0)
        opened.pop_all()
        return file


def read_bytes(
    path: Path, *, limit: int = DEFAULT_LIMIT_BYTES, refuse: Refuse = CheckpointError
) -> bytes:
    """Reads a regular file of at most ``limit`` bytes.

    Raises:
        HotloopError: It cannot be read, is not a regular file, or is larger.
    """
    with open_file(path, refuse=refuse) as file, _system_errors(path, refuse):
        data = file.read(limit + 1)
    if len(data) > limit:
        raise refuse(path, f"has more than {limit:,} bytes, too many for what it should hold")
    return data


def read_text(
    path: Path, *, limit: int = DEFAULT_LIMIT_BYTES, refuse: Refuse = CheckpointError
) -> str:
    """Reads a UTF-8 file of at most ``limit`` bytes.

    Raises:
        HotloopError: As for :func:`read_bytes`, or the file is not UTF-8.
    """
    return decode(read_bytes(path, limit=limit, refuse=refuse), path, refuse)


def read_json(
    path: Path, *, limit: int = DEFAULT_LIMIT_BYTES, refuse: Refuse = CheckpointError
) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
        HotloopError: As for :func:`read_text` and :func:`parse_json`.
    """
    return parse_json(read_bytes(path, limit=limit, refuse=refuse), path, refuse=refuse)


def parse_json(
    data: bytes | str, file: Path | str, *, refuse: Refuse = CheckpointError
) -> dict[str, Any]:
    """Parses one JSON object, within limits on its depth and on its numbers.

    Args:
        data: UTF-8, with or without a byte order mark.
        file: Its file, or a line of it, for errors.
        refuse: Makes the error.

    Raises:
        HotloopError: It is not JSON or not an object, has a key twice, a number that is infinite,
            NaN or too long, more than ``MAX_DEPTH`` levels, or half a surrogate pair in a string.
    """

    def integer(digits: str) -> int:
        return int(_bounded(digits))

    def decimal(digits: str) -> float:
        value = float(_bounded(digits))
        if not math.isfinite(value):
            raise _JsonProblem(f"the number {digits} is too large")
        return value

    text = data if isinstance(data, str) else decode(data, file, refuse)
    try:
        value = json.loads(
            text.removeprefix("\ufeff"),
            object_pairs_hook=_object,
            parse_int=integer,
            parse_float=decimal,
            parse_constant=_no_constant,
        )
    except json.JSONDecodeError as error:
        raise refuse(file, f"is not valid JSON: {error}") from error
    except _JsonProblem as problem:
        raise refuse(file, f"is not valid JSON: {problem}") from problem
    except RecursionError:
        raise refuse(file, f"is nested more than {MAX_DEPTH} levels deep") from None
    if not isinstance(value, dict):
        raise refuse(file, f"holds {_kind_of_json(value)}, not a JSON object")
    if is_deeper(value, MAX_DEPTH):
        raise refuse(file, f"is nested more than {MAX_DEPTH} levels deep")
    if _SURROGATE.search(text) and not _is_encodable(value):
        raise refuse(file, "holds an unpaired surrogate, which is not text")
    return value


TokenId = Annotated[int, Field(ge=0, le=MAX_COUNT)]
"""The id of a token."""


class StrictModel(BaseModel):
    """Base of models of values from outside: unknown keys fail, and types are not converted.

    Booleans, texts, NaN and infinity are not numbers. Integers still need bounds of their own:
    :data:`~hotloop.checked.Count`, :data:`TokenId`, or ``Field(ge=..., le=...)``.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )


M = TypeVar("M", bound=BaseModel)

Place = tuple[int | str, ...]
"""The place of a value in JSON: the keys and indexes that lead to it (pydantic's ``loc``)."""


def validated(
    model: type[M],
    value: object,
    file: Path | str,
    *,
    prefix: str = "",
    refuse: Refuse = CheckpointError,
    name: Callable[[Place], str] | None = None,
) -> M:
    """Checks a value against a pydantic model.

    Args:
        model: The model that the value must match; its aliases are the keys of the file.
        value: The content of the file.
        file: The file, for errors.
        prefix: The prefix of every key in the file.
        refuse: Makes the error.
        name: Formats a place for errors; None joins its keys and indexes.

    Raises:
        HotloopError: One line with the file and the first problems: key, value, and what is valid.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise refuse(file, joined(problems(error, model, prefix, name))) from error


def problems(
    error: ValidationError,
    model: type[BaseModel] | None = None,
    prefix: str = "",
    name: Callable[[Place], str] | None = None,
) -> list[str]:
    """Describes each of pydantic's errors: the key, the value, and what is valid.

    Args:
        error: The exception of ``model_validate``.
        model: The model, whose keys are named.
        prefix: The prefix of every key in the file.
        name: Formats a place; None joins its keys and indexes.
    """
    found: dict[object, list[Any]] = {}
    for one in error.errors(include_url=False):
        is_unknown = one["type"] == "extra_forbidden"
        found.setdefault((one["loc"][:-1], "unknown") if is_unknown else one["loc"], []).append(one)
    return [_problem(alike, model, prefix, name) for alike in found.values()]


def joined(found: list[str], most: int = 3) -> str:
    """Joins the first problems in one line, with the number of further problems."""
    rest = f" (and {len(found) - most} more)" if len(found) > most else ""
    return "; ".join(found[:most]) + rest


def _problem(
    alike: list[Any],
    model: type[BaseModel] | None,
    prefix: str,
    name: Callable[[Place], str] | None,
) -> str:
    """Describes the errors of one place, or the unknown keys of one object."""
    if len(alike) > 1 and alike[0]["type"] == "extra_forbidden":
        keys = ", ".join(_place(error["loc"], prefix, name) for error in alike[:_MAX_KEYS])
        rest = f" and {len(alike) - _MAX_KEYS} more" if len(alike) > _MAX_KEYS else ""
        choices = _fields_at(model, alike[0]["loc"][:-1])
        return f"{keys}{rest}: there are no such keys.{_choices(choices)}"
    loc, problem = alike[0]["loc"], _describe(alike[0], model)
    return f"{_place(loc, prefix, name)}: {problem}" if loc else problem


_MAX_KEYS = 5


def _place(loc: Place, prefix: str, name: Callable[[Place], str] | None) -> str:
    if name is not None and loc:
        return name(loc)
    place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc)
    return shorten(prefix + place.removeprefix("."), 120)


def _describe(error: Any, model: type[BaseModel] | None) -> str:
    """Describes an invalid value, and the valid ones."""
    kind, loc, value = error["type"], error["loc"], shorten_value(error["input"])
    if kind == "extra_forbidden":
        return f"there is no such key.{_nearest(loc[-1], _fields_at(model, loc[:-1]))}"
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind == "literal_error":
        choices = get_args(_declared_at(model, loc))
        return f"{value} is not a choice.{_nearest(error['input'], choices)}"
    if kind in _BOUNDS:
        limit, words = _BOUNDS[kind]
        bound = error["ctx"][limit]
        shown = f"{bound:g}" if isinstance(bound, float) else f"{bound}"
        return f"must be {words.format(shown)}, not {value}"
    rule = _RULES.get(kind) or re.sub(r"^(Input|String|Value) should", "must", error["msg"])
    return f"{rule}, not {value}"


_BOUNDS = {
    "greater_than_equal": ("ge", "{} or more"),
    "greater_than": ("gt", "above {}"),
    "less_than_equal": ("le", "at most {}"),
    "less_than": ("lt", "below {}"),
}

_RULES = {
    "model_type": "must be an object",
    "dict_type": "must be an object",
    "too_short": "must have at least one value",
    "float_type": "must be a number",
    "int_type": "must be an integer",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
}


def _nearest(word: object, choices: Iterable[object]) -> str:
    names = [str(choice) for choice in choices]
    guess = did_you_mean(word if isinstance(word, str) else shorten_value(word), names)
    return guess + _choices(names)


def _choices(names: list[str]) -> str:
    return f" Choose from: {', '.join(names)}." if names else ""


def _fields_at(model: type[BaseModel] | None, loc: tuple[int | str, ...]) -> list[str]:
    here = _declared_at(model, loc)
    if not (isinstance(here, type) and issubclass(here, BaseModel)):
        return []
    return [field.alias or name for name, field in here.model_fields.items()]


def _declared_at(model: Any, loc: tuple[int | str, ...]) -> Any:
    """Returns the type that a model declares at a place; None if that is unclear."""
    here = model
    for part in loc:
        if isinstance(part, int):
            here = next(iter(get_args(here)), None)
        elif isinstance(here, type) and issubclass(here, BaseModel):
            by_key = {field.alias or name: field for name, field in here.model_fields.items()}
            here = by_key[part].annotation if part in by_key else None
        else:
            return None
        while get_origin(here) in (Annotated, Union, types.UnionType):
            here = get_args(here)[0]
    return here


class _JsonProblem(Exception):  # noqa: N818  (it never leaves this module)
    """JSON that is valid, but not allowed in files here."""


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _JsonProblem(f"the key {shorten_value(key)} appears twice")
            seen.add(key)
    return value


def _bounded(digits: str) -> str:
    if len(digits) > MAX_NUMBER_CHARS:
        raise _JsonProblem(f"a number has {len(digits)} digits: {shorten(digits, 40)}")
    return digits


def _no_constant(name: str) -> float:
    raise _JsonProblem(f"{name} is not a number")


def is_deeper(value: Any, depth: int) -> bool:
    """Returns whether lists and objects of a JSON value are nested more than ``depth`` levels."""
    level = [value]
    for _ in range(depth):
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def _is_encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind_of_json(value: Any) -> str:
    match value:
        case list():
            return "a list"
        case str():
            return "text"
        case None:
            return "null"
        case _:
            return shorten_value(value)


def decode(data: bytes, file: Path | str, refuse: Refuse) -> str:
    """Decodes UTF-8.

    Raises:
        HotloopError: The bytes are not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        bad = data[error.start : error.start + 1].hex()
        raise refuse(
            file,
            f"is not UTF-8 text: byte {error.start} is 0x{bad}. Convert it, for example with iconv",
        ) from error


@contextlib.contextmanager
def _system_errors(path: Path, refuse: Refuse) -> Iterator[None]:
    try:
        yield
    except HotloopError:  # which can be a ValueError too
        raise
    except FileNotFoundError as error:
        raise refuse(path, "there is no such file or folder") from error
    except OSError as error:
        raise refuse(path, f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a null character or a lone surrogate in its name
        raise refuse(path, f"is not a file name: {error}") from error


def _require_file(found: os.stat_result, path: Path, refuse: Refuse) -> None:
    if _kind(found, path, refuse) == "folder":
        raise refuse(path, "is a folder, not a file")


def _kind(found: os.stat_result, path: Path, refuse: Refuse) -> Literal["file", "folder"]:
    if stat.S_ISREG(found.st_mode):
        return "file"
    if stat.S_ISDIR(found.st_mode):
        return "folder"
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(found.st_mode), "a device")
    raise refuse(path, f"is {kind}, not a file")
