"""Why speculative decoding paid or not, from the records of cells with drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hotloop.bench.record import Record, SpeculationFigures
from hotloop.report.differences import Difference, shown_ratio, speed_difference
from hotloop.report.numbers import half_width, percent, uncertain

_OF_DRAFTS = ("draft", "draft_quant", "draft_tokens", "draft_policy")


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """A cell with drafts.

    Attributes:
        record: Its record.
        figures: Its drafting statistics.
        plain: The same cell without drafts, if there is one.
        gain: Its speed against that.
    """

    record: Record
    figures: SpeculationFigures
    plain: Record | None
    gain: Difference | None

    @property
    def shown_gain(self) -> str:
        """Its gain over plain decoding."""
        return shown_ratio(self.gain)

    @property
    def tokens_per_step(self) -> str:
        """Tokens that a step gave."""
        figure = self.figures.tokens_per_step
        return uncertain(figure.mean, half_width(figure))

    @property
    def acceptance(self) -> str:
        """The share of drafts accepted at each position."""
        shares = self.figures.acceptance
        return " ".join("–" if share is None else percent(share) for share in shares) or "–"

    @property
    def draft_share(self) -> str:
        """The share of the device's time spent drafting."""
        share = self.figures.draft_share
        return "–" if share is None else percent(share)

    @property
    def off_share(self) -> str:
        """The share of steps without drafts."""
        return percent(self.figures.off_share)


def drafting(records: Sequence[Record]) -> tuple[Drafting, ...]:
    """Collects the cells with drafts."""
    found = []
    for record in records:
        if record.speculation is None:
            continue
        plain = next((r for r in records if _is_plain_twin(r, record)), None)
        gain = speed_difference(plain, record) if plain else None
        found.append(Drafting(record=record, figures=record.speculation, plain=plain, gain=gain))
    return tuple(found)


def _is_plain_twin(record: Record, drafted: Record) -> bool:
    if record.speculation is not None or record.decode_tok_s is None or record.baseline:
        return False

    def other_levers(of: Record) -> dict[str, object]:
        return {name: value for name, value in of.config.items() if name not in _OF_DRAFTS}

    return other_levers(record) == other_levers(drafted)
