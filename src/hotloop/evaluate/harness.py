"""Tasks of lm-eval, answered through its Python interface (extra ``hotloop[eval]``).

lm-eval loads the data, writes the prompts and decides what is right; ``harness_model`` is its
model. Its comparison of two models is an unpaired test and is not used: a task gives right and
wrong answers, which ``evaluate.tasks`` compares item by item. lm-eval is imported when it is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from hotloop.errors import ConfigError, UnsupportedError
from hotloop.evaluate.tasks import OnItem
from hotloop.types import Engine

METRICS = ("acc", "exact_match", "pass@1")
"""Metrics of an item that are 1 where it is right and 0 where it is wrong, the preferred first."""


def load(argument: str, n_items: int | None) -> HarnessTask:
    """Makes the task that lm-eval knows by a name, as ``TaskLoader`` says.

    Raises:
        ConfigError: No task is named.
        UnsupportedError: lm-eval is not installed.
    """
    if not argument:
        raise ConfigError("the task 'lm-eval' needs a name: give lm-eval:NAME.")
    if find_spec("lm_eval") is None:
        raise UnsupportedError(
            f"lm-eval:{argument} needs the package lm-eval: pip install 'hotloop[eval]'."
        )
    return HarnessTask(name=argument, n_items=n_items)


@dataclass(frozen=True, kw_only=True)
class HarnessTask:
    """A task of lm-eval; a ``Task``.

    Attributes:
        name: lm-eval's name.
        n_items: The most items to take; None for all.
    """

    name: str
    n_items: int | None
    metric: str = " or ".join(METRICS)
    chance: float | None = None

    def __len__(self) -> int:
        return self.n_items or 0  # without a limit lm-eval alone knows

    @property
    def sha256(self) -> str:
        """Hash of the name, the number of items and lm-eval's version."""
        of = [self.name, self.n_items, version("lm-eval")]
        return hashlib.sha256(json.dumps(of).encode()).hexdigest()

    def answer(self, engine: Engine, on_item: OnItem) -> list[bool]:
        """Runs lm-eval with the engine as its model."""
        from lm_eval import simple_evaluate  # pyrefly: ignore[missing-import]

        from hotloop.evaluate.harness_model import EngineLM

        results = simple_evaluate(
            model=EngineLM(engine),
            tasks=[self.name],
            limit=self.n_items,
            log_samples=True,
            bootstrap_iters=0,
        )
        right = right_answers(self.name, results["samples"])
        on_item(len(right), len(right))
        return right


def right_answers(name: str, samples: dict[str, Sequence[dict[str, Any]]]) -> list[bool]:
    """Returns which items are right, by the first of ``METRICS`` that they have.

    Args:
        name: The name of the task or group, for the error.
        samples: lm-eval's samples of each task. An item is there once for each filter of its
            answer, of which the first counts.

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
            f"the task lm-eval:{name} does not say of every item whether it is right: it has none "
            f"of {', '.join(METRICS)}, and cannot be compared item by item."
        )
    return right
