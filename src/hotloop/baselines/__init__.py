"""The engines that a cell can name: hotloop's own, and others for comparison.

To add one, write a module with an ``EngineKind`` and add its name to ``ENGINES``. The module must
import the engine's library only inside ``create``: an engine can run under an interpreter of its
own, so the process that plans a sweep may lack its library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hotloop.types import Engine, EngineConfig, MemoryPlan

ENGINES = {
    "hotloop": "hotloop.baselines.hotloop:ENGINE",
    "transformers": "hotloop.baselines.transformers:ENGINE",
    "vllm": "hotloop.baselines.vllm:ENGINE",
    "llama-cpp": "hotloop.baselines.llama_cpp:ENGINE",
    "endpoint": "hotloop.baselines.endpoint:ENGINE",
}
"""The registry: name in ``EngineConfig.engine`` -> ``module:attribute`` of its ``EngineKind``."""


def _unchanged(config: EngineConfig) -> EngineConfig:
    return config


def _any_device(config: EngineConfig) -> None:
    pass


def _unknown(config: EngineConfig) -> MemoryPlan | None:  # noqa: ARG001
    return None


@dataclass(frozen=True, kw_only=True)
class EngineKind:
    """A kind of engine, with the functions that a sweep needs.

    Attributes:
        create: Loads the engine of a configuration.
        predict: Predicts the memory of a configuration; None if it is unknown. Raises the errors
            that ``create`` raises before it loads anything.
        check_device: Raises the errors of ``create`` for a missing device, or fewer devices than
            ranks. It uses no GPU and reads no model, so that a sweep can call it before it starts a
            process.
        resolve_auto: Resolves ``auto``, as far as that is possible without a GPU. Configurations
            with the same result are equivalent, and become one cell.
        reads_checkpoints: The model is a checkpoint that hotloop itself can read. Its stored form
            and its tokenizer are then read before any process starts.
    """

    create: Callable[[EngineConfig], Engine]
    predict: Callable[[EngineConfig], MemoryPlan | None] = _unknown
    check_device: Callable[[EngineConfig], object] = _any_device
    resolve_auto: Callable[[EngineConfig], EngineConfig] = _unchanged
    reads_checkpoints: bool = False
