"""A gate before an engine's steps, so that a test decides what happens while they last."""

import threading
from typing import Any

import pytest
from waiting import HANG_S

from hotloop import LLM


class Gate:
    """Stops the engine before its next command, until it is opened.

    Args:
        llm: The engine.
        patch: Removes the gate when the test ends.
        n_free: Commands that it lets through before.
    """

    def __init__(self, llm: LLM, patch: pytest.MonkeyPatch, *, n_free: int = 0) -> None:
        self.open, run, left = threading.Event(), llm._runner.run, [n_free]

        def gated(command: Any) -> Any:
            left[0] -= 1
            assert left[0] >= 0 or self.open.wait(HANG_S), "the gate was never opened"
            return run(command)

        patch.setattr(llm._runner, "run", gated)
