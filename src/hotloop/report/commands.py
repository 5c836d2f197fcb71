"""The command that measures a record's configuration again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from hotloop.bench.record import Record, Workload
from hotloop.types import EngineConfig, levers

_DEFAULTS = {field.name: field.default for field in fields(EngineConfig)}
_FILLED_IN = ("max_seq_len", "max_batch_size")
"""Levers that a sweep, like ``bench``, sets from the workload."""


def bench_command(record: Record) -> str:
    """Returns the ``hotloop bench`` command that times a record's configuration again.

    For another engine, the command first writes a recipe with one cell into ``cell.yaml``. The
    reader must add the engine's own interpreter (``--python ENGINE=PATH``), if it has one.
    """
    if record.baseline:
        recipe = shlex.quote(json.dumps(_recipe(record), ensure_ascii=False))
        return f"printf %s {recipe} > cell.yaml && hotloop sweep cell.yaml"
    words = ["hotloop", "bench", *_model(record), *_options(record.config)]
    if record.workload is not None:
        words += _workload(record.workload)
    return shlex.join(words)


def _recipe(record: Record) -> dict[str, Any]:
    """Returns a recipe with only the record's cell, timed and not scored."""
    excluded = ("model", "weights", *_FILLED_IN)
    cell = {name: value for name, value in _changed(record.config).items() if name not in excluded}
    config = record.config
    recipe: dict[str, Any] = {n: config[n] for n in ("model", "weights") if n in config}
    recipe |= {"cells": [{"engine": record.baseline} | cell], "quality": False}
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


def _options(config: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in _changed(config).items():
        lever = levers()[name]
        if lever.group is None or name in _FILLED_IN:
            continue
        if lever.used is not None and not lever.used({**_DEFAULTS, **config}):
            continue
        flag = lever.alias or "--" + name.replace("_", "-")
        words += [flag] if value is True else [flag, str(value)]
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
