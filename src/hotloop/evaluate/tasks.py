"""Tasks with right and wrong answers, and the verdict on a configuration that answers them.

To add a task, write a module with a function like ``TaskLoader`` and add its name to ``TASKS``. A
user writes ``NAME`` or ``NAME:ARGUMENT``; the path of a ``.jsonl`` file stands for ``jsonl:PATH``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field

from hotloop import registry
from hotloop.bench.paired import (
    PairedTask,
    compare_answers,
    compare_over_tasks,
)
from hotloop.bench.record import TaskFigures, Verdict
from hotloop.bench.statistics import answers_figure
from hotloop.errors import CheckpointError, ConfigError, shorten_value
from hotloop.types import MAX_ACCURACY_LOSS, Engine
from hotloop.untrusted import StrictModel, parse_json, read_bytes, validated
from hotloop.writing import write_whole

TASKS = {
    "jsonl": "hotloop.evaluate.jsonl:load",
    "lm-eval": "hotloop.evaluate.harness:load",
    "topics": "hotloop.evaluate.topics:load",
}
"""The registry: name of a kind of task -> ``module:attribute`` of its ``TaskLoader``."""

OnItem = Callable[[int, int], None]
"""Called with (items done, items in all)."""


class Task(Protocol):
    """A list of items. A model's answer to each is right or wrong.

    Attributes:
        name: Its name in records.
        sha256: Hash of everything that determines the answers' correctness: items, their order, the
            metric.
        metric: The criterion of a right answer, such as ``acc``.
        chance: The accuracy of guessing; None if it is not known.
    """

    name: str
    sha256: str
    metric: str
    chance: float | None

    def __len__(self) -> int:
        """Returns the number of items."""
        ...

    def answer(self, engine: Engine, on_item: OnItem) -> list[bool]:
        """Answers every item; returns for each, in order, whether the answer is right."""
        ...


TaskLoader = Callable[[str, int | None], Task]
"""Makes a task from its argument, empty if there is none, and the most items to take from its
beginning, None for all. It raises ConfigError for an argument that it cannot use."""


def load_task(text: str, n_items: int | None) -> Task:
    """Loads a task.

    Args:
        text: The task, as a user writes it; see the module.
        n_items: The most items to take; None for all.

    Raises:
        ConfigError: There is no such task, or it cannot be read.
    """
    name, _, argument = text.partition(":")
    if text.endswith(".jsonl") and name not in TASKS:
        name, argument = "jsonl", text
    loader: TaskLoader = registry.resolve("task", TASKS, name)
    return loader(argument, n_items)


def load_tasks(texts: Sequence[str], n_items: int | None) -> list[Task]:
    """Loads tasks.

    Raises:
        ConfigError: As for ``load_task``, or two tasks have one name or the same items.
    """
    tasks = [load_task(text, n_items) for text in texts]
    for i, task in enumerate(tasks):
        if task.name in (other.name for other in tasks[:i]):
            raise ConfigError(
                f"two tasks have the name {shorten_value(task.name)}: rename a file, or leave "
                "one out."
            )
        for other in tasks[:i]:
            if task.sha256 == other.sha256:
                raise ConfigError(
                    f"the tasks {shorten_value(other.name)} and {shorten_value(task.name)} have "
                    "the same items, which would be counted twice: leave one out."
                )
    return tasks


def resolve_task(text: str, folder: Path) -> str:
    """Makes the path of a task's file absolute; it is relative to ``folder``."""
    name, colon, argument = text.partition(":")
    if name == "jsonl" and colon:
        return f"jsonl:{(folder / argument).resolve()}"
    if name == "lm-eval" and argument.endswith((".yaml", ".yml")):
        return f"lm-eval:{(folder / argument).resolve()}"
    if text.endswith(".jsonl") and name not in TASKS:
        return str((folder / text).resolve())
    return text


def without_folder(text: str) -> str:
    """Returns a task as it was requested, with the name of its file alone."""
    name, colon, argument = text.partition(":")
    if colon and name in TASKS:
        return f"{name}:{Path(argument).name}"
    return Path(text).name


def answer_tasks(engine: Engine, tasks: Sequence[Task], on_item: OnItem) -> list[list[bool]]:
    """Answers all tasks, in their order."""
    total, before = sum(map(len, tasks)), 0
    answers = []
    for task in tasks:

        def progress(done: int, _: int, before: int = before) -> None:
            on_item(before + done, total)

        answers.append(task.answer(engine, progress))
        before += len(task)
    return answers


class AnswersKey(StrictModel):
    """Identifies the answers of a reference; references differ if any field does.

    Attributes:
        weights: Identity of the checkpoint.
        dtype: Element type of its computation; None matches any.
        tasks: The hash of each task.
    """

    weights: str
    dtype: str | None
    tasks: Annotated[tuple[str, ...], Field(strict=False)]


class _Answers(StrictModel):
    """The file of a reference's answers: for each task, a string of 1 and 0, one per item."""

    key: AnswersKey
    right: Annotated[tuple[Annotated[str, Field(pattern="^[01]+$")], ...], Field(strict=False)]


def write_answers(path: Path, key: AnswersKey, answers: Sequence[Sequence[bool]]) -> None:
    """Writes the answers of a reference atomically."""
    right = tuple("".join("01"[a] for a in task) for task in answers)
    write_whole(path, _Answers(key=key, right=right).model_dump_json() + "\n")


def read_answers(path: Path, key: AnswersKey) -> list[list[bool]]:
    """Reads the answers of a reference.

    Raises:
        ConfigError: The answers have another key.
        CheckpointError: The file is missing or damaged.
    """
    limit = 2**28
    found = validated(_Answers, parse_json(read_bytes(path, limit=limit), path), path)
    expected = key if key.dtype else key.model_copy(update={"dtype": found.key.dtype})
    if found.key != expected:
        raise ConfigError(
            f"{path} has the answers of another model or of other tasks. Delete it, and they "
            "will be "
            "written again."
        )
    if len(found.right) != len(key.tasks):
        raise CheckpointError(path, "it lacks the answers to some of its tasks. Delete it.")
    return [[a == "1" for a in task] for task in found.right]


def compare_tasks(
    tasks: Sequence[Task],
    answers: Sequence[Sequence[bool]],
    reference: Sequence[Sequence[bool]] | None,
) -> tuple[tuple[TaskFigures, ...], Verdict | None]:
    """Compares answers with the reference's, task by task and over all tasks.

    The margin of every comparison is ``MAX_ACCURACY_LOSS`` of the reference's accuracy. A task in
    which the reference is not shown to be better than guessing is flagged, and not part of the
    verdict: no loss could be shown.

    Returns:
        Each task's figures, and the verdict; None without a reference, or if every task is
        ``at_chance``.

    Raises:
        ConfigError: The reference answered another number of items.
    """
    figures, paired = [], []
    for i, (task, right) in enumerate(zip(tasks, answers, strict=True)):
        fields: dict[str, Any] = {}
        if reference is not None:
            if len(reference[i]) != len(right):
                raise ConfigError(
                    f"the task {shorten_value(task.name)} has {len(right):,} items, and the "
                    f"reference answered {len(reference[i]):,}: its data has "
                    "changed. Delete the reference's answers (a .json file in `references` of the "
                    "cache folder), and they will be written again."
                )
            pair = PairedTask(
                name=task.name, chance=task.chance, reference=reference[i], tested=right
            )
            paired.append(pair)
            fields = {"reference_accuracy": pair.accuracy, "at_chance": pair.at_chance}
            if pair.accuracy > 0:
                margin = MAX_ACCURACY_LOSS * pair.accuracy
                fields["compared"] = compare_answers([pair.flips], margin)
        figures.append(
            TaskFigures(
                task=task.name,
                sha256=task.sha256,
                metric=task.metric,
                chance=task.chance,
                accuracy=answers_figure(right),
                **fields,
            )
        )
    return tuple(figures), compare_over_tasks(paired)
