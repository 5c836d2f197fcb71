"""``measured_config``: finds the configuration that a command runs in a sweep's results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hotloop.cli.output import note
from hotloop.errors import ConfigError, UnknownNameError, shorten_value
from hotloop.types import EngineConfig, levers

if TYPE_CHECKING:
    from hotloop.bench.record import Record

FILLED_IN = ("max_batch_size", "max_seq_len")
"""Levers that a sweep sets to fit its workload. They are not taken over: the command that runs the
configuration has defaults of its own."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A configuration that was measured.

    Attributes:
        config: The configuration, with the actual execution mode.
        name: Its name in the results.
        why: Why it was chosen, and its speed.
    """

    config: EngineConfig
    name: str
    why: str


def measured_config(text: str) -> Measured:
    """Returns the configuration that ``RESULTS`` recommend, or that ``RESULTS:CELL`` names.

    Raises:
        ConfigError: There are no such results, they recommend nothing, or the cell is missing or of
            another engine.
    """
    from hotloop.bench.record import MEASURED
    from hotloop.report.read import latest, read_records
    from hotloop.report.recommend import recommend

    path, cell = _split(text)
    records = read_records(path, on_problem=note)
    if cell is None:
        chosen = recommend(records)
        if chosen.record is None:
            raise ConfigError(
                f"{path} recommends no configuration: {chosen.why} Name one, as {path}:CELL."
            )
        return Measured(
            config=_config(chosen.record), name=chosen.record.cell, why=f"recommended: {chosen.why}"
        )
    by_name = {record.cell: record for record in latest(records)}
    cells = {name: record for name, record in by_name.items() if record.baseline is None}
    if cell in by_name and cell not in cells:
        ran = [name for name, record in cells.items() if record.status in MEASURED]
        own = ", ".join(ran) or "none"
        raise ConfigError(
            f"{cell} in {path} is the row of another engine ({by_name[cell].baseline}), measured "
            f"for comparison. Rows of hotloop's own that ran: {own}."
        )
    if cell not in cells:
        raise UnknownNameError(f"configuration in {path}", cell, cells)
    return Measured(config=_config(cells[cell]), name=cell, why=_speed(cells[cell]))


def _split(text: str) -> tuple[Path, str | None]:
    """Splits ``RESULTS:CELL`` at the first colon after a path that exists."""
    if _exists(text):
        return Path(text), None
    for at, character in enumerate(text):
        if character == ":" and _exists(text[:at]):
            return Path(text[:at]), text[at + 1 :]
    raise ConfigError(
        f"--config {shorten_value(text)}: there is no such results folder or file of records. "
        "Give RESULTS or RESULTS:CELL."
    )


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # no file can have this name, or its folder may not be read
        return False


def _config(record: Record) -> EngineConfig:
    if "model" not in record.config:
        raise ConfigError(
            f"{record.cell}: its record names no model. Give MODEL and options, not --config."
        )
    given: dict[str, Any] = {
        name: value
        for name, value in record.config.items()
        if name in ("model", *levers()) and name not in FILLED_IN
    }
    if given.get("assume_acceptance") is not None:
        raise ConfigError(
            f"{record.cell} was measured with an assumed acceptance and cannot be served: name "
            "another cell."
        )
    if (ran := (record.engine or {}).get("execution")) is not None:
        given["execution"] = ran
    return EngineConfig(**given)


def _speed(record: Record) -> str:
    from hotloop.report.numbers import half_width, uncertain

    if (figure := record.decode_tok_s) is None:
        return f"its status is {record.status}: it was not timed."
    return f"it decoded {uncertain(figure.mean, half_width(figure))} tok/s."
