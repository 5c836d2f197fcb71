from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import write_random
from transformers import LlamaForCausalLM

from hotloop import LLM
from hotloop.errors import ModelNotFoundError
from hotloop.weights.hub import resolve_model


@pytest.fixture(scope="session", autouse=True)
def _compiled_code_stays_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model that most tests share."""
    return write_random(tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="session")
def llm(folder: Path) -> LLM:
    """It, in float32, of three rows."""
    return LLM(str(folder), dtype="float32", max_batch_size=3)


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The path of a trained model, where it is pulled."""
    try:
        return str(resolve_model("smollm2-135m"))
    except ModelNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def twin(folder: Path) -> LlamaForCausalLM:
    """It, in transformers."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def twin_logits(twin: LlamaForCausalLM) -> Callable[[list[int]], torch.Tensor]:
    """Its float32 logits [T, V] of a whole sequence, without a cache."""

    @torch.inference_mode()
    def logits(ids: list[int]) -> torch.Tensor:
        return twin(torch.tensor([ids]), use_cache=False).logits[0]

    return logits
