"""Nothing in admission, prefill or a step makes the host wait for a GPU.

On a CPU the operators are recorded of which a GPU's host would wait for all work before: reading a
number, sizes that depend on values, and assigning a number to one element, which PyTorch copies
from memory that is not pinned.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_random
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hotloop import LLM, SamplingParams
from hotloop.engine.core import Admit, Command, Pending, Prefill, Step

AWAITED = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.is_nonzero.default,
}
PLAIN = SamplingParams(max_new_tokens=6, ignore_eos=True)
OPTIONS = SamplingParams(
    max_new_tokens=6,
    min_new_tokens=2,
    temperature=0.8,
    top_k=9,
    top_p=0.9,
    min_p=0.01,
    seed=5,
    repetition_penalty=1.2,
    presence_penalty=0.5,
    frequency_penalty=0.5,
    logit_bias=((9, 3.0),),
    logprobs=2,
)


class Waits(TorchDispatchMode):
    """Records the operators that the host of a GPU would wait in."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        assigns = func is torch.ops.aten.copy_.default and args[0].dim() == 0
        if func in AWAITED or assigns:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("waits"))


@contextmanager
def watched(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[str]]]:
    """The waits of each kind of command that an engine runs in the block."""
    found: dict[str, list[str]] = {}
    run = llm._runner.run

    def watching(command: Command[Any]) -> Pending[Any]:
        with Waits() as waits:
            pending = run(command)
        found.setdefault(type(command).__name__, []).extend(waits.found)
        return pending

    with monkeypatch.context() as patch:
        patch.setattr(llm._runner, "run", watching)
        yield found


def test_an_assignment_of_a_number_is_seen_as_a_wait():
    tensor = torch.zeros(3)
    with Waits() as waits:
        tensor[1] = 5.0
        float(tensor[1])
    assert len(waits.found) == 2
    with Waits() as waits:
        tensor[1].fill_(5.0)
        tensor[1:] = 5.0
        tensor[:, None][1] = Tensor([3.0])
    assert waits.found == []


@pytest.mark.parametrize("params", [PLAIN, OPTIONS], ids=["greedy", "with options"])
@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_admission_prefill_and_steps_wait_for_nothing(folder, monkeypatch, params, draft):
    options = {"draft": draft, "draft_policy": "always", "draft_tokens": 2, "max_batch_size": 3}
    with LLM(str(folder), dtype="float32", prefill_chunk=16, **options) as llm:
        stepper = llm._runner._stepper  # which reads drafts only on a CPU
        monkeypatch.setattr(stepper, "_device", torch.device("meta"))
        monkeypatch.setattr(stepper, "_timestamp", time.perf_counter)
        with watched(llm, monkeypatch) as found:
            llm.generate([list(range(2, 40)), [5, 6], [9]], params)
    assert {Admit.__name__, Prefill.__name__, Step.__name__} <= found.keys()
    assert {kind: waits for kind, waits in found.items() if waits and kind != "MoveRow"} == {}
