"""Ranks that are processes compute what one computes, from encodings of other tools.

On a CPU, and with ``pytest -m gpu`` in fused steps of two GPUs.
``test_encodings_on_ranks`` has every encoding and degree, with threads for ranks.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import ALTERNATIVES, assert_top_two_agree
from every_encoding import ENCODINGS
from stored_models import Encode, Stored, write_stored
from test_awq_gptq import awq, gptq
from test_compressed_tensors import FORMATS, compressed, scheme_of
from test_encodings_on_ranks import DIVIDED
from test_fp8_bitsandbytes import blocks, nf4, one_scale
from torch import Tensor

from hotloop import LLM, Generation, SamplingParams

pytestmark = pytest.mark.usefixtures("forked_processes")

GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True, logprobs=ALTERNATIVES)
PROMPTS = [[5, 6, 7], list(range(2, 25)), [11]]

TOLD_BY_TENSORS: Mapping[str, Encode] = {
    "awq": awq(32),
    "gptq": gptq(32, symmetric=True),
    "int4": compressed(scheme_of(FORMATS["int4 in groups"][0], **FORMATS["int4 in groups"][1])),
    "int8": compressed(scheme_of(FORMATS["int8 as it is"][0], **FORMATS["int8 as it is"][1])),
    "block fp8": blocks(),
    "per-tensor fp8": one_scale((), "weight_scale"),
    "nf4": nf4(nested=True),
}
"""Encodings that need no description."""

ON_GPUS = ["awq", "gptq", "gptq of 8 bits", "gptq per channel", "int4 in groups, asymmetric"]
ON_GPUS += ["block fp8", "per-tensor fp8", "nf4, nested", "nvfp4", "mxfp4"]
ON_GPUS += ["Q4_0", "Q4_1", "Q8_0", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS"]


def answers(model: Path, n: int, **options: Any) -> list[Generation]:
    with LLM(str(model), max_seq_len=48, tensor_parallel=n, **options) as llm:
        return llm.generate(PROMPTS, GREEDY)


@pytest.fixture(scope="module")
def each_layer_in_another(tmp_path_factory: pytest.TempPathFactory) -> Path:
    encodings = list(TOLD_BY_TENSORS.values())

    def encode(name: str, weight: Tensor) -> Stored | None:
        if name == "lm_head":
            return None
        return encodings[int(name.split(".")[2])](name, weight)

    folder = tmp_path_factory.mktemp("mixed")
    keys = DIVIDED | {"num_hidden_layers": len(encodings)}
    return write_stored(folder, encode, None, **keys)[0]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_layers_of_every_kind_give_the_tokens_of_one_rank(each_layer_in_another, n):
    fixed = {"device": "cpu", "dtype": "float32", "max_batch_size": len(PROMPTS)}
    ours, theirs = (answers(each_layer_in_another, ranks, **fixed) for ranks in (n, 1))
    assert [g.token_ids for g in ours] == [g.token_ids for g in theirs]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("encoding", ON_GPUS)
def test_fused_steps_of_two_gpus_agree_with_one_to_the_top_two(encoding, tmp_path):
    model = ENCODINGS[encoding](tmp_path, **DIVIDED)
    fixed = {"device": "cuda", "execution": "fused", "max_batch_size": len(PROMPTS)}
    assert_top_two_agree(answers(model, 2, **fixed), answers(model, 1, **fixed), 2**-4)
