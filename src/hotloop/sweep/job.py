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
from hotloop.sweep.recipe import QualityOptions, cell_names, sha256_of
from hotloop.types import Engine, EngineConfig, is_draft_model
from hotloop.weights.hub import resolve_model
from hotloop.weights.identity import hash_checkpoint


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
            model=self.config.model,
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
                "draft_sha256": None,
                "attempt": 1,
            }
        )
        name = sha256_of({**job._scored(), "hotloop": __version__})
        return job.model_copy(update={"reference": folder / f"{name[:16]}.safetensors"})

    def _scored(self) -> dict[str, Any]:
        """What decides the predictions."""
        windows = self.quality and self.quality.model_dump(exclude={"text"})
        return {
            "config": self.config.to_dict(),
            "windows": windows,
            "text": self.text_sha256,
            "weights": self.weights_sha256,
            "source": self.source.create,
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
        ConfigError: The text cannot be read.
        ModelNotFoundError: There is no such model on this machine.
    """
    read = [_checkpoints(config) for config in configs]
    names = dict.fromkeys(name for pair in read for name in pair)
    sha256 = {name: name and hash_checkpoint(resolve_model(name)) for name in names}
    text_sha256 = load_text(quality.text).sha256 if quality and any(names) else None
    return [
        Job(
            cell=name,
            config=config,
            workload=workload,
            quality=quality,
            text_sha256=text_sha256,
            weights_sha256=sha256[model],
            draft_sha256=sha256[draft],
            source=source,
            provenance=dict(provenance or {}),
        )
        for name, config, (model, draft) in zip(cell_names(configs), configs, read, strict=True)
    ]


def _checkpoints(config: EngineConfig) -> tuple[str | None, str | None]:
    """The checkpoints that a configuration reads: the model's, and the draft model's."""
    if config.weights == "random":
        return None, None
    return config.model, config.draft if is_draft_model(config.draft) else None


def _attribute(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
