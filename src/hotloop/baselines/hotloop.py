"""hotloop's own engine. torch is imported when a function is called."""

from __future__ import annotations

from hotloop.baselines import EngineKind
from hotloop.types import Engine, EngineConfig, MemoryPlan


def create(config: EngineConfig) -> Engine:
    """Loads the engine."""
    from hotloop.engine.llm import LLM

    return LLM(config)


def predict(config: EngineConfig) -> MemoryPlan:
    """Predicts its memory; see ``predict_memory``."""
    from hotloop.engine.memory import predict_memory

    return predict_memory(config)


def check_device(config: EngineConfig) -> None:
    """Refuses a missing device; see ``engine.setup.find_device``."""
    from hotloop.engine import setup

    setup.find_device(config)


def resolve_auto(config: EngineConfig) -> EngineConfig:
    """Resolves ``auto``; see ``engine.setup.resolve_auto``."""
    from hotloop.engine import setup

    return setup.resolve_auto(config)


ENGINE = EngineKind(
    create=create,
    predict=predict,
    check_device=check_device,
    resolve_auto=resolve_auto,
    reads_checkpoints=True,
)
