"""A cloze task without data files: words that Python's help topics repeat.

There is one item per paragraph of ``pydoc_data.topics``: the last word of four letters or more that
occurs earlier in the paragraph, to be predicted from the text before it. A good model predicts many
of these words, since it can copy them from the paragraph. A model that quantization has damaged
loses this ability first.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator

from hotloop.errors import ConfigError, shorten_value
from hotloop.evaluate.jsonl import Cloze, ItemTask
from hotloop.evaluate.text import load_text

MIN_WORDS, MAX_WORDS = 20, 50
"""The fewest and the most words before the word to predict."""


def load(argument: str, n_items: int | None) -> ItemTask:
    """Makes the task; see ``TaskLoader``. It takes no argument."""
    if argument:
        raise ConfigError(
            f"the task 'topics' takes no argument, not {shorten_value(argument)}: give topics "
            "alone."
        )
    items = list(_items(load_text(None).content))
    # Spread over the whole text: topics in alphabetical order differ in style.
    n = min(n_items or len(items), len(items))
    chosen = tuple(items[i * len(items) // n] for i in range(n))
    return ItemTask(name=f"topics (CPython {platform.python_version()})", items=chosen)


def _items(text: str) -> Iterator[Cloze]:
    for paragraph in re.split(r"\n\s*\n", text):
        words = paragraph.split()
        bare = [re.sub(r"\W+$", "", word) for word in words]
        for i in reversed(range(MIN_WORDS, len(words))):
            first = max(0, i - MAX_WORDS)
            if re.fullmatch("[A-Za-z]{4,}", bare[i]) and bare[i] in bare[first:i]:
                yield Cloze(context=" ".join(words[first:i]), continuation=bare[i])
                break
