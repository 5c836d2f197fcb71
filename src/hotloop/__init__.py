"""hotloop: fast PyTorch-native LLM decoding, and the experiment that picks a configuration.

>>> from hotloop import LLM, SamplingParams
>>> llm = LLM("smollm2-135m", quant="int8")
>>> print(llm.generate("The capital of France is", max_new_tokens=8).text)

torch is imported at the first use of ``LLM``, not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hotloop.errors import HotloopError
from hotloop.types import (
    Delta,
    EngineConfig,
    Generation,
    Grammar,
    SamplingParams,
    Score,
    Speculation,
    Timing,
)

if TYPE_CHECKING:
    from hotloop.engine.llm import LLM

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "Delta",
    "EngineConfig",
    "Generation",
    "Grammar",
    "HotloopError",
    "SamplingParams",
    "Score",
    "Speculation",
    "Timing",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from hotloop.engine.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
