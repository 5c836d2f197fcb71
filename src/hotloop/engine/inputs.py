"""Checks prompts and windows, and converts them to lists of token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from hotloop.checked import integer
from hotloop.errors import RequestError, shorten_value
from hotloop.types import ChatPrompt, Prompt


def as_prompts(prompts: str | ChatPrompt | Sequence[Prompt]) -> list[Prompt]:
    """Returns the prompts of one call as a list.

    Raises:
        RequestError: The argument is neither a prompt nor a list of prompts, or it is itself a list
            of token ids.
    """
    if isinstance(prompts, str | ChatPrompt):
        return [prompts]
    n = n_items(prompts, "prompts must be text, or a list of texts and lists of token ids")
    if n and integer(prompts[0]) is not None:
        raise RequestError(
            f"prompts {shorten_value(prompts)} is one list of token ids, but must be a list of "
            "prompts: put it into another list, as in [[5, 6, 7]]."
        )
    return list(prompts)


def n_items(value: Any, requirement: str) -> int:
    """Counts the items of a list or another sequence.

    Args:
        value: The list.
        requirement: The beginning of the error message: the argument and the type it must have.

    Raises:
        RequestError: The value is not a sequence.
    """
    unordered = isinstance(value, str | bytes | bytearray | memoryview | Mapping | AbstractSet)
    if not unordered and hasattr(value, "__getitem__"):
        try:
            return len(value)
        except TypeError:  # a tensor without dimensions
            pass
    raise RequestError(f"{requirement}, not {shorten_value(value)}.")


def as_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    """Converts token ids to Python integers, and checks them against the vocabulary.

    Raises:
        RequestError: An id is not an integer, or is outside the vocabulary.
    """
    # The usual list of integers in range is checked without a loop: it may have many thousands.
    if (
        type(ids) is list
        and set(map(type, ids)) == {int}
        and 0 <= min(ids) <= max(ids) < vocab_size
    ):
        return ids.copy()
    found = []
    for given in ids:
        i = integer(given)
        if i is None:
            raise RequestError(
                f"a token id must be a whole number from 0 to {vocab_size - 1}, not "
                f"{shorten_value(given)}."
            )
        if not 0 <= i < vocab_size:
            raise RequestError(
                f"token id {shorten_value(i)} is outside the vocabulary: ids are 0 to "
                f"{vocab_size - 1}."
            )
        found.append(i)
    return found
