"""A job: everything that one process needs to know to measure one configuration.

It travels to that process as JSON. Jobs are made here from the configurations of a recipe:
equivalent ones are merged into one job, and each job gets the key by which ``--resume`` finds its
record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from hotloop import __version__, hardware, registry
from hotloop.baselines import ENGINES, EngineKind
from hotloop.bench.record import Workload
from hotloop.cache import code_hash
from hotloop.evaluate.tasks import load_tasks
from hotloop.evaluate.text import load_text
from hotloop.sweep.models import (
    KnownModel,
    Models,
    NoReferenceError,
    check_length,
    checkpoints,
    resolve_schemes,
)
from hotloop.sweep.recipe import QualityOptions, cell_names, sha256_of
from hotloop.types import OWN_ENGINE, EngineConfig, is_draft_model


class Job(BaseModel):
    """One configuration to measure, or one reference to score and store.

    Attributes:
        task: Measure ``config``, or score it and store the distributions as a reference.
        cell: The cell's name.
        config: The configuration.
        source: Where its engine's ``EngineKind`` is defined: ``module:attribute``.
        python: The interpreter that runs it; None for the current one.
        workload: The workload to time; None for a job that times nothing.
        quality: The windows to score; None for none. Its text's path is absolute.
        text_sha256: Hash of the text to score.
        weights_sha256: Hash that identifies the checkpoint (``weights.identity``); None for random
            weights.
        draft_sha256: The same hash for the draft model's checkpoint; None without one.
        reference_model: The model to compare with, if it is not the measured model.
        reference_sha256: The same hash for the checkpoint of ``reference_model``.
        reference: The file to compare with; for a reference, the file to write.
        task_sha256s: Hashes of the tasks to answer.
        answers: The file of the reference's answers to the tasks; for a reference, the file to
            write.
        reference_place: The place where the reference was scored, if that was not one device of
            this job's kind.
        no_reference_reason: Why there is no reference; None if there is one, or none is needed.
        attempt: The number of the attempt at this cell, from 1.
        key: See :func:`measurement_key`.
        provenance: Entries of the record's provenance that are known before the job runs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Literal["measure", "reference"] = "measure"
    cell: str
    config: EngineConfig
    source: str
    python: Path | None = None
    workload: Workload | None = None
    quality: QualityOptions | None = None
    text_sha256: str | None = None
    weights_sha256: str | None = None
    draft_sha256: str | None = None
    reference_model: str | None = None
    reference_sha256: str | None = None
    reference: Path | None = None
    task_sha256s: tuple[str, ...] = ()
    answers: Path | None = None
    reference_place: str | None = None
    no_reference_reason: str | None = None
    attempt: int = 1
    key: str = ""
    provenance: dict[str, Any] = {}

    @property
    def engine(self) -> EngineKind:
        """The kind of engine that runs it. Its module is imported here."""
        return registry.load(self.source)

    def reference_job(
        self, folder: Path, *, device: str | None = None, tensor_parallel: int = 1
    ) -> Job:
        """Makes the job that scores the reference of this job.

        The reference is hotloop's own engine: eager, with the same dtype, and unquantized unless
        the user names another reference. It has only the options that change its predictions, so
        that as many cells as possible share it. The names of its files in ``folder`` are hashes of
        these options, of the code, and of the machine.

        Args:
            folder: The folder of references.
            device: The device that scores it; None for this job's.
            tensor_parallel: The number of ranks that score it.
        """
        assert self.quality is not None, "a job that scores nothing has no reference"
        config = EngineConfig(
            model=self.reference_model or self.config.model,
            device=device or self.config.device,
            tensor_parallel=tensor_parallel,
            dtype=self.config.dtype,
            quant="auto" if self.quality.against else "none",
            execution="eager",
            max_seq_len=self.quality.seq_len,
        )
        job = self.model_copy(
            update={
                "task": "reference",
                "cell": config.name + (" on the CPU" if device == "cpu" else ""),
                "config": config,
                "source": ENGINES[OWN_ENGINE],
                "python": None,
                "weights_sha256": self.compared_sha256,
                "draft_sha256": None,
                "reference_model": None,
                "reference_sha256": None,
                "attempt": 1,
                "key": "",
            }
        )
        # The key of a cell has only hotloop's version, so that --resume keeps results that took
        # hours. A reference takes a minute, and its key has the code as well: otherwise a cell
        # could differ from a reference of older code for a reason other than its configuration.
        inputs = _prediction_inputs(job, replace(job.config, max_seq_len=None)) | {
            "code": code_hash(),
            "machine": hardware.machine(),
        }
        files = {"reference": folder / f"{sha256_of(inputs)[:16]}.safetensors"}
        if self.task_sha256s:
            answer_inputs = inputs | {"text": None, "windows": None, "tasks": self.task_sha256s}
            files["answers"] = folder / f"{sha256_of(answer_inputs)[:16]}.json"
        return job.model_copy(update=files)

    @property
    def compared_sha256(self) -> str | None:
        """Hash of the checkpoint of the model to compare with."""
        return self.reference_sha256 or self.weights_sha256


def measurement_key(job: Job, resolved: EngineConfig, machine: Mapping[str, Any]) -> str:
    """Hashes everything that determines a job's result, and nothing else.

    A job is not measured again if a record has its key. The key covers the resolved configuration,
    the identity of the checkpoints (not their names), the content of the text, its windows and the
    tasks, the reference's identity, the workload, the engine, its interpreter, the versions of
    hotloop and torch, and the machine. It leaves out names of cells and recipes, paths of files
    whose content is hashed, time limits and the number of the attempt.

    Args:
        job: The job.
        resolved: Its configuration as its engine's ``resolve_auto`` returns it.
        machine: The result of ``hardware.machine``.
    """
    others: dict[str, Any] = {
        "workload": job.workload and job.workload.model_dump(),
        "draft": job.draft_sha256,
        "reference": job.reference_sha256,
        "machine": machine,
    }
    if job.quality is not None:
        others["tasks"] = job.task_sha256s
        others["protocols"] = sorted(job.quality.protocols)
    return sha256_of(_prediction_inputs(job, resolved) | others)


def _prediction_inputs(job: Job, resolved: EngineConfig) -> dict[str, Any]:
    """Returns everything that determines a job's predictions."""
    config = resolved.to_dict()
    if job.weights_sha256:
        del config["model"], config["checkpoint"]
        if is_draft_model(resolved.draft):
            del config["draft"]
    return {
        "config": config,
        "weights": job.weights_sha256,
        "engine": [job.source, job.python and str(job.python)],
        "versions": {"hotloop": __version__, "torch": version("torch")},
        "text": job.text_sha256,
        "windows": job.quality and job.quality.model_dump(include={"window", "n_windows"}),
    }


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of a recipe.

    Attributes:
        name: Its name, different from those of the other cells.
        config: The configuration, with schemes in place of ``auto``.
        resolved: The same, with every other ``auto`` replaced that can be resolved beforehand.
        source: The ``module:attribute`` of its engine's ``EngineKind``.
        engine: The ``EngineKind``.
    """

    name: str
    config: EngineConfig
    resolved: EngineConfig
    source: str
    engine: EngineKind


def make_cells(configs: Sequence[EngineConfig], models: Models) -> list[Cell]:
    """Makes the cells of some configurations; equivalent ones become one cell.

    Raises:
        UnknownNameError: There is no such engine.
        ModelNotFoundError: There is no such model on this machine.
        CheckpointError: A checkpoint's description is damaged.
    """
    cells: dict[EngineConfig, Cell] = {}
    for config in configs:
        engine: EngineKind = registry.resolve("engine", ENGINES, config.engine)
        if engine.reads_checkpoints:
            is_random = config.weights == "random"
            config = resolve_schemes(config, None if is_random else models[config.source].stored)
        resolved = engine.resolve_auto(config)
        cell = Cell(
            name="",
            config=config,
            resolved=resolved,
            source=ENGINES[config.engine],
            engine=engine,
        )
        cells.setdefault(resolved, cell)
    names = cell_names([cell.config for cell in cells.values()])
    return [replace(cell, name=name) for cell, name in zip(cells.values(), names, strict=True)]


def make_jobs(
    configs: Sequence[EngineConfig],
    workload: Workload | None,
    quality: QualityOptions | None,
    *,
    pythons: Mapping[str, Path] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> list[Job]:
    """Makes the jobs that measure configurations. Each checkpoint is identified once.

    Args:
        configs: The configurations; see ``fit_to_experiment``.
        workload: The workload to time; None to time nothing.
        quality: The windows to score; None for none. Random weights are never scored.
        pythons: Interpreters of engines, by the engine's name.
        provenance: Entries of the records' provenance.

    Raises:
        UnknownNameError: There is no such engine.
        ConfigError: The text or a task cannot be read, the text is too short, or the reference is
            not valid.
        ModelNotFoundError: There is no such model on this machine.
        CheckpointError: A checkpoint is damaged.
    """
    models, machine, text = Models(), hardware.machine(), None
    tasks = load_tasks(quality.tasks, quality.n_items) if quality else []
    jobs = []
    for cell in make_cells(configs, models):
        model, draft = (name and models[name] for name in checkpoints(cell.config))
        job = Job(
            cell=cell.name,
            config=cell.config,
            source=cell.source,
            python=(pythons or {}).get(cell.config.engine),
            workload=workload,
            quality=quality,
            weights_sha256=model.sha256 if model else None,
            draft_sha256=draft.sha256 if draft else None,
            provenance=dict(provenance or {}),
        )
        readable = cell.engine.reads_checkpoints
        if model and readable:
            job.provenance["stored"] = model.stored.to_dict()
        if model and quality:
            text = text or load_text(quality.text)
            original = models[cell.config.model]
            if readable:
                check_length(original, text.content, quality.window)
            reference = _reference_fields(models, model, original, quality, readable=readable)
            hashes = {"text_sha256": text.sha256, "task_sha256s": tuple(t.sha256 for t in tasks)}
            job = job.model_copy(update=hashes | reference)
        key = measurement_key(job, cell.resolved, machine)
        jobs.append(job.model_copy(update={"key": key}))
    return jobs


def _reference_fields(
    models: Models,
    model: KnownModel,
    original: KnownModel,
    quality: QualityOptions,
    *,
    readable: bool,
) -> dict[str, Any]:
    """Returns the fields of a job that define the reference of its quality.

    Args:
        models: All models.
        model: The checkpoint that is measured.
        original: The model of which it is a form; the same model, unless an engine needs another
            form.
        quality: The options.
        readable: hotloop itself can read ``original``.
    """
    try:
        if quality.against is not None:
            other = models[quality.against]
            return {"reference_model": other.name, "reference_sha256": other.sha256}
        reference = models.reference_of(
            original, quality.reference, original.quantization if readable else None
        )
    except NoReferenceError as error:
        return {"no_reference_reason": str(error)}
    if reference.sha256 == model.sha256:
        return {}
    return {"reference_model": reference.name, "reference_sha256": reference.sha256}
