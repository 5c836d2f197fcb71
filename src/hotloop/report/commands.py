"""The command that measures a record's configuration again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from hotloop.bench.record import Record, Workload
from hotloop.evaluate.text import DEFAULT_TEXT
from hotloop.types import EngineConfig, levers
from hotloop.writing import file_name

_DEFAULTS = {field.name: field.default for field in fields(EngineConfig)}
_FILLED_IN = ("max_seq_len", "max_batch_size")
"""Levers that a sweep, like ``bench``, sets from the workload."""


def measure_command(record: Record) -> str:
    """Returns the command that measures a record's figures again.

    It is ``hotloop sweep`` for a cell that was timed and scored, and ``bench`` or ``eval`` for one
    that was only timed or only scored. For another engine, the command first writes a recipe with
    one cell into ``cell.yaml``. The reader must add the engine's own interpreter
    (``--python ENGINE=PATH``), if it has one, and the folders of files of texts and tasks.
    """
    if record.baseline:
        recipe = shlex.quote(json.dumps(_recipe(record), ensure_ascii=False))
        return f"printf %s {recipe} > cell.yaml && hotloop sweep cell.yaml"
    model, quality = _model(record), _quality_words(record)
    timed = [] if record.workload is None else _workload(record.workload)
    if not quality:
        words = ["bench", *model, *_options(record.config), *timed]
    elif record.workload is None:
        words = ["eval", *model, *_options(record.config), *quality]
    else:
        out = ["--out", f"results/{file_name(record.cell)}"]
        words = ["sweep", *model, *_options(record.config, sweep=True), *timed, *quality, *out]
    return shlex.join(["hotloop", *words])


def _recipe(record: Record) -> dict[str, Any]:
    """Returns a recipe with only the record's cell."""
    excluded = ("model", "weights", *_FILLED_IN)
    cell = {name: value for name, value in _changed(record.config).items() if name not in excluded}
    config = record.config
    recipe: dict[str, Any] = {n: config[n] for n in ("model", "weights") if n in config}
    quality = _quality(record) or False
    recipe |= {"cells": [{"engine": record.baseline} | cell], "quality": quality}
    if record.workload is not None:
        recipe["workload"] = record.workload.model_dump(exclude_defaults=True)
    return recipe


def chat_command(record: Record) -> str | None:
    """Returns the command that runs a record's configuration; None for random weights."""
    if record.baseline or record.config.get("weights") == "random":
        return None
    words = ["hotloop", "chat", *_model(record), *_options(record.config)]
    return shlex.join(words)


def _model(record: Record) -> list[str]:
    model = str(record.config.get("model", "MODEL"))
    if record.config.get("weights") != "random":
        return [model]
    seed = record.config.get("seed", 0)
    return [model, "--weights", "random", *(["--weights-seed", str(seed)] if seed else [])]


def _quality(record: Record) -> dict[str, Any]:
    """Returns the fields of ``QualityOptions`` that repeat a record's scores; empty without any."""
    protocol = record.quality_protocol
    if protocol is None:
        return {}
    fields: dict[str, Any] = {"window": protocol.window, "n_windows": protocol.n_windows}
    if not protocol.text.startswith(DEFAULT_TEXT):
        fields["text"] = protocol.text
    if (model := record.provenance.get("reference_model")) is not None:
        stored = (protocol.reference or "").startswith("as stored")
        fields["against" if stored else "reference"] = model
    if protocol.tasks:
        fields["tasks"] = list(protocol.tasks)
    if record.tasks:
        fields["n_items"] = max(task.accuracy.n for task in record.tasks)
    others = dict.fromkeys(name.split()[0] for name in record.other_perplexities)
    if others:
        fields["protocols"] = ["gptq", *others]
    return fields


def _quality_words(record: Record) -> list[str]:
    words = []
    for name, value in _quality(record).items():
        flag = "--items" if name == "n_items" else "--" + name.replace("_", "-")
        words += [flag, ",".join(value) if isinstance(value, list) else str(value)]
    return words


def _options(config: Mapping[str, Any], *, sweep: bool = False) -> list[str]:
    """Returns the options of a configuration; for ``sweep`` also those with several defaults."""
    words, values = [], _changed(config)
    if sweep:
        values |= {n: config[n] for n, lever in levers().items() if lever.sweep and n in config}
    for name, value in values.items():
        lever = levers()[name]
        if lever.group is None or name in _FILLED_IN:
            continue
        if lever.used is not None and not lever.used({**_DEFAULTS, **config}):
            continue
        flag = lever.alias or "--" + name.replace("_", "-")
        words += [flag] if value is True and not sweep else [flag, str(value)]
    return words


def _changed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the levers of a configuration that differ from their defaults."""
    return {
        name: config[name]
        for name in levers()
        if name in config and config[name] not in (None, _DEFAULTS[name])
    }


def _workload(workload: Workload) -> list[str]:
    words = []
    default = Workload(prompt_tokens=128, new_tokens=128)
    for name, value in workload.model_dump().items():
        if value != getattr(default, name):
            flag = "workload-seed" if name == "seed" else name.replace("_", "-")
            words += [f"--{flag}", str(value)]
    return words
