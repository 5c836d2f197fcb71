"""Divides a text into parts, to test incremental parsers."""

import random
from collections.abc import Iterator


def divided(text: str) -> Iterator[list[str]]:
    """Yields divisions of a text into its characters, two parts, three parts and random parts."""
    yield list(text)
    rng = random.Random(0)
    for i in range(len(text) + 1):
        yield [text[:i], text[i:]]
        for j in range(i, len(text) + 1, 1 if len(text) < 60 else 7):
            yield [text[:i], text[i:j], text[j:]]
    for _ in range(50):
        cuts = sorted(rng.choices(range(len(text) + 1), k=6))
        yield [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
