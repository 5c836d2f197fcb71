"""Checks the fields of frozen dataclasses against their annotations.

A value is accepted unchanged, or refused with a one-line message that names the field, the value
and the allowed values: no number is rounded, and a boolean is not a number. Numbers of other
libraries (NumPy's, a tensor of one element) become Python's own, so that a value can be hashed,
compared and written as JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import operator
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from hotloop.errors import HotloopError, UnknownNameError, shorten_value

MAX_COUNT = 2**31 - 1
"""The largest count, size or token id."""


@dataclass(frozen=True)
class Range:
    """The range of a number, for ``Annotated``: in dataclasses here, and in pydantic's models.

    Attributes:
        least: The smallest number.
        most: The largest number.
        words: The range in words, if ``most`` is only a technical limit; None names both ends.
        open: ``least`` itself is excluded.
    """

    least: float
    most: float
    words: str | None = None
    open: bool = False

    __is_annotated_types_grouped_metadata__: ClassVar[Literal[True]] = True

    def __iter__(self) -> Iterator[Any]:
        """Yields the bounds as pydantic reads them."""
        from annotated_types import Ge, Gt, Le  # which comes with pydantic

        yield Gt(self.least) if self.open else Ge(self.least)
        yield Le(self.most)

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and not (self.open and value == self.least)

    def __str__(self) -> str:
        return self.words or f"between {self.least} and {self.most}"

    def requirement(self, value: float) -> str:
        """Describes the allowed numbers, for the error message about ``value``, which is not."""
        return f"at most {self.most}" if self.words and value > self.most else str(self)


Count = Annotated[int, Range(1, MAX_COUNT, "1 or more")]
"""A number of things, at least one."""

MAX_SEED = 2**63 - 1
"""The largest seed: torch and the kernels take an int64."""

Seed = Annotated[int, Range(0, MAX_SEED)]
"""A seed of random numbers."""


def check_fields(value: Any, error: type[HotloopError]) -> None:
    """Checks every field of a frozen dataclass, from its ``__post_init__``.

    Raises:
        HotloopError: ``error``, for the first field with an invalid value; UnknownNameError for a
            text that is not among a field's choices.
    """
    defaults = _defaults(type(value))
    for name, hint in _hints(type(value)).items():
        given = getattr(value, name)
        if given is defaults.get(name, _ABSENT):  # a fast path: most fields have their default
            continue
        try:
            converted = _converted(given, hint, name)
        except _Refused as refused:
            raise error(f"{name} must be {refused}, not {shorten_value(given)}.") from None
        if converted is not given:
            object.__setattr__(value, name, converted)


def range_of(of: type, name: str) -> Range:
    """Returns the range of a field of a dataclass, whether or not it can be None."""
    hint = _hints(of)[name]
    while get_origin(hint) is not None:
        hint, *extras = get_args(hint)
        for extra in extras:
            if isinstance(extra, Range):
                return extra
    raise AssertionError(f"the field {name} has no range")


T = TypeVar("T")


def replace_fields(value: T, options: Mapping[str, Any], kind: str) -> T:
    """Copies a frozen dataclass with some fields changed; without changes, returns it as it is.

    Args:
        value: The dataclass.
        options: The fields to change.
        kind: The word for a field in errors, such as ``sampling option``.

    Raises:
        UnknownNameError: There is no such field.
    """
    if not options:
        return value
    check_names(type(value), options, kind)
    return dataclasses.replace(cast(Any, value), **options)


def check_names(of: type, options: Mapping[str, Any], kind: str) -> None:
    """Raises UnknownNameError for the first option that is not a field of a dataclass."""
    names = list(_hints(of))
    for name in options:
        if name not in names:
            raise UnknownNameError(kind, name, names)


def integer(value: object) -> int | None:
    """Converts any library's integer to Python's; returns None for other values and booleans."""
    if type(value) is int:
        return value
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    if is_bool or getattr(value, "ndim", 0) > 0:
        return None
    try:
        return operator.index(cast(Any, value))
    except TypeError:
        return None


_ABSENT = object()


class _Refused(Exception):  # noqa: N818  (it never leaves this module)
    """A value is not allowed; the message describes allowed values."""


@functools.cache
def _hints(of: type) -> dict[str, Any]:
    hints = get_type_hints(of, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(of)}


@functools.cache
def _defaults(of: type) -> dict[str, Any]:
    return {
        field.name: field.default
        for field in dataclasses.fields(of)
        if field.default is not dataclasses.MISSING
    }


def _converted(value: object, hint: Any, name: str) -> Any:
    """Checks a value against a field's annotation, and returns it in the form that is stored.

    Raises:
        _Refused: The value is not allowed.
    """
    extra = None
    if get_origin(hint) is Annotated:
        hint, extra, *_ = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        hint, *none = get_args(hint)
        assert none == [type(None)], "a field takes one kind of value, and perhaps None"
        return None if value is None else _converted(value, hint, name)
    if get_origin(hint) is Literal:
        return _choice(value, get_args(hint), name)
    if hint == tuple[tuple[int, float], ...]:
        return _biases(value, extra)
    if get_origin(hint) is tuple:
        return _texts(value)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, cast(type, hint)):
            raise _Refused(f"a {cast(type, hint).__name__}")
        return value
    if hint is bool:
        if not isinstance(value, bool):
            raise _Refused("True or False")
        return value
    if hint is str:
        return _text(value)
    return _number(value, hint, extra)


def _number(value: object, kind: type, extra: object) -> float:
    assert isinstance(extra, Range), "a number's field has a range"
    if kind is int:
        number, a = integer(value), "a whole number"
    else:
        number, a = _real(value), "a number"
    if number is None:
        raise _Refused(f"{a}, {extra}")
    if number not in extra:
        raise _Refused(extra.requirement(number))
    return number


def _real(value: object) -> float | None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer that no float holds
        return math.inf if cast(int, value) > 0 else -math.inf


def _choice(value: object, choices: Sequence[str], name: str) -> str:
    if not isinstance(value, str):
        raise _Refused(f"one of {', '.join(sorted(choices))}")
    if value not in choices:
        raise UnknownNameError(name, value, choices)
    return value


def _text(value: object) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise _Refused("text")
    return value


MAX_BIASES = 1024
"""The most token ids of a mapping of token ids to numbers."""


def _biases(value: object, extra: object) -> tuple[tuple[int, float], ...]:
    """Returns a mapping of token ids to numbers, or a list of such pairs, as pairs."""
    assert isinstance(extra, Range), "a number's field has a range"
    must = f"a mapping of token ids to numbers {extra}, of at most {MAX_BIASES} ids"
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple) or len(pairs) > MAX_BIASES:
        raise _Refused(must)
    biases = {}
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise _Refused(must)
        key, number = pair
        token_id, bias = integer(key), _real(number)
        if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 10:
            token_id = int(key)  # a key of a JSON object
        if token_id is None or not 0 <= token_id <= MAX_COUNT or bias is None or bias not in extra:
            raise _Refused(must)
        biases[token_id] = bias
    return tuple(biases.items())


def _texts(value: object) -> tuple[str, ...]:
    """Returns one text, or a list of texts, as a tuple."""
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise _Refused("text, or a list of texts")
    if not all(value):
        raise _Refused("free of empty texts")
    return tuple(value)
