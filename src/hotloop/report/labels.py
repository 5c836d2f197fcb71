"""Places labels beside marks, without overlaps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Anchor = Literal["start", "middle", "end"]

CHARACTER = 0.56
"""Mean width of a character, relative to the size of text."""


@dataclass(frozen=True)
class Box:
    """A rectangle; ``top`` is above ``bottom``, and the smaller number."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Returns whether the two have an inner point in common."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def holds(self, other: Box) -> bool:
        """Returns whether the other rectangle is within this one."""
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.top <= other.top
            and other.bottom <= self.bottom
        )


@dataclass(frozen=True, kw_only=True)
class Label:
    """A placed label: its text, the position of its baseline, and the end that is there."""

    text: str
    x: float
    y: float
    anchor: Anchor
    is_emphasized: bool


def place_labels(
    marks: Sequence[tuple[float, float, str, bool]],
    bounds: Box,
    *,
    size: float,
    taken: Iterable[Box] = (),
) -> list[Label]:
    """Places a label for each mark, the emphasized ones first.

    Args:
        marks: The position of each mark, its text, and whether it is emphasized.
        bounds: The rectangle to stay in.
        size: The size of text; distances are in proportion to it.
        taken: Rectangles that labels must not overlap, besides marks and other labels.

    Returns:
        The placed labels. Labels that would cover something are left out.
    """
    unit = size / 13
    reach = 8 * unit
    boxes = [*taken]
    boxes += [Box(x - reach, y - reach, x + reach, y + reach) for x, y, *_ in marks]
    placed = []
    for x, y, text, is_emphasized in sorted(marks, key=lambda mark: not mark[3]):
        if not text:
            continue
        width = CHARACTER * size * len(text) + 2
        for dx, dy, anchor in _PLACES:
            at, base = x + dx * unit, y + dy * unit
            left = {"start": at, "end": at - width, "middle": at - width / 2}[anchor]
            box = Box(left, base - size + 2, left + width, base + 4 * unit)
            if bounds.holds(box) and not any(map(box.overlaps, boxes)):
                boxes.append(box)
                placed.append(
                    Label(text=text, x=at, y=base, anchor=anchor, is_emphasized=is_emphasized)
                )
                break
    return placed


_PLACES: tuple[tuple[float, float, Anchor], ...] = (
    (13, 4.5, "start"),
    (-13, 4.5, "end"),
    (9, -11, "start"),
    (-9, -11, "end"),
    (9, 20, "start"),
    (-9, 20, "end"),
    (0, -16, "middle"),
    (0, 27, "middle"),
    (9, -26, "start"),
    (-9, -26, "end"),
)
"""Possible places of a label, relative to its mark, at a text size of 13; the best place first."""
