r"""Tasks from local files: one JSON object per line, in one of three forms.

    {"query": "Question: ...", "choices": ["...", "..."], "gold": 0}
        Multiple choice: right if the choice ``gold``, counted from 0, is the likeliest one after
        the query.
    {"context_options": ["...", "..."], "continuation": "...", "gold": 1}
        Choice of context: right if the continuation is likeliest after the context ``gold``.
    {"context": "...", "continuation": "..."}
        Cloze: right if every token of the continuation is the most likely one after the context.

``delimiter`` joins the two texts: a space by default, and ``"\nAnswer: "`` after a query. All items
of a file have one form. A repeated item counts once, since its answers are not independent.
Likelihoods are sums over tokens, not divided by a length.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from hotloop.errors import ConfigError
from hotloop.evaluate.likelihood import Likelihood, TextEncoder, score_windows
from hotloop.evaluate.tasks import OnItem
from hotloop.types import Engine
from hotloop.untrusted import StrictModel, config_error, parse_json, read_text, validated

MAX_FILE_BYTES = 2**28

Text = Annotated[str, Field(min_length=1)]
Options = Annotated[tuple[Text, ...], Field(strict=False, min_length=2, max_length=1000)]
Index = Annotated[int, Field(ge=0)]


class Item(StrictModel):
    """An item of any form."""

    delimiter: str = " "

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The contexts and continuations to score."""
        raise NotImplementedError

    @property
    def chance(self) -> float:
        """The chance of guessing right."""
        return 1 / len(self.pairs)

    def is_right(self, scores: Sequence[Likelihood]) -> bool:
        """Returns whether the answer is right, given the scores of ``pairs``."""
        raise NotImplementedError


class _OptionItem(Item):
    """An item with several options, of which ``gold`` is the right one."""

    gold: Index

    @model_validator(mode="after")
    def _gold_is_there(self) -> Self:
        if self.gold >= (n := len(self.pairs)):
            raise ValueError(f"gold must be 0 to {n - 1}, the index of an option, not {self.gold}")
        return self

    def is_right(self, scores: Sequence[Likelihood]) -> bool:
        """Returns whether ``gold`` is the most likely option, the first one if several are."""
        best = max(range(len(scores)), key=lambda i: scores[i].logprob)
        return best == self.gold


class Choice(_OptionItem):
    """A multiple-choice item: one query and several answers."""

    query: Text
    choices: Options
    delimiter: str = "\nAnswer: "

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The query before each choice."""
        return [_joined(self.query, self.delimiter, choice) for choice in self.choices]


class ContextChoice(_OptionItem):
    """An item with one continuation and several contexts."""

    context_options: Options
    continuation: Text

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each context before the continuation."""
        return [_joined(c, self.delimiter, self.continuation) for c in self.context_options]


class Cloze(Item):
    """An item with a continuation that must be predicted word for word."""

    context: Text
    continuation: Text

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The context before the continuation."""
        return [_joined(self.context, self.delimiter, self.continuation)]

    @property
    def chance(self) -> float:
        """The chance of guessing right: 0, since there are tens of thousands of words."""
        return 0.0

    def is_right(self, scores: Sequence[Likelihood]) -> bool:
        """Returns whether greedy decoding would generate the continuation."""
        return scores[0].is_greedy


FORMS = {"choices": Choice, "context_options": ContextChoice, "context": Cloze}
"""The forms, each by a key that only it has."""


@dataclass(frozen=True, kw_only=True)
class ItemTask:
    """Items that are answered by likelihoods; a ``Task``."""

    name: str
    items: tuple[Item, ...]
    metric: str = "acc"

    def __len__(self) -> int:
        return len(self.items)

    @property
    def sha256(self) -> str:
        """Hash of the items, independent of the layout of their file."""
        text = "\n".join(item.model_dump_json() for item in self.items)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def chance(self) -> float:
        """The mean of the items' chances."""
        return sum(item.chance for item in self.items) / len(self.items)

    def answer(self, engine: Engine, on_item: OnItem) -> list[bool]:
        """Scores the pairs of all items in one call of the engine."""
        encoder = TextEncoder(engine)
        windows = [[encoder.encode_pair(*pair) for pair in item.pairs] for item in self.items]
        scores = score_windows(engine, itertools.chain.from_iterable(windows))
        right = []
        for item, own in zip(self.items, windows, strict=True):
            right.append(item.is_right(list(itertools.islice(scores, len(own)))))
            on_item(len(right), len(self.items))
        return right


def load(argument: str, n_items: int | None) -> ItemTask:
    """Reads a task from a file; see ``TaskLoader``.

    Raises:
        ConfigError: No file is named, it cannot be read, or a line does not match the schema; the
            message names the line.
    """
    if not argument:
        raise ConfigError("the task 'jsonl' needs a file: give jsonl:PATH, or a path in .jsonl.")
    path = Path(argument)
    items = tuple(itertools.islice(_distinct(_items(path)), n_items))
    if not items:
        raise config_error(path, "holds no items: give one JSON object a line")
    forms = {type(item).__name__ for item in items}
    if len(forms) > 1:
        raise config_error(
            path,
            f"has items of several forms ({', '.join(sorted(forms))}): put each form into its "
            "own file",
        )
    return ItemTask(name=path.stem, items=items)


def _items(path: Path) -> Iterator[Item]:
    text = read_text(path, limit=MAX_FILE_BYTES, refuse=config_error)
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        data = parse_json(line, place, refuse=config_error)
        form = next((form for key, form in FORMS.items() if key in data), None)
        if form is None:
            raise config_error(
                place,
                "an item must have query, choices and gold; or context_options, continuation and "
                f"gold; or context and continuation; not {', '.join(data) or 'no key'}",
            )
        yield validated(form, data, place, refuse=config_error)


def _distinct(items: Iterable[Item]) -> Iterator[Item]:
    seen = set()
    for item in items:
        if (serialized := item.model_dump_json()) not in seen:
            seen.add(serialized)
            yield item


def _joined(context: str, delimiter: str, continuation: str) -> tuple[str, str]:
    """Joins two texts, without doubling the white space between them."""
    return context.rstrip() + delimiter, continuation.lstrip()
