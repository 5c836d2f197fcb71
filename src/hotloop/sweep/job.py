"""A job: everything that one process needs to know to measure one configuration.

It travels to that process as JSON. An engine and its memory prediction are named
``module:attribute``, so that whatever satisfies the ``Engine`` protocol can be swept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from hotloop import __version__
from hotloop.bench.record import Workload
from hotloop.evaluate.text import load_text
from hotloop.sweep.models import (
    KnownModel,
    Models,
    NoReferenceError,
    checkpoints,
    settle_schemes,
)
from hotloop.sweep.recipe import QualityOptions, cell_names, sha256_of
from hotloop.types import Engine, EngineConfig


class MemoryPlan(Protocol):
    """Bytes that a configuration takes, and those that are free on its device."""

    @property
    def total_bytes(self) -> int:
        """Weights, cache and workspace together."""
        ...

    @property
    def free_bytes(self) -> int:
        """What the device has left."""
        ...

    def to_dict(self) -> dict[str, int]:
        """All of its byte counts by name."""
        ...


@dataclass(frozen=True, kw_only=True)
class EngineSource:
    """Where an engine comes from.

    Attributes:
        create: ``module:attribute`` of ``(EngineConfig) -> Engine``.
        predict: ``module:attribute`` of ``(EngineConfig) -> MemoryPlan``, or None where nothing
            can be predicted.
        baseline: What the engine is called where it is not hotloop's own.
    """

    create: str = "hotloop.engine.llm:LLM"
    predict: str | None = "hotloop.engine.memory:predict_memory"
    baseline: str | None = None

    @property
    def is_own(self) -> bool:
        """Whether this is hotloop's own engine, whose checkpoints and tokenizers can be read."""
        return self.create == EngineSource.create

    def resolve(
        self,
    ) -> tuple[Callable[[EngineConfig], Engine], Callable[[EngineConfig], MemoryPlan | None]]:
        """Imports ``create`` and ``predict``."""
        return _attribute(self.create), _attribute(self.predict) if self.predict else lambda _: None


class Job(BaseModel):
    """One configuration to measure, or one reference to score and keep.

    Attributes:
        task: Measure ``config``, or score it and keep the distributions as a reference.
        cell: What to call it.
        config: What to measure.
        workload: What to time.
        quality: What to score; None for nothing. Its text's path is absolute.
        text_sha256: Hash of the text to score.
        weights_sha256: Hash of the checkpoint; None for random weights.
        draft_sha256: Hash of the draft model's; None where there is none.
        reference_model: The model to compare with, where it is not the one that is measured.
        reference_sha256: Hash of that one's checkpoint.
        reference: The file to compare with, or, as a reference, to write.
        no_reference: Why there is none.
        attempt: Which attempt at this cell it is.
        source: The engine.
        provenance: What the record should say besides what the process finds out itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Literal["measure", "reference"] = "measure"
    cell: str
    config: EngineConfig
    workload: Workload
    quality: QualityOptions | None = None
    text_sha256: str | None = None
    weights_sha256: str | None = None
    draft_sha256: str | None = None
    reference_model: str | None = None
    reference_sha256: str | None = None
    reference: Path | None = None
    no_reference: str | None = None
    attempt: int = 1
    source: EngineSource = EngineSource()
    provenance: dict[str, Any] = {}

    @property
    def key(self) -> str:
        """Same key, same measurement: the hash of everything that decides the result."""
        timed = {"workload": self.workload.model_dump(), "draft": self.draft_sha256}
        return sha256_of({**self._scored(), **timed})

    def reference_job(self, folder: Path) -> Job:
        """The job that scores what this one is compared with: unquantized, eager, the same dtype.

        What does not touch its numbers, such as the number of slots or who drafts, is left out, so
        that as many cells as possible share it. Where it is kept in ``folder`` says what it is of.
        """
        assert self.quality is not None, "a job that scores nothing has no reference"
        config = EngineConfig(
            model=self.reference_model or self.config.model,
            device=self.config.device,
            dtype=self.config.dtype,
            execution="eager",
            max_seq_len=self.quality.window,
        )
        job = self.model_copy(
            update={
                "task": "reference",
                "cell": config.name,
                "config": config,
                "weights_sha256": self.compared_sha256,
                "draft_sha256": None,
                "reference_model": None,
                "reference_sha256": None,
                "attempt": 1,
            }
        )
        name = sha256_of({**job._scored(), "hotloop": __version__})
        return job.model_copy(update={"reference": folder / f"{name[:16]}.safetensors"})

    @property
    def compared_sha256(self) -> str | None:
        """Hash of the checkpoint of the model to compare with."""
        return self.reference_sha256 or self.weights_sha256

    def _scored(self) -> dict[str, Any]:
        """What decides the predictions and what they are compared with."""
        windows = self.quality and self.quality.model_dump(exclude={"text", "reference"})
        return {
            "config": self.config.to_dict(),
            "windows": windows,
            "text": self.text_sha256,
            "weights": self.weights_sha256,
            "source": self.source.create,
            **({"reference": self.reference_sha256} if self.reference_sha256 else {}),
        }


def make_jobs(
    configs: Sequence[EngineConfig],
    workload: Workload,
    quality: QualityOptions | None,
    *,
    source: EngineSource = EngineSource(),
    provenance: Mapping[str, Any] | None = None,
) -> list[Job]:
    """Jobs that measure configurations. Each checkpoint is read once, to hash it.

    Args:
        configs: What to measure; see ``fit_to_experiment``.
        workload: What to time.
        quality: What to score; None for nothing. Random weights are not scored anyway.
        source: Where engines come from.
        provenance: What the records should say besides what is found out.

    Raises:
        ConfigError: The text cannot be read or is too short, or the reference is not one.
        ModelNotFoundError: There is no such model on this machine.
        CheckpointError: A checkpoint is damaged.
    """
    models, text = Models(readable=source.is_own), None
    jobs = []
    for config in configs:
        model, draft = (name and models[name] for name in checkpoints(config))
        job = Job(
            cell="",
            config=settle_schemes(config, model.stored if model else None),
            workload=workload,
            quality=quality,
            weights_sha256=model.sha256 if model else None,
            draft_sha256=draft.sha256 if draft else None,
            source=source,
            provenance=dict(provenance or {}),
        )
        if model and model.stored:
            job.provenance["stored"] = model.stored.to_dict()
        if model and quality:
            if text is None:
                text = load_text(quality.text)
                models.check_length(model, text.content, quality.window)
            job = job.model_copy(
                update={"text_sha256": text.sha256, **_compared(models, model, quality)}
            )
        jobs.append(job)
    cells = cell_names([job.config for job in jobs])
    return [job.model_copy(update={"cell": cell}) for job, cell in zip(jobs, cells, strict=True)]


def _compared(models: Models, model: KnownModel, quality: QualityOptions) -> dict[str, Any]:
    """The fields of a job that say what its quality is measured against."""
    try:
        reference = models.reference_of(model, quality.reference)
    except NoReferenceError as error:
        return {"no_reference": str(error)}
    if reference.sha256 == model.sha256:
        return {}
    return {"reference_model": reference.name, "reference_sha256": reference.sha256}


def _attribute(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
