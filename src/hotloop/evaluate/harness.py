"""Runs tasks of lm-eval through its Python interface (extra ``hotloop[eval]``).

lm-eval loads the data, writes the prompts and judges the answers; ``harness_model`` is its model.
Its comparison of two models is an unpaired test and is not used: a task yields right and wrong
answers, which ``evaluate.tasks`` compares item by item. lm-eval is imported only when it is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from hotloop.errors import ConfigError, UnsupportedError, shorten, shorten_value
from hotloop.evaluate.tasks import OnItem
from hotloop.types import Engine
from hotloop.untrusted import config_error, open_file, read_text

MAX_FILE_BYTES = 2**24
"""The largest YAML file of a task."""

METRICS = ("acc", "exact_match", "pass@1")
"""Metrics of an item that are 1 for a right and 0 for a wrong answer, in order of preference."""


def load(argument: str, n_items: int | None) -> HarnessTask:
    """Makes a task of lm-eval; see ``TaskLoader``.

    Args:
        argument: lm-eval's name of a task or group, or the path of a task's YAML file.
        n_items: The most items to take.

    Raises:
        ConfigError: No task is named, or its file cannot be read.
        UnsupportedError: lm-eval is not installed.
    """
    if not argument:
        raise ConfigError(
            "the task 'lm-eval' needs a name: give lm-eval:NAME, or lm-eval:PATH of a YAML file."
        )
    if find_spec("lm_eval") is None:
        raise UnsupportedError(
            f"lm-eval:{argument} needs the package lm-eval: pip install 'hotloop[eval]'."
        )
    if not is_file(argument):
        return HarnessTask(name=argument, spec=argument, n_items=n_items)
    path = Path(argument)
    return HarnessTask(
        name=path.stem, spec=str(path), n_items=n_items, content=tuple(_content_hashes(path))
    )


def is_file(argument: str) -> bool:
    """Returns whether an argument is the path of a YAML file."""
    return argument.endswith((".yaml", ".yml"))


def _content_hashes(path: Path) -> Iterator[str]:
    """Yields SHA-256 hashes, hexadecimal, of a task's file and of the data files that it names."""
    text = read_text(path, limit=MAX_FILE_BYTES, refuse=config_error)
    yield hashlib.sha256(text.encode()).hexdigest()
    try:
        task = yaml.load(text, _TagIgnoringLoader)
    except yaml.YAMLError as error:
        raise config_error(path, f"is not YAML: {shorten(str(error))}") from error
    options = task.get("dataset_kwargs") if isinstance(task, dict) else None
    files = options.get("data_files") if isinstance(options, dict) else None
    for name in sorted(_strings(files)):
        if Path(name).is_file():
            with open_file(Path(name)) as file:
                yield hashlib.file_digest(file, "sha256").hexdigest()


def _strings(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            yield from _strings(list(value.values()))
        case list():
            for each in value:
                yield from _strings(each)


class _TagIgnoringLoader(yaml.SafeLoader):
    """Reads lm-eval's files, and ignores the tag ``!function``, which names Python code."""


_TagIgnoringLoader.add_multi_constructor("!", lambda _loader, _suffix, _node: None)


@dataclass(kw_only=True)
class HarnessTask:
    """A task of lm-eval; a ``Task``.

    Attributes:
        name: Its name in records: lm-eval's name, or the name of its file.
        spec: The argument for lm-eval: the name, or the file's path.
        n_items: The most items to take; None for all.
        content: Hashes of its file and data, if it is a file.
        metric: The metrics that can decide whether an answer is right, in order of preference.
        chance: The accuracy of guessing, which is known with the answers; None before.
    """

    name: str
    spec: str
    n_items: int | None
    content: tuple[str, ...] = ()
    metric: str = " or ".join(METRICS)
    chance: float | None = None

    def __len__(self) -> int:
        return self.n_items or 0  # without a limit the number is known only to lm-eval

    @property
    def sha256(self) -> str:
        """Hash of the name, the content of its files, the number of items and lm-eval's version."""
        identity = [self.name, self.n_items, version("lm-eval"), *self.content]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def answer(self, engine: Engine, on_item: OnItem) -> list[bool]:
        """Runs lm-eval with the engine as its model.

        Raises:
            ConfigError: lm-eval has no such task, or the task has no right and wrong answers.
        """
        from lm_eval import simple_evaluate  # pyrefly: ignore[missing-import]

        from hotloop.evaluate.harness_model import EngineLM

        try:
            results = simple_evaluate(
                model=EngineLM(engine),
                tasks=[self.spec],
                limit=self.n_items,
                log_samples=True,
                bootstrap_iters=0,
            )
        except KeyError as error:
            if "not a registered task" not in str(error):
                raise
            raise ConfigError(
                f"lm-eval has no task {shorten_value(self.spec)}. `lm-eval ls tasks` lists them."
            ) from error
        right = right_answers(self.name, results["samples"])
        self.chance = chance_of(results["samples"], results["configs"])
        on_item(len(right), len(right))
        return right


def chance_of(
    samples: Mapping[str, Sequence[dict[str, Any]]], configs: Mapping[str, dict[str, Any]]
) -> float:
    """Computes the accuracy of guessing: the mean over items of 1 / number of choices.

    An item without choices counts as 0.

    Args:
        samples: lm-eval's samples of each task.
        configs: lm-eval's configuration of each task.
    """
    items = {
        (task, sample["doc_id"]): len(sample["arguments"])
        if configs[task].get("output_type") == "multiple_choice"
        else None
        for task in samples
        for sample in samples[task]
    }
    return sum(1 / n for n in items.values() if n) / len(items)


def right_answers(name: str, samples: dict[str, Sequence[dict[str, Any]]]) -> list[bool]:
    """Returns for each item whether its answer is right, by the first of ``METRICS`` that it has.

    Args:
        name: The name of the task or group, for the error.
        samples: lm-eval's samples of each task. An item occurs once for each filter of its answer;
            the first filter counts.

    Raises:
        ConfigError: The items have none of the metrics, or there are none.
    """
    items = {
        (task, sample["doc_id"]): sample for task in samples for sample in reversed(samples[task])
    }
    ordered = sorted(items.items(), key=lambda item: item[0])
    right = []
    for _, sample in ordered:
        metric = next((metric for metric in METRICS if metric in sample), None)
        if metric is None:
            break
        right.append(float(sample[metric]) >= 0.5)
    if not right or len(right) < len(ordered):
        raise ConfigError(
            f"the task lm-eval:{name} cannot be compared item by item: some items have none of the "
            f"metrics {', '.join(METRICS)}. Choose a task that has one."
        )
    return right
