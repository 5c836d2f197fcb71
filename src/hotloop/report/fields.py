"""Fields of records by name, and as columns of a CSV file.

A name can be a path into a record: ``speculation.tokens_per_step``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from hotloop.bench.record import Figure, Record


def value_of(record: Record, field: str) -> Any:
    """Returns a field of a record; None if it, or the part to which it belongs, is missing."""
    value: Any = record
    for name in field.split("."):
        value = None if value is None else getattr(value, name)
    return value


def csv_names(fields: Iterable[str]) -> list[str]:
    """Returns the names of the CSV columns of fields.

    A figure has five columns: its mean, the ends of its 95 % interval, its standard error and its
    n.
    """
    parts = ("", "_ci95_low", "_ci95_high", "_se", "_n")
    return [
        field.replace(".", "_") + part
        for field in fields
        for part in (parts if _holds_figure(field) else ("",))
    ]


def csv_values(fields: Iterable[str], record: Record) -> list[Any]:
    """Returns a record's values in these columns, with every number as it was recorded.

    Several values of a field are separated by spaces.
    """
    values: list[Any] = []
    for field in fields:
        value = value_of(record, field)
        match value:
            case Figure():
                values += [value.mean, *(value.ci95 or (None, None)), value.se, value.n]
            case tuple():
                values.append(" ".join(map(str, value)))
            case _:
                values += [value] * len(csv_names([field]))
    return values


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Formats a CSV file; None becomes empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue()


def _holds_figure(field: str) -> bool:
    kinds: tuple[Any, ...] = (Record,)
    for name in field.split("."):
        (model,) = (k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
        annotation = model.model_fields[name].annotation
        kinds = get_args(annotation) or (annotation,)
    return Figure in kinds
